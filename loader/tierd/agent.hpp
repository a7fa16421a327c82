// SPDX-License-Identifier: GPL-2.0-or-later
// The guest's end of HyperFlex: hyperflex.ko seen through sysfs, and the agent
// channel, a virtio-serial port by which tierhostd sends targets and asks for
// statistics. Independent of what is seated: an idle tierd serves it too.
//
//   request   {"id": 7, "balloon_bytes": {"fast": N, "slow": N}}   one line; without
//             balloon_bytes it only asks
//   answer    {"schema": 1, "id": 7, "error": null, "slow_miss_share": x, "tiers":
//             [{"role": "fast", "size_bytes": N, "balloon_bytes": N, ...}, ...]}
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <thread>

#include <hypertier/abi.h>

#include "result.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {

struct Balloon {
  std::uint64_t size_bytes = 0, balloon_bytes = 0, target_bytes = 0;
  std::uint64_t free_bytes = 0;  // of the node, now
  std::uint64_t migrated_blocks_total = 0, oom_pages_total = 0;
};

// hyperflex.ko, if a device is bound to it. Every call looks anew: the driver
// comes and goes.
class BalloonDriver {
 public:
  explicit BalloonDriver(std::filesystem::path sysfs = "/sys") : sysfs_(std::move(sysfs)) {}
  bool present() const { return !device().empty(); }
  [[nodiscard]] Result<std::array<Balloon, HT_TIERS>> read() const;
  [[nodiscard]] Result<> aim(std::array<std::uint64_t, HT_TIERS> balloon_bytes) const;
  double slow_miss_share() const;

  // What has to leave the fast tier so that its balloon gets its memory; 0
  // without the driver.
  std::uint64_t fast_missing_bytes() const;
  // How long the driver waits for that before it pushes out whatever is in its
  // way; 0: not at all.
  void demote_first(unsigned milliseconds) const;
  // 0 to 1: what the guest suffers, for the host's slowdown-driven allocator.
  void tell_slow_miss_share(double share) const;

 private:
  std::filesystem::path device() const;
  std::filesystem::path sysfs_;
};

// The answer to one line of the channel.
std::string answer_line(const BalloonDriver& driver, const std::string& line);

// Serves the channel on a thread of its own, for as long as it lives. Without
// such a port there is no thread.
class FlexAgent {
 public:
  FlexAgent();
  ~FlexAgent();
  FlexAgent(const FlexAgent&) = delete;

 private:
  Fd port_, stop_;
  std::thread thread_;
};

}  // namespace hypertier
