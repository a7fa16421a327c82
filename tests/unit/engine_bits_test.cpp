// SPDX-License-Identifier: GPL-2.0-or-later
// Accessed bits as samples: rates from simulated page tables whose pages are
// touched at known rates.
#include "engine/bits.hpp"

#include <cmath>
#include <random>

#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kSpace = 3;
constexpr __u64 kFirst = 0x40000000 >> HT_GRANULE_SHIFT;

// Bits of one granule after an interval; rates of its pages in touches/s.
ht_bits read_bits(std::mt19937& rng, __u64 granule, double interval_s, const std::function<double(unsigned)>& rate,
                  bool huge = false) {
  ht_bits bits{};
  bits.space = kSpace;
  bits.granule = granule;
  bits.interval_ns = static_cast<__u64>(interval_s * 1e9);
  bits.huge = huge;
  std::uniform_real_distribution<> unit(0, 1);
  bool any = false;
  for (unsigned page = 0; page < HT_GRANULE_PAGES; ++page) {
    bits.checked[page / 64] |= 1ULL << page % 64;
    if (unit(rng) >= std::exp(-rate(page) * interval_s)) bits.set[page / 64] |= 1ULL << page % 64, any = true;
  }
  if (huge && any) std::fill(std::begin(bits.set), std::end(bits.set), ~0ULL);
  return bits;
}

std::map<__u64, __u64> counts(BitRates& rates, int epochs = 1, __u64 fast_pages = 4 * HT_GRANULE_PAGES) {
  std::map<__u64, __u64> by_granule;
  for (int e = 0; e < epochs; ++e)
    rates.count(fast_pages, [&](const ht_granule& g) {
      __u64 sum = 0;
      for (unsigned p = 0; p < HT_GRANULE_PAGES; ++p) sum += p & 1 ? g.pages[p / 2] >> 16 : g.pages[p / 2] & 0xffff;
      EXPECT_EQ(sum, g.samples);
      by_granule[g.granule] += g.samples;
    });
  return by_granule;
}

TEST(BitRates, RatesInProportionWhateverTheInterval) {
  std::mt19937 rng(1);
  BitRates rates(false);
  // 16 granules; granule g is touched at 4 * 2^(g/2) a page and second, read at
  // intervals that differ by a factor of 4 and in different rounds
  auto rate = [](int g) { return 4 * std::exp2(g / 2.0); };
  for (int round = 0; round < 12; ++round)
    for (int g = 0; g < 16; ++g)
      if (round % 3 == g % 3)
        rates.fold(read_bits(rng, kFirst + g, round % 4 == 0 ? 0.002 : 0.008, [&](unsigned) { return rate(g); }));
  auto seen = counts(rates, 200);
  // hottest 4 granules: mean rate of g = 12..15
  double mean = (rate(12) + rate(13) + rate(14) + rate(15)) / 4;
  EXPECT_NEAR(static_cast<double>(rates.interval_ns()), 1e9 / mean, 0.1e9 / mean);
  for (int g = 0; g < 16; ++g) {
    double expected = 200 * 0.2 * HT_GRANULE_PAGES * rate(g) / mean / rates.dispersion();
    EXPECT_NEAR(static_cast<double>(seen[kFirst + g]), expected, 0.35 * expected) << g;
    if (g >= 4) {
      EXPECT_GT(seen[kFirst + g], seen[kFirst + g - 4]) << g;
    }
  }
}

TEST(BitRates, ARateStandsUntilTheNextCheck) {
  std::mt19937 rng(2);
  BitRates rates(false);
  rates.fold(read_bits(rng, kFirst, 0.01, [](unsigned) { return 70.0; }));
  auto first = counts(rates);
  for (int epoch = 0; epoch < 50; ++epoch) counts(rates);
  rates.fold(read_bits(rng, kFirst + 1, 0.01, [](unsigned) { return 70.0; }));
  auto later = counts(rates);
  EXPECT_NEAR(static_cast<double>(later[kFirst]), static_cast<double>(later[kFirst + 1]), 0.2 * static_cast<double>(later[kFirst]));
  EXPECT_NEAR(static_cast<double>(first[kFirst]), HT_GRANULE_PAGES * 0.2, 2);
}

TEST(BitRates, IndependentBitsAreNotDispersedBurstsAre) {
  std::mt19937 rng(3);
  BitRates even(false), bursts(false);
  for (int round = 0; round < 40; ++round)
    for (int g = 0; g < 16; ++g) {
      even.fold(read_bits(rng, kFirst + g, 0.01, [](unsigned) { return 50.0; }));
      bool on = rng() % 4 == 0;
      bursts.fold(read_bits(rng, kFirst + g, 0.01, [&](unsigned) { return on ? 200.0 : 0.0; }));
    }
  EXPECT_LT(even.dispersion(), 1.3);
  EXPECT_GT(bursts.dispersion(), 50);
}

TEST(BitRates, HugePagesRankAmongOthers) {
  std::mt19937 rng(4);
  BitRates rates(false);
  for (int round = 0; round < 40; ++round) {
    rates.fold(read_bits(rng, kFirst, 0.01, [](unsigned) { return 50.0; }, true));      // always set
    rates.fold(read_bits(rng, kFirst + 1, 0.01, [](unsigned) { return 0.01; }, true));  // 5 % of the time
    rates.fold(read_bits(rng, kFirst + 2, 0.01, [](unsigned) { return 50.0; }));
    rates.fold(read_bits(rng, kFirst + 3, 0.01, [](unsigned) { return 0.01; }));
  }
  auto seen = counts(rates, 100);
  EXPECT_GT(seen[kFirst], 4 * seen[kFirst + 1]);
  EXPECT_GT(seen[kFirst], 100 * seen[kFirst + 3]);
  EXPECT_GT(seen[kFirst + 2], 4 * seen[kFirst + 1]);
}

TEST(BitRates, PagesWhoseBitsWereSetGetTheSamples) {
  std::mt19937 rng(5);
  BitRates rates(true);
  for (int round = 0; round < 8; ++round)
    rates.fold(read_bits(rng, kFirst, 0.01, [](unsigned page) { return page / 16 == 7 ? 200.0 : 0.5; }));
  __u64 inside = 0, all = 0;
  for (int epoch = 0; epoch < 50; ++epoch)
    rates.count(16, [&](const ht_granule& g) {
      for (unsigned p = 0; p < HT_GRANULE_PAGES; ++p) {
        unsigned n = p & 1 ? g.pages[p / 2] >> 16 : g.pages[p / 2] & 0xffff;
        all += n;
        if (p / 16 == 7) inside += n;
      }
    });
  ASSERT_GT(all, 100u);
  EXPECT_GT(static_cast<double>(inside) / static_cast<double>(all), 0.75);
}

TEST(BitRates, ForgetsWhatIsGone) {
  std::mt19937 rng(6);
  BitRates rates(false);
  for (int g = 0; g < 4; ++g) rates.fold(read_bits(rng, kFirst + g, 0.01, [](unsigned) { return 50.0; }));
  ht_mapping kept{(kFirst + 1) << HT_GRANULE_SHIFT, ((kFirst + 2) << HT_GRANULE_SHIFT) + HT_PAGE_SIZE, TIER_RANGE_ANON, 0};
  rates.keep(kSpace, {&kept, 1});
  auto seen = counts(rates);
  EXPECT_EQ(seen.size(), 2u);
  EXPECT_TRUE(seen.contains(kFirst + 1) && seen.contains(kFirst + 2));
  ht_bits empty{};
  empty.space = kSpace, empty.granule = kFirst + 1, empty.interval_ns = 1;
  rates.fold(empty);
  EXPECT_FALSE(counts(rates).contains(kFirst + 1));
  rates.keep(kSpace, {});
  EXPECT_TRUE(counts(rates).empty());
  EXPECT_EQ(rates.interval_ns(), 0u);
}

// The engine with hyperplace's rules on bits alone: 192 granules, 32 of them
// hot, fast tier of 64 full of cold ones; a quarter of memory read an epoch, at
// the interval that the engine asks for.
class BitHotset {
 public:
  static constexpr int kGranules = 192, kHot = 32, kFast = 64;
  static constexpr double kHotRate = 60, kColdRate = 1.3;  // touches a page and second

  BitHotset(unsigned seed, __u32 order, double hot_rate = kHotRate, double cold_rate = kColdRate)
      : rng_(seed), hot_rate_(hot_rate), cold_rate_(cold_rate), order_(order) {
    FakeMachine& m = rig.machine;
    rig.policy.use_hyperplace();
    m.size_pages[HT_TIER_FAST] = kFast * HT_GRANULE_PAGES;
    m.size_pages[HT_TIER_SLOW] = kGranules * HT_GRANULE_PAGES;
    m.map(kSpace, address(0), address(kGranules));
    rig.start(100, kSpace);
    for (int g = 0; g < kGranules; ++g) order_of_pass_.push_back(g);
    auto shuffled = order_of_pass_;
    std::shuffle(shuffled.begin(), shuffled.end(), rng_);
    hot_.assign(kGranules, false);
    for (int i = 0; i < kHot; ++i) hot_[shuffled[i]] = true;
    int left = kFast;
    for (int g = 0; g < kGranules; ++g)
      m.populate(kSpace, address(g), address(g + 1), !hot_[g] && left-- > 0 ? HT_TIER_FAST : HT_TIER_SLOW, order);
  }

  EpochReport epoch() {
    double base = rig.source.aimed_ns ? static_cast<double>(rig.source.aimed_ns) * 1e-9 : 0.008;
    for (int i = 0; i < kGranules / 4; ++i) {
      if (next_ == 0) std::shuffle(order_of_pass_.begin(), order_of_pass_.end(), rng_);
      int g = order_of_pass_[next_];
      next_ = (next_ + 1) % kGranules;
      rig.source.bits.push_back(read_bits(rng_, (address(g) >> HT_GRANULE_SHIFT), i % 5 ? base : base / 4,
                                          [&](unsigned) { return hot_[g] ? hot_rate_ : cold_rate_; }, order_ == 9));
    }
    return rig.epoch();
  }

  double hot_in_fast() const {
    __u64 pages = 0;
    for (int g = 0; g < kGranules; ++g)
      if (hot_[g]) pages += rig.machine.resident(kSpace, address(g), address(g + 1), HT_TIER_FAST);
    return static_cast<double>(pages) / (kHot * HT_GRANULE_PAGES);
  }

  Rig rig;

 private:
  static __u64 address(int g) { return (kFirst + static_cast<__u64>(g)) << HT_GRANULE_SHIFT; }
  std::mt19937 rng_;
  double hot_rate_, cold_rate_;
  __u32 order_;
  std::vector<int> order_of_pass_;
  int next_ = 0;
  std::vector<bool> hot_;
};

TEST(Bits, HyperplaceFindsTheHotSet) {
  for (unsigned seed : {1u, 2u, 3u}) {
    BitHotset hotset(seed, 0);
    int epochs = 0;
    while (hotset.hot_in_fast() < 0.95 && epochs < 40) hotset.epoch(), ++epochs;
    EXPECT_GE(hotset.hot_in_fast(), 0.95) << "seed " << seed;
    // mean of the hottest 64 granules: 32 at 60 and 32 at 1.3 touches/s
    EXPECT_NEAR(static_cast<double>(hotset.rig.source.aimed_ns), 1e9 / 30.65, 0.25e9 / 30.65);
    __u64 moved = 0;
    for (int e = 0; e < 40; ++e) {
      __u64 promoted = hotset.epoch().moved.promoted_pages;
      if (e >= 20) moved += promoted;
    }
    EXPECT_LE(moved, 20u * BitHotset::kFast * HT_GRANULE_PAGES / 500) << "seed " << seed;
    std::printf("seed %u: %d epochs; settled: %llu pages in 20\n", seed, epochs, moved);
  }
}

// Long intervals: bits come in one epoch of six. A trial waits for them, and epochs
// without any do not count.
TEST(Bits, ATrialLastsUntilBitsOfItWereRead) {
  constexpr int kGranules = 48, kFast = 16, kTurn = 6;
  constexpr auto address = [](int g) { return (kFirst + static_cast<__u64>(g)) << HT_GRANULE_SHIFT; };
  std::mt19937 rng(1);
  Rig rig;
  rig.policy.use_heattree();
  rig.policy.admit = [](tier_range& hot, const tier_range&) {  // tries, and never moves
    hot.action = TIER_TRY;
    return false;
  };
  rig.machine.size_pages[HT_TIER_FAST] = kFast * HT_GRANULE_PAGES;
  rig.machine.size_pages[HT_TIER_SLOW] = kGranules * HT_GRANULE_PAGES;
  rig.machine.map(kSpace, address(0), address(kGranules));
  rig.start(100, kSpace);
  for (int g = 0; g < kGranules; ++g)
    rig.machine.populate(kSpace, address(g), address(g + 1), g < kFast ? HT_TIER_FAST : HT_TIER_SLOW);
  int told = 0;
  bool read = false;  // since something was told
  for (int e = 0; e < 12 * kTurn; ++e) {
    if (e % kTurn == 0) {
      read = true;
      for (int g = 0; g < kGranules; ++g)
        rig.source.bits.push_back(read_bits(rng, kFirst + static_cast<__u64>(g), 2, [&](unsigned) { return g < 2 * kFast ? 0.1 : 1; }));
    }
    const EpochReport report = rig.epoch();
    const __u64 pages = report.scope.trial_pages[HT_TIER_SLOW];
    told += pages != 0;
    if (pages) {
      EXPECT_TRUE(read) << e;
      read = false;
      EXPECT_GT(report.scope.trial_hits[HT_TIER_SLOW], 2 * report.scope.trial_hits[HT_TIER_FAST]) << e;
    }
  }
  EXPECT_GE(told, 10);
}

TEST(Bits, EvenHeatAndAnIdleMachineMoveNothing) {
  for (double rate : {20.0, 0.001}) {
    BitHotset even(7, 0, rate, rate);
    __u64 moved = 0;
    for (int e = 0; e < 40; ++e) {
      __u64 promoted = even.epoch().moved.promoted_pages;
      if (e >= 8) moved += promoted;
    }
    EXPECT_LE(moved, 32u * BitHotset::kFast * HT_GRANULE_PAGES / 500) << rate;
  }
}

// Rules on ranges know no way to weigh a touch and a sample: bits do not count.
TEST(Bits, BesideSamplesRangesAreRankedByTheseAlone) {
  constexpr int kGranules = 8;
  Rig rig;
  rig.policy.use_hyperplace();
  rig.machine.size_pages[HT_TIER_FAST] = 2 * HT_GRANULE_PAGES;
  rig.machine.size_pages[HT_TIER_SLOW] = kGranules * HT_GRANULE_PAGES;
  rig.machine.map(kSpace, kFirst << HT_GRANULE_SHIFT, (kFirst + kGranules) << HT_GRANULE_SHIFT);
  rig.start(100, kSpace);
  std::mt19937 rng(1);
  for (int e = 0; e < 10; ++e) {
    rig.source.touch(kSpace, kFirst << HT_GRANULE_SHIFT, 50);
    for (int g = 0; g < kGranules; ++g)
      rig.source.bits.push_back(read_bits(rng, kFirst + static_cast<__u64>(g), 0.1, [&](unsigned) { return g ? 20.0 : 1.0; }));
    EXPECT_EQ(rig.epoch().scope.samples, 50u) << e;
  }
}

TEST(Bits, TheSourceLearnsWhatIsManaged) {
  BitHotset hotset(1, 0);
  hotset.epoch();
  ASSERT_TRUE(hotset.rig.source.managed.contains(kSpace));
  EXPECT_EQ(hotset.rig.source.managed[kSpace].first, 100u);
  EXPECT_EQ(hotset.rig.source.managed[kSpace].second.size(), 1u);
  hotset.rig.stop(100);
  hotset.rig.epoch();
  EXPECT_TRUE(hotset.rig.source.managed.empty());
}

}  // namespace
}  // namespace hypertier::fake
