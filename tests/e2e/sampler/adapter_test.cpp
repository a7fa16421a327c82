// SPDX-License-Identifier: GPL-2.0-or-later
// The whole adapter, as tierd uses it: the module, the virtual PEBS found by
// its probe, process events, samples of a buffer that is known, and one run
// into the module with the space that the samples name.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <vector>

#include "adapter/kernel_settings.hpp"
#include "adapter/module.hpp"
#include "adapter/tiers.hpp"
#include "common.hpp"

namespace hypertier {
namespace {

class WithModule : public testing::Test {
 protected:
  static void SetUpTestSuite() { ASSERT_EQ(std::system("insmod " HT_MODULE), 0); }
  // What BPF held is freed after grace periods, so the module may be in use for
  // a little longer.
  static void TearDownTestSuite() {
    int tries = 100;
    while (tries-- && std::system("rmmod hypertier 2>/dev/null") != 0) usleep(100000);
    EXPECT_GE(tries, 0) << "something holds the module";
  }
};

TEST_F(WithModule, SamplesMovesAndProcesses) {
  auto module = Module::open();
  ASSERT_TRUE(module) << module.error().message;
  auto info = module->info();
  ASSERT_TRUE(info) << info.error().message;
  auto second = Module::open();
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().err, EBUSY) << second.error().message;
  auto tiers = discover_tiers();
  ASSERT_TRUE(tiers) << tiers.error().message;
  EXPECT_EQ(tiers->origin, "memory tiers");
  auto set = module->set_tiers(tiers->masks());
  ASSERT_TRUE(set) << set.error().message;

  auto reports = diagnose_sources();
  for (auto& report : reports)
    std::printf("%s: %s %s\n", report.name.c_str(), report.text.c_str(), report.hint.c_str());
  auto source = choose_source();
  ASSERT_TRUE(source) << source.error().message;
  EXPECT_EQ(source->name, "vpebs");
  EXPECT_GE(source->probe.inside, 50u);
  EXPECT_GT(source->period, 0u);

  auto adapter = Adapter::open();
  ASSERT_TRUE(adapter) << adapter.error().message;
  EXPECT_FALSE((*adapter)->running());
  EXPECT_TRUE(std::filesystem::exists("/sys/fs/bpf/hypertier/v1/ht_granules"));
  auto started = (*adapter)->start(*source);
  ASSERT_TRUE(started) << started.error().message;

  std::uint64_t space = 0;
  auto taken = (*adapter)->events(
      [&](const ht_space_event& event) {
        if (event.pid == static_cast<__u32>(getpid())) space = event.space;
      },
      [] {});
  ASSERT_TRUE(taken) << taken.error().message;
  ASSERT_NE(space, 0u);

  // 32 MiB of which the first half gets nine of ten accesses
  constexpr std::size_t kBytes = 32UL << 20;
  char* area = map_pages(kBytes);
  std::mt19937_64 random(1);
  drain((*adapter)->samples());
  for (int i = 0; i < 600'000; ++i) {
    std::uint64_t number = random();
    std::size_t at = number % (kBytes / 2) + (number >> 40) % 10 / 9 * (kBytes / 2);
    volatile char* byte = area + at;
    if (number >> 63)
      *byte = 1;
    else
      (void)*byte;
  }
  Drained drained = drain((*adapter)->samples());
  auto first = reinterpret_cast<std::uintptr_t>(area) / HT_PAGE_SIZE;
  std::uint64_t hot = 0, cold = 0;
  for (auto& [page, count] : drained.pages) {
    if (page.first != space || page.second < first || page.second >= first + kBytes / HT_PAGE_SIZE) continue;
    (page.second < first + kBytes / 2 / HT_PAGE_SIZE ? hot : cold) += count;
  }
  std::printf("%lu samples: %lu hot, %lu cold, %lu of all others; %lu stores\n", drained.samples, hot, cold,
              drained.samples - hot - cold, drained.stores);
  EXPECT_GT(hot + cold, 1000u);
  EXPECT_NEAR(static_cast<double>(hot) / (hot + cold), 0.9, 0.03);
  EXPECT_NEAR(static_cast<double>(drained.stores) / drained.samples, 0.5, 0.05);
  auto stats = (*adapter)->samples().stats();
  for (int reason = 0; reason < HT_DROPS; ++reason)
    EXPECT_EQ(stats.dropped_total[reason], 0u) << "reason " << reason;

  Machine& machine = (*adapter)->machine();
  machine.spaces() = {};
  machine.spaces().nr = 1;
  machine.spaces().req[0] = {.space = space,
                             .seq = 0,
                             .tier_rss_pages = 0,
                             .pid = static_cast<__u32>(getpid()),
                             .error = 0,
                             .first = 0,
                             .count = 0};
  auto ran = machine.run_spaces();
  ASSERT_TRUE(ran) << ran.error().message;
  ASSERT_EQ(machine.spaces().req[0].error, 0);
  auto mappings = machine.mappings().subspan(machine.spaces().req[0].first, machine.spaces().req[0].count);
  EXPECT_TRUE(std::ranges::any_of(mappings, [&](auto& mapping) {
    return mapping.start <= first * HT_PAGE_SIZE && mapping.end >= first * HT_PAGE_SIZE + kBytes;
  }));

  ht_run run{};
  auto caller = (*adapter)->policy_caller(1);
  ASSERT_TRUE(caller) << caller.error().message;
  auto classified = (*caller)->run_classify(run);
  ASSERT_TRUE(classified) << classified.error().message;
  EXPECT_EQ(run.status, -ENOENT) << "the seat is empty";
  caller->reset();

  (*adapter)->stop();
  EXPECT_FALSE((*adapter)->running());
  EXPECT_EQ(std::system("bpftool -j perf show | grep -q ht_sample"), 256) << "no event is left";
  adapter->reset();
  EXPECT_FALSE(std::filesystem::exists("/sys/fs/bpf/hypertier"));
}

TEST_F(WithModule, TheModuleRestoresWhatADeadTierdLeft) {
  ASSERT_EQ(std::system("echo 1 > /proc/sys/kernel/numa_balancing"), 0);
  ASSERT_EQ(std::system("echo 20 > /proc/sys/vm/compaction_proactiveness"), 0);
  pid_t pid = fork();
  if (pid == 0) {
    auto module = Module::open();
    if (!module) _exit(1);
    KernelSettings settings(&*module);
    if (!settings.seat() || settings.numa_balancing() != "0" || settings.compaction_proactiveness() != "0") _exit(2);
    raise(SIGKILL);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status)) << WEXITSTATUS(status);
  // the module writes from a work item
  std::string value;
  for (int tries = 0; tries < 1000 && value != "1"; ++tries) {
    value = read_line("/proc/sys/kernel/numa_balancing").value_or("");
    usleep(1000);
  }
  EXPECT_EQ(value, "1");
  for (int tries = 0; tries < 1000 && value != "20"; ++tries) {
    value = read_line("/proc/sys/vm/compaction_proactiveness").value_or("");
    usleep(1000);
  }
  EXPECT_EQ(value, "20");
  auto module = Module::open();
  ASSERT_TRUE(module) << module.error().message;
  KernelSettings settings(&*module);
  ASSERT_TRUE(settings.seat());
  EXPECT_EQ(settings.numa_balancing(), "0");
  ASSERT_TRUE(settings.restore());
  EXPECT_EQ(settings.numa_balancing(), "1");
}

}  // namespace
}  // namespace hypertier
