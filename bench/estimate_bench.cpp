// SPDX-License-Identifier: GPL-2.0-or-later
// What the estimate costs at 16.8 M pages (64 GiB) and 50,000 samples/s. Of an
// epoch of 500 ms it may take 15 ms of one core (3 %): estimate_ms, which is
// ageing, and passes and the drawing of ranges every 16th epoch. What follows
// samples and ranges comes on top: fold_ms, ranges_ms.
#include <benchmark/benchmark.h>

#include <time.h>

#include <algorithm>
#include <numeric>
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
    finish();
  }
  void fold() {
    for (const ht_granule& granule : batch) partition.fold(granule, [](__u64, __u32) {});
    partition.close(top);  // which counts them
  }
  void finish() {
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

double cpu_ms() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

void estimate_epoch(benchmark::State& state) {
  Footprint footprint(static_cast<__u64>(state.range(0)));
  double ageing = 0;
  double folding = 0;
  std::vector<double> fills;
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
    const double start = cpu_ms();
    footprint.partition.begin(++footprint.epoch);
    const double begun = cpu_ms();
    footprint.fold();
    const double folded = cpu_ms();
    footprint.finish();
    ageing += begun - start;
    folding += folded - begun;
    fills.push_back(cpu_ms() - folded);
  }
  // Epochs with a pass stand out: the others tell what ranges cost without one.
  std::vector<double> sorted = fills;
  std::sort(sorted.begin(), sorted.end());
  const double each = sorted[sorted.size() / 4];
  const double epochs = static_cast<double>(fills.size());
  const double ranges = std::accumulate(fills.begin(), fills.end(), 0.0) / epochs;
  state.counters["estimate_ms"] = ageing / epochs + ranges - each;
  state.counters["ranges_ms"] = each;
  state.counters["fold_ms"] = folding / epochs;
  state.counters["bytes_per_page"] =
      static_cast<double>(footprint.partition.estimate().bytes()) / static_cast<double>(state.range(0));
}
BENCHMARK(estimate_epoch)->Arg(1 << 17)->Arg(1 << 20)->Arg(1 << 24)->Iterations(64)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace hypertier
