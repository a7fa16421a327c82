// SPDX-License-Identifier: GPL-2.0-or-later
// Rate limit, memory of moves, conduct of a policy, heat history, shifts.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "engine/guards.hpp"
#include "engine/history.hpp"
#include "engine/shift.hpp"

namespace hypertier {
namespace {

constexpr __u64 kMiB = 1 << 20;
constexpr __u64 kMilli = 1'000'000;

TEST(RateLimit, IsOffAtZero) {
  RateLimit limit;
  limit.refill(500 * kMilli);
  EXPECT_EQ(limit.pages(), HT_UNKNOWN64);
  limit.spend(1000);
  EXPECT_EQ(limit.pages(), HT_UNKNOWN64);
}

TEST(RateLimit, HoldsTheRateOverTime) {
  for (__u64 epoch_ms : {10, 100, 500, 2000, 60000}) {
    RateLimit limit;
    limit.set(200 * kMiB);
    __u64 moved = 0;
    __u64 ms = 0;
    for (int i = 0; i < 200; ++i) {
      limit.refill(epoch_ms * kMilli);
      ms += epoch_ms;
      moved += limit.pages();
      limit.spend(limit.pages());
      EXPECT_LT(limit.pages(), 1u);
    }
    EXPECT_NEAR(static_cast<double>(moved * HT_PAGE_SIZE), 200.0 * kMiB * static_cast<double>(ms) / 1000, 4.0 * kMiB)
        << epoch_ms;
  }
}

TEST(RateLimit, KeepsASecondOfIdleTime) {
  RateLimit limit;
  limit.set(100 * kMiB);
  for (int i = 0; i < 100; ++i) limit.refill(500 * kMilli);
  EXPECT_EQ(limit.pages(), 100 * kMiB / HT_PAGE_SIZE);
}

// However low the rate: a pair of huge pages gets through in the end.
TEST(RateLimit, LetsALargePairPass) {
  RateLimit limit;
  limit.set(kMiB);
  int epochs = 0;
  for (; limit.pages() < 2 * HT_GRANULE_PAGES && epochs < 100; ++epochs) limit.refill(500 * kMilli);
  EXPECT_EQ(epochs, 8);
}

TEST(RateLimit, SurvivesAbsurdNumbers) {
  RateLimit limit;
  limit.set(~0ULL);
  limit.refill(~0ULL);
  EXPECT_GT(limit.pages(), 1ULL << 40);
  limit.spend(~0ULL / HT_PAGE_SIZE);
  limit.refill(~0ULL);
  EXPECT_GT(limit.pages(), 1ULL << 40);
}

TEST(MoveHistory, KnowsAMoveBack) {
  MoveHistory history(1024);
  EXPECT_FALSE(history.reverses(7, 0x1000, HT_TIER_SLOW, 1, 8));
  history.moved(7, 0x1000, HT_TIER_FAST, 10);
  EXPECT_TRUE(history.reverses(7, 0x1000, HT_TIER_SLOW, 11, 8));
  EXPECT_TRUE(history.reverses(7, 0x1000, HT_TIER_SLOW, 18, 8));
  EXPECT_FALSE(history.reverses(7, 0x1000, HT_TIER_SLOW, 19, 8));   // too long ago
  EXPECT_FALSE(history.reverses(7, 0x1000, HT_TIER_FAST, 11, 8));   // the same way
  EXPECT_FALSE(history.reverses(8, 0x1000, HT_TIER_SLOW, 11, 8));   // another space
  EXPECT_FALSE(history.reverses(7, 0x2000, HT_TIER_SLOW, 11, 8));   // another page
  history.moved(7, 0x1000, HT_TIER_SLOW, 12);
  EXPECT_TRUE(history.reverses(7, 0x1000, HT_TIER_FAST, 12, 8));
}

// It forgets rather than grows, and never takes one page for another.
TEST(MoveHistory, IsBounded) {
  MoveHistory history(256);
  for (__u64 page = 1; page <= 100'000; ++page) history.moved(1, page << HT_PAGE_SHIFT, HT_TIER_FAST, 1);
  int known = 0;
  for (__u64 page = 1; page <= 200'000; ++page)
    known += history.reverses(1, page << HT_PAGE_SHIFT, HT_TIER_SLOW, 1, 8);
  EXPECT_EQ(known, 256);
}

// Of a bucket that is full, what was moved last stays.
TEST(MoveHistory, ForgetsTheOldest) {
  MoveHistory history(4096);
  history.expect(4096);
  for (__u64 epoch = 0; epoch < 40; ++epoch)
    for (__u64 page = 1; page <= 300; ++page) history.moved(1, epoch << 30 | page << HT_PAGE_SHIFT, HT_TIER_FAST, epoch);
  int known = 0;
  for (__u64 epoch = 31; epoch < 40; ++epoch)
    for (__u64 page = 1; page <= 300; ++page) known += history.reverses(1, epoch << 30 | page << HT_PAGE_SHIFT, HT_TIER_SLOW, 40, 10);
  EXPECT_GT(known, 9 * 300 * 95 / 100);
}

TEST(MoveHistory, NeighboursDoNotCollide) {
  MoveHistory history(1 << 14);
  history.expect(1 << 14);
  for (__u64 page = 0; page < 4096; ++page) history.moved(3, (0x7f0000000000 + (page << HT_PAGE_SHIFT)), HT_TIER_FAST, 5);
  int known = 0;
  for (__u64 page = 0; page < 4096; ++page)
    known += history.reverses(3, (0x7f0000000000 + (page << HT_PAGE_SHIFT)), HT_TIER_SLOW, 6, 8);
  EXPECT_EQ(known, 4096);
}

// As many pages of a hot set as fit into half of the table: most are remembered.
TEST(MoveHistory, PagesOfAHotSetDoNotCollide) {
  MoveHistory history(1 << 16);
  history.expect(1 << 16);
  std::vector<__u64> pages;
  for (__u64 page = 0; page < 3 << 15; page += 3) pages.push_back(0x7f1234560000 + (page << HT_PAGE_SHIFT));
  for (__u64 page : pages) history.moved(7, page, HT_TIER_FAST, 5);
  const auto known = std::count_if(pages.begin(), pages.end(), [&](__u64 page) { return history.reverses(7, page, HT_TIER_SLOW, 6, 8); });
  EXPECT_GT(known, static_cast<long>(pages.size()) * 99 / 100);
}

TEST(ShiftWatch, ToldWhenFastMemorySuddenlyHasLess) {
  ShiftWatch watch;
  EXPECT_FALSE(watch.epoch(10, 1000)) << "nothing was known";
  for (__u64 fast = 100; fast <= 900; fast += 100) EXPECT_FALSE(watch.epoch(fast, 1000)) << "it rises";
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(watch.epoch(900, 1000));
  EXPECT_FALSE(watch.epoch(0, 20)) << "too few to tell";
  EXPECT_FALSE(watch.epoch(720, 1000)) << "somewhat less";
  for (int i = 0; i < 20; ++i) watch.epoch(900, 1000);
  EXPECT_TRUE(watch.epoch(200, 1000));
  EXPECT_FALSE(watch.epoch(200, 1000)) << "once";
}

TEST(ShiftWatch, NotByChance) {
  ShiftWatch watch;
  std::mt19937 rng(1);
  for (int i = 0; i < 10000; ++i) EXPECT_FALSE(watch.epoch(std::binomial_distribution<__u64>(100, 0.3)(rng), 100)) << i;
}

TEST(Conduct, SilenceIsToldFromIdleness) {
  Conduct conduct({.silent_epochs = 3, .silent_samples = 10});
  conduct.begin(1);
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(conduct.classified(9, false, false));  // nothing to classify
  EXPECT_FALSE(conduct.classified(10, false, false));
  EXPECT_FALSE(conduct.classified(10, false, false));
  EXPECT_FALSE(conduct.classified(10, true, false));  // heat
  EXPECT_FALSE(conduct.classified(10, false, false));
  EXPECT_FALSE(conduct.classified(10, false, false));
  EXPECT_FALSE(conduct.classified(10, false, true));  // a split
  EXPECT_FALSE(conduct.classified(10, false, false));
  EXPECT_FALSE(conduct.classified(3, false, false));  // neither counts nor excuses
  EXPECT_FALSE(conduct.classified(10, false, false));
  auto verdict = conduct.classified(10, false, false);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->code, TIER_CODE_NEVER_CLASSIFIES);
  EXPECT_EQ(verdict->message, "no range was given heat or an action in 3 epochs with samples");
  EXPECT_FALSE(conduct.begin(1));
  EXPECT_TRUE(conduct.classified(10, false, false));
  EXPECT_TRUE(conduct.begin(2));
  EXPECT_FALSE(conduct.classified(10, false, false));
}

TEST(Conduct, RestlessnessNeedsAllOfIt) {
  Conduct conduct({.restless_epochs = 3, .restless_window_epochs = 4});
  conduct.begin(1);
  for (int i = 0; i < 100; ++i) {
    EXPECT_FALSE(conduct.asked(1000, 499, 100));  // many moves, most of them new
    EXPECT_FALSE(conduct.asked(99, 99, 100));     // few, all back
    EXPECT_FALSE(conduct.asked(0, 0, 0));
  }
  EXPECT_FALSE(conduct.asked(1000, 500, 100));
  EXPECT_FALSE(conduct.asked(1000, 500, 100));
  EXPECT_FALSE(conduct.asked(1000, 400, 100));
  EXPECT_FALSE(conduct.asked(0, 0, 100));
  EXPECT_FALSE(conduct.asked(1000, 900, 100));
  EXPECT_FALSE(conduct.asked(1000, 900, 100));
  EXPECT_FALSE(conduct.asked(1000, 400, 100));
  auto verdict = conduct.asked(1000, 901, 100);
  ASSERT_TRUE(verdict);
  EXPECT_EQ(verdict->code, TIER_CODE_BUDGET);
  EXPECT_EQ(verdict->message, "3 of 4 epochs: now 1000 pages to move, 100 allowed, 901 of them back");
}

std::vector<tier_range> ranges(__u64 space, std::initializer_list<std::pair<__u64, __u64>> bounds, __u32 heat) {
  std::vector<tier_range> list;
  for (auto [start, end] : bounds) {
    tier_range range{};
    range.space = space;
    range.start = start;
    range.end = end;
    range.heat = heat;
    range.tier_pages[HT_TIER_FAST] = range.tier_pages[HT_TIER_SLOW] = HT_UNKNOWN64;
    list.push_back(range);
  }
  return list;
}

TEST(History, FollowsAnAddressThroughASplit) {
  History history(16, 1000);
  auto one = ranges(5, {{0x0, 0x4000}}, 1);
  history.add(1, 7, one, nullptr, {});
  auto two = ranges(5, {{0x0, 0x2000}, {0x2000, 0x4000}}, 2);
  two[1].tier_pages[HT_TIER_FAST] = 2;
  two[1].tier_pages[HT_TIER_SLOW] = 0;
  const History::Moved moved{1, 2, 0};
  history.add(2, 8, two, nullptr, {&moved, 1});
  auto found = history.of(5, 0x3000);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].epoch, 2u);
  EXPECT_EQ(found[0].start, 0x2000u);
  EXPECT_EQ(found[0].promoted_pages, 2u);
  EXPECT_EQ(found[0].fast_pages, 2u);
  EXPECT_EQ(found[0].cut_heat, 8u);
  EXPECT_EQ(found[1].epoch, 1u);
  EXPECT_EQ(found[1].start, 0u);
  EXPECT_EQ(found[1].fast_pages, HT_UNKNOWN64);
  EXPECT_EQ(history.of(5, 0x1000)[0].promoted_pages, 0u);
  EXPECT_TRUE(history.of(5, 0x4000).empty());
  EXPECT_TRUE(history.of(4, 0x1000).empty());
  EXPECT_TRUE(history.of(6, 0x1000).empty());
}

TEST(History, IsBoundedInEpochsAndRanges) {
  History history(4, 10);
  auto three = ranges(1, {{0, 1}, {1, 2}, {2, 3}}, 1);
  for (__u64 epoch = 1; epoch <= 20; ++epoch) history.add(epoch, 0, three, nullptr, {});
  auto found = history.of(1, 0);
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0].epoch, 20u);
  std::vector<tier_range> many;
  for (__u64 i = 0; i < 50; ++i) many.push_back(ranges(1, {{i, i + 1}}, 1)[0]);
  history.add(21, 0, many, nullptr, {});
  EXPECT_EQ(history.of(1, 2).size(), 1u);  // the last is kept, however large
  auto one = ranges(1, {{0, 3}}, 1);
  for (__u64 epoch = 22; epoch <= 40; ++epoch) history.add(epoch, 0, one, nullptr, {});
  EXPECT_EQ(history.of(1, 2).size(), 4u);
}

}  // namespace
}  // namespace hypertier
