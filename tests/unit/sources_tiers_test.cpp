// SPDX-License-Identifier: GPL-2.0-or-later
// Tiers, kernel settings and granule slots, without BPF.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <set>

#include "adapter/kernel_settings.hpp"
#include "adapter/slots.hpp"
#include "adapter/tiers.hpp"

namespace hypertier {
namespace {

Roots machine(const std::string& name) {
  return {.sys = std::filesystem::path(HT_FIXTURES) / "tiers" / name / "sys", .proc = "/nonexistent"};
}

using Nodes = std::vector<int>;

TEST(Tiers, FromTheKernelsMemoryTiers) {
  auto tiers = discover_tiers({}, machine("hmat"));
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->origin, "memory tiers");
  EXPECT_EQ(tiers->nodes[HT_TIER_FAST], Nodes{0});
  EXPECT_EQ(tiers->nodes[HT_TIER_SLOW], Nodes{1});
  EXPECT_EQ(tiers->masks().nodes[HT_TIER_FAST], 1u);
  EXPECT_EQ(tiers->masks().nodes[HT_TIER_SLOW], 2u);
}

TEST(Tiers, EverythingBelowTheFirstTierIsSlow) {
  auto tiers = discover_tiers({}, machine("cxl"));
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->nodes[HT_TIER_FAST], (Nodes{0, 1}));
  EXPECT_EQ(tiers->nodes[HT_TIER_SLOW], (Nodes{2, 3}));
}

TEST(Tiers, NodesWithoutCpusAreSlow) {
  auto tiers = discover_tiers({}, machine("cpuless"));
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->origin, "nodes without CPUs");
  EXPECT_EQ(tiers->nodes[HT_TIER_FAST], Nodes{0});
  EXPECT_EQ(tiers->nodes[HT_TIER_SLOW], Nodes{1});
}

TEST(Tiers, NamedNodesWin) {
  auto tiers = discover_tiers({.fast_nodes = "1", .slow_nodes = {}}, machine("hmat"));
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->nodes[HT_TIER_FAST], Nodes{1});
  EXPECT_EQ(tiers->nodes[HT_TIER_SLOW], Nodes{0});
  tiers = discover_tiers({.fast_nodes = {}, .slow_nodes = "1"}, machine("two-sockets"));
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->nodes[HT_TIER_FAST], Nodes{0});
  EXPECT_EQ(tiers->origin, "settings");
}

TEST(Tiers, RefusedWithTheReason) {
  auto refusal = [](const std::string& name, const TierOverrides& overrides = {}) {
    auto tiers = discover_tiers(overrides, machine(name));
    EXPECT_FALSE(tiers);
    return tiers ? "" : tiers.error().message;
  };
  EXPECT_EQ(refusal("one-node"),
            "this machine has memory on one NUMA node only (node 0): there is nothing to tier");
  EXPECT_EQ(refusal("two-sockets"),
            "the kernel knows one memory tier only, and every node with memory has CPUs (nodes 0,1)");
  EXPECT_EQ(refusal("hmat", {.fast_nodes = "7", .slow_nodes = {}}),
            "--fast-nodes 7: node 7 has no memory here");
  EXPECT_EQ(refusal("hmat", {.fast_nodes = "0", .slow_nodes = "0-1"}),
            "node 0 is both in --fast-nodes and in --slow-nodes");
  EXPECT_EQ(refusal("hmat", {.fast_nodes = {}, .slow_nodes = "0-1"}), "no node is left for the fast tier");
  EXPECT_EQ(refusal("hmat", {.fast_nodes = "a", .slow_nodes = {}}),
            "--fast-nodes: \"a\" is not a list of numbers");
}

TEST(Tiers, UseIsTheSumOfTheNodes) {
  auto tiers = discover_tiers({}, machine("cxl"));
  ASSERT_TRUE(tiers);
  auto use = tier_use(*tiers, machine("cxl"));
  ASSERT_TRUE(use) << use.error().message;
  EXPECT_EQ(use->at(HT_TIER_FAST).capacity_bytes, (1000u + 2000u) << 10);
  EXPECT_EQ(use->at(HT_TIER_FAST).free_bytes, (100u + 200u) << 10);
  EXPECT_EQ(use->at(HT_TIER_SLOW).capacity_bytes, (3000u + 4000u) << 10);
}

TEST(Tiers, TheWatermarkIsOfTheFastNodesOnly) {
  Roots roots = machine("cxl");
  auto tiers = discover_tiers({}, roots);
  ASSERT_TRUE(tiers);
  EXPECT_EQ(zones_of_fast(*tiers, roots).watermark_pages, 0U);
  roots.proc = roots.sys.parent_path() / "proc";
  const FastZones zones = zones_of_fast(*tiers, roots);
  EXPECT_EQ(zones.watermark_pages, 13U + 235U + 125U + 250U);
  EXPECT_EQ(zones.listed_pages, 63U + 7U);
}

class Settings : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "ht-settings-XXXXXX";
    root = mkdtemp(pattern.data());
    std::filesystem::create_directories(root / "proc/sys/kernel");
    std::filesystem::create_directories(root / "proc/sys/vm");
    roots = {.sys = root / "sys", .proc = root / "proc"};
  }
  void TearDown() override { std::filesystem::remove_all(root); }
  void set(const std::string& value) {
    std::ofstream(root / "proc/sys/kernel/numa_balancing") << value << '\n';
  }
  std::string get() { return read_line(root / "proc/sys/kernel/numa_balancing").value_or("none"); }
  std::filesystem::path compaction() { return root / "proc/sys/vm/compaction_proactiveness"; }

  std::filesystem::path root;
  Roots roots;
};

TEST_F(Settings, NumaBalancingIsOffWhileSeated) {
  set("1");
  {
    KernelSettings settings(nullptr, roots);
    ASSERT_TRUE(settings.seat());
    EXPECT_TRUE(settings.seated());
    EXPECT_EQ(get(), "0");
    ASSERT_TRUE(settings.seat()) << "a second policy changes nothing";
    ASSERT_TRUE(settings.restore());
    EXPECT_EQ(get(), "1");
    ASSERT_TRUE(settings.seat());
  }
  EXPECT_EQ(get(), "1") << "at the end of tierd";
}

TEST_F(Settings, CompactionAheadOfDemandIsOffWhileSeated) {
  std::ofstream(compaction()) << "20\n";
  KernelSettings settings(nullptr, roots);
  ASSERT_TRUE(settings.seat());
  EXPECT_EQ(settings.compaction_proactiveness(), "0");
  EXPECT_EQ(get(), "none") << "one that the kernel has not is not made";
  ASSERT_TRUE(settings.restore());
  EXPECT_EQ(settings.compaction_proactiveness(), "20");
}

TEST_F(Settings, WhatSomebodyElseSetsMeanwhileStays) {
  set("1");
  std::ofstream(compaction()) << "20\n";
  KernelSettings settings(nullptr, roots);
  ASSERT_TRUE(settings.seat());
  set("2");
  ASSERT_TRUE(settings.restore());
  EXPECT_EQ(get(), "2");
  EXPECT_EQ(settings.compaction_proactiveness(), "20") << "the others are put back";
}

TEST_F(Settings, WhatCannotBeWrittenChangesNothing) {
  set("1");
  std::filesystem::create_symlink("/proc/self/environ", compaction());  // it reads, and refuses to be opened for writing
  KernelSettings settings(nullptr, roots);
  EXPECT_FALSE(settings.seat());
  EXPECT_FALSE(settings.seated());
  EXPECT_EQ(get(), "1");
}

TEST_F(Settings, NothingToDoWhereItIsOffOrMissing) {
  {
    KernelSettings settings(nullptr, roots);
    ASSERT_TRUE(settings.seat());
    ASSERT_TRUE(settings.restore());
    EXPECT_EQ(get(), "none");
  }
  set("0");
  KernelSettings settings(nullptr, roots);
  ASSERT_TRUE(settings.seat());
  ASSERT_TRUE(settings.restore());
  EXPECT_EQ(get(), "0");
}

std::vector<std::uint32_t> one_drain(Slots& slots, std::size_t* deleted = nullptr) {
  auto leaving = slots.begin_drain();
  if (deleted) *deleted = leaving.size();
  return slots.end_drain();
}

TEST(Slots, ComeBackInTheThirdDrain) {
  Slots slots(8);
  slots.seen(3, 7, 100);
  slots.forget(7, 100 << HT_GRANULE_SHIFT, 101 << HT_GRANULE_SHIFT);
  std::size_t deleted = 0;
  EXPECT_TRUE(one_drain(slots, &deleted).empty());
  EXPECT_EQ(deleted, 1u);
  slots.seen(3, 7, 100);  // a late sample does not bring it back
  EXPECT_TRUE(one_drain(slots, &deleted).empty());
  EXPECT_EQ(deleted, 0u);
  EXPECT_EQ(one_drain(slots), std::vector<std::uint32_t>{3});
  EXPECT_TRUE(one_drain(slots).empty());
  slots.seen(3, 8, 5);  // another life
  slots.forget(8, 0, ~0ULL);
  one_drain(slots, &deleted);
  EXPECT_EQ(deleted, 1u);
}

TEST(Slots, ForgetTakesWhatTheRangeTouches) {
  Slots slots(8);
  for (std::uint32_t i = 0; i < 5; ++i) slots.seen(i, 1, 10 + i);
  slots.seen(7, 2, 12);
  slots.forget(1, 11 * HT_GRANULE_SIZE + HT_PAGE_SIZE, 13 * HT_GRANULE_SIZE + HT_PAGE_SIZE);
  std::set<std::uint32_t> gone;
  for (auto& leaving : slots.begin_drain()) gone.insert(leaving.slot);
  EXPECT_EQ(gone, (std::set<std::uint32_t>{1, 2, 3}));
  slots.forget(1, 11 * HT_GRANULE_SIZE, 11 * HT_GRANULE_SIZE);
  EXPECT_TRUE(slots.begin_drain().empty());
}

TEST(Slots, SamplesThatShowUpAfterTheEndOfASpace) {
  Slots slots(8);
  slots.forget(5, 0, ~0ULL);
  slots.begin_drain();
  slots.seen(2, 5, 77);  // was taken before the exit, is drained after it
  slots.end_drain();
  std::size_t deleted = 0;
  one_drain(slots, &deleted);
  EXPECT_EQ(deleted, 1u);
}

TEST(Slots, NoneIsLostOrGivenTwice) {
  constexpr std::uint32_t kCapacity = 64;
  std::mt19937 random(1);
  Slots slots(kCapacity);
  std::vector<std::uint32_t> free;
  for (std::uint32_t slot = 0; slot < kCapacity; ++slot) free.push_back(slot);
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> index;  // the kernel's
  for (int epoch = 0; epoch < 2000; ++epoch) {
    for (int i = 0; i < 20; ++i) {
      std::pair<std::uint64_t, std::uint64_t> key{random() % 3 + 1, random() % 100};
      if (!index.contains(key) && !free.empty()) {
        index[key] = free.back();
        free.pop_back();
      }
      if (index.contains(key)) slots.seen(index[key], key.first, key.second);
    }
    if (random() % 2)
      slots.forget(random() % 3 + 1, (random() % 100) * HT_GRANULE_SIZE, 100 * HT_GRANULE_SIZE);
    for (auto& leaving : slots.begin_drain()) {
      auto found = index.find({leaving.key.space, leaving.key.granule});
      ASSERT_NE(found, index.end());
      ASSERT_EQ(found->second, leaving.slot);
      index.erase(found);
    }
    for (auto slot : slots.end_drain()) {
      ASSERT_EQ(std::ranges::count(free, slot), 0);
      for (auto& [key, used] : index) ASSERT_NE(used, slot);
      free.push_back(slot);
    }
  }
  slots.forget_all();
  for (int i = 0; i < 3; ++i) {
    slots.begin_drain();
    for (auto slot : slots.end_drain()) free.push_back(slot);
  }
  EXPECT_EQ(free.size(), kCapacity);
}

}  // namespace
}  // namespace hypertier
