// SPDX-License-Identifier: GPL-2.0-or-later
// The controller against simulated VMs: a clock of ticks, guests that need time.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>

#include "qos/qos.hpp"

using namespace hypertier;
using namespace hypertier::qos;

namespace {

constexpr uint64_t kMiB = 1 << 20, kGiB = 1 << 30;

struct Guest {
  Observation seen;
  PerTier<uint64_t> target{};
  uint64_t gives_back_bytes = 512 * kMiB;  // a tick
  uint64_t touches_bytes = 512 * kMiB;     // a tick
  bool hostile = false;                    // keeps and refaults up to file_bytes
  PerTier<uint64_t> file_bytes{8 * kGiB, 8 * kGiB};

  Guest(std::string name, uint64_t guarantee, uint64_t limit, uint64_t weight, uint64_t start) {
    seen.request.name = std::move(name);
    for (auto& share : seen.request.share) share = {guarantee, limit, weight};
    seen.measured_bytes = seen.found_target_bytes = target = {start, start};
  }
  void run() {
    for (int t = 0; t < HT_TIERS; t++) {
      auto& used = seen.measured_bytes[t];
      if (hostile) used = std::min(used + touches_bytes, file_bytes[t]);
      else if (used > target[t]) used -= std::min(used - target[t], gives_back_bytes);
      else used += std::min(target[t] - used, touches_bytes);
    }
  }
};

struct World {
  PerTier<uint64_t> capacity;
  std::vector<Guest> guests;
  std::unique_ptr<Allocator> allocator;
  Controller controller;
  std::vector<Action> actions;  // of the last tick
  std::vector<Action> all;

  World(uint64_t bytes, const char* name, Settings settings = {})
      : capacity{bytes, bytes}, allocator(*make_allocator(name)), controller(settings) {}
  void tick() {
    std::vector<Observation> seen;
    for (auto& g : guests) seen.push_back(g.seen);
    auto result = controller.tick(capacity, seen, *allocator);
    ASSERT_TRUE(result) << result.error().message;
    actions = *result;
    all.insert(all.end(), actions.begin(), actions.end());
    for (const auto& a : actions)
      for (auto& g : guests)
        if (a.vm == g.seen.request.name && a.step == Step::kTarget) g.target[a.tier] = a.bytes;
    for (auto& g : guests) g.run();
  }
  uint64_t held(int t) const {
    uint64_t sum = 0;
    for (const auto& g : guests) sum += std::max(g.target[t], g.seen.measured_bytes[t]);
    return sum;
  }
  std::vector<std::string> steps(const std::string& vm, ht_tier tier) const {
    std::vector<std::string> names;
    for (const auto& a : all)
      if (a.vm == vm && a.tier == tier && a.step != Step::kTarget) names.push_back(step_name(a.step));
    return names;
  }
};

TEST(Controller, FourVmsReachTheExactSplitWithinTenTicksAndStay) {
  World world(16 * kGiB, "max-min");
  world.guests = {{"a", kGiB, kNoLimit, 100, 4 * kGiB}, {"b", kGiB, kNoLimit, 200, 4 * kGiB},
                  {"c", kGiB, kNoLimit, 400, 4 * kGiB}, {"d", 3 * kGiB, kNoLimit, 100, 4 * kGiB}};
  for (auto& g : world.guests) g.gives_back_bytes = g.touches_bytes = kGiB;
  std::vector<Request> requests;
  for (auto& g : world.guests) requests.push_back(g.seen.request);
  const auto exact = *world.allocator->divide(world.capacity, requests);
  // 13 GiB over 1:2:4 beside the guarantee of d
  EXPECT_NEAR(exact[0][0], 13.0 / 7 * kGiB, kGranuleBytes);
  EXPECT_EQ(exact[3][0], 3 * kGiB);
  for (int tick = 0; tick < 10; tick++) {
    world.tick();
    for (int t = 0; t < HT_TIERS; t++) EXPECT_LE(world.held(t), world.capacity[t]) << "tick " << tick;
  }
  for (size_t i = 0; i < world.guests.size(); i++)
    for (int t = 0; t < HT_TIERS; t++) EXPECT_EQ(world.guests[i].target[t], exact[i][t]);
  for (int tick = 0; tick < 1000; tick++) {
    world.tick();
    EXPECT_TRUE(world.actions.empty()) << "tick " << tick;
  }
}

TEST(Controller, ADemandBurstIsServedInFiveTicks) {
  World world(16 * kGiB, "pool");
  world.guests = {{"busy", 8 * kGiB, kNoLimit, 100, kGiB}, {"b", 2 * kGiB, kNoLimit, 100, 7 * kGiB},
                  {"c", 2 * kGiB, kNoLimit, 100, 7 * kGiB}};
  for (auto& g : world.guests) g.gives_back_bytes = g.touches_bytes = 4 * kGiB;
  for (auto& g : world.guests) g.seen.request.demand_bytes = g.seen.measured_bytes;
  for (int tick = 0; tick < 5; tick++) world.tick();
  ASSERT_EQ(world.guests[0].target[0], kGiB);
  world.guests[0].seen.request.demand_bytes = {8 * kGiB, 8 * kGiB};
  int served = 0;
  while (served < 20 && world.guests[0].seen.measured_bytes[0] < 8 * kGiB) {
    world.tick();
    served++;
  }
  EXPECT_LE(served, 5);
  EXPECT_EQ(world.guests[0].seen.measured_bytes[0], 8 * kGiB);
}

TEST(Controller, NoiseBelowTheDeadBandMovesNothingForAThousandTicks) {
  Settings settings;
  World world(8 * kGiB, "pool", settings);
  world.guests = {{"a", kGiB, kNoLimit, 1, 3 * kGiB}, {"b", kGiB, kNoLimit, 1, 3 * kGiB}};
  for (auto& g : world.guests) g.seen.request.demand_bytes = {3 * kGiB, 3 * kGiB};
  for (int tick = 0; tick < 10; tick++) world.tick();
  std::mt19937_64 random(3);
  size_t moves = 0;
  for (int tick = 0; tick < 1000; tick++) {
    for (auto& g : world.guests)
      for (auto& demand : g.seen.request.demand_bytes) demand = 3 * kGiB + random() % (settings.dead_band_bytes - kGranuleBytes);
    world.tick();
    moves += world.actions.size();
  }
  EXPECT_EQ(moves, 0u);
}

// Step changes of demand: between two changes a target moves in one direction only.
TEST(Controller, NoOscillation) {
  std::mt19937_64 random(11);
  for (const char* name : {"max-min", "pool", "slowdown", "drf"}) {
    World world(16 * kGiB, name);
    world.guests = {{"a", kGiB, kNoLimit, 1, 4 * kGiB}, {"b", kGiB, 9 * kGiB, 2, 4 * kGiB},
                    {"c", kGiB, kNoLimit, 4, 4 * kGiB}, {"d", 3 * kGiB, kNoLimit, 1, 4 * kGiB}};
    std::map<std::pair<std::string, int>, int> direction, reversals;
    for (int tick = 0; tick < 1000; tick++) {
      if (tick % 50 == 0) {
        for (auto& g : world.guests) {
          g.seen.request.demand_bytes = {random() % (8 * kGiB), random() % (8 * kGiB)};
          g.seen.request.slow_miss_share = static_cast<double>(random() % 5) / 4;
        }
        direction.clear();
      }
      const auto before = world.guests;
      world.tick();
      for (size_t i = 0; i < before.size(); i++) {
        for (int t = 0; t < HT_TIERS; t++) {
          const auto old = before[i].target[t], now = world.guests[i].target[t];
          if (old == now) continue;
          int& d = direction[{before[i].seen.request.name, t}];
          const int sign = now > old ? 1 : -1;
          if (d && d != sign) reversals[{before[i].seen.request.name, t}]++;
          d = sign;
        }
      }
      for (int t = 0; t < HT_TIERS; t++) ASSERT_LE(world.held(t), world.capacity[t]) << name << " tick " << tick;
    }
    EXPECT_TRUE(reversals.empty()) << name;
  }
}

TEST(Controller, NothingGrowsBeforeTheMemoryIsMeasuredFree) {
  World world(8 * kGiB, "max-min");
  world.guests = {{"slow", 0, kNoLimit, 1, 7 * kGiB}, {"b", 0, kNoLimit, 7, kGiB}};
  world.guests[0].gives_back_bytes = 64 * kMiB;
  for (int tick = 0; tick < 200; tick++) {
    world.tick();
    ASSERT_LE(world.held(0), 8 * kGiB) << "tick " << tick;
  }
  EXPECT_EQ(world.guests[1].seen.measured_bytes[0], 7 * kGiB);
  EXPECT_TRUE(world.steps("slow", HT_TIER_FAST).empty()) << "steady progress is no offence";
}

TEST(Controller, ARefusingVmClimbsTheLadderAndTheOthersKeepTheirGuarantees) {
  World world(16 * kGiB, "max-min");
  world.guests = {{"evil", 2 * kGiB, kNoLimit, 100, 8 * kGiB}, {"b", 4 * kGiB, kNoLimit, 100, 4 * kGiB},
                  {"late", 6 * kGiB, kNoLimit, 100, 4 * kGiB}};
  world.guests[0].hostile = true;
  world.guests[0].seen.cap_allowed = true;
  for (int tick = 0; tick < 40; tick++) {
    world.tick();
    EXPECT_GE(world.guests[1].target[0], 4 * kGiB);
    EXPECT_GE(world.guests[2].target[0], 4 * kGiB);
  }
  EXPECT_EQ(world.steps("evil", HT_TIER_FAST), (std::vector<std::string>{"retry", "cap", "lose_bonus", "pause"}));
  EXPECT_STREQ(world.controller.rung("evil", HT_TIER_FAST), "pause");
  EXPECT_EQ(world.controller.target_bytes("evil", HT_TIER_FAST), 2 * kGiB) << "the bonus is gone";
  EXPECT_TRUE(world.steps("b", HT_TIER_FAST).empty());

  // It gives in: all is forgiven, the late one gets what it was promised.
  world.guests[0].hostile = false;
  for (int tick = 0; tick < 60; tick++) world.tick();
  EXPECT_EQ(world.steps("evil", HT_TIER_FAST).back(), "forgive");
  EXPECT_GE(world.guests[2].target[0], 6 * kGiB);
  EXPECT_GT(world.controller.target_bytes("evil", HT_TIER_FAST), 2 * kGiB) << "the bonus is back";
}

TEST(Controller, WithoutLeaveNoCapAndWithoutVictimNoPause) {
  World world(32 * kGiB, "max-min");
  world.guests = {{"evil", 2 * kGiB, 4 * kGiB, 1, 8 * kGiB}, {"b", 4 * kGiB, kNoLimit, 1, 4 * kGiB}};
  world.guests[0].hostile = true;
  for (int tick = 0; tick < 60; tick++) world.tick();
  EXPECT_EQ(world.steps("evil", HT_TIER_FAST), (std::vector<std::string>{"retry", "lose_bonus"}));
}

TEST(Controller, ALieIsSeenInTheSameTick) {
  World world(16 * kGiB, "max-min");
  world.guests = {{"liar", kGiB, 4 * kGiB, 1, 4 * kGiB}, {"b", kGiB, 4 * kGiB, 1, 4 * kGiB}};
  world.guests[0].seen.claimed_bytes = {4 * kGiB, 4 * kGiB};
  world.tick();
  EXPECT_TRUE(world.steps("liar", HT_TIER_FAST).empty());
  world.guests[0].seen.claimed_bytes = {kGiB, 4 * kGiB};
  world.tick();
  EXPECT_TRUE(world.steps("liar", HT_TIER_FAST).empty()) << "within its target it owes nothing";
  world.guests[0].seen.measured_bytes[HT_TIER_FAST] = 5 * kGiB;
  world.tick();
  EXPECT_EQ(world.steps("liar", HT_TIER_FAST), std::vector<std::string>{"lie"});
  EXPECT_TRUE(world.steps("liar", HT_TIER_SLOW).empty());
}

// Differences below the dead band count too when somebody changed the rules, and
// more than there is never stays given out.
TEST(Controller, SmallDifferencesCountUnderNewRules) {
  World world(136 * kMiB, "max-min");
  for (const auto& [name, weight, guarantee] : {std::tuple{"a", 1, 8}, {"b", 2, 8}, {"c", 4, 8}, {"d", 1, 52}}) {
    world.guests.emplace_back(name, guarantee * kMiB, 64 * kMiB, weight, 64 * kMiB);
    world.guests.back().gives_back_bytes = 24 * kMiB;
  }
  for (int tick = 0; tick < 12; tick++) world.tick();
  for (int t = 0; t < HT_TIERS; t++) {
    EXPECT_EQ(world.guests[0].target[t], 12 * kMiB);
    EXPECT_EQ(world.guests[1].target[t], 24 * kMiB);
    EXPECT_EQ(world.guests[2].target[t], 48 * kMiB);
    EXPECT_EQ(world.guests[3].target[t], 52 * kMiB);
  }
}

TEST(Controller, ANewOneTakesUpWhatItFinds) {
  World world(16 * kGiB, "max-min");
  world.guests = {{"a", kGiB, kNoLimit, 1, 2 * kGiB}, {"b", kGiB, kNoLimit, 3, 14 * kGiB}};
  for (int tick = 0; tick < 3; tick++) world.tick();  // under way
  const auto before = world.guests;
  world.controller = Controller();
  for (size_t i = 0; i < 2; i++) world.guests[i].seen.found_target_bytes = world.guests[i].target;
  std::vector<Observation> seen;
  for (auto& g : world.guests) seen.push_back(g.seen);
  ASSERT_TRUE(world.controller.tick(world.capacity, seen, *world.allocator));
  for (auto& g : before) {
    const auto target = world.controller.target_bytes(g.seen.request.name, HT_TIER_FAST);
    EXPECT_LE(std::max(target, g.target[0]) - std::min(target, g.target[0]), world.capacity[0] / 4);
  }
  for (int tick = 0; tick < 20; tick++) world.tick();
  EXPECT_EQ(world.guests[0].target[0], 4 * kGiB);
  EXPECT_EQ(world.guests[1].target[0], 12 * kGiB);
}

TEST(Controller, AnUnreachableVmIsLeftAloneAndTheOthersGoOn) {
  World world(12 * kGiB, "max-min");
  world.guests = {{"hung", kGiB, kNoLimit, 1, 6 * kGiB}, {"b", kGiB, kNoLimit, 1, kGiB}, {"c", kGiB, kNoLimit, 1, 5 * kGiB}};
  world.guests[0].seen.reachable = false;
  for (int tick = 0; tick < 20; tick++) {
    world.tick();
    for (const auto& a : world.actions) EXPECT_NE(a.vm, "hung");
    EXPECT_LE(world.held(0), 12 * kGiB);
  }
  // Of 12 GiB everybody's part is 4; the hung one sits on 6.
  EXPECT_EQ(world.guests[1].target[0], 2 * kGiB);
  EXPECT_EQ(world.guests[2].target[0], 4 * kGiB);
}

}  // namespace
