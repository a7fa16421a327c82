// SPDX-License-Identifier: GPL-2.0-or-later
// Which granules' accessed bits are read when, and how long after clearing they
// are tested. Knows neither the module nor a clock: adapter/abit.cpp carries it
// out.
#pragma once

#include <hypertier/abi.h>

#include <cstdint>
#include <map>
#include <random>
#include <span>
#include <unordered_set>
#include <vector>

namespace hypertier {

// Shortest and longest interval between clearing and testing, and the first. What is
// touched more seldom than the longest is not worth telling from what is not touched at
// all, or an idle machine would search for heat in noise; but it is several epochs: where
// accesses are few, so many bits more are set for the same visits.
inline constexpr std::uint64_t kBitsShortestNs = 200'000;
inline constexpr std::uint64_t kBitsLongestNs = 4'000'000'000;
inline constexpr std::uint64_t kBitsFirstNs = 8'000'000;

class AbitPlan {
 public:
  struct Target {
    __u64 space = 0;
    __u64 granule = 0;
    __u32 pid = 0;
  };
  // Clear, wait, test, and the next one after period_ns from the start.
  struct Cycle {
    std::size_t granules = 0;
    std::uint64_t interval_ns = 0;
    std::uint64_t period_ns = 0;
  };

  // budget: CPU time that reading may take, nanoseconds a second.
  explicit AbitPlan(std::uint64_t budget_ns_per_s, unsigned seed = 1) : budget_ns_per_s_(budget_ns_per_s), random_(seed) {}

  // All that is managed of a space; nothing: it is gone.
  void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings);
  bool empty() const { return spaces_.empty(); }

  // Once an epoch: the interval that would tell most.
  void aim(std::uint64_t interval_ns);
  std::uint64_t interval_ns() const { return interval_ns_; }

  Cycle next_cycle();
  // The next granules of the pass, sorted by space and address. A pass takes all
  // that is managed once, in an order of its own; fewer than asked for at its end.
  std::vector<Target> take(std::size_t granules);

  // What came of a granule: nothing mapped there is looked at more seldom.
  void mapped(__u64 space, __u64 granule, bool any);
  // What a cycle cost, and the share of pages read whose bits were set. Returns
  // how long after the start of the cycle the next one may begin.
  std::uint64_t spent(const Cycle& cycle, std::size_t granules, std::uint64_t cpu_ns, double share_set);

  std::uint64_t passes_total() const { return passes_total_; }

 private:
  struct Space {
    __u32 pid = 0;
    std::vector<ht_mapping> mappings;
    std::unordered_set<__u64> bare;  // granules in which nothing was mapped
  };
  double rate() const { return static_cast<double>(budget_ns_per_s_) * effort_ / 1e9; }
  bool manages(const Target& target) const;
  void start_pass();

  const std::uint64_t budget_ns_per_s_;
  std::mt19937_64 random_;
  std::map<__u64, Space> spaces_;
  std::vector<Target> pass_;  // taken from the end
  std::uint64_t passes_total_ = 0;
  std::uint64_t cycles_total_ = 0;
  std::uint64_t interval_ns_ = kBitsFirstNs;
  double granule_ns_ = 10'000;  // CPU time of a granule, both steps; a guess to begin with
  double effort_ = 1;           // share of the budget that is worth using
  double activity_ = 1;         // share of bits set, smoothed
};

}  // namespace hypertier
