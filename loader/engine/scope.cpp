// SPDX-License-Identifier: GPL-2.0-or-later
#include "scope.hpp"

#include <algorithm>
#include <unordered_map>

#include "adaptive.hpp"
#include "estimated.hpp"

namespace hypertier {
namespace {

// Pages are listed and offered to the policy for so many times the budget, so
// that a refusal or a failure is made up for by the next in rank.
constexpr __u64 kOverplan = 4;
// Ranges per walk run: enough to pay for the call, few enough to stop in time.
constexpr std::size_t kWalkBatch = 512;
// Walk runs per epoch and direction.
constexpr int kWalkRounds = 8;
// Longest time for which refused pages are not offered again, epochs.
constexpr __u32 kHoldMax = 8;
// How long free room that could not be had is left alone, epochs.
constexpr __u64 kWithheldEpochs = 32;

constexpr double kSwapSmoothing = 0.1;

__u64 bound_pages(const tier_range& range, const Residency& residency) {
  return residency.known() ? residency.pages() : range.mapped_pages;
}

}  // namespace

Scope::Scope(Machine& machine, Spaces& spaces, const EngineSettings& settings, __u64 cgroup_id)
    : machine_(machine),
      spaces_(spaces),
      settings_(settings),
      cgroup_id_(cgroup_id),
      partition_(std::make_unique<AdaptivePartition>(settings)) {}

// Another kind of ranges starts with what is mapped and no counts.
void Scope::use(const EpochInput& input) {
  if (partition_->knows_pages() == input.estimated) return;
  if (input.estimated)
    partition_ = std::make_unique<EstimatedPartition>(settings_);
  else
    partition_ = std::make_unique<AdaptivePartition>(settings_);
  partition_->begin(epoch_);
  for (const auto& [id, space] : spaces_.spaces()) partition_->map(id, spaces_.managed(space));
  partition_->close(input.fast_capacity_pages);
}

Result<> Scope::run(const EpochInput& input, __u64 epoch, __u64 samples, EpochReport& report) {
  epoch_ = epoch;
  use(input);
  if (auto done = look(report); !done) return done;
  ranges_ = machine_.ranges().first(partition_->fill(machine_.ranges()));
  for (tier_range& range : ranges_) range.pid = spaces_.pid_of(range.space);
  hot_.clear();
  cold_.clear();
  touched_.clear();
  results_.resize(ranges_.size());
  is_touched_.assign(ranges_.size(), false);
  budget_pages_ = std::max(settings_.max_move_min_pages,
                           static_cast<__u64>(settings_.max_move_share * static_cast<double>(input.fast_tier_pages)));
  walk_budget_pages_ = settings_.max_walk_pages / 2;  // half for each direction
  if (epoch_ >= withheld_until_epoch_) withheld_pages_ = 0;

  report.scope = {};
  report.scope.cgroup_id = cgroup_id_;
  report.scope.epoch = epoch;
  report.scope.epoch_ns = input.epoch_ns;
  report.scope.fast_capacity_pages = input.fast_capacity_pages;
  report.scope.tier_pages[HT_TIER_FAST] = input.tier_pages[HT_TIER_FAST];
  report.scope.tier_pages[HT_TIER_SLOW] = input.tier_pages[HT_TIER_SLOW];
  report.scope.samples = samples;
  report.scope.fast_tier_pages = input.fast_tier_pages;
  report.scope.ranges = static_cast<__u32>(ranges_.size());
  report.scope.processes = static_cast<__u32>(spaces_.processes().size());
  report.scope.cpus = input.cpus;
  report.scope.period = input.period;
  const Trial trial = partition_->trial();
  report.scope.trial_pages[HT_TIER_FAST] = trial.cold_pages;
  report.scope.trial_pages[HT_TIER_SLOW] = trial.hot_pages;
  report.scope.trial_hits[HT_TIER_FAST] = trial.cold_hits;
  report.scope.trial_hits[HT_TIER_SLOW] = trial.hot_hits;
  report.scope.swap_ns = static_cast<__u64>(swap_ns_);
  partition_->clear_trial();
  report.ranges_visited += ranges_.size();

  auto classified = classify(input, report);
  if (!classified) return std::unexpected(classified.error());
  if (!*classified) {
    // Without an answer nothing is split or merged either.
    report.decision = Decision::kPolicyFailed;
    last_.assign(ranges_.begin(), ranges_.end());
    return {};
  }

  report.decision = Decision::kNoMoves;
  if (input.moves) {
    rank();
    report.ranges_visited += ranges_.size();
    if (auto done = select_hot(input, report); !done) return done;
    if (ranked_.empty() || !ranges_[ranked_.front()].heat) {
      report.decision = Decision::kNoHeat;
    } else if (hot_.empty()) {
      report.decision = any_held_ ? Decision::kAllRefused : Decision::kAllHotFast;
    } else {
      walk_budget_pages_ += settings_.max_walk_pages / 2;
      if (auto done = select_cold(report); !done) return done;
      auto reserve = static_cast<__u64>(settings_.fast_reserve_share * static_cast<double>(input.fast_tier_pages));
      reserve = std::max(reserve, withheld_pages_);
      __u64 room = input.fast_free_pages > reserve ? input.fast_free_pages - reserve : 0;
      std::vector<PlanEntry> plan = make_plan(hot_, cold_, ranges_, room, input.slow_free_pages);
      report.decision = Decision::kNothingColder;
      if (!plan.empty()) {
        auto admitted = admit(input, plan, report);
        if (!admitted) return std::unexpected(admitted.error());
        report.decision = !*admitted     ? Decision::kPolicyFailed
                          : plan.empty() ? Decision::kAllRefused
                                         : Decision::kMoved;
        if (*admitted && !plan.empty())
          if (auto done = move(input, plan, report); !done) return done;
        if (*admitted)
          if (auto done = feed_back(input, report); !done) return done;
      }
    }
  }

  last_.assign(ranges_.begin(), ranges_.end());
  Adapted adapted = partition_->adapt(last_);
  report.splits = adapted.splits;
  report.merges = adapted.merges;
  report.splits_refused = adapted.splits_refused;
  return {};
}

// False: no policy answered.
Result<bool> Scope::classify(const EpochInput& input, EpochReport& report) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (tier_range& range : ranges_) {
      range.heat = 0;
      range.action = TIER_KEEP;
    }
    ht_run run{};
    run.scope = report.scope;
    run.budget_ns = input.budget_ns;
    run.nr = static_cast<__u32>(ranges_.size());
    if (auto done = machine_.run_classify(run); !done) return std::unexpected(done.error());
    report.policy_status = run.status;
    report.policy_generation = run.generation;
    report.policy_ns += run.policy_ns;
    if (run.status == 0) return true;
    if (attempt || !input.policy_failed || !input.policy_failed(run)) break;
  }
  return false;
}

// Heat decides; among equals the younger, then the address, so that the same
// input always gives the same plan.
void Scope::rank() {
  std::vector<std::pair<__u64, __u32>> keys(ranges_.size());
  for (__u32 i = 0; i < keys.size(); ++i)
    keys[i] = {__u64{~ranges_[i].heat} << 32 | ranges_[i].age_epochs, i};
  std::sort(keys.begin(), keys.end());
  ranked_.resize(keys.size());
  std::transform(keys.begin(), keys.end(), ranked_.begin(), [](const auto& key) { return key.second; });
}

bool Scope::fresh(const Residency& residency) const {
  return residency.known() && !residency.moved && epoch_ - residency.walked_epoch < settings_.residency_epochs;
}

// What a partition lists itself costs no walk.
std::size_t Scope::walk_batch() const { return partition_->knows_pages() ? HT_RANGES_MAX : kWalkBatch; }

// Where pages are, for a partition that keeps track of it.
Result<> Scope::look(EpochReport& report) {
  std::vector<Partition::Span> spans = partition_->to_walk(walk_share());
  for (std::size_t done = 0; done < spans.size();) {
    ht_walks_run& run = machine_.walks();
    run.nr = 0;
    run.pages_used = 0;
    run.ns = 0;
    std::vector<std::size_t> walked;
    __u64 budget = walk_share();
    for (; done < spans.size() && run.nr < HT_WALKS_MAX; ++done) {
      auto space = spaces_.spaces().find(spans[done].space);
      if (space == spaces_.spaces().end()) continue;
      __u64 pages = (spans[done].end - spans[done].start) >> HT_PAGE_SHIFT;
      ht_walk& w = run.walk[run.nr++];
      w = {};
      w.space = spans[done].space;
      w.start = spans[done].start;
      w.end = spans[done].end;
      w.pid = space->second.pids.front();
      w.list_tier = HT_TIERS;
      w.list_max_pages = static_cast<__u32>(std::max<__u64>(1, std::min(pages, budget)));
      budget -= std::min(pages, budget);
      walked.push_back(done);
    }
    if (!run.nr) break;
    if (auto walks = machine_.run_walks(); !walks) return walks;
    report.walks += run.nr;
    report.walk_ns += run.ns;
    report.pages_listed += run.pages_used;
    for (std::size_t i = 0; i < walked.size(); ++i) {
      const ht_walk& w = run.walk[i];
      if (w.error && w.error != -ENOSPC) {
        spaces_.urgent(w.space);
        continue;
      }
      partition_->walked(spans[walked[i]], w.next, machine_.pages().subspan(w.list_first, w.list_count));
    }
  }
  return {};
}

// Walks ranges, given by rank, each from where its last walk stopped, and lists
// pages of one tier in that order.
Result<> Scope::walk(std::span<const std::size_t> ranks, ht_tier tier, __u64 list_max_pages,
                     std::vector<Listed>& listed, EpochReport& report) {
  if (partition_->knows_pages()) {
    for (std::size_t r : ranks)
      if (listed.size() < list_max_pages) partition_->list(ranked_[r], tier, list_max_pages, listed);
    return {};
  }
  ht_walks_run& run = machine_.walks();
  run.nr = 0;
  run.pages_used = 0;
  run.ns = 0;
  std::vector<__u32> walked;
  for (std::size_t r : ranks) {
    const tier_range& range = ranges_[ranked_[r]];
    const Residency& residency = partition_->residency(ranked_[r]);
    auto space = spaces_.spaces().find(range.space);
    if (space == spaces_.spaces().end() || !walk_budget_pages_ || run.nr == HT_WALKS_MAX) continue;
    __u64 start = std::max(residency.cursor, range.start);
    __u64 span = (range.end - start) >> HT_PAGE_SHIFT;
    // No more is visited than is resident (which is not known of files), and
    // one entry for each 2 MiB.
    __u64 cost = (range.flags & TIER_RANGE_FILE ? span : std::min(span, space->second.rss_pages)) + (span >> 9) + 1;
    if (cost > walk_budget_pages_) {
      span = std::min(span, walk_budget_pages_);
      cost = walk_budget_pages_;
    }
    walk_budget_pages_ -= cost;
    ht_walk& w = run.walk[run.nr++];
    w = {};
    w.space = range.space;
    w.start = start;
    w.end = start + (span << HT_PAGE_SHIFT);
    w.pid = space->second.pids.front();
    w.list_tier = tier;
    w.list_max_pages = static_cast<__u32>(std::min<__u64>(list_max_pages, HT_UNKNOWN32));
    walked.push_back(ranked_[r]);
  }
  if (!run.nr) return {};
  if (auto done = machine_.run_walks(); !done) return done;
  report.walks += run.nr;
  report.walk_ns += run.ns;
  report.pages_listed += run.pages_used;
  for (std::size_t i = 0; i < walked.size(); ++i) {
    const ht_walk& w = run.walk[i];
    tier_range& range = ranges_[walked[i]];
    Residency& residency = partition_->residency(walked[i]);
    if (w.error && w.error != -ENOSPC) {
      spaces_.urgent(w.space);
      continue;
    }
    for (int t = 0; t < HT_TIERS; ++t) residency.partial_pages[t] += w.tier_pages[t];
    residency.partial_huge_pages += w.huge_pages;
    residency.cursor = w.next;
    if (w.next >= range.end) {
      for (int t = 0; t < HT_TIERS; ++t) range.tier_pages[t] = residency.tier_pages[t] = residency.partial_pages[t];
      residency.huge_pages = residency.partial_huge_pages;
      residency.walked_epoch = epoch_;
      residency.moved = false;
      residency.cursor = 0;
      residency.partial_pages[HT_TIER_FAST] = residency.partial_pages[HT_TIER_SLOW] = 0;
      residency.partial_huge_pages = 0;
      range.walk_epochs = 0;
      range.flags &= ~TIER_RANGE_HUGE;
      if (residency.huge_pages * 2 > residency.pages()) range.flags |= TIER_RANGE_HUGE;
    }
    for (ht_page_t page : machine_.pages().subspan(w.list_first, w.list_count)) listed.push_back({page, walked[i]});
  }
  return {};
}

// From the hottest down as long as what is resident fits the capacity. The
// range at the cut takes part with the pages that still fit: otherwise a range
// larger than the tier would leave it to colder ones.
Result<> Scope::select_hot(const EpochInput& input, EpochReport& report) {
  const std::size_t batch_size = walk_batch();
  const __u64 capacity = input.fast_capacity_pages;
  const __u64 want = kOverplan * budget_pages_;
  __u64 resident = 0;
  __u64 wanted = 0;
  bool full = false;
  cut_ = 0;
  any_held_ = false;
  auto hot = [&](std::size_t rank) { return rank < ranked_.size() && ranges_[ranked_[rank]].heat > 0; };
  for (int round = 0; round < kWalkRounds && !full && hot(cut_) && wanted < want; ++round) {
    std::vector<std::size_t> batch;
    std::size_t end = cut_;
    for (__u64 bound = resident; hot(end) && bound < capacity && batch.size() < batch_size; ++end) {
      const Residency& residency = partition_->residency(ranked_[end]);
      bool wanted_now = held(residency) ? !residency.known() : !fresh(residency) || residency.tier_pages[HT_TIER_SLOW];
      if (wanted_now) batch.push_back(end);
      bound += bound_pages(ranges_[ranked_[end]], residency);
    }
    if (end == cut_) break;
    std::vector<Listed> listed;
    if (auto done = walk(batch, HT_TIER_SLOW, want, listed, report); !done) return done;
    auto page = listed.begin();
    for (; cut_ < end && !full && wanted < want; ++cut_) {
      const __u32 index = ranked_[cut_];
      const Residency& residency = partition_->residency(index);
      const __u64 pages = bound_pages(ranges_[index], residency);
      const __u64 fast = residency.known() ? residency.tier_pages[HT_TIER_FAST] : 0;
      __u64 fits = HT_UNKNOWN64;
      if (resident + pages > capacity) {
        full = true;
        fits = resident + fast < capacity ? capacity - resident - fast : 0;
      }
      for (; page != listed.end() && page->range == index; ++page) {
        if (page->pages() > fits || wanted >= want || held(residency)) continue;
        fits -= page->pages();
        wanted += page->pages();
        hot_.push_back(*page);
      }
      resident += std::min(pages, capacity - resident);
      if (residency.known()) report.hot_slow_pages += residency.tier_pages[HT_TIER_SLOW];
      any_held_ |= held(residency);
      report.cut_heat = ranges_[index].heat;
      ++report.ranges_visited;
    }
  }
  report.hot_ranges = static_cast<__u32>(cut_);
  report.hot_pages = resident;
  return {};
}

// From the coldest up until as many pages are found as are to be promoted.
Result<> Scope::select_cold(EpochReport& report) {
  const std::size_t batch_size = walk_batch();
  __u64 need = 0;
  for (const Listed& listed : hot_) need += listed.pages();
  const __u32 hottest = ranges_[hot_.front().range].heat;
  std::size_t rank = ranked_.size();
  __u64 found = 0;
  for (int round = 0; round < kWalkRounds && found < need; ++round) {
    std::vector<std::size_t> batch;
    for (__u64 bound = found; rank > 0 && bound < need && batch.size() < batch_size; --rank) {
      const __u32 index = ranked_[rank - 1];
      if (ranges_[index].heat >= hottest) break;
      ++report.ranges_visited;
      const Residency& residency = partition_->residency(index);
      if (fresh(residency) && !residency.tier_pages[HT_TIER_FAST]) continue;
      batch.push_back(rank - 1);
      bound += residency.known() ? residency.tier_pages[HT_TIER_FAST] : ranges_[index].mapped_pages;
    }
    if (batch.empty()) break;
    const std::size_t first = cold_.size();
    if (auto done = walk(batch, HT_TIER_FAST, need, cold_, report); !done) return done;
    for (std::size_t i = first; i < cold_.size(); ++i) found += cold_[i].pages();
  }
  return {};
}

tier_result& Scope::result(__u32 range) {
  if (!is_touched_[range]) {
    is_touched_[range] = true;
    touched_.push_back(range);
    results_[range] = {};
  }
  return results_[range];
}

// Drops what the policy refuses. False: no policy answered.
Result<bool> Scope::admit(const EpochInput& input, std::vector<PlanEntry>& plan, EpochReport& report) {
  std::span<tier_pair> pairs = machine_.admits();
  std::unordered_map<__u64, std::size_t> groups;
  auto key = [](const PlanEntry& entry) { return __u64{entry.hot_range} << 32 | entry.cold_range; };
  std::vector<tier_pair> asked;
  std::vector<std::size_t> group_of;
  group_of.reserve(plan.size());
  for (const PlanEntry& entry : plan) {
    auto [group, added] = groups.try_emplace(key(entry), groups.size());
    if (added) {
      tier_pair& pair = asked.emplace_back();
      pair.hot = ranges_[entry.hot_range];
      pair.hot.action = TIER_KEEP;
      if (entry.cold_range != kNoRange) pair.cold = ranges_[entry.cold_range];
    }
    asked[group->second].pages += static_cast<__u32>(std::max(entry.hot_pages(), entry.cold_pages()));
    group_of.push_back(group->second);
  }
  for (std::size_t first = 0; first < asked.size(); first += HT_ADMITS_MAX) {
    ht_run run{};
    run.scope = report.scope;
    run.budget_ns = input.budget_ns;
    run.nr = static_cast<__u32>(std::min<std::size_t>(asked.size() - first, HT_ADMITS_MAX));
    std::copy_n(asked.begin() + static_cast<std::ptrdiff_t>(first), run.nr, pairs.begin());
    if (auto done = machine_.run_admit(run); !done) return std::unexpected(done.error());
    report.policy_ns += run.policy_ns;
    if (run.status) {
      report.policy_status = run.status;
      if (input.policy_failed) input.policy_failed(run);
      return false;
    }
    for (__u32 i = 0; i < run.nr; ++i) {
      asked[first + i].admitted = pairs[i].admitted;
      asked[first + i].hot.action = pairs[i].hot.action;
    }
  }

  // What moves, and what the policy would move if moves paid, is on trial: both
  // sides are watched for an epoch as they stand now.
  __u64 tried = 0;
  for (std::size_t i = 0; i < plan.size() && tried < budget_pages_; ++i) {
    const PlanEntry& entry = plan[i];
    const tier_pair& pair = asked[group_of[i]];
    if (!pair.admitted && pair.hot.action != TIER_TRY) continue;
    if (entry.hot) partition_->try_pages(ranges_[entry.hot_range].space, entry.hot, HT_TIER_SLOW);
    if (entry.cold) partition_->try_pages(ranges_[entry.cold_range].space, entry.cold, HT_TIER_FAST);
    tried += entry.hot_pages();
  }

  std::unordered_map<__u32, bool> taken;  // by hot range: is any of it admitted?
  for (std::size_t i = 0; i < plan.size(); ++i) taken[plan[i].hot_range] |= asked[group_of[i]].admitted != 0;
  for (auto [range, any] : taken) {
    Residency& residency = partition_->residency(range);
    residency.hold_epochs = any ? 0 : std::clamp(2 * residency.hold_epochs, 1u, kHoldMax);
    residency.held_until_epoch = epoch_ + 1 + residency.hold_epochs;
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const PlanEntry& entry = plan[i];
    if (asked[group_of[i]].admitted) {
      plan[kept++] = entry;
      continue;
    }
    report.refused_pages += entry.hot_pages();
    result(entry.hot_range).refused_pages += static_cast<__u32>(entry.hot_pages());
    if (entry.cold_range != kNoRange)
      result(entry.cold_range).refused_pages += static_cast<__u32>(entry.cold_pages());
  }
  plan.resize(kept);
  return true;
}

// Carries the plan out until the budget is used; what fails is made up for by
// the entries that follow.
Result<> Scope::move(const EpochInput& input, std::span<const PlanEntry> plan, EpochReport& report) {
  std::span<ht_pair> pairs = machine_.pairs();
  __u64 promoted = 0;
  __u64 demoted = 0;
  for (std::size_t next = 0; next < plan.size();) {
    __u64 up = promoted;
    __u64 down = demoted;
    std::size_t end = next;
    for (; end < plan.size() && end - next < HT_PAIRS_MAX; ++end) {
      if (up + plan[end].hot_pages() > budget_pages_ || down + plan[end].cold_pages() > budget_pages_) break;
      up += plan[end].hot_pages();
      down += plan[end].cold_pages();
    }
    if (end == next) break;

    // Room is made before it is taken.
    ht_exchange_run run{};
    run.flags = input.exchange_flags;
    auto emit = [&](bool hot, bool cold) {
      for (std::size_t i = next; i < end; ++i) {
        const PlanEntry& entry = plan[i];
        if ((entry.hot != 0) != hot || (entry.cold != 0) != cold) continue;
        ht_pair& pair = pairs[run.nr++];
        pair = {};
        pair.user = static_cast<__u32>(i);
        if (hot) {
          const tier_range& range = ranges_[entry.hot_range];
          pair.hot_space = range.space;
          pair.hot_pid = range.pid;
          pair.hot_addr = HT_PAGE_ADDR(entry.hot);
          report.planned_pages += entry.hot_pages();
        }
        if (cold) {
          const tier_range& range = ranges_[entry.cold_range];
          pair.cold_space = range.space;
          pair.cold_pid = range.pid;
          pair.cold_addr = HT_PAGE_ADDR(entry.cold);
        }
        ++(!cold ? report.planned_hot_only : !hot ? report.planned_cold_only : report.planned_pairs);
      }
    };
    emit(false, true);
    emit(true, true);
    emit(true, false);
    if (auto done = machine_.run_exchange(run); !done) return done;

    for (__u32 i = 0; i < run.nr; ++i) {
      const ht_pair& pair = pairs[i];
      const PlanEntry& entry = plan[pair.user];
      if (entry.hot) {
        tier_result& hot = result(entry.hot_range);
        (pair.hot_result == HT_MOVE_DONE ? hot.promoted_pages : hot.failed_pages) +=
            static_cast<__u32>(entry.hot_pages());
        partition_->residency(entry.hot_range).moved = true;
        partition_->placed(pair.hot_space, entry.hot, static_cast<ht_move_result>(pair.hot_result), HT_TIER_FAST);
        if (!entry.cold && pair.hot_result == HT_MOVE_NO_MEMORY) {
          withheld_pages_ = std::max(withheld_pages_, input.fast_free_pages);
          withheld_until_epoch_ = epoch_ + kWithheldEpochs;
        }
      }
      if (entry.cold) {
        tier_result& cold = result(entry.cold_range);
        (pair.cold_result == HT_MOVE_DONE ? cold.demoted_pages : cold.failed_pages) +=
            static_cast<__u32>(entry.cold_pages());
        partition_->residency(entry.cold_range).moved = true;
        partition_->placed(pair.cold_space, entry.cold, static_cast<ht_move_result>(pair.cold_result), HT_TIER_SLOW);
      }
    }
    ht_exchange_run& sum = report.moved;
    sum.nr += run.nr;
    sum.flags = run.flags;
    sum.promoted_pages += run.promoted_pages;
    sum.demoted_pages += run.demoted_pages;
    sum.exchanged_pairs += run.exchanged_pairs;
    for (int m = 0; m < HT_MOVERS; ++m) sum.mover_pages[m] += run.mover_pages[m];
    for (int r = 0; r < HT_MOVE_RESULTS; ++r) sum.failed_pages[r] += run.failed_pages[r];
    sum.batches += run.batches;
    sum.flush_calls += run.flush_calls;
    sum.ns += run.ns;
    promoted += run.promoted_pages;
    demoted += run.demoted_pages;
    next = end;
  }
  if (__u64 pages = report.moved.promoted_pages + report.moved.demoted_pages) {
    double ns = 2 * static_cast<double>(report.moved.ns) / static_cast<double>(pages);
    swap_ns_ = swap_ns_ == 0 ? ns : swap_ns_ + kSwapSmoothing * (ns - swap_ns_);
  }
  return {};
}

Result<> Scope::feed_back(const EpochInput& input, EpochReport& report) {
  std::span<tier_result> results = machine_.results();
  for (std::size_t first = 0; first < touched_.size(); first += HT_ADMITS_MAX) {
    ht_run run{};
    run.scope = report.scope;
    run.budget_ns = input.budget_ns;
    run.nr = static_cast<__u32>(std::min<std::size_t>(touched_.size() - first, HT_ADMITS_MAX));
    for (__u32 i = 0; i < run.nr; ++i) {
      results[i] = results_[touched_[first + i]];
      results[i].range = ranges_[touched_[first + i]];
    }
    if (auto done = machine_.run_moved(run); !done) return done;
    report.policy_ns += run.policy_ns;
    if (run.status) {
      report.policy_status = run.status;
      if (input.policy_failed) input.policy_failed(run);
      return {};
    }
  }
  return {};
}

}  // namespace hypertier
