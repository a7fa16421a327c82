// SPDX-License-Identifier: GPL-2.0-or-later
#include "engine.hpp"

#include <algorithm>

#include "roster.hpp"
#include "scope.hpp"

namespace hypertier {
namespace {

template <std::size_t N>
const char* name_of(const std::array<const char*, N>& names, std::size_t index) {
  return index < N ? names[index] : "unknown";
}

void add(EngineTotals& sum, const EngineTotals& more) {
  sum.epochs_total += more.epochs_total;
  sum.samples_total += more.samples_total;
  for (int s = 0; s < kStrays; ++s) sum.stray_samples_total[s] += more.stray_samples_total[s];
  sum.promoted_pages_total += more.promoted_pages_total;
  sum.demoted_pages_total += more.demoted_pages_total;
  sum.exchanged_pairs_total += more.exchanged_pairs_total;
  sum.move_failed_pages_total += more.move_failed_pages_total;
  sum.refused_pages_total += more.refused_pages_total;
  for (int r = 0; r < HT_MOVE_RESULTS; ++r) sum.failed_pages_total[r] += more.failed_pages_total[r];
  for (int m = 0; m < HT_MOVERS; ++m) sum.mover_pages_total[m] += more.mover_pages_total[m];
  sum.flush_calls_total += more.flush_calls_total;
  sum.batches_total += more.batches_total;
  sum.exchange_ns_total += more.exchange_ns_total;
  sum.walk_ns_total += more.walk_ns_total;
  sum.policy_ns_total += more.policy_ns_total;
  sum.policy_failures_total += more.policy_failures_total;
  sum.split_pages_total += more.split_pages_total;
  sum.splits_total += more.splits_total;
  sum.merges_total += more.merges_total;
  sum.reversed_pages_total += more.reversed_pages_total;
  sum.rate_limited_pages_total += more.rate_limited_pages_total;
  sum.dry_run_pages_total += more.dry_run_pages_total;
}

}  // namespace

const char* decision_name(Decision decision) {
  static constexpr std::array names = {"moved",        "no_moves",       "policy_failed", "no_heat",
                                       "all_hot_fast", "nothing_colder", "all_refused",   "over_budget",    "rate_limited",
                                       "cooling",      "dry_run"};
  return name_of(names, static_cast<std::size_t>(decision));
}

const char* move_result_name(enum ht_move_result result) {
  static constexpr std::array<const char*, HT_MOVE_RESULTS> names = {
      "none", "done", "gone", "already", "pinned", "busy", "special", "mismatch", "no_memory", "partner", "other"};
  return name_of(names, result);
}

const char* mover_name(enum ht_mover mover) {
  static constexpr std::array<const char*, HT_MOVERS> names = {"none", "exchange", "migrate", "syscall"};
  return name_of(names, mover);
}

const char* drop_name(enum ht_drop drop) {
  static constexpr std::array<const char*, HT_DROPS> names = {"no_address", "kernel_address", "no_space", "busy",
                                                              "full"};
  return name_of(names, drop);
}

const char* stray_name(Stray stray) {
  static constexpr std::array<const char*, kStrays> names = {"unknown_space", "unmapped", "not_managed",
                                                             "no_scope"};
  return name_of(names, static_cast<std::size_t>(stray));
}

Engine::Engine(Machine& machine, SampleSource& source, const EngineSettings& settings, PathOf path_of)
    : machine_(machine), source_(source), settings_(settings) {
  if (!path_of) path_of = [](__u64) { return std::string("/"); };
  roster_ = std::make_unique<Roster>(
      std::move(path_of),
      [this](__u64 scope, const ht_space_event& event) { scopes_.at(scope)->inbox.events.push_back(event); },
      [this](__u64 space, __u64 from, __u64 to) {
        if (to == kNoScope) source_.manage(space, 0, {});
        // What was put aside goes with it.
        auto old = scopes_.find(from);
        if (old == scopes_.end()) return;
        auto& granules = old->second->inbox.granules;
        auto granule = granules.lower_bound({space, 0});
        while (granule != granules.end() && granule->first.first == space) {
          if (auto next = scopes_.find(to); next != scopes_.end()) next->second->inbox.add(granule->second);
          granule = granules.erase(granule);
        }
        std::erase_if(old->second->inbox.bits, [&](const ht_bits& bits) {
          if (bits.space != space) return false;
          if (auto next = scopes_.find(to); next != scopes_.end()) next->second->inbox.bits.push_back(bits);
          return true;
        });
      });
}

Engine::~Engine() = default;

Scope& Engine::add_scope(__u64 cgroup_id, const std::string& path, std::unique_ptr<PolicyCaller> caller) {
  std::lock_guard intake(intake_);
  auto& scope = scopes_[cgroup_id];
  scope = std::make_unique<Scope>(machine_, std::move(caller), settings_, cgroup_id, path);
  roster_->add_scope(cgroup_id, path);
  return *scope;
}

void Engine::remove_scope(Scope& scope) {
  std::lock_guard intake(intake_);
  roster_->remove_scope(scope.cgroup_id());
  std::lock_guard shown(shown_);
  add(ended_totals_, scope.published.totals);
  scopes_.erase(scope.cgroup_id());
}

void Engine::space_event(const ht_space_event& event) {
  std::lock_guard intake(intake_);
  roster_->event(event);
}

Result<> Engine::space_events(const std::function<Result<>(Roster&)>& take) {
  std::lock_guard intake(intake_);
  return take(*roster_);
}

// Drains the source and folds what is the scope's, with what others' drains have
// put aside for it.
Result<> Engine::drain(Scope& scope, const EpochInput& input, __u64& samples, ht_sampler_stats& stats, EpochReport& report) {
  std::lock_guard intake(intake_);
  // What the poll found out that no event had told.
  for (auto [pid, space] : std::exchange(scope.found(), {})) {
    auto process = roster_->processes().find(pid);
    if (process == roster_->processes().end()) continue;
    ht_space_event event{};
    event.kind = space ? HT_SPACE_TASK : HT_SPACE_EXIT;
    event.pid = pid;
    event.space = space;
    event.cgroup_id = process->second.cgroup_id;
    process->second.comm.copy(event.comm, sizeof(event.comm));
    roster_->event(event);
  }
  for (const Scope::Forgotten& gone : std::exchange(scope.forgotten(), {}))
    source_.forget(gone.space, gone.start, gone.end);
  for (const Scope::Managed& managed : std::exchange(scope.managed(), {}))
    if (roster_->scope_of_space(managed.space) == scope.cgroup_id())
      source_.manage(managed.space, managed.pid, managed.mappings);
  for (__u64 space : roster_->take_ended()) {
    source_.manage(space, 0, {});
    source_.forget(space, 0, HT_UNKNOWN64);
  }

  auto drained = source_.drain([&](const ht_granule& granule) {
    ++report.granules;
    const __u64 owner = roster_->scope_of_space(granule.space);
    if (owner != kNoScope && owner != scope.cgroup_id()) return scopes_.at(owner)->inbox.add(granule);
    samples += granule.samples;
    if (owner == kNoScope) {
      const bool known = roster_->has_space(granule.space);
      report.stray_samples[static_cast<std::size_t>(known ? Stray::kNoScope : Stray::kUnknownSpace)] += granule.samples;
    } else {
      scope.fold(granule, report);
    }
  });
  for (const auto& waiting : std::exchange(scope.inbox.granules, {})) {
    samples += waiting.second.samples;
    scope.fold(waiting.second, report);
  }
  source_.drain_bits([&](const ht_bits& bits) {
    ++report.granules;
    const __u64 owner = roster_->scope_of_space(bits.space);
    if (owner == scope.cgroup_id())
      scope.fold(bits);
    else if (owner != kNoScope)
      scopes_.at(owner)->inbox.bits.push_back(bits);
  });
  for (const ht_bits& waiting : std::exchange(scope.inbox.bits, {})) scope.fold(waiting);
  samples += scope.close(std::min(input.fast_capacity_pages, input.fast_max_pages));
  // One interval for all: the shortest that a scope wants.
  __u64 aim_ns = HT_UNKNOWN64;
  for (const auto& each : scopes_)
    if (each.second->bits_interval_ns) aim_ns = std::min(aim_ns, each.second->bits_interval_ns);
  if (aim_ns != HT_UNKNOWN64) source_.aim(aim_ns);
  stats = source_.stats();
  return drained;
}

Result<EpochReport> Engine::epoch(Scope& scope, const EpochInput& input) {
  EpochReport report;
  std::vector<ht_space_event> events;
  __u64 epoch = 0;
  {
    std::lock_guard intake(intake_);
    events = std::exchange(scope.inbox.events, {});
    std::lock_guard shown(shown_);
    epoch = ++scope.published.totals.epochs_total;
  }
  // Mappings before samples: what was mapped in this epoch is known by then.
  __u64 samples = 0;
  ht_sampler_stats stats{};
  Result<> done = scope.begin(epoch, events, input, report);
  if (done) done = drain(scope, input, samples, stats, report);
  if (done) done = scope.run(input, samples, report);

  std::lock_guard shown(shown_);
  EngineTotals& totals = scope.published.totals;
  // Samples are counted even if the epoch failed later: they are drained.
  totals.samples_total += samples;
  for (int s = 0; s < kStrays; ++s) totals.stray_samples_total[s] += report.stray_samples[s];
  // Another scope's epoch may have ended meanwhile.
  if (stats.samples_total > stats_.samples_total) stats_ = stats;
  if (!done) return std::unexpected(done.error());
  const ht_exchange_run& moved = report.moved;
  totals.promoted_pages_total += moved.promoted_pages;
  totals.demoted_pages_total += moved.demoted_pages;
  totals.exchanged_pairs_total += moved.exchanged_pairs;
  for (int r = 0; r < HT_MOVE_RESULTS; ++r) {
    totals.failed_pages_total[r] += moved.failed_pages[r];
    totals.move_failed_pages_total += moved.failed_pages[r];
  }
  for (int m = 0; m < HT_MOVERS; ++m) totals.mover_pages_total[m] += moved.mover_pages[m];
  totals.flush_calls_total += moved.flush_calls;
  totals.batches_total += moved.batches;
  totals.exchange_ns_total += moved.ns;
  totals.walk_ns_total += report.walk_ns;
  totals.policy_ns_total += report.policy_ns;
  totals.policy_failures_total += report.decision == Decision::kPolicyFailed;
  totals.refused_pages_total += report.refused_pages;
  totals.split_pages_total += moved.split_pages;
  totals.splits_total += report.splits;
  totals.merges_total += report.merges;
  totals.reversed_pages_total += report.reversed_pages;
  totals.rate_limited_pages_total += report.rate_limited_pages;
  totals.dry_run_pages_total += report.dry_run_pages;
  scope.published.report = report;
  if (report.rested) return report;
  scope.published.ranges.assign(scope.last().begin(), scope.last().end());
  scope.published.notes.assign(scope.last_notes().begin(), scope.last_notes().end());
  scope.published.index = scope.index();
  scope.published.history.add(epoch, report.cut_heat, scope.last(), scope.index(), scope.last_moved());
  return report;
}

EngineTotals Engine::totals(const Scope& scope) const {
  std::lock_guard shown(shown_);
  return scope.published.totals;
}

EngineTotals Engine::totals() const {
  std::lock_guard intake(intake_);
  std::lock_guard shown(shown_);
  EngineTotals sum = ended_totals_;
  for (const auto& scope : scopes_) add(sum, scope.second->published.totals);
  return sum;
}

std::optional<EpochReport> Engine::report(const Scope& scope) const {
  std::lock_guard shown(shown_);
  return scope.published.report;
}

ht_sampler_stats Engine::sampler_stats() const {
  std::lock_guard shown(shown_);
  return stats_;
}

std::vector<RangeView> Engine::ranges(const Scope& scope, std::optional<__u32> pid) const {
  std::lock_guard intake(intake_);
  std::lock_guard shown(shown_);
  const auto& processes = roster_->processes();
  __u64 space = 0;
  if (pid) {
    auto process = processes.find(*pid);
    if (process == processes.end()) return {};
    space = process->second.space;
  }
  std::vector<RangeView> views;
  for (const tier_range& range : scope.published.ranges) {
    if (pid && range.space != space) continue;
    RangeView view{range, {}};
    if (auto process = processes.find(range.pid); process != processes.end()) view.comm = process->second.comm;
    views.push_back(std::move(view));
  }
  return views;
}

Result<std::optional<Explanation>> Engine::explain(const Scope& scope, __u32 pid, __u64 address) const {
  Explanation found;
  {
    std::lock_guard intake(intake_);
    std::lock_guard shown(shown_);
    auto process = roster_->processes().find(pid);
    if (process == roster_->processes().end()) return std::nullopt;
    const __u64 space = process->second.space;
    const auto& ranges = scope.published.ranges;
    const auto at = range_of(ranges, scope.published.index.get(), space, address);
    if (!at) return std::nullopt;
    const tier_range* range = &ranges[*at];
    found.view = {*range, process->second.comm};
    found.notes = scope.published.notes[*at];
    found.ranges = static_cast<__u32>(ranges.size());
    for (const tier_range& other : ranges) found.rank += other.heat > range->heat;
    found.history = scope.published.history.of(space, address);
  }
  // Where the page is now: counts of ranges are as old as their last walk.
  std::lock_guard hold(machine_.lock);
  ht_walks_run& run = machine_.walks();
  run.nr = 1;
  run.pages_used = 0;
  run.walk[0] = {};
  run.walk[0].space = found.view.range.space;
  run.walk[0].pid = pid;
  run.walk[0].start = HT_PAGE_ADDR(address);
  run.walk[0].end = run.walk[0].start + HT_PAGE_SIZE;
  run.walk[0].list_tier = HT_TIER_NONE;
  if (auto done = machine_.run_walks(); !done) return std::unexpected(done.error());
  for (int t = 0; t < HT_TIERS; ++t) found.page_tier_pages[t] = run.walk[0].tier_pages[t];
  return found;
}

std::vector<ProcessView> Engine::processes() const {
  std::lock_guard intake(intake_);
  std::vector<ProcessView> views;
  for (const auto& [pid, process] : roster_->processes())
    views.push_back({pid, process.comm, process.space, process.cgroup_id, process.scope});
  return views;
}

}  // namespace hypertier
