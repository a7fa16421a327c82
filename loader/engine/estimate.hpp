// SPDX-License-Identifier: GPL-2.0-or-later
// The heat of every page from few samples: counters per page at three time
// scales, and an empirical-Bayes estimate down a radix tree
//
//   all -> space -> 128 MiB -> 2 MiB -> 64 KiB -> page
//
// in which a child with few samples looks like its parent and one with many
// like its own count. How much a child is believed is learned per level from
// how much siblings differ beyond chance. Rates are samples per page and epoch, an
// epoch in which a sample stands for fewer misses counting as several.
//
// Accessed bits come instead of samples where there are none, or beside them. A page is
// checked once in a while, so that what counts as n * W epochs above is the time
// for which its bits were watched. Alone, rates are touches per kBitUnitNs. Beside
// samples, a touch counts as a sample and the time watched as so many epochs as
// bring a page as many samples: misses and touches are taken to be in proportion.
//
// Pure: pages, samples and presence in, rates out. Memory is allocated per
// 2 MiB that has pages, and freed with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

// Pages [first, last) of a granule, as far as they are in one 64-bit word of it.
inline __u64 page_mask(unsigned first, unsigned last, unsigned word) {
  const unsigned from = std::max(first, word * 64);
  const unsigned to = std::min(last, word * 64 + 64);
  if (from >= to) return 0;
  const __u64 bits = to - from == 64 ? ~0ULL : (1ULL << (to - from)) - 1;
  return bits << (from - word * 64);
}

// Unit of time in which accessed bits are watched: the shortest interval.
inline constexpr double kBitUnitNs = 200'000;

struct EstimateSettings {
  // Weight of the past in the choice of the time scale, per epoch.
  double choice_keep = 0.966;
  // A scale takes over when it is ahead by so many standard deviations of the
  // hits of the one in use.
  double choice_lead = 0.25;
  // Smoothing of ln k, per pass: share of the new value.
  double dispersion_new = 0.3;
  double dispersion_at_first = 0.5;  // the same in the first passes
  double k_min = 0.02;
  double k_max = 1e4;
  // Above so many samples per page of the top set and epoch, a sample adds a
  // quarter of what it adds below.
  double dense = 0.3;
  // Weight of the past in what estimates are worth, per epoch: half-life of 8.
  double worth_keep = 0.917;
  // How many samples it takes to say as much about that as the estimate itself.
  double worth_prior = 4;
  // A pass looks into all pages of up to so many; of more, into each second,
  // fourth or eighth 64 KiB piece of each 2 MiB (dispersion, cut).
  __u64 looked_pages = 1 << 21;
};

class Estimate {
 public:
  static constexpr int kScales = 3;
  static constexpr std::array<__u32, kScales> kHalfLife = {8, 48, 256};  // epochs
  static constexpr unsigned kPages = HT_GRANULE_PAGES;
  static constexpr unsigned kPiecePages = 16;  // 64 KiB
  static constexpr unsigned kPieces = kPages / kPiecePages;
  static constexpr unsigned kRegionGranules = 64;  // 128 MiB

  // What is kept beside of 2 MiB whose accessed bits are read. All pages of it are
  // checked together, so the time watched is kept once.
  struct Bits {
    float watched[kScales] = {};  // kBitUnitNs, decayed
    float squares[kScales] = {};  // the same with squared weights
    float own[kScales] = {};      // squares of each check's share of watched: see paired()
    // Of the last check, to compare.
    float interval = 0;
    __u64 checked[kPages / 64] = {};
    __u64 set[kPages / 64] = {};
  };

  // What is kept of 2 MiB. counts are of samples, decayed.
  struct Granule {
    __u8 page[kScales][kPages] = {};     // in 1/unit() samples, saturating
    __u16 piece[kScales][kPieces] = {};  // in 1/4 samples: these do not saturate in practice
    // Where a page is: both bits: present, tier not known; none: not there.
    __u64 in_tier[HT_TIERS][kPages / 64] = {};
    __u64 tried[HT_TIERS][kPages / 64] = {};  // on a trial list, by the tier it was in
    float count[kScales] = {};
    float rate[kScales] = {};  // of the last pass
    __u32 birth = 0;           // epoch before the first that counts
    __u32 sampled_epoch = 0;
    bool huge = false;  // one folio
    std::unique_ptr<Bits> bits;

    __u64 present(unsigned word) const { return in_tier[0][word] | in_tier[1][word]; }
    unsigned present_pages() const;
    // Samples of pages [first, last) as of now; one unit is 1 / unit().
    double counted(int scale, unsigned first, unsigned last, double unit) const;
    unsigned piece_mask(unsigned p) const { return present(p / 4) >> (p % 4 * 16) & 0xffff; }
    bool has(unsigned p) const { return present(p / 64) >> (p % 64) & 1; }
  };

  explicit Estimate(const EstimateSettings& settings = {}) : settings_(settings) {}

  // A new epoch: counts age when it is their time. exposure: how many epochs of the first
  // period its samples say as much as.
  void begin(__u64 epoch, float exposure = 1);

  // Null: nothing is kept there. make() keeps it from now on; counting begins
  // with this epoch.
  Granule* find(__u64 space, __u64 granule);
  Granule* find_in_turn(__u64 space, __u64 granule);  // for who wants the next one too
  Granule& make(__u64 space, __u64 granule);
  // Pages [first, last) are gone. Frees what is empty.
  void clear(__u64 space, __u64 granule, unsigned first, unsigned last);
  void drop(__u64 space);
  std::vector<__u64> granules(__u64 space) const;
  // The first granule from this one on of which something is kept; HT_UNKNOWN64: none.
  __u64 next(__u64 space, __u64 granule) const;

  // Counts the samples of one granule's pages, in the order of pages; predicts
  // them first, which is what chooses the time scale. Pages that were not known
  // to be present are from now on.
  struct PageSamples {
    __u32 page = 0;  // in the granule
    __u32 samples = 0;
  };
  void add(Granule& granule, std::span<const PageSamples> sampled);
  // Fetches what that will need.
  static void fetch_pages(const Granule& granule, std::span<const PageSamples> sampled);
  // Counts what the accessed bits of a granule told; returns how many were set.
  // Pages outside of checked do not count.
  __u32 add(Granule& granule, const ht_bits& bits);
  void end_fold(__u64 top_pages);

  // The pass: rates of everything, for a top set of so many pages.
  void pass(__u64 top_pages);

  // Rates of the last pass at the chosen scale, as counts are now. Only pages
  // that are present have one; the others' are 0.
  void rates(const Granule& granule, float out[kPages]) const;
  // The same for its 64 KiB pieces, and for the pages of one whose rate is known.
  void piece_rates(const Granule& granule, float out[kPieces]) const;
  void page_rates(const Granule& granule, unsigned piece, float rate, float out[kPiecePages]) const;
  // Rates of some pages taken together.
  struct Summary {
    float low = 0;
    float high = 0;
    float sum = 0;
    float squares = 0;
    static Summary of(float rate) { return {rate, rate, rate, rate * rate}; }
    // Not told apart: all of them have the mean rate.
    Summary as_one(unsigned pages) const {
      const float mean = sum / static_cast<float>(pages);
      return {mean, mean, sum, squares};
    }
  };
  // Of the pieces whose pages are all there; nothing is said of the others.
  void summarize(const Granule& granule, const float piece_rates[kPieces], Summary out[kPieces]) const;
  // Of the pages of a huge page, as if it were none. Accessed bits tell nothing of them.
  void inner_rates(const Granule& granule, float out[kPages]) const;

  // What pages whose rate was estimated so were seen to have in the epochs that
  // followed: what moving them may be expected to bring. Rises with the rate. Where
  // most pages are alike, the estimates of those with a sample more are too high.
  float worth(float rate) const;
  // Has an epoch been seen after a pass? Before that all estimates rest on one moment.
  bool judged() const { return judged_; }

  // In address order, space by space.
  using Visit = std::function<void(__u64 space, __u64 granule, Granule& g)>;
  void visit(const Visit& visit);

  int scale() const { return scale_; }
  float cut(int scale) const { return cut_[scale]; }  // rate of the last page of the top set
  float cut() const { return cut_[scale_]; }
  double k(int level, int scale) const { return k_[scale][level]; }
  double predicted(int scale) const { return hits_[scale]; }
  double mean_rate() const { return mean_rate_; }
  // Mean rate of the top set at the chosen scale.
  double top_rate() const { return top_rate_[scale_]; }
  // The interval after which so many pages have their bits set as tells the
  // top_pages hottest best from the others. 0: not known yet.
  double bit_interval_ns(__u64 top_pages) const;
  // How much more the bits of 2 MiB, and of 64 KiB, vary from check to check than
  // independent ones would.
  double bit_dispersion(bool piece) const { return (piece ? piece_bits_ : granule_bits_).phi(); }
  // By bits alone: there are no samples, or too few yet to say what a touch is worth.
  // The same for all of an epoch.
  bool by_bits() const { return by_bits_; }
  // Epochs of samples that say as much of a page as one kBitUnitNs in which its bit
  // was watched. 0: not known, or not both kinds are there.
  double epochs_a_unit() const { return epochs_a_unit_; }
  __u32 unit() const { return unit_; }
  __u64 pages() const { return pages_; }  // present, as of the last pass
  std::size_t bytes() const;

  // Sum of the weights of the epochs since birth, each as often as it counts, and the noise factor.
  double weight(int scale, __u32 birth) const { return at(scale, birth).weight; }
  double noise(int scale, __u32 birth) const { return at(scale, birth).noise; }

 private:
  // How much heat differs inside huge pages is learned apart: they are placed by their mean.
  enum Level { kSpace, kRegion, kGranule, kPiece, kPage, kHugePiece, kHugePage, kLevels };
  struct Age {
    float weight = 0;
    float noise = 1;
  };
  struct Region {
    std::array<std::unique_ptr<Granule>, kRegionGranules> granules;
    unsigned used = 0;
  };
  using Space = std::map<__u64, Region>;
  // Evidence of how much children differ: sums of (x - e)^2 - x, and of e^2.
  struct Dispersion {
    double excess = 0;
    double expected = 0;
    double counted = 0;  // where bits are read: x
  };
  // Sums of squared differences between two checks, and what they were if bits
  // were independent.
  struct Repeats {
    double squares = 0;
    double expected = 0;
    double phi() const { return expected > 0 ? std::max(1.0, squares / expected) : 1; }
    void add(unsigned was, unsigned is, unsigned pages);
    void age(double keep) { squares *= keep, expected *= keep; }
  };

  struct Look {
    unsigned first;
    unsigned every;
  };
  // A granule as a whole, in a pass.
  struct Leaf {
    Granule* granule;
    float pages;
    float x[kScales];         // noise-free count: f * C
    float exposure[kScales];  // pages * f * W: expected is rate * exposure
  };

  // Pages by estimated rate, four classes an octave, and what they brought, decayed.
  static constexpr unsigned kClasses = 1 << 10;
  struct Class {
    float pages = 0;    // as of the last pass
    float hits = 0;     // of this epoch
    float brought = 0;  // hits
    float of = 0;       // pages and epochs
  };
  // A point of the curve from estimated rate to what it is worth.
  struct Worth {
    float key;  // log2 of the rate
    float worth;  // log2
  };

  const Age& at(int scale, __u32 birth) const;
  // How much was seen of each of its pages.
  Age seen(int scale, const Granule& g) const;
  // Neighbours' bits are not independent: what a granule's counts count above the
  // pages, if its bits are so much (phi) more alike.
  float trust(int scale, const Granule& g, double phi) const;
  // Of all that pairs of looks at a page could say about how it differs, what is not
  // of one check with itself: one bit alone says nothing.
  float paired(int scale, const Granule& g, const Age& age) const;
  void first_samples();
  void weigh_kinds();
  void predict(const Granule& g, std::span<const PageSamples> sampled, __u32 total);
  void age_tables();
  void decay(int scale);
  void set_unit(__u32 unit);
  void pieces(const Granule& g, int scale, float out[kPieces], Dispersion* dispersion = nullptr) const;
  void inner_rates(const Granule& granule, unsigned piece, float rate, float out[kPiecePages]) const;
  float told_by(float e) const;
  void pages_pass(Granule& g, int scale, Look look, Dispersion (&d)[kLevels], std::vector<__u32>& histogram);
  std::vector<Leaf> leaves();
  void estimate(int scale, __u64 top_pages, std::span<const Leaf> leaves);
  void learn(int scale, const Dispersion (&d)[kLevels]);
  void choose();
  void judge(int scale);
  void draw_worth();

  EstimateSettings settings_;
  __u64 epoch_ = 0;
  std::deque<float> exposures_;  // of this epoch, the one before, and so on
  __u64 pages_ = 0;
  __u32 unit_ = 16;
  double density_ = -1;  // samples per page of the top set and epoch, smoothed
  __u64 epoch_samples_ = 0;  // of what rates are of: touches, if by bits
  __u64 epoch_sampled_ = 0;
  double epoch_touches_ = 0;
  unsigned pass_ = 0;
  int scale_ = 0;
  bool passed_ = false;
  std::array<std::array<double, kLevels>, kScales> k_{};
  std::array<bool, kScales> learned_{};
  std::array<float, kScales> cut_{};
  std::array<float, kScales> tie_share_{};  // of the pages at the cut that belong to the top set
  std::array<double, kScales> top_rate_{};
  std::array<double, kScales> hits_{};
  std::array<double, kScales> epoch_hits_{};
  bool has_bits_ = false;  // since the first of each came
  bool has_samples_ = false;
  bool by_bits_ = false;
  // Both kinds, decayed: what comes of a sample's and of a bit's looking at a page.
  double samples_seen_ = 0;
  double samples_of_ = 0;  // pages and epochs
  double touches_seen_ = 0;
  double touches_of_ = 0;  // pages and kBitUnitNs
  double epochs_a_unit_ = 0;
  Repeats granule_bits_;
  Repeats piece_bits_;
  // Bits set, and the time their pages were watched, decayed.
  double bits_set_ = 0;
  double bits_watched_ = 0;
  // Counts' variance as a share of their mean: 1 for samples, less for bits. And
  // what it comes from: touches and their variance, decayed.
  float variance_ = 1;
  double touches_ = 0;
  double touches_variance_ = 0;
  double mean_rate_ = 0;
  std::array<std::vector<Class>, kScales> classes_;
  bool judged_ = false;
  bool classes_fresh_ = false;  // the last pass was made in the epoch before
  std::vector<Worth> worth_;
  std::array<std::vector<Age>, kScales> ages_;  // by epochs since birth
  __u32 random_ = 1;
  std::map<__u64, Space> spaces_;
  // The region that was asked for last: who goes by addresses asks for it again.
  struct {
    __u64 space = 0;
    __u64 index = 0;
    Region* region = nullptr;
  } found_;
  std::size_t granules_ = 0;
  std::size_t regions_ = 0;
};

}  // namespace hypertier
