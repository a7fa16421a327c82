// SPDX-License-Identifier: GPL-2.0-or-later
// While a policy is seated, what makes the kernel itself move pages is off:
// its own tiering would move them against the policy, and its compaction ahead
// of demand and its boosts of watermarks would move and reclaim those of a fast
// node that the policy has filled, again and again, to no end. What was found is restored by restore(), and by the
// module if tierd dies first.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

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

  // kernel.numa_balancing, vm.compaction_proactiveness and
  // vm.watermark_boost_factor := 0, where the kernel has them. If one cannot be written, none is changed. Does nothing
  // when seated already. demotion_enabled only takes effect under memory
  // pressure and is left as it is.
  [[nodiscard]] Result<> seat();
  // Puts back what seat() found, but for what somebody has changed since.
  [[nodiscard]] Result<> restore();
  bool seated() const { return seated_; }

  // As they are now; nullopt where the kernel has no such setting.
  std::optional<std::string> numa_balancing() const;
  std::optional<std::string> compaction_proactiveness() const;
  std::optional<std::string> demotion_enabled() const;

 private:
  struct Setting {
    std::filesystem::path file;
    std::string found;  // before seat()
  };

  [[nodiscard]] Result<> turn_off(const std::filesystem::path& file);

  const Module* module_;
  Roots roots_;
  bool seated_ = false;
  std::vector<Setting> off_;  // what seat() has changed
};

}  // namespace hypertier
