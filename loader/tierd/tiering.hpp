// SPDX-License-Identifier: GPL-2.0-or-later
// All that exists only while a policy is seated: the module held open, the
// sampler, the engine, the kernel's own tiering switched off. Making one
// starts it, destroying one restores the machine.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "adapter/adapter.hpp"
#include "adapter/kernel_settings.hpp"
#include "adapter/module.hpp"
#include "adapter/tiers.hpp"
#include "engine/engine.hpp"
#include "policy/policy.hpp"
#include "result.hpp"
#include "sources/rate_control.hpp"

namespace hypertier {

struct TieringOptions {
  TierOverrides tiers;
  std::uint32_t granules = 0;
  std::string source;  // empty: choose
  SourceSettings sampling;
  // CPU time that sampling may take, as a share of all online CPUs'. Not set: the
  // default, for sources that hold one.
  std::optional<double> cpu_share;
  bool hold_cpu_share = true;  // false: none but cpu_share
};

// Why a policy left its seat, as status shows it.
struct PolicyExit {
  std::string kind;     // "replaced", "ejected", "unloaded"
  std::string code;     // "ok", "timeout", "invalid_action", "empty_seat"
  std::string reason;   // one sentence
  std::string message;  // what the kernel said, if anything
  std::string policy;
  std::uint64_t epoch = 0;
};

class Tiering {
 public:
  // Starts with `policy` (not loaded yet). On error nothing is changed.
  static Result<std::unique_ptr<Tiering>> start(const TieringOptions& options, PolicyObject policy);
  ~Tiering();

  // Hot swap (policy not loaded yet). On error the old one stays.
  Result<> swap(PolicyObject policy);

  const PolicyObject& policy() const { return policy_; }
  std::uint32_t epoch_ms() const { return policy_.info().epoch_ms; }
  std::uint64_t generation() const { return generation_; }
  std::uint64_t last_epoch_ns() const { return last_epoch_ns_; }  // its end, CLOCK_MONOTONIC
  std::uint64_t epoch_number() const { return report_ ? report_->scope.epoch : 0; }

  int events_fd() const { return adapter_->events_fd(); }
  Result<> take_events();

  // Ends an epoch. `ejected` is set if the default policy had to take over.
  // An error means that the machine failed and nothing was moved.
  Result<> epoch(std::optional<PolicyExit>& ejected);
  // False after an ejection that no default policy could follow.
  bool seated() const { return seat_.has_value(); }

  // What status and ranges show.
  const Tiers& tiers() const { return tiers_; }
  const ChosenSource& source() const { return source_; }
  const ht_module_info& module() const { return module_info_; }
  const Engine& engine() const { return *engine_; }
  const std::optional<EpochReport>& report() const { return report_; }
  ht_sampler_stats sampler_stats() const { return adapter_->samples().stats(); }
  SamplerCost sampler_cost() const { return adapter_->cost(); }
  BitsStats bits() const { return adapter_->bits(); }
  double cpu_share_max() const { return cpu_share_max_; }  // 0: none is held
  double cpu_share() const { return rate_.share(); }
  const RateControl& rate_control() const { return rate_; }
  GranuleUse granules() const { return adapter_->granules(); }
  std::uint32_t sampling_cpus() const { return adapter_->sampling_cpus(); }
  std::uint64_t empty_epochs_total() const { return empty_epochs_total_; }
  bool has_default() const { return default_.has_value(); }
  // Samples per fast-tier page and epoch, mean of the last 20 epochs.
  double density() const;

 private:
  Tiering() = default;
  void load_default();
  void hold_cpu_share(std::uint64_t elapsed_ns);
  std::uint64_t sampling_ns() const;
  bool eject(const ht_run& run, std::optional<PolicyExit>& ejected);

  // Declared in the order of construction: destroyed the other way round, the
  // seat first and the module, whose close restores what is left, last.
  std::optional<Module> module_;
  ht_module_info module_info_{};
  Tiers tiers_;
  ChosenSource source_;
  std::unique_ptr<KernelSettings> settings_;
  std::unique_ptr<Adapter> adapter_;
  std::unique_ptr<Engine> engine_;
  std::optional<PolicyObject> default_;  // loaded, not seated: takes over at once
  PolicyObject policy_;
  std::optional<Seat> seat_;

  std::uint32_t cpus_ = 1;
  double cpu_share_max_ = 0;
  RateControl rate_;
  std::uint64_t sampling_ns_ = 0;  // sampling_ns() when it was last looked at
  std::uint64_t unjudged_ns_ = 0;  // time that has passed since
  std::uint64_t generation_ = 1;
  std::uint64_t last_epoch_ns_ = 0;
  std::uint64_t empty_epochs_total_ = 0;
  std::optional<EpochReport> report_;
  std::deque<double> densities_;
};

// Pages of a tier that hold anonymous or file memory, and those that are free.
struct TierPages {
  std::uint64_t total = 0, free = 0, used = 0;
};
Result<std::array<TierPages, HT_TIERS>> tier_pages(const Tiers& tiers, const Roots& roots = {});

// Opens the default policy (installed beside tierd); not loaded.
Result<PolicyObject> open_default_policy();

std::uint64_t now_ns();

}  // namespace hypertier
