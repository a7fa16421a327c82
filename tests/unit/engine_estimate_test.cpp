// SPDX-License-Identifier: GPL-2.0-or-later
// The estimate against its formulas and against draws whose truth is known.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "engine/estimate.hpp"

namespace hypertier {
namespace {

constexpr __u64 kSpace = 3;
constexpr __u64 kFirst = 0x7f0000000000 >> HT_GRANULE_SHIFT;  // a region's first granule
constexpr unsigned kPages = Estimate::kPages;

// Memory of so many granules, all of it present, and rates that it is drawn from.
void count(Estimate& estimate, Estimate::Granule& granule, const __u32 (&samples)[kPages]) {
  std::vector<Estimate::PageSamples> sampled;
  for (__u32 p = 0; p < kPages; ++p)
    if (samples[p]) sampled.push_back({p, samples[p]});
  estimate.add(granule, sampled);
}

struct Drawn {
  explicit Drawn(unsigned granules, unsigned seed = 1, const EstimateSettings& settings = {})
      : estimate(settings), rate(granules * kPages, 0), rng(seed) {
    estimate.begin(1);
    for (unsigned g = 0; g < granules; ++g) present(estimate.make(kSpace, kFirst + g));
  }
  static void present(Estimate::Granule& g) {
    for (auto& word : g.in_tier[HT_TIER_SLOW]) word = ~0ULL;
  }
  void epochs(int n, __u64 top, float exposure = 1) {
    for (int i = 0; i < n; ++i) {
      estimate.begin(++epoch, exposure);
      for (unsigned g = 0; g < rate.size() / kPages; ++g) {
        __u32 samples[kPages];
        for (unsigned p = 0; p < kPages; ++p) {
          const double mean = rate[g * kPages + p] * exposure;
          samples[p] = mean > 0 ? std::poisson_distribution<__u32>(mean)(rng) : 0;
        }
        count(estimate, *estimate.find(kSpace, kFirst + g), samples);
      }
      estimate.end_fold(top);
      estimate.pass(top);
    }
  }
  std::vector<float> rates() {
    std::vector<float> all(rate.size());
    for (unsigned g = 0; g < rate.size() / kPages; ++g)
      estimate.rates(*estimate.find(kSpace, kFirst + g), all.data() + g * kPages);
    return all;
  }
  // How many of the top pages by estimate are of the truly hottest.
  double precision(__u64 top) {
    std::vector<float> estimated = rates();
    std::vector<unsigned> order(rate.size());
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + static_cast<long>(top), order.end(),
                     [&](unsigned a, unsigned b) { return estimated[a] > estimated[b]; });
    std::vector<double> sorted = rate;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<long>(top) - 1, sorted.end(), std::greater<>());
    const double cut = sorted[top - 1];
    return static_cast<double>(std::count_if(order.begin(), order.begin() + static_cast<long>(top),
                                             [&](unsigned p) { return rate[p] >= cut; })) /
           static_cast<double>(top);
  }

  Estimate estimate;
  std::vector<double> rate;
  std::mt19937 rng;
  __u64 epoch = 0;
};

// While a sample stands for a quarter of the misses, an epoch counts as four: rates stay what they are, and more is known.
TEST(Estimate, AnEpochWithMoreSamplesCountsAsSeveral) {
  auto make = [](unsigned seed) {
    Drawn d(16, seed);
    for (unsigned p = 0; p < d.rate.size(); ++p) d.rate[p] = p % 5 == 0 ? 0.4 : 0.01;  // single pages
    return d;
  };
  Drawn burst = make(1), plain = make(1);
  const __u64 top = burst.rate.size() / 5;
  burst.epochs(6, top, 4);
  plain.epochs(6, top);
  EXPECT_GT(burst.precision(top), plain.precision(top) + 0.05);
  auto mean = [](Drawn& d, bool hot) {
    const std::vector<float> rates = d.rates();
    double sum = 0, n = 0;
    for (unsigned p = 0; p < rates.size(); ++p)
      if ((d.rate[p] > 0.1) == hot) sum += rates[p], ++n;
    return sum / n;
  };
  for (int after = 0; after < 40; after += 4) {
    EXPECT_NEAR(mean(burst, true), 0.4, 0.06) << after;
    EXPECT_NEAR(burst.estimate.mean_rate(), 0.088, 0.006) << after;
    EXPECT_NEAR(burst.estimate.worth(0.4F), 0.4, 0.06) << after;
    EXPECT_GT(burst.precision(top), plain.precision(top) - 0.01) << after;
    burst.epochs(4, top);
    plain.epochs(4, top);
  }
}

// All is alike, but counts are believed as if it were not: estimates differ by
// chance, and are worth about the same.
TEST(Estimate, WhatDiffersByChanceIsWorthTheSame) {
  EstimateSettings settings;
  settings.k_max = 0.3;
  Drawn d(64, 1, settings);
  std::fill(d.rate.begin(), d.rate.end(), 0.01);
  d.epochs(30, 8 * kPages);
  std::vector<float> estimated = d.rates();
  std::sort(estimated.begin(), estimated.end());
  const auto at = [&](double share) { return estimated[static_cast<std::size_t>(share * static_cast<double>(estimated.size()))]; };
  const float low = at(0.05), high = at(0.95);
  EXPECT_GT(high, 3 * low);
  EXPECT_LT(d.estimate.worth(high), 1.5 * d.estimate.worth(low));
  EXPECT_GT(d.estimate.worth(high), d.estimate.worth(low));  // in the same order
  EXPECT_NEAR(d.estimate.worth(high), 0.01, 0.003);
}

// Of the pages whose estimates are worth about so much the mean rate is that.
TEST(Estimate, WorthIsWhatIsSeenAfterwards) {
  Drawn d(64, 2);
  for (unsigned p = 0; p < d.rate.size(); ++p) d.rate[p] = 0.5 / (1 + p % 97);
  d.epochs(60, d.rate.size() / 5);
  std::vector<float> estimated = d.rates();
  struct Bin {
    double pages = 0, rate = 0, worth = 0;
  };
  std::map<int, Bin> bins;
  for (unsigned p = 0; p < d.rate.size(); ++p) {
    const float worth = d.estimate.worth(estimated[p]);
    Bin& bin = bins[static_cast<int>(std::floor(std::log2(worth)))];
    ++bin.pages, bin.rate += d.rate[p], bin.worth += worth;
  }
  int told = 0;
  for (auto& [octave, bin] : bins) {
    if (bin.pages < 200) continue;
    ++told;
    EXPECT_NEAR(bin.worth / bin.rate, 1, 0.2) << octave;
  }
  EXPECT_GE(told, 4);
  float last = 0;
  for (float rate = 1e-5F; rate < 10; rate *= 1.1F) {
    EXPECT_GT(d.estimate.worth(rate), last);
    last = d.estimate.worth(rate);
  }
}

// Of hot memory that is hot no more, the estimate has not heard yet, but its worth has.
TEST(Estimate, WhatWasHotIsWorthLessAtOnce) {
  Drawn d(64, 3);
  std::fill(d.rate.begin(), d.rate.begin() + kPages * 8, 0.3);
  d.epochs(60, kPages * 8);
  EXPECT_GT(d.estimate.worth(0.3F), 0.2);
  std::fill(d.rate.begin(), d.rate.begin() + kPages * 8, 0.0);
  std::fill(d.rate.begin() + kPages * 8, d.rate.begin() + kPages * 9, 0.3);  // something is to be seen
  d.epochs(4, kPages * 8);
  const std::vector<float> estimated = d.rates();
  EXPECT_LT(d.estimate.worth(estimated[0]), 0.6 * estimated[0]);
}

TEST(Estimate, WithoutSamplesAnEstimateIsWorthItself) {
  Estimate estimate;
  EXPECT_EQ(estimate.worth(0.25F), 0.25F);
  Drawn d(4);
  d.epochs(5, kPages);
  EXPECT_EQ(d.estimate.worth(0.25F), 0.25F);
}

TEST(Estimate, WeightAndNoiseAreThoseOfTheDecay) {
  Drawn d(1);
  d.epochs(200, 10);
  for (int s = 0; s < Estimate::kScales; ++s) {
    double sum = 0;
    double squares = 0;
    double weight = 1;
    const unsigned step = Estimate::kHalfLife[s] / 4;
    for (__u64 e = d.epoch; e > 0; --e) {
      sum += weight;
      squares += weight * weight;
      if (e % step == 0) weight *= 215.0 / 256;
    }
    EXPECT_NEAR(d.estimate.weight(s, 0), sum, 1e-3 * sum);
    EXPECT_NEAR(d.estimate.noise(s, 0), sum / squares, 1e-3);
    // the half-life is what it is called
    EXPECT_NEAR(std::log(0.5) / std::log(215.0 / 256) * step, Estimate::kHalfLife[s], 0.01 * Estimate::kHalfLife[s]);
  }
}

// What a pass learns from a part of the pieces is what all of them tell.
TEST(Estimate, APassMayLookIntoAnEighthOfALargeFootprint) {
  constexpr unsigned kGranules = 256;
  constexpr __u64 kTop = kGranules * kPages / 5;
  EstimateSettings part;
  part.looked_pages = kGranules * kPages / 8;
  Drawn all(kGranules), eighth(kGranules, 1, part);
  // Scattered heat: a fifth of the pages, anywhere, is twenty times as hot.
  std::mt19937 rng(7);
  for (unsigned p = 0; p < all.rate.size(); ++p) all.rate[p] = eighth.rate[p] = rng() % 5 ? 0.01 : 0.2;
  all.epochs(40, kTop);
  eighth.epochs(40, kTop);
  const int s = all.estimate.scale();
  EXPECT_EQ(s, eighth.estimate.scale());
  EXPECT_NEAR(eighth.estimate.cut() / all.estimate.cut(), 1, 0.05);
  EXPECT_NEAR(eighth.estimate.k(4, s) / all.estimate.k(4, s), 1, 0.05);  // of pages
  EXPECT_NEAR(eighth.estimate.top_rate() / all.estimate.top_rate(), 1, 0.03);
  EXPECT_NEAR(eighth.precision(kTop), all.precision(kTop), 0.01);
}

TEST(Estimate, MeanRateIsTheTrueMeanAtEachScaleOfTime) {
  Drawn d(64);
  for (auto& r : d.rate) r = 0.05;
  d.epochs(300, 5000);
  EXPECT_NEAR(d.estimate.mean_rate(), 0.05, 0.002);
  // Decayed by chance, not by truncation: pages sum up to what the granule counts.
  for (int s = 0; s < Estimate::kScales; ++s) {
    double pages = 0;
    double pieces = 0;
    double counts = 0;
    for (unsigned g = 0; g < 64; ++g) {
      const Estimate::Granule& granule = *d.estimate.find(kSpace, kFirst + g);
      for (__u8 c : granule.page[s]) pages += c;
      for (__u16 c : granule.piece[s]) pieces += c;
      counts += static_cast<double>(granule.count[s]);
    }
    EXPECT_NEAR(pieces / 4, counts, 0.02 * counts) << s;
    if (s == 0) {
      EXPECT_NEAR(pages / d.estimate.unit(), counts, 0.02 * counts);
    }
  }
}

TEST(Estimate, EvenHeatGivesEveryPageTheParentsMean) {
  Drawn d(32);
  for (auto& r : d.rate) r = 0.02;
  d.epochs(120, 3000);
  std::vector<float> rates = d.rates();
  double squares = 0;
  for (float r : rates) squares += (r / 0.02 - 1) * (r / 0.02 - 1);
  // Raw counts of 100 epochs would scatter by 60 %.
  EXPECT_LT(std::sqrt(squares / static_cast<double>(rates.size())), 0.1);
}

TEST(Estimate, ScatteredHotPagesAreToldFromTheirNeighbours) {
  Drawn d(32);
  std::mt19937 rng(9);
  const unsigned hot = 32 * kPages / 6;
  for (unsigned i = 0; i < hot; ++i) d.rate[rng() % d.rate.size()] = 0.2;
  for (auto& r : d.rate) r = std::max(r, 0.004);
  d.epochs(60, hot);
  EXPECT_GT(d.precision(hot), 0.95);
}

TEST(Estimate, PiecesOf64KiBNeedFewerSamplesThanPages) {
  const auto after = [](unsigned piece) {
    Drawn d(64);
    std::mt19937 rng(4);
    std::vector<unsigned> order(d.rate.size() / piece);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (unsigned i = 0; i < order.size() / 6; ++i)
      for (unsigned p = 0; p < piece; ++p) d.rate[order[i] * piece + p] = 0.04;
    for (auto& r : d.rate) r = std::max(r, 0.001);
    d.epochs(20, d.rate.size() / 6);
    return d.precision(d.rate.size() / 6);
  };
  const double pages = after(1);
  const double pieces = after(16);
  EXPECT_GT(pieces, 0.95);
  EXPECT_LT(pages, pieces);
}

// A few hot pages that are all alike do not hide how much the many others differ: with e^2
// as the only weight, they said more than those and hid it.
TEST(Estimate, HotPagesThatAreAlikeHideNothing) {
  constexpr unsigned kGranules = 64;
  Drawn d(kGranules);
  std::mt19937 rng(6);
  for (unsigned i = 0; i < d.rate.size(); ++i) d.rate[i] = i < kPages ? 2 : rng() % 5 == 0 ? 0.05 : 0.005;
  d.epochs(16, d.rate.size() / 5);
  // level 4: pages. Of those that are scattered k is 0.6; as weighed by e^2 alone it came out as 16
  EXPECT_LT(d.estimate.k(4, d.estimate.scale()), 8);
  EXPECT_GT(d.precision(d.rate.size() / 5), 0.33);
}

// Twice the samples everywhere: twice the rates, the same order. They are drawn, each for
// itself: the same ones counted twice would be evidence that pages differ.
TEST(Estimate, Scale) {
  Drawn once(8);
  Drawn twice(8);
  std::mt19937 rng(3);
  for (int e = 1; e <= 40; ++e) {
    for (Drawn* d : {&once, &twice}) d->estimate.begin(++d->epoch);
    for (unsigned g = 0; g < 8; ++g) {
      __u32 samples[kPages];
      __u32 doubled[kPages];
      std::binomial_distribution<__u32> of(1 + g, 1.0 / 40);
      for (unsigned p = 0; p < kPages; ++p) doubled[p] = of(rng) + (samples[p] = of(rng));
      count(once.estimate, *once.estimate.find(kSpace, kFirst + g), samples);
      count(twice.estimate, *twice.estimate.find(kSpace, kFirst + g), doubled);
    }
    for (Drawn* d : {&once, &twice}) {
      d->estimate.end_fold(100000);  // sparse enough for one unit in both
      d->estimate.pass(800);
    }
  }
  EXPECT_NEAR(twice.estimate.mean_rate() / once.estimate.mean_rate(), 2, 0.02);
  EXPECT_NEAR(twice.estimate.top_rate() / once.estimate.top_rate(), 2, 0.1);
}

// Where a granule stands among its siblings does not matter.
TEST(Estimate, PermutationOfSiblings) {
  constexpr unsigned kGranules = 16;
  Drawn straight(kGranules);
  Drawn turned(kGranules);
  auto to = [](unsigned g) { return (g * 7 + 3) % kGranules; };
  std::mt19937 rng(5);
  for (int e = 1; e <= 1; ++e) {  // one epoch: no rounding by chance
    for (Drawn* d : {&straight, &turned}) d->estimate.begin(++d->epoch);
    for (unsigned g = 0; g < kGranules; ++g) {
      __u32 samples[kPages];
      for (auto& n : samples) n = rng() % (2 + g) == 0;
      count(straight.estimate, *straight.estimate.find(kSpace, kFirst + g), samples);
      count(turned.estimate, *turned.estimate.find(kSpace, kFirst + to(g)), samples);
    }
    for (Drawn* d : {&straight, &turned}) {
      d->estimate.end_fold(1000);
      d->estimate.pass(1000);
    }
  }
  std::vector<float> a = straight.rates();
  std::vector<float> b = turned.rates();
  for (unsigned g = 0; g < kGranules; ++g)
    for (unsigned p = 0; p < kPages; ++p)
      ASSERT_NEAR(a[g * kPages + p], b[to(g) * kPages + p], 1e-4F * a[g * kPages + p]);
}

TEST(Estimate, MeansArePreservedDownTheTree) {
  Drawn d(16);
  std::mt19937 rng(8);
  for (auto& r : d.rate) r = rng() % 5 == 0 ? 0.3 : 0.01;
  d.epochs(50, 1000);
  for (unsigned g = 0; g < 16; ++g) {
    const Estimate::Granule& granule = *d.estimate.find(kSpace, kFirst + g);
    float rates[kPages];
    d.estimate.rates(granule, rates);
    const double sum = std::accumulate(rates, rates + kPages, 0.0);
    EXPECT_NEAR(sum / kPages, granule.rate[d.estimate.scale()], 1e-3 * sum / kPages);
  }
}

TEST(Estimate, ASaturatedPageStaysOnTop) {
  Drawn d(8);
  for (auto& r : d.rate) r = 0.01;
  for (unsigned p = 0; p < 100; ++p) d.rate[p * 37] = 5;  // 16 samples is all that a byte holds
  d.epochs(200, 100);
  EXPECT_EQ(d.precision(100), 1.0);
}

TEST(Estimate, DenseSamplesUseACoarserUnitAndBack) {
  Drawn d(8);
  for (auto& r : d.rate) r = 0.5;
  d.epochs(40, d.rate.size() / 5);
  EXPECT_EQ(d.estimate.unit(), 4U);
  EXPECT_NEAR(d.estimate.mean_rate(), 0.5, 0.05);
  for (auto& r : d.rate) r = 0.005;
  d.epochs(100, d.rate.size() / 5);
  EXPECT_EQ(d.estimate.unit(), 16U);
}

// A hot set that stays: a long memory predicts best. One that moves every few
// epochs: a short one.
TEST(Estimate, TheTimeScaleFollowsWhatPredicts) {
  Drawn still(32);
  std::mt19937 rng(6);
  for (auto& r : still.rate) r = rng() % 6 == 0 ? 0.02 : 0.001;
  still.epochs(200, still.rate.size() / 6);
  EXPECT_GT(still.estimate.scale(), 0);

  Drawn moving(32);
  for (int turn = 0; turn < 12; ++turn) {
    for (auto& r : moving.rate) r = rng() % 6 == 0 ? 0.4 : 0.001;
    moving.epochs(16, moving.rate.size() / 6);
  }
  EXPECT_EQ(moving.estimate.scale(), 0);
}

TEST(Estimate, NoSamplesNoHeat) {
  Drawn d(4);
  d.epochs(10, 100);
  for (float r : d.rates()) EXPECT_EQ(r, 0);
}

TEST(Estimate, MemoryIsWithinAThousandthAndFreed) {
  Estimate estimate;
  estimate.begin(1);
  constexpr __u64 kGranules = 4096;  // 8 GiB
  for (__u64 g = 0; g < kGranules; ++g) Drawn::present(estimate.make(kSpace, kFirst + g));
  EXPECT_LE(static_cast<double>(estimate.bytes()), 0.001 * static_cast<double>(kGranules * HT_GRANULE_SIZE));
  EXPECT_GE(estimate.bytes(), kGranules * sizeof(Estimate::Granule));

  // Half by page, granule by granule, the rest with its space.
  for (__u64 g = 0; g < kGranules / 2; ++g) {
    estimate.clear(kSpace, kFirst + g, 0, kPages / 2);
    EXPECT_NE(estimate.find(kSpace, kFirst + g), nullptr);
    estimate.clear(kSpace, kFirst + g, kPages / 2, kPages);
    EXPECT_EQ(estimate.find(kSpace, kFirst + g), nullptr);
  }
  EXPECT_LE(static_cast<double>(estimate.bytes()), 0.001 * static_cast<double>(kGranules / 2 * HT_GRANULE_SIZE));
  estimate.drop(kSpace);
  EXPECT_EQ(estimate.bytes(), 0U);
}

// A page that comes back to an address starts from nothing.
TEST(Estimate, ClearedPagesLeaveNoCountBehind) {
  Drawn d(1);
  std::fill(d.rate.begin(), d.rate.begin() + 64, 1.0);
  d.epochs(10, 64);
  Estimate::Granule& g = *d.estimate.find(kSpace, kFirst);
  d.estimate.clear(kSpace, kFirst, 0, 64);
  for (int s = 0; s < Estimate::kScales; ++s) {
    for (unsigned p = 0; p < 64; ++p) EXPECT_EQ(g.page[s][p], 0);
    EXPECT_NEAR(g.count[s], 0, 0.35F * 640);
  }
  EXPECT_FALSE(g.has(0));
  EXPECT_TRUE(g.has(64));
}

// A space that came late is compared by rate: its short history is no low heat.
TEST(Estimate, ALateSpaceIsJudgedByRate) {
  Drawn d(8);
  for (auto& r : d.rate) r = 0.05;
  d.epochs(100, 1000);
  constexpr __u64 kLate = 9;
  std::mt19937 rng(2);
  for (int e = 0; e < 6; ++e) {
    d.estimate.begin(++d.epoch);
    Estimate::Granule& late = d.estimate.make(kLate, kFirst);
    Drawn::present(late);
    __u32 samples[kPages];
    for (auto& n : samples) n = std::poisson_distribution<__u32>(0.2)(rng);
    count(d.estimate, late, samples);
    for (unsigned g = 0; g < 8; ++g) {
      for (auto& n : samples) n = std::poisson_distribution<__u32>(0.05)(rng);
      count(d.estimate, *d.estimate.find(kSpace, kFirst + g), samples);
    }
    d.estimate.end_fold(1000);
    d.estimate.pass(1000);
  }
  const auto ratio = [&](int s) { return d.estimate.find(kLate, kFirst)->rate[s] / d.estimate.find(kSpace, kFirst)->rate[s]; };
  EXPECT_NEAR(ratio(0), 4, 1);
  // Longer scales believe six epochs less, but never that it is colder.
  for (int s = 1; s < Estimate::kScales; ++s) EXPECT_GT(ratio(s), 1.25) << s;
}

// ------------------------------------------------------------- accessed bits

// Pages touched at rates, in touches a second; a granule is checked now and then.
struct Watched : Drawn {
  using Drawn::Drawn;
  ht_bits check(unsigned g, double seconds, const std::function<bool(unsigned)>& set) {
    ht_bits bits{};
    bits.space = kSpace;
    bits.granule = kFirst + g;
    bits.interval_ns = static_cast<__u64>(seconds * 1e9);
    for (unsigned p = 0; p < kPages; ++p) {
      bits.checked[p / 64] |= 1ULL << p % 64;
      if (set(p)) bits.set[p / 64] |= 1ULL << p % 64;
    }
    estimate.add(*estimate.find(kSpace, kFirst + g), bits);
    return bits;
  }
  void check(unsigned g, double seconds) {
    std::uniform_real_distribution<> unit(0, 1);
    check(g, seconds, [&](unsigned p) { return unit(rng) >= std::exp(-rate[g * kPages + p] * seconds); });
  }
  // Each granule is checked in one epoch out of `turn`.
  void epochs(int n, __u64 top, unsigned turn, const std::function<double(unsigned g)>& seconds) {
    for (int i = 0; i < n; ++i) {
      estimate.begin(++epoch);
      for (unsigned g = 0; g < rate.size() / kPages; ++g)
        if ((g + static_cast<unsigned>(i)) % turn == 0) check(g, seconds(g));
      estimate.end_fold(top);
      estimate.pass(top);
    }
  }
};
constexpr double kTouch = kBitUnitNs * 1e-9;  // a rate of 1 a second in the estimate's unit

TEST(EstimateBits, RatesAreTouchesWhateverTheInterval) {
  Watched m(16);
  for (unsigned g = 0; g < 16; ++g) std::fill_n(m.rate.begin() + g * kPages, kPages, 2 * std::exp2(g / 4.0));
  // touches in an interval: from 0.02 to 0.9 a page; beyond that they are only known
  // to be many
  m.epochs(120, 4 * kPages, 3, [](unsigned g) { return g % 2 ? 0.01 : 0.04; });
  const std::vector<float> rates = m.rates();
  for (unsigned g = 0; g < 16; ++g) {
    const double mean = std::accumulate(rates.begin() + g * kPages, rates.begin() + (g + 1) * kPages, 0.0) / kPages;
    EXPECT_NEAR(mean / kTouch, m.rate[g * kPages], 0.15 * m.rate[g * kPages]) << g;
  }
}

TEST(EstimateBits, ScatteredHotPagesAreFoundFromAFewChecks) {
  Watched m(64);
  for (double& r : m.rate) r = m.rng() % 6 ? 0.5 : 22;
  const auto hot = static_cast<__u64>(std::count(m.rate.begin(), m.rate.end(), 22));
  m.epochs(60, hot, 10, [](unsigned) { return 0.045; });  // six checks of each
  EXPECT_GT(m.precision(hot), 0.9);
}

TEST(EstimateBits, WhatWasNotCheckedLooksLikeTheRest) {
  Watched m(8);
  std::fill(m.rate.begin(), m.rate.end(), 20);
  for (int epoch = 2; epoch < 30; ++epoch) {
    m.estimate.begin(epoch);
    for (unsigned g = 0; g < 7; ++g) m.check(g, 0.02);
    m.estimate.end_fold(kPages);
    m.estimate.pass(kPages);
  }
  const std::vector<float> rates = m.rates();
  EXPECT_NEAR(rates[7 * kPages] / kTouch, 20, 4);
}

TEST(EstimateBits, NeighboursThatAreTouchedTogetherCountLess) {
  Watched alone(32), together(32);
  std::fill(alone.rate.begin(), alone.rate.end(), 20);
  for (int epoch = 2; epoch < 30; ++epoch) {
    for (Watched* m : {&alone, &together}) m->estimate.begin(epoch);
    for (unsigned g = 0; g < 32; ++g) {
      alone.check(g, 0.02);
      const bool on = together.rng() % 3 == 0;
      together.check(g, 0.02, [&](unsigned) { return on; });
    }
    for (Watched* m : {&alone, &together}) m->estimate.end_fold(4 * kPages), m->estimate.pass(4 * kPages);
  }
  EXPECT_LT(alone.estimate.bit_dispersion(false), 1.3);
  EXPECT_GT(together.estimate.bit_dispersion(false), 200);
  EXPECT_GT(together.estimate.bit_dispersion(true), 8);
  // All have the same mean: bursts are not taken for heat.
  std::vector<float> rates = together.rates();
  const auto [low, high] = std::minmax_element(rates.begin(), rates.end());
  EXPECT_LT(*high, 2 * *low);
}

// The interval that bits come to be read at.
double found_interval(Watched& m, __u64 top) {
  double seconds = 0.004;
  for (int i = 0; i < 60; ++i) {
    m.epochs(1, top, 1, [&](unsigned) { return seconds; });
    seconds = std::clamp(m.estimate.bit_interval_ns(top) * 1e-9, seconds / 1.5, 1.5 * seconds);
  }
  return seconds;
}

TEST(EstimateBits, TheIntervalFindsAsManyPagesAsTheTopHolds) {
  Watched m(64);
  // Skewed: the hottest have sixty times the rate of the coldest, most are cold.
  for (double& r : m.rate) r = 0.5 * std::exp2(m.rng() % 3 ? 0 : m.rng() % 7);
  const __u64 top = m.rate.size() / 5;
  const double seconds = found_interval(m, top);
  double touched = 0;
  for (double r : m.rate) touched += 1 - std::exp(-r * seconds);
  EXPECT_NEAR(touched, top, 0.1 * static_cast<double>(top));
}

TEST(EstimateBits, TheIntervalStaysShortWhereOnlyAPartOfTheTopIsTouched) {
  Watched m(64);
  for (double& r : m.rate) r = m.rng() % 8 ? 0 : 40;
  const __u64 top = m.rate.size() / 5;
  const double touches = 40 * found_interval(m, top);  // of a page that is touched at all
  EXPECT_GT(touches, 2);
  EXPECT_LT(touches, 6);
}

TEST(EstimateBits, AHugePagesBitIsOne) {
  Watched m(16);
  for (unsigned g = 0; g < 16; ++g) m.estimate.find(kSpace, kFirst + g)->huge = true;
  for (int epoch = 2; epoch < 6; ++epoch) {
    m.estimate.begin(epoch);
    for (unsigned g = 0; g < 16; ++g) {
      const bool on = g == 0 || m.rng() % 2;
      m.check(g, 0.02, [&](unsigned) { return on; });
    }
    m.estimate.end_fold(kPages);
    m.estimate.pass(kPages);
  }
  // Four of four is not much more than two of four.
  const std::vector<float> rates = m.rates();
  EXPECT_LT(rates[0], 2.5 * std::accumulate(rates.begin(), rates.end(), 0.0) / static_cast<double>(rates.size()));
}

// ------------------------------------------------- accessed bits beside samples

// rate is touches a second; one in so many of them is sampled.
struct Both : Watched {
  using Watched::Watched;
  // sampled 0: no samples; turn 0: no bits.
  void epochs(int n, __u64 top, double sampled, unsigned turn, double seconds) {
    for (int i = 0; i < n; ++i) {
      estimate.begin(++epoch);
      for (unsigned g = 0; g < rate.size() / kPages; ++g) {
        if (turn && (g + static_cast<unsigned>(i)) % turn == 0) check(g, seconds);
        if (sampled <= 0) continue;
        __u32 samples[kPages];
        for (unsigned p = 0; p < kPages; ++p)
          samples[p] = rate[g * kPages + p] > 0 ? std::poisson_distribution<__u32>(rate[g * kPages + p] * kEpoch * sampled)(rng) : 0;
        count(estimate, *estimate.find(kSpace, kFirst + g), samples);
      }
      estimate.end_fold(top);
      estimate.pass(top);
    }
  }
  double mean(unsigned g) {
    const std::vector<float> all = rates();
    return std::accumulate(all.begin() + g * kPages, all.begin() + (g + 1) * kPages, 0.0) / kPages;
  }
  static constexpr double kEpoch = 0.5;
};

TEST(EstimateBoth, RatesAreOfSamplesWhateverBitsAreReadAlongside) {
  constexpr double kSampled = 0.005;
  Both m(16);
  for (unsigned g = 0; g < 16; ++g) std::fill_n(m.rate.begin() + g * kPages, kPages, 2 * std::exp2(g / 4.0));
  m.epochs(100, 4 * kPages, kSampled, 5, 0.04);
  // A second has 1 / kTouch units and 1 / kEpoch epochs.
  EXPECT_NEAR(m.estimate.epochs_a_unit(), kTouch / (Both::kEpoch * kSampled), 0.15 * kTouch / (Both::kEpoch * kSampled));
  for (unsigned g = 0; g < 16; ++g) {
    const double truth = m.rate[g * kPages] * Both::kEpoch * kSampled;
    EXPECT_NEAR(m.mean(g), truth, 0.15 * truth) << g;
  }
  EXPECT_FALSE(m.estimate.by_bits());
}

TEST(EstimateBoth, TellMoreThanEither) {
  auto precision = [](double sampled, unsigned turn) {
    Both m(64, 5);
    for (double& r : m.rate) r = m.rng() % 6 ? 2 : 22;
    const auto hot = static_cast<__u64>(std::count(m.rate.begin(), m.rate.end(), 22));
    m.epochs(60, hot, sampled, turn, 0.045);
    return m.precision(hot);
  };
  const double samples = precision(0.002, 0), bits = precision(0, 15), both = precision(0.002, 15);
  std::printf("precision: samples %.3f, bits %.3f, both %.3f\n", samples, bits, both);
  EXPECT_GT(both, samples + 0.03);
  EXPECT_GT(both, bits + 0.03);
}

// One check of each page, and hardly any samples: what the bits say is not lost while nobody knows its worth.
TEST(EstimateBoth, BitsCountFromTheStart) {
  auto precision = [](double sampled) {
    Both m(64, 7);
    for (double& r : m.rate) r = m.rng() % 6 ? 0.5 : 22;
    const auto hot = static_cast<__u64>(std::count(m.rate.begin(), m.rate.end(), 22));
    m.epochs(8, hot, sampled, 8, 0.045);
    EXPECT_EQ(m.estimate.by_bits(), sampled <= 0);
    return m.precision(hot);
  };
  const double bits = precision(0), both = precision(0.0005), samples_too = precision(0.01);
  std::printf("precision: bits %.3f, with few samples %.3f, with more %.3f\n", bits, both, samples_too);
  EXPECT_GT(bits, 0.6);
  EXPECT_GT(both, bits - 0.03);
  EXPECT_GT(samples_too, bits);
}

// Bits alone are in touches; once it is known what these are worth rates are of samples.
TEST(EstimateBoth, SamplesMayComeLater) {
  constexpr double kSampled = 0.005;
  Both m(16);
  for (unsigned g = 0; g < 16; ++g) std::fill_n(m.rate.begin() + g * kPages, kPages, g < 4 ? 20 : 2);
  m.epochs(30, 4 * kPages, 0, 5, 0.04);
  EXPECT_TRUE(m.estimate.by_bits());
  EXPECT_NEAR(m.mean(0) / kTouch, 20, 4);
  m.epochs(30, 4 * kPages, kSampled, 5, 0.04);
  EXPECT_FALSE(m.estimate.by_bits());
  for (unsigned g : {0U, 8U}) {
    const double truth = m.rate[g * kPages] * Both::kEpoch * kSampled;
    EXPECT_NEAR(m.mean(g), truth, 0.2 * truth) << g;
  }
}

// A huge page has one bit, and what is hot in it is told by samples.
TEST(EstimateBoth, AHugePagesBitDoesNotCount) {
  auto rate = [](unsigned turn) {
    Both m(16);
    for (unsigned g = 0; g < 16; ++g) {
      m.estimate.find(kSpace, kFirst + g)->huge = true;
      std::fill_n(m.rate.begin() + g * kPages, kPages, g ? 1 : 10);
    }
    m.epochs(30, kPages, 0.01, turn, 1);  // nearly every bit is set
    EXPECT_EQ(m.estimate.epochs_a_unit(), 0);
    return m.mean(0);
  };
  const double truth = 10 * Both::kEpoch * 0.01;
  EXPECT_NEAR(rate(0), truth, 0.25 * truth);
  EXPECT_NEAR(rate(3), truth, 0.25 * truth);
}

}  // namespace
}  // namespace hypertier
