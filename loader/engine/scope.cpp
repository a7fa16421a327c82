// SPDX-License-Identifier: GPL-2.0-or-later
#include "scope.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "adaptive.hpp"
#include "estimated.hpp"

namespace hypertier {
namespace {

// Pages are listed and offered to the policy for so many times the budget, so
// that a refusal or a failure is made up for by the next in rank.
constexpr __u64 kOverplan = 4;
// Rates that differ by less than this part of them are about equal.
constexpr __u32 kAlikePart = 8;
// Pairs of ranges that a policy is asked about in an epoch. Ranges of single pages
// are bounded by the plan: with fewer the budget would not be reached.
constexpr std::size_t kGroupsMax = 2048;
// Ranges per walk run: enough to pay for the call, few enough to stop in time.
constexpr std::size_t kWalkBatch = 512;
// Walk runs per epoch and direction.
constexpr int kWalkRounds = 8;
// Longest time for which refused pages are not offered again, epochs.
constexpr __u32 kHoldMax = 8;
// How long no room is made for pages above order 0 without a partner of their size after
// one that could not come, epochs: doubled each time.
constexpr __u64 kLargeWaitMin = 8, kLargeWaitMax = 64;
// Weight of the past in how hot new memory is, per epoch: half-life of 4.
constexpr double kYoungKeep = 0.841;
// What the kernel was seen to withhold of room is forgotten by so much each epoch: 1/64.
constexpr __u64 kWithheldRoomEpochs = 64;
// Of the fast tier, at most this is expected to be allocated in an epoch.
constexpr double kRoomShareMax = 0.05;
// What a process gets in so many epochs from its start says nothing of what comes after
// them: most that start end soon, and room for the next one's would be taken from what stays.
constexpr __u64 kPromisingEpochs = 4;
// How long free room that could not be had is left alone, epochs.
constexpr __u64 kWithheldEpochs = 32;

// Pages are on trial for so many epochs, and what the first of them bring does
// not count: what is hot for one or two (the front of a sweep) is no gain.
constexpr __u64 kTrialEpochs = 4;
constexpr __u64 kTrialFirst = 3;
// Accessed bits of pages on trial are read in some epochs only: it lasts until some
// were, but not for ever. An epoch in which none were does not count.
constexpr __u64 kTrialLongest = 16;
// The kernel adds up what a process has by CPU: growth by less may be none.
constexpr __u64 kComingMin = 64;
// Fewest pages that are listed to get below a bound: some may not move.
constexpr __u64 kBoundListMin = 512;

constexpr double kSwapSmoothing = 0.1;

// Equals keep their order. A pass for each byte in which the keys differ at all: with
// tens of thousands of ranges, most of them alike, much less than by comparing.
void sort_by_first(std::vector<std::pair<__u64, __u32>>& keys) {
  if (keys.empty()) return;
  __u64 differ = 0;
  for (const auto& key : keys) differ |= key.first ^ keys.front().first;
  std::vector<std::pair<__u64, __u32>> sorted(keys.size());
  for (int shift = 0; shift < 64; shift += 8) {
    if (!(differ >> shift & 0xff)) continue;
    std::array<std::size_t, 256> at{};
    for (const auto& key : keys) ++at[key.first >> shift & 0xff];
    std::exclusive_scan(at.begin(), at.end(), at.begin(), std::size_t{0});
    for (const auto& key : keys) sorted[at[key.first >> shift & 0xff]++] = key;
    keys.swap(sorted);
  }
}

void add(Trial& sum, const Trial& trial) {
  sum.hot_pages += trial.hot_pages;
  sum.cold_pages += trial.cold_pages;
  sum.hot_hits += trial.hot_hits;
  sum.cold_hits += trial.cold_hits;
}

__u64 less(__u64 pages, __u64 kept) { return pages > kept ? pages - kept : 0; }

// Of the fast tier, what the CPUs have in their lists included.
__u64 free_pages(const EpochInput& input) { return input.fast_free_pages + input.fast_listed_pages; }

// That is made for what comes, beside what the CPUs' lists need.
__u64 most_room(__u64 fast_tier_pages) { return static_cast<__u64>(kRoomShareMax * static_cast<double>(fast_tier_pages)); }

__u64 bound_pages(const tier_range& range, const Residency& residency) {
  return residency.known() ? residency.pages() : range.mapped_pages;
}

}  // namespace

void Inbox::add(const ht_granule& granule) {
  auto [waiting, added] = granules.try_emplace({granule.space, granule.granule}, granule);
  if (added) return;
  ht_granule& sum = waiting->second;
  sum.samples += granule.samples;
  sum.stores += granule.stores;
  for (std::size_t w = 0; w < std::size(sum.pages); ++w) {
    // Two counts a word: each stops at its own end.
    const __u32 low = std::min<__u32>((sum.pages[w] & 0xffff) + (granule.pages[w] & 0xffff), 0xffff);
    const __u32 high = std::min<__u32>((sum.pages[w] >> 16) + (granule.pages[w] >> 16), 0xffff);
    sum.pages[w] = high << 16 | low;
  }
}

int density_bucket(double samples_per_page_second) {
  if (!(samples_per_page_second > 0)) return 0;
  constexpr double kLowest = -24;  // octave of bucket 1: one sample a second in 64 GiB
  return 1 + std::clamp(static_cast<int>(4 * (std::log2(samples_per_page_second) - kLowest)), 0, kDensityBuckets - 2);
}

Scope::Scope(Machine& machine, std::unique_ptr<PolicyCaller> caller, const EngineSettings& settings, __u64 cgroup_id,
             std::string path)
    : published(settings),
      machine_(machine),
      caller_(std::move(caller)),
      settings_(settings),
      cgroup_id_(cgroup_id),
      path_(std::move(path)),
      spaces_(settings),
      partition_(std::make_unique<AdaptivePartition>(settings)),
      buffer_(std::make_unique_for_overwrite<tier_range[]>(HT_RANGES_MAX)),
      moves_(settings.remembered_moves),
      conduct_(settings.conduct) {}

struct Scope::Watch final : Spaces::Watcher {
  Scope& scope;
  explicit Watch(Scope& s) : scope(s) {}
  void mapped(__u64 space, std::span<const ht_mapping> managed) override {
    scope.partition_->map(space, managed);
    scope.managed_.push_back({space, scope.spaces_.pid_of(space), {managed.begin(), managed.end()}});
  }
  void unmapped(__u64 space, __u64 start, __u64 end) override { scope.forgotten_.push_back({space, start, end}); }
  // Its granules go when the roster says that nobody has it: it may have moved
  // to another scope.
  void gone(__u64 space) override { scope.partition_->drop(space); }
  void found(__u32 pid, __u64 space) override { scope.found_.push_back({pid, space}); }
};

Result<> Scope::begin(__u64 epoch, std::span<const ht_space_event> events, const EpochInput& input, EpochReport& report) {
  epoch_ = epoch;
  begin_partition(input);
  for (const ht_space_event& event : events) spaces_.event(event);
  Watch watch(*this);
  auto polled = spaces_.poll(epoch, input.accounts, machine_, watch);
  if (!polled) return std::unexpected(polled.error());
  report.spaces_polled = polled->spaces;
  report.mappings_read = polled->mappings;
  return {};
}

void Scope::fold(const ht_granule& granule, EpochReport& report) {
  spaces_.urgent(granule.space);
  partition_->fold(granule, [&](__u64 address, __u32 count) {
    report.stray_samples[static_cast<std::size_t>(spaces_.stray(granule.space, address))] += count;
  });
}

void Scope::fold(const ht_bits& bits) {
  // Only one with activity can have changed what it maps.
  if (std::any_of(std::begin(bits.set), std::end(bits.set), [](__u64 word) { return word != 0; })) spaces_.urgent(bits.space);
  partition_->fold(bits);
}

__u64 Scope::close(__u64 fast_pages) {
  const __u64 samples = partition_->close(fast_pages);
  bits_interval_ns = partition_->bits_interval_ns();
  return samples;
}

// Another kind of ranges starts with what is mapped and no counts, before the samples of this epoch.
void Scope::begin_partition(const EpochInput& input) {
  if (!first_period_) first_period_ = input.period;
  exposure_ = input.period ? static_cast<float>(first_period_) / static_cast<float>(input.period) : 1;
  const bool fresh = partition_->knows_pages() != input.estimated;
  if (fresh && input.estimated)
    partition_ = std::make_unique<EstimatedPartition>(settings_);
  else if (fresh)
    partition_ = std::make_unique<AdaptivePartition>(settings_);
  partition_->begin(epoch_, exposure_);
  if (!fresh) return;
  for (const auto& [id, space] : spaces_.spaces()) partition_->map(id, spaces_.managed(space));
}

Result<> Scope::run(const EpochInput& input, __u64 samples, EpochReport& report) {
  if (auto done = look(input, report); !done) return done;
  const auto hits = partition_->tier_samples();
  report.heat_shifted = shift_.epoch(hits[HT_TIER_FAST], hits[HT_TIER_FAST] + hits[HT_TIER_SLOW]);
  measure_growth(input.fast_tier_pages);
  report.estimate_bytes = partition_->bytes();
  if (rests(input)) {
    rest(samples, report);
    return {};
  }
  ranges_ = {buffer_.get(), partition_->fill({buffer_.get(), HT_RANGES_MAX})};
  for (std::size_t i = 0; i < ranges_.size(); ++i)  // they come by space
    ranges_[i].pid = i && ranges_[i].space == ranges_[i - 1].space ? ranges_[i - 1].pid : spaces_.pid_of(ranges_[i].space);
  results_.resize(ranges_.size());
  reversed_pages_.resize(ranges_.size());
  displaced_by_heat_.resize(ranges_.size());
  rate_.set(input.rate_bytes_per_s);
  rate_.refill(input.epoch_ns);
  budget_pages_ = std::clamp(static_cast<__u64>(settings_.max_move_share * static_cast<double>(input.fast_tier_pages)),
                             settings_.max_move_min_pages, settings_.max_move_pages);
  if (epoch_ >= withheld_until_epoch_) withheld_pages_ = 0;
  missing_room_ = HT_UNKNOWN64;
  listed_[epoch_ % listed_.size()] = input.fast_listed_pages;
  report.ranges_visited += ranges_.size();
  if (input.accounts)
    if (auto done = account(input, report); !done) return done;
  describe(input, samples, report);

  // Twice if the first policy leaves on the way: nothing was moved by then.
  for (int round = 0; round < 2; ++round) {
    hot_.clear();
    cold_.clear();
    touched_.clear();
    is_touched_.assign(ranges_.size(), false);
    retaken_ = false;
    ranked_.clear();
    cut_ = 0;
    auto classified = classify(input, report);
    if (!classified) return std::unexpected(classified.error());
    if (!*classified) {
      // Without an answer nothing is split or merged either.
      report.decision = Decision::kPolicyFailed;
      note(report);
      decided_ = report;
      return {};
    }
    report.decision = Decision::kNoMoves;
    if (input.moves || input.accounts) {
      rank();
      report.ranges_visited += ranges_.size();
    }
    if (input.moves)
      if (auto done = promote(input, report); !done) return done;
    if (!retaken_) break;
    end_trial();  // what the one that left had put on trial
  }
  if (input.moves && !input.dry_run && report.decision != Decision::kPolicyFailed)
    if (auto done = take_apart(input, report); !done) return done;
  if (input.accounts && report.decision != Decision::kPolicyFailed) {
    if (auto done = keep_bounds(input, report); !done) return done;
  }
  if (!touched_.empty() && report.decision != Decision::kPolicyFailed && !input.dry_run)
    if (auto done = feed_back(input, report); !done) return done;
  expected_slow_pages_ = own_pages_[HT_TIER_SLOW] + report.moved.demoted_pages - std::min(own_pages_[HT_TIER_SLOW], report.moved.promoted_pages);
  room_was_enough_ = missing_room_ != HT_UNKNOWN64 && report.moved.demoted_pages >= report.moved.promoted_pages + missing_room_;
  if (input.accounts) measure_demand(report);
  measure_counts(report);
  if (!input.dry_run) cool();
  note(report);

  Adapted adapted = partition_->adapt(last_);
  report.splits = adapted.splits;
  report.merges = adapted.merges;
  report.splits_refused = adapted.splits_refused;
  decided_ = report;
  return {};
}

// Is there nothing to decide in this epoch? Where the policy hardly moves anything, all that
// follows from tens of thousands of ranges would be decided as it was.
bool Scope::rests(const EpochInput& input) {
  const bool same = seat_generation_ == input.seat_generation && decided_.scope.epoch;
  seat_generation_ = input.seat_generation;
  return same && input.moves && !input.accounts && !input.dry_run && coming_pages_ < kComingMin &&
         decided_.decision != Decision::kPolicyFailed && partition_->rest();
}

void Scope::rest(__u64 samples, EpochReport& report) {
  count_trial();
  room_was_enough_ = false;
  report.rested = true;
  report.scope = decided_.scope;
  report.scope.epoch = epoch_;
  report.scope.samples = samples;
  std::fill(std::begin(report.scope.trial_pages), std::end(report.scope.trial_pages), 0);
  std::fill(std::begin(report.scope.trial_hits), std::end(report.scope.trial_hits), 0);
  report.scope.moved_pages = report.scope.moved_back_pages = 0;
  report.decision = decided_.decision;
  report.policy_generation = decided_.policy_generation;
  report.hot_ranges = decided_.hot_ranges;
  report.hot_pages = decided_.hot_pages;
  report.hot_slow_pages = decided_.hot_slow_pages;
  report.cut_heat = decided_.cut_heat;
  std::copy(std::begin(decided_.tier_counts), std::end(decided_.tier_counts), report.tier_counts);
}

// The scope as the policy sees it.
void Scope::describe(const EpochInput& input, __u64 samples, EpochReport& report) {
  report.scope = {};
  report.scope.cgroup_id = cgroup_id_;
  report.scope.epoch = epoch_;
  report.scope.epoch_ns = input.epoch_ns;
  report.scope.fast_capacity_pages = std::min(input.fast_capacity_pages, input.fast_max_pages);
  own_pages_[HT_TIER_FAST] = own_pages_[HT_TIER_SLOW] = 0;
  for (const tier_range& range : ranges_)
    for (int t = 0; t < HT_TIERS; ++t)
      if (range.tier_pages[t] != HT_UNKNOWN64) own_pages_[t] += range.tier_pages[t];
  for (int t = 0; t < HT_TIERS; ++t)
    report.scope.tier_pages[t] = input.tier_pages[t] == HT_UNKNOWN64 ? own_pages_[t] : input.tier_pages[t];
  report.scope.samples = samples;
  report.scope.fast_tier_pages = input.fast_tier_pages;
  report.scope.ranges = static_cast<__u32>(ranges_.size());
  report.scope.processes = static_cast<__u32>(spaces_.processes().size());
  report.scope.cpus = input.cpus;
  report.scope.period = input.period;
  count_trial();
  const Trial trial = std::exchange(told_trial_, {});
  report.scope.trial_pages[HT_TIER_FAST] = trial.cold_pages;
  report.scope.trial_pages[HT_TIER_SLOW] = trial.hot_pages;
  report.scope.trial_hits[HT_TIER_FAST] = trial.cold_hits;
  report.scope.trial_hits[HT_TIER_SLOW] = trial.hot_hits;
  report.scope.swap_ns = static_cast<__u64>(swap_ns_);
  report.scope.moved_pages = std::exchange(moved_pages_, 0);
  report.scope.moved_back_pages = std::exchange(moved_back_pages_, 0);
  if (epoch_ >= trial_epoch_ + (trial_told_ ? kTrialEpochs : kTrialLongest)) end_trial();
}

// What the policy is told of pages on trial when it is asked next.
void Scope::count_trial() {
  if (!trial_epoch_ || epoch_ < trial_epoch_ + kTrialFirst || !partition_->trial().told) return;
  trial_told_ = true;
  add(told_trial_, partition_->trial());
}

void Scope::end_trial() {
  partition_->clear_trial();
  trial_epoch_ = 0;
  trial_told_ = false;
  told_trial_ = {};
}

// Which spaces may have other pages, or have them elsewhere, than was found last:
// those whose size or mappings differ from the last poll. The kernel adds up
// a size by CPU, so that it may lag by some dozens of pages, and as many may
// have come as went: of a small scope with a bound all are looked at.
bool Scope::changed(const EpochInput& input, const Space& space) const {
  return space.changed_epoch == epoch_ || (input.fast_max_pages != HT_UNKNOWN64 && rss_pages_ <= settings_.recheck_pages);
}

// Walks what may have changed since it was walked, so that the scope knows all
// that it has in each tier.
Result<> Scope::account(const EpochInput& input, EpochReport& report) {
  if (partition_->knows_pages()) return {};  // it had its walks in look()
  walk_budget_pages_ = settings_.max_walk_pages;
  std::vector<__u32> batch;
  std::vector<Listed> none;
  auto flush = [&]() -> Result<> {
    if (batch.empty()) return {};
    auto done = walk(batch, HT_TIER_NONE, 0, none, report);
    batch.clear();
    return done;
  };
  for (__u32 i = 0; i < ranges_.size() && walk_budget_pages_; ++i) {
    Residency& residency = partition_->residency(i);
    auto space = spaces_.spaces().find(ranges_[i].space);
    if (space == spaces_.spaces().end()) continue;
    if (residency.known() && residency.walked_epoch >= space->second.changed_epoch && !changed(input, space->second) &&
        epoch_ - residency.walked_epoch < settings_.residency_epochs)
      continue;
    // What an unfinished walk has passed may have changed as well. Only a range
    // that no epoch can walk whole goes on where it was.
    if (walk_cost(ranges_[i], space->second, ranges_[i].mapped_pages) <= settings_.max_walk_pages) residency.restart();
    batch.push_back(i);
    if (batch.size() == kWalkBatch)
      if (auto done = flush(); !done) return done;
  }
  return flush();
}

// What the scope allocates goes where there is room, and a fast tier that is full
// has none. A program that grows mostly uses what it has just got, so as much is
// kept free as it may get until the next epoch (TPP's headroom, by need).
void Scope::measure_growth(__u64 fast_tier_pages) {
  __u64 grown = 0;
  for (const auto& [id, space] : spaces_.spaces())
    if (space.rss_epoch == epoch_ && (!space.born_epoch || epoch_ - space.born_epoch > kPromisingEpochs)) grown += space.grown_pages;
  grown_[epoch_ % grown_.size()] = grown;
  coming_pages_ = std::min(*std::max_element(grown_.begin(), grown_.end()), std::max(most_room(fast_tier_pages), settings_.max_move_min_pages));
}

// The range that is most like what is allocated next: the hottest that is not hotter than the
// youngest memory, as much as came in the last epochs, was seen to be. Its own estimates
// are too low: they are of pages that were hardly there. kNoRange: nothing comes.
__u32 Scope::like_what_comes() {
  if (!coming_pages_ || !partition_->knows_pages()) return kNoRange;
  std::vector<std::pair<__u64, __u32>> youngest;  // age, range
  for (__u32 index = 0; index < ranges_.size(); ++index)
    if (partition_->residency(index).pages()) youngest.push_back({ranges_[index].age_epochs, index});
  sort_by_first(youngest);
  __u64 pages = 0;
  __u64 samples = 0;
  for (auto [age, index] : youngest) {
    if (pages >= kYoungEpochs * coming_pages_ || age > 2 * kYoungEpochs) break;
    pages += partition_->residency(index).pages();
    samples += ranges_[index].samples;
  }
  if (!pages) return kNoRange;
  young_pages_ = kYoungKeep * young_pages_ + static_cast<double>(pages);
  young_samples_ = kYoungKeep * young_samples_ + static_cast<double>(samples) / exposure_;
  const double rate = kRateUnit * exposure_ * young_samples_ / std::max(1.0, young_pages_);
  __u32 like = kNoRange;
  for (auto [age, index] : youngest)
    if (ranges_[index].rate && ranges_[index].rate <= rate && (like == kNoRange || ranges_[index].rate > ranges_[like].rate)) like = index;
  return like;
}

// Twice what comes, or a burst finds none. And as much as CPUs lately had in their
// lists: a CPU takes hundreds of pages there at once, and if what is left is below the
// watermark, the kernel allocates from slow memory before it looks into the list.
__u64 Scope::room_target() const {
  return coming_pages_ ? 2 * coming_pages_ + *std::max_element(listed_.begin(), listed_.end()) + withheld_room_pages_ : 0;
}

// The kernel keeps more than it tells (blocks for atomic allocations, say): of room that
// was thought to be enough, what came to lie in slow memory all the same was not to be had.
void Scope::measure_room(const EpochInput& input) {
  const __u64 slow = own_pages_[HT_TIER_SLOW];
  const __u64 landed = std::min(slow - std::min(slow, expected_slow_pages_), coming_pages_);
  withheld_room_pages_ -= withheld_room_pages_ / kWithheldRoomEpochs;
  if (room_was_enough_) withheld_room_pages_ = std::min(withheld_room_pages_ + landed, most_room(input.fast_tier_pages));
}

// What is free of the fast tier and may be filled with what is hot. While nothing is
// allocated, that is also what the CPUs have in their lists: new pages find none of it anyway.
// A share is left free only where it is not known what comes (like_what_comes()).
__u64 Scope::free_room(const EpochInput& input) const {
  const double share = partition_->knows_pages() ? 0 : settings_.fast_reserve_share;
  const auto reserve = static_cast<__u64>(share * static_cast<double>(input.fast_tier_pages));
  const __u64 kept = std::max({reserve, withheld_pages_, input.fast_watermark_pages});
  if (!coming_pages_) return less(free_pages(input), kept);
  return std::min(less(input.fast_free_pages, kept), less(less(free_pages(input), input.fast_watermark_pages), room_target()));
}

// Exchanges cold pages of fast memory for hot ones of slow memory.
Result<> Scope::promote(const EpochInput& input, EpochReport& report) {
  walk_budget_pages_ = settings_.max_walk_pages / 2;  // half for each direction
  // What is beyond the bound goes first, where the rate is short.
  reserved_pages_ = own_pages_[HT_TIER_FAST] > input.fast_max_pages ? own_pages_[HT_TIER_FAST] - input.fast_max_pages : 0;
  reserved_pages_ = std::max(reserved_pages_, input.surplus_pages);
  if (auto done = select_hot(report); !done) return done;
  if (ranked_.empty() || !ranges_[ranked_.front()].heat) {
    report.decision = Decision::kNoHeat;
    return {};
  }
  measure_room(input);
  const __u32 like = like_what_comes();
  report.coming_pages = coming_pages_;
  // Room that is missing for what will be allocated until the next epoch.
  __u64 missing = 0;
  if (like != kNoRange && !input.surplus_pages) {
    missing = less(room_target(), less(free_pages(input), input.fast_watermark_pages));
    const __u64 bound = report.scope.fast_capacity_pages;
    if (input.accounts && own_pages_[HT_TIER_FAST] + coming_pages_ > bound)
      missing = std::max(missing, std::min(coming_pages_, own_pages_[HT_TIER_FAST] + coming_pages_ - bound));
    missing_room_ = missing;
  }
  if (hot_.empty() && !missing) {
    if (restless(input, {}, report)) return {};
    report.decision = cooling_pages_ ? Decision::kCooling : any_held_ ? Decision::kAllRefused : Decision::kAllHotFast;
    return {};
  }
  walk_budget_pages_ += settings_.max_walk_pages / 2;
  __u64 need = missing;
  for (const Listed& listed : hot_) need += listed.pages();
  const __u32 hottest = std::max(missing ? ranges_[like].heat : 0, hot_.empty() ? 0 : ranges_[hot_.front().range].heat);
  if (auto done = select_cold(need, hottest, report); !done) return done;
  std::span<const Listed> cold = cold_;
  __u64 slow_room = input.slow_free_pages;
  std::vector<PlanEntry> plan = make_room(cold, ranges_, like, missing, slow_room);
  __u64 room = free_room(input);
  if (input.accounts) {
    // Within its bounds a scope grows; beyond them it only exchanges.
    const __u64 bound = report.scope.fast_capacity_pages;
    room = std::min(room, bound > own_pages_[HT_TIER_FAST] ? bound - own_pages_[HT_TIER_FAST] : 0);
  }
  const std::vector<PlanEntry> moves = make_plan(hot_, cold, ranges_, room, slow_room, epoch_ >= large_waits_until_epoch_);
  plan.insert(plan.end(), moves.begin(), moves.end());
  report.decision = Decision::kNothingColder;
  if (plan.empty()) return {};
  for (PlanEntry& entry : plan)
    entry.back = reverses(entry.hot_range, entry.hot, HT_TIER_FAST) || reverses(entry.cold_range, entry.cold, HT_TIER_SLOW);
  auto admitted = admit(input, plan, report);
  if (!admitted) return std::unexpected(admitted.error());
  report.decision = !*admitted ? Decision::kPolicyFailed : plan.empty() ? Decision::kAllRefused : Decision::kMoved;
  if (report.decision != Decision::kMoved) return {};

  for (const PlanEntry& entry : plan) report.room_pages += entry.coming ? entry.cold_pages() : 0;
  if (restless(input, plan, report)) return {};
  if (auto done = move(input, plan, budget_pages_, report); !done) return done;
  // Here, where pairs are moved: demotion for the sake of a bound is no swap.
  if (__u64 pages = report.moved.promoted_pages + report.moved.demoted_pages) {
    const double ns = 2 * static_cast<double>(report.moved.ns) / static_cast<double>(pages);
    swap_ns_ = swap_ns_ == 0 ? ns : swap_ns_ + kSwapSmoothing * (ns - swap_ns_);
  }
  if (input.dry_run) report.decision = Decision::kDryRun;
  else if (report.rate_limited_pages && !report.moved.nr) report.decision = Decision::kRateLimited;
  return {};
}

// Huge pages that are hot in a part only, where the policy finds that it pays. What
// they hold is moved in later epochs, as single pages are.
Result<> Scope::take_apart(const EpochInput& input, EpochReport& report) {
  const std::vector<Skewed> skewed = partition_->skewed(std::min<std::size_t>(budget_pages_ / HT_GRANULE_PAGES, HT_CALL_PAIRS));
  if (skewed.empty()) return {};
  const auto side = [](const Skewed& s, __u32 pid, double rate, __u32 flags) {
    tier_range range{};
    range.start = s.start;
    range.end = s.start + HT_GRANULE_SIZE;
    range.space = s.space;
    range.pid = pid;
    range.mapped_pages = s.pages;
    range.flags = TIER_RANGE_ANON | TIER_RANGE_HUGE | flags;
    range.tier_pages[HT_TIER_FAST] = range.tier_pages[HT_TIER_SLOW] = HT_UNKNOWN64;
    range.left_count = range.right_count = range.walk_epochs = HT_UNKNOWN32;
    range.rate = range.heat = static_cast<__u32>(std::clamp(rate * kRateUnit, 0.0, 4294967294.0));
    return range;
  };
  ht_run run = run_of(input, report);
  std::span<tier_pair> buffer = caller_->pairs();
  std::vector<bool> admitted(skewed.size());
  auto answered = call(
      run, skewed.size(), HT_CALL_PAIRS, &PolicyCaller::run_admit,
      [&](std::size_t first, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
          const Skewed& s = skewed[first + i];
          const __u32 pid = spaces_.pid_of(s.space);
          buffer[i] = {side(s, pid, s.part_rate, TIER_RANGE_SPLIT), side(s, pid, s.whole_rate, 0), s.pages, 0};
        }
      },
      [&](std::size_t first, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) admitted[first + i] = buffer[i].admitted != 0;
      },
      report);
  if (!answered) return std::unexpected(answered.error());
  if (!*answered) {
    if (input.policy_failed) input.policy_failed(run);
    return {};
  }

  std::lock_guard hold(machine_.lock);
  std::span<ht_pair> pairs = machine_.pairs();
  ht_exchange_run split{};
  split.flags = HT_EXCHANGE_SPLIT;
  for (std::size_t i = 0; i < skewed.size(); ++i) {
    const Skewed& s = skewed[i];
    if (!admitted[i]) {
      partition_->apart(s.space, s.start, HT_MOVE_NONE);
      continue;
    }
    ht_pair& pair = pairs[split.nr++];
    pair = {};
    pair.user = static_cast<__u32>(i);
    pair.hot_space = s.space;
    pair.hot_pid = spaces_.pid_of(s.space);
    pair.hot_addr = s.start;
  }
  if (!split.nr) return {};
  if (auto done = machine_.run_exchange(split); !done) return done;
  for (const ht_pair& pair : pairs.first(split.nr)) {
    const Skewed& s = skewed[pair.user];
    partition_->apart(s.space, s.start, static_cast<ht_move_result>(pair.hot_result));
  }
  report.moved.split_pages += split.split_pages;
  report.moved.ns += split.ns;
  return {};
}

// Would this move take one back?
bool Scope::reverses(__u32 range, ht_page_t page, ht_tier to) const {
  return page && moves_.reverses(ranges_[range].space, HT_PAGE_ADDR(page), to, epoch_, settings_.reversal_epochs);
}

// Does it ask for more and more moves, only to take them back? Then it is
// expelled, before anything is moved.
bool Scope::restless(const EpochInput& input, std::span<const PlanEntry> plan, EpochReport& report) {
  if (input.is_default) return false;
  // What it asks for, with that which is being withheld from it.
  __u64 wanted = cooling_pages_;
  __u64 reversing = cooling_pages_;
  for (const PlanEntry& entry : plan) {
    wanted += entry.hot_pages();
    if (entry.back) reversing += entry.hot_pages();
  }
  auto verdict = conduct_.asked(wanted, reversing, budget_pages_);
  if (!verdict) return false;
  ht_run run{};
  run.scope = report.scope;
  run.seat = input.seat;
  run.generation = report.policy_generation;
  retaken_ = expelled(input, *verdict, run);
  report.decision = Decision::kPolicyFailed;
  return true;
}

// Tells of a rule that the policy broke; the kernel saw nothing wrong. True:
// another policy has the seat.
bool Scope::expelled(const EpochInput& input, const Verdict& verdict, ht_run& run) {
  run.status = 0;
  run.exit.kind = TIER_EXIT_EJECTED;
  run.exit.code = verdict.code;
  run.exit.epoch = epoch_;
  const std::size_t length = std::min(verdict.message.size(), sizeof(run.exit.message) - 1);
  verdict.message.copy(run.exit.message, length);
  run.exit.message[length] = 0;
  return input.policy_failed && input.policy_failed(run);
}

// Demotes the coldest of what the scope has beyond its bound, or of what its
// siblings need. The policy is not asked: it ranks, but the bound is its owner's.
Result<> Scope::keep_bounds(const EpochInput& input, EpochReport& report) {
  __u64 fast = own_pages_[HT_TIER_FAST] + report.moved.promoted_pages;
  fast -= std::min(fast, report.moved.demoted_pages);
  const __u64 over = std::max(fast > input.fast_max_pages ? fast - input.fast_max_pages : 0, input.surplus_pages);
  report.over_pages = over;
  reserved_pages_ = 0;
  walk_budget_pages_ = settings_.max_walk_pages;
  const std::size_t batch_size = walk_batch();
  const __u64 demoted_before = report.moved.demoted_pages;
  const __u64 limited_before = report.rate_limited_pages;
  const auto left = [&] { return over - std::min(over, report.moved.demoted_pages - demoted_before); };
  bool stopped = false;
  for (std::size_t rank = ranked_.size(); left() && rank > 0 && !stopped;) {
    std::vector<__u32> batch;
    for (__u64 bound = 0; rank > 0 && bound < left() && batch.size() < batch_size; --rank) {
      const __u32 index = ranked_[rank - 1];
      ++report.ranges_visited;
      const Residency& residency = partition_->residency(index);
      if (residency.known() && !residency.moved && !residency.tier_pages[HT_TIER_FAST]) continue;
      // What this epoch moved may be on the list of a later walk; the mover tells.
      batch.push_back(index);
      bound += residency.known() ? residency.tier_pages[HT_TIER_FAST] : ranges_[index].mapped_pages;
    }
    // Pages that cannot move now are made up for by those that follow them: a walk
    // goes on where it stopped, a list that needs none has them before the others.
    __u64 stuck = 0;
    while (left() && !batch.empty() && !stopped) {
      std::vector<Listed> listed;
      const __u64 wanted = std::max(kOverplan * left(), kBoundListMin);
      if (auto walked = walk(batch, HT_TIER_FAST, stuck + wanted, listed, report); !walked) return walked;
      __u64 seen = 0;
      auto page = listed.begin();
      for (; page != listed.end() && seen < stuck; ++page) seen += page->pages();
      const __u64 left_before = left();
      while (left() && page != listed.end() && !stopped) {
        std::vector<PlanEntry> plan;
        for (__u64 planned = 0; page != listed.end() && planned < left(); ++page) {
          plan.push_back({0, page->page, kNoRange, page->range});
          planned += page->pages();
          seen += page->pages();
        }
        if (auto moved = move(input, plan, HT_UNKNOWN64, report); !moved) return moved;
        stopped = input.dry_run || report.rate_limited_pages > limited_before;
      }
      stopped |= !walk_budget_pages_;
      // Again those whose list was cut short.
      const bool all = partition_->knows_pages() ? seen < stuck + wanted : listed.empty();
      if (partition_->knows_pages()) stuck = seen - std::min(seen, left_before - left());
      std::erase_if(batch, [&](__u32 index) { return all || (!partition_->knows_pages() && !partition_->residency(index).cursor); });
    }
  }
  if (left() < over && report.decision != Decision::kMoved) report.decision = Decision::kOverBudget;
  return {};
}

void Scope::measure_counts(EpochReport& report) const {
  constexpr int kScale = 1;
  for (const tier_range& range : ranges_) {
    if (range.tier_pages[HT_TIER_FAST] == HT_UNKNOWN64) continue;
    const __u64 pages = range.tier_pages[HT_TIER_FAST] + range.tier_pages[HT_TIER_SLOW];
    if (!pages) continue;
    const __u64 slow = range.count[kScale] * range.tier_pages[HT_TIER_SLOW] / pages;
    report.tier_counts[HT_TIER_SLOW] += slow;
    report.tier_counts[HT_TIER_FAST] += range.count[kScale] - slow;
  }
}

// By the counts of about eight epochs.
void Scope::measure_demand(EpochReport& report) const {
  constexpr int kScale = 1;
  const double forgets = 1 - std::exp2(-1.0 / 8);
  const double seconds = static_cast<double>(std::max<__u64>(report.scope.epoch_ns, 1)) / 1e9;
  Demand& demand = report.demand;
  demand.fast_pages = own_pages_[HT_TIER_FAST] + report.moved.promoted_pages;
  demand.fast_pages -= std::min(demand.fast_pages, report.moved.demoted_pages);
  demand.slow_pages = own_pages_[HT_TIER_FAST] + own_pages_[HT_TIER_SLOW];
  demand.slow_pages -= std::min(demand.slow_pages, demand.fast_pages);
  for (const tier_range& range : ranges_) {
    if (range.tier_pages[HT_TIER_FAST] == HT_UNKNOWN64) continue;
    const __u64 pages = range.tier_pages[HT_TIER_FAST] + range.tier_pages[HT_TIER_SLOW];
    if (!pages) continue;
    const double samples = range.count[kScale] * forgets / (1 << HT_COUNT_SHIFT);
    demand.pages[static_cast<std::size_t>(density_bucket(samples / seconds / static_cast<double>(pages)))] += pages;
  }
}

// Asks the policy about all entries, as many at a time as a call takes. False:
// run.status says why there is no answer.
Result<bool> Scope::call(ht_run& run, std::size_t entries, std::size_t per_call,
                         Result<> (PolicyCaller::*ask)(ht_run&),
                         const std::function<void(std::size_t, std::size_t)>& put,
                         const std::function<void(std::size_t, std::size_t)>& get, EpochReport& report) {
  const __u64 budget_ns = run.budget_ns;
  __u64 spent_ns = 0;
  std::size_t first = 0;
  do {
    const std::size_t count = std::min(entries - first, per_call);
    put(first, count);
    run.first = static_cast<__u32>(first);
    run.nr = static_cast<__u32>(count);
    // 0 is no bound: of one that is used up a nanosecond is left.
    if (budget_ns) run.budget_ns = budget_ns > spent_ns ? budget_ns - spent_ns : 1;
    if (auto done = (*caller_.*ask)(run); !done) return std::unexpected(done.error());
    spent_ns += run.policy_ns;
    report.policy_ns += run.policy_ns;
    report.policy_status = run.status;
    report.policy_generation = run.generation;
    if (run.status) {
      // As one call, for whoever is told of it.
      run.done += static_cast<__u32>(first);
      run.nr = static_cast<__u32>(entries);
      run.budget_ns = budget_ns;
      run.policy_ns = spent_ns;
      return false;
    }
    get(first, count);
    first += count;
  } while (first < entries);
  return true;
}

// What the policy is asked with.
ht_run Scope::run_of(const EpochInput& input, const EpochReport& report) {
  ht_run run{};
  run.scope = report.scope;
  run.budget_ns = input.budget_ns;
  run.seat = input.seat;
  return run;
}

// False: no policy answered.
Result<bool> Scope::classify(const EpochInput& input, EpochReport& report) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (tier_range& range : ranges_) {
      range.heat = 0;
      range.action = TIER_KEEP;
    }
    ht_run run = run_of(input, report);
    std::span<tier_range> buffer = caller_->ranges();
    auto answered = call(
        run, ranges_.size(), HT_CALL_RANGES, &PolicyCaller::run_classify,
        [&](std::size_t first, std::size_t count) { std::copy_n(ranges_.data() + first, count, buffer.begin()); },
        [&](std::size_t first, std::size_t count) { std::copy_n(buffer.begin(), count, ranges_.data() + first); }, report);
    if (!answered) return answered;
    if (*answered) {
      if (conduct_.begin(run.generation)) {
        moves_.clear();
        seated_epoch_ = epoch_;
      }
      // One that moves nothing need not tell hot from cold.
      if (!input.moves || input.is_default) return true;
      bool heat = false;
      bool action = false;
      for (const tier_range& range : ranges_) {
        heat |= range.heat != 0;
        action |= range.action != TIER_KEEP;
      }
      auto verdict = conduct_.classified(report.scope.samples, heat, action);
      if (!verdict) return true;
      if (attempt || !expelled(input, *verdict, run)) break;
      continue;
    }
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
  sort_by_first(keys);
  ranked_.resize(keys.size());
  std::transform(keys.begin(), keys.end(), ranked_.begin(), [](const auto& key) { return key.second; });
}

bool Scope::fresh(const Residency& residency) const {
  return residency.known() && !residency.moved && epoch_ - residency.walked_epoch < settings_.residency_epochs;
}

// What a partition lists itself costs no walk.
std::size_t Scope::walk_batch() const { return partition_->knows_pages() ? HT_RANGES_MAX : kWalkBatch; }

// Where pages are, for a partition that keeps track of it.
Result<> Scope::look(const EpochInput& input, EpochReport& report) {
  rss_pages_ = 0;
  for (const auto& [id, space] : spaces_.spaces())
    if (space.rss_pages != HT_UNKNOWN64) rss_pages_ += space.rss_pages;
  std::vector<__u64> changed_spaces;
  if (input.accounts && partition_->knows_pages())
    for (const auto& [id, space] : spaces_.spaces())
      if (changed(input, space)) changed_spaces.push_back(id);
  std::vector<Partition::Span> spans = partition_->to_walk(walk_share(), changed_spaces);
  for (std::size_t done = 0; done < spans.size();) {
    std::lock_guard hold(machine_.lock);
    ht_walks_run& run = machine_.walks();
    run.nr = 0;
    run.pages_used = 0;
    run.ns = 0;
    std::vector<std::size_t> walked;
    __u64 budget = walk_share();
    for (; done < spans.size() && run.nr < HT_WALKS_MAX; ++done) {
      auto space = spaces_.spaces().find(spans[done].space);
      if (space == spaces_.spaces().end()) continue;
      const __u64 pages = std::min((spans[done].end - spans[done].start) >> HT_PAGE_SHIFT, spans[done].pages);
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

// No more is visited than is resident (which is not known of files), and one entry
// for each 2 MiB.
__u64 Scope::walk_cost(const tier_range& range, const Space& space, __u64 span_pages) {
  return (range.flags & TIER_RANGE_FILE ? span_pages : std::min(span_pages, space.rss_pages)) + (span_pages >> 9) + 1;
}

// Walks ranges, each from where its last walk stopped, and lists pages of one
// tier in that order. most: of each range, for a partition that lists them itself.
Result<> Scope::walk(std::span<const __u32> indices, ht_tier tier, __u64 list_max_pages, std::vector<Listed>& listed,
                     EpochReport& report, std::span<const __u64> most) {
  if (partition_->knows_pages()) {
    for (std::size_t i = 0; i < indices.size() && listed.size() < list_max_pages; ++i)
      partition_->list(indices[i], tier, most.empty() ? list_max_pages : most[i], listed);
    return {};
  }
  std::lock_guard hold(machine_.lock);
  ht_walks_run& run = machine_.walks();
  run.nr = 0;
  run.pages_used = 0;
  run.ns = 0;
  std::vector<__u32> walked;
  for (__u32 index : indices) {
    const tier_range& range = ranges_[index];
    const Residency& residency = partition_->residency(index);
    auto space = spaces_.spaces().find(range.space);
    if (space == spaces_.spaces().end() || !walk_budget_pages_ || run.nr == HT_WALKS_MAX) continue;
    __u64 start = std::max(residency.cursor, range.start);
    __u64 span = (range.end - start) >> HT_PAGE_SHIFT;
    __u64 cost = walk_cost(range, space->second, span);
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
    walked.push_back(index);
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
      residency.restart();
      range.walk_epochs = 0;
      range.flags &= ~TIER_RANGE_HUGE;
      if (residency.huge_pages * 2 > residency.pages()) range.flags |= TIER_RANGE_HUGE;
    }
    for (ht_page_t page : machine_.pages().subspan(w.list_first, w.list_count)) listed.push_back({page, walked[i]});
  }
  return {};
}

// Ranges about as hot as the one at the cut: few samples do not tell which of them is
// hotter. Each gets fast memory for the same share of its pages, or processes whose ranges
// come first would have all of it. By rates: what heat means is the policy's business.
// Only where that costs no walk.
Scope::Equals Scope::equals_at_cut(__u64 capacity) const {
  Equals equals;
  if (!partition_->knows_pages()) return equals;
  const auto heat = [&](std::size_t rank) { return ranges_[ranked_[rank]].heat; };
  const auto rate = [&](std::size_t rank) { return ranges_[ranked_[rank]].rate; };
  const auto pages = [&](std::size_t rank) { return bound_pages(ranges_[ranked_[rank]], partition_->residency(ranked_[rank])); };
  __u64 hotter = 0;
  std::size_t cut = 0;
  while (cut < ranked_.size() && heat(cut) && hotter + pages(cut) <= capacity) hotter += pages(cut++);
  if (cut == ranked_.size() || !heat(cut)) return equals;
  const auto alike = [&](std::size_t rank) {
    return std::max(rate(rank), rate(cut)) - std::min(rate(rank), rate(cut)) <= rate(cut) / kAlikePart;
  };
  std::size_t last = cut;
  __u64 total = 0;
  for (; last < ranked_.size() && heat(last) && alike(last); ++last) total += pages(last);
  for (equals.first = cut; equals.first && alike(equals.first - 1); --equals.first) {
    total += pages(equals.first - 1);
    hotter -= pages(equals.first - 1);
  }
  // What one cannot have in whole pages the next may.
  const __u64 room = capacity - hotter;
  __u64 so_far = 0, given = 0;
  for (std::size_t rank = equals.first; rank < last; ++rank) {
    so_far += pages(rank);
    const auto due = static_cast<__u64>(static_cast<unsigned __int128>(room) * so_far / total) - given;
    const __u64 unit = ranges_[ranked_[rank]].flags & TIER_RANGE_HUGE ? HT_GRANULE_PAGES : 1;
    equals.may_have.push_back(std::min(due / unit * unit, pages(rank)));
    given += equals.may_have.back();
  }
  return equals;
}

// From the hottest down as long as what is resident fits the capacity. The
// range at the cut takes part with the pages that still fit: otherwise a range
// larger than the tier would leave it to colder ones.
Result<> Scope::select_hot(EpochReport& report) {
  const std::size_t batch_size = walk_batch();
  const __u64 capacity = report.scope.fast_capacity_pages;
  const __u64 want = kOverplan * budget_pages_;
  const Equals equals = equals_at_cut(capacity);
  __u64 resident = 0;
  __u64 wanted = 0;
  bool full = false;
  cut_ = 0;
  any_held_ = false;
  cooling_pages_ = 0;
  auto hot = [&](std::size_t rank) { return rank < ranked_.size() && ranges_[ranked_[rank]].heat > 0; };
  for (int round = 0; round < kWalkRounds && !full && hot(cut_) && wanted < want; ++round) {
    std::vector<__u32> batch;
    std::vector<__u64> most;
    std::size_t end = cut_;
    for (__u64 bound = resident; hot(end) && (bound < capacity || equals.has(end)) && batch.size() < batch_size; ++end) {
      const Residency& residency = partition_->residency(ranked_[end]);
      bool wanted_now = held(residency) ? !residency.known() : !fresh(residency) || residency.tier_pages[HT_TIER_SLOW];
      bound += bound_pages(ranges_[ranked_[end]], residency);
      const __u64 fits = equals.has(end) ? less(equals.may(end), residency.tier_pages[HT_TIER_FAST]) : want;
      if (!wanted_now || !fits) continue;
      batch.push_back(ranked_[end]);
      most.push_back(fits);
    }
    if (end == cut_) break;
    std::vector<Listed> listed;
    if (auto done = walk(batch, HT_TIER_SLOW, want, listed, report, most); !done) return done;
    auto page = listed.begin();
    for (; cut_ < end && !full && wanted < want; ++cut_) {
      const __u32 index = ranked_[cut_];
      const Residency& residency = partition_->residency(index);
      const __u64 pages = bound_pages(ranges_[index], residency);
      const __u64 fast = residency.known() ? residency.tier_pages[HT_TIER_FAST] : 0;
      __u64 may = pages;
      __u64 fits = HT_UNKNOWN64;
      if (equals.has(cut_)) {
        may = equals.may(cut_);
        full = cut_ + 1 == equals.last();
        fits = less(may, fast);
      } else if (resident + pages > capacity) {
        may = capacity - resident;
        full = true;
        fits = less(may, fast);
      }
      for (; page != listed.end() && page->range == index; ++page) {
        if (page->pages() > fits || wanted >= want || held(residency) || cooling(residency)) continue;
        fits -= page->pages();
        wanted += page->pages();
        hot_.push_back(*page);
      }
      resident += may;
      if (residency.known()) report.hot_slow_pages += residency.tier_pages[HT_TIER_SLOW];
      any_held_ |= held(residency);
      if (cooling(residency)) {
        ++report.cooling_ranges;
        if (residency.known()) cooling_pages_ += residency.tier_pages[HT_TIER_SLOW];
      }
      report.cut_heat = ranges_[index].heat;
      ++report.ranges_visited;
    }
  }
  report.hot_ranges = static_cast<__u32>(cut_);
  report.hot_pages = resident;
  return {};
}

// From the coldest up, as long as they are colder than the hottest that wants in,
// until as many pages are found as are needed. What came lately goes last: it may
// have to stay, and the hot page would have no partner.
Result<> Scope::select_cold(__u64 need, __u32 hottest, EpochReport& report) {
  const std::size_t batch_size = walk_batch();
  std::size_t rank = ranked_.size();
  __u64 found = 0;
  std::vector<Listed> came;
  for (int round = 0; round < kWalkRounds && found < need; ++round) {
    std::vector<__u32> batch;
    for (__u64 bound = found; rank > 0 && bound < need && batch.size() < batch_size; --rank) {
      const __u32 index = ranked_[rank - 1];
      if (ranges_[index].heat >= hottest) break;
      ++report.ranges_visited;
      const Residency& residency = partition_->residency(index);
      if (fresh(residency) && !residency.tier_pages[HT_TIER_FAST]) continue;
      if (cooling(residency)) continue;
      batch.push_back(index);
      bound += residency.known() ? residency.tier_pages[HT_TIER_FAST] : ranges_[index].mapped_pages;
    }
    if (batch.empty()) break;
    const std::size_t first = cold_.size();
    if (auto done = walk(batch, HT_TIER_FAST, need, cold_, report); !done) return done;
    const auto lately = std::stable_partition(cold_.begin() + static_cast<std::ptrdiff_t>(first), cold_.end(), [&](const Listed& page) {
      return !reverses(page.range, page.page, HT_TIER_SLOW);
    });
    came.insert(came.end(), lately, cold_.end());
    cold_.erase(lately, cold_.end());
    for (std::size_t i = first; i < cold_.size(); ++i) found += cold_[i].pages();
  }
  cold_.insert(cold_.end(), came.begin(), came.end());
  return {};
}

tier_result& Scope::result(__u32 range) {
  if (!is_touched_[range]) {
    is_touched_[range] = true;
    touched_.push_back(range);
    results_[range] = {};
    reversed_pages_[range] = displaced_by_heat_[range] = 0;
  }
  return results_[range];
}

// Drops what the policy refuses. False: no policy answered.
Result<bool> Scope::admit(const EpochInput& input, std::vector<PlanEntry>& plan, EpochReport& report) {
  std::vector<tier_pair> pairs;
  std::unordered_map<__u64, std::size_t> groups;
  static_assert(HT_RANGES_MAX < 1U << 30);
  auto key = [](const PlanEntry& entry) {
    return __u64{entry.coming} << 63 | __u64{entry.back} << 62 | __u64{entry.hot_range} << 32 | entry.cold_range;
  };
  std::vector<std::size_t> group_of;
  group_of.reserve(plan.size());
  const std::size_t groups_max = partition_->knows_pages() ? plan.size() : kGroupsMax;
  for (const PlanEntry& entry : plan) {
    auto [group, added] = groups.try_emplace(key(entry), groups.size());
    if (added) {
      if (groups.size() > groups_max) {  // lowest in rank: another epoch
        groups.erase(group);
        break;
      }
      tier_pair& pair = pairs.emplace_back();
      pair.hot = ranges_[entry.hot_range];
      pair.hot.action = TIER_KEEP;
      if (entry.coming) pair.hot.flags |= TIER_RANGE_COMING;
      if (entry.back) pair.hot.flags |= TIER_RANGE_BACK;
      if (entry.cold_range != kNoRange) pair.cold = ranges_[entry.cold_range];
    }
    pairs[group->second].pages += static_cast<__u32>(std::max(entry.hot_pages(), entry.cold_pages()));
    group_of.push_back(group->second);
  }
  plan.resize(group_of.size());

  ht_run run = run_of(input, report);
  std::span<tier_pair> buffer = caller_->pairs();
  auto answered = call(
      run, pairs.size(), HT_CALL_PAIRS, &PolicyCaller::run_admit,
      [&](std::size_t first, std::size_t count) { std::copy_n(&pairs[first], count, buffer.begin()); },
      [&](std::size_t first, std::size_t count) { std::copy_n(buffer.begin(), count, &pairs[first]); }, report);
  if (!answered) return answered;
  if (!*answered) {
    retaken_ = input.policy_failed && input.policy_failed(run);
    return false;
  }

  // What moves, and what the policy would move if moves paid, is on trial: both
  // sides are watched as they stand now.
  __u64 tried = 0;
  for (std::size_t i = 0; !trial_epoch_ && i < plan.size() && tried < budget_pages_; ++i) {
    const PlanEntry& entry = plan[i];
    const tier_pair& pair = pairs[group_of[i]];
    if (entry.coming || (!pair.admitted && pair.hot.action != TIER_TRY)) continue;
    if (entry.hot) partition_->try_pages(ranges_[entry.hot_range].space, entry.hot, HT_TIER_SLOW);
    if (entry.cold) partition_->try_pages(ranges_[entry.cold_range].space, entry.cold, HT_TIER_FAST);
    tried += entry.hot_pages();
  }
  if (tried) trial_epoch_ = epoch_;

  std::unordered_map<__u32, bool> taken;  // by hot range: is any of it admitted?
  for (std::size_t i = 0; i < plan.size(); ++i) {
    if (plan[i].coming) continue;
    if (pairs[group_of[i]].admitted) taken[plan[i].hot_range] = true;
    else if (!plan[i].back) taken.try_emplace(plan[i].hot_range, false);  // what may not go back yet says nothing of the others
  }
  for (auto [range, any] : taken) {
    Residency& residency = partition_->residency(range);
    residency.hold_epochs = any ? 0 : std::clamp(2 * residency.hold_epochs, 1u, kHoldMax);
    residency.held_until_epoch = epoch_ + 1 + residency.hold_epochs;
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const PlanEntry& entry = plan[i];
    if (pairs[group_of[i]].admitted) {
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
Result<> Scope::move(const EpochInput& input, std::span<const PlanEntry> plan, __u64 budget_pages,
                     EpochReport& report) {
  moves_.expect(2 * budget_pages_ * settings_.reversal_epochs);
  __u64 promoted = 0;
  __u64 demoted = 0;
  bool limited = false;
  for (std::size_t next = 0; next < plan.size() && !limited;) {
    __u64 up = promoted;
    __u64 down = demoted;
    const __u64 rate_pages = rate_.pages() == HT_UNKNOWN64 ? HT_UNKNOWN64 : rate_.pages() - std::min(rate_.pages(), reserved_pages_);
    std::size_t end = next;
    for (; end < plan.size() && end - next < HT_PAIRS_MAX; ++end) {
      const __u64 hot = plan[end].hot_pages();
      const __u64 cold = plan[end].cold_pages();
      if (plan[end].coming != plan[next].coming) break;  // a run of their own
      if (up + hot > budget_pages || down + cold > budget_pages) break;
      if (up - promoted + hot + down - demoted + cold > rate_pages) {
        for (std::size_t i = end; i < plan.size() && up + plan[i].hot_pages() <= budget_pages; ++i) {
          up += plan[i].hot_pages();
          report.rate_limited_pages += std::max(plan[i].hot_pages(), plan[i].cold_pages());
        }
        limited = true;
        break;
      }
      up += plan[end].hot_pages();
      down += plan[end].cold_pages();
    }
    if (end == next) break;
    for (const PlanEntry& entry : plan.subspan(next, end - next))
      if (entry.cold && entry.hot_range != kNoRange) {
        result(entry.cold_range);
        __u32& by = displaced_by_heat_[entry.cold_range];
        by = std::max(by, ranges_[entry.hot_range].heat);
      }
    if (input.dry_run) {
      for (const PlanEntry& entry : plan.subspan(next, end - next)) {
        if (entry.hot) result(entry.hot_range).promoted_pages += static_cast<__u32>(entry.hot_pages());
        if (entry.cold) result(entry.cold_range).demoted_pages += static_cast<__u32>(entry.cold_pages());
        promoted += entry.hot_pages();
        demoted += entry.cold_pages();
        report.dry_run_pages += entry.hot_pages();
        rate_.spend(entry.hot_pages() + entry.cold_pages());
      }
      next = end;
      continue;
    }

    // Room is made before it is taken.
    std::lock_guard hold(machine_.lock);
    std::span<ht_pair> pairs = machine_.pairs();
    ht_exchange_run run{};
    run.flags = input.exchange_flags;
    auto emit = [&](bool hot, bool cold) {
      for (std::size_t i = next; i < end; ++i) {
        const PlanEntry& entry = plan[i];
        if ((entry.hot != 0) != hot || (entry.cold != 0) != cold) continue;
        ht_pair& pair = pairs[run.nr++];
        pair = {};
        pair.user = static_cast<__u32>(i);
        if (hot || entry.coming) {  // room is for the one who will take it
          const tier_range& range = ranges_[entry.hot_range];
          pair.hot_space = range.space;
          pair.hot_pid = range.pid;
        }
        if (hot) {
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
      const auto settle = [&](__u32 range, __u64 space, ht_page_t page, __u64 pages, __u32 became, ht_tier to,
                              __u32 tier_result::*moved) {
        const bool done = became == HT_MOVE_DONE;
        result(range).*(done ? moved : &tier_result::failed_pages) += static_cast<__u32>(pages);
        Residency& residency = partition_->residency(range);
        residency.moved = true;
        if (done) {
          residency.move(page, to);
          remember(range, page, to, report);
        }
        partition_->placed(space, page, static_cast<ht_move_result>(became), to);
      };
      if (entry.hot) {
        settle(entry.hot_range, pair.hot_space, entry.hot, entry.hot_pages(), pair.hot_result, HT_TIER_FAST,
               &tier_result::promoted_pages);
        if (!entry.cold && pair.hot_result == HT_MOVE_NO_MEMORY) {
          withheld_pages_ = std::max(withheld_pages_, free_pages(input));
          withheld_until_epoch_ = epoch_ + kWithheldEpochs;
        }
        // Or room would be made for it each epoch anew.
        if (!entry.cold && HT_PAGE_ORDER(entry.hot) != 0) {
          const bool done = pair.hot_result == HT_MOVE_DONE;
          if (done) large_wait_epochs_ = large_waits_until_epoch_ = 0;
          else if (large_waits_until_epoch_ <= epoch_)
            large_waits_until_epoch_ = epoch_ + (large_wait_epochs_ = std::clamp(2 * large_wait_epochs_, kLargeWaitMin, kLargeWaitMax));
        }
      }
      if (entry.cold)
        settle(entry.cold_range, pair.cold_space, entry.cold, entry.cold_pages(), pair.cold_result, HT_TIER_SLOW,
               &tier_result::demoted_pages);
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
    rate_.spend(run.promoted_pages + run.demoted_pages);
    next = end;
  }
  return {};
}

void Scope::remember(__u32 range, ht_page_t page, ht_tier to, EpochReport& report) {
  const __u32 pages = 1U << HT_PAGE_ORDER(page);
  moved_pages_ += pages;
  if (reverses(range, page, to)) {
    reversed_pages_[range] += pages;
    report.reversed_pages += pages;
    moved_back_pages_ += pages;
  }
  moves_.moved(ranges_[range].space, HT_PAGE_ADDR(page), to, epoch_);
}

// Ranges whose pages go to and fro stay where they are for a while.
void Scope::cool() {
  for (__u32 range : touched_) {
    const tier_result& moved = results_[range];
    if (!reversed_pages_[range] || 2 * reversed_pages_[range] < moved.promoted_pages + moved.demoted_pages) continue;
    Residency& residency = partition_->residency(range);
    const bool again = residency.cool_epochs && epoch_ <= residency.cooled_epoch + 3 * residency.cool_epochs;
    residency.cool_epochs =
        again ? std::min(2 * residency.cool_epochs, settings_.cool_max_epochs) : settings_.cool_epochs;
    residency.cooled_epoch = epoch_;
  }
}

std::vector<History::Moved> Scope::last_moved() const {
  std::vector<History::Moved> list;
  list.reserve(touched_.size());
  for (__u32 range : touched_) list.push_back({range, results_[range].promoted_pages, results_[range].demoted_pages});
  return list;
}

// Leaves what the epoch decided for those who look.
void Scope::note(EpochReport& report) {
  last_.assign(ranges_.begin(), ranges_.end());
  last_notes_.assign(ranges_.size(), 0);
  last_index_ = partition_->index();
  if (report.decision == Decision::kPolicyFailed) touched_.clear();
  for (std::size_t rank = 0; rank < cut_ && rank < ranked_.size(); ++rank) last_notes_[ranked_[rank]] |= kRangeHot;
  for (__u32 i = 0; i < ranges_.size(); ++i) {
    const Residency& residency = partition_->residency(i);
    if (held(residency)) last_notes_[i] |= kRangeHeld;
    if (cooling(residency)) last_notes_[i] |= kRangeCooling;
  }

  report.moves.clear();
  report.moved_ranges = 0;
  for (__u32 i : touched_) {
    const tier_result& moved = results_[i];
    if (!moved.promoted_pages && !moved.demoted_pages && !moved.failed_pages && !moved.refused_pages) continue;
    ++report.moved_ranges;
    const tier_range& range = ranges_[i];
    report.moves.push_back({range.space, range.start, range.end, range.pid, range.heat, report.cut_heat,
                            displaced_by_heat_[i], moved.promoted_pages, moved.demoted_pages, moved.failed_pages,
                            moved.refused_pages, reversed_pages_[i]});
  }
  const auto size = [](const MoveRecord& move) {
    return __u64{move.promoted_pages} + move.demoted_pages + move.failed_pages + move.refused_pages;
  };
  const std::size_t shown = std::min(kMovesShown, report.moves.size());
  std::partial_sort(report.moves.begin(), report.moves.begin() + static_cast<std::ptrdiff_t>(shown), report.moves.end(),
                    [&](const MoveRecord& a, const MoveRecord& b) { return size(a) > size(b); });
  report.moves.resize(shown);
}

Result<> Scope::feed_back(const EpochInput& input, EpochReport& report) {
  ht_run run = run_of(input, report);
  std::span<tier_result> buffer = caller_->results();
  auto answered = call(
      run, touched_.size(), HT_CALL_RESULTS, &PolicyCaller::run_moved,
      [&](std::size_t first, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
          const __u32 range = touched_[first + i];
          buffer[i] = results_[range];
          buffer[i].range = ranges_[range];
        }
      },
      [](std::size_t, std::size_t) {}, report);
  if (!answered) return std::unexpected(answered.error());
  if (!*answered && input.policy_failed) input.policy_failed(run);
  return {};
}

}  // namespace hypertier
