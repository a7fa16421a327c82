// SPDX-License-Identifier: GPL-2.0-or-later
// What one scope (a cgroup, the root one among them) does with its ranges: ask
// the policy, rank, cut, walk, plan, move, keep its bounds. Its state is its own,
// so that scopes run beside each other; what others leave for it is in its inbox.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "engine.hpp"
#include "partition.hpp"
#include "shift.hpp"
#include "plan.hpp"
#include "spaces.hpp"

namespace hypertier {

// What other scopes' epochs and the roster leave for a scope until its next
// epoch. Behind the engine's intake lock.
struct Inbox {
  std::vector<ht_space_event> events;
  std::map<std::pair<__u64, __u64>, ht_granule> granules;  // by space, granule
  std::vector<ht_bits> bits;

  void add(const ht_granule& granule);
};

// What is allocated next is taken to be like what came in so many epochs.
inline constexpr __u64 kYoungEpochs = 8;

class Scope {
 public:
  Scope(Machine& machine, std::unique_ptr<PolicyCaller> caller, const EngineSettings& settings, __u64 cgroup_id,
        std::string path);

  __u64 cgroup_id() const { return cgroup_id_; }
  const std::string& path() const { return path_; }

  // Steps of an epoch, in this order. What a poll found out is left in
  // forgotten(), managed() and found().
  [[nodiscard]] Result<> begin(__u64 epoch, std::span<const ht_space_event> events, const EpochInput& input, EpochReport& report);
  void fold(const ht_granule& granule, EpochReport& report);
  void fold(const ht_bits& bits);
  __u64 close(__u64 fast_pages);  // as Partition::close
  [[nodiscard]] Result<> run(const EpochInput& input, __u64 samples, EpochReport& report);

  struct Forgotten {
    __u64 space, start, end;
  };
  std::vector<Forgotten>& forgotten() { return forgotten_; }
  struct Managed {
    __u64 space;
    __u32 pid;
    std::vector<ht_mapping> mappings;
  };
  std::vector<Managed>& managed() { return managed_; }
  std::vector<std::pair<__u32, __u64>>& found() { return found_; }  // pid, space

  // Behind the engine's intake lock.
  Inbox inbox;
  __u64 bits_interval_ns = 0;  // as Partition::bits_interval_ns
  // Behind the engine's lock of what is shown: as the last epoch left it.
  struct Published {
    EngineTotals totals;
    std::optional<EpochReport> report;
    std::vector<tier_range> ranges;
    std::vector<__u8> notes;  // enum RangeNote, by range
    std::shared_ptr<const RangeIndex> index;  // which range a page belongs to; null: by address
    History history;
    explicit Published(const EngineSettings& settings) : history(settings.history_epochs, settings.history_ranges) {}
  } published;
  // The ranges as the last run left them, with notes, and what was moved.
  std::span<const tier_range> last() const { return last_; }
  std::span<const __u8> last_notes() const { return last_notes_; }
  std::shared_ptr<const RangeIndex> index() const { return last_index_; }
  std::vector<History::Moved> last_moved() const;

 private:
  struct Watch;

  bool rests(const EpochInput& input);
  void rest(__u64 samples, EpochReport& report);
  void describe(const EpochInput& input, __u64 samples, EpochReport& report);
  bool changed(const EpochInput& input, const Space& space) const;
  [[nodiscard]] Result<> account(const EpochInput& input, EpochReport& report);
  [[nodiscard]] Result<> promote(const EpochInput& input, EpochReport& report);
  [[nodiscard]] Result<> take_apart(const EpochInput& input, EpochReport& report);
  [[nodiscard]] Result<> keep_bounds(const EpochInput& input, EpochReport& report);
  void measure_demand(EpochReport& report) const;
  void measure_counts(EpochReport& report) const;
  static ht_run run_of(const EpochInput& input, const EpochReport& report);
  Result<bool> call(ht_run& run, std::size_t entries, std::size_t per_call, Result<> (PolicyCaller::*ask)(ht_run&),
                    const std::function<void(std::size_t, std::size_t)>& put,
                    const std::function<void(std::size_t, std::size_t)>& get, EpochReport& report);
  bool reverses(__u32 range, ht_page_t page, ht_tier to) const;
  bool restless(const EpochInput& input, std::span<const PlanEntry> plan, EpochReport& report);
  bool expelled(const EpochInput& input, const Verdict& verdict, ht_run& run);
  void count_trial();
  void end_trial();
  void remember(__u32 range, ht_page_t page, ht_tier to, EpochReport& report);
  void cool();
  void note(EpochReport& report);
  [[nodiscard]] Result<bool> classify(const EpochInput& input, EpochReport& report);
  void rank();
  struct Equals {
    std::size_t first = 0;        // rank
    std::vector<__u64> may_have;  // pages in fast memory, from that rank on
    std::size_t last() const { return first + may_have.size(); }
    bool has(std::size_t rank) const { return rank >= first && rank < last(); }
    __u64 may(std::size_t rank) const { return may_have[rank - first]; }
  };
  Equals equals_at_cut(__u64 capacity) const;
  [[nodiscard]] Result<> select_hot(EpochReport& report);
  [[nodiscard]] Result<> select_cold(__u64 need, __u32 hottest, EpochReport& report);
  void measure_growth(__u64 fast_tier_pages);
  __u64 room_target() const;
  void measure_room(const EpochInput& input);
  __u32 like_what_comes();
  __u64 free_room(const EpochInput& input) const;
  [[nodiscard]] Result<> walk(std::span<const __u32> indices, ht_tier tier, __u64 list_max_pages,
                              std::vector<Listed>& listed, EpochReport& report, std::span<const __u64> most = {});
  void begin_partition(const EpochInput& input);
  [[nodiscard]] Result<> look(const EpochInput& input, EpochReport& report);
  static __u64 walk_cost(const tier_range& range, const Space& space, __u64 span_pages);
  std::size_t walk_batch() const;
  __u64 walk_share() const { return std::min<__u64>(settings_.max_walk_pages / 4, HT_PAGES_MAX); }
  bool fresh(const Residency& residency) const;
  bool held(const Residency& residency) const { return epoch_ < residency.held_until_epoch; }
  // Under another policy than the one that moved it, it is free again.
  bool cooling(const Residency& residency) const {
    return residency.cool_epochs && residency.cooled_epoch >= seated_epoch_ &&
           epoch_ <= residency.cooled_epoch + residency.cool_epochs;
  }
  [[nodiscard]] Result<bool> admit(const EpochInput& input, std::vector<PlanEntry>& plan, EpochReport& report);
  [[nodiscard]] Result<> move(const EpochInput& input, std::span<const PlanEntry> plan, __u64 budget_pages,
                              EpochReport& report);
  [[nodiscard]] Result<> feed_back(const EpochInput& input, EpochReport& report);

  Machine& machine_;
  const std::unique_ptr<PolicyCaller> caller_;
  const EngineSettings& settings_;
  const __u64 cgroup_id_;
  const std::string path_;
  Spaces spaces_;
  std::unique_ptr<Partition> partition_;
  double swap_ns_ = 0;  // measured cost of a pair of 4 KiB moves, smoothed; 0: none yet
  // HT_RANGES_MAX; memory that is not used is never touched.
  std::unique_ptr<tier_range[]> buffer_;
  std::vector<Forgotten> forgotten_;
  std::vector<Managed> managed_;
  std::vector<std::pair<__u32, __u64>> found_;
  std::vector<tier_range> last_;
  std::vector<__u8> last_notes_;
  std::shared_ptr<const RangeIndex> last_index_;
  RateLimit rate_;
  MoveHistory moves_;
  Conduct conduct_;
  __u64 trial_epoch_ = 0;  // in which the pages on trial were put there; 0: none are
  bool trial_told_ = false;  // something of what they brought
  __u64 seated_epoch_ = 0;  // first of the policy that answers
  __u64 seat_generation_ = 0;
  EpochReport decided_;   // of the last epoch that was not rested; number 0: none yet
  Trial told_trial_;      // what pages on trial brought since
  __u64 moved_pages_ = 0;       // since then as well
  __u64 moved_back_pages_ = 0;  // of them
  // Free pages of the fast tier that the kernel would not give out when asked,
  // because of its watermarks, and when to ask again.
  __u64 withheld_pages_ = 0;
  __u64 withheld_until_epoch_ = 0;
  __u64 large_wait_epochs_ = 0;  // after a page above order 0 that could not move alone
  __u64 large_waits_until_epoch_ = 0;

  // of the epoch in progress
  __u64 epoch_ = 0;
  __u64 own_pages_[HT_TIERS] = {0, 0};  // resident, as far as walks know
  __u64 rss_pages_ = 0;                 // of all its spaces, as the kernel counts it
  // By which all its spaces grew in each of the last epochs, and the most of these.
  std::array<__u64, kYoungEpochs> grown_{};
  __u64 coming_pages_ = 0;
  std::array<__u64, kYoungEpochs> listed_{};  // free pages in lists by CPU, of the last epochs
  __u64 missing_room_ = HT_UNKNOWN64;  // of the epoch; unknown: none was asked for
  bool room_was_enough_ = false;
  __u64 expected_slow_pages_ = 0;  // if nothing came
  __u64 withheld_room_pages_ = 0;
  double young_pages_ = 0;    // and epochs
  double young_samples_ = 0;  // of them, by the first period
  ShiftWatch shift_;
  __u32 first_period_ = 0;
  float exposure_ = 1;  // how many epochs of the first period this one says as much as
  __u64 reserved_pages_ = 0;            // of the rate, for demotion to its bound
  std::span<tier_range> ranges_;
  std::vector<__u32> ranked_;  // range indices, hottest first
  std::size_t cut_ = 0;        // ranks below it are hot
  bool any_held_ = false;      // above the cut
  __u64 cooling_pages_ = 0;    // above the cut, in slow memory
  bool retaken_ = false;       // another policy took the seat within this epoch
  __u64 budget_pages_ = 0;
  __u64 walk_budget_pages_ = 0;
  std::vector<Listed> hot_;
  std::vector<Listed> cold_;
  std::vector<tier_result> results_;  // by range; only those in touched_ are valid
  std::vector<__u32> touched_;
  std::vector<bool> is_touched_;
  std::vector<__u32> reversed_pages_;     // by range, as results_
  std::vector<__u32> displaced_by_heat_;
  tier_result& result(__u32 range);
};

}  // namespace hypertier
