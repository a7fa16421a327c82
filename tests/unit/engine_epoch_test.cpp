// SPDX-License-Identifier: GPL-2.0-or-later
// Whole epochs on the fake machine: placement follows heat, and what it costs.
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kA = 0x100000000, kB = 0x200000000;

// Heat = samples of the epoch, or its inverse; ranges stay as mapped.
void by_samples(tier_range& r, const tier_scope&) { r.heat = r.samples; }
void inverted(tier_range& r, const tier_scope&) { r.heat = r.samples ? 100000 - std::min(99999u, r.samples) : 100001; }

// Two mappings of 8 MiB, one in each tier, fast tier exactly full. No pieces
// are left to split, so that placement is the policy's alone.
struct Two : Rig {
  Two(__u32 order = 0, EngineSettings settings = {}) : Rig(settings) {
    machine.size_pages[HT_TIER_FAST] = 8 * kMiB / HT_PAGE_SIZE;
    machine.size_pages[HT_TIER_SLOW] = 64 * kMiB / HT_PAGE_SIZE;
    machine.map(1, kA, kA + 8 * kMiB);
    machine.map(1, kB, kB + 8 * kMiB);
    start(10, 1);
    machine.populate(1, kA, kA + 8 * kMiB, HT_TIER_SLOW, order);
    machine.populate(1, kB, kB + 8 * kMiB, HT_TIER_FAST, order);
    policy.classify = by_samples;
  }
  EpochReport step(__u32 a, __u32 b) {
    if (a) source.touch(1, kA, a);
    if (b) source.touch(1, kB, b);
    return epoch();
  }
  __u64 fast(__u64 base) const { return machine.resident(1, base, base + 8 * kMiB, HT_TIER_FAST); }
};

TEST(EngineEpoch, HotGoesFastColdGoesSlow) {
  Two rig;
  for (int e = 0; e < 4; ++e) {
    auto report = rig.step(100, 1);
    EXPECT_EQ(report.decision, e < 2 ? Decision::kMoved : Decision::kAllHotFast) << decision_name(report.decision);
    EXPECT_EQ(rig.machine.used(HT_TIER_FAST), rig.machine.size_pages[HT_TIER_FAST]);
  }
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_EQ(rig.fast(kB), 0u);
  EXPECT_EQ(rig.engine.totals().promoted_pages_total, 2048u);
  EXPECT_EQ(rig.engine.totals().demoted_pages_total, 2048u);
  EXPECT_EQ(rig.engine.totals().exchanged_pairs_total, 2048u);
  EXPECT_EQ(rig.engine.totals().move_failed_pages_total, 0u);
}

// What is told to the host: the share of the samples that went to slow memory,
// by where their pages are now.
TEST(EngineEpoch, CountsByTier) {
  Two rig;
  const auto slow_share = [&](bool moves) {
    EpochInput input = rig.machine.input();
    input.moves = moves;
    input.accounts = true;
    rig.source.touch(1, kA, 90);
    rig.source.touch(1, kB, 10);
    const EpochReport report = rig.epoch(input);
    const auto fast = static_cast<double>(report.tier_counts[HT_TIER_FAST]), slow = static_cast<double>(report.tier_counts[HT_TIER_SLOW]);
    return fast + slow > 0 ? slow / (fast + slow) : -1;
  };
  double share = 0;
  for (int e = 0; e < 4; ++e) share = slow_share(false);
  EXPECT_NEAR(share, 0.9, 0.01);
  for (int e = 0; e < 12; ++e) share = slow_share(true);
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_NEAR(share, 0.1, 0.01);
}

// Room for others, of a scope without siblings (the balloon of the fast tier).
TEST(EngineEpoch, DemotesWhatOthersNeed) {
  Two rig;
  rig.step(0, 10);
  EpochInput input = rig.machine.input();
  input.accounts = true;
  input.surplus_pages = 700;
  input.fast_free_pages = 0;
  rig.source.touch(1, kB, 10);
  const EpochReport report = rig.epoch(input);
  EXPECT_EQ(report.decision, Decision::kOverBudget) << decision_name(report.decision);
  EXPECT_EQ(report.moved.demoted_pages, 700u);
  EXPECT_EQ(report.moved.promoted_pages, 0u);
  EXPECT_EQ(rig.fast(kB), 2048u - 700u);
}

TEST(EngineEpoch, InvertedHeatInvertsPlacement) {
  Two rig;
  rig.policy.classify = inverted;
  for (int e = 0; e < 14; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 0u);
  rig.policy.classify = by_samples;
  for (int e = 0; e < 14; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
  rig.policy.classify = inverted;
  for (int e = 0; e < 14; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 0u);
  EXPECT_EQ(rig.fast(kB), 2048u);
}

// A pair says whether it would take a move of the last twelve epochs back; a policy that
// waits is asked again each epoch, for nothing else is wrong with the range.
TEST(EngineEpoch, APairSaysThatItGoesBack) {
  Two rig;
  unsigned back = 0;
  rig.policy.admit = [&](const tier_range& hot, const tier_range&) {
    back += (hot.flags & TIER_RANGE_BACK) != 0;
    return !(hot.flags & TIER_RANGE_BACK);
  };
  EXPECT_EQ(rig.step(100, 1).decision, Decision::kMoved);
  for (int e = 1; e < 4; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_EQ(back, 0u);
  rig.policy.classify = inverted;
  int e = 4;
  for (; e <= 12; ++e) EXPECT_EQ(rig.step(100, 1).decision, Decision::kAllRefused) << e;
  EXPECT_GT(back, 4u);
  for (; e <= 16; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 0u);
  EXPECT_EQ(rig.fast(kB), 2048u);
}

TEST(EngineEpoch, EqualHeatMovesNothing) {
  Two rig;
  for (int e = 0; e < 5; ++e) EXPECT_EQ(rig.step(50, 50).decision, Decision::kNothingColder);
  EXPECT_EQ(rig.engine.totals().promoted_pages_total, 0u);
}

TEST(EngineEpoch, NoHeatMovesNothing) {
  Two rig;
  auto report = rig.step(0, 0);
  EXPECT_EQ(report.decision, Decision::kNoHeat);
  EXPECT_EQ(report.walks, 0u);
}

TEST(EngineEpoch, BudgetBoundsAnEpoch) {
  EngineSettings settings;
  settings.max_move_share = 0.1;
  settings.max_move_min_pages = 1;
  Two rig(0, settings);
  auto report = rig.step(100, 1);
  EXPECT_EQ(report.moved.promoted_pages, 204u);
  EXPECT_EQ(report.moved.demoted_pages, 204u);
}

TEST(EngineEpoch, HugePagesMoveWhole) {
  Two rig(9);
  for (int e = 0; e < 4; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_EQ(rig.engine.totals().exchanged_pairs_total, 4u);
  for (auto& view : rig.ranges()) EXPECT_TRUE(view.range.flags & TIER_RANGE_HUGE);
}

TEST(EngineEpoch, UnequalSizesByMigration) {
  Two rig;
  rig.machine.unmap(1, kB, kB + 8 * kMiB);
  rig.machine.map(1, kB, kB + 8 * kMiB);
  rig.machine.populate(1, kB, kB + 8 * kMiB, HT_TIER_FAST, 9);
  for (int e = 0; e < 6; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_EQ(rig.engine.totals().exchanged_pairs_total, 0u);
  EXPECT_EQ(rig.engine.totals().mover_pages_total[HT_MOVER_MIGRATE], 4096u);
}

TEST(EngineEpoch, FreeRoomIsUsedDownToTheReserve) {
  Two rig;
  rig.machine.unmap(1, kB, kB + 8 * kMiB);  // the fast tier is empty
  for (int e = 0; e < 6; ++e) rig.step(100, 0);
  EXPECT_EQ(rig.fast(kA), 2048u - 2048 / 50);
  EXPECT_EQ(rig.engine.totals().demoted_pages_total, 0u);
}

TEST(EngineEpoch, CapacityIsRespected) {
  Two rig;
  rig.machine.unmap(1, kB, kB + 8 * kMiB);
  for (int e = 0; e < 8; ++e) {
    rig.source.touch(1, kA, 100);
    auto in = rig.machine.input();
    in.fast_capacity_pages = 700;  // the scope may not have more, though there is room
    auto report = rig.epoch(in);
    EXPECT_LE(report.hot_pages, 700u);
    EXPECT_LE(rig.fast(kA), 700u);
  }
  EXPECT_EQ(rig.fast(kA), 700u);
}

TEST(EngineEpoch, HotterRangesComeFirstWhenNotAllFit) {
  Rig rig;
  rig.machine.size_pages[HT_TIER_FAST] = 4 * kGranulePages;
  rig.policy.classify = by_samples;
  rig.start(10, 1);
  for (int i = 0; i < 16; ++i) {
    __u64 base = kA + static_cast<__u64>(i) * 8 * kMiB;
    rig.machine.map(1, base, base + 2 * kMiB);
    rig.machine.populate(1, base, base + 2 * kMiB, i < 4 ? HT_TIER_FAST : HT_TIER_SLOW);
  }
  for (int e = 0; e < 10; ++e) {
    for (int i = 0; i < 16; ++i) rig.source.touch(1, kA + static_cast<__u64>(i) * 8 * kMiB, 10 * i + 10);
    rig.epoch();
  }
  for (int i = 0; i < 16; ++i) {
    __u64 base = kA + static_cast<__u64>(i) * 8 * kMiB;
    EXPECT_EQ(rig.machine.resident(1, base, base + 2 * kMiB, HT_TIER_FAST), i < 12 ? 0u : 512u) << i;
  }
}

TEST(EngineEpoch, IdleProcessesLeaveAndComeBack) {
  Rig rig;
  rig.policy.use_hyperplace();
  rig.machine.size_pages[HT_TIER_FAST] = 32 * kGranulePages;
  for (__u32 p = 0; p < 4; ++p) {
    rig.machine.map(1 + p, kA, kA + 32 * kMiB);
    rig.start(10 + p, 1 + p);
    rig.machine.populate(1 + p, kA, kA + 32 * kMiB, p < 2 ? HT_TIER_FAST : HT_TIER_SLOW);
  }
  std::mt19937 rng(1);
  auto work = [&](__u64 first) {
    for (int e = 0; e < 40; ++e) {
      for (int n = 0; n < 3000; ++n) rig.source.touch(first + rng() % 2, kA + rng() % (32 * kMiB));
      rig.epoch();
    }
  };
  auto fast = [&](__u64 space) { return rig.machine.resident(space, kA, kA + 32 * kMiB, HT_TIER_FAST); };
  work(3);
  EXPECT_EQ(fast(1) + fast(2), 0u);
  EXPECT_EQ(fast(3) + fast(4), 32 * kGranulePages);
  work(1);
  EXPECT_EQ(fast(1) + fast(2), 32 * kGranulePages);
}

TEST(EngineEpoch, RefusedPairsDoNotMoveAndAreReported) {
  Two rig;
  rig.policy.admit = [](const tier_range&, const tier_range&) { return false; };
  __u64 refused = 0;
  rig.policy.moved = [&](const tier_result& r) {
    refused += r.refused_pages;
    EXPECT_EQ(r.promoted_pages + r.demoted_pages + r.failed_pages, 0u);
  };
  auto report = rig.step(100, 1);
  EXPECT_EQ(report.decision, Decision::kAllRefused);
  EXPECT_GT(report.refused_pages, 0u);
  EXPECT_EQ(refused, 2 * report.refused_pages);
  EXPECT_EQ(rig.fast(kA), 0u);
}

TEST(EngineEpoch, WhatIsRefusedIsOfferedAndWalkedLessOften) {
  Two rig;
  int offers = 0;
  rig.policy.admit = [&](const tier_range&, const tier_range&) { return ++offers, false; };
  for (int e = 0; e < 60; ++e) EXPECT_EQ(rig.step(100, 1).decision, Decision::kAllRefused);
  EXPECT_LE(offers, 10);
  EXPECT_LE(rig.machine.walked_pages, 11u * 4096);
  rig.policy.admit = nullptr;
  for (int e = 0; e < 14; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
}

TEST(EngineEpoch, ARefusedRangeDoesNotKeepOthersWaiting) {
  Rig rig;
  rig.machine.size_pages[HT_TIER_FAST] = 1 << 14;
  rig.policy.classify = by_samples;
  rig.machine.map(1, kA, kA + 48 * kMiB);
  rig.machine.map(1, kB, kB + 2 * kMiB);
  rig.machine.map(1, kB + 256 * kMiB, kB + 320 * kMiB);
  rig.start(10, 1);
  rig.machine.populate(1, kA, kA + 48 * kMiB, HT_TIER_SLOW);
  rig.machine.populate(1, kB, kB + 2 * kMiB, HT_TIER_SLOW);
  rig.machine.populate(1, kB + 256 * kMiB, kB + 320 * kMiB, HT_TIER_FAST);
  rig.policy.admit = [](const tier_range& hot, const tier_range&) { return hot.start != kA; };
  for (int e = 0; e < 4; ++e) {
    rig.source.touch(1, kA, 1000);
    rig.source.touch(1, kB, 100);
    rig.epoch();
  }
  EXPECT_EQ(rig.machine.resident(1, kB, kB + 2 * kMiB, HT_TIER_FAST), 512u);
}

TEST(EngineEpoch, RoomThatTheKernelWithholdsIsNotAskedForAgainAndAgain) {
  Two rig;
  rig.machine.size_pages[HT_TIER_FAST] += 300;
  rig.machine.withheld_pages = 300;  // free, but below a watermark
  for (auto& [address, page] : rig.machine.spaces_by_id[1].pages)
    if (address < kB) page.file = true;  // nothing can be swapped in place
  for (int e = 0; e < 30; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u);
  EXPECT_LE(rig.engine.totals().failed_pages_total[HT_MOVE_NO_MEMORY], 400u);
}

// Small pages make room for a huge one, which finds no block of its size.
TEST(EngineEpoch, RoomIsNotMadeAgainAndAgainForAHugePageThatCannotCome) {
  Rig rig;
  rig.machine.size_pages[HT_TIER_FAST] = 2048;
  rig.policy.classify = by_samples;
  rig.machine.map(1, kA, kA + 2 * kMiB);
  rig.machine.map(1, kB, kB + 8 * kMiB);
  rig.start(10, 1);
  rig.machine.populate(1, kA, kA + 2 * kMiB, HT_TIER_SLOW, 9);
  rig.machine.populate(1, kB, kB + 8 * kMiB, HT_TIER_FAST);
  for (auto& [address, page] : rig.machine.spaces_by_id[1].pages)
    if (address < kB) page.stuck = HT_MOVE_NO_MEMORY;
  __u64 demoted = 0;
  for (int e = 0; e < 60; ++e) {
    rig.source.touch(1, kA, 1000);
    rig.source.touch(1, kB, 10);
    demoted += rig.epoch().moved.demoted_pages;
  }
  EXPECT_GE(demoted, 512u);
  EXPECT_LE(demoted, 4 * 512u);
  for (auto& [address, page] : rig.machine.spaces_by_id[1].pages) page.stuck = HT_MOVE_NONE;
  for (int e = 0; e < 80; ++e) {
    rig.source.touch(1, kA, 1000);
    rig.epoch();
  }
  EXPECT_EQ(rig.machine.resident(1, kA, kA + 2 * kMiB, HT_TIER_FAST), 512u);
}

TEST(EngineEpoch, FeedbackNamesRangesAndPages) {
  Two rig;
  std::map<__u64, tier_result> results;
  rig.policy.moved = [&](const tier_result& r) { results[r.range.start] = r; };
  auto report = rig.step(100, 1);
  ASSERT_EQ(results.size(), 2u);
  EXPECT_EQ(results[kA].promoted_pages, report.moved.promoted_pages);
  EXPECT_EQ(results[kB].demoted_pages, report.moved.demoted_pages);
}

TEST(EngineEpoch, StuckPagesAreSkippedAndCounted) {
  Two rig;
  int n = 0;
  for (auto& [address, page] : rig.machine.spaces_by_id[1].pages)
    if (address < kB && n++ < 100) page.stuck = HT_MOVE_PINNED;
  for (int e = 0; e < 6; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), 2048u - 100);
  EXPECT_GE(rig.engine.totals().failed_pages_total[HT_MOVE_PINNED], 100u);
  EXPECT_GT(rig.engine.totals().failed_pages_total[HT_MOVE_PARTNER], 0u);
}

TEST(EngineEpoch, ResidencyIsRecomputedNotAccumulated) {
  Two rig;
  for (int e = 0; e < 4; ++e) rig.step(100, 1);
  ASSERT_EQ(rig.fast(kA), 2048u);
  // Somebody else moves pages back and frees some.
  for (auto& [address, page] : rig.machine.spaces_by_id[1].pages) page.tier = address < kB ? HT_TIER_SLOW : HT_TIER_FAST;
  for (int e = 0; e < 12; ++e) {
    rig.step(100, 1);
    for (auto& view : rig.ranges())
      if (view.range.tier_pages[HT_TIER_FAST] != HT_UNKNOWN64) {
        EXPECT_LE(view.range.tier_pages[HT_TIER_FAST] + view.range.tier_pages[HT_TIER_SLOW], 2048u);
      }
  }
  EXPECT_EQ(rig.fast(kA), 2048u);
}

TEST(EngineEpoch, UnmappedMemoryIsGoneAndNewMemoryIsSeen) {
  Two rig;
  rig.step(100, 1);
  rig.machine.unmap(1, kA, kA + 8 * kMiB);
  rig.step(0, 1);
  ASSERT_EQ(rig.ranges().size(), 1u);
  EXPECT_EQ(rig.ranges()[0].range.start, kB);
  rig.machine.map(1, kA, kA + 8 * kMiB);
  rig.step(0, 1);
  ASSERT_EQ(rig.ranges().size(), 2u);
  EXPECT_EQ(rig.ranges()[0].range.count[3], 0u);  // what was counted there went with it
}

TEST(EngineEpoch, AFailedPolicyMovesNothingAndTheNextTakesOver) {
  Two rig;
  rig.policy.classify_status = -ETIME;
  auto report = rig.step(100, 1);
  EXPECT_EQ(report.decision, Decision::kPolicyFailed);
  EXPECT_EQ(report.policy_status, -ETIME);
  EXPECT_EQ(report.moved.promoted_pages, 0u);

  rig.source.touch(1, kA, 100);
  auto in = rig.machine.input();
  int calls = 0;
  in.policy_failed = [&](const ht_run& run) {
    ++calls;
    EXPECT_EQ(run.status, -ETIME);
    rig.policy.classify_status = 0;
    return true;
  };
  report = rig.epoch(in);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(report.decision, Decision::kMoved);
  EXPECT_EQ(report.policy_status, 0);
}

TEST(EngineEpoch, NoMovesStillClassifiesAndSplits) {
  Two rig;
  rig.policy.use_hyperplace();
  auto in = rig.machine.input();
  in.moves = false;
  rig.source.touch(1, kA, 1000);
  auto report = rig.epoch(in);
  EXPECT_EQ(report.decision, Decision::kNoMoves);
  EXPECT_EQ(report.splits, 1u);
  EXPECT_EQ(report.walks, 0u);
}

TEST(EngineEpoch, LargeRangesAreWalkedInSteps) {
  EngineSettings settings;
  settings.max_walk_pages = 500;
  Two rig(0, settings);
  for (int e = 0; e < 60; ++e) {
    __u64 before = rig.machine.walked_pages;
    rig.step(100, 1);
    EXPECT_LE(rig.machine.walked_pages - before, 510u);
  }
  EXPECT_EQ(rig.fast(kA), 2048u);
}

// Cost follows samples and ranges: the same samples over a footprint sixteen
// times as large cost the same.
TEST(EngineEpoch, CostFollowsSamplesNotFootprint) {
  auto cost = [](__u64 bytes) {
    Rig rig;
    rig.machine.size_pages[HT_TIER_FAST] = 16 * kGranulePages;
    rig.machine.size_pages[HT_TIER_SLOW] = 1 << 22;
    rig.policy.use_hyperplace();
    rig.start(10, 1);
    rig.machine.map(1, kA, kA + bytes);
    rig.machine.populate(1, kA, kA + 32 * kMiB, HT_TIER_FAST);
    rig.machine.populate(1, kA + 32 * kMiB, kA + bytes, HT_TIER_SLOW);
    for (int e = 0; e < 30; ++e) {
      for (int g = 0; g < 8; ++g) rig.source.touch(1, kA + 64 * kMiB + static_cast<__u64>(g) * HT_GRANULE_SIZE, 100);
      rig.epoch();
    }
    __u64 walked = rig.machine.walked_pages, visited = 0, granules = 0;
    for (int e = 0; e < 16; ++e) {
      for (int g = 0; g < 8; ++g) rig.source.touch(1, kA + 64 * kMiB + static_cast<__u64>(g) * HT_GRANULE_SIZE, 100);
      auto report = rig.epoch();
      visited += report.ranges_visited;
      granules += report.granules;
    }
    return std::array{visited, granules, rig.machine.walked_pages - walked};
  };
  auto small = cost(128 * kMiB), large = cost(2048 * kMiB);
  EXPECT_EQ(small[1], large[1]);
  EXPECT_LE(large[0], 3 * small[0]);  // a few ranges more: the halvings down to the hot place
  EXPECT_LE(large[2], small[2] + 1024);
}

TEST(EngineEpoch, CostDoesNotFollowIdleProcesses) {
  Rig rig;
  rig.policy.classify = by_samples;
  for (__u32 p = 0; p < 400; ++p) {
    for (int m = 0; m < 5; ++m)
      rig.machine.map(100 + p, kA + static_cast<__u64>(m) * 4 * kMiB, kA + static_cast<__u64>(m) * 4 * kMiB + 2 * kMiB);
    rig.start(1000 + p, 100 + p);
  }
  rig.epoch();
  auto report = rig.epoch();
  EXPECT_EQ(report.spaces_polled, 50u);
  EXPECT_EQ(report.mappings_read, 0u);
  EXPECT_EQ(report.walks, 0u);
}

TEST(EngineEpoch, RandomLifeKeepsTheContracts) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    EngineSettings settings;
    settings.min_range_bytes = seed % 2 ? HT_GRANULE_SIZE : 16 << 10;
    Rig rig(settings);
    rig.machine.size_pages[HT_TIER_FAST] = 6 * kGranulePages;
    rig.machine.size_pages[HT_TIER_SLOW] = 1 << 18;
    std::mt19937 rng(seed);
    rig.policy.classify = [&](tier_range& r, const tier_scope&) {
      r.heat = rng() % 4 ? r.samples : rng() % 1000;
      r.action = rng() % 3;
    };
    rig.policy.admit = [&](const tier_range&, const tier_range&) { return rng() % 8 != 0; };
    __u64 next_space = 1;
    std::map<__u32, __u64> alive;
    __u64 touched = 0;
    for (int e = 0; e < 150; ++e) {
      if (alive.size() < 6 && rng() % 2) {
        __u64 space = next_space++;
        __u32 pid = static_cast<__u32>(100 + space);
        rig.start(pid, space);
        alive[pid] = space;
      }
      for (auto& [pid, space] : alive) {
        __u64 start = kA + (rng() % 64) * kMiB;
        if (rng() % 4 == 0) rig.machine.unmap(space, start, start + (1 + rng() % 8) * kMiB);
        if (rng() % 3 == 0) {
          __u64 end = start + (1 + rng() % 6) * kMiB;
          rig.machine.unmap(space, start, end);
          bool file = rng() % 5 == 0;
          rig.machine.map(space, start, end, file ? TIER_RANGE_SHMEM : TIER_RANGE_ANON);
          bool room = rig.machine.used(HT_TIER_FAST) + (end - start) / HT_PAGE_SIZE <= rig.machine.size_pages[HT_TIER_FAST];
          rig.machine.populate(space, start, end, room ? HT_TIER_FAST : HT_TIER_SLOW, rng() % 2 ? 0 : 4, file);
        }
        for (int n = rng() % 200; n > 0; --n) {
          rig.source.touch(space, kA + rng() % (64 * kMiB));
          ++touched;
        }
      }
      if (!alive.empty() && rng() % 10 == 0) {
        auto victim = alive.begin();
        rig.stop(victim->first);
        alive.erase(victim);
      }
      auto report = rig.epoch();
      ASSERT_FALSE(HasFailure()) << "seed " << seed << " epoch " << e;
      EXPECT_LE(report.moved.promoted_pages, settings.max_move_min_pages);
    }
    EXPECT_EQ(rig.engine.totals().samples_total, touched);
    EXPECT_GT(rig.engine.totals().promoted_pages_total, 0u);
    for (auto& view : rig.ranges()) EXPECT_TRUE(alive.contains(view.range.pid));
    while (!alive.empty()) {
      rig.stop(alive.begin()->first);
      alive.erase(alive.begin());
    }
    rig.epoch();
    EXPECT_TRUE(rig.ranges().empty());
  }
}

}  // namespace
}  // namespace hypertier::fake
