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
  explicit KernelSettings(const Module* module, Roots roots = {});
  ~KernelSettings();  // restores
  KernelSettings(const KernelSettings&) = delete;
  KernelSettings& operator=(const KernelSettings&) = delete;

  // numa_balancing := 0, if the kernel has it. Does nothing when seated
  // already. demotion_enabled only takes effect under memory pressure and is
  // left as it is.
  [[nodiscard]] Result<> seat();
  // Puts back what seat() found, unless somebody has changed it since.
  [[nodiscard]] Result<> restore();
  bool seated() const { return seated_; }

  // As they are now; nullopt where the kernel has no such setting.
  std::optional<std::string> numa_balancing() const;
  std::optional<std::string> demotion_enabled() const;

 private:
  std::filesystem::path numa_balancing_file() const;

  const Module* module_;
  Roots roots_;
  bool seated_ = false;
  std::optional<std::string> recorded_;  // numa_balancing before seat()
};

}  // namespace hypertier
