// SPDX-License-Identifier: GPL-2.0-or-later
// Process events over bpf/spaces.bpf.c.
#pragma once

#include <hypertier/abi.h>

#include <functional>
#include <memory>

#include "adapter/maps.hpp"

struct spaces_bpf;

namespace hypertier {

class SpaceWatcher {
 public:
  using Handler = std::function<void(const ht_space_event&)>;

  // ring_bytes: room for events that wait, a power of two of pages
  static Result<std::unique_ptr<SpaceWatcher>> open(std::uint32_t ring_bytes = 256 << 10);
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
  SpaceWatcher() = default;
  Result<> consume(const Handler& handler);
  std::uint64_t lost() const;

  spaces_bpf* skeleton_ = nullptr;
  ring_buffer* ring_ = nullptr;
  const Handler* handler_ = nullptr;  // during consume() only
  std::uint64_t lost_seen_ = 0;
  bool scan_due_ = false;
};

}  // namespace hypertier
