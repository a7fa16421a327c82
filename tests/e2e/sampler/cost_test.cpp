// SPDX-License-Identifier: GPL-2.0-or-later
// What a sample costs, by the kernel's own BPF statistics: against an empty
// program on the same event, and with a thousand times more granules. Run with
// counted instructions (lab --icount), the ratios are exact.
#include <gtest/gtest.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <sys/ioctl.h>

#include "common.hpp"
#include "sampler_test.skel.h"

namespace hypertier {
namespace {

constexpr std::size_t kSamples = 131072;

// One fault in each of so many granules, again and again. Memory stays small:
// a page is given back before the next one is touched.
void fault(char* area, std::size_t granules, std::size_t samples) {
  for (std::size_t i = 0; i < samples; ++i) {
    char* page = area + i % granules * HT_GRANULE_SIZE;
    *page = 1;
    madvise(page, HT_PAGE_SIZE, MADV_DONTNEED);
  }
}

double sampler_ns(Sampler& sampler, char* area, std::size_t granules) {
  fault(area, granules, granules);  // all are known
  drain(sampler);
  auto before = sampler.cost();
  fault(area, granules, kSamples);
  auto after = sampler.cost();
  auto drained = drain(sampler);
  EXPECT_GE(drained.granules, granules);
  EXPECT_GE(drained.samples, kSamples);
  return static_cast<double>(after.ns_total - before.ns_total) / (after.runs_total - before.runs_total);
}

TEST(Cost, SamplerAgainstAnEmptyProgramAndByFootprint) {
  constexpr std::size_t kMany = 32768, kFew = 32;
  char* area = map_pages(kMany * HT_GRANULE_SIZE);
  ASSERT_TRUE(area);

  auto* skeleton = sampler_test_bpf__open_and_load();
  ASSERT_TRUE(skeleton);
  Fd statistics(bpf_enable_stats(BPF_STATS_RUN_TIME));
  ASSERT_TRUE(statistics);
  auto event = page_faults().events[0];
  std::vector<bpf_link*> links;
  auto cpus = read_list(event.cpu_list);
  ASSERT_TRUE(cpus);
  for (int cpu : *cpus) {
    auto open = open_event(event, -1, cpu);
    ASSERT_TRUE(open) << open.error().message;
    links.push_back(bpf_program__attach_perf_event(skeleton->progs.empty, open->fd));
    ASSERT_TRUE(links.back());
  }
  fault(area, kFew, kSamples);
  bpf_prog_info info{};
  __u32 length = sizeof(info);
  ASSERT_EQ(bpf_prog_get_info_by_fd(bpf_program__fd(skeleton->progs.empty), &info, &length), 0);
  for (auto* link : links) bpf_link__destroy(link);
  sampler_test_bpf__destroy(skeleton);
  ASSERT_GE(info.run_cnt, kSamples);
  double empty_ns = static_cast<double>(info.run_time_ns) / info.run_cnt;

  auto sampler = Sampler::open(2 * kMany);
  ASSERT_TRUE(sampler) << sampler.error().message;
  auto started = (*sampler)->start(page_faults());
  ASSERT_TRUE(started) << started.error().message;
  double few_ns = sampler_ns(**sampler, area, kFew);
  double many_ns = sampler_ns(**sampler, area, kMany);
  EXPECT_GE((*sampler)->granules().used, kMany);
  std::printf("ns a sample: empty program %.0f, sampler with %zu granules %.0f, with %zu %.0f (%.2f x empty, %.2f x few)\n",
              empty_ns, kFew, few_ns, kMany, many_ns, many_ns / empty_ns, many_ns / few_ns);
  EXPECT_LE(many_ns, 3 * empty_ns);
  EXPECT_LE(many_ns, 1.2 * few_ns);
  EXPECT_EQ((*sampler)->stats().dropped_total[HT_DROP_FULL], 0u);
}

}  // namespace
}  // namespace hypertier
