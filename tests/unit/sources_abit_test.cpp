// SPDX-License-Identifier: GPL-2.0-or-later
// When which granules' bits are read, at what interval and cost; and how the
// period of sampling follows its budget.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "sources/abit_plan.hpp"
#include "sources/rate_control.hpp"

namespace hypertier {
namespace {

constexpr __u64 kBase = 0x7f0000000000;

ht_mapping mapping(__u64 first, __u64 granules) {
  return {kBase + first * HT_GRANULE_SIZE, kBase + (first + granules) * HT_GRANULE_SIZE, TIER_RANGE_ANON, 0};
}

using Taken = std::map<std::pair<__u64, __u64>, int>;

TEST(AbitPlan, EachGranuleOnceAPassInAnOrderOfItsOwn) {
  AbitPlan plan(10'000'000);
  EXPECT_TRUE(plan.empty());
  ht_mapping first = mapping(0, 50);
  // three small mappings in one granule, and one that straddles two
  std::vector<ht_mapping> second = {{kBase, kBase + 0x1000, TIER_RANGE_ANON, 0},
                                    {kBase + 0x2000, kBase + 0x3000, TIER_RANGE_ANON, 0},
                                    {kBase + 0x4000, kBase + HT_GRANULE_SIZE + 0x1000, TIER_RANGE_ANON, 0}};
  plan.manage(1, 100, {&first, 1});
  plan.manage(2, 200, second);
  EXPECT_FALSE(plan.empty());
  std::vector<std::vector<AbitPlan::Target>> orders;
  for (int round = 0; round < 3; ++round) {
    std::vector<AbitPlan::Target> order;
    Taken taken;
    while (order.size() < 52) {
      auto targets = plan.take(1);
      ASSERT_EQ(targets.size(), 1u);
      EXPECT_EQ(targets[0].pid, targets[0].space * 100);
      taken[{targets[0].space, targets[0].granule}]++;
      order.push_back(targets[0]);
    }
    EXPECT_EQ(taken.size(), 52u);
    for (auto& [key, times] : taken) EXPECT_EQ(times, 1);
    EXPECT_EQ(plan.passes_total(), static_cast<std::uint64_t>(round + 1));
    orders.push_back(order);
  }
  EXPECT_FALSE(std::equal(orders[0].begin(), orders[0].end(), orders[1].begin(), [](auto& a, auto& b) { return a.granule == b.granule; }));
}

TEST(AbitPlan, WhatIsUnmappedOrGoneIsNotRead) {
  AbitPlan plan(10'000'000);
  ht_mapping all = mapping(0, 40), left = mapping(10, 10), other = mapping(0, 5);
  plan.manage(1, 100, {&all, 1});
  plan.manage(2, 200, {&other, 1});
  (void)plan.take(1);  // the pass has begun
  plan.manage(1, 100, {&left, 1});
  plan.manage(2, 0, {});
  for (auto& target : plan.take(100)) {
    EXPECT_EQ(target.space, 1u);
    EXPECT_GE(target.granule, (kBase >> HT_GRANULE_SHIFT) + 10);
    EXPECT_LT(target.granule, (kBase >> HT_GRANULE_SHIFT) + 20);
  }
  plan.manage(1, 0, {});
  EXPECT_TRUE(plan.empty());
  EXPECT_TRUE(plan.take(10).empty());
}

TEST(AbitPlan, BareGranulesAreReadSeldom) {
  AbitPlan plan(10'000'000);
  ht_mapping all = mapping(0, 64);
  plan.manage(1, 100, {&all, 1});
  Taken taken;
  for (int round = 0; round < 64 * 8; ++round) {
    auto targets = plan.take(1);
    if (targets.empty()) continue;
    __u64 number = targets[0].granule - (kBase >> HT_GRANULE_SHIFT);
    taken[{1, number}]++;
    plan.mapped(1, targets[0].granule, number < 8);
  }
  int dense = 0, bare = 0;
  for (auto& [key, times] : taken) (key.second < 8 ? dense : bare) += times;
  EXPECT_GT(dense / 8.0, 4 * bare / 56.0);
  EXPECT_EQ(taken.size(), 64u);
}

TEST(AbitPlan, TheIntervalFollowsItsAim) {
  AbitPlan plan(10'000'000);
  EXPECT_EQ(plan.interval_ns(), 8'000'000u);
  plan.aim(80'000'000'000);
  EXPECT_EQ(plan.interval_ns(), 12'000'000u) << "half as much again at most";
  for (int epoch = 0; epoch < 60; ++epoch) plan.aim(20'000'000);
  EXPECT_NEAR(static_cast<double>(plan.interval_ns()), 20e6, 0.2e6);
  for (int epoch = 0; epoch < 200; ++epoch) plan.aim(1);
  EXPECT_EQ(plan.interval_ns(), kBitsShortestNs);
  for (int epoch = 0; epoch < 200; ++epoch) plan.aim(~0ull);
  EXPECT_EQ(plan.interval_ns(), kBitsLongestNs);
}

TEST(AbitPlan, AFifthOfTheCyclesIsShort) {
  AbitPlan plan(10'000'000);
  int shorter = 0;
  for (int cycle = 0; cycle < 100; ++cycle) {
    auto interval_ns = plan.next_cycle().interval_ns;
    EXPECT_TRUE(interval_ns == 8'000'000 || interval_ns == 2'000'000);
    shorter += interval_ns == 2'000'000;
  }
  EXPECT_EQ(shorter, 20);
}

// Cycles as the thread would run them; returns the share of the budget used.
double run(AbitPlan& plan, double seconds, double granule_ns, double cycle_ns, std::uint64_t budget_ns_per_s,
           double share_set = 0.2) {
  double now = 0, cpu = 0;
  while (now < seconds * 1e9) {
    auto cycle = plan.next_cycle();
    EXPECT_GE(cycle.period_ns, cycle.interval_ns);
    EXPECT_GE(cycle.granules, 1u);
    EXPECT_LE(cycle.granules, static_cast<std::size_t>(HT_CHECKS_MAX));
    double cost = cycle_ns + granule_ns * static_cast<double>(cycle.granules);
    cpu += cost;
    now += static_cast<double>(plan.spent(cycle, cycle.granules, static_cast<std::uint64_t>(cost), share_set));
  }
  return cpu / (now / 1e9) / static_cast<double>(budget_ns_per_s);
}

TEST(AbitPlan, HoldsItsBudget) {
  for (std::uint64_t budget : {1'000'000u, 10'000'000u, 80'000'000u})
    for (double granule_ns : {500.0, 10'000.0, 200'000.0})
      for (std::uint64_t interval_ns : {std::uint64_t{1}, std::uint64_t{8'000'000}, ~std::uint64_t{0}}) {
        AbitPlan plan(budget);
        for (int epoch = 0; epoch < 100; ++epoch) plan.aim(interval_ns);
        run(plan, 5, granule_ns, 50'000, budget);  // learns the costs
        double used = run(plan, 60, granule_ns, 50'000, budget);
        EXPECT_LE(used, 1.02) << budget << " " << granule_ns << " " << interval_ns;
        if (interval_ns == 8'000'000) {
          EXPECT_GE(used, 0.7) << budget << " " << granule_ns;
        }
      }
}

TEST(AbitPlan, AnIdleMachineIsReadSeldom) {
  AbitPlan plan(10'000'000);
  run(plan, 20, 10'000, 50'000, 10'000'000, 0);
  EXPECT_LE(run(plan, 20, 10'000, 50'000, 10'000'000, 0), 0.12);
  run(plan, 20, 10'000, 50'000, 10'000'000, 0.3);
  EXPECT_GE(run(plan, 20, 10'000, 50'000, 10'000'000, 0.3), 0.7);
}

// -------------------------------------------------------------- RateControl

// misses_per_s of all CPUs; a sample costs sample_ns.
struct Machine {
  double misses_per_s, sample_ns;
  unsigned cpus = 2;
  double share(std::uint64_t period) const { return misses_per_s / static_cast<double>(period) * sample_ns / 1e9 / cpus; }
  std::uint64_t epoch(RateControl& control, std::uint64_t period) const {
    return control.update(static_cast<std::uint64_t>(share(period) * cpus * 5e8), 500'000'000, cpus);
  }
};

TEST(RateControl, HoldsTheBudgetFromBothSides) {
  Machine machine{5e7, 2000};  // 4093: 1.2 % of two CPUs
  for (std::uint64_t start : {std::uint64_t{256}, std::uint64_t{4093}, std::uint64_t{1000000}}) {
    RateControl control(0.005, 4093, start);
    std::uint64_t period = start;
    for (int epoch = 0; epoch < 40; ++epoch) period = machine.epoch(control, period);
    EXPECT_NEAR(machine.share(period), 0.005, 0.0008) << start;
    EXPECT_NEAR(control.share(), 0.005, 0.001) << start;
    for (int epoch = 0; epoch < 20; ++epoch) EXPECT_EQ(machine.epoch(control, period), period) << "it settles";
  }
}

TEST(RateControl, AnExcessEndsAtOnce) {
  Machine machine{5e7, 2000};
  RateControl control(0.005, 4093, 256);
  std::uint64_t period = machine.epoch(control, 256);
  period = machine.epoch(control, period);
  EXPECT_LE(machine.share(period), 0.0056);
}

TEST(RateControl, StaysInItsBounds) {
  RateControl control(0.005, 4093, 4093);
  std::uint64_t period = 4093;
  for (int epoch = 0; epoch < 100; ++epoch) period = Machine{1000, 2000}.epoch(control, period);
  EXPECT_EQ(period, control.period_min());
  EXPECT_EQ(period, 4093u / 16);
  for (int epoch = 0; epoch < 100; ++epoch) period = Machine{1e12, 2000}.epoch(control, period);
  EXPECT_EQ(period, control.period_max());
  EXPECT_EQ(period, 4093u * 1024);
}

TEST(RateControl, StepsOf16WhereTheSourceCountsInThem) {
  RateControl control(0.005, 262144, 262144);
  std::uint64_t period = 262144;
  for (int epoch = 0; epoch < 50; ++epoch) {
    period = Machine{4e9 * (1 + epoch % 7), 1700}.epoch(control, period);
    EXPECT_EQ(period % 16, 0u);
  }
}

TEST(RateControl, ABurstIsBeyondTheBudgetAndEnds) {
  Machine machine{5e7, 2000};
  RateControl control(0.005, 4093, 4093);
  std::uint64_t period = 4093;
  for (int epoch = 0; epoch < 40; ++epoch) period = machine.epoch(control, period);
  const std::uint64_t held = period;
  period = control.burst(4);
  EXPECT_EQ(period, held / 4);
  for (int epoch = 0; epoch < 15; ++epoch) EXPECT_EQ(period = machine.epoch(control, period), held / 4) << "what it costs is not held against the period";
  EXPECT_NEAR(control.share(), 0.02, 0.003) << "but it is shown";
  EXPECT_EQ(period = machine.epoch(control, period), held) << "after 8 s";
  EXPECT_NEAR(control.share(), 0.005, 0.001);
}

TEST(RateControl, ABurstStaysInTheBounds) {
  RateControl control(0, 4096, 512);
  EXPECT_EQ(control.burst(16), 256u);
  RateControl many(0, 4096, 256);
  EXPECT_EQ(many.burst(4), 256u);
  RateControl rare(0, 37, 400'000);  // longer than it would ever get by itself
  EXPECT_EQ(rare.period(), 400'000u);
  EXPECT_EQ(rare.burst(4), 100'000u);
  EXPECT_EQ(rare.burst(1), 400'000u);
}

TEST(RateControl, WithoutABudgetItOnlyMeasures) {
  RateControl control(0, 37, 37);
  for (int epoch = 0; epoch < 20; ++epoch) EXPECT_EQ((Machine{1e6, 500}.epoch(control, 37)), 37u);
  EXPECT_NEAR(control.share(), 1e6 / 37 * 500 / 1e9 / 2, 1e-4);
}

}  // namespace
}  // namespace hypertier
