// SPDX-License-Identifier: GPL-2.0-or-later
// All that exists only while a policy is seated: the module held open, the
// sampler, the engine, the kernel's own tiering switched off; and the scopes,
// each with its thread. Making one starts it, destroying one restores the
// machine.
//
// A scope is a cgroup with a seat, or with a budget below one: the policy of the
// nearest seat at or above it answers, its ranks and bounds are its own.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "adapter/adapter.hpp"
#include "adapter/cgroups.hpp"
#include "adapter/kernel_settings.hpp"
#include "adapter/module.hpp"
#include "adapter/tiers.hpp"
#include "engine/arbiter.hpp"
#include "engine/engine.hpp"
#include "policy/policy.hpp"
#include "result.hpp"
#include "sources/rate_control.hpp"
#include "tierd/agent.hpp"
#include "tierd/budget.hpp"
#include "tierd/events.hpp"
#include "tierd/policy_seat.hpp"
#include "tierd/protocol.hpp"
#include "tierd/scope_thread.hpp"

namespace hypertier {

struct TieringOptions {
  TierOverrides tiers;
  std::uint32_t granules = 0;
  std::string source;  // as choose_source() takes it; empty: choose
  SourceSettings sampling;
  // CPU time that sampling may take, as a share of all online CPUs'. Not set: the
  // default, for sources that hold one.
  std::optional<double> cpu_share;
  bool hold_cpu_share = true;  // false: none but cpu_share
  unsigned burst = RateControl::kBurst;  // so many times as many samples while an estimate is new; 1: not more
  EventLog* events = nullptr;  // outlives the tiering
};

// What the scopes' threads and the kernel have to tell the main thread.
struct News {
  enum Kind {
    kEjected,       // the default has taken over
    kSeatEmpty,     // ejected, and no default could take over
    kEpochFailed,   // with an error that the epoch before had not
    kCgroupGone,    // a cgroup with a seat or a budget was removed
    kEventsLost,    // process events: which cgroups are gone is not known either
  } kind;
  std::string cgroup;  // of the scope or the seat
  std::optional<PolicyExit> exit;
  std::string text;
};

class Tiering {
 public:
  // Starts with one seat, of `policy` (not loaded yet). On error nothing is changed.
  static Result<std::unique_ptr<Tiering>> start(const TieringOptions& options, const Budgets& budgets,
                                                std::uint64_t cgroup_id, const std::string& cgroup, PolicyObject policy,
                                                const MoveTerms& moves);
  ~Tiering();

  // The calls below are the main thread's.
  // Hot swap where there is a seat, else another seat (policy not loaded yet).
  // On error nothing is changed.
  Result<> seat(std::uint64_t cgroup_id, const std::string& cgroup, PolicyObject policy, const MoveTerms& moves);
  // Its processes fall to the nearest seat above.
  void unseat(const std::string& cgroup);
  const std::map<std::string, std::shared_ptr<PolicySeat>>& seats() const { return seats_; }
  Result<> set_budgets(const Budgets& budgets);

  const std::map<std::string, std::unique_ptr<ScopeThread>>& scopes() const { return scopes_; }
  // The scope that manages that cgroup; nullptr: none.
  ScopeThread* scope_of(const std::string& cgroup) const;

  int events_fd() const { return adapter_->events_fd(); }
  Result<> take_events();
  int news_fd() const { return news_fd_.get(); }
  // Readable each half second: time for hold_cpu_share().
  int judge_fd() const { return judge_fd_.get(); }
  // Sampling is one for all scopes, and so is what it may cost.
  void hold_cpu_share();
  std::vector<News> take_news();

  // What status and ranges show.
  const Tiers& tiers() const { return tiers_; }
  const ChosenSource& source() const { return source_; }
  const ht_module_info& module() const { return module_info_; }
  const Engine& engine() const { return *engine_; }
  SamplerCost sampler_cost() const { return adapter_->cost(); }
  BitsStats bits() const { return adapter_->bits(); }
  double cpu_share_max() const { return cpu_share_max_; }  // 0: none is held
  double cpu_share() const;
  std::uint64_t period() const;  // misses per sample, now
  double burst() const;          // how many times as many samples as without a burst
  const RateControl& rate_control() const { return rate_; }
  GranuleUse granules() const { return adapter_->granules(); }
  std::uint32_t sampling_cpus() const { return adapter_->sampling_cpus(); }
  // Samples per fast-tier page and epoch, over all scopes.
  double density() const;
  // What the scope of that path may do.
  MoveTerms move_terms(const std::string& path, const PolicySeat::Terms& terms) const;

 private:
  Tiering() = default;
  Result<> follow_plan();
  void tell(News news);
  void log(const Scope& scope, const PolicySeat& seat, const EpochReport& report);
  ScopeThread::Outcome epoch(Scope& scope, PolicySeat& seat, std::uint64_t epoch_ns);
  void arbitrate_for(const Scope& scope, EpochInput& input);
  void make_room_for_balloon(const Scope& scope, __u64 used_pages, EpochInput& input);
  void tell_slow_miss_share();
  std::uint64_t sampling_ns() const;
  void begin_burst(bool shifted);
  void sample_each(std::uint64_t period);

  // Declared in the order of construction: destroyed the other way round, the
  // threads and seats first and the module, whose close restores what is left,
  // last.
  std::optional<Module> module_;
  ht_module_info module_info_{};
  Tiers tiers_;
  ChosenSource source_;
  EventLog* events_ = nullptr;
  Cgroups cgroups_;
  std::unique_ptr<KernelSettings> settings_;
  std::unique_ptr<Adapter> adapter_;
  std::unique_ptr<Engine> engine_;
  std::uint32_t cpus_ = 1;
  double cpu_share_max_ = 0;
  unsigned burst_ = 1;
  mutable std::mutex rate_lock_;
  RateControl rate_;       // of sampling
  RateControl bits_rate_;  // of reading accessed bits, which holds its budget itself
  std::uint64_t period_ = 0;
  std::uint64_t sampling_ns_ = 0;  // sampling_ns() when it was last looked at
  std::uint64_t bits_ns_ = 0;      // the same of reading bits
  std::chrono::steady_clock::time_point judged_;
  Fd judge_fd_;
  Fd news_fd_;
  std::mutex news_lock_;
  std::vector<News> news_;

  // Who asks for how much; by cgroup id.
  struct Standing {
    Budget budget;
    std::optional<Demand> demand;  // as of the scope's last epoch
    std::string error;             // of the last epoch
    std::optional<Decision> decision;
    std::array<std::uint64_t, HT_TIERS> counts{};  // EpochReport::tier_counts
  };
  const BalloonDriver balloon_;  // of this guest, if it has one
  std::mutex standings_lock_;
  std::map<std::uint64_t, Standing> standings_;
  std::map<std::uint64_t, std::string> watched_;  // cgroups whose end matters, under standings_lock_

  std::map<std::string, std::shared_ptr<PolicySeat>> seats_;
  Budgets budgets_;
  std::map<std::string, std::unique_ptr<ScopeThread>> scopes_;
};

// Pages of a tier that hold anonymous or file memory, and those that are free.
struct TierPages {
  std::uint64_t total = 0, free = 0, used = 0;
};
Result<std::array<TierPages, HT_TIERS>> tier_pages(const Tiers& tiers, const Roots& roots = {});

}  // namespace hypertier
