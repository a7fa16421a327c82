// SPDX-License-Identifier: GPL-2.0-or-later
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kA = 0x10000000, kB = 0x20000000;

std::vector<__u64> spaces_of(const Rig& rig) {
  std::set<__u64> spaces;
  for (auto& view : rig.ranges()) spaces.insert(view.range.space);
  return {spaces.begin(), spaces.end()};
}

TEST(EngineSpaces, ForkExecExit) {
  Rig rig;
  rig.machine.map(1, kA, kA + 4 * kMiB);
  rig.start(10, 1);
  rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{1}));

  rig.machine.map(2, kB, kB + 4 * kMiB);
  rig.start(11, 2);
  rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{1, 2}));
  ASSERT_EQ(rig.ranges(11).size(), 1u);
  EXPECT_EQ(rig.ranges(11)[0].range.pid, 11u);
  EXPECT_EQ(rig.ranges(11)[0].comm, "work");

  // exec: another space, the old one is gone with its granules
  rig.machine.map(3, kA, kA + 8 * kMiB);
  rig.machine.spaces_by_id[3];
  rig.start(11, 3, HT_SPACE_EXEC);
  rig.machine.remove(rig.machine.spaces_by_id.find(2));
  rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{1, 3}));
  EXPECT_EQ(rig.source.forgotten, (std::vector<FakeSource::Forgotten>{{2, 0, HT_UNKNOWN64}}));

  rig.stop(10);
  rig.stop(11);
  rig.epoch();
  EXPECT_TRUE(rig.ranges().empty());
  EXPECT_TRUE(rig.engine.processes().empty());
  EXPECT_EQ(rig.source.forgotten.size(), 3u);
}

TEST(EngineSpaces, SharedSpaceLivesUntilTheLastLeaves) {
  Rig rig;
  rig.machine.map(1, kA, kA + 4 * kMiB);
  rig.start(10, 1);
  rig.machine.spaces_by_id[1].pids.insert(11);  // vfork or CLONE_VM
  rig.engine.space_event(event(HT_SPACE_FORK, 11, 1));
  rig.epoch();
  rig.stop(10);
  rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{1}));
  EXPECT_EQ(rig.ranges()[0].range.pid, 11u);
  EXPECT_TRUE(rig.source.forgotten.empty());
  rig.stop(11);
  rig.epoch();
  EXPECT_TRUE(rig.ranges().empty());
}

TEST(EngineSpaces, AMissedExecIsNoticed) {
  Rig rig;
  rig.machine.map(1, kA, kA + 4 * kMiB);
  rig.start(10, 1);
  rig.epoch();
  rig.machine.map(2, kB, kB + 4 * kMiB);
  rig.machine.spaces_by_id[2].pids.insert(10);
  rig.machine.remove(rig.machine.spaces_by_id.find(1));
  for (int e = 0; e < 12; ++e) rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{2}));
}

TEST(EngineSpaces, AMissedExitIsNoticed) {
  Rig rig;
  rig.machine.map(1, kA, kA + 4 * kMiB);
  rig.start(10, 1);
  rig.epoch();
  rig.machine.remove(rig.machine.spaces_by_id.find(1));
  for (int e = 0; e < 12; ++e) rig.epoch();
  EXPECT_TRUE(rig.ranges().empty());
  EXPECT_TRUE(rig.engine.processes().empty());
}

TEST(EngineSpaces, AProcessWhoseSpaceIsNotKnownYetIsAsked) {
  Rig rig;
  rig.machine.map(5, kA, kA + 4 * kMiB);
  rig.machine.spaces_by_id[5].pids.insert(10);
  rig.engine.space_event(event(HT_SPACE_TASK, 10, 0));
  rig.epoch();
  EXPECT_EQ(spaces_of(rig), (std::vector<__u64>{5}));
}

TEST(EngineSpaces, IdleSpacesArePolledInRotation) {
  EngineSettings settings;
  settings.poll_epochs = 8;
  Rig rig(settings);
  for (__u32 i = 0; i < 80; ++i) {
    rig.machine.map(100 + i, kA, kA + 2 * kMiB);
    rig.start(1000 + i, 100 + i);
  }
  EXPECT_EQ(rig.epoch().spaces_polled, 80u);  // new ones at once
  for (int e = 0; e < 8; ++e) EXPECT_EQ(rig.epoch().spaces_polled, 10u);
  EXPECT_EQ(rig.machine.lists_given, 80u);  // nothing changed, nothing read again

  rig.source.touch(150, kA);
  rig.epoch();
  EXPECT_EQ(rig.epoch().spaces_polled, 11u);  // the one with samples, and the share

  // A change in an idle space is seen within the rotation.
  rig.machine.map(130, kB, kB + 2 * kMiB);
  for (int e = 0; e < 8; ++e) rig.epoch();
  EXPECT_EQ(rig.ranges(1030).size(), 2u);
}

TEST(EngineSpaces, AFullMappingListIsReadInSeveralRuns) {
  Rig rig;
  rig.machine.mappings_max = 5;
  for (__u32 i = 0; i < 7; ++i) {
    for (int m = 0; m < 3; ++m)
      rig.machine.map(100 + i, kA + static_cast<__u64>(m) * 4 * kMiB, kA + static_cast<__u64>(m) * 4 * kMiB + 2 * kMiB);
    rig.start(1000 + i, 100 + i);
  }
  rig.epoch();
  EXPECT_EQ(rig.ranges().size(), 21u);
}

TEST(EngineSpaces, StraysAreCountedByReasonAndMappingsRefreshed) {
  Rig rig;
  rig.machine.map(1, kA, kA + 4 * kMiB);
  rig.machine.map(1, kB, kB + (16 << 10), TIER_RANGE_FILE);
  rig.start(10, 1);
  rig.epoch();
  rig.source.touch(1, kB, 3);            // too small to manage
  rig.source.touch(1, kA + 8 * kMiB, 4);  // nothing known there
  rig.source.touch(9, kA, 5);            // nobody's
  auto report = rig.epoch();
  EXPECT_EQ(report.stray_samples[static_cast<int>(Stray::kNotManaged)], 3u);
  EXPECT_EQ(report.stray_samples[static_cast<int>(Stray::kUnmapped)], 4u);
  EXPECT_EQ(report.stray_samples[static_cast<int>(Stray::kUnknownSpace)], 5u);
  EXPECT_EQ(rig.engine.totals().samples_total, 12u);

  rig.machine.map(1, kA + 8 * kMiB, kA + 12 * kMiB);
  rig.source.touch(1, kA + 8 * kMiB, 4);
  report = rig.epoch();
  EXPECT_EQ(report.stray_samples[static_cast<int>(Stray::kUnmapped)], 0u);
}

TEST(EngineSpaces, KindsAndSizesThatAreManaged) {
  Rig rig;
  rig.machine.map(1, 0x1000000, 0x1001000);                                  // anonymous, however small
  rig.machine.map(1, 0x2000000, 0x2000000 + (32 << 10), TIER_RANGE_SHMEM);   // too small
  rig.machine.map(1, 0x3000000, 0x3000000 + (64 << 10), TIER_RANGE_SHMEM);   // large enough
  rig.machine.map(1, 0x4000000, 0x4000000 + kMiB, TIER_RANGE_FILE);          // too small
  rig.machine.map(1, 0x5000000, 0x5000000 + 2 * kMiB, TIER_RANGE_FILE);      // large enough
  rig.start(10, 1);
  rig.epoch();
  std::vector<__u64> starts;
  for (auto& view : rig.ranges()) starts.push_back(view.range.start);
  EXPECT_EQ(starts, (std::vector<__u64>{0x1000000, 0x3000000, 0x5000000}));
}

TEST(EngineSpaces, WhatIsUnmappedIsForgotten) {
  Rig rig;
  rig.machine.map(1, kA, kA + 16 * kMiB);
  rig.machine.map(1, kB, kB + 4 * kMiB);
  rig.start(10, 1);
  rig.epoch();
  rig.source.touch(1, kA + 9 * kMiB, 100);
  rig.epoch();
  rig.machine.unmap(1, kA + 4 * kMiB, kA + 6 * kMiB);
  rig.machine.unmap(1, kB, kB + 4 * kMiB);
  rig.epoch();
  EXPECT_EQ(rig.source.forgotten, (std::vector<FakeSource::Forgotten>{{1, kA + 4 * kMiB, kA + 6 * kMiB},
                                                                     {1, kB, kB + 4 * kMiB}}));
  auto ranges = rig.ranges();
  ASSERT_EQ(ranges.size(), 2u);
  EXPECT_EQ(ranges[0].range.end, kA + 4 * kMiB);
  EXPECT_EQ(ranges[1].range.start, kA + 6 * kMiB);
  EXPECT_NE(ranges[0].range.mapping, ranges[1].range.mapping);
}

}  // namespace
}  // namespace hypertier::fake
