// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/tiering.hpp"

#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <set>
#include <utility>

#include "engine/roster.hpp"
#include "engine/scope.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {
namespace {

// How long the driver waits for us to begin: several epochs.
constexpr unsigned kBalloonPatienceMs = 3000;
// What sampling costs is judged each so many ns.
constexpr long kJudgeNs = 500'000'000;

std::string abi_text(std::uint32_t abi) { return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff); }

}  // namespace

Result<std::array<TierPages, HT_TIERS>> tier_pages(const Tiers& tiers, const Roots& roots) {
  std::array<TierPages, HT_TIERS> pages{};
  for (std::size_t tier = 0; tier < HT_TIERS; ++tier) {
    for (const int node : tiers.nodes[tier]) {
      auto read = read_node_memory(node, roots, [&](std::string_view key, std::uint64_t kib) {
        const std::uint64_t count = kib / (HT_PAGE_SIZE / 1024);
        if (key == "MemTotal:") pages[tier].total += count;
        else if (key == "MemFree:") pages[tier].free += count;
        else if (key == "AnonPages:" || key == "FilePages:") pages[tier].used += count;
      });
      if (!read) return std::unexpected(read.error());
    }
  }
  return pages;
}

Result<std::unique_ptr<Tiering>> Tiering::start(const TieringOptions& options, const Budgets& budgets,
                                                std::uint64_t cgroup_id, const std::string& cgroup, PolicyObject policy,
                                                const MoveTerms& moves) {
  std::unique_ptr<Tiering> tiering(new Tiering());
  Tiering& t = *tiering;
  t.events_ = options.events;

  auto tiers = discover_tiers(options.tiers);
  if (!tiers) return std::unexpected(tiers.error());
  t.tiers_ = std::move(*tiers);

  auto module = Module::open();
  if (!module) return std::unexpected(module.error());
  t.module_.emplace(std::move(*module));
  auto info = t.module_->info();
  if (!info) return std::unexpected(info.error());
  t.module_info_ = *info;
  if (info->abi >> 16 != HT_ABI_MAJOR)
    return fail("hypertier.ko speaks ABI " + abi_text(info->abi) + ", but this tierd " + abi_text(HT_ABI),
                "load the hypertier.ko of this release: rmmod hypertier, then modprobe hypertier");
  if (auto set = t.module_->set_tiers(t.tiers_.masks()); !set) return std::unexpected(set.error());

  if (auto loaded = policy.load(cgroup_id); !loaded) return std::unexpected(loaded.error());

  auto source = choose_source(options.sampling, options.source);
  if (!source) return std::unexpected(source.error());
  t.source_ = std::move(*source);

  AdapterOptions adapter_options;
  adapter_options.granules = options.granules;
  if (info->movers == 1U << HT_MOVER_SYSCALL)
    adapter_options.syscall_nodes = {t.tiers_.nodes[HT_TIER_FAST].front(), t.tiers_.nodes[HT_TIER_SLOW].front()};
  const bool held = t.source_.samples() && ((t.source_.holds_budget && options.hold_cpu_share) || options.cpu_share);
  // Where both kinds hold a budget each has half of it.
  const double cpu_share = options.cpu_share.value_or(RateControl::kDefaultShare);
  const double each_share = held && t.source_.bits ? cpu_share / 2 : cpu_share;
  if (t.source_.bits) adapter_options.bits_cpu_share = each_share;
  adapter_options.samples = t.source_.samples();
  adapter_options.settle = [&t] { return t.module_->settle(); };
  auto adapter = Adapter::open(adapter_options);
  if (!adapter) return std::unexpected(adapter.error());
  t.adapter_ = std::move(*adapter);

  t.settings_ = std::make_unique<KernelSettings>(&*t.module_);
  if (auto off = t.settings_->seat(); !off) return std::unexpected(off.error());

  t.engine_ = std::make_unique<Engine>(t.adapter_->machine(), t.adapter_->samples(), EngineSettings{},
                                       [&t](__u64 id) { return t.cgroups_.path_of(id); });
  t.cpus_ = static_cast<std::uint32_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  t.news_fd_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!t.news_fd_) return fail_errno("cannot make an event descriptor", errno);
  if (auto started = t.adapter_->start(t.source_); !started) return std::unexpected(started.error());
  auto seat = PolicySeat::take(cgroup_id, cgroup, std::move(policy), moves);
  if (!seat) return std::unexpected(seat.error());
  if (held || t.source_.bits) t.cpu_share_max_ = cpu_share;
  t.rate_ = RateControl(held ? each_share : 0, t.source_.own_period, t.source_.period);
  t.period_ = t.source_.period;
  t.judged_ = std::chrono::steady_clock::now();
  t.judge_fd_ = Fd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  const itimerspec each{{0, kJudgeNs}, {0, kJudgeNs}};
  if (!t.judge_fd_ || timerfd_settime(t.judge_fd_.get(), 0, &each, nullptr) != 0) return fail_errno("cannot set a timer", errno);
  t.burst_ = options.burst;
  if (((*seat)->terms().flags & HT_POLICY_ESTIMATED) != 0) t.begin_burst(false);
  t.seats_[cgroup] = std::move(*seat);
  t.budgets_ = budgets;
  if (auto followed = t.follow_plan(); !followed) return std::unexpected(followed.error());
  return tiering;
}

Tiering::~Tiering() {
  // The order of design: the epochs end, the policies leave, sampling ends, then
  // the kernel's own tiering comes back. A failed restore is left to the module,
  // which restores when its descriptor closes.
  scopes_.clear();
  // Nobody demotes or counts any more.
  balloon_.demote_first(0);
  balloon_.tell_slow_miss_share(0);
  seats_.clear();
  engine_.reset();
  adapter_.reset();
  if (settings_) (void)settings_->restore();
}

// ------------------------------------------------------------------ scopes

Result<> Tiering::seat(std::uint64_t cgroup_id, const std::string& cgroup, PolicyObject policy, const MoveTerms& moves) {
  const auto estimated = [](const PolicySeat& seat) { return (seat.terms().flags & HT_POLICY_ESTIMATED) != 0; };
  if (auto found = seats_.find(cgroup); found != seats_.end()) {
    const bool was = estimated(*found->second);
    if (auto swapped = found->second->swap(std::move(policy), moves); !swapped) return swapped;
    if (!was && estimated(*found->second)) begin_burst(false);
    for (auto& [path, scope] : scopes_)
      if (scope->seat() == found->second) scope->hurry();
    return {};
  }
  if (auto loaded = policy.load(cgroup_id); !loaded) return loaded;
  auto seat = PolicySeat::take(cgroup_id, cgroup, std::move(policy), moves);
  if (!seat) return std::unexpected(seat.error());
  seats_[cgroup] = std::move(*seat);
  auto followed = follow_plan();
  if (!followed) {
    seats_.erase(cgroup);
    (void)follow_plan();
  } else if (estimated(*seats_[cgroup])) {
    begin_burst(false);
  }
  return followed;
}

void Tiering::unseat(const std::string& cgroup) {
  auto found = seats_.find(cgroup);
  if (found == seats_.end()) return;
  auto seat = std::move(found->second);
  seats_.erase(found);
  (void)follow_plan();  // only takes scopes away, or gives them another seat
}

Result<> Tiering::set_budgets(const Budgets& budgets) {
  const Budgets before = std::exchange(budgets_, budgets);
  auto followed = follow_plan();
  if (!followed) {
    budgets_ = before;
    (void)follow_plan();
  }
  return followed;
}

// Makes the scopes that the seats and budgets ask for, and ends the others.
Result<> Tiering::follow_plan() {
  std::map<std::string, __u64> ids;
  for (const auto& [path, seat] : seats_) ids[path] = seat->cgroup_id();
  std::map<std::string, std::string> plan = plan_scopes(ids, budgets_);
  for (auto scope = scopes_.begin(); scope != scopes_.end();) {
    if (plan.contains(scope->first)) {
      ++scope;
      continue;
    }
    Scope& ended = scope->second->scope();
    scope = scopes_.erase(scope);  // waits for its epoch
    {
      std::lock_guard held(standings_lock_);
      standings_.erase(ended.cgroup_id());
    }
    engine_->remove_scope(ended);
  }
  for (const auto& [path, seat_path] : plan) {
    auto& seat = seats_.at(seat_path);
    if (auto scope = scopes_.find(path); scope != scopes_.end()) {
      if (scope->second->seat() != seat) scope->second->reseat(seat);
      continue;
    }
    std::uint64_t id = seat->cgroup_id();
    if (path != seat_path) {
      // A saved budget may be of a cgroup that is not there: it waits.
      auto found = cgroups_.id_of(path);
      if (!found) continue;
      id = *found;
    }
    auto caller = adapter_->policy_caller(id);
    if (!caller) return std::unexpected(caller.error());
    {
      std::lock_guard held(standings_lock_);
      standings_[id] = {};
    }
    Scope& scope = engine_->add_scope(id, path, std::move(*caller));
    scopes_[path] = std::make_unique<ScopeThread>(
        scope, seat, [this](Scope& s, PolicySeat& p, std::uint64_t epoch_ns) { return epoch(s, p, epoch_ns); });
  }
  std::lock_guard held(standings_lock_);
  watched_.clear();
  for (const auto& [path, scope] : scopes_) {
    const std::uint64_t id = scope->scope().cgroup_id();
    auto budget = budgets_.find(path);
    standings_[id].budget = budget == budgets_.end() ? Budget{} : budget->second;
    watched_[id] = path;
  }
  return {};
}

ScopeThread* Tiering::scope_of(const std::string& cgroup) const {
  std::map<std::string, __u64> paths;
  for (const auto& [path, scope] : scopes_) paths[path] = scope->scope().cgroup_id();
  auto nearest = nearest_ancestor(paths, cgroup);
  return nearest ? scopes_.at(*nearest).get() : nullptr;
}

MoveTerms Tiering::move_terms(const std::string& path, const PolicySeat::Terms& terms) const {
  MoveTerms moves = terms.moves;
  if (auto budget = budgets_.find(path); budget != budgets_.end()) {
    moves.rate_bytes_per_s = budget->second.rate_bytes_per_s.value_or(moves.rate_bytes_per_s);
    moves.dry_run = budget->second.dry_run.value_or(moves.dry_run);
  }
  return moves;
}

double Tiering::density() const {
  double sum = 0;
  for (const auto& [path, scope] : scopes_) sum += scope->shown().density;
  return sum;
}

// ------------------------------------------------------------- events, news

Result<> Tiering::take_events() {
  return engine_->space_events([this](Roster& roster) {
    // After an overflow the running processes are listed again: who is not among
    // them ended unseen.
    std::optional<std::set<std::pair<__u32, __u64>>> unseen;
    auto taken = adapter_->events(
        [&](const ht_space_event& event) {
          if (unseen) unseen->erase({event.pid, event.space});
          if (event.kind == HT_SPACE_CGROUP_GONE) {
            std::lock_guard held(standings_lock_);
            if (auto watched = watched_.find(event.cgroup_id); watched != watched_.end())
              tell({News::kCgroupGone, watched->second, {}, {}});
          }
          roster.event(event);
        },
        [&] {
          unseen.emplace();
          for (const auto& [pid, process] : roster.processes()) unseen->insert({pid, process.space});
          tell({News::kEventsLost, {}, {}, {}});
        });
    if (unseen) {
      for (const auto& [pid, space] : *unseen) {
        ht_space_event event{};
        event.kind = HT_SPACE_EXIT;
        event.pid = pid;
        event.space = space;
        roster.event(event);
      }
    }
    return taken;
  });
}

void Tiering::tell(News news) {
  {
    std::lock_guard held(news_lock_);
    news_.push_back(std::move(news));
  }
  eventfd_write(news_fd_.get(), 1);
}

std::vector<News> Tiering::take_news() {
  eventfd_t count = 0;
  eventfd_read(news_fd_.get(), &count);
  std::lock_guard held(news_lock_);
  return std::exchange(news_, {});
}

// ------------------------------------------------------------------- epochs

// BPF programs are timed by the kernel, the interrupt around them was by the probe.
std::uint64_t Tiering::sampling_ns() const {
  if (!source_.samples()) return 0;
  return adapter_->cost().ns_total + adapter_->samples().stats().samples_total * source_.probe.sample_ns;
}

void Tiering::hold_cpu_share() {
  std::uint64_t expirations = 0;
  if (read(judge_fd_.get(), &expirations, sizeof(expirations)) < 0) return;
  // No drain meanwhile: it follows the CPUs whose events get the new period.
  (void)engine_->space_events([this](Roster&) -> Result<> {
    std::lock_guard held(rate_lock_);
    const auto now = std::chrono::steady_clock::now();
    const auto elapsed_ns =
        static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - judged_).count());
    judged_ = now;
    const std::uint64_t ns = sampling_ns();
    const std::uint64_t period = rate_.update(ns - std::exchange(sampling_ns_, ns), elapsed_ns, cpus_);
    const std::uint64_t bits_ns = adapter_->bits().cpu_ns_total;
    bits_rate_.update(bits_ns - std::exchange(bits_ns_, bits_ns), elapsed_ns, cpus_);
    sample_each(period);
    return {};
  });
}

// rate_lock_ is held.
void Tiering::sample_each(std::uint64_t period) {
  if (period != period_ && adapter_->set_period(period)) period_ = period;
}

// An estimate that is new has most to learn, and one whose hot pages are not hot any more
// (shifted). Ranges that count by epochs (without HT_POLICY_ESTIMATED) do not know that an
// epoch brings more than the one before.
void Tiering::begin_burst(bool shifted) {
  if (!source_.samples()) return;
  (void)engine_->space_events([&](Roster&) -> Result<> {
    std::lock_guard held(rate_lock_);
    if (!shifted || rate_.may_burst()) sample_each(rate_.burst(burst_));
    return {};
  });
}

double Tiering::cpu_share() const {
  std::lock_guard held(rate_lock_);
  return std::max(0.0, rate_.share()) + std::max(0.0, bits_rate_.share());
}

std::uint64_t Tiering::period() const {
  std::lock_guard held(rate_lock_);
  return period_;
}

double Tiering::burst() const {
  std::lock_guard held(rate_lock_);
  return rate_.times();
}

// What the scope may have of the fast tier, by what all of them asked for last.
void Tiering::arbitrate_for(const Scope& scope, EpochInput& input) {
  const std::uint64_t tier_bytes = input.fast_tier_pages * HT_PAGE_SIZE;
  std::lock_guard held(standings_lock_);
  const Standing& own = standings_.at(scope.cgroup_id());
  if (own.budget.fast_max) input.fast_max_pages = own.budget.fast_max->of(tier_bytes) / HT_PAGE_SIZE;
  input.accounts = standings_.size() > 1 || own.budget.fast_max;
  if (standings_.size() < 2) return;

  std::vector<Claim> claims;
  std::size_t mine = 0;
  std::uint64_t managed = 0;
  for (const auto& [id, standing] : standings_) {
    // Until each has had an epoch, nobody knows who needs what.
    if (!standing.demand) return;
    if (id == scope.cgroup_id()) mine = claims.size();
    Claim claim;
    if (standing.budget.fast_max) claim.max_pages = standing.budget.fast_max->of(tier_bytes) / HT_PAGE_SIZE;
    if (standing.budget.fast_min) claim.min_pages = standing.budget.fast_min->of(tier_bytes) / HT_PAGE_SIZE;
    claim.demand = *standing.demand;
    managed += claim.demand.fast_pages;
    claims.push_back(std::move(claim));
  }
  // What is in no range is not ours to share out, and what is kept free is not either.
  const auto reserve =
      static_cast<std::uint64_t>(engine_->settings().fast_reserve_share * static_cast<double>(input.fast_tier_pages));
  const std::uint64_t free = input.fast_free_pages > reserve ? input.fast_free_pages - reserve : 0;
  const Share share = arbitrate(free + managed, free, claims)[mine];
  input.fast_capacity_pages = share.capacity_pages;
  input.surplus_pages = share.surplus_pages;
}

// What the epoch decided: each that moved something, and each that decided
// otherwise than the one before.
void Tiering::log(const Scope& scope, const PolicySeat& seat, const EpochReport& report) {
  EventRecord record;
  record.kind = report.moved.nr ? "moved" : report.dry_run_pages ? "planned" : "decision";
  record.cgroup = scope.path();
  record.policy = seat.terms().policy;
  record.epoch = report.scope.epoch;
  record.text = decision_text(report);
  record.moves = report.moves;
  Json& detail = record.detail;
  detail["decision"] = decision_name(report.decision);
  detail["cut_heat"] = report.cut_heat;
  detail["hot_slow_pages"] = report.hot_slow_pages;
  detail["promoted_pages"] = report.moved.promoted_pages;
  detail["demoted_pages"] = report.moved.demoted_pages;
  detail["planned_pages"] = report.dry_run_pages ? report.dry_run_pages : report.planned_pages;
  detail["reversed_pages"] = report.reversed_pages;
  detail["rate_limited_pages"] = report.rate_limited_pages;
  detail["trial_pages"] = {report.scope.trial_pages[HT_TIER_SLOW], report.scope.trial_pages[HT_TIER_FAST]};
  detail["trial_hits"] = {report.scope.trial_hits[HT_TIER_SLOW], report.scope.trial_hits[HT_TIER_FAST]};
  detail["swap_ns"] = report.scope.swap_ns;
  detail["ranges"] = report.moved_ranges;
  events_->add(std::move(record));
}

// The fast tier's balloon wants memory that is in use: each scope demotes its
// part, the coldest first, while the driver waits.
void Tiering::make_room_for_balloon(const Scope& scope, __u64 used_pages, EpochInput& input) {
  balloon_.demote_first(kBalloonPatienceMs);
  const __u64 missing = balloon_.fast_missing_bytes() / HT_PAGE_SIZE;
  if (missing == 0) return;
  __u64 part = 0;
  {
    std::lock_guard held(standings_lock_);
    const Standing& own = standings_.at(scope.cgroup_id());
    // By what it has there; until that is known, in equal parts.
    if (own.demand && used_pages && standings_.size() > 1) part = missing * std::min(own.demand->fast_pages, used_pages) / used_pages;
    else part = missing / standings_.size();
  }
  input.surplus_pages = std::max(input.surplus_pages, part);
  input.accounts = true;      // it must know what it has there
  input.fast_free_pages = 0;  // what is free is the balloon's
}

// The share of misses that went to slow memory, for the host: of all scopes.
void Tiering::tell_slow_miss_share() {
  std::array<std::uint64_t, HT_TIERS> counts{};
  {
    std::lock_guard held(standings_lock_);
    for (const auto& [id, standing] : standings_)
      for (std::size_t t = 0; t < HT_TIERS; ++t) counts[t] += standing.counts[t];
  }
  const std::uint64_t all = counts[HT_TIER_FAST] + counts[HT_TIER_SLOW];
  if (all) balloon_.tell_slow_miss_share(static_cast<double>(counts[HT_TIER_SLOW]) / static_cast<double>(all));
}

ScopeThread::Outcome Tiering::epoch(Scope& scope, PolicySeat& seat, std::uint64_t epoch_ns) {
  // The engine's estimates, ranges and history (some 10 MiB) are not what fast memory is
  // there for, and would take the room that is made for the scope.
  thread_local const bool aside = (prefer_slow(tiers_), true);
  static_cast<void>(aside);
  ScopeThread::Outcome outcome;
  const auto failed = [&](const Error& error) {
    outcome.error = error;
    std::lock_guard held(standings_lock_);
    Standing& standing = standings_.at(scope.cgroup_id());
    if (standing.error != error.message) tell({News::kEpochFailed, scope.path(), {}, error.message});
    standing.error = error.message;
    return outcome;
  };
  if (auto taken = take_events(); !taken) return failed(taken.error());
  const auto pages = tier_pages(tiers_);
  if (!pages) return failed(pages.error());
  const auto& fast = (*pages)[HT_TIER_FAST];
  const auto& slow = (*pages)[HT_TIER_SLOW];
  const PolicySeat::Terms terms = seat.terms();

  EpochInput input;
  input.epoch_ns = epoch_ns;
  input.fast_tier_pages = fast.total;
  input.fast_free_pages = fast.free;
  const FastZones zones = zones_of_fast(tiers_);
  input.fast_watermark_pages = zones.watermark_pages;
  input.fast_listed_pages = zones.listed_pages;
  input.slow_free_pages = slow.free;
  // What the kernel itself holds of the fast tier is not to be had.
  input.fast_capacity_pages = std::min(fast.total, fast.free + fast.used);
  if (scope.cgroup_id() == kRootCgroupId) {
    input.tier_pages[HT_TIER_FAST] = fast.used;
    input.tier_pages[HT_TIER_SLOW] = slow.used;
  }
  input.cpus = cpus_;
  // Accessed bits alone count no misses.
  input.period = !source_.samples() ? 0 : static_cast<std::uint32_t>(std::min<std::uint64_t>(period(), UINT32_MAX));
  input.budget_ns = static_cast<std::uint64_t>(terms.epoch_ms) * 1'000'000ULL;
  input.moves = (terms.flags & HT_POLICY_NO_MOVES) == 0;
  input.estimated = (terms.flags & HT_POLICY_ESTIMATED) != 0;
  input.seat = seat.cgroup_id();
  input.seat_generation = terms.generation;
  arbitrate_for(scope, input);
  MoveTerms moves = terms.moves;
  {
    std::lock_guard held(standings_lock_);
    const Budget& budget = standings_.at(scope.cgroup_id()).budget;
    moves.rate_bytes_per_s = budget.rate_bytes_per_s.value_or(moves.rate_bytes_per_s);
    moves.dry_run = budget.dry_run.value_or(moves.dry_run);
  }
  input.rate_bytes_per_s = moves.rate_bytes_per_s;
  input.dry_run = moves.dry_run;
  if (!input.dry_run) make_room_for_balloon(scope, fast.used, input);
  input.is_default = terms.policy == kDefaultPolicy;
  input.policy_failed = [&](const ht_run& run) {
    // The kernel saw nothing wrong: it learns it from us.
    if (!run.status) module_->eject(seat.cgroup_id(), run.generation, run.exit);
    outcome.seated = seat.eject(run, terms.generation, outcome.ejected);
    return outcome.seated;
  };

  auto report = engine_->epoch(scope, input);
  if (outcome.ejected) {
    const PolicyExit& exit = *outcome.ejected;
    EventRecord record{"ejected", seat.cgroup(), exit.policy, exit.reason, exit.epoch, {}, {}, 0, 0};
    record.detail = {{"code", exit.code}, {"message", exit.message}};
    events_->add(std::move(record));
    if (outcome.seated)
      events_->add({"seated", seat.cgroup(), seat.terms().policy, "the default takes over in the same epoch", exit.epoch, {}, {}, 0, 0});
  }
  if (outcome.ejected)
    tell({outcome.seated ? News::kEjected : News::kSeatEmpty, seat.cgroup(), outcome.ejected, {}});
  if (!report) return failed(report.error());
  if (report->heat_shifted) begin_burst(true);
  bool changed = false;
  {
    std::lock_guard held(standings_lock_);
    Standing& standing = standings_.at(scope.cgroup_id());
    standing.error.clear();
    changed = standing.decision != report->decision;
    standing.decision = report->decision;
    if (input.accounts) standing.demand = report->demand;
    standing.counts = {report->tier_counts[HT_TIER_FAST], report->tier_counts[HT_TIER_SLOW]};
  }
  tell_slow_miss_share();
  if (changed || report->moved.nr || report->dry_run_pages) log(scope, seat, *report);
  outcome.density = fast.total != 0 ? static_cast<double>(report->scope.samples) / static_cast<double>(fast.total) : 0;
  return outcome;
}

}  // namespace hypertier
