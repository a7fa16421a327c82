// SPDX-License-Identifier: GPL-2.0-or-later
// Guards in whole epochs: rate limit, dry run, moves to and fro, ejections by
// the engine, explain.
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kA = 0x100000000, kB = 0x200000000;
constexpr __u64 kEachPages = 2048;  // 8 MiB

void by_samples(tier_range& r, const tier_scope&) { r.heat = r.samples; }
// Everything the other way round in each epoch.
void restless(tier_range& r, const tier_scope& scope) { r.heat = ((r.start == kA) + scope.epoch) & 1 ? 1000 : 1; }
void silent(tier_range&, const tier_scope&) {}

// Two mappings of 8 MiB, one in each tier, fast tier exactly full.
struct Two : Rig {
  explicit Two(EngineSettings settings = {}) : Rig(settings) {
    machine.size_pages[HT_TIER_FAST] = kEachPages;
    machine.size_pages[HT_TIER_SLOW] = 8 * kEachPages;
    machine.map(1, kA, kA + 8 * kMiB);
    machine.map(1, kB, kB + 8 * kMiB);
    start(10, 1);
    machine.populate(1, kA, kA + 8 * kMiB, HT_TIER_SLOW);
    machine.populate(1, kB, kB + 8 * kMiB, HT_TIER_FAST);
    policy.classify = by_samples;
    input = machine.input();
  }
  EpochReport step(__u32 a, __u32 b) {
    if (a) source.touch(1, kA, a);
    if (b) source.touch(1, kB, b);
    return epoch(input);
  }
  __u64 fast(__u64 base) const { return machine.resident(1, base, base + 8 * kMiB, HT_TIER_FAST); }

  EpochInput input;
};

TEST(Guards, RateHoldsAndIsSaid) {
  Two rig;
  rig.input.epoch_ns = 500'000'000;
  rig.input.rate_bytes_per_s = kMiB;  // 128 pages an epoch, both ways together
  __u64 moved = 0;
  for (int e = 1; e <= 20; ++e) {
    auto report = rig.step(100, 1);
    moved += report.moved.promoted_pages + report.moved.demoted_pages;
    EXPECT_LE(moved, 128u * e);
    EXPECT_EQ(report.moved.promoted_pages, 64u);
    EXPECT_GT(report.rate_limited_pages, 0u);
    EXPECT_EQ(report.decision, Decision::kMoved);
  }
  EXPECT_EQ(moved, 128u * 20);
  EXPECT_EQ(rig.fast(kA), 64u * 20);
  EXPECT_GT(rig.engine.totals().rate_limited_pages_total, 0u);
}

TEST(Guards, ARateTooLowForAPageIsSaid) {
  Two rig;
  rig.input.epoch_ns = 1'000'000;
  rig.input.rate_bytes_per_s = HT_PAGE_SIZE;
  auto report = rig.step(100, 1);
  EXPECT_EQ(report.decision, Decision::kRateLimited);
  EXPECT_EQ(report.moved.nr, 0u);
}

TEST(Guards, DryRunDecidesAndMovesNothing) {
  Two wet;
  Two dry;
  dry.input.dry_run = true;
  auto would = dry.step(100, 1);
  auto did = wet.step(100, 1);
  EXPECT_EQ(would.decision, Decision::kDryRun);
  EXPECT_EQ(would.dry_run_pages, did.moved.promoted_pages);
  EXPECT_EQ(would.moved.nr, 0u);
  ASSERT_EQ(would.moves.size(), did.moves.size());
  for (std::size_t i = 0; i < did.moves.size(); ++i) {
    EXPECT_EQ(would.moves[i].start, did.moves[i].start);
    EXPECT_EQ(would.moves[i].promoted_pages, did.moves[i].promoted_pages);
    EXPECT_EQ(would.moves[i].demoted_pages, did.moves[i].demoted_pages);
  }
  for (int e = 0; e < 10; ++e) dry.step(100, 1);
  EXPECT_EQ(dry.fast(kA), 0u);
  EXPECT_EQ(dry.fast(kB), kEachPages);
  EXPECT_EQ(dry.engine.totals().promoted_pages_total, 0u);
  EXPECT_GT(dry.engine.totals().dry_run_pages_total, 0u);
}

TEST(Guards, MovesAreRecordedWithTheirReason) {
  Two rig;
  auto report = rig.step(100, 1);
  ASSERT_EQ(report.moves.size(), 2u);
  const MoveRecord& up = report.moves[0].start == kA ? report.moves[0] : report.moves[1];
  const MoveRecord& down = report.moves[0].start == kA ? report.moves[1] : report.moves[0];
  EXPECT_EQ(up.heat, 100u);
  EXPECT_EQ(up.promoted_pages, report.moved.promoted_pages);
  EXPECT_EQ(up.demoted_pages, 0u);
  EXPECT_EQ(down.start, kB);
  EXPECT_EQ(down.demoted_pages, report.moved.demoted_pages);
  EXPECT_EQ(down.displaced_by_heat, 100u);
}

// What was moved to and fro stays where it is, for longer each time.
TEST(Guards, ReversalsCoolTheRange) {
  EngineSettings settings;
  settings.conduct.restless_epochs = 65;  // the policy stays
  Two rig(settings);
  rig.policy.classify = restless;
  __u64 first_half = 0, second_half = 0;
  bool cooled = false;
  for (int e = 0; e < 64; ++e) {
    auto report = rig.step(100, 100);
    (e < 32 ? first_half : second_half) += report.moved.promoted_pages;
    cooled |= report.decision == Decision::kCooling;
  }
  EXPECT_TRUE(cooled);
  EXPECT_GT(rig.engine.totals().reversed_pages_total, 0u);
  EXPECT_LT(first_half, 16 * 1024u);  // 1024 an epoch without it
  EXPECT_LE(second_half, 3 * 1024u);
  std::printf("to and fro: %llu pages in 32 epochs, then %llu in 32; 1024 an epoch asked for\n",
              static_cast<unsigned long long>(first_half), static_cast<unsigned long long>(second_half));
  // Another policy is not made to wait for it.
  rig.policy.classify = by_samples;
  ++rig.policy.generation;
  for (int e = 0; e < 3; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), kEachPages);
}

TEST(Guards, ASteadyShiftIsNoReversal) {
  Two rig;
  for (int round = 0; round < 4; ++round)
    for (int e = 0; e < 16; ++e) {
      auto report = round % 2 ? rig.step(1, 100) : rig.step(100, 1);
      EXPECT_EQ(report.reversed_pages, 0u);
      EXPECT_NE(report.decision, Decision::kPolicyFailed);
    }
  EXPECT_EQ(rig.fast(kB), kEachPages);
}

struct Expelled {
  int calls = 0;
  ht_run run{};
};

// The default takes over: from the failing epoch on another policy answers.
void take_over(Two& rig, Expelled& expelled) {
  rig.input.policy_failed = [&](const ht_run& run) {
    ++expelled.calls;
    expelled.run = run;
    rig.policy.classify = by_samples;
    ++rig.policy.generation;
    return true;
  };
}

TEST(Guards, ARestlessPolicyIsExpelledAndReplacedInTheSameEpoch) {
  Two rig;
  rig.policy.classify = restless;
  Expelled expelled;
  take_over(rig, expelled);
  int epochs = 0;
  EpochReport report;
  for (; !expelled.calls && epochs < 40; ++epochs) report = rig.step(100, 1);
  ASSERT_EQ(expelled.calls, 1);
  EXPECT_EQ(expelled.run.status, 0);
  EXPECT_EQ(expelled.run.exit.kind, static_cast<__u32>(TIER_EXIT_EJECTED));
  EXPECT_EQ(expelled.run.exit.code, static_cast<__u32>(TIER_CODE_BUDGET));
  EXPECT_EQ(expelled.run.exit.epoch, report.scope.epoch);
  EXPECT_EQ(expelled.run.generation, 1u);
  std::printf("expelled after %d epochs: %s\n", epochs, expelled.run.exit.message);
  // The same epoch is the default's: its generation answered, and its plan is carried out.
  EXPECT_EQ(report.policy_generation, 2u);
  EXPECT_NE(report.decision, Decision::kPolicyFailed);
  for (int e = 0; e < 3; ++e) rig.step(100, 1);
  EXPECT_EQ(rig.fast(kA), kEachPages);
}

TEST(Guards, TheDefaultIsNotExpelledForItsMoves) {
  Two rig;
  rig.policy.classify = restless;
  rig.input.is_default = true;
  Expelled expelled;
  take_over(rig, expelled);
  for (int e = 0; e < 100; ++e) rig.step(100, 1);
  EXPECT_EQ(expelled.calls, 0);
}

TEST(Guards, ASilentPolicyIsExpelledAndReplacedInTheSameEpoch) {
  Two rig;
  rig.policy.classify = silent;
  Expelled expelled;
  take_over(rig, expelled);
  for (int e = 0; e < 100; ++e) rig.step(1, 0);  // hardly a sample
  EXPECT_EQ(expelled.calls, 0);
  EpochReport report;
  for (int e = 0; e < 8; ++e) {
    EXPECT_EQ(expelled.calls, 0);
    report = rig.step(100, 1);
  }
  ASSERT_EQ(expelled.calls, 1);
  EXPECT_EQ(expelled.run.exit.code, static_cast<__u32>(TIER_CODE_NEVER_CLASSIFIES));
  EXPECT_EQ(report.decision, Decision::kMoved);
  EXPECT_GT(rig.fast(kA), 0u);
}

TEST(Guards, ExplainSaysWhatIsKnown) {
  Two rig;
  for (int e = 0; e < 5; ++e) rig.step(100, 1);
  auto hot = rig.engine.explain(rig.root, 10, kA + 0x5123);
  ASSERT_TRUE(hot && *hot);
  EXPECT_EQ((*hot)->view.range.start, kA);
  EXPECT_EQ((*hot)->page_tier_pages[HT_TIER_FAST], 1u);
  EXPECT_EQ((*hot)->page_tier_pages[HT_TIER_SLOW], 0u);
  EXPECT_TRUE((*hot)->notes & kRangeHot);
  EXPECT_EQ((*hot)->rank, 0u);
  EXPECT_EQ((*hot)->ranges, 2u);
  ASSERT_EQ((*hot)->history.size(), 5u);
  EXPECT_EQ((*hot)->history.front().epoch, 5u);
  EXPECT_EQ((*hot)->history.back().epoch, 1u);
  EXPECT_GT((*hot)->history.back().promoted_pages, 0u);
  auto cold = rig.engine.explain(rig.root, 10, kB);
  ASSERT_TRUE(cold && *cold);
  EXPECT_EQ((*cold)->page_tier_pages[HT_TIER_SLOW], 1u);
  EXPECT_GT((*cold)->history.back().demoted_pages, 0u);
  EXPECT_FALSE(rig.engine.explain(rig.root, 10, 0x1000).value());
  EXPECT_FALSE(rig.engine.explain(rig.root, 11, kA).value());
}

}  // namespace
}  // namespace hypertier::fake
