// SPDX-License-Identifier: GPL-2.0-or-later
// Process events over bpf/spaces.bpf.c.
#pragma once

#include <hypertier/abi.h>

#include <functional>
#include <memory>

#include "adapter/maps.hpp"
#include "adapter/programs.hpp"

namespace hypertier {

class SpaceWatcher {
 public:
  using Handler = std::function<void(const ht_space_event&)>;

  // programs: loaded with ring_bytes
  static Result<std::unique_ptr<SpaceWatcher>> open(Programs programs);
  ~SpaceWatcher();

  [[nodiscard]] Result<> start();
  [[nodiscard]] Result<> pin(const std::filesystem::path& dir);
  void stop();

  int fd() const;
  // See Adapter::events().
  [[nodiscard]] Result<> events(const Handler& handler, const std::function<void()>& on_rescan);
  // One HT_SPACE_TASK event for each process that runs.
  [[nodiscard]] Result<> scan(const Handler& handler);

 private:
  explicit SpaceWatcher(Programs programs) : programs_(std::move(programs)) {}
  Result<> consume(const Handler& handler);
  std::uint64_t lost() const;

  Programs programs_;
  ring_buffer* ring_ = nullptr;
  const Handler* handler_ = nullptr;  // during consume() only
  std::uint64_t lost_seen_ = 0;
  bool scan_due_ = false;
};

}  // namespace hypertier
