// SPDX-License-Identifier: GPL-2.0-or-later
// The engine: from samples to a plan of page moves, one epoch at a time. It
// owns the process table, the ranges and their counters; it sees the machine
// only through machine.hpp, so that all of it is tested without root.
//
// Use: construct when the first policy is seated (with the source that was
// chosen), feed space_event() with what the kernel reports, call epoch() at the
// end of each epoch, destroy when the last policy leaves. Not thread safe: one
// thread owns an Engine; what others show is copied out with ranges() and
// processes().
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../machine.hpp"

namespace hypertier {

// Every number that the engine's behaviour depends on. Defaults come from the
// reference (systems.md) or from the simulation (heat.md) where named.
struct EngineSettings {
  // Smallest range that a split may leave, bytes; a power of two, 4 KiB or
  // more. Reference: 2 MiB.
  __u64 min_range_bytes = HT_GRANULE_SIZE;
  // Most ranges of a scope; beyond it no range is split. Reference: 2048.
  __u32 max_ranges = 2048;
  // Smallest shmem mapping that is managed, bytes. Anonymous ones always are.
  __u64 min_shmem_bytes = 64 << 10;
  // Smallest file mapping that is managed, bytes: shared libraries are not
  // worth a range each.
  __u64 min_file_bytes = HT_GRANULE_SIZE;
  // Every space's mappings are checked for a change at least once in so many
  // epochs; those with samples are checked each epoch.
  __u32 poll_epochs = 8;
  // Most pages that are moved in an epoch, each way, as a share of the fast
  // tier (heat.md: 5 %), and never fewer than max_move_min_pages, or nothing
  // huge could move on a small tier.
  double max_move_share = 0.05;
  __u64 max_move_min_pages = 2 * HT_GRANULE_PAGES;
  // Most pages that page-table walks visit in an epoch; about 10 ns each. A
  // larger range is walked in several epochs.
  __u64 max_walk_pages = 1 << 20;
  // How long the result of a walk is taken for true, epochs; a range that pages
  // were moved in is walked again in any case.
  __u32 residency_epochs = 8;
  // Estimated ranges: most of them, and how often they are drawn anew: every
  // epoch up to pass_pages pages, less often with more.
  __u32 max_estimated_ranges = HT_RANGES_MAX / 2;
  __u64 pass_pages = 1 << 20;
  __u64 max_pass_epochs = 10;
  // Free room of the fast tier that moves leave to the kernel's allocator, as
  // a share of the tier (TPP keeps 2 %).
  double fast_reserve_share = 0.02;
};

// What the engine cannot know by itself. Pages are 4 KiB.
struct EpochInput {
  __u64 epoch_ns = 0;             // length of the epoch that ends, measured
  __u64 fast_tier_pages = 0;      // size of the fast tier
  __u64 fast_free_pages = 0;      // free in it now
  __u64 slow_free_pages = 0;      // free in the slow tier now
  __u64 fast_capacity_pages = 0;  // what the scope may use of the fast tier
  __u64 tier_pages[HT_TIERS] = {HT_UNKNOWN64, HT_UNKNOWN64};  // used by the scope, per tier
  __u32 cpus = 1;                 // online
  __u32 period = 1;               // misses per sample
  __u64 budget_ns = 0;            // for the policy's callbacks of one run; 0: no bound
  bool moves = true;              // false: classify only (HT_POLICY_NO_MOVES, a dry run)
  __u32 exchange_flags = 0;       // enum ht_exchange_flags
  bool estimated = false;         // the policy wants estimated ranges (HT_POLICY_ESTIMATED)
  // Called when a classify run ended with a status other than 0. True: another
  // policy is seated by now, run the epoch with that one. False or empty:
  // nothing is moved in this epoch.
  std::function<bool(const ht_run&)> policy_failed;
};

// Why an epoch moved what it moved.
enum class Decision {
  kMoved,          // a plan was carried out
  kNoMoves,        // the policy or the caller wants none
  kPolicyFailed,   // the seat is empty or the policy broke a rule
  kNoHeat,         // no range has heat
  kAllHotFast,     // all that is hot and was looked at is in the fast tier
  kNothingColder,  // hot pages in slow memory, but nothing colder in fast memory, and no room
  kAllRefused,     // the policy's admit refused every pair
};
const char* decision_name(Decision decision);      // "moved", "no_moves", ...
const char* move_result_name(enum ht_move_result result);  // "done", "gone", "pinned", ...
const char* mover_name(enum ht_mover mover);       // "exchange", "migrate", "syscall"
const char* drop_name(enum ht_drop drop);          // "no_address", ...

// Why a sample that the source delivered found no range.
enum class Stray {
  kUnknownSpace,  // no living process of that space is known (yet)
  kUnmapped,      // outside of the mappings known; they are read again
  kNotManaged,    // in a mapping too small to manage
};
inline constexpr int kStrays = 3;
const char* stray_name(Stray stray);  // "unknown_space", ...

// Counters since construction; all monotonic.
struct EngineTotals {
  __u64 epochs_total = 0;
  __u64 samples_total = 0;  // delivered by the source, strays included
  std::array<__u64, kStrays> stray_samples_total{};
  __u64 promoted_pages_total = 0;
  __u64 demoted_pages_total = 0;
  __u64 exchanged_pairs_total = 0;
  __u64 move_failed_pages_total = 0;
  __u64 refused_pages_total = 0;  // by the policy's admit
  std::array<__u64, HT_MOVE_RESULTS> failed_pages_total{};  // by reason
  std::array<__u64, HT_MOVERS> mover_pages_total{};
  __u64 flush_calls_total = 0;
  __u64 batches_total = 0;
  __u64 exchange_ns_total = 0;
  __u64 walk_ns_total = 0;
  __u64 policy_ns_total = 0;
  __u64 policy_failures_total = 0;
  __u64 splits_total = 0;
  __u64 merges_total = 0;
};

// What one epoch did.
struct EpochReport {
  tier_scope scope{};  // as the policy saw it; scope.epoch is the epoch's number
  Decision decision = Decision::kNoMoves;
  __s32 policy_status = 0;  // of the last classify run, see ht_run
  __u64 policy_generation = 0;
  __u64 policy_ns = 0;  // classify, admit and moved together

  // cost
  __u64 granules = 0;         // that the source handed over
  __u64 spaces_polled = 0;    // whose change stamp was read
  __u64 mappings_read = 0;    // of spaces that had changed
  __u64 ranges_visited = 0;   // range operations of all steps together
  __u64 walks = 0;            // ranges walked
  __u64 walk_ns = 0;
  __u64 pages_listed = 0;

  // counters
  std::array<__u64, kStrays> stray_samples{};
  __u32 splits = 0;
  __u32 merges = 0;
  __u32 splits_refused = 0;  // for want of size or number

  // decision
  __u32 hot_ranges = 0;        // above the cut
  __u64 hot_pages = 0;         // resident in them
  __u64 hot_slow_pages = 0;    // of those, in slow memory
  __u32 cut_heat = 0;          // heat of the last range above the cut
  __u64 planned_pairs = 0;     // entries with two sides
  __u64 planned_hot_only = 0;
  __u64 planned_cold_only = 0;
  __u64 planned_pages = 0;     // towards the fast tier
  __u64 refused_pages = 0;

  ht_exchange_run moved{};  // what the mover reported
};

// A range as the last epoch left it, for display and for the heat map.
struct RangeView {
  tier_range range{};
  std::string comm;
};

struct ProcessView {
  __u32 pid = 0;
  std::string comm;
  __u64 space = 0;
  __u64 cgroup_id = 0;
  __u64 rss_pages = HT_UNKNOWN64;  // anonymous and shmem, both tiers
  __u32 ranges = 0;
};

class Spaces;
class Scope;

class Engine {
 public:
  Engine(Machine& machine, SampleSource& source, const EngineSettings& settings = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // A process came, went or changed its space.
  void space_event(const ht_space_event& event);

  // Ends the epoch: steps 1 to 7 of docs/architecture.md. An error means that
  // the machine failed; a policy's failure is in the report.
  [[nodiscard]] Result<EpochReport> epoch(const EpochInput& input);

  const EngineTotals& totals() const { return totals_; }
  const EngineSettings& settings() const { return settings_; }

  // Copies. pid: only the ranges of that process.
  std::vector<RangeView> ranges(std::optional<__u32> pid = {}) const;
  std::vector<ProcessView> processes() const;

 private:
  Machine& machine_;
  SampleSource& source_;
  EngineSettings settings_;
  EngineTotals totals_;
  std::unique_ptr<Spaces> spaces_;
  std::unique_ptr<Scope> root_;
};

}  // namespace hypertier
