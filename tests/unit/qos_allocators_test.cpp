// SPDX-License-Identifier: GPL-2.0-or-later
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "qos/qos.hpp"

using namespace hypertier;
using namespace hypertier::qos;

namespace {

constexpr uint64_t kMiB = 1 << 20, kGiB = 1 << 30;

// The definition, by bisection on the level: independent of the solver.
std::vector<long double> reference(uint64_t capacity, const std::vector<Basin>& basins) {
  auto at = [&](long double level, const Basin& b) {
    return std::clamp<long double>(b.weight * level, b.floor, b.ceiling);
  };
  long double low = 0, high = 1e19L;
  for (int i = 0; i < 400; i++) {
    const long double mid = (low + high) / 2;
    long double sum = 0;
    for (const auto& b : basins) sum += at(mid, b);
    (sum <= capacity ? low : high) = mid;
  }
  std::vector<long double> parts;
  for (const auto& b : basins) parts.push_back(at(low, b));
  return parts;
}

Request request(std::string name, uint64_t guarantee, uint64_t limit, uint64_t weight) {
  Request r;
  r.name = std::move(name);
  for (auto& share : r.share) share = {guarantee, limit, weight};
  return r;
}

Parts divide(const std::string& allocator, PerTier<uint64_t> capacity, std::vector<Request> requests) {
  auto a = make_allocator(allocator);
  EXPECT_TRUE(a) << a.error().message;
  auto parts = (*a)->divide(capacity, requests);
  EXPECT_TRUE(parts) << parts.error().message;
  return *parts;
}

TEST(WaterFill, AgreesWithTheDefinition) {
  std::mt19937_64 random(1);
  int full = 0, partial = 0;
  for (int round = 0; round < 5000; round++) {
    const size_t n = 1 + random() % 12;
    std::vector<Basin> basins(n);
    uint64_t floors = 0, ceilings = 0;
    for (auto& b : basins) {
      b.floor = random() % 3 ? random() % 500 : 0;
      b.ceiling = b.floor + (random() % 4 ? random() % 3000 : 0);
      b.weight = 1 + random() % (random() % 2 ? 8 : 100000);
      floors += b.floor;
      ceilings += b.ceiling;
    }
    const uint64_t capacity = floors + random() % (ceilings - floors + 200);
    auto parts = water_fill(capacity, basins);
    ASSERT_TRUE(parts);
    const auto expected = reference(capacity, basins);
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) {
      EXPECT_GE((*parts)[i], basins[i].floor);
      EXPECT_LE((*parts)[i], basins[i].ceiling);
      EXPECT_LE(std::fabs(static_cast<long double>((*parts)[i]) - expected[i]), 1.0L) << "round " << round;
      sum += (*parts)[i];
    }
    EXPECT_EQ(sum, std::min(capacity, ceilings));
    (capacity < ceilings ? partial : full)++;
  }
  EXPECT_GT(full, 50);
  EXPECT_GT(partial, 1000);
}

TEST(WaterFill, LargeNumbersDoNotOverflow) {
  const uint64_t tib = 1ULL << 40;  // as granules: 2 EiB
  std::vector<Basin> basins{{0, tib, 1'000'000}, {tib / 8, tib, 1}, {0, tib / 2, 3'000'000}};
  auto parts = water_fill(tib, basins);
  ASSERT_TRUE(parts);
  EXPECT_EQ((*parts)[0], tib - tib / 8 - tib / 2);
  EXPECT_EQ((*parts)[1], tib / 8);
  EXPECT_EQ((*parts)[2], tib / 2);
}

TEST(WaterFill, RefusesFloorsAboveTheCapacity) {
  std::vector<Basin> basins{{6, 10, 1}, {5, 10, 1}};
  EXPECT_FALSE(water_fill(10, basins));
  EXPECT_TRUE(water_fill(11, basins));
}

TEST(MaxMin, WeightsOneTwoFourWithGuarantees) {
  // 14 GiB, weights 1:2:4:1, the last with a guarantee above its fair part.
  auto parts = divide("max-min", {14 * kGiB, 14 * kGiB},
                      {request("a", 0, kNoLimit, 1), request("b", 0, kNoLimit, 2), request("c", 0, kNoLimit, 4),
                       request("d", 7 * kGiB, kNoLimit, 1)});
  EXPECT_EQ(parts[0][0], 1 * kGiB);
  EXPECT_EQ(parts[1][0], 2 * kGiB);
  EXPECT_EQ(parts[2][0], 4 * kGiB);
  EXPECT_EQ(parts[3][0], 7 * kGiB);
}

TEST(MaxMin, ALimitHandsTheRestOn) {
  auto parts = divide("max-min", {6 * kGiB, 0},
                      {request("a", 0, kGiB, 100), request("b", 0, kNoLimit, 1), request("c", 0, kNoLimit, 4)});
  EXPECT_EQ(parts[0][0], kGiB);
  EXPECT_EQ(parts[1][0], kGiB);
  EXPECT_EQ(parts[2][0], 4 * kGiB);
}

TEST(MaxMin, SaysWhichTierIsSoldTwice) {
  auto a = make_allocator("max-min");
  auto parts = (*a)->divide({kGiB, 8 * kGiB}, std::vector{request("a", kGiB, kNoLimit, 1), request("b", kMiB, kNoLimit, 1)});
  ASSERT_FALSE(parts);
  EXPECT_NE(parts.error().message.find("fast"), std::string::npos) << parts.error().message;
  EXPECT_FALSE(parts.error().hint.empty());
}

TEST(Drf, TheTextbookCase) {
  // 9 of the one and 18 of the other; A wants 1:4, B wants 3:1 -> 3 and 2 tasks.
  auto a = request("a", 0, kNoLimit, 1), b = request("b", 0, kNoLimit, 1);
  a.demand_bytes = {1 * kGiB * 4, 4 * kGiB * 4};
  b.demand_bytes = {3 * kGiB * 3, 1 * kGiB * 3};
  auto parts = divide("drf", {9 * kGiB, 18 * kGiB}, {a, b});
  EXPECT_NEAR(parts[0][0], 3.0 * kGiB, kGranuleBytes);
  EXPECT_NEAR(parts[0][1], 12.0 * kGiB, kGranuleBytes);
  EXPECT_NEAR(parts[1][0], 6.0 * kGiB, kGranuleBytes);
  EXPECT_NEAR(parts[1][1], 2.0 * kGiB, kGranuleBytes);
}

TEST(Drf, WhoDoesNotWantTheFullTierGoesOn) {
  auto a = request("a", 0, kNoLimit, 1), b = request("b", 0, kNoLimit, 1), c = request("c", 0, kNoLimit, 1);
  a.demand_bytes = b.demand_bytes = {8 * kGiB, 0};
  c.demand_bytes = {0, 16 * kGiB};
  auto parts = divide("drf", {8 * kGiB, 16 * kGiB}, {a, b, c});
  EXPECT_NEAR(parts[0][0], 4.0 * kGiB, kGranuleBytes);
  EXPECT_NEAR(parts[1][0], 4.0 * kGiB, kGranuleBytes);
  EXPECT_NEAR(parts[2][1], 16.0 * kGiB, kGranuleBytes);
}

TEST(Pool, UnwantedMemoryStaysInThePoolAndGuaranteesComeBack) {
  auto a = request("a", 4 * kGiB, kNoLimit, 1), b = request("b", 2 * kGiB, kNoLimit, 1);
  a.demand_bytes = {kGiB, kGiB};
  b.demand_bytes = {6 * kGiB, kGiB};
  auto parts = divide("pool", {8 * kGiB, 8 * kGiB}, {a, b});
  EXPECT_EQ(parts[0][0], kGiB);
  EXPECT_EQ(parts[1][0], 6 * kGiB);
  a.demand_bytes = {6 * kGiB, kGiB};
  parts = divide("pool", {8 * kGiB, 8 * kGiB}, {a, b});
  EXPECT_EQ(parts[0][0], 4 * kGiB);
  EXPECT_EQ(parts[1][0], 4 * kGiB);
}

TEST(Slowdown, TheClaimMovesWithinGuaranteeAndLimitOnly) {
  auto honest = request("honest", 2 * kGiB, 6 * kGiB, 1), liar = request("liar", kGiB, 5 * kGiB, 1);
  auto parts = divide("slowdown", {8 * kGiB, 8 * kGiB}, {honest, liar});
  EXPECT_EQ(parts[0][0], 4 * kGiB);
  for (double claim : {1.0, 1e300, HUGE_VAL}) {
    liar.slow_miss_share = claim;
    parts = divide("slowdown", {8 * kGiB, 8 * kGiB}, {honest, liar});
    EXPECT_GE(parts[0][0], 2 * kGiB);
    EXPECT_LE(parts[1][0], 5 * kGiB);
  }
  liar.slow_miss_share = 1;
  parts = divide("slowdown", {8 * kGiB, 8 * kGiB}, {honest, liar});
  EXPECT_EQ(parts[1][0], 5 * kGiB);  // outliers do get the memory
  for (double claim : {-1.0, static_cast<double>(NAN), -HUGE_VAL}) {
    liar.slow_miss_share = claim;
    parts = divide("slowdown", {8 * kGiB, 8 * kGiB}, {honest, liar});
    EXPECT_EQ(parts[1][0], 4 * kGiB);
  }
}

TEST(PStates, OneStateATickAndNeverMoreThanThereIs) {
  auto allocator = make_allocator("p-states");
  auto a = request("a", kGiB, 5 * kGiB, 1), b = request("b", kGiB, 5 * kGiB, 1);
  a.slow_miss_share = 0.5;
  std::vector<uint64_t> seen;
  for (int tick = 0; tick < 6; tick++)
    seen.push_back((*(*allocator)->divide({7 * kGiB, 8 * kGiB}, std::vector{a, b}))[0][0]);
  EXPECT_EQ(seen, (std::vector<uint64_t>{2 * kGiB, 3 * kGiB, 4 * kGiB, 5 * kGiB, 5 * kGiB, 5 * kGiB}));
  b.slow_miss_share = 0.5;
  Parts parts;
  for (int tick = 0; tick < 6; tick++) parts = *(*allocator)->divide({7 * kGiB, 8 * kGiB}, std::vector{a, b});
  EXPECT_LE(parts[0][0] + parts[1][0], 7 * kGiB);
  EXPECT_GE(std::min(parts[0][0], parts[1][0]), 3 * kGiB);
  a.slow_miss_share = 0;
  parts = *(*allocator)->divide({7 * kGiB, 8 * kGiB}, std::vector{a, b});
  EXPECT_EQ(parts[0][0], 2 * kGiB);
}

TEST(Allocators, HoldTheirBoundsWhateverIsAsked) {
  std::mt19937_64 random(7);
  for (const auto& name : allocator_names()) {
    for (int round = 0; round < 400; round++) {
      const size_t n = 1 + random() % 6;
      PerTier<uint64_t> capacity{(64 + random() % 4096) * kGranuleBytes, (64 + random() % 4096) * kGranuleBytes};
      std::vector<Request> requests;
      for (size_t i = 0; i < n; i++) {
        auto r = request("vm" + std::to_string(i), 0, 0, 1 + random() % 9);
        for (int t = 0; t < HT_TIERS; t++) {
          r.share[t].guarantee_bytes = random() % (capacity[t] / n / kGranuleBytes + 1) * kGranuleBytes;
          r.share[t].limit_bytes =
              random() % 3 ? r.share[t].guarantee_bytes + random() % (2 * kGiB) : kNoLimit;
          r.demand_bytes[t] = random() % 2 ? random() % (4 * kGiB) : kNoLimit;
        }
        r.slow_miss_share = static_cast<double>(random() % 100) / 99;
        requests.push_back(r);
      }
      const auto parts = divide(name, capacity, requests);
      for (int t = 0; t < HT_TIERS; t++) {
        uint64_t sum = 0;
        for (size_t i = 0; i < n; i++) {
          const auto& share = requests[i].share[t];
          sum += parts[i][t];
          EXPECT_LE(parts[i][t], share.limit_bytes) << name;
          uint64_t floor = share.guarantee_bytes;
          if (name == "pool") floor = std::min(floor, requests[i].demand_bytes[t] / kGranuleBytes * kGranuleBytes);
          EXPECT_GE(parts[i][t], floor) << name << " round " << round;
        }
        EXPECT_LE(sum, capacity[t]) << name;
      }
    }
  }
}

}  // namespace
