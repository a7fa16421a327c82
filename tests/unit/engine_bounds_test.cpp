// SPDX-License-Identifier: GPL-2.0-or-later
// A scope and its bound: what is beyond it is known and gone at the end of each
// epoch, whatever came in between.
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kA = 0x100000000;
constexpr __u64 kMax = 1024;  // pages

// One mapping of 64 MiB, nothing of it touched yet.
struct Bounded : Rig {
  explicit Bounded(bool estimated = false, EngineSettings settings = {}) : Rig(settings) {
    machine.size_pages[HT_TIER_FAST] = machine.size_pages[HT_TIER_SLOW] = 1 << 15;
    machine.map(1, kA, kA + 64 * kMiB);
    start(10, 1);
    if (estimated) policy.use_heattree();
    else policy.classify = [](tier_range& range, const tier_scope&) { range.heat = range.samples; };
  }
  static __u64 page(__u64 number) { return kA + number * HT_PAGE_SIZE; }
  void touch(__u64 first, __u64 pages, ht_tier tier = HT_TIER_FAST) {
    machine.populate(1, page(first), page(first + pages), tier);
  }
  EpochReport bounded(__u64 rate_bytes_per_s = 0) {
    EpochInput input = machine.input();
    input.accounts = true;
    input.fast_max_pages = kMax;
    input.rate_bytes_per_s = rate_bytes_per_s;
    return epoch(input);
  }
  __u64 fast() const { return machine.used(HT_TIER_FAST); }
};

class Bounds : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Partitions, Bounds, testing::Bool(),
                         [](const auto& estimated) { return estimated.param ? "estimated" : "adaptive"; });

TEST_P(Bounds, WhatIsTouchedIsGoneInTheNextEpoch) {
  Bounded rig(GetParam());
  rig.touch(0, 3000);
  rig.bounded();
  EXPECT_LE(rig.fast(), kMax);
  for (__u64 n = 3000; n < 9000; n += 600) {
    rig.touch(n, 600);
    EXPECT_EQ(rig.bounded().over_pages, 600u);
    EXPECT_EQ(rig.fast(), kMax);
  }
}

// The kernel's size of a space does not tell: as many pages went as came.
TEST_P(Bounds, PagesThatTakeTheirSizesPlaceAreSeen) {
  Bounded rig(GetParam());
  rig.touch(0, 2000);
  rig.bounded();
  ASSERT_EQ(rig.fast(), kMax);
  auto& space = rig.machine.spaces_by_id[1];
  for (int round = 0; round < 4; ++round) {
    __u64 gone = 0;
    std::vector<__u64> slow;
    for (const auto& [address, page] : space.pages)
      if (page.tier == HT_TIER_SLOW && slow.size() < 40) slow.push_back(address);
    const __u64 seq = space.seq;
    for (__u64 address : slow) {
      rig.machine.unmap(1, address, address + HT_PAGE_SIZE);
      rig.machine.map(1, address, address + HT_PAGE_SIZE);
      rig.machine.populate(1, address, address + HT_PAGE_SIZE, HT_TIER_FAST);
      ++gone;
    }
    // as MADV_DONTNEED leaves it
    space.mappings = {{kA, kA + 64 * kMiB, TIER_RANGE_ANON, 0}};
    space.seq = seq;
    ASSERT_EQ(rig.fast(), kMax + gone);
    rig.bounded();
    EXPECT_EQ(rig.fast(), kMax);
  }
}

TEST_P(Bounds, PagesThatDoNotMoveAreMadeUpFor) {
  Bounded rig(GetParam());
  rig.touch(0, 4000);
  for (__u64 n = 0; n < 700; ++n) rig.machine.spaces_by_id[1].pages.at(Bounded::page(n)).stuck = HT_MOVE_PINNED;
  rig.bounded();
  rig.bounded();
  EXPECT_EQ(rig.fast(), kMax);
  for (__u64 n = 4000; n < 4100; n += 10) {
    rig.touch(n, 10);
    rig.bounded();
    EXPECT_EQ(rig.fast(), kMax);
  }
}

// A walk that was cut short does not hide what came to the part that it passed.
TEST(BoundsOnce, AnUnfinishedWalkIsStartedAnew) {
  Bounded rig;
  rig.touch(0, 16000);
  rig.bounded();
  ASSERT_EQ(rig.fast(), kMax);
  for (__u64 n = 16000; n < 16380; n += 20) {
    rig.touch(n, 20);
    rig.bounded();
    EXPECT_EQ(rig.fast(), kMax);
  }
}

// Where the rate is short, what is beyond the bound goes before anything else.
TEST(BoundsOnce, TheBoundComesFirstWhereTheRateIsShort) {
  EngineSettings settings;
  settings.max_ranges = 0;
  Bounded rig(false, settings);
  rig.machine.map(1, kA + 128 * kMiB, kA + 136 * kMiB);
  rig.machine.populate(1, kA + 128 * kMiB, kA + 136 * kMiB, HT_TIER_SLOW);
  rig.touch(0, kMax + 256);
  constexpr __u64 kRate = 2 * 128 * HT_PAGE_SIZE;  // 128 pages an epoch
  for (int epoch = 1; epoch <= 3; ++epoch) {
    rig.source.touch(1, kA + 128 * kMiB, 1000);
    auto report = rig.bounded(kRate);
    EXPECT_LE(rig.fast(), kMax + 256 - std::min<__u64>(256, 128 * static_cast<__u64>(epoch)));
    EXPECT_EQ(report.moved.exchanged_pairs > 0, epoch == 3);
  }
}

TEST(BoundsOnce, SiblingsNeedIsMetFromTheColdest) {
  Bounded rig;
  rig.policy.classify = [](tier_range& range, const tier_scope&) { range.heat = range.samples; };
  rig.machine.map(1, kA + 128 * kMiB, kA + 132 * kMiB);
  rig.machine.populate(1, kA + 128 * kMiB, kA + 132 * kMiB, HT_TIER_FAST);
  rig.touch(0, 1000);
  rig.source.touch(1, kA + 128 * kMiB, 100);
  EpochInput input = rig.machine.input();
  input.accounts = true;
  input.surplus_pages = 600;
  auto report = rig.epoch(input);
  EXPECT_EQ(report.moved.demoted_pages, 600u);
  EXPECT_EQ(rig.machine.resident(1, kA, kA + 64 * kMiB, HT_TIER_FAST), 400u);
  EXPECT_EQ(report.demand.fast_pages, 1424u);
}

}  // namespace
}  // namespace hypertier::fake
