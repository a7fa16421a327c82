// SPDX-License-Identifier: GPL-2.0-or-later
// /dev/hypertier: held open by tierd for its whole life. When the descriptor
// closes, by exit or by kill -9, the module writes back what leave_restore()
// handed over.
#pragma once

#include <hypertier/abi.h>

#include <filesystem>
#include <string_view>

#include "result.hpp"

namespace hypertier {

class Module {
 public:
  static Result<Module> open(const std::filesystem::path& device = HT_DEVICE);
  ~Module();
  Module(Module&& other) noexcept;
  Module& operator=(Module&& other) noexcept;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  [[nodiscard]] Result<ht_module_info> info() const;
  [[nodiscard]] Result<> set_tiers(const ht_tiers& tiers) const;
  // Returns when no interrupt handler that ran before, no sampler therefore, is
  // running any more.
  [[nodiscard]] Result<> settle() const;
  // The policy of that generation in the seat broke a rule that the engine
  // watches: the module tells it so when it leaves. Nothing if it has left.
  void eject(__u64 cgroup_id, __u64 generation, const tier_exit_info& exit) const;
  // At close, the module writes value to the open file fd.
  [[nodiscard]] Result<> leave_restore(int fd, std::string_view value) const;
  // Drops everything that leave_restore() handed over.
  [[nodiscard]] Result<> forget() const;

 private:
  explicit Module(int fd) : fd_(fd) {}
  int fd_ = -1;
};

}  // namespace hypertier
