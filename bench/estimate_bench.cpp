// SPDX-License-Identifier: GPL-2.0-or-later
// What the estimate costs at 16.8 M pages (64 GiB) and 50,000 samples/s: an
// epoch of 500 ms is to take less than 15 ms of one core (3 %), passes every
// tenth epoch included.
#include <benchmark/benchmark.h>

#include <random>

#include "engine/engine.hpp"
#include "engine/estimated.hpp"

namespace hypertier {
namespace {

constexpr __u64 kSpace = 1;
constexpr __u64 kBase = 0x7f0000000000;

// All of it present, counts as after many epochs of uneven samples.
struct Footprint {
  explicit Footprint(__u64 pages) : granules(pages / HT_GRANULE_PAGES), top(pages / 5), partition(settings) {
    const ht_mapping mapping{kBase, kBase + pages * HT_PAGE_SIZE, TIER_RANGE_ANON, 0};
    partition.begin(++epoch);
    partition.map(kSpace, {&mapping, 1});
    partition.begin(++epoch);
    std::vector<ht_page_t> list(HT_GRANULE_PAGES);
    for (__u64 g = 0; g < granules; ++g) {
      const __u64 start = kBase + g * HT_GRANULE_SIZE;
      for (unsigned p = 0; p < HT_GRANULE_PAGES; ++p)
        list[p] = start + p * HT_PAGE_SIZE + (g % 5 == 0 ? HT_PAGE_FAST : 0);
      partition.walked({kSpace, start, start + HT_GRANULE_SIZE}, start + HT_GRANULE_SIZE, list);
    }
    for (int e = 0; e < 4; ++e) run(static_cast<int>(pages / 4));
  }
  void run(int samples) {
    partition.begin(++epoch);
    std::vector<std::vector<__u16>> drawn(granules);
    for (int i = 0; i < samples; ++i) {
      __u64 g = rng() % granules;
      if (rng() % 4) g = g / 8 * 8;
      drawn[g].push_back(static_cast<__u16>(rng() % HT_GRANULE_PAGES));
    }
    for (__u64 g = 0; g < granules; ++g) {
      if (drawn[g].empty()) continue;
      ht_granule& granule = batch.emplace_back();
      granule.space = kSpace;
      granule.granule = (kBase >> HT_GRANULE_SHIFT) + g;
      granule.samples = static_cast<__u32>(drawn[g].size());
      for (__u16 p : drawn[g]) granule.pages[p / 2] += p & 1 ? 1 << 16 : 1;
    }
    fold();
  }
  void fold() {
    for (const ht_granule& granule : batch) partition.fold(granule, [](__u64, __u32) {});
    partition.close(top);
    partition.fill(out);
    batch.clear();
  }

  EngineSettings settings;
  __u64 granules;
  __u64 top;
  __u64 epoch = 0;
  EstimatedPartition partition;
  std::mt19937_64 rng{1};
  std::vector<ht_granule> batch;
  std::vector<tier_range> out = std::vector<tier_range>(HT_RANGES_MAX);
};

void estimate_epoch(benchmark::State& state) {
  Footprint footprint(static_cast<__u64>(state.range(0)));
  for (auto _ : state) {
    state.PauseTiming();
    for (int i = 0; i < 25000; ++i) {
      ht_granule& g = footprint.batch.emplace_back();
      g.space = kSpace;
      g.granule = (kBase >> HT_GRANULE_SHIFT) + footprint.rng() % footprint.granules;
      g.samples = 1;
      g.pages[footprint.rng() % (HT_GRANULE_PAGES / 2)] = 1;
    }
    state.ResumeTiming();
    footprint.partition.begin(++footprint.epoch);
    footprint.fold();
  }
  state.counters["bytes_per_page"] =
      static_cast<double>(footprint.partition.estimate().bytes()) / static_cast<double>(state.range(0));
}
BENCHMARK(estimate_epoch)->Arg(1 << 17)->Arg(1 << 20)->Arg(1 << 24)->Iterations(60)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace hypertier
