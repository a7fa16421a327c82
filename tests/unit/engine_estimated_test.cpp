// SPDX-License-Identifier: GPL-2.0-or-later
// Estimated ranges and heattree's rules with the whole engine on a fake machine:
// heat scattered down to single pages, nothing to gain, several processes,
// memory that comes and goes.
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kSpace = 7;
constexpr __u64 kBase = 0x7f0000000000;
constexpr __u64 kPageCount = 24576;  // 96 MiB
constexpr __u64 kFast = 6144;
constexpr __u64 kHot = 4096;

// 96 MiB, 16 MiB of it hot in pieces, 90 % of the accesses hot, fast tier full
// of cold pages.
struct Scattered : Rig {
  Scattered(unsigned seed, __u64 piece_pages, double density, __u32 order = 0, EngineSettings settings = {})
      : Rig(settings), piece(piece_pages), rng(seed) {
    samples = static_cast<int>(density * kFast);
    policy.use_heattree();
    machine.size_pages[HT_TIER_FAST] = kFast;
    machine.size_pages[HT_TIER_SLOW] = kPageCount;
    machine.map(kSpace, kBase, kBase + kPageCount * HT_PAGE_SIZE);
    start(100, kSpace);
    for (__u64 i = 0; i < kPageCount / piece; ++i) pieces.push_back(i);
    std::shuffle(pieces.begin(), pieces.end(), rng);
    hot_pieces = kHot / piece;
    // the last of the order are cold: they fill the fast tier
    std::vector<bool> fast(kPageCount / piece);
    for (__u64 i = 0; i < kFast / piece; ++i) fast[pieces[pieces.size() - 1 - i]] = true;
    for (__u64 i = 0; i < pieces.size(); ++i)
      machine.populate(kSpace, page(i * piece), page((i + 1) * piece), fast[i] ? HT_TIER_FAST : HT_TIER_SLOW, order);
  }
  static __u64 page(__u64 p) { return kBase + p * HT_PAGE_SIZE; }

  EpochReport next() {
    for (int i = 0; i < samples; ++i) {
      __u64 at = rng() % 10 ? rng() % hot_pieces : hot_pieces + rng() % (pieces.size() - hot_pieces);
      source.touch(kSpace, page(pieces[at] * piece + rng() % piece));
    }
    return epoch();
  }
  __u64 run(int epochs) {
    __u64 moved = 0;
    for (int e = 0; e < epochs; ++e) moved += next().moved.promoted_pages;
    return moved;
  }
  double hot_in_fast() const {
    __u64 pages = 0;
    for (__u64 i = 0; i < hot_pieces; ++i)
      pages += machine.resident(kSpace, page(pieces[i] * piece), page((pieces[i] + 1) * piece), HT_TIER_FAST);
    return static_cast<double>(pages) / static_cast<double>(hot_pieces * piece);
  }

  __u64 piece;
  std::mt19937 rng;
  int samples = 0;
  std::vector<__u64> pieces;  // hot ones first
  __u64 hot_pieces = 0;
};

class ScatteredTest : public testing::TestWithParam<std::tuple<__u64, double, int>> {};

TEST_P(ScatteredTest, HotPiecesComeToTheFastTierAndStay) {
  auto [piece, density, epochs] = GetParam();
  Scattered s(1, piece, density);
  EXPECT_LT(s.hot_in_fast(), 0.01);
  s.run(epochs);
  EXPECT_GT(s.hot_in_fast(), 0.95);
  s.run(40);
  EXPECT_GT(s.hot_in_fast(), 0.97);
  // what is in place is left in place: 0.2 % of the tier an epoch
  EXPECT_LE(s.run(20), 20 * kFast / 500);
}

INSTANTIATE_TEST_SUITE_P(Pieces, ScatteredTest,
                         testing::Values(std::tuple{512ULL, 0.05, 40}, std::tuple{16ULL, 0.05, 50},
                                         std::tuple{1ULL, 0.2, 40}, std::tuple{16ULL, 0.2, 25}));

// The capacity's last page is a cold one: rates around it differ by chance, and
// ranges for each of these would leave none for the pages that are hot.
TEST(Estimated, FewRangesStillTellHotPagesFromCold) {
  for (double density : {0.15, 0.3}) {
    EngineSettings settings;
    settings.max_estimated_ranges = kPageCount / 100;
    Scattered s(1, 1, density, 0, settings);
    s.run(60);
    EXPECT_GT(s.hot_in_fast(), 0.9) << density;
    s.run(20);
    EXPECT_GT(s.hot_in_fast(), 0.9) << density;
  }
}

TEST(Estimated, EachPageIsInOneRangeOfItsMapping) {
  Scattered s(2, 1, 0.2);
  s.run(20);
  auto views = s.ranges();
  ASSERT_GT(views.size(), 100U);
  EXPECT_LT(views.size(), kPageCount / 8);  // not each page has one of its own
  __u64 pages = 0;
  const tier_range* before = nullptr;
  for (const RangeView& view : views) {
    const tier_range& range = view.range;
    EXPECT_GE(range.start, kBase);
    EXPECT_LT(range.start, range.end);
    EXPECT_LE(range.end, kBase + kPageCount * HT_PAGE_SIZE);
    // Those that share a stretch share all of it.
    if (before && range.start < before->end) {
      EXPECT_EQ(range.start, before->start);
      EXPECT_EQ(range.end, before->end);
      EXPECT_TRUE(range.flags & before->flags & TIER_RANGE_SCATTERED);
    }
    const __u64 here = range.tier_pages[HT_TIER_FAST] + range.tier_pages[HT_TIER_SLOW];
    EXPECT_EQ(range.mapped_pages, here);
    pages += here;
    before = &range;
  }
  EXPECT_EQ(pages, kPageCount);
}

TEST(Estimated, NoSamplesNoMoves) {
  Scattered s(3, 16, 0);
  EXPECT_EQ(s.run(30), 0U);
}

// Everything equally hot, or hot for one epoch only: nothing can be gained, and
// little is moved to find that out.
TEST(Estimated, NothingToGainNothingMoved) {
  Scattered even(4, 1, 0);
  Scattered sweep(4, 1, 0);
  __u64 even_moved = 0;
  __u64 sweep_moved = 0;
  for (int e = 0; e < 80; ++e) {
    for (int i = 0; i < 1200; ++i) {
      even.source.touch(kSpace, Scattered::page(even.rng() % kPageCount));
      sweep.source.touch(kSpace, Scattered::page((e * 1200ULL + i) % kPageCount));
    }
    __u64 even_now = even.epoch().moved.promoted_pages;
    __u64 sweep_now = sweep.epoch().moved.promoted_pages;
    if (e < 30) continue;
    even_moved += even_now;
    sweep_moved += sweep_now;
  }
  EXPECT_LE(even_moved, 50 * kFast / 500);
  EXPECT_LE(sweep_moved, 50 * kFast / 500);
}

TEST(Estimated, HugePagesMoveWhole) {
  Scattered s(5, 512, 0.2, 9);
  s.run(40);
  EXPECT_GT(s.hot_in_fast(), 0.95);
  for (const ht_pair& pair : s.machine.last_pairs) {
    EXPECT_EQ(pair.hot_addr % HT_GRANULE_SIZE, 0U);
    EXPECT_EQ(pair.cold_addr % HT_GRANULE_SIZE, 0U);
  }
}

// A third of the huge pages has one hot 64 KiB piece each: the part comes to fast
// memory by itself. The others, cold or hot all over, stay whole.
struct Huge : Rig {
  static constexpr __u64 kHuge = 48, kSkewed = 16, kEven = 4;
  explicit Huge(heattree_settings settings = HEATTREE_DEFAULTS) {
    policy.use_heattree(settings);
    machine.size_pages[HT_TIER_FAST] = (kEven + 1) * HT_GRANULE_PAGES;  // no skewed one fits in whole
    machine.size_pages[HT_TIER_SLOW] = kHuge * HT_GRANULE_PAGES;
    machine.map(kSpace, kBase, start_of(kHuge));
    start(100, kSpace);
    for (__u64 h = 0; h < kHuge; ++h)  // the last are fast, and cold
      machine.populate(kSpace, start_of(h), start_of(h + 1), h >= kHuge - kEven ? HT_TIER_FAST : HT_TIER_SLOW, 9);
  }
  static __u64 start_of(__u64 huge) { return kBase + huge * HT_GRANULE_SIZE; }
  void run(int epochs) {
    for (int e = 0; e < epochs; ++e) {
      for (int i = 0; i < 1500; ++i) {
        const __u64 r = rng() % 20;
        const __u64 page = r < 10 ? rng() % kSkewed * HT_GRANULE_PAGES + 96 + rng() % 16
                         : r < 18 ? (kSkewed + rng() % kEven) * HT_GRANULE_PAGES + rng() % HT_GRANULE_PAGES
                                  : rng() % (kHuge * HT_GRANULE_PAGES);
        source.touch(kSpace, kBase + page * HT_PAGE_SIZE);
      }
      epoch();
    }
  }
  __u64 whole(__u64 first, __u64 last) const {
    __u64 n = 0;
    for (__u64 h = first; h < last; ++h) n += machine.spaces_by_id.at(kSpace).pages.at(start_of(h)).order == 9;
    return n;
  }
  __u64 hot_parts_in_fast() const {
    __u64 pages = 0;
    for (__u64 h = 0; h < kSkewed; ++h)
      pages += machine.resident(kSpace, start_of(h) + 96 * HT_PAGE_SIZE, start_of(h) + 112 * HT_PAGE_SIZE, HT_TIER_FAST);
    return pages;
  }
  std::mt19937 rng{1};
};

TEST(Estimated, HugePagesThatAreHotInAPartAreTakenApart) {
  Huge rig;
  rig.run(80);
  EXPECT_LE(rig.whole(0, Huge::kSkewed), 1u);
  EXPECT_EQ(rig.whole(Huge::kSkewed, Huge::kSkewed + Huge::kEven), Huge::kEven);
  EXPECT_GE(rig.whole(Huge::kSkewed, Huge::kHuge), Huge::kHuge - Huge::kSkewed - 1);
  EXPECT_GE(rig.hot_parts_in_fast(), Huge::kSkewed * 16 * 9 / 10);
  EXPECT_EQ(rig.engine.totals().split_pages_total,
            (Huge::kHuge - rig.whole(0, Huge::kHuge)) * HT_GRANULE_PAGES);
}

TEST(Estimated, HugePagesStayWholeWhereSplittingDoesNotPay) {
  heattree_settings settings = HEATTREE_DEFAULTS;
  settings.split_swaps = 1 << 20;
  Huge rig(settings);
  rig.run(40);
  EXPECT_EQ(rig.whole(0, Huge::kHuge), Huge::kHuge);
}

// heat is the only key: turned over, so is the placement.
TEST(Estimated, ATurnedHeatTurnsThePlacement) {
  Scattered s(6, 16, 0.2);
  s.policy.classify = [](tier_range& r, const tier_scope&) { r.heat = HT_UNKNOWN32 - r.rate; };
  s.policy.admit = {};
  // The hot ones start fast.
  std::vector<__u64> turned(s.pieces.rbegin(), s.pieces.rend());
  s.pieces = turned;
  EXPECT_GT(s.hot_in_fast(), 0.95);
  s.run(60);
  EXPECT_LT(s.hot_in_fast(), 0.1);
}

TEST(Estimated, WhatIsUnmappedIsForgotten) {
  Scattered s(7, 16, 0.2);
  s.run(10);
  const __u64 half = kBase + kPageCount / 2 * HT_PAGE_SIZE;
  s.machine.unmap(kSpace, half, kBase + kPageCount * HT_PAGE_SIZE);
  s.source.granules.clear();
  s.source.touch(kSpace, kBase);  // a sample has its mappings read again
  s.epoch();
  s.epoch();
  s.epoch();
  for (const RangeView& view : s.ranges()) EXPECT_LE(view.range.end, half);
  s.stop(100);
  s.epoch();
  s.epoch();
  EXPECT_TRUE(s.ranges().empty());
}

TEST(Estimated, PoliciesOfBothKindsTakeTurns) {
  Scattered s(8, 512, 0.2);
  s.run(10);
  s.policy.use_hyperplace();
  ++s.policy.generation;
  s.run(20);
  EXPECT_GT(s.hot_in_fast(), 0.9);
  s.policy.use_heattree();
  ++s.policy.generation;
  s.run(30);
  EXPECT_GT(s.hot_in_fast(), 0.95);
}

// Fast memory goes by rate, not by size: a small busy process gets all of what
// it uses, a large one that is less busy the rest; one that stopped gives back.
TEST(Estimated, ProcessesShareByRate) {
  Rig rig;
  rig.policy.use_heattree();
  rig.machine.size_pages[HT_TIER_FAST] = 8192;
  rig.machine.size_pages[HT_TIER_SLOW] = 65536;
  const __u64 size[3] = {2048, 16384, 8192};
  for (__u64 p = 0; p < 3; ++p) {
    rig.machine.map(10 + p, kBase, kBase + size[p] * HT_PAGE_SIZE);
    rig.start(static_cast<__u32>(100 + p), 10 + p);
    rig.machine.populate(10 + p, kBase, kBase + size[p] * HT_PAGE_SIZE, p == 2 ? HT_TIER_FAST : HT_TIER_SLOW);
  }
  std::mt19937 rng(1);
  for (int e = 0; e < 60; ++e) {
    for (int i = 0; i < 600; ++i) {
      rig.source.touch(10, kBase + rng() % size[0] * HT_PAGE_SIZE);
      rig.source.touch(11, kBase + rng() % size[1] * HT_PAGE_SIZE);
    }
    rig.epoch();
  }
  auto fast = [&](__u64 p) { return rig.machine.resident(10 + p, kBase, kBase + size[p] * HT_PAGE_SIZE, HT_TIER_FAST); };
  EXPECT_GE(fast(0), size[0] * 95 / 100);
  EXPECT_LE(fast(2), size[2] / 10);
  EXPECT_GE(fast(1), 8192 - size[0] - size[2] / 10 - 200);
}

// A program that grows, and uses what it has just got, or what it always had.
struct Growing : Rig {
  // hidden: free pages that the kernel does not give out, and does not tell of.
  explicit Growing(bool young_hot, __u64 hidden_pages = 0) : young(young_hot), hidden(hidden_pages) {
    policy.use_heattree();
    machine.size_pages[HT_TIER_FAST] = 4096;
    machine.size_pages[HT_TIER_SLOW] = 65536;
    machine.map(kSpace, kBase, kBase + 65536 * HT_PAGE_SIZE);
    start(100, kSpace);
    grow(8192);
  }
  // Where there is room, as the kernel does. Of the pages, so many came to be fast.
  __u64 grow(__u64 pages) {
    const __u64 free = machine.size_pages[HT_TIER_FAST] - machine.used(HT_TIER_FAST);
    const __u64 fast = std::min(pages, size ? free - std::min(free, hidden) : free);
    machine.populate(kSpace, page(size), page(size + fast), HT_TIER_FAST);
    machine.populate(kSpace, page(size + fast), page(size + pages), HT_TIER_SLOW);
    size += pages;
    return fast;
  }
  __u64 next() {
    const __u64 fast = grow(kGrowth);
    for (int i = 0; i < 300; ++i) {
      // old: the first 1,024 pages, which are in fast memory from the start
      __u64 at = rng() % 10 == 0 ? rng() % size : young ? size - 1 - rng() % (4 * kGrowth) : rng() % 1024;
      source.touch(kSpace, page(at));
    }
    epoch();
    return fast;
  }
  static __u64 page(__u64 p) { return kBase + p * HT_PAGE_SIZE; }
  static constexpr __u64 kGrowth = 64;
  bool young;
  __u64 hidden;
  __u64 size = 0;
  std::mt19937 rng{1};
};

TEST(Estimated, RoomIsMadeForWhatComes) {
  Growing hot(true);
  Growing cold(false);
  __u64 landed_hot = 0;
  __u64 landed_cold = 0;
  for (int e = 0; e < 60; ++e) {
    const __u64 h = hot.next();
    const __u64 c = cold.next();
    if (e < 20) continue;
    landed_hot += h;
    landed_cold += c;
  }
  EXPECT_GE(landed_hot, 40 * Growing::kGrowth * 9 / 10);
  EXPECT_EQ(landed_cold, 0U);
  EXPECT_EQ(cold.machine.resident(kSpace, kBase, kBase + 1024 * HT_PAGE_SIZE, HT_TIER_FAST), 1024U);
}

TEST(Estimated, AProcessThatHasJustStartedPromisesNothing) {
  Rig rig;
  rig.policy.use_heattree();
  rig.epoch();
  __u64 most = 0;
  auto live = [&](__u32 pid, int epochs) {
    const __u64 space = 1000 + pid;
    most = 0;
    rig.machine.map(space, kBase, kBase + 16384 * HT_PAGE_SIZE);
    rig.start(pid, space);
    for (int e = 0; e < epochs; ++e) {
      const __u64 from = kBase + static_cast<__u64>(e) * 256 * HT_PAGE_SIZE;
      rig.machine.populate(space, from, from + 256 * HT_PAGE_SIZE, HT_TIER_SLOW);
      for (__u64 p = 0; p < 256; ++p) rig.source.touch(space, from + p * HT_PAGE_SIZE);
      most = std::max(most, rig.epoch().coming_pages);
    }
    rig.stop(pid);
  };
  for (__u32 pid = 200; pid < 210; ++pid) {
    live(pid, 3);
    EXPECT_EQ(most, 0U);
  }
  live(300, 12);
  EXPECT_GT(most, 0U);
}

// Where the kernel keeps more than it tells, what landed in slow memory tells it.
TEST(Estimated, RoomThatIsNotGivenOutIsMadeAgain) {
  Growing s(true, 200);
  __u64 landed = 0;
  for (int e = 0; e < 60; ++e) {
    const __u64 fast = s.next();
    if (e >= 20) landed += fast;
  }
  EXPECT_GE(landed, 40 * Growing::kGrowth * 8 / 10);
}

// Over its bound a scope gives up its coldest pages, and knows at once what it has.
TEST(Estimated, ABoundIsKept) {
  Scattered s(9, 16, 0.2);
  s.run(40);
  ASSERT_GT(s.hot_in_fast(), 0.95);
  auto bounded = [&] {
    auto in = s.machine.input();
    in.accounts = true;
    in.fast_max_pages = kFast * 3 / 4;
    return s.epoch(in);
  };
  auto report = bounded();
  EXPECT_EQ(report.over_pages, kFast / 4);
  EXPECT_EQ(s.machine.used(HT_TIER_FAST), kFast * 3 / 4);
  EXPECT_EQ(report.demand.fast_pages, s.machine.used(HT_TIER_FAST));
  EXPECT_EQ(report.demand.slow_pages, s.machine.used(HT_TIER_SLOW));
  EXPECT_GT(s.hot_in_fast(), 0.95);
  report = bounded();
  EXPECT_EQ(report.over_pages, 0U);
  EXPECT_EQ(report.scope.tier_pages[HT_TIER_FAST], s.machine.used(HT_TIER_FAST));
}

// Pages are on trial in a dry run too, and stay known to be where they are.
TEST(Estimated, ADryRunTriesAndMovesNothing) {
  Scattered s(10, 16, 0.2);
  s.run(3);
  const double before = s.hot_in_fast();
  auto in = s.machine.input();
  in.dry_run = true;
  EpochReport report;
  __u64 dry = 0;
  __u64 tried = 0;
  for (int e = 0; e < 5; ++e) {
    report = s.epoch(in);
    EXPECT_EQ(report.moved.nr, 0U);
    dry += report.dry_run_pages;
    tried += report.scope.trial_pages[HT_TIER_SLOW];
  }
  EXPECT_GT(tried, 0U);
  EXPECT_EQ(s.hot_in_fast(), before);
  EXPECT_EQ(report.scope.tier_pages[HT_TIER_FAST], s.machine.used(HT_TIER_FAST));
}

// The plan's pairs are all asked about, in as many calls as they need: here each mapping
// of seven pages has ranges of its own.
TEST(Estimated, PairsOfSinglePagesAreAllAskedAbout) {
  Scattered s(11, 1, 0.2);
  s.machine.unmap(kSpace, kBase, kBase + kPageCount * HT_PAGE_SIZE);
  for (__u64 i = 0; i < kPageCount; i += 8) {
    s.machine.map(kSpace, Scattered::page(i), Scattered::page(i + 7));
    s.machine.populate(kSpace, Scattered::page(i), Scattered::page(i + 7), i < kFast ? HT_TIER_FAST : HT_TIER_SLOW);
  }
  __u64 asked = 0;
  s.policy.admit = [&](tier_range& hot, const tier_range&) {
    EXPECT_EQ(hot.action, TIER_KEEP);
    ++asked;
    hot.action = TIER_TRY;
    return false;
  };
  s.run(5);
  asked = 0;
  EXPECT_GT(s.next().refused_pages, 0U);
  EXPECT_GT(asked, 2U * HT_CALL_PAIRS);
  __u64 tried = 0;
  for (int e = 0; e < 4; ++e) tried += s.next().scope.trial_pages[HT_TIER_SLOW];
  EXPECT_GT(tried, 0U);
}

// A policy that leaves after admit, in the middle of an epoch: its successor is
// not told what the pages brought that it had put on trial.
TEST(Estimated, WhatAPolicyThatLeftTriedIsForgotten) {
  EngineSettings settings;
  settings.max_move_share = 1;  // all that it wants, and takes back
  Scattered s(12, 16, 0.2, 0, settings);
  s.run(5);
  s.policy.classify = [](tier_range& r, const tier_scope& scope) {
    r.heat = scope.epoch & 1 ? r.rate : HT_UNKNOWN32 - r.rate;
  };
  s.policy.admit = [](tier_range&, const tier_range&) { return true; };
  bool left = false;
  EpochReport report;
  __u64 tried = 0;
  for (int e = 0; e < 64 && !left; ++e) {
    auto in = s.machine.input();
    in.policy_failed = [&](const ht_run& run) {
      EXPECT_EQ(run.exit.code, TIER_CODE_BUDGET);
      left = true;
      s.policy.use_heattree();
      s.policy.admit = [](tier_range&, const tier_range&) { return false; };
      ++s.policy.generation;
      return true;
    };
    report = s.epoch(in);
    tried += report.scope.trial_pages[HT_TIER_SLOW];
  }
  ASSERT_TRUE(left);
  EXPECT_EQ(report.moved.nr, 0U);
  EXPECT_GT(tried, 0U);
  for (int e = 0; e < 5; ++e) EXPECT_EQ(s.next().scope.trial_pages[HT_TIER_SLOW], 0U);
}

// A process that is gone before its second epoch is never walked.
TEST(Estimated, AShortLivedProcessCostsNothing) {
  Rig rig;
  rig.policy.use_heattree();
  rig.epoch();
  rig.machine.map(10, kBase, kBase + 4096 * HT_PAGE_SIZE);
  rig.machine.populate(10, kBase, kBase + 4096 * HT_PAGE_SIZE, HT_TIER_FAST);
  rig.start(100, 10);
  EXPECT_EQ(rig.epoch().walks, 0U);
  rig.stop(100);
  rig.epoch();
  EXPECT_EQ(rig.machine.walked_pages, 0U);
  EXPECT_TRUE(rig.ranges().empty());
}

// Processes of 2 MiB, as hot as wanted, of which some are born in each epoch and die in
// the next one or in the one after.
struct Brood {
  Scattered& rig;
  double rate;  // samples of a page and epoch
  __u32 next_pid = 1000;
  std::map<__u32, int> alive{};  // epochs left
  __u64 dead = 0;

  static __u64 space_of(__u32 pid) { return 1'000'000 + pid; }
  void born(int epochs) {
    const __u32 pid = next_pid++;
    rig.machine.map(space_of(pid), kBase, kBase + HT_GRANULE_SIZE);
    const __u64 fast = std::min<__u64>(kGranulePages, rig.machine.size_pages[HT_TIER_FAST] - rig.machine.used(HT_TIER_FAST));
    rig.machine.populate(space_of(pid), kBase, kBase + fast * HT_PAGE_SIZE, HT_TIER_FAST);
    rig.machine.populate(space_of(pid), kBase + fast * HT_PAGE_SIZE, kBase + HT_GRANULE_SIZE, HT_TIER_SLOW);
    rig.start(pid, space_of(pid));
    alive[pid] = epochs;
  }
  EpochReport epoch(int births) {
    for (int i = 0; i < births; ++i) born(1 + i % 2);
    for (const auto& [pid, epochs] : alive)
      for (int i = 0; i < static_cast<int>(rate * kGranulePages); ++i)
        rig.source.touch(space_of(pid), kBase + rig.rng() % kGranulePages * HT_PAGE_SIZE);
    const EpochReport report = rig.next();
    for (auto one = alive.begin(); one != alive.end();) {
      if (--one->second) {
        ++one;
        continue;
      }
      rig.stop(one->first);
      one = alive.erase(one);
      ++dead;
    }
    return report;
  }
};

// As warm as between hot and cold, and as hot as what is hot.
TEST(Estimated, ManyShortLivedProcessesCostNothing) {
  for (double rate : {0.05, 0.25}) {
    Scattered rig(1, 16, 0.2);
    rig.run(40);
    const double before = rig.hot_in_fast();
    EpochReport alone, after;
    auto cost = [&](EpochReport& report) {  // pages walked, and ranges visited
      const __u64 walked = rig.machine.walked_pages;
      __u64 visited = 0;
      for (int e = 0; e < 16; ++e) visited += (report = rig.next()).ranges_visited;
      return std::pair{rig.machine.walked_pages - walked, visited};
    };
    const auto [walked_alone, visited_alone] = cost(alone);
    Brood brood{rig, rate};
    __u64 moved = 0;
    double hot = 0;
    constexpr int kEpochs = 50;
    for (int e = 0; e < kEpochs; ++e) {
      moved += brood.epoch(4).moved.promoted_pages;
      hot += rig.hot_in_fast();
    }
    while (!brood.alive.empty()) brood.epoch(0);
    EXPECT_EQ(brood.dead, 4U * kEpochs);
    EXPECT_GE(hot / kEpochs, before - 0.01) << rate;
    EXPECT_LE(moved, brood.dead * kGranulePages / 32) << rate;
    rig.next();
    const auto [walked, visited] = cost(after);
    EXPECT_EQ(after.estimate_bytes, alone.estimate_bytes) << rate;
    EXPECT_EQ(after.scope.processes, alone.scope.processes);
    EXPECT_LE(walked, walked_alone * 11 / 10);
    EXPECT_LE(visited, visited_alone * 5 / 4);  // how many are equal at the cut changes by chance
    for (const RangeView& view : rig.ranges()) EXPECT_EQ(view.range.space, kSpace);
  }
}

TEST(Heattree, MovesGoOnWhileTheyPay) {
  heattree_settings settings = HEATTREE_DEFAULTS;
  tier_scope scope{};
  scope.period = 64;
  scope.swap_ns = 8500;
  auto after = [&](__u64 hot, __u64 cold, int epochs) {
    heattree_trial trial{};
    scope.trial_pages[HT_TIER_SLOW] = 1000;
    scope.trial_hits[HT_TIER_SLOW] = hot;
    scope.trial_hits[HT_TIER_FAST] = cold;
    for (int e = 0; e < epochs; ++e) heattree_judge(&trial, &scope, &settings);
    return trial.open != 0;
  };
  EXPECT_TRUE(after(0, 0, 6));      // no proof asked for yet
  EXPECT_FALSE(after(50, 50, 40));  // nothing gained
  EXPECT_FALSE(after(0, 100, 40));
  EXPECT_TRUE(after(300, 20, 40));
  // 1000 swaps cost 50 accesses each, in 64 x 40 a sample: 19.5 samples an epoch
  EXPECT_FALSE(after(35, 20, 200));
  EXPECT_TRUE(after(45, 20, 200));
}

// Accessed bits tell in some epochs only: the others change nothing. Samples that do not
// come tell that nothing is gained any more.
TEST(Heattree, EpochsThatTellNothingAreNotForgottenIn) {
  heattree_settings settings = HEATTREE_DEFAULTS;
  for (__u32 period : {0U, 64U})
    for (__u64 hot : {20, 400}) {
      heattree_trial trial{};
      tier_scope scope{};
      scope.period = period;
      scope.trial_hits[HT_TIER_SLOW] = hot;
      scope.trial_hits[HT_TIER_FAST] = 100;
      scope.trial_pages[HT_TIER_SLOW] = 1000;
      for (int e = 0; e < 12; ++e) heattree_judge(&trial, &scope, &settings);
      EXPECT_EQ(trial.open != 0, hot > 100);
      const heattree_sum before = trial.all;
      scope.trial_pages[HT_TIER_SLOW] = scope.trial_hits[HT_TIER_SLOW] = scope.trial_hits[HT_TIER_FAST] = 0;
      for (int e = 0; e < 400; ++e) heattree_judge(&trial, &scope, &settings);
      EXPECT_EQ(trial.all.gained == before.gained, period == 0);
      if (!period) {
        EXPECT_EQ(trial.open != 0, hot > 100);
      }
    }
}

// What was gained long ago does not pay for swaps that gain nothing now.
TEST(Heattree, TheLastSwapsMustPayToo) {
  heattree_settings settings = HEATTREE_DEFAULTS;
  heattree_trial trial{};
  tier_scope scope{};
  scope.period = 64;
  scope.swap_ns = 8500;
  scope.trial_pages[HT_TIER_SLOW] = 1000;
  scope.trial_hits[HT_TIER_SLOW] = 400;
  for (int e = 0; e < 12; ++e) heattree_judge(&trial, &scope, &settings);
  EXPECT_TRUE(trial.open);
  scope.trial_hits[HT_TIER_SLOW] = scope.trial_hits[HT_TIER_FAST] = 3;
  for (int e = 0; e < 24; ++e) heattree_judge(&trial, &scope, &settings);
  EXPECT_FALSE(trial.open);
  // and what begins to pay is not held up by what did not
  scope.trial_hits[HT_TIER_SLOW] = 400;
  for (int e = 0; e < 2; ++e) heattree_judge(&trial, &scope, &settings);
  EXPECT_TRUE(trial.open);
}

// 100 more for each vain_percent of what was moved and a twentieth of the fast tier.
TEST(Heattree, TheMarginGrowsWithWhatIsTakenBack) {
  heattree_settings settings = HEATTREE_DEFAULTS;
  tier_scope scope{};
  scope.fast_capacity_pages = 20000;
  scope.moved_pages = 1000;
  const auto after = [&](__u64 back, int epochs) {
    heattree_trial trial{};
    scope.moved_back_pages = back;
    for (int e = 0; e < epochs; ++e) heattree_judge(&trial, &scope, &settings);
    return trial.margin_percent;
  };
  EXPECT_EQ(after(0, 1), settings.margin_percent);
  EXPECT_EQ(after(0, 100), settings.margin_percent);
  EXPECT_NEAR(after(settings.vain_percent * 20, 1), settings.margin_percent + 100, 1);
  EXPECT_NEAR(after(settings.vain_percent * 10, 200), settings.margin_percent + 96, 2);
  EXPECT_EQ(after(1000, 50), settings.margin_percent + 300);
  // and it falls again: half of it is forgotten in 16 epochs
  heattree_trial trial{};
  scope.moved_back_pages = settings.vain_percent * 20;
  heattree_judge(&trial, &scope, &settings);
  scope.moved_pages = scope.moved_back_pages = 0;
  for (int e = 0; e < 16; ++e) heattree_judge(&trial, &scope, &settings);
  EXPECT_LT(trial.margin_percent, settings.margin_percent + 70);
  EXPECT_GT(trial.margin_percent, settings.margin_percent + 60);
}

// A pair as it is offered to heattree while moves pay.
struct Offer {
  explicit Offer(__u32 margin_percent) {
    trial.open = 1;
    trial.margin_percent = margin_percent;
    cold.rate = 1000;
  }
  bool admitted() { return heattree_admit(&hot, &cold, &scope, &trial, &settings) != 0; }

  heattree_settings settings = HEATTREE_DEFAULTS;
  heattree_trial trial{};
  tier_scope scope{};
  tier_range hot{};
  tier_range cold{};
};

TEST(Heattree, TheMarginKeepsEqualsApart) {
  Offer offer(200);
  offer.hot.rate = 2000;
  EXPECT_FALSE(offer.admitted());
  EXPECT_EQ(offer.hot.action, TIER_KEEP);
  offer.hot.rate = 2001;
  EXPECT_TRUE(offer.admitted());
  offer.trial.open = 0;
  EXPECT_FALSE(offer.admitted());
  EXPECT_EQ(offer.hot.action, TIER_TRY);
}

TEST(Heattree, WhatMovedLatelyStaysUnlessTheOtherIsFarHotter) {
  Offer offer(150);
  offer.hot.flags = TIER_RANGE_BACK;
  offer.hot.rate = 10 * offer.settings.back_percent;
  EXPECT_FALSE(offer.admitted());
  offer.hot.rate += 1;
  EXPECT_TRUE(offer.admitted());
  offer.trial.margin_percent = offer.settings.back_percent + 30;  // the wider one holds
  EXPECT_FALSE(offer.admitted());
}

// 50 misses in 40 epochs of 64 misses a sample: 0.0195 samples an epoch.
TEST(Heattree, ASwapMustPromiseWhatItCosts) {
  Offer offer(100);
  offer.scope.period = 64;
  offer.hot.rate = offer.cold.rate + (50U << 24) / (64 * offer.settings.pay_epochs) - 1;
  EXPECT_FALSE(offer.admitted());
  EXPECT_EQ(offer.hot.action, TIER_KEEP);
  offer.hot.rate += 2;
  EXPECT_TRUE(offer.admitted());
  // Room for what comes needs no trial, but the same promise.
  offer.trial.open = 0;
  EXPECT_FALSE(offer.admitted());
  offer.hot.flags |= TIER_RANGE_COMING;
  EXPECT_TRUE(offer.admitted());
  offer.hot.rate -= 2;
  EXPECT_FALSE(offer.admitted());
}

}  // namespace
}  // namespace hypertier::fake
