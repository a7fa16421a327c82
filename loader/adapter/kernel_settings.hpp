// SPDX-License-Identifier: GPL-2.0-or-later
// The kernel's own tiering is off while a policy is seated: it would move
// pages against the policy. What was found is restored by restore(), and by
// the module if tierd dies first.
#pragma once

#include <optional>
#include <string>

#include "adapter/module.hpp"
#include "result.hpp"
#include "sources/source.hpp"

namespace hypertier {

class KernelSettings {
 public:
  // module may be null (tests): then nothing is restored after a kill -9.
  KernelSettings(Module* module, Roots roots = {});
  ~KernelSettings();  // restores

  // numa_balancing := 0; records numa_balancing and demotion_enabled first.
  // Does nothing when seated already.
  [[nodiscard]] Result<> seat();
  [[nodiscard]] Result<> restore();
  bool seated() const { return seated_; }

  // As they are now, trimmed; nullopt where the kernel has no such setting.
  std::optional<std::string> numa_balancing() const;
  std::optional<std::string> demotion_enabled() const;

 private:
  Module* module_;
  Roots roots_;
  bool seated_ = false;
  std::optional<std::string> recorded_numa_balancing_;
  std::optional<std::string> recorded_demotion_;
};

}  // namespace hypertier
