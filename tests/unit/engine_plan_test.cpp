// SPDX-License-Identifier: GPL-2.0-or-later
#include "engine/plan.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace hypertier {
namespace {

constexpr __u64 kHuge = 9;

// Ranges with the given heats; page() makes a page of one of them.
std::vector<tier_range> heats(std::initializer_list<__u32> values) {
  std::vector<tier_range> ranges;
  for (__u32 heat : values) {
    tier_range range{};
    range.heat = heat;
    ranges.push_back(range);
  }
  return ranges;
}

Listed page(__u32 range, __u64 number, __u64 order = 0, __u64 flags = 0) {
  return {(__u64{range} << 32) | (number << 21) | order | flags, range};
}

TEST(EnginePlan, EqualListsBecomePairs) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot = {page(0, 1), page(0, 2)};
  std::vector<Listed> cold = {page(1, 1), page(1, 2)};
  auto plan = make_plan(hot, cold, ranges, 0, 0);
  ASSERT_EQ(plan.size(), 2u);
  for (auto& entry : plan) EXPECT_TRUE(entry.hot && entry.cold);
}

TEST(EnginePlan, SizesPairWithTheirOwn) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot = {page(0, 1, kHuge), page(0, 2)};
  std::vector<Listed> cold = {page(1, 1), page(1, 2, kHuge)};
  auto plan = make_plan(hot, cold, ranges, 0, 0);
  ASSERT_EQ(plan.size(), 2u);
  for (auto& entry : plan) EXPECT_EQ(HT_PAGE_ORDER(entry.hot), HT_PAGE_ORDER(entry.cold));
}

TEST(EnginePlan, EqualsAreNotSwapped) {
  auto ranges = heats({5, 5, 7});
  std::vector<Listed> hot = {page(0, 1)};
  std::vector<Listed> cold = {page(1, 1), page(2, 1)};
  EXPECT_TRUE(make_plan(hot, cold, ranges, 0, 1000).empty());
}

TEST(EnginePlan, LeftoverTakesFreeRoomOnly) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot = {page(0, 1), page(0, 2), page(0, 3)};
  std::vector<Listed> cold = {page(1, 1)};
  auto plan = make_plan(hot, cold, ranges, 1, 1000);
  ASSERT_EQ(plan.size(), 2u);
  EXPECT_TRUE(plan[0].hot && plan[0].cold);
  EXPECT_TRUE(plan[1].hot && !plan[1].cold);
  EXPECT_EQ(plan[1].cold_range, kNoRange);
}

TEST(EnginePlan, UnequalSizesMakeRoomFirst) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot;
  for (int i = 1; i <= 600; ++i) hot.push_back(page(0, i));
  std::vector<Listed> cold = {page(1, 1, kHuge), page(1, 2, kHuge), page(1, 3, kHuge)};
  auto plan = make_plan(hot, cold, ranges, 0, 5000);
  __u64 up = 0, down = 0;
  for (auto& entry : plan) {
    EXPECT_TRUE(!entry.hot || !entry.cold);
    up += entry.hot_pages();
    down += entry.cold_pages();
    EXPECT_GE(down, up);
  }
  EXPECT_EQ(up, 600u);
  EXPECT_EQ(down, 1024u);  // two huge pages, not the third
}

TEST(EnginePlan, HugeHotPageNeedsItsWholeRoom) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot = {page(0, 1, kHuge)};
  std::vector<Listed> cold;
  for (int i = 1; i <= 511; ++i) cold.push_back(page(1, i));
  EXPECT_TRUE(make_plan(hot, cold, ranges, 0, 5000).empty());
  cold.push_back(page(1, 512));
  EXPECT_EQ(make_plan(hot, cold, ranges, 0, 5000).size(), 513u);
  EXPECT_TRUE(make_plan(hot, cold, ranges, 0, 511).empty());  // the slow tier is full
  EXPECT_TRUE(make_plan(hot, cold, ranges, 500, 5000, false).empty());
  EXPECT_EQ(make_plan(hot, cold, ranges, 600, 5000, false).size(), 1u);
}

TEST(EnginePlan, FilePagesMigrate) {
  auto ranges = heats({10, 1});
  std::vector<Listed> hot = {page(0, 1, 0, HT_PAGE_FILE)};
  std::vector<Listed> cold = {page(1, 1)};
  auto plan = make_plan(hot, cold, ranges, 0, 1000);
  ASSERT_EQ(plan.size(), 2u);
  EXPECT_TRUE(!plan[0].hot && plan[0].cold);
  EXPECT_TRUE(plan[1].hot && !plan[1].cold);
}

TEST(EnginePlan, InvariantsOnRandomLists) {
  std::mt19937 rng(1);
  for (int round = 0; round < 2000; ++round) {
    std::vector<tier_range> ranges(16);
    for (auto& range : ranges) range.heat = rng() % 8;
    auto list = [&](bool hottest_first) {
      std::vector<Listed> pages;
      for (int n = static_cast<int>(rng() % 40); n > 0; --n)
        pages.push_back(page(rng() % 16, n, rng() % 3 ? 0 : rng() % 2 ? kHuge : 4, rng() % 5 ? 0 : HT_PAGE_FILE));
      std::stable_sort(pages.begin(), pages.end(), [&](auto& a, auto& b) {
        return hottest_first ? ranges[a.range].heat > ranges[b.range].heat : ranges[a.range].heat < ranges[b.range].heat;
      });
      return pages;
    };
    auto hot = list(true);
    auto cold = list(false);
    __u64 fast_room = rng() % 1200, slow_room = rng() % 1200;
    auto plan = make_plan(hot, cold, ranges, fast_room, slow_room);

    std::set<ht_page_t> hot_used, cold_used;
    __s64 fast = static_cast<__s64>(fast_room), slow = static_cast<__s64>(slow_room);
    __u64 last = HT_UNKNOWN64, largest = 0;
    for (auto& entry : plan) {
      ASSERT_TRUE(entry.hot || entry.cold);
      if (entry.hot) {
        ASSERT_TRUE(hot_used.insert(entry.hot).second);
      }
      if (entry.cold) {
        ASSERT_TRUE(cold_used.insert(entry.cold).second);
      }
      if (entry.cold_range != kNoRange) {
        ASSERT_GT(ranges[entry.hot_range].heat, ranges[entry.cold_range].heat);
      }
      ASSERT_LE(ranges[entry.hot_range].heat, last);
      last = ranges[entry.hot_range].heat;
      if (entry.hot && entry.cold) {
        ASSERT_EQ(HT_PAGE_ORDER(entry.hot), HT_PAGE_ORDER(entry.cold));
        ASSERT_FALSE((entry.hot | entry.cold) & HT_PAGE_FILE);
        continue;
      }
      fast += static_cast<__s64>(entry.cold_pages()) - static_cast<__s64>(entry.hot_pages());
      slow += static_cast<__s64>(entry.hot_pages()) - static_cast<__s64>(entry.cold_pages());
      largest = std::max(largest, entry.cold_pages());
      ASSERT_GE(fast, 0);
      ASSERT_GE(slow, 0);
    }
    // Never demoted beyond need: what is left over is less than one folio,
    // or was free before.
    ASSERT_LE(fast, static_cast<__s64>(std::max(fast_room, largest)));
  }
}

}  // namespace
}  // namespace hypertier
