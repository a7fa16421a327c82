// SPDX-License-Identifier: GPL-2.0-or-later
// The engine: from samples to a plan of page moves, one epoch at a time. It
// owns the process table, the ranges and their counters; it sees the machine
// only through machine.hpp, so that all of it is tested without root.
//
// Use: construct when the first policy is seated (with the source that was
// chosen), add_scope() for each cgroup that has a policy or a budget of its own
// (the root is one like any other), feed space_event() with what the kernel
// reports, call epoch() at the end of each epoch of a scope, destroy when the
// last policy leaves.
//
// Threads. Each scope has a thread of its own that calls its epoch(); whatever a
// policy does there, no other scope waits for it. Shared are the intake (who
// belongs where, and the draining of the samples: each scope's epoch drains all
// and puts aside what is another's) and the machine's buffers, both behind locks
// that are not held over a callback. Everything else is safe from any thread;
// add_scope() and remove_scope() are one thread's.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../machine.hpp"
#include "guards.hpp"
#include "history.hpp"

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
  // tier (heat.md: 5 %; twice that: what is hot arrives in half the time and no
  // more is moved). Never fewer than max_move_min_pages, or nothing huge could
  // move on a small tier, nor more than max_move_pages (1 GiB/s), or moving would
  // take longer than an epoch on a large one.
  double max_move_share = 0.1;
  __u64 max_move_min_pages = 2 * HT_GRANULE_PAGES;
  __u64 max_move_pages = 256 * HT_GRANULE_PAGES;
  // Most pages that page-table walks visit in an epoch; about 10 ns each. A
  // larger range is walked in several epochs.
  __u64 max_walk_pages = 1 << 20;
  // How long the result of a walk is taken for true, epochs; a range that pages
  // were moved in is walked again in any case.
  __u32 residency_epochs = 8;
  // A scope with a bound and no more resident pages than this is walked whole each
  // epoch (10 ns a page): it knows of every page that came.
  __u64 recheck_pages = 1 << 14;
  // Estimated ranges: most of them, and how often they are drawn anew: every
  // epoch up to pass_pages pages, less often with more.
  __u32 max_estimated_ranges = HT_RANGES_MAX / 2;
  __u64 pass_pages = 1 << 19;
  __u64 max_pass_epochs = 16;
  // Free room of the fast tier that moves leave to the kernel's allocator, as a share
  // of the tier (TPP keeps 2 %). Estimated ranges leave what is needed instead.
  double fast_reserve_share = 0.02;
  // A move that takes one of the last so many epochs back is a reversal. A range
  // at least half of whose moves of an epoch are reversals is left where it is
  // for cool_epochs, twice as long each time it happens again soon.
  __u32 reversal_epochs = 12;
  __u32 cool_epochs = 4;
  __u32 cool_max_epochs = 32;
  // Pages whose last move is remembered, a power of two; 8 bytes each, taken with the
  // first move: as many as reversal_epochs may move, but no more than these.
  std::size_t remembered_moves = 1 << 20;
  // What a policy is ejected for, besides its answers and its time.
  ConductSettings conduct;
  // Heat history for explain: epochs, and ranges of all of them together (48
  // bytes each).
  std::size_t history_epochs = 32;
  std::size_t history_ranges = 1 << 17;
};

// What the engine cannot know by itself. Pages are 4 KiB.
struct EpochInput {
  __u64 epoch_ns = 0;             // length of the epoch that ends, measured
  __u64 fast_tier_pages = 0;      // size of the fast tier
  __u64 fast_free_pages = 0;      // free in it now
  __u64 fast_watermark_pages = 0;  // of these, what the kernel gives to nobody who can have slow memory
  __u64 fast_listed_pages = 0;     // beside these, free ones in lists by CPU
  __u64 slow_free_pages = 0;      // free in the slow tier now
  __u64 fast_capacity_pages = 0;  // what the scope may use of the fast tier
  __u64 fast_max_pages = HT_UNKNOWN64;  // its bound: what is beyond it is demoted, hot or not
  __u64 surplus_pages = 0;        // of its fast memory that siblings need: demoted as well
  bool accounts = false;          // keeps track of all its residency: it has a bound, or siblings
  __u64 seat = 0;                 // cgroup id of the seat that answers; 0: the scope's own
  __u64 seat_generation = 0;      // another one: another policy has it
  __u64 tier_pages[HT_TIERS] = {HT_UNKNOWN64, HT_UNKNOWN64};  // used by the scope, per tier; unknown: what walks found
  __u32 cpus = 1;                 // online
  __u32 period = 1;               // misses per sample
  __u64 budget_ns = 0;            // for the policy's callbacks of one run; 0: no bound
  bool moves = true;              // false: classify only, and keep the bounds (HT_POLICY_NO_MOVES)
  __u32 exchange_flags = 0;       // enum ht_exchange_flags
  bool estimated = false;         // the policy wants estimated ranges (HT_POLICY_ESTIMATED)
  __u64 rate_bytes_per_s = 0;     // of pages that change tiers, both ways together; 0: no limit
  bool dry_run = false;           // decides everything, moves nothing
  bool is_default = false;        // the seated policy is the default: there is none to take its place
  // Called when a run ended with a status other than 0, or broke a rule that the
  // engine watches (status 0; exit has the reason). True: another
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
  kOverBudget,     // nothing but demotion: over fast_max, or siblings need it
  kRateLimited,    // there is a plan, but the rate allows no page of it now
  kCooling,        // what is hot and in slow memory was moved to and fro lately
  kDryRun,         // a plan was made, and not carried out
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
  kNoScope,       // of a process that no scope manages
};
inline constexpr int kStrays = 4;
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
  __u64 split_pages_total = 0;  // of huge pages that were taken apart
  __u64 splits_total = 0;
  __u64 merges_total = 0;
  __u64 reversed_pages_total = 0;      // moves that took a recent one back
  __u64 rate_limited_pages_total = 0;  // planned, left for want of rate
  __u64 dry_run_pages_total = 0;       // planned towards the fast tier, not moved
};

// What was done with one range in an epoch (a dry run: would have been).
struct MoveRecord {
  __u64 space = 0;
  __u64 start = 0;
  __u64 end = 0;
  __u32 pid = 0;
  __u32 heat = 0;
  __u32 cut_heat = 0;           // of the last range above the cut
  __u32 displaced_by_heat = 0;  // hottest that took its place; 0: none
  __u32 promoted_pages = 0;
  __u32 demoted_pages = 0;
  __u32 failed_pages = 0;
  __u32 refused_pages = 0;
  __u32 reversed_pages = 0;
};
inline constexpr std::size_t kMovesShown = 32;

// How a scope's resident pages are spread over heat, in measure that can be
// compared between scopes: samples per page and second, whatever its policy
// calls hot. Quarter octaves; bucket 0 is what had no sample.
inline constexpr int kDensityBuckets = 128;
struct Demand {
  std::array<__u64, kDensityBuckets> pages{};
  __u64 fast_pages = 0;  // resident
  __u64 slow_pages = 0;
};
int density_bucket(double samples_per_page_second);

// What one epoch did.
struct EpochReport {
  tier_scope scope{};  // as the policy saw it; scope.epoch is the epoch's number
  bool rested = false;  // the policy was not asked: scope and decision are what they were
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
  bool heat_shifted = false;  // suddenly far fewer samples are of fast memory (estimated ranges)
  __u64 estimate_bytes = 0;  // that the counters of estimated ranges take
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
  __u64 over_pages = 0;        // beyond its bound, or siblings' need: to be demoted
  __u64 coming_pages = 0;      // that the scope may allocate until the next epoch
  __u64 room_pages = 0;        // planned to be demoted to make room for these
  __u64 refused_pages = 0;
  __u64 reversed_pages = 0;
  __u64 rate_limited_pages = 0;  // planned within the budget, but beyond the rate
  __u64 dry_run_pages = 0;
  __u32 cooling_ranges = 0;      // above the cut, and left alone
  std::vector<MoveRecord> moves;  // the kMovesShown largest
  __u32 moved_ranges = 0;        // all that something was done with

  Demand demand;  // only if the scope accounts

  // Counts of about eight epochs by the tier they went to, in 1/256 samples: by
  // where the pages of their range are, so far as that is known.
  __u64 tier_counts[HT_TIERS] = {0, 0};

  ht_exchange_run moved{};  // what the mover reported
};

// A range as the last epoch left it, for display and for the heat map.
struct RangeView {
  tier_range range{};
  std::string comm;
};

enum RangeNote : __u8 {
  kRangeHot = 1 << 0,      // above the cut
  kRangeHeld = 1 << 1,     // the policy's admit refused it lately
  kRangeCooling = 1 << 2,  // moved to and fro lately
};

// Why a page is where it is.
struct Explanation {
  RangeView view;
  __u8 notes = 0;         // enum RangeNote
  __u32 rank = 0;         // by heat, from 0
  __u32 ranges = 0;
  __u64 page_tier_pages[HT_TIERS] = {0, 0};  // the page itself, now: 1 where it is
  std::vector<PastRange> history;            // newest first
};

struct ProcessView {
  __u32 pid = 0;
  std::string comm;
  __u64 space = 0;
  __u64 cgroup_id = 0;
  __u64 scope = 0;  // cgroup id of its scope; 0: none
};

class Roster;
class Scope;

class Engine {
 public:
  using PathOf = std::function<std::optional<std::string>(__u64 cgroup_id)>;

  // path_of: see Roster.
  Engine(Machine& machine, SampleSource& source, const EngineSettings& settings = {}, PathOf path_of = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // From its next epoch on it manages the processes below that cgroup that no
  // nearer scope manages. path: below the v2 root, "/" for the root.
  Scope& add_scope(__u64 cgroup_id, const std::string& path, std::unique_ptr<PolicyCaller> caller);
  // Its processes fall to the nearest scope above. Not during its epoch.
  void remove_scope(Scope& scope);

  // A process came, went, changed its space or its cgroup.
  void space_event(const ht_space_event& event);
  // Events, and what is known of processes, for as long as `take` runs.
  Result<> space_events(const std::function<Result<>(Roster&)>& take);

  // Ends an epoch of the scope: steps 1 to 7 of docs/architecture.md. An error
  // means that the machine failed; a policy's failure is in the report.
  [[nodiscard]] Result<EpochReport> epoch(Scope& scope, const EpochInput& input);

  const EngineSettings& settings() const { return settings_; }

  // Copies, as the last epoch left it.
  EngineTotals totals(const Scope& scope) const;
  EngineTotals totals() const;  // of all scopes there have been
  std::optional<EpochReport> report(const Scope& scope) const;
  // Of the source, when the last epoch of any scope ended.
  ht_sampler_stats sampler_stats() const;
  // pid: only the ranges of that process.
  std::vector<RangeView> ranges(const Scope& scope, std::optional<__u32> pid = {}) const;
  std::vector<ProcessView> processes() const;
  // Nothing: no range of the scope holds that address of the process.
  [[nodiscard]] Result<std::optional<Explanation>> explain(const Scope& scope, __u32 pid, __u64 address) const;

 private:
  Result<> drain(Scope& scope, const EpochInput& input, __u64& samples, ht_sampler_stats& stats,
                 EpochReport& report);

  Machine& machine_;
  SampleSource& source_;
  EngineSettings settings_;

  // The roster, the source and every scope's inbox. Held while samples are
  // drained, never over a callback or a move.
  mutable std::mutex intake_;
  std::unique_ptr<Roster> roster_;
  std::map<__u64, std::unique_ptr<Scope>> scopes_;  // by cgroup id

  // What is shown: every scope's published_, and these.
  mutable std::mutex shown_;
  EngineTotals ended_totals_;  // of scopes that are gone
  ht_sampler_stats stats_{};
};

}  // namespace hypertier
