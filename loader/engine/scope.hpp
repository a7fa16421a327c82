// SPDX-License-Identifier: GPL-2.0-or-later
// What one scope (the whole guest, later a cgroup) does with its ranges: ask
// the policy, rank, cut, walk, plan, move. All its state is its own, so that
// scopes can run beside each other.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "engine.hpp"
#include "partition.hpp"
#include "plan.hpp"
#include "spaces.hpp"

namespace hypertier {

class Scope {
 public:
  Scope(Machine& machine, Spaces& spaces, const EngineSettings& settings, __u64 cgroup_id);

  Partition& partition() { return *partition_; }

  // Steps 3 to 7 of an epoch whose samples are folded.
  [[nodiscard]] Result<> run(const EpochInput& input, __u64 epoch, __u64 samples, EpochReport& report);

  // The ranges as the last run left them.
  std::span<const tier_range> last() const { return last_; }

 private:
  [[nodiscard]] Result<bool> classify(const EpochInput& input, EpochReport& report);
  void rank();
  [[nodiscard]] Result<> select_hot(const EpochInput& input, EpochReport& report);
  [[nodiscard]] Result<> select_cold(EpochReport& report);
  [[nodiscard]] Result<> walk(std::span<const std::size_t> ranks, ht_tier tier, __u64 list_max_pages,
                              std::vector<Listed>& listed, EpochReport& report);
  void use(const EpochInput& input);
  [[nodiscard]] Result<> look(EpochReport& report);
  std::size_t walk_batch() const;
  __u64 walk_share() const { return std::min<__u64>(settings_.max_walk_pages / 4, HT_PAGES_MAX); }
  bool fresh(const Residency& residency) const;
  bool held(const Residency& residency) const { return epoch_ < residency.held_until_epoch; }
  [[nodiscard]] Result<bool> admit(const EpochInput& input, std::vector<PlanEntry>& plan, EpochReport& report);
  [[nodiscard]] Result<> move(const EpochInput& input, std::span<const PlanEntry> plan, EpochReport& report);
  [[nodiscard]] Result<> feed_back(const EpochInput& input, EpochReport& report);

  Machine& machine_;
  Spaces& spaces_;
  const EngineSettings& settings_;
  const __u64 cgroup_id_;
  std::unique_ptr<Partition> partition_;
  double swap_ns_ = 0;  // measured cost of a pair of 4 KiB moves, smoothed; 0: none yet
  std::vector<tier_range> last_;
  // Free pages of the fast tier that the kernel would not give out when asked,
  // because of its watermarks, and when to ask again.
  __u64 withheld_pages_ = 0;
  __u64 withheld_until_epoch_ = 0;

  // of the epoch in progress
  __u64 epoch_ = 0;
  std::span<tier_range> ranges_;
  std::vector<__u32> ranked_;  // range indices, hottest first
  std::size_t cut_ = 0;        // ranks below it are hot
  bool any_held_ = false;      // above the cut
  __u64 budget_pages_ = 0;
  __u64 walk_budget_pages_ = 0;
  std::vector<Listed> hot_;
  std::vector<Listed> cold_;
  std::vector<tier_result> results_;  // by range; only those in touched_ are valid
  std::vector<__u32> touched_;
  std::vector<bool> is_touched_;
  tier_result& result(__u32 range);
};

}  // namespace hypertier
