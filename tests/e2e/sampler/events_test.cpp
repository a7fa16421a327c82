// SPDX-License-Identifier: GPL-2.0-or-later
// The shipped sampler on a real perf event: exact counts, nothing lost over
// epochs, slots recycled, hotplug, readable maps.
#include <gtest/gtest.h>
#include <sched.h>

#include <cstring>
#include <fstream>
#include <thread>

#include "common.hpp"

namespace hypertier {
namespace {

constexpr std::size_t kPage = HT_PAGE_SIZE;

std::unique_ptr<Sampler> open_sampler(std::uint32_t granules) {
  auto programs = load_programs({.granules = granules});
  EXPECT_TRUE(programs) << programs.error().message;
  if (!programs) return nullptr;
  auto sampler = Sampler::open(*programs);
  EXPECT_TRUE(sampler) << sampler.error().message;
  return sampler ? std::move(*sampler) : nullptr;
}

// Own space: the one that most samples of a burst of our own faults belong to.
std::uint64_t own_space(Sampler& sampler) {
  drain(sampler);
  char* area = map_pages(256 * kPage);
  for (int page = 0; page < 256; ++page) area[page * kPage] = 1;
  auto drained = drain(sampler);
  std::uint64_t number = reinterpret_cast<std::uintptr_t>(area) / kPage;
  for (auto& [page, count] : drained.pages)
    if (page.second == number) return page.first;
  return 0;
}

TEST(Events, EveryFaultIsCountedOnceAtItsPage) {
  auto sampler = open_sampler(1024);
  ASSERT_TRUE(sampler);
  auto started = sampler->start(page_faults());
  ASSERT_TRUE(started) << started.error().message;
  EXPECT_EQ(sampler->sampling_cpus(), std::thread::hardware_concurrency());
  std::uint64_t space = own_space(*sampler);
  ASSERT_NE(space, 0u);

  constexpr int kGranules = 20;
  char* area = map_pages(kGranules * HT_GRANULE_SIZE);
  std::uint64_t first = reinterpret_cast<std::uintptr_t>(area) / kPage;
  Drained drained = drain(*sampler);
  // every third page once, and every ninth a second time after it was dropped
  std::size_t pages = kGranules * HT_GRANULE_PAGES;
  for (std::size_t page = 0; page < pages; page += 3) area[page * kPage] = 1;
  for (std::size_t page = 0; page < pages; page += 9) {
    madvise(area + page * kPage, kPage, MADV_DONTNEED);
    area[page * kPage] = 1;
  }
  drained = drain(*sampler);
  std::size_t wrong = 0;
  for (std::size_t page = 0; page < pages; ++page) {
    std::uint32_t want = (page % 3 == 0) + (page % 9 == 0);
    auto found = drained.pages.find({space, first + page});
    wrong += (found == drained.pages.end() ? 0 : found->second) != want;
  }
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(drained.samples, drained.page_sum);
  EXPECT_EQ(drained.stores, 0u) << "a fault has no data source";
  Drained after = drain(*sampler);
  EXPECT_FALSE(after.pages.contains({space, first})) << "a drained granule starts from 0";
  auto stats = sampler->stats();
  EXPECT_EQ(stats.dropped_total[HT_DROP_FULL] + stats.dropped_total[HT_DROP_BUSY], 0u);
  EXPECT_GT(sampler->cost().runs_total, pages / 3);
  EXPECT_GT(sampler->cost().ns_total, 0u);
}

TEST(Events, NothingIsLostAcrossEpochs) {
  auto sampler = open_sampler(4096);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  // this many processes fault while the epochs flip under them
  constexpr int kWorkers = 4;
  constexpr std::size_t kBytes = 8UL << 20;
  constexpr int kRounds = 6;
  pid_t workers[kWorkers];
  for (auto& worker : workers) {
    worker = fork();
    if (worker == 0) {
      char* area = map_pages(kBytes);
      for (int round = 0; round < kRounds; ++round) {
        for (std::size_t at = 0; at < kBytes; at += kPage) area[at] = 1;
        madvise(area, kBytes, MADV_DONTNEED);
      }
      _exit(0);
    }
  }
  std::uint64_t counted = 0, page_sum = 0;
  int alive = kWorkers, drains = 0;
  while (alive) {
    Drained drained = drain(*sampler);
    counted += drained.samples;
    page_sum += drained.page_sum;
    drains++;
    while (alive && waitpid(-1, nullptr, WNOHANG) > 0) --alive;
  }
  // the kernel counts the program's runs: every one of them is in a granule
  std::uint64_t runs = sampler->cost().runs_total;
  Drained drained = drain(*sampler);
  counted += drained.samples;
  page_sum += drained.page_sum;
  ht_sampler_stats after = sampler->stats();
  std::uint64_t dropped = 0;
  for (int reason = 0; reason < HT_DROPS; ++reason) dropped += after.dropped_total[reason];
  EXPECT_GE(counted, kWorkers * kRounds * kBytes / kPage);
  EXPECT_EQ(dropped, 0u);
  EXPECT_EQ(counted, page_sum);
  EXPECT_GT(drains, 3);
  EXPECT_GE(counted, runs);
  EXPECT_LE(counted, runs + 50) << "only what fell between the two readings";
  EXPECT_EQ(after.samples_total, counted);
  std::printf("%lu samples in %d epochs\n", counted, drains);
}

TEST(Events, SlotsAreRecycledAfterForget) {
  constexpr std::uint32_t kCapacity = 256;
  auto sampler = open_sampler(kCapacity);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  std::uint64_t space = own_space(*sampler);
  // ten times as many granules as there are slots, forgotten as they go
  for (int round = 0; round < 40; ++round) {
    constexpr std::size_t kBytes = 64 * HT_GRANULE_SIZE;
    char* area = map_pages(kBytes);
    for (std::size_t at = 0; at < kBytes; at += HT_GRANULE_SIZE) area[at] = 1;
    Drained drained = drain(*sampler);
    auto start = reinterpret_cast<std::uintptr_t>(area);
    std::size_t found = 0;
    for (std::size_t at = 0; at < kBytes; at += HT_GRANULE_SIZE)
      found += drained.pages.contains({space, (start + at) / kPage});
    ASSERT_EQ(found, 64u) << "round " << round;
    munmap(area, kBytes);
    sampler->forget(space, start, start + kBytes);
    drain(*sampler);
  }
  EXPECT_EQ(sampler->stats().dropped_total[HT_DROP_FULL], 0u);
  sampler->stop();
  // each CPU may keep one as its spare
  EXPECT_LE(sampler->granules().used, std::thread::hardware_concurrency());
  EXPECT_EQ(sampler->granules().capacity, kCapacity - 1);
}

TEST(Events, SamplesOfADeadProcessLeaveNothingBehind) {
  auto sampler = open_sampler(1024);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  drain(*sampler);
  EXPECT_TRUE(in_child([] {
    char* area = map_pages(16 * HT_GRANULE_SIZE);
    for (int i = 0; i < 16; ++i) area[i * HT_GRANULE_SIZE] = 1;
    return 0;
  }));
  // tierd hears of the exit before it drains the last samples
  std::uint64_t child = 0, most = 0;
  {
    // the child's space is not known here: it is the youngest one
    auto drained = drain(*sampler);
    for (auto& [space, samples] : drained.spaces) child = std::max(child, space);
    most = drained.spaces[child];
  }
  EXPECT_GE(most, 16u);
  std::uint32_t used = sampler->granules().used;
  sampler->forget(child, 0, ~0ULL);
  for (int i = 0; i < 5; ++i) drain(*sampler);
  EXPECT_LE(sampler->granules().used, used - 16);
}

TEST(Events, FullIsCountedAndNotFatal) {
  auto sampler = open_sampler(64);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  char* area = map_pages(200 * HT_GRANULE_SIZE);
  for (int i = 0; i < 200; ++i) area[i * HT_GRANULE_SIZE] = 1;
  EXPECT_GE(sampler->stats().dropped_total[HT_DROP_FULL], 136u);
  auto drained = drain(*sampler);
  EXPECT_LE(drained.granules, 64u);
  sampler->stop();
  ASSERT_TRUE(sampler->start(page_faults())) << "and again, from an empty map";
  EXPECT_NE(own_space(*sampler), 0u);
}

TEST(Events, FollowsHotplug) {
  const std::string online = "/sys/devices/system/cpu/cpu1/online";
  if (access(online.c_str(), W_OK)) GTEST_SKIP() << "CPU 1 cannot be taken offline";
  auto sampler = open_sampler(1024);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  std::uint32_t all = sampler->sampling_cpus();
  auto faults_on_cpu1 = [&] {
    drain(*sampler);
    EXPECT_TRUE(in_child([] {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(1, &one);
      if (sched_setaffinity(0, sizeof(one), &one)) return 1;
      char* area = map_pages(512 * kPage);
      for (int page = 0; page < 512; ++page) area[page * kPage] = 1;
      return 0;
    }));
    return drain(*sampler).samples;
  };
  EXPECT_GE(faults_on_cpu1(), 512u);
  std::ofstream(online) << 0 << std::flush;
  drain(*sampler);
  EXPECT_EQ(sampler->sampling_cpus(), all - 1);
  std::ofstream(online) << 1 << std::flush;
  drain(*sampler);
  EXPECT_EQ(sampler->sampling_cpus(), all);
  EXPECT_GE(faults_on_cpu1(), 512u);
  // gone and back between two drains
  std::ofstream(online) << 0 << std::flush;
  std::ofstream(online) << 1 << std::flush;
  EXPECT_GE(faults_on_cpu1(), 512u);
}

std::string run(const std::string& command) {
  std::string output;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  char line[512];
  while (pipe && std::fgets(line, sizeof(line), pipe)) output += line;
  if (pipe) pclose(pipe);
  return output;
}

TEST(Events, PinnedMapsReadAsNames) {
  const std::filesystem::path pins = "/sys/fs/bpf/hypertier-test/v1";
  std::filesystem::create_directories(pins);
  auto sampler = open_sampler(64);
  ASSERT_TRUE(sampler && sampler->start(page_faults()));
  auto pinned = sampler->pin(pins);
  ASSERT_TRUE(pinned) << pinned.error().message;
  own_space(*sampler);
  auto index = run("bpftool map dump pinned " + (pins / "ht_index").string());
  EXPECT_NE(index.find("\"space\":"), index.npos) << index;
  EXPECT_NE(index.find("\"granule\":"), index.npos) << index;
  auto control = run("bpftool map dump pinned " + (pins / "ht_control").string());
  EXPECT_NE(control.find("\"capacity\": 64"), control.npos) << control;
  auto stats = run("bpftool map dump pinned " + (pins / "ht_drops").string());
  EXPECT_NE(stats.find("\"dropped_total\":"), stats.npos) << stats;
  auto granules = run("bpftool map dump pinned " + (pins / "ht_granules").string());
  EXPECT_NE(granules.find("\"samples\":"), granules.npos) << granules.substr(0, 2000);
  EXPECT_NE(granules.find("\"pages\":"), granules.npos);
  auto removed = remove_stale_pins(pins);
  ASSERT_TRUE(removed) << removed.error().message;
  EXPECT_TRUE(*removed);
  EXPECT_FALSE(std::filesystem::exists(pins));
  EXPECT_FALSE(*remove_stale_pins(pins));
}

}  // namespace
}  // namespace hypertier
