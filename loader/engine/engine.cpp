// SPDX-License-Identifier: GPL-2.0-or-later
#include "engine.hpp"

#include <algorithm>

#include "scope.hpp"
#include "spaces.hpp"

namespace hypertier {
namespace {

constexpr __u64 kRootCgroup = 1;

template <std::size_t N>
const char* name_of(const std::array<const char*, N>& names, std::size_t index) {
  return index < N ? names[index] : "unknown";
}

}  // namespace

const char* decision_name(Decision decision) {
  static constexpr std::array names = {"moved",        "no_moves",       "policy_failed", "no_heat",
                                       "all_hot_fast", "nothing_colder", "all_refused"};
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
  static constexpr std::array<const char*, kStrays> names = {"unknown_space", "unmapped", "not_managed"};
  return name_of(names, static_cast<std::size_t>(stray));
}

Engine::Engine(Machine& machine, SampleSource& source, const EngineSettings& settings)
    : machine_(machine),
      source_(source),
      settings_(settings),
      spaces_(std::make_unique<Spaces>(settings_)),
      root_(std::make_unique<Scope>(machine, *spaces_, settings_, kRootCgroup)) {}

Engine::~Engine() = default;

void Engine::space_event(const ht_space_event& event) { spaces_->event(event); }

Result<EpochReport> Engine::epoch(const EpochInput& input) {
  struct Watcher final : Spaces::Watcher {
    Partition& partition;
    SampleSource& source;
    const Spaces& spaces;
    Watcher(Partition& p, SampleSource& s, const Spaces& all) : partition(p), source(s), spaces(all) {}
    void mapped(__u64 space, std::span<const ht_mapping> managed) override {
      partition.map(space, managed);
      source.manage(space, spaces.pid_of(space), managed);
    }
    void unmapped(__u64 space, __u64 start, __u64 end) override { source.forget(space, start, end); }
    void gone(__u64 space) override {
      partition.drop(space);
      source.manage(space, 0, {});
      source.forget(space, 0, HT_UNKNOWN64);
    }
  };

  EpochReport report;
  const __u64 epoch = ++totals_.epochs_total;
  Partition& partition = root_->partition();
  partition.begin(epoch);

  // Mappings before samples: what was mapped in this epoch is known by then.
  Watcher watcher(partition, source_, *spaces_);
  auto polled = spaces_->poll(epoch, machine_, watcher);
  if (!polled) return std::unexpected(polled.error());
  report.spaces_polled = polled->spaces;
  report.mappings_read = polled->mappings;

  __u64 samples = 0;
  __u64 space = 0;
  const Partition::Stray stray = [&](__u64 address, __u32 count) {
    Stray reason = spaces_->stray(space, address);
    report.stray_samples[static_cast<std::size_t>(reason)] += count;
  };
  auto drained = source_.drain([&](const ht_granule& granule) {
    ++report.granules;
    samples += granule.samples;
    space = granule.space;
    spaces_->urgent(space);
    partition.fold(granule, stray);
  });
  if (!drained) return std::unexpected(drained.error());
  source_.drain_bits([&](const ht_bits& bits) {
    ++report.granules;
    // only one with activity can have changed what it maps
    if (std::any_of(std::begin(bits.set), std::end(bits.set), [](__u64 word) { return word != 0; })) spaces_->urgent(bits.space);
    partition.fold(bits);
  });
  samples += partition.close(input.fast_capacity_pages);
  if (__u64 interval_ns = partition.bits_interval_ns()) source_.aim(interval_ns);
  totals_.samples_total += samples;
  for (int s = 0; s < kStrays; ++s) totals_.stray_samples_total[s] += report.stray_samples[s];

  if (auto done = root_->run(input, epoch, samples, report); !done) return std::unexpected(done.error());

  const ht_exchange_run& moved = report.moved;
  totals_.promoted_pages_total += moved.promoted_pages;
  totals_.demoted_pages_total += moved.demoted_pages;
  totals_.exchanged_pairs_total += moved.exchanged_pairs;
  for (int r = 0; r < HT_MOVE_RESULTS; ++r) {
    totals_.failed_pages_total[r] += moved.failed_pages[r];
    totals_.move_failed_pages_total += moved.failed_pages[r];
  }
  for (int m = 0; m < HT_MOVERS; ++m) totals_.mover_pages_total[m] += moved.mover_pages[m];
  totals_.flush_calls_total += moved.flush_calls;
  totals_.batches_total += moved.batches;
  totals_.exchange_ns_total += moved.ns;
  totals_.walk_ns_total += report.walk_ns;
  totals_.policy_ns_total += report.policy_ns;
  totals_.policy_failures_total += report.decision == Decision::kPolicyFailed;
  totals_.refused_pages_total += report.refused_pages;
  totals_.splits_total += report.splits;
  totals_.merges_total += report.merges;
  return report;
}

std::vector<RangeView> Engine::ranges(std::optional<__u32> pid) const {
  __u64 space = 0;
  if (pid) {
    auto process = spaces_->processes().find(*pid);
    if (process == spaces_->processes().end()) return {};
    space = process->second.space;
  }
  std::vector<RangeView> views;
  for (const tier_range& range : root_->last()) {
    if (pid && range.space != space) continue;
    RangeView view{range, {}};
    if (auto process = spaces_->processes().find(range.pid); process != spaces_->processes().end())
      view.comm = process->second.comm;
    views.push_back(std::move(view));
  }
  return views;
}

std::vector<ProcessView> Engine::processes() const {
  std::unordered_map<__u64, __u32> counts;
  for (const tier_range& range : root_->last()) ++counts[range.space];
  std::vector<ProcessView> views;
  for (const auto& [pid, process] : spaces_->processes()) {
    ProcessView view{pid, process.comm, process.space, process.cgroup_id, HT_UNKNOWN64, 0};
    if (auto space = spaces_->spaces().find(process.space); space != spaces_->spaces().end())
      view.rss_pages = space->second.rss_pages;
    if (auto count = counts.find(process.space); count != counts.end()) view.ranges = count->second;
    views.push_back(std::move(view));
  }
  return views;
}

}  // namespace hypertier
