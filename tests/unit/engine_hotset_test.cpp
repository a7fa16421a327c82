// SPDX-License-Identifier: GPL-2.0-or-later
// The whole engine with hyperplace's rules on a simulated hot set: 384 MiB
// touched, 64 MiB of it hot in 2 MiB pieces scattered over it, 90 % of the
// accesses hot, fast tier full of cold pages, s = 0.2 samples per fast page and
// epoch.
#include "engine_fake.hpp"

namespace hypertier::fake {
namespace {

constexpr __u64 kSpace = 7;
constexpr __u64 kBase = 0x7f0000000000;
constexpr __u64 kFootprint = 384 * kMiB;
constexpr int kGranules = kFootprint / HT_GRANULE_SIZE;
constexpr int kHotGranules = 32;
constexpr double kHotShare = 0.9;
constexpr double kDensity = 0.2;

class Hotset {
 public:
  Hotset(unsigned seed, __u64 fast_bytes, __u32 order, EngineSettings settings = {}) : rig(settings), rng_(seed) {
    FakeMachine& m = rig.machine;
    fast_pages_ = fast_bytes >> HT_PAGE_SHIFT;
    rig.policy.use_hyperplace();
    m.size_pages[HT_TIER_FAST] = fast_pages_;
    m.size_pages[HT_TIER_SLOW] = kFootprint >> HT_PAGE_SHIFT;
    m.map(kSpace, kBase, kBase + kFootprint);
    rig.start(100, kSpace);
    shift();
    // Cold pieces fill the fast tier to the last page; everything hot is slow.
    __u64 left = fast_pages_;
    for (int g = 0; g < kGranules; ++g) {
      bool fast = !hot_[g] && left >= kGranulePages;
      if (fast) left -= kGranulePages;
      m.populate(kSpace, granule(g), granule(g + 1), fast ? HT_TIER_FAST : HT_TIER_SLOW, order);
    }
    EXPECT_EQ(m.used(HT_TIER_FAST), fast_pages_);
  }

  // Another hot set of the same size.
  void shift() {
    std::vector<int> all(kGranules);
    for (int g = 0; g < kGranules; ++g) all[g] = g;
    std::shuffle(all.begin(), all.end(), rng_);
    std::vector<bool> before = hot_;
    hot_.assign(kGranules, false);
    int chosen = 0;
    for (int g : all)
      if (chosen < kHotGranules && (before.empty() || !before[g])) hot_[g] = true, ++chosen;
    hot_list_.clear();
    cold_list_.clear();
    for (int g = 0; g < kGranules; ++g) (hot_[g] ? hot_list_ : cold_list_).push_back(g);
  }

  EpochReport epoch() {
    auto samples = static_cast<int>(kDensity * static_cast<double>(fast_pages_));
    std::uniform_real_distribution<> unit(0, 1);
    for (int i = 0; i < samples; ++i) {
      auto& list = unit(rng_) < kHotShare ? hot_list_ : cold_list_;
      int g = list[std::uniform_int_distribution<std::size_t>(0, list.size() - 1)(rng_)];
      rig.source.touch(kSpace, granule(g) + std::uniform_int_distribution<__u64>(0, HT_GRANULE_SIZE - 1)(rng_));
    }
    return rig.epoch();
  }

  // True share of accesses that go to the fast tier, from placement and rates.
  double hit() const {
    double hit = 0;
    for (int g = 0; g < kGranules; ++g) {
      double share = hot_[g] ? kHotShare / kHotGranules : (1 - kHotShare) / (kGranules - kHotGranules);
      hit += share * static_cast<double>(rig.machine.resident(kSpace, granule(g), granule(g + 1), HT_TIER_FAST)) /
             kGranulePages;
    }
    return hit;
  }

  double best() const {
    double cold = static_cast<double>(fast_pages_ - kHotGranules * kGranulePages) /
                  ((kGranules - kHotGranules) * kGranulePages);
    return kHotShare + (1 - kHotShare) * cold;
  }

  // Epochs until 95 % of the best; limit + 1 if never.
  int converge(int limit) {
    for (int e = 1; e <= limit; ++e) {
      epoch();
      if (hit() >= 0.95 * best()) return e;
    }
    return limit + 1;
  }

  Rig rig;

 private:
  static __u64 granule(int g) { return kBase + static_cast<__u64>(g) * HT_GRANULE_SIZE; }
  std::mt19937 rng_;
  __u64 fast_pages_ = 0;
  std::vector<bool> hot_;
  std::vector<int> hot_list_, cold_list_;
};

class HotsetTest : public testing::TestWithParam<std::tuple<unsigned, __u64, __u32>> {};

TEST_P(HotsetTest, ReachesAndFollowsTheHotSet) {
  auto [seed, fast_mib, order] = GetParam();
  Hotset hotset(seed, fast_mib * kMiB, order);
  EXPECT_LT(hotset.hit(), 0.1);
  int first = hotset.converge(40);
  EXPECT_LE(first, 40) << "hit " << hotset.hit() << " best " << hotset.best();
  hotset.shift();
  EXPECT_LT(hotset.hit(), 0.6);
  int second = hotset.converge(40);
  EXPECT_LE(second, 40) << "hit " << hotset.hit() << " best " << hotset.best();
  RecordProperty("epochs_first", first);
  RecordProperty("epochs_second", second);
  std::printf("epochs: %d, after the shift %d; hit %.3f of %.3f\n", first, second, hotset.hit(), hotset.best());

  // It stays, and what is in place is left in place.
  __u64 moved = 0;
  for (int e = 0; e < 40; ++e) moved += hotset.epoch().moved.promoted_pages;
  EXPECT_GE(hotset.hit(), 0.95 * hotset.best());
  __u64 settled = 0;
  for (int e = 0; e < 20; ++e) settled += hotset.epoch().moved.promoted_pages;
  std::printf("settling: %llu pages in 40 epochs, then %llu in 20\n", moved, settled);
  EXPECT_LE(settled, 20 * (fast_mib * kMiB >> HT_PAGE_SHIFT) / 500);  // 0.2 % of the tier an epoch
}

INSTANTIATE_TEST_SUITE_P(Seeds, HotsetTest,
                         testing::Combine(testing::Values(1u, 2u, 3u), testing::Values(96ull, 128ull, 192ull),
                                          testing::Values(0u, 9u)));

}  // namespace
}  // namespace hypertier::fake
