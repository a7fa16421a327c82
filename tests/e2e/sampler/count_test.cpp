// SPDX-License-Identifier: GPL-2.0-or-later
// What one sample does to the range maps, sample by sample through the
// sampler's own code.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "common.hpp"
#include "sampler_test.skel.h"

namespace hypertier {
namespace {

constexpr std::uint32_t kCapacity = 8;

struct Sample {
  std::uint64_t space, address;
  std::uint32_t store, counted;
};

class Count : public testing::Test {
 protected:
  void SetUp() override {
    skeleton = sampler_test_bpf__open();
    ASSERT_TRUE(skeleton);
    for (auto [map, entries] :
         {std::pair(skeleton->maps.ht_index, kCapacity), std::pair(skeleton->maps.ht_granules, 2 * kCapacity),
          std::pair(skeleton->maps.ht_changed, 2 * kCapacity), std::pair(skeleton->maps.ht_free, kCapacity)})
      bpf_map__set_max_entries(map, entries);
    ASSERT_EQ(sampler_test_bpf__load(skeleton), 0);
    for (auto [mapped, map] :
         {std::pair(&granules, skeleton->maps.ht_granules), std::pair(&changed, skeleton->maps.ht_changed),
          std::pair(&free_ring, skeleton->maps.ht_free)}) {
      auto result = MappedMap::map(map);
      ASSERT_TRUE(result) << result.error().message;
      *mapped = std::move(*result);
    }
    control = &skeleton->data_control->ht_control;
    control->enabled = 1;
    control->capacity = kCapacity;
    control->free_tail = kCapacity - 1;
    for (std::uint32_t entry = 0; entry < 2 * kCapacity; ++entry)
      granules.as<ht_granule>()[entry].entry = entry;
    for (int set : {0, 1}) granules.as<ht_granule>()[set].granule = ~0ULL;
    for (std::uint32_t i = 0; i < kCapacity - 1; ++i)
      free_ring.as<__u64>()[i] = kCapacity - 1 - i;  // slot 0 is none
  }
  void TearDown() override { sampler_test_bpf__destroy(skeleton); }

  bool sample(std::uint64_t space, std::uint64_t address, bool store = false) {
    Sample context{space, address, store, 0};
    LIBBPF_OPTS(bpf_test_run_opts, options);
    options.ctx_in = &context;
    options.ctx_size_in = sizeof(context);
    EXPECT_EQ(bpf_prog_test_run_opts(bpf_program__fd(skeleton->progs.sample_once), &options), 0);
    return context.counted;
  }
  std::array<__u64, HT_DROPS> dropped() {
    std::array<__u64, HT_DROPS> sum{};
    std::vector<std::array<__u64, HT_DROPS>> cpus(libbpf_num_possible_cpus());
    __u32 key = 0;
    EXPECT_EQ(bpf_map_lookup_elem(bpf_map__fd(skeleton->maps.ht_drops), &key, cpus.data()), 0);
    for (auto& cpu : cpus)
      for (int reason = 0; reason < HT_DROPS; ++reason) sum[reason] += cpu[reason];
    return sum;
  }
  std::uint32_t slot(int set, std::uint32_t index) { return changed.as<__u64>()[2 * index + set]; }
  const ht_granule& granule(int set, std::uint32_t index) {
    return granules.as<ht_granule>()[2 * slot(set, index) + set];
  }

  sampler_test_bpf* skeleton = nullptr;
  MappedMap granules, changed, free_ring;
  ht_control* control = nullptr;
};

TEST_F(Count, CountsGranulePageAndStore) {
  EXPECT_TRUE(sample(7, 0x200000 + 5 * 4096 + 8));
  EXPECT_TRUE(sample(7, 0x200000 + 5 * 4096 + 16, true));
  EXPECT_TRUE(sample(7, 0x200000 + 4 * 4096));
  ASSERT_EQ(control->changed[0], 1u);
  EXPECT_EQ(granule(0, 0).space, 7u);
  EXPECT_EQ(granule(0, 0).granule, 1u);
  EXPECT_EQ(granule(0, 0).samples, 3u);
  EXPECT_EQ(granule(0, 0).stores, 1u);
  EXPECT_EQ(granule(0, 0).pages[2], 2u << 16 | 1u);
  EXPECT_EQ(control->changed[1], 0u);
}

TEST_F(Count, KeepsSpacesApart) {
  EXPECT_TRUE(sample(1, 0x1000));
  EXPECT_TRUE(sample(2, 0x1000));
  EXPECT_EQ(control->changed[0], 2u);
  EXPECT_EQ(granule(0, 0).samples, 1u);
  EXPECT_EQ(granule(0, 1).samples, 1u);
}

TEST_F(Count, TheOtherSetAfterAFlip) {
  EXPECT_TRUE(sample(1, 0x1000));
  control->active = 1;
  EXPECT_TRUE(sample(1, 0x1000));
  EXPECT_TRUE(sample(1, 0x1000));
  EXPECT_EQ(control->changed[0], 1u);
  EXPECT_EQ(control->changed[1], 1u);
  EXPECT_EQ(slot(0, 0), slot(1, 0)) << "a granule keeps its slot";
  EXPECT_EQ(granule(0, 0).samples, 1u);
  EXPECT_EQ(granule(1, 0).samples, 2u);
}

TEST_F(Count, NothingWhileDisabled) {
  control->enabled = 0;
  EXPECT_FALSE(sample(1, 0x1000));
  EXPECT_EQ(control->changed[0], 0u);
}

TEST_F(Count, DropsByReason) {
  EXPECT_FALSE(sample(1, 0));
  EXPECT_FALSE(sample(1, 0xffff888000000000));
  EXPECT_FALSE(sample(1, 0xffffffffff600000));
  EXPECT_FALSE(sample(0, 0x1000));
  for (std::uint64_t granule = 0; granule < kCapacity - 1; ++granule)
    EXPECT_TRUE(sample(1, granule << HT_GRANULE_SHIFT | 64));
  EXPECT_FALSE(sample(1, 100ULL << HT_GRANULE_SHIFT));
  EXPECT_TRUE(sample(1, 64)) << "those that are in still count";
  auto now = dropped();
  EXPECT_EQ(now[HT_DROP_NO_ADDRESS], 1u);
  EXPECT_EQ(now[HT_DROP_KERNEL_ADDRESS], 2u);
  EXPECT_EQ(now[HT_DROP_NO_SPACE], 1u);
  EXPECT_EQ(now[HT_DROP_FULL], 1u);
  EXPECT_EQ(now[HT_DROP_BUSY], 0u);
}

TEST_F(Count, ASlotWithAnotherKeyIsNotCounted) {
  // as after a lookup that raced a delete
  EXPECT_TRUE(sample(1, 0x1000));
  granules.as<ht_granule>()[2 * slot(0, 0)].space = 99;
  EXPECT_FALSE(sample(1, 0x1000));
  EXPECT_EQ(dropped()[HT_DROP_BUSY], 1u);
}

TEST_F(Count, AForgottenGranuleIsNewAgain) {
  // what tierd does, even if the slot that it had goes on holding the old key
  EXPECT_TRUE(sample(1, 0x1000));
  ht_granule_key key{1, 0};
  ASSERT_EQ(bpf_map_delete_elem(bpf_map__fd(skeleton->maps.ht_index), &key), 0);
  std::uint32_t hint = 0x9e3779b1U & skeleton->rodata->ht_hint_mask;
  EXPECT_EQ(skeleton->data_hints->ht_hints[hint], slot(0, 0));
  skeleton->data_hints->ht_hints[hint] = 0;
  EXPECT_TRUE(sample(1, 0x1000));
  EXPECT_EQ(control->free_head, 2u);
  EXPECT_NE(slot(0, 0), slot(0, 1));
}

TEST_F(Count, AFailedInsertKeepsItsSlot) {
  // fill the index with keys that have no slot: every insert fails
  for (std::uint64_t i = 0; i < kCapacity; ++i) {
    ht_granule_key key{1000, i};
    __u32 slot = 0;
    ASSERT_EQ(bpf_map_update_elem(bpf_map__fd(skeleton->maps.ht_index), &key, &slot, BPF_ANY), 0);
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(0, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(sample(1, 0x1000));
  EXPECT_EQ(dropped()[HT_DROP_BUSY], 5u);
  EXPECT_EQ(control->free_head, 1u) << "one slot is taken and kept as the CPU's spare";
  for (std::uint64_t i = 0; i < kCapacity; ++i) {
    ht_granule_key key{1000, i};
    ASSERT_EQ(bpf_map_delete_elem(bpf_map__fd(skeleton->maps.ht_index), &key), 0);
  }
  for (std::uint64_t granule = 0; granule < kCapacity - 1; ++granule)
    EXPECT_TRUE(sample(1, granule << HT_GRANULE_SHIFT | 64));
  EXPECT_EQ(control->free_head, kCapacity - 1) << "the spare was used first: no slot leaked";
}

}  // namespace
}  // namespace hypertier
