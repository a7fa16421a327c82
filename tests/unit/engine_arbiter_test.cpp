// SPDX-License-Identifier: GPL-2.0-or-later
// How the fast tier is shared out between scopes.
#include "engine/arbiter.hpp"

#include <gtest/gtest.h>

#include <initializer_list>
#include <numeric>
#include <random>

namespace hypertier {
namespace {

struct Part {
  double density;  // samples per page and second
  __u64 pages;
};

Claim claim(std::initializer_list<Part> parts, __u64 fast_pages, __u64 min_pages = 0, __u64 max_pages = HT_UNKNOWN64) {
  Claim claim;
  claim.min_pages = min_pages;
  claim.max_pages = max_pages;
  __u64 all = 0;
  for (const Part& part : parts) {
    claim.demand.pages[static_cast<std::size_t>(density_bucket(part.density))] += part.pages;
    all += part.pages;
  }
  claim.demand.fast_pages = fast_pages;
  claim.demand.slow_pages = all - fast_pages;
  return claim;
}

TEST(Arbiter, BucketsRiseWithDensity) {
  EXPECT_EQ(density_bucket(0), 0);
  EXPECT_EQ(density_bucket(-1), 0);
  int before = 0;
  for (double density : {1e-12, 1e-6, 1e-3, 1.0, 1e3}) {
    const int bucket = density_bucket(density);
    EXPECT_GT(bucket, before);
    EXPECT_LT(bucket, kDensityBuckets);
    before = bucket;
  }
  EXPECT_EQ(density_bucket(1e300), kDensityBuckets - 1);
  EXPECT_EQ(density_bucket(1), density_bucket(1.1));
  EXPECT_NE(density_bucket(1), density_bucket(1.2));  // a quarter of an octave
}

TEST(Arbiter, NobodyAsksForNothing) { EXPECT_TRUE(arbitrate(1000, 0, {}).empty()); }

TEST(Arbiter, OneAloneHasAllUpToItsMaximum) {
  const std::vector<Claim> all = {claim({{1, 5000}}, 1000)};
  EXPECT_EQ(arbitrate(1000, 0, all)[0].capacity_pages, 1000u);
  const std::vector<Claim> bounded = {claim({{1, 5000}}, 1000, 0, 300)};
  EXPECT_EQ(arbitrate(1000, 0, bounded)[0].capacity_pages, 300u);
}

// Water filling: the densest pages of all, whoever's they are.
TEST(Arbiter, TheDensestPagesGetTheTier) {
  const std::vector<Claim> claims = {claim({{100, 300}, {1, 700}}, 500), claim({{50, 400}, {2, 600}}, 500),
                                     claim({{0.1, 1000}}, 0)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 300u);        // its 100
  EXPECT_EQ(shares[1].capacity_pages, 400u + 300);  // its 50 and, as far as there is room, its 2
  EXPECT_EQ(shares[2].capacity_pages, 0u);
  EXPECT_EQ(shares[0].surplus_pages, 200u);  // what the other has hotter pages for
  EXPECT_EQ(shares[1].surplus_pages, 0u);
}

TEST(Arbiter, AMinimumIsKeptFromHotterSiblings) {
  const std::vector<Claim> claims = {claim({{1, 600}}, 400, 400), claim({{100, 5000}}, 600)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 400u);
  EXPECT_EQ(shares[0].surplus_pages, 0u);
  EXPECT_EQ(shares[1].capacity_pages, 600u);
}

// Above its minimum it competes like everybody: what is hot of it counts towards
// the minimum.
TEST(Arbiter, AMinimumIsNoBonus) {
  const std::vector<Claim> claims = {claim({{100, 500}, {1, 500}}, 500, 400), claim({{50, 5000}}, 500)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 500u);
  EXPECT_EQ(shares[1].capacity_pages, 500u);
}

TEST(Arbiter, AMinimumThatIsNotFilledIsNotKeptEmpty) {
  const std::vector<Claim> claims = {claim({{1, 100}}, 100, 800), claim({{100, 5000}}, 900)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 100u);
  EXPECT_EQ(shares[1].capacity_pages, 900u);
}

TEST(Arbiter, AMaximumHoldsWhateverTheHeat) {
  const std::vector<Claim> claims = {claim({{100, 5000}}, 700, 0, 200), claim({{1, 500}}, 300)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 200u);
  EXPECT_GE(shares[1].capacity_pages, 500u);
}

TEST(Arbiter, AMaximumBelowTheMinimumWins) {
  const std::vector<Claim> claims = {claim({{1, 5000}}, 500, 400, 300), claim({{1, 5000}}, 500)};
  EXPECT_EQ(arbitrate(1000, 0, claims)[0].capacity_pages, 300u);
}

TEST(Arbiter, MinimaOfATierThatTheKernelHasShrunkAreShared) {
  const std::vector<Claim> claims = {claim({{1, 900}}, 450, 600), claim({{1, 900}}, 450, 300)};
  const auto shares = arbitrate(450, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 300u);
  EXPECT_EQ(shares[1].capacity_pages, 150u);
}

// Equally dense: who has fast memory keeps it, the rest is in proportion.
TEST(Arbiter, AmongEqualsNothingMoves) {
  const std::vector<Claim> claims = {claim({{1, 2000}}, 800), claim({{1, 2000}}, 200)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 800u);
  EXPECT_EQ(shares[1].capacity_pages, 200u);
  EXPECT_EQ(shares[0].surplus_pages + shares[1].surplus_pages, 0u);
}

TEST(Arbiter, AmongEqualsFreeRoomIsSharedInProportion) {
  const std::vector<Claim> claims = {claim({{1, 3000}}, 0), claim({{1, 1000}}, 0)};
  const auto shares = arbitrate(1000, 1000, claims);
  EXPECT_EQ(shares[0].capacity_pages, 750u);
  EXPECT_EQ(shares[1].capacity_pages, 250u);
}

// Nothing was sampled: everybody may use what is idle, nobody has to leave.
TEST(Arbiter, WithoutDemandNobodyLeaves) {
  const std::vector<Claim> claims = {claim({{0, 2000}}, 900), claim({{0, 2000}}, 100, 50), claim({}, 0)};
  for (const Share& share : arbitrate(1000, 0, claims)) EXPECT_EQ(share.surplus_pages, 0u);
}

TEST(Arbiter, FreeRoomIsTakenBeforeAnybodyHasToLeave) {
  const std::vector<Claim> claims = {claim({{0, 900}}, 500), claim({{10, 300}}, 0)};
  EXPECT_EQ(arbitrate(1000, 500, claims)[0].surplus_pages, 0u);
  EXPECT_EQ(arbitrate(500, 0, claims)[0].surplus_pages, 300u);
}

TEST(Arbiter, CountsWaverWithoutAMove) {
  const std::vector<Claim> claims = {claim({{100, 495}, {1, 500}}, 500), claim({{50, 505}}, 500)};
  const auto shares = arbitrate(1000, 0, claims);
  EXPECT_EQ(shares[0].capacity_pages, 495u);
  EXPECT_EQ(shares[0].surplus_pages, 0u);  // 5 pages are less than a 64th
}

// Any claims: minima, maxima and sums hold, and nobody has to give more than the
// others lack.
TEST(Arbiter, AnyClaimsKeepTheRules) {
  std::mt19937 rng(1);
  for (int round = 0; round < 2000; ++round) {
    const __u64 total = 1000 + rng() % 100000;
    std::vector<Claim> claims(1 + rng() % 8);
    __u64 left = total, minima = 0;
    for (Claim& c : claims) {
      const __u64 fast = rng() % (left + 1);
      left -= fast;
      c.demand.fast_pages = fast;
      c.demand.slow_pages = rng() % total;
      __u64 pages = fast + c.demand.slow_pages;
      for (int i = 0; i < 4; ++i) {
        const __u64 some = i == 3 ? pages : rng() % (pages + 1);
        c.demand.pages[rng() % kDensityBuckets] += some;
        pages -= some;
      }
      if (rng() % 2) c.max_pages = rng() % total;
      if (rng() % 2) c.min_pages = rng() % (total - minima + 1);
      minima += c.min_pages;
    }
    const auto shares = arbitrate(total, left, claims);
    ASSERT_EQ(shares.size(), claims.size());
    __u64 asked = 0, surplus = 0;
    for (std::size_t i = 0; i < claims.size(); ++i) {
      const Claim& c = claims[i];
      const __u64 has = c.demand.fast_pages + c.demand.slow_pages;
      asked += has;
      EXPECT_LE(shares[i].capacity_pages, c.max_pages);
      EXPECT_GE(shares[i].capacity_pages, std::min({c.min_pages, c.max_pages, has}));
      EXPECT_LE(shares[i].surplus_pages, c.demand.fast_pages);
      if (c.demand.fast_pages <= shares[i].capacity_pages) {
        EXPECT_EQ(shares[i].surplus_pages, 0u);
      }
      surplus += shares[i].surplus_pages;
    }
    __u64 sum = 0, lacking = 0;
    for (std::size_t i = 0; i < claims.size(); ++i) {
      sum += std::min(shares[i].capacity_pages, claims[i].demand.fast_pages + claims[i].demand.slow_pages);
      lacking += claims[i].demand.slow_pages;
    }
    // What each may fill fits the tier, unless nobody fills it.
    EXPECT_LE(std::min(sum, asked), asked);
    EXPECT_LE(surplus, lacking);
    bool bounded = false;
    for (const Claim& c : claims) bounded |= c.max_pages < c.demand.fast_pages + c.demand.slow_pages;
    if (asked > total && !bounded) {
      EXPECT_LE(sum, total + claims.size() * claims.size());  // what rounding leaves is anybody's
      EXPECT_GE(sum + claims.size(), total);  // rounding
    }
  }
}

}  // namespace
}  // namespace hypertier
