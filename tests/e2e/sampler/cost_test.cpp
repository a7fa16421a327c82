// SPDX-License-Identifier: GPL-2.0-or-later
// What a sample costs, by the kernel's own BPF statistics: against an empty
// program on the same event, and with a thousand times more granules. Run with
// counted instructions (lab --icount), the ratios are exact.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <gtest/gtest.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <vector>

#include "common.hpp"
#include "sampler_test.skel.h"

namespace hypertier {
namespace {

// Reads one page of each granule of [first, last): a fault that maps the zero
// page, and costs no memory but the page table.
void fault(char* area, std::size_t first, std::size_t last, int page) {
  for (std::size_t i = first; i < last; ++i)
    (void)*static_cast<volatile char*>(area + i * HT_GRANULE_SIZE + page * HT_PAGE_SIZE);
}

// ns a run over pages [from, to) of so many granules: the median of 32 slices,
// since an interrupt, or the other virtual CPU, may fall into a run.
double median_ns(const std::function<SamplerCost()>& cost, char* area, std::size_t granules, int from,
                 int to) {
  constexpr std::size_t kSlices = 32;
  std::vector<double> slices;
  std::size_t samples = granules * (to - from);
  for (std::size_t slice = 0; slice < kSlices; ++slice) {
    auto before = cost();
    for (std::size_t i = slice * samples / kSlices; i < (slice + 1) * samples / kSlices; ++i)
      fault(area, i % granules, i % granules + 1, from + static_cast<int>(i / granules));
    auto after = cost();
    EXPECT_GE(after.runs_total - before.runs_total, samples / kSlices);
    slices.push_back(static_cast<double>(after.ns_total - before.ns_total) /
                     (after.runs_total - before.runs_total));
  }
  std::ranges::nth_element(slices, slices.begin() + kSlices / 2);
  return slices[kSlices / 2];
}

struct Cost {
  double first_ns;  // a granule's first sample of the epoch
  double ns;        // every other
};

// So many granules live; `pages` samples of each.
Cost sampler_cost(Sampler& sampler, char* area, std::size_t granules, int pages) {
  fault(area, 0, granules, 0);  // all are known
  drain(sampler);
  auto cost_now = [&] { return sampler.cost(); };
  Cost cost{.first_ns = median_ns(cost_now, area, granules, 1, 2),
            .ns = median_ns(cost_now, area, granules, 2, 2 + pages)};
  auto drained = drain(sampler);
  EXPECT_GE(drained.granules, granules);
  EXPECT_GE(drained.samples, granules * (1 + pages));
  return cost;
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
  auto empty_cost = [&]() -> SamplerCost {
    bpf_prog_info info{};
    __u32 length = sizeof(info);
    EXPECT_EQ(bpf_prog_get_info_by_fd(bpf_program__fd(skeleton->progs.empty), &info, &length), 0);
    return {info.run_time_ns, info.run_cnt};
  };
  double empty_ns = median_ns(empty_cost, area, kFew, 0, 256);
  for (auto* link : links) bpf_link__destroy(link);
  sampler_test_bpf__destroy(skeleton);

  auto programs = load_programs({.granules = 2 * kMany});
  ASSERT_TRUE(programs) << programs.error().message;
  auto sampler = Sampler::open(*programs);
  ASSERT_TRUE(sampler) << sampler.error().message;
  auto started = (*sampler)->start(page_faults());
  ASSERT_TRUE(started) << started.error().message;
  madvise(area, kMany * HT_GRANULE_SIZE, MADV_DONTNEED);
  Cost few = sampler_cost(**sampler, area, kFew, 256);
  madvise(area, kMany * HT_GRANULE_SIZE, MADV_DONTNEED);
  Cost many = sampler_cost(**sampler, area, kMany, 1);
  EXPECT_GE((*sampler)->granules().used, kMany);
  std::printf(
      "ns a sample (first of its granule and epoch): empty program %.0f, sampler with %zu granules %.0f "
      "(%.0f), "
      "with %zu %.0f (%.0f): %.2f x empty, %.2f x few\n",
      empty_ns, kFew, few.ns, few.first_ns, kMany, many.ns, many.first_ns, many.ns / empty_ns,
      many.ns / few.ns);
  EXPECT_LE(many.ns, 3 * empty_ns);
  EXPECT_LE(many.ns, 1.2 * few.ns);
  EXPECT_LE(many.first_ns, 1.2 * few.first_ns);
  EXPECT_EQ((*sampler)->stats().dropped_total[HT_DROP_FULL], 0u);
}

}  // namespace
}  // namespace hypertier
