// SPDX-License-Identifier: GPL-2.0-or-later
// The partition against a model that keeps every page by itself.
#include "engine/adaptive.hpp"

#include <cmath>
#include <map>
#include <random>

#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kSpace = 3;
constexpr __u64 kBase = 0x40000000;

struct Harness {
  explicit Harness(EngineSettings s = {}) : settings(s), partition(settings), ranges(HT_RANGES_MAX) {}

  void map(std::vector<ht_mapping> mappings) { partition.map(kSpace, mappings); }
  void fold(FakeSource& source) {
    (void)source.drain([&](const ht_granule& g) {
      partition.fold(g, [&](__u64 address, __u32 samples) { strays[address] += samples; });
    });
  }
  std::span<tier_range> fill() { return std::span(ranges).first(partition.fill(ranges)); }

  EngineSettings settings;
  AdaptivePartition partition;
  std::vector<tier_range> ranges;
  std::map<__u64, __u64> strays;
  __u64 epoch = 0;
};

// Random maps, unmaps, samples, splits and merges; after each step the counts
// of every range equal the sum over its pages in the model.
void random_operations(unsigned seed, __u64 min_range_bytes) {
  EngineSettings settings;
  settings.min_range_bytes = min_range_bytes;
  Harness h(settings);
  std::mt19937 rng(seed);
  constexpr __u64 kPages = 16 * kGranulePages;
  std::vector<__u32> kind(kPages, 0);  // 0: not mapped, else the flags
  FakeSource source;

  for (int e = 1; e <= 60; ++e) {
    h.partition.begin(e);
    if (e == 1 || rng() % 3 == 0) {
      for (int n = e == 1 ? 6 : 1 + rng() % 3; n > 0; --n) {
        __u64 start = rng() % kPages;
        __u64 end = std::min(kPages, start + 1 + rng() % (rng() % 2 ? 3000 : 40));
        __u32 flags = rng() % 3 == 0 ? 0u : rng() % 4 ? __u32{TIER_RANGE_ANON} : __u32{TIER_RANGE_SHMEM};
        std::fill(kind.begin() + start, kind.begin() + end, flags);
      }
      std::vector<ht_mapping> mappings;
      for (__u64 p = 0; p < kPages; ++p) {
        if (!kind[p]) continue;
        if (!mappings.empty() && mappings.back().end == kBase + p * HT_PAGE_SIZE && mappings.back().flags == kind[p])
          mappings.back().end += HT_PAGE_SIZE;
        else
          mappings.push_back({kBase + p * HT_PAGE_SIZE, kBase + (p + 1) * HT_PAGE_SIZE, kind[p], 0});
      }
      h.map(mappings);
    }
    std::vector<__u64> count(kPages, 0);
    __u64 stores = 0;
    for (int n = rng() % 400; n > 0; --n) {
      __u64 page = rng() % 4 ? rng() % kPages : rng() % 64;
      __u32 samples = 1 + rng() % 50;
      bool store = rng() % 3 == 0;
      source.touch(kSpace, kBase + page * HT_PAGE_SIZE, samples, store);
      count[page] += samples;
      if (store) stores += samples;
    }
    h.strays.clear();
    h.fold(source);

    auto check = [&](const char* when) {
      auto ranges = h.fill();
      __u64 covered = 0, mapped = 0;
      __u64 last = 0;
      for (const tier_range& r : ranges) {
        ASSERT_LT(r.start, r.end);
        ASSERT_GE(r.start, last);
        last = r.end;
        __u64 sum = 0;
        for (__u64 p = (r.start - kBase) / HT_PAGE_SIZE; p < (r.end - kBase) / HT_PAGE_SIZE; ++p) {
          ASSERT_EQ(kind[p], r.flags & (TIER_RANGE_ANON | TIER_RANGE_SHMEM));
          sum += count[p];
        }
        ASSERT_EQ(r.samples, sum) << when << " epoch " << e << " range " << std::hex << r.start << "-" << r.end;
        ASSERT_GE(r.count[0], r.samples << HT_COUNT_SHIFT);
        covered += r.mapped_pages;
        ASSERT_EQ(r.mapped_pages, (r.end - r.start) / HT_PAGE_SIZE);
      }
      for (__u32 k : kind) mapped += k != 0;
      ASSERT_EQ(covered, mapped);
    };
    check("after fold");
    if (testing::Test::HasFatalFailure()) return;
    __u64 total = 0, stray = 0, range_stores = 0;
    for (const tier_range& r : h.fill()) total += r.samples, range_stores += r.stores;
    for (auto& [address, samples] : h.strays) {
      ASSERT_EQ(kind[(address - kBase) / HT_PAGE_SIZE], 0u);
      ASSERT_EQ(samples, count[(address - kBase) / HT_PAGE_SIZE]);
      stray += samples;
    }
    __u64 all = 0;
    for (__u64 c : count) all += c;
    ASSERT_EQ(total + stray, all);
    ASSERT_LE(range_stores, stores);
    if (!stray) {
      ASSERT_EQ(range_stores, stores);
    }

    auto ranges = h.fill();
    std::vector<tier_range> answers(ranges.begin(), ranges.end());
    __u64 before[HT_SCALES] = {};
    for (auto& answer : answers) {
      answer.action = rng() % 3;
      for (int s = 0; s < HT_SCALES; ++s) before[s] += answer.count[s];
    }
    Adapted adapted = h.partition.adapt(answers);
    ASSERT_EQ(h.fill().size(), answers.size() + adapted.splits - adapted.merges);
    check("after adapt");
    if (testing::Test::HasFatalFailure()) return;
    __u64 after[HT_SCALES] = {};
    for (const tier_range& r : h.fill())
      for (int s = 0; s < HT_SCALES; ++s) after[s] += r.count[s];
    for (int s = 0; s < HT_SCALES; ++s) ASSERT_EQ(before[s], after[s]);  // nothing lost, nothing made up
  }
}

TEST(EngineAdaptive, CountsAreExactUnderRandomOperations) {
  for (unsigned seed = 1; seed <= 15; ++seed) {
    random_operations(seed, HT_GRANULE_SIZE);
    random_operations(seed, 64 << 10);
    random_operations(seed, HT_PAGE_SIZE);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(EngineAdaptive, CountsDecayAtFourScales) {
  Harness h;
  h.map({{kBase, kBase + 8 * kMiB, TIER_RANGE_ANON, 0}});
  FakeSource source;
  const double half_life[HT_SCALES] = {1, 8, 48, 256};
  double model[HT_SCALES] = {};
  std::mt19937 rng(1);
  for (int e = 1; e <= 600; ++e) {
    h.partition.begin(e);
    __u32 samples = rng() % 5 ? 0 : rng() % 1000;
    if (e > 300) samples = 0;
    if (samples) source.touch(kSpace, kBase, samples);
    h.fold(source);
    auto ranges = h.fill();
    for (int s = 0; s < HT_SCALES; ++s) {
      model[s] = model[s] * std::exp2(-1 / half_life[s]) + samples;
      EXPECT_NEAR(ranges[0].count[s] / 256.0, model[s], 1 + model[s] * 0.001) << "scale " << s << " epoch " << e;
    }
    EXPECT_EQ(ranges[0].samples, samples);
  }
  EXPECT_EQ(h.fill()[0].count[0], 0u);
  EXPECT_GT(h.fill()[0].count[3], 0u);
}

TEST(EngineAdaptive, SplitsKeepToTheSmallestSizeAndToGranules) {
  Harness h;
  h.partition.begin(1);
  h.map({{kBase + 12288, kBase + 37 * kMiB, TIER_RANGE_ANON, 0}});
  for (int e = 2; e < 12; ++e) {
    h.partition.begin(e);
    auto ranges = h.fill();
    for (auto& r : ranges) r.action = TIER_SPLIT;
    h.partition.adapt(std::vector<tier_range>(ranges.begin(), ranges.end()));
  }
  auto ranges = h.fill();
  EXPECT_EQ(ranges.size(), 19u);
  for (auto& r : ranges) {
    EXPECT_TRUE(r.flags & TIER_RANGE_MIN);
    if (r.start != kBase + 12288) {
      EXPECT_EQ(r.start % HT_GRANULE_SIZE, 0u);
    }
  }
}

TEST(EngineAdaptive, NumberOfRangesIsBoundedAndTheHottestSplit) {
  EngineSettings settings;
  settings.max_ranges = 4;
  Harness h(settings);
  h.map({{kBase, kBase + 64 * kMiB, TIER_RANGE_ANON, 0}});
  for (int e = 1; e < 10; ++e) {
    h.partition.begin(e);
    auto ranges = h.fill();
    for (auto& r : ranges) {
      r.action = TIER_SPLIT;
      r.heat = r.start == kBase ? 9 : 1;  // the lowest is the hottest
    }
    h.partition.adapt(std::vector<tier_range>(ranges.begin(), ranges.end()));
  }
  auto ranges = h.fill();
  ASSERT_EQ(ranges.size(), 5u);  // one for the mapping, four from splits
  EXPECT_EQ(ranges[0].mapped_pages, 8 * kMiB / HT_PAGE_SIZE);
}

TEST(EngineAdaptive, MergeNeedsBothAndOneMapping) {
  Harness h;
  h.map({{kBase, kBase + 8 * kMiB, TIER_RANGE_ANON, 0}, {kBase + 8 * kMiB, kBase + 12 * kMiB, TIER_RANGE_SHMEM, 0}});
  h.partition.begin(1);
  auto ranges = h.fill();
  ranges[0].action = TIER_SPLIT;
  h.partition.adapt(std::vector<tier_range>(ranges.begin(), ranges.end()));
  ranges = h.fill();
  ASSERT_EQ(ranges.size(), 3u);
  EXPECT_EQ(ranges[0].left_count, HT_UNKNOWN32);
  EXPECT_NE(ranges[0].right_count, HT_UNKNOWN32);
  EXPECT_EQ(ranges[1].right_count, HT_UNKNOWN32);
  EXPECT_TRUE(ranges[2].flags & TIER_RANGE_ROOT);
  ranges[1].action = ranges[2].action = TIER_MERGE;  // of different mappings
  EXPECT_EQ(h.partition.adapt(std::vector<tier_range>(ranges.begin(), ranges.end())).merges, 0u);
  ranges = h.fill();
  ranges[0].action = ranges[1].action = TIER_MERGE;
  EXPECT_EQ(h.partition.adapt(std::vector<tier_range>(ranges.begin(), ranges.end())).merges, 1u);
  EXPECT_TRUE(h.fill()[0].flags & TIER_RANGE_ROOT);
}

TEST(EngineAdaptive, AGrowingHeapStaysFewRanges) {
  Harness h;
  __u64 end = kBase + 132 * 1024;
  for (int e = 1; e <= 200; ++e, end += 132 * 1024) {
    h.partition.begin(e);
    h.map({{kBase, end, TIER_RANGE_ANON, 0}});
    auto ranges = h.fill();
    ASSERT_EQ(ranges.size(), 1u);
    EXPECT_EQ(ranges[0].end, end);
    EXPECT_EQ(ranges[0].age_epochs, static_cast<__u32>(e - 1));
    EXPECT_EQ(ranges[0].mapping, 1u);
  }
  // Downwards as well, as mmap does; a jump makes a range of its own.
  h.map({{kBase - kMiB, end, TIER_RANGE_ANON, 0}});
  EXPECT_EQ(h.fill().size(), 1u);
  h.map({{kBase - kMiB, end + 512 * kMiB, TIER_RANGE_ANON, 0}});
  EXPECT_EQ(h.fill().size(), 2u);
}

TEST(EngineAdaptive, UnevennessIsToldFromChance) {
  std::mt19937 rng(5);
  int false_alarms = 0;
  for (int trial = 0; trial < 40; ++trial) {
    Harness h;
    FakeSource source;
    h.map({{kBase, kBase + 128 * kMiB, TIER_RANGE_ANON, 0}, {kBase + 256 * kMiB, kBase + 384 * kMiB, TIER_RANGE_ANON, 0}});
    for (int e = 1; e <= 20; ++e) {
      h.partition.begin(e);
      for (int n = 0; n < 50; ++n) {
        source.touch(kSpace, kBase + rng() % (128 * kMiB));  // even
        __u64 piece = (rng() % 8) * 8;                       // 8 of 64 granules
        source.touch(kSpace, kBase + 256 * kMiB + piece * HT_GRANULE_SIZE + rng() % HT_GRANULE_SIZE);
      }
      h.fold(source);
      auto ranges = h.fill();
      false_alarms += ranges[0].uneven >= 64;
      if (e >= 3) {
        EXPECT_GE(ranges[1].uneven, 64u);
      }
    }
  }
  EXPECT_LE(false_alarms, 8);  // of 800
}

// A single hot 2 MiB piece is found from one range in as many epochs as there
// are halvings, and the ranges around it stay large.
TEST(EngineAdaptive, SplittingConvergesOnAHotPiece) {
  Rig rig;
  rig.policy.use_hyperplace();
  rig.machine.map(kSpace, kBase, kBase + 16384 * kMiB);
  rig.start(10, kSpace);
  rig.epoch();
  const __u64 hot = kBase + 7003ull * HT_GRANULE_SIZE;
  std::mt19937 rng(1);
  int epochs = 0;
  for (; epochs < 40; ++epochs) {
    for (int n = 0; n < 300; ++n) rig.source.touch(kSpace, hot + rng() % HT_GRANULE_SIZE);
    for (int n = 0; n < 30; ++n) rig.source.touch(kSpace, kBase + rng() % (16384 * kMiB));
    auto in = rig.machine.input();
    in.moves = false;
    rig.epoch(in);
    auto ranges = rig.ranges();
    auto found = std::find_if(ranges.begin(), ranges.end(), [&](auto& v) { return v.range.start == hot; });
    if (found != ranges.end() && found->range.end == hot + HT_GRANULE_SIZE) break;
  }
  EXPECT_LE(epochs, 20);  // 13 halvings
  EXPECT_LE(rig.ranges().size(), 40u);
}

}  // namespace
}  // namespace hypertier::fake
