// SPDX-License-Identifier: GPL-2.0-or-later
// What an epoch costs the engine itself, on the tests' fake machine: by
// granules touched, by ranges, by processes. It must follow samples and ranges;
// the footprint has a benchmark of its own to show that it does not matter.
#include <benchmark/benchmark.h>

#include "../tests/unit/engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kBase = 0x100000000;
constexpr __u64 kSpace = 1;

// One process with granules mapped and cut into as many ranges as asked for.
struct Cut : Rig {
  Cut(__u64 granules, __u32 ranges) : Rig(limits(ranges)) {
    machine.map(kSpace, kBase, kBase + granules * HT_GRANULE_SIZE);
    start(10, kSpace);
    policy.classify = [](tier_range& r, const tier_scope&) { r.action = TIER_SPLIT; };
    while (run().scope.ranges < ranges) continue;
    policy.classify = [](tier_range& r, const tier_scope&) { r.heat = r.samples; };
  }
  static EngineSettings limits(__u32 ranges) {
    EngineSettings settings;
    settings.max_ranges = ranges - 1;
    return settings;
  }
  EpochReport run() {
    auto in = machine.input();
    in.moves = false;
    return epoch(in);
  }
};

void touch(Cut& cut, __u64 granules, __u64 stride) {
  for (__u64 g = 0; g < granules; ++g) cut.source.touch(kSpace, kBase + g * stride * HT_GRANULE_SIZE, 3);
}

void epoch_by_granules(benchmark::State& state) {
  Cut cut(65536, 2048);
  for (auto _ : state) {
    state.PauseTiming();
    touch(cut, state.range(0), 65536 / state.range(0));
    state.ResumeTiming();
    cut.run();
  }
  state.SetComplexityN(state.range(0));
}
BENCHMARK(epoch_by_granules)->RangeMultiplier(4)->Range(16, 16384)->Unit(benchmark::kMicrosecond)->Complexity();

void epoch_by_ranges(benchmark::State& state) {
  Cut cut(32768, static_cast<__u32>(state.range(0)));
  for (auto _ : state) cut.run();
  state.SetComplexityN(state.range(0));
}
BENCHMARK(epoch_by_ranges)->RangeMultiplier(4)->Range(16, 16384)->Unit(benchmark::kMicrosecond)->Complexity();

void epoch_by_footprint(benchmark::State& state) {
  Cut cut(state.range(0), 256);
  for (auto _ : state) {
    state.PauseTiming();
    touch(cut, 256, state.range(0) / 256);
    state.ResumeTiming();
    cut.run();
  }
}
BENCHMARK(epoch_by_footprint)->RangeMultiplier(8)->Range(512, 1 << 24)->Unit(benchmark::kMicrosecond);

void epoch_by_processes(benchmark::State& state) {
  Rig rig;
  for (__u32 p = 0; p < state.range(0); ++p) {
    for (__u64 m = 0; m < 8; ++m) rig.machine.map(100 + p, kBase + m * 8 * kMiB, kBase + m * 8 * kMiB + 4 * kMiB);
    rig.start(1000 + p, 100 + p);
  }
  rig.epoch();
  for (auto _ : state) rig.epoch();
  state.SetComplexityN(state.range(0));
}
BENCHMARK(epoch_by_processes)->RangeMultiplier(4)->Range(4, 1024)->Unit(benchmark::kMicrosecond)->Complexity();

}  // namespace
}  // namespace hypertier::fake

BENCHMARK_MAIN();
