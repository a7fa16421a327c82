// SPDX-License-Identifier: GPL-2.0-or-later
#include "sources/abit_plan.hpp"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace hypertier {
namespace {

// Time between cycles where intervals are short: few wake-ups, but several
// cycles an epoch.
constexpr double kCycleNs = 200e6;
// Every so many cycles one has a quarter of the interval: with one interval
// only, an estimate that is too low would keep it too long for ever.
constexpr std::uint64_t kShortEvery = 5;
constexpr std::uint64_t kShortDivisor = 4;
// An interval grows at most so much an epoch.
constexpr double kGrowthMax = 1.5;
// Where fewer bits than this are set the machine is idle, and a tenth of the
// budget is enough to notice that it is not any more.
constexpr double kIdleShare = 0.002;
constexpr double kIdleEffort = 0.1;
// Granules in which nothing is mapped are looked at in one of so many passes.
constexpr std::uint64_t kBarePasses = 8;

}  // namespace

void AbitPlan::manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) {
  if (mappings.empty()) {
    spaces_.erase(space);
    return;
  }
  Space& known = spaces_[space];
  known.pid = pid;
  known.mappings.assign(mappings.begin(), mappings.end());
  // what is mapped anew may be touched soon
  known.bare.clear();
}

void AbitPlan::aim(std::uint64_t interval_ns) {
  const double now = static_cast<double>(interval_ns_), target = static_cast<double>(std::max<std::uint64_t>(interval_ns, 1));
  const double next = std::min(std::exp(0.8 * std::log(now) + 0.2 * std::log(target)), kGrowthMax * now);
  interval_ns_ = std::clamp(static_cast<std::uint64_t>(next), kBitsShortestNs, kBitsLongestNs);
}

AbitPlan::Cycle AbitPlan::next_cycle() {
  Cycle cycle;
  cycle.interval_ns = ++cycles_total_ % kShortEvery ? interval_ns_ : std::max(interval_ns_ / kShortDivisor, kBitsShortestNs);
  const double interval = static_cast<double>(cycle.interval_ns);
  const double period = std::max(kCycleNs, 1.25 * interval);
  double granules = rate() * period / granule_ns_;
  // Clearing takes half of a granule's time: it must be well over before the
  // first is tested.
  granules = std::min({granules, interval / granule_ns_, static_cast<double>(HT_CHECKS_MAX)});
  cycle.granules = static_cast<std::size_t>(std::max(granules, 1.0));
  cycle.period_ns = static_cast<std::uint64_t>(
      std::max(static_cast<double>(cycle.granules) * granule_ns_ / rate(), 1.25 * interval));
  return cycle;
}

bool AbitPlan::manages(const Target& target) const {
  auto space = spaces_.find(target.space);
  if (space == spaces_.end()) return false;
  const auto& mappings = space->second.mappings;
  const __u64 start = target.granule << HT_GRANULE_SHIFT;
  auto mapping = std::upper_bound(mappings.begin(), mappings.end(), start,
                                  [](__u64 address, const ht_mapping& m) { return address < m.end; });
  return mapping != mappings.end() && mapping->start < start + HT_GRANULE_SIZE;
}

void AbitPlan::start_pass() {
  ++passes_total_;
  pass_.clear();
  for (const auto& [id, space] : spaces_) {
    __u64 next = 0;  // small mappings share granules
    for (const ht_mapping& mapping : space.mappings)
      for (__u64 granule = std::max(next, mapping.start >> HT_GRANULE_SHIFT);
           granule << HT_GRANULE_SHIFT < mapping.end; ++granule) {
        next = granule + 1;
        if (space.bare.contains(granule) && (granule + passes_total_) % kBarePasses) continue;
        pass_.push_back({id, granule, space.pid});
      }
  }
  std::shuffle(pass_.begin(), pass_.end(), random_);
}

std::vector<AbitPlan::Target> AbitPlan::take(std::size_t granules) {
  std::vector<Target> taken;
  if (pass_.empty()) start_pass();
  while (taken.size() < granules && !pass_.empty()) {
    if (manages(pass_.back())) taken.push_back(pass_.back());
    pass_.pop_back();
  }
  std::sort(taken.begin(), taken.end(), [](const Target& a, const Target& b) {
    return std::tie(a.space, a.granule) < std::tie(b.space, b.granule);
  });
  return taken;
}

void AbitPlan::mapped(__u64 space, __u64 granule, bool any) {
  auto found = spaces_.find(space);
  if (found == spaces_.end()) return;
  if (any)
    found->second.bare.erase(granule);
  else
    found->second.bare.insert(granule);
}

std::uint64_t AbitPlan::spent(const Cycle& cycle, std::size_t granules, std::uint64_t cpu_ns, double share_set) {
  const double cost = static_cast<double>(cpu_ns);
  if (granules) {
    granule_ns_ = std::max(0.8 * granule_ns_ + 0.2 * cost / static_cast<double>(granules), 10.0);
    activity_ = 0.9 * activity_ + 0.1 * share_set;
    effort_ = activity_ < kIdleShare ? kIdleEffort : 1;
  }
  // The budget holds whatever was expected.
  return std::max(cycle.period_ns, static_cast<std::uint64_t>(cost / rate()));
}

}  // namespace hypertier
