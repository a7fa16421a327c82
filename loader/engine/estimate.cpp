// SPDX-License-Identifier: GPL-2.0-or-later
#include "estimate.hpp"

#include <emmintrin.h>  // of every x86-64

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace hypertier {
namespace {

// Counts are multiplied by this every quarter of a half-life: 2^(-1/4) to four
// digits, as bytes can.
constexpr __u32 kDecay256 = 215;
constexpr float kDecay = kDecay256 / 256.0F;
constexpr __u32 kPieceUnit = 4;  // piece counts are in 1/4 samples
constexpr unsigned kKeys = 1 << 16;
constexpr unsigned kTieKeys = 48;  // a fifth of an octave
constexpr unsigned kClassShift = 6;  // keys of a class: a quarter of an octave
// Classes that are worth the same still differ a little: their order is kept.
constexpr float kWorthStep = 0.01F;
constexpr __u32 kAgeMax = 4096;  // older than that is as good as for ever
// Granules per epoch whose samples are used to judge the time scales.
constexpr __u32 kPredicted = 1024;
// Checks of a granule are compared if their intervals are about the same.
constexpr float kSimilar = 1.5;
constexpr double kRepeatsKeep = 0.95;  // by epoch
// More touches than this within an interval are not told from fewer.
constexpr float kTouchesMax = 4;
// In which all pages tell alike of dispersion.
constexpr unsigned kFirstPasses = 24;
// In which dispersion is learned faster: each knows much that those before it did not.
constexpr unsigned kFastPasses = 8;
// An interval should find as many pages touched as the top set has, at most this share
// of all. It is the pages about the cut that a bit must tell apart, which it does best if
// they are touched once or twice; those far above may be touched in each interval.
constexpr double kTouchedMax = 0.5;
// Where that would need more touches than this of a page of the top set, on average,
// only a part of the set is in use, which shorter intervals find as well and sooner.
constexpr double kTouchesTop = 2;
constexpr double kTouchesKeep = 0.97;  // by epoch
// Beside samples: so many of them are enough to say what a touch is worth.
constexpr double kSamplesKnown = 100;
constexpr double kTouchedKeep = 0.9;  // of what is known of that, by epoch

__u32 decay_step(int scale) { return std::max(1U, Estimate::kHalfLife[scale] / 4); }

// Random bytes for stochastic rounding; each use starts somewhere else in it.
constexpr std::size_t kNoise = 8192;
const std::array<__u8, kNoise>& noise_bytes() {
  static const auto bytes = [] {
    std::array<__u8, kNoise> b{};
    __u64 state = 0x9e3779b97f4a7c15ULL;
    for (__u8& byte : b) {
      state += 0x9e3779b97f4a7c15ULL;
      __u64 z = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ULL;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
      byte = static_cast<__u8>(z >> 56);
    }
    return b;
  }();
  return bytes;
}

__u32 next_random(__u32& state) {
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

// v * factor / 256, rounded up or down by chance so that the mean is exact. 0: nothing is left.
template <class T, std::size_t N>
__u32 thin(T (&v)[N], __u32 factor, const __u8* random) {
  T left = 0;
  for (std::size_t i = 0; i < N; ++i) left |= v[i] = static_cast<T>((v[i] * factor + random[i]) >> 8);
  return left;
}

// Granules lie anywhere in memory, and one is done before the next has come.
void fetch(const void* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// Where its pages are, and what it counted as a whole.
void fetch_facts(const Estimate::Granule* g) {
  if (!g) return;
  fetch(g->in_tier, sizeof(g->in_tier));
  fetch(g->count, 1);
}

void fetch_counts(const Estimate::Granule* g, int scale) {
  if (!g) return;
  fetch(g->page[scale], sizeof(g->page[scale]));
  fetch(g->piece[scale], sizeof(g->piece[scale]));
  fetch(g->count, 1);
}

// Calls f(index, granule) for each of a region's granules, those that follow being
// fetched meanwhile.
constexpr unsigned kAhead = 3;
template <class Granules, class Fetch, class F>
void each_granule(Granules& granules, Fetch&& fetch_next, F&& f) {
  for (unsigned i = 0; i < kAhead; ++i) fetch_next(granules[i].get());
  for (unsigned i = 0; i < granules.size(); ++i) {
    if (i + kAhead < granules.size()) fetch_next(granules[i + kAhead].get());
    if (granules[i]) f(i, *granules[i]);
  }
}

// Touches in an interval in which u are expected, given that there was one: u /
// (1 - exp(-u)), by its series.
float touches_if_any(float u) { return 1 + u * (0.5F + u * (1.0F / 12 - u * u * (1.0F / 720))); }
// Of the 16 bytes of a piece: eight at a time, the odd ones beside the even ones.
__u32 sum_of_piece(const __u8* page) {
  constexpr __u64 kEven = 0x00ff00ff00ff00ffULL;
  __u64 half[2];
  static_assert(Estimate::kPiecePages == sizeof(half));
  std::memcpy(half, page, sizeof(half));
  const __u64 sums = (half[0] & kEven) + (half[0] >> 8 & kEven) + (half[1] & kEven) + (half[1] >> 8 & kEven);
  return static_cast<__u32>(sums * 0x0001000100010001ULL >> 48);
}

// Side by side: compilers do not reorder sums of floats by themselves.
using Four = float __attribute__((vector_size(16)));

// The lowest and the highest count of a piece's pages.
std::pair<__u8, __u8> bounds_of_piece(const __u8* page) {
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(page));
  __m128i high = low;
  // Each time the lower bytes see the upper ones' half; what comes in above, zeros,
  // never gets down to the lowest byte.
  auto fold = [&](__m128i low_half, __m128i high_half) {
    low = _mm_min_epu8(low, low_half);
    high = _mm_max_epu8(high, high_half);
  };
  fold(_mm_srli_si128(low, 8), _mm_srli_si128(high, 8));
  fold(_mm_srli_epi64(low, 32), _mm_srli_epi64(high, 32));
  fold(_mm_srli_epi64(low, 16), _mm_srli_epi64(high, 16));
  fold(_mm_srli_epi64(low, 8), _mm_srli_epi64(high, 8));
  return {static_cast<__u8>(_mm_cvtsi128_si32(low)), static_cast<__u8>(_mm_cvtsi128_si32(high))};
}

__u32 squares_of_piece(const __u8* page) {
  const __m128i counts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(page));
  const __m128i first = _mm_unpacklo_epi8(counts, _mm_setzero_si128());
  const __m128i second = _mm_unpackhi_epi8(counts, _mm_setzero_si128());
  __m128i sums = _mm_add_epi32(_mm_madd_epi16(first, first), _mm_madd_epi16(second, second));
  sums = _mm_add_epi32(sums, _mm_srli_si128(sums, 8));
  sums = _mm_add_epi32(sums, _mm_srli_si128(sums, 4));
  return static_cast<__u32>(_mm_cvtsi128_si32(sums));
}

// How many pages of each piece are there: all of a word's four at once.
void count_pages(const Estimate::Granule& g, float (&n)[Estimate::kPieces]) {
  __u64 words[Estimate::kPages / 64];
  for (unsigned w = 0; w < std::size(words); ++w) {
    __u64 v = g.present(w);
    v -= v >> 1 & 0x5555555555555555ULL;
    v = (v & 0x3333333333333333ULL) + (v >> 2 & 0x3333333333333333ULL);
    v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
    words[w] = (v + (v >> 8)) & 0x00ff00ff00ff00ffULL;
  }
  __u16 pages[Estimate::kPieces];
  static_assert(sizeof(pages) == sizeof(words) && std::endian::native == std::endian::little);
  std::memcpy(pages, words, sizeof(pages));
  for (unsigned i = 0; i < Estimate::kPieces; ++i) n[i] = static_cast<float>(pages[i]);
}

// A positive float's upper bits: its logarithm in steps of 0.4 %.
unsigned key_of(float rate) { return std::bit_cast<__u32>(rate) >> 15; }
float rate_of(unsigned key) { return std::bit_cast<float>(__u32{key} << 15); }

}  // namespace

unsigned Estimate::Granule::present_pages() const {
  unsigned n = 0;
  for (unsigned w = 0; w < kPages / 64; ++w) n += std::popcount(present(w));
  return n;
}

double Estimate::Granule::counted(int scale, unsigned first, unsigned last, double unit) const {
  if (first == 0 && last == kPages) return count[scale];
  __u32 units = 0;
  __u32 quarters = 0;
  for (unsigned p = first; p < last;) {
    if (p % kPiecePages == 0 && p + kPiecePages <= last) {
      quarters += piece[scale][p / kPiecePages];
      p += kPiecePages;
    } else {
      units += page[scale][p++];
    }
  }
  return units / unit + quarters / static_cast<double>(kPieceUnit);
}

// ------------------------------------------------------------------ storage

Estimate::Granule* Estimate::find(__u64 space, __u64 granule) {
  const __u64 index = granule / kRegionGranules;
  if (!found_.region || found_.space != space || found_.index != index) {
    auto s = spaces_.find(space);
    if (s == spaces_.end()) return nullptr;
    auto r = s->second.find(index);
    if (r == s->second.end()) return nullptr;
    found_ = {space, index, &r->second};
  }
  return found_.region->granules[granule % kRegionGranules].get();
}

Estimate::Granule* Estimate::find_in_turn(__u64 space, __u64 granule) {
  Granule* g = find(space, granule);
  if (g && (granule + kAhead) % kRegionGranules >= kAhead) {
    const Granule* next = found_.region->granules[(granule + kAhead) % kRegionGranules].get();
    fetch_facts(next);
    if (next) fetch(next->piece, sizeof(next->piece));
  }
  return g;
}

Estimate::Granule& Estimate::make(__u64 space, __u64 granule) {
  if (Granule* known = find(space, granule)) return *known;
  auto [r, fresh] = spaces_[space].try_emplace(granule / kRegionGranules);
  regions_ += fresh;
  auto& g = r->second.granules[granule % kRegionGranules];
  if (!g) {
    g = std::make_unique<Granule>();
    g->birth = static_cast<__u32>(epoch_ - 1);
    ++r->second.used;
    ++granules_;
  }
  return *g;
}

void Estimate::clear(__u64 space, __u64 granule, unsigned first, unsigned last) {
  auto s = spaces_.find(space);
  if (s == spaces_.end()) return;
  auto r = s->second.find(granule / kRegionGranules);
  if (r == s->second.end()) return;
  auto& g = r->second.granules[granule % kRegionGranules];
  if (!g) return;
  __u64 left = 0;
  for (unsigned w = 0; w < kPages / 64; ++w) {
    __u64 keep = ~page_mask(first, last, w);
    for (auto& tier : g->in_tier) tier[w] &= keep;
    for (auto& side : g->tried) side[w] &= keep;
    left |= g->present(w);
  }
  if (left) {
    for (int h = 0; h < kScales; ++h)
      for (unsigned p = first; p < last; ++p) {
        if (!g->page[h][p]) continue;
        __u16& piece = g->piece[h][p / kPiecePages];
        __u32 units = g->page[h][p] * kPieceUnit / unit_;
        piece -= std::min<__u32>(piece, units);
        g->count[h] = std::max(0.0F, g->count[h] - static_cast<float>(g->page[h][p]) / static_cast<float>(unit_));
        g->page[h][p] = 0;
      }
    return;
  }
  g.reset();
  --granules_;
  if (--r->second.used == 0) {
    found_ = {};
    s->second.erase(r);
    --regions_;
    if (s->second.empty()) spaces_.erase(s);
  }
}

void Estimate::drop(__u64 space) {
  auto s = spaces_.find(space);
  if (s == spaces_.end()) return;
  for (const auto& [index, region] : s->second) granules_ -= region.used;
  regions_ -= s->second.size();
  found_ = {};
  spaces_.erase(s);
}

std::vector<__u64> Estimate::granules(__u64 space) const {
  std::vector<__u64> list;
  auto s = spaces_.find(space);
  if (s == spaces_.end()) return list;
  for (const auto& [index, region] : s->second)
    for (unsigned i = 0; i < kRegionGranules; ++i)
      if (region.granules[i]) list.push_back(index * kRegionGranules + i);
  return list;
}

__u64 Estimate::next(__u64 space, __u64 granule) const {
  auto s = spaces_.find(space);
  if (s == spaces_.end()) return HT_UNKNOWN64;
  for (auto r = s->second.lower_bound(granule / kRegionGranules); r != s->second.end(); ++r) {
    const __u64 first = r->first * kRegionGranules;
    for (unsigned i = granule > first ? granule - first : 0; i < kRegionGranules; ++i)
      if (r->second.granules[i]) return first + i;
  }
  return HT_UNKNOWN64;
}

std::size_t Estimate::bytes() const {
  // A map's node is its value, three pointers and a colour; malloc adds a word.
  constexpr std::size_t kNode = 5 * sizeof(void*);
  const std::size_t granule = sizeof(Granule) + sizeof(void*) + (has_bits_ ? sizeof(Bits) + sizeof(void*) : 0);
  return granules_ * granule + regions_ * (sizeof(Region) + kNode) +
         spaces_.size() * (sizeof(Space) + kNode);
}

void Estimate::visit(const Visit& visit) {
  for (auto& [space, regions] : spaces_)
    for (auto& [index, region] : regions)
      each_granule(region.granules, [this](const Granule* next) { fetch_counts(next, scale_), fetch_facts(next); },
                   [&](unsigned i, Granule& g) { visit(space, index * kRegionGranules + i, g); });
}

// ------------------------------------------------------------------- ageing

const Estimate::Age& Estimate::at(int scale, __u32 birth) const {
  const auto& table = ages_[scale];
  static constexpr Age kNothing{};
  if (table.empty()) return kNothing;
  __u64 age = epoch_ > birth ? epoch_ - birth : 0;
  return table[std::min<__u64>(age, table.size() - 1)];
}

Estimate::Age Estimate::seen(int scale, const Granule& g) const {
  const bool watched = g.bits && g.bits->squares[scale] > 0;
  if (by_bits()) return watched ? Age{g.bits->watched[scale], g.bits->watched[scale] / g.bits->squares[scale]} : Age{};
  const Age& sampled = at(scale, g.birth);
  if (!watched) return sampled;
  const auto unit = static_cast<float>(epochs_a_unit_);
  const float weight = sampled.weight + unit * g.bits->watched[scale];
  const float squares = sampled.weight / sampled.noise + unit * g.bits->squares[scale];
  return squares > 0 ? Age{weight, weight / squares} : Age{};
}

float Estimate::trust(int scale, const Granule& g, double phi) const {
  if (!g.bits) return 1;
  const float share = 1 / static_cast<float>(phi);
  // A huge page has one bit.
  if (by_bits()) return g.huge ? 1.0F / static_cast<float>(kPages) : share;
  const float sampled = at(scale, g.birth).weight;
  const float watched = static_cast<float>(epochs_a_unit_) * g.bits->watched[scale];
  return watched > 0 ? (sampled + watched * share) / (sampled + watched) : 1;
}

float Estimate::paired(int scale, const Granule& g, const Age& age) const {
  const float unit = by_bits() ? 1 : static_cast<float>(epochs_a_unit_);
  return age.weight > 0 ? 1 - g.bits->own[scale] * unit * unit / (age.weight * age.weight) : 0;
}

// Bits of huge pages count for nothing beside samples, and so do those that were read before.
void Estimate::first_samples() {
  has_samples_ = true;
  for (auto& [space, regions] : spaces_)
    for (auto& [index, region] : regions)
      for (auto& g : region.granules) {
        if (!g || !g->huge || !g->bits) continue;
        std::memset(g->page, 0, sizeof(g->page));
        std::memset(g->piece, 0, sizeof(g->piece));
        std::fill(std::begin(g->count), std::end(g->count), 0.0F);
        g->bits.reset();
      }
}

// What comes of looking at a page in either way, of all pages. Once that is known rates
// are of samples: those of before, in touches, are not to be compared with them.
void Estimate::weigh_kinds() {
  if (has_samples_ && pages_) {  // known from the first pass on
    samples_seen_ = kTouchesKeep * samples_seen_ + static_cast<double>(epoch_sampled_);
    samples_of_ = kTouchesKeep * samples_of_ + static_cast<double>(pages_) * exposures_.front();
  }
  if (!has_samples_ || !has_bits_) return;
  touches_seen_ *= kTouchesKeep;
  touches_of_ *= kTouchesKeep;
  // With fewer what was known stands.
  if (samples_seen_ < kSamplesKnown || touches_of_ <= 0 || touches_seen_ <= 0) return;
  epochs_a_unit_ = touches_seen_ / touches_of_ / (samples_seen_ / samples_of_);
  if (!by_bits_) return;
  passed_ = judged_ = classes_fresh_ = false;
  for (auto& classes : classes_) std::fill(classes.begin(), classes.end(), Class{});
}

// ages_[age]: an epoch's weight is that of the decays since, as often as the epoch
// counts; the one in progress has not decayed once its samples are in.
void Estimate::age_tables() {
  const __u32 ages = static_cast<__u32>(std::min<__u64>(epoch_, kAgeMax)) + 1;
  for (int s = 0; s < kScales; ++s) {
    auto& table = ages_[s];
    table.resize(ages);
    double sum = 0;
    double squares = 0;
    double weight = 1;
    const __u32 step = decay_step(s);
    for (__u32 age = 0; age < ages; ++age) {
      table[age] = {static_cast<float>(sum), static_cast<float>(squares > 0 ? sum / squares : 1)};
      const double exposure = age < exposures_.size() ? exposures_[age] : 1;
      sum += weight * exposure;
      squares += weight * weight * exposure;
      if ((epoch_ - age) % step == 0) weight *= kDecay;
    }
  }
}

void Estimate::begin(__u64 epoch, float exposure) {
  epoch_ = epoch;
  exposures_.push_front(exposure);
  if (exposures_.size() > kAgeMax) exposures_.pop_back();
  epoch_samples_ = 0;
  epoch_sampled_ = 0;
  epoch_touches_ = 0;
  epoch_hits_ = {};
  for (int s = 0; s < kScales; ++s)
    if (epoch_ % decay_step(s) == 0) decay(s);
}

// False: nothing is left.
__attribute__((target_clones("avx2", "default"))) static bool thin_granule(Estimate::Granule& g, int s, __u32 factor,
                                                                           const __u8* random) {
  const __u32 pages = thin(g.page[s], factor, random);
  return (pages | thin(g.piece[s], factor, random + Estimate::kPages)) != 0;
}

void Estimate::decay(int scale) {
  const auto& random = noise_bytes();
  for (auto& [space, regions] : spaces_)
    for (auto& [index, region] : regions)
      each_granule(region.granules, [scale](const Granule* next) { fetch_counts(next, scale); }, [&](unsigned, Granule& g) {
        if (g.bits) {
          g.bits->watched[scale] *= kDecay;
          g.bits->squares[scale] *= kDecay * kDecay;
          g.bits->own[scale] *= kDecay * kDecay;
        }
        if (g.count[scale] == 0) return;
        const bool left = thin_granule(g, scale, kDecay256, random.data() + next_random(random_) % (kNoise - 2 * kPages));
        g.count[scale] *= kDecay;
        if (g.count[scale] < 1e-3F) g.count[scale] = left ? 1e-3F : 0;
      });
}

void Estimate::set_unit(__u32 unit) {
  if (unit == unit_) return;
  const auto& random = noise_bytes();
  for (auto& [space, regions] : spaces_)
    for (auto& [index, region] : regions)
      for (auto& g : region.granules) {
        if (!g) continue;
        for (auto& scale : g->page) {
          if (unit < unit_)
            thin(scale, 256 * unit / unit_, random.data() + next_random(random_) % (kNoise - kPages));
          else
            for (__u8& v : scale) v = static_cast<__u8>(std::min<__u32>(255, v * (unit / unit_)));
        }
      }
  unit_ = unit;
}

// ------------------------------------------------------------------ counting

// Before samples are counted: would each scale have had these pages on top?
void Estimate::predict(const Granule& g, std::span<const PageSamples> sampled, __u32 total) {
  const auto turns = granules_ > kPredicted ? static_cast<__u32>(granules_ / kPredicted + 1) : 1;
  // By chance: granules may come in the same order each time.
  if (!passed_ || (turns > 1 && next_random(random_) % turns != 0)) return;
  for (int s = 0; s < kScales; ++s) {
    const unsigned cut = key_of(cut_[s]);
    auto hit = [&](float rate, __u32 n) {
      unsigned key = key_of(rate);
      epoch_hits_[s] += key > cut + kTieKeys ? n : key + kTieKeys >= cut ? n * tie_share_[s] : 0.0F;
      classes_[s][key >> kClassShift].hits += static_cast<float>(n * turns);
    };
    if (g.huge) {
      hit(g.rate[s], total);
      continue;
    }
    float rate[kPieces];
    pieces(g, s, rate);
    const Age age = seen(s, g);
    for (auto at_page = sampled.begin(); at_page != sampled.end();) {
      const unsigned i = at_page->page / kPiecePages;
      const __u8* page = g.page[s] + i * kPiecePages;
      const __u32 mask = g.piece_mask(i);
      const float f = age.noise / static_cast<float>(unit_);
      const float k = static_cast<float>(k_[s][kPage]);
      const auto n = static_cast<unsigned>(std::popcount(mask));
      // A page that is not there has no count.
      const float sum = k * static_cast<float>(n) + f * static_cast<float>(sum_of_piece(page));
      for (; at_page != sampled.end() && at_page->page / kPiecePages == i; ++at_page)
        if (sum > 0)
          hit(rate[i] * static_cast<float>(n) * (k + f * static_cast<float>(page[at_page->page % kPiecePages])) / sum,
              at_page->samples);
    }
  }
}

void Estimate::add(Granule& g, std::span<const PageSamples> sampled) {
  __u32 total = 0;
  for (const PageSamples& s : sampled) total += s.samples;
  if (!total) return;

  if (!has_samples_) first_samples();
  if (!by_bits()) predict(g, sampled, total);  // else rates are of touches
  for (auto [p, n] : sampled) {
    if (!g.has(p))
      for (auto& tier : g.in_tier) tier[p / 64] |= 1ULL << (p % 64);
    for (int s = 0; s < kScales; ++s) {
      g.page[s][p] = static_cast<__u8>(std::min<__u64>(255, g.page[s][p] + __u64{n} * unit_));
      __u16& piece = g.piece[s][p / kPiecePages];
      piece = static_cast<__u16>(std::min<__u64>(0xffff, piece + __u64{n} * kPieceUnit));
    }
  }
  for (float& count : g.count) count += static_cast<float>(total);
  g.sampled_epoch = static_cast<__u32>(epoch_);
  epoch_samples_ += total;
  epoch_sampled_ += total;
  if (!has_bits_) return;
  touches_ += total;
  touches_variance_ += total;
}

void Estimate::fetch_pages(const Granule& g, std::span<const PageSamples> sampled) {
  __builtin_prefetch(g.count, 1);
  for (const PageSamples& s : sampled) {
    for (const auto& tier : g.in_tier) __builtin_prefetch(tier + s.page / 64);
    for (const auto& page : g.page) __builtin_prefetch(page + s.page, 1);
    for (const auto& piece : g.piece) __builtin_prefetch(piece + s.page / kPiecePages, 1);
  }
}

// Bits become touches: where one was set, as many as its page's rate lets expect.
// So a mean over checks is what the rate is, whatever the intervals were.
__u32 Estimate::add(Granule& g, const ht_bits& bits) {
  if (!has_bits_) by_bits_ = !has_samples_;
  has_bits_ = true;
  // One bit says nothing beside the samples of 512 pages.
  if (g.huge && has_samples_) return 0;
  const bool alone = by_bits();
  if (!g.bits) g.bits = std::make_unique<Bits>();
  Bits& known = *g.bits;
  const auto interval = static_cast<float>(static_cast<double>(bits.interval_ns) / kBitUnitNs);
  if (!g.huge && interval < known.interval * kSimilar && known.interval < interval * kSimilar) {
    unsigned was = 0;
    unsigned is = 0;
    unsigned pages = 0;
    for (unsigned i = 0; i < kPieces; ++i) {
      const __u64 mask = 0xffffULL << i % 4 * 16 & bits.checked[i / 4] & known.checked[i / 4];
      const auto piece_was = static_cast<unsigned>(std::popcount(known.set[i / 4] & mask));
      const auto piece_is = static_cast<unsigned>(std::popcount(bits.set[i / 4] & mask));
      const auto n = static_cast<unsigned>(std::popcount(mask));
      piece_bits_.add(piece_was, piece_is, n);
      was += piece_was;
      is += piece_is;
      pages += n;
    }
    granule_bits_.add(was, is, pages);
  }
  known.interval = interval;
  std::copy(std::begin(bits.checked), std::end(bits.checked), known.checked);
  std::copy(std::begin(bits.set), std::end(bits.set), known.set);

  PageSamples set[kPages];
  __u32 total = 0;
  unsigned checked = 0;
  for (const __u64 word : bits.checked) checked += static_cast<unsigned>(std::popcount(word));
  for (unsigned w = 0; w < kPages / 64; ++w)
    for (__u64 left = bits.checked[w] & bits.set[w]; left; left &= left - 1)
      set[total++] = {w * 64 + static_cast<unsigned>(std::countr_zero(left)), 1};
  bits_set_ += total;
  bits_watched_ += checked * interval;
  if (total && alone) predict(g, {set, total}, total);

  float rate[kPages];
  // Touches of a page: before anything is known, and as its rate has it.
  const float share = checked ? static_cast<float>(total) / static_cast<float>(checked) : 0;
  const float expected = alone ? 1 : std::min(-std::log1p(-std::min(share, 0.99F)), kTouchesMax);
  const float unit = alone ? 1 : static_cast<float>(epochs_a_unit_);
  const bool rated = passed_ && unit > 0;
  auto touches = [&](unsigned p) { return rated ? std::min(rate[p] * unit * interval, kTouchesMax) : expected; };
  if (rated) rates(g, rate);

  float sum = 0;
  float variance = 0;
  for (__u32 i = 0; i < total;) {
    const unsigned piece = set[i].page / kPiecePages;
    float in_piece = 0;
    for (; i < total && set[i].page / kPiecePages == piece; ++i) {
      const float u = touches(set[i].page);
      const float x = touches_if_any(u);
      variance += x * (x - u);
      for (auto& page : g.page)
        page[set[i].page] = static_cast<__u8>(
            std::min(255U, page[set[i].page] + static_cast<__u32>(x * static_cast<float>(unit_) + 0.5F)));
      in_piece += x;
    }
    for (auto& pieces : g.piece)
      pieces[piece] = static_cast<__u16>(
          std::min(0xffffU, pieces[piece] + static_cast<__u32>(in_piece * static_cast<float>(kPieceUnit) + 0.5F)));
    sum += in_piece;
  }
  for (int s = 0; s < kScales; ++s) {
    g.count[s] += sum;
    known.watched[s] += interval;
    known.squares[s] += interval;
    known.own[s] += interval * interval;
  }
  if (total) g.sampled_epoch = static_cast<__u32>(epoch_);
  if (alone)
    epoch_samples_ += static_cast<__u64>(sum);
  else
    epoch_touches_ += sum;
  touches_ += sum;
  touches_variance_ += variance;
  if (!g.huge) {
    touches_seen_ += sum;
    touches_of_ += checked * interval;
  }
  return total;
}

void Estimate::Repeats::add(unsigned was, unsigned is, unsigned pages) {
  if (!pages) return;
  const double mean = (was + is) / 2.0;
  const double difference = static_cast<double>(was) - is;
  squares += difference * difference;
  expected += 2 * mean * (1 - mean / pages);
}

void Estimate::end_fold(__u64 top_pages) {
  age_tables();
  granule_bits_.age(kRepeatsKeep);
  piece_bits_.age(kRepeatsKeep);
  bits_set_ *= kTouchedKeep;
  bits_watched_ *= kTouchedKeep;
  if (touches_ > 0) variance_ = static_cast<float>(touches_variance_ / touches_);
  touches_ *= kTouchesKeep;
  touches_variance_ *= kTouchesKeep;
  weigh_kinds();
  by_bits_ = has_bits_ && epochs_a_unit_ <= 0 && (!has_samples_ || touches_of_ > 0);
  double density = (static_cast<double>(epoch_samples_) + epoch_touches_) / static_cast<double>(std::max<__u64>(1, top_pages));
  density_ = density_ < 0 ? density : density_ + 0.1 * (density - density_);
  if (density_ > settings_.dense) set_unit(4);
  if (density_ < settings_.dense / 2) set_unit(16);
  choose();
  for (int s = 0; s < kScales; ++s) judge(s);
  judged_ |= by_bits() || (classes_fresh_ && learned_[scale_] && epoch_samples_ != 0);
  classes_fresh_ = false;
}

// Adds what the epoch brought to the classes of the last pass. Only that of the very
// next epoch: pages that had samples since then are in another class by now.
void Estimate::judge(int scale) {
  const bool counts = classes_fresh_ && epoch_samples_ && !by_bits();
  const auto keep = static_cast<float>(settings_.worth_keep);
  for (Class& c : classes_[scale]) {
    if (counts) {
      c.brought = keep * c.brought + c.hits;
      c.of = keep * c.of + c.pages * exposures_.front();
    }
    c.hits = 0;
  }
}

// The rates that classes were seen to have, and the estimate where little was seen;
// neighbours out of order are taken together.
void Estimate::draw_worth() {
  struct Block {
    double brought;
    double of;
    std::size_t first;
    double worth() const { return brought / of; }
  };
  std::vector<Block> blocks;
  worth_.clear();
  const auto& classes = classes_[scale_];
  for (unsigned i = 0; i < classes.size(); ++i) {
    const Class& c = classes[i];
    if (c.of <= 0) continue;
    const float rate = rate_of((i << kClassShift) + (1U << kClassShift) / 2);
    blocks.push_back({c.brought + settings_.worth_prior, c.of + settings_.worth_prior / rate, worth_.size()});
    worth_.push_back({std::log2(rate), 0});
    while (blocks.size() > 1 && blocks[blocks.size() - 2].worth() >= blocks.back().worth()) {
      const Block last = blocks.back();
      blocks.pop_back();
      blocks.back().brought += last.brought;
      blocks.back().of += last.of;
    }
  }
  for (std::size_t b = 0; b < blocks.size(); ++b)
    for (std::size_t i = blocks[b].first, end = b + 1 < blocks.size() ? blocks[b + 1].first : worth_.size(); i < end; ++i)
      worth_[i].worth = static_cast<float>(std::log2(blocks[b].worth()));
  for (std::size_t i = 1; i < worth_.size(); ++i)
    worth_[i].worth = std::max(worth_[i].worth, worth_[i - 1].worth + kWorthStep * (worth_[i].key - worth_[i - 1].key));
}

float Estimate::worth(float rate) const {
  if (worth_.empty() || rate <= 0) return rate;
  const float key = std::log2(rate);
  auto above = std::lower_bound(worth_.begin(), worth_.end(), key, [](const Worth& w, float k) { return w.key < k; });
  if (above == worth_.begin()) return std::exp2(above->worth + key - above->key);
  const Worth& below = *std::prev(above);
  if (above == worth_.end()) return std::exp2(below.worth + key - below.key);
  return std::exp2(below.worth + (above->worth - below.worth) * (key - below.key) / (above->key - below.key));
}

double Estimate::bit_interval_ns(__u64 top_pages) const {
  if (bits_set_ <= 0 || !pages_) return 0;
  const double share = std::min(static_cast<double>(top_pages) / static_cast<double>(pages_), kTouchedMax);
  const double found = share * bits_watched_ / bits_set_;
  const double rate = top_rate() * (by_bits() ? 1 : epochs_a_unit_);
  return kBitUnitNs * (rate > 0 ? std::min(found, kTouchesTop / rate) : found);
}

void Estimate::choose() {
  for (int s = 0; s < kScales; ++s) hits_[s] = settings_.choice_keep * hits_[s] + epoch_hits_[s];
  int best = scale_;
  for (int s = 0; s < kScales; ++s)
    if (hits_[s] > hits_[best]) best = s;
  if (hits_[best] > hits_[scale_] + settings_.choice_lead * std::sqrt(hits_[scale_])) scale_ = best;
}

// ------------------------------------------------------------------ estimate

// m_i = m (k + x_i) / (k + e_i), rescaled so that the mean over the pages is m.
void Estimate::pieces(const Granule& g, int scale, float out[kPieces], Dispersion* dispersion) const {
  const Age age = seen(scale, g);
  const float noise = g.bits && !g.huge ? age.noise * trust(scale, g, piece_bits_.phi()) : age.noise;
  const float m = g.rate[scale];
  const float k = static_cast<float>(k_[scale][g.huge ? kHugePiece : kPiece]);
  const float exposure = m * noise * age.weight;
  const float f = noise / kPieceUnit;
  float pages_of[kPieces];
  count_pages(g, pages_of);
  Four sum{};
  Four pages{};
  Four excess{};
  Four expected{};
  for (unsigned i = 0; i < kPieces; i += 4) {
    Four n;
    std::memcpy(&n, pages_of + i, sizeof(n));
    const __u16* counted = g.piece[scale] + i;
    const Four e = n * exposure;
    const Four x = f * Four{static_cast<float>(counted[0]), static_cast<float>(counted[1]), static_cast<float>(counted[2]),
                            static_cast<float>(counted[3])};
    const Four ratio = (k + x) / (k + e);
    std::memcpy(out + i, &ratio, sizeof(ratio));
    sum += n * ratio;
    pages += n;
    excess += n > 0 ? (x - e) * (x - e) - variance_ * x : Four{};
    expected += e * e;
  }
  auto all = [](Four four) { return (four[0] + four[1]) + (four[2] + four[3]); };
  if (dispersion) {
    dispersion->excess += all(excess);
    dispersion->expected += all(expected);
  }
  const float g_scale = all(sum) > 0 ? m * all(pages) / all(sum) : 0;
  for (unsigned i = 0; i < kPieces; ++i) out[i] *= g_scale;
}

void Estimate::rates(const Granule& g, float out[kPages]) const {
  float piece[kPieces];
  piece_rates(g, piece);
  for (unsigned i = 0; i < kPieces; ++i) page_rates(g, i, piece[i], out + i * kPiecePages);
}

void Estimate::piece_rates(const Granule& g, float out[kPieces]) const {
  if (g.huge)
    std::fill_n(out, kPieces, g.rate[scale_]);
  else
    pieces(g, scale_, out);
}

void Estimate::page_rates(const Granule& g, unsigned piece, float rate, float out[kPiecePages]) const {
  const __u32 mask = g.piece_mask(piece);
  if (g.huge) {
    for (unsigned p = 0; p < kPiecePages; ++p) out[p] = mask >> p & 1 ? rate : 0;
    return;
  }
  inner_rates(g, piece, rate, out);
}

void Estimate::inner_rates(const Granule& g, float out[kPages]) const {
  float piece[kPieces];
  pieces(g, scale_, piece);
  for (unsigned i = 0; i < kPieces; ++i) inner_rates(g, i, piece[i], out + i * kPiecePages);
}

void Estimate::inner_rates(const Granule& g, unsigned piece, float rate, float out[kPiecePages]) const {
  const __u32 mask = g.piece_mask(piece);
  const float k = static_cast<float>(k_[scale_][g.huge ? kHugePage : kPage]);
  const float f = seen(scale_, g).noise / static_cast<float>(unit_);
  const __u8* page = g.page[scale_] + piece * kPiecePages;
  if (mask == 0xffff) {  // as nearly all are: no branch for a page
    const __u32 counted = sum_of_piece(page);
    const float scale = rate * kPiecePages / (k * kPiecePages + f * static_cast<float>(counted));
    for (unsigned p = 0; p < kPiecePages; ++p) out[p] = counted ? scale * (k + f * static_cast<float>(page[p])) : rate;
    return;
  }
  float sum = 0;
  for (unsigned p = 0; p < kPiecePages; ++p) {
    out[p] = mask >> p & 1 ? k + f * static_cast<float>(page[p]) : 0;
    sum += out[p];
  }
  const float scale = sum > 0 ? rate * static_cast<float>(std::popcount(mask)) / sum : 0;
  for (unsigned p = 0; p < kPiecePages; ++p) out[p] *= scale;
}

// What page_rates says of each piece, without going through it: rates rise with counts.
void Estimate::summarize(const Granule& g, const float piece[kPieces], Summary out[kPieces]) const {
  const float k = static_cast<float>(k_[scale_][kPage]);
  const float f = g.huge ? 0 : seen(scale_, g).noise / static_cast<float>(unit_);
  for (unsigned i = 0; i < kPieces; ++i) {
    const __u8* page = g.page[scale_] + i * kPiecePages;
    const __u32 counted = sum_of_piece(page);
    const float rate = piece[i];
    if (!counted || g.huge) {
      out[i] = {rate, rate, rate * kPiecePages, rate * rate * kPiecePages};
      continue;
    }
    const auto [low, high] = bounds_of_piece(page);
    const float x = f * static_cast<float>(counted);
    const float scale = rate * kPiecePages / (k * kPiecePages + x);
    out[i] = {scale * (k + f * static_cast<float>(low)), scale * (k + f * static_cast<float>(high)), rate * kPiecePages,
              scale * scale * (k * (k * kPiecePages + 2 * x) + f * f * static_cast<float>(squares_of_piece(page)))};
  }
}

// What one page's count is worth as evidence of how pages differ, beside e^2. heat.md has
// e^2 alone, with which a thousand hot pages that are all alike say more at first than a hundred
// thousand others that had no second sample yet, and nothing is told apart there for seconds.
// Later it is the hotter ones, near the cut, whose k counts: with less weight for them cold
// pages that had a sample change places for ever. Bits are weighed as a whole (learn).
float Estimate::told_by(float e) const { return by_bits() || pass_ > kFirstPasses ? 1 : 1 / (1 + e); }

// The lowest two levels of one granule: evidence, and the histogram of rates.
// Of its pieces each look.every-th is looked into, and stands for the others.
void Estimate::pages_pass(Granule& g, int scale, Look look, Dispersion (&d)[kLevels], std::vector<__u32>& histogram) {
  const float m = g.rate[scale];
  if (g.huge) {
    histogram[key_of(m)] += g.present_pages();
    if (by_bits()) return;
  }
  float piece[kPieces];
  pieces(g, scale, piece, &d[g.huge ? kHugePiece : kPiece]);
  Dispersion& page_level = d[g.huge ? kHugePage : kPage];
  const Age age = seen(scale, g);
  const float k = static_cast<float>(k_[scale][kPage]);
  const float f = age.noise / static_cast<float>(unit_);
  const float exposure = age.noise * age.weight;
  float excess = 0;
  float expected = 0;
  for (unsigned i = look.first; i < kPieces; i += look.every) {
    const __u32 mask = g.piece_mask(i);
    if (!mask) continue;
    const __u8* page = g.page[scale] + i * kPiecePages;
    const __u32 sum = sum_of_piece(page);
    const __u32 squares = sum ? squares_of_piece(page) : 0;
    const float n = static_cast<float>(std::popcount(mask));
    const float e = piece[i] * exposure;
    const float x = f * static_cast<float>(sum);
    const float told = told_by(e);
    excess += told * (f * f * static_cast<float>(squares) - 2 * e * x + n * e * e - variance_ * x);
    expected += told * n * e * e;
    if (g.huge) continue;
    if (!sum) {
      histogram[key_of(piece[i])] += look.every * static_cast<__u32>(n);
      continue;
    }
    const float unit = piece[i] * n / (n * k + x);
    if (mask == 0xffff) {
      for (unsigned p = 0; p < kPiecePages; ++p) histogram[key_of(unit * (k + f * static_cast<float>(page[p])))] += look.every;
    } else {
      for (unsigned p = 0; p < kPiecePages; ++p)
        if (mask >> p & 1) histogram[key_of(unit * (k + f * static_cast<float>(page[p])))] += look.every;
    }
  }
  page_level.excess += excess * static_cast<float>(look.every);
  if (g.bits) {
    expected *= paired(scale, g, age);
    page_level.counted += g.count[scale] * age.noise;
  }
  page_level.expected += expected * static_cast<float>(look.every);
}

void Estimate::learn(int scale, const Dispersion (&d)[kLevels]) {
  for (int level = 0; level < kLevels; ++level) {
    if (d[level].expected <= 0) continue;
    double k = d[level].excess > 0 ? d[level].expected / d[level].excess : settings_.k_max;
    if (d[level].counted > 0) {
      // As long as bits say little of how pages differ, 1/k is taken for 1, give or
      // take 1.
      const double weight = d[level].expected * d[level].expected / (d[level].counted + 2 * d[level].expected);
      k = (weight + 1) / std::max(weight * d[level].excess / d[level].expected + 1, 1 / settings_.k_max);
    }
    k = std::clamp(k, settings_.k_min, settings_.k_max);
    double& now = k_[scale][level];
    now = learned_[scale] ? std::exp(std::log(now) + (pass_ <= kFastPasses ? settings_.dispersion_at_first : settings_.dispersion_new) * (std::log(k) - std::log(now))) : k;
  }
}

// What is counted of each granule as a whole, at all scales: who went there for each
// of these, and for the two rounds of a pass, would wait for memory all the time.
std::vector<Estimate::Leaf> Estimate::leaves() {
  std::vector<Leaf> list;
  list.reserve(granules_);
  for (auto& [id, space] : spaces_)
    for (auto& [index, region] : space)
      each_granule(region.granules, fetch_facts, [&](unsigned, Granule& g) {
        Leaf& leaf = list.emplace_back(Leaf{&g, static_cast<float>(g.present_pages()), {}, {}});
        for (int s = 0; s < kScales; ++s) {
          const Age age = seen(s, g);
          const float noise = trust(s, g, granule_bits_.phi()) * age.noise;
          leaf.x[s] = noise * g.count[s];
          leaf.exposure[s] = leaf.pages * noise * age.weight;
        }
      });
  return list;
}

void Estimate::estimate(int scale, __u64 top_pages, std::span<const Leaf> leaves) {
  struct Node {
    double x = 0;         // noise-free count: f * C
    double exposure = 0;  // sum of pages * f * W: e = rate * exposure
    double pages = 0;
    double rate = 0;
    void add(const Node& child) {
      x += child.x;
      exposure += child.exposure;
      pages += child.pages;
    }
  };
  Dispersion d[kLevels];
  // Children's rates under a parent whose rate is known.
  auto children = [&](Level level, const Node& parent, std::vector<Node>& nodes) {
    const double k = k_[scale][level];
    double sum = 0;
    for (Node& c : nodes) {
      if (c.pages == 0) continue;
      double e = parent.rate * c.exposure;
      c.rate = (k + c.x) / (k + e);
      sum += c.pages * c.rate;
      if (nodes.size() > 1) {
        d[level].excess += (c.x - e) * (c.x - e) - variance_ * c.x;
        d[level].expected += e * e;
      }
    }
    for (Node& c : nodes) c.rate = c.pages > 0 && sum > 0 ? parent.rate * c.rate * parent.pages / sum : parent.rate;
  };

  Node all;
  std::vector<Node> spaces;
  std::vector<std::vector<Node>> regions;
  auto node = [scale](const Leaf& leaf) { return Node{leaf.x[scale], leaf.exposure[scale], leaf.pages, 0}; };
  std::size_t at = 0;
  for (const auto& [id, space] : spaces_) {
    Node& s = spaces.emplace_back();
    auto& list = regions.emplace_back();
    for (const auto& [index, region] : space) {
      Node& r = list.emplace_back();
      for (unsigned i = 0; i < region.used; ++i) r.add(node(leaves[at++]));
      s.add(r);
    }
    all.add(s);
  }
  all.rate = all.exposure > 0 ? all.x / all.exposure : 0;
  pages_ = static_cast<__u64>(all.pages);
  if (scale == scale_) mean_rate_ = all.rate;
  children(kSpace, all, spaces);

  std::vector<__u32> histogram(kKeys);
  const unsigned every = std::bit_floor(static_cast<unsigned>(std::clamp<__u64>(pages_ / settings_.looked_pages, 1, kPieces / 4)));
  at = 0;
  std::vector<Node> nodes;
  std::size_t s = 0;
  for (auto& [id, space] : spaces_) {
    children(kRegion, spaces[s], regions[s]);
    std::size_t r = 0;
    for (auto& [index, region] : space) {
      nodes.clear();
      for (unsigned i = 0; i < region.used; ++i) nodes.push_back(node(leaves[at + i]));
      children(kGranule, regions[s][r], nodes);
      for (const Node& n : nodes) {
        Granule& g = *leaves[at].granule;
        if (at + kAhead < leaves.size()) {
          fetch_counts(leaves[at + kAhead].granule, scale);
          fetch_facts(leaves[at + kAhead].granule);
        }
        g.rate[scale] = static_cast<float>(n.rate);
        // Each granule another piece, each pass another one of it.
        pages_pass(g, scale, {static_cast<unsigned>((at + pass_) % every), every}, d, histogram);
        ++at;
      }
      ++r;
    }
    ++s;
  }
  learn(scale, d);

  for (unsigned c = 0; c < kClasses; ++c) {
    __u64 pages = 0;
    for (unsigned key = c << kClassShift; key < (c + 1) << kClassShift; ++key) pages += histogram[key];
    classes_[scale][c].pages = static_cast<float>(pages);
  }

  __u64 above = 0;
  double sum = 0;
  unsigned key = kKeys;
  cut_[scale] = 0;
  tie_share_[scale] = 1;
  while (key-- > 0) {
    if (!histogram[key]) continue;
    if (above + histogram[key] >= top_pages) {
      cut_[scale] = rate_of(key);
      sum += static_cast<double>(top_pages - above) * rate_of(key);
      above = top_pages;
      break;
    }
    above += histogram[key];
    sum += histogram[key] * static_cast<double>(rate_of(key));
  }
  // Rates about the cut differ by chance, and by what has decayed since: all of
  // them are as likely to be in the top set.
  __u64 higher = 0;
  __u64 about = 0;
  for (unsigned other = key_of(cut_[scale]) > kTieKeys ? key_of(cut_[scale]) - kTieKeys : 0; other < kKeys; ++other)
    (other <= key_of(cut_[scale]) + kTieKeys ? about : higher) += histogram[other];
  tie_share_[scale] = about ? static_cast<float>(top_pages > higher ? top_pages - higher : 0) / static_cast<float>(about) : 1;
  tie_share_[scale] = std::min(tie_share_[scale], 1.0F);
  top_rate_[scale] = above ? sum / static_cast<double>(above) : 0;
}

void Estimate::pass(__u64 top_pages) {
  for (auto& classes : classes_) classes.resize(kClasses);
  if (ages_[0].empty()) age_tables();
  ++pass_;
  const std::vector<Leaf> list = leaves();
  for (int s = 0; s < kScales; ++s) {
    if (!learned_[s]) {
      // Twice: what is learned by the first is of use to the first.
      k_[s].fill(1);
      estimate(s, top_pages, list);
      learned_[s] = epoch_samples_ > 0;
    }
    estimate(s, top_pages, list);
  }
  passed_ = classes_fresh_ = true;
  draw_worth();
}

}  // namespace hypertier
