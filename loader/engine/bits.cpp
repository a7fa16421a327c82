// SPDX-License-Identifier: GPL-2.0-or-later
#include "bits.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

namespace hypertier {
namespace {

// Weight of what was known when a granule is checked again. One bit for a huge
// page says little: there the memory is longer.
constexpr float kKeep = 0.5;
constexpr float kKeepHuge = 0.8;
// Samples an epoch of a page with the mean rate of the hottest pages. One check
// of such a page at the interval aimed at is worth 0.6 samples, at a quarter of
// it 0.2; a rate is handed out in each epoch until the next check, and counts of
// half-life 1 sum up to twice an epoch's. With 0.2, counts are about as certain
// as samples would be, which is what policies take them for.
constexpr double kHotSamples = 0.2;
// A page is touched this seldom at least before it counts as one of the hottest,
// or an idle machine would search for heat in noise.
constexpr double kSlowestSeconds = 1;
// Checks are compared if their intervals are about the same.
constexpr float kSimilar = 1.5;
constexpr double kDispersionKeep = 0.95;  // by epoch

}  // namespace

void BitRates::fold(const ht_bits& bits) {
  unsigned checked = 0, set = 0;
  for (std::size_t i = 0; i < std::size(bits.checked); ++i) {
    checked += static_cast<unsigned>(std::popcount(bits.checked[i]));
    set += static_cast<unsigned>(std::popcount(bits.checked[i] & bits.set[i]));
  }
  Granules& granules = spaces_[bits.space];
  if (!checked || !bits.interval_ns) {
    granules.erase(bits.granule);
    return;
  }
  auto [found, fresh] = granules.try_emplace(bits.granule);
  Granule& granule = found->second;
  const float interval = static_cast<float>(bits.interval_ns) * 1e-9f;
  if (fresh) {
    granule.carry = std::uniform_real_distribution<float>(0, 1)(random_);  // not all in one epoch
  } else if (granule.pages == checked && interval < granule.interval * kSimilar &&
             granule.interval < interval * kSimilar) {
    const double mean = (granule.set + set) / 2.0, difference = static_cast<double>(set) - granule.set;
    squares_ += difference * difference;
    expected_ += 2 * mean * (1 - mean / checked);
  }

  // Touches that leave so many bits set if the pages are alike; half a bit more
  // keeps it finite when all are set.
  const double bits_read = bits.huge ? 1 : checked;
  const double bits_set = bits.huge ? set != 0 : set;
  const double touches = -std::log1p(-bits_set / (bits_read + 0.5)) * checked;
  const float keep = bits.huge ? kKeepHuge : kKeep;
  granule.touches = granule.touches * keep + static_cast<float>(touches);
  granule.seconds = granule.seconds * keep + interval;
  granule.pages = checked;
  granule.first = HT_GRANULE_PAGES;
  for (unsigned word = 0; word < std::size(bits.checked); ++word) {
    if (!bits.checked[word]) continue;
    if (granule.first == HT_GRANULE_PAGES)
      granule.first = static_cast<std::uint16_t>(word * 64 + static_cast<unsigned>(std::countr_zero(bits.checked[word])));
    granule.last = static_cast<std::uint16_t>(word * 64 + 63 - static_cast<unsigned>(std::countl_zero(bits.checked[word])));
  }
  granule.set = set;
  granule.interval = interval;
  if (!by_page_) return;
  for (unsigned page = 0; page < HT_GRANULE_PAGES; ++page) {
    const __u64 bit = 1ULL << page % 64;
    std::uint8_t& weight = granule.weight[page];
    weight = static_cast<std::uint8_t>(weight / 2 + (bits.checked[page / 64] & bits.set[page / 64] & bit ? 128 : 0));
  }
}

void BitRates::keep(__u64 space, std::span<const ht_mapping> mappings) {
  auto found = spaces_.find(space);
  if (found == spaces_.end()) return;
  auto mapping = mappings.begin();
  std::erase_if(found->second, [&](const auto& granule) {  // in the order of addresses
    const __u64 start = granule.first << HT_GRANULE_SHIFT;
    while (mapping != mappings.end() && mapping->end <= start) ++mapping;
    return mapping == mappings.end() || mapping->start >= start + HT_GRANULE_SIZE;
  });
  if (found->second.empty()) spaces_.erase(found);
}

double BitRates::dispersion() const { return expected_ > 0 ? std::max(1.0, squares_ / expected_) : 1; }

// Mean rate of the hottest pages, over a histogram of rates by quarters of an
// octave.
void BitRates::measure(__u64 fast_pages) {
  constexpr int kBuckets = 256;
  struct Bucket {
    double touches = 0;
    __u64 pages = 0;
  };
  std::array<Bucket, kBuckets> buckets{};
  for (const auto& [space, granules] : spaces_)
    for (const auto& [number, granule] : granules) {
      const double rate = granule.rate() / granule.pages;
      if (rate <= 0) continue;
      const int bucket = std::clamp(static_cast<int>(std::log2(rate) * 4) + kBuckets / 2, 0, kBuckets - 1);
      buckets[static_cast<std::size_t>(bucket)].touches += granule.rate();
      buckets[static_cast<std::size_t>(bucket)].pages += granule.pages;
    }
  double touches = 0;
  __u64 left = fast_pages;
  for (auto bucket = buckets.rbegin(); bucket != buckets.rend() && left; ++bucket) {
    if (!bucket->pages) continue;
    const __u64 taken = std::min(left, bucket->pages);
    touches += bucket->touches * static_cast<double>(taken) / static_cast<double>(bucket->pages);
    left -= taken;
  }
  // of all fast_pages: where less than that is touched at all, the mean is over what is
  const __u64 pages = fast_pages - left;
  interval_ns_ = touches > 0 ? static_cast<__u64>(std::min(1e9 * static_cast<double>(pages) / touches, 1e9 * kSlowestSeconds)) : 0;
}

// In proportion to how often their bits were set, or evenly; from a random start.
void BitRates::give_to_pages(const Granule& granule, ht_granule& samples) {
  auto give = [&](unsigned page) { samples.pages[page / 2] += page & 1 ? 1U << 16 : 1; };
  std::fill(std::begin(samples.pages), std::end(samples.pages), 0);
  unsigned sum = 0;
  if (by_page_)
    for (const std::uint8_t weight : granule.weight) sum += weight;
  std::uniform_real_distribution<double> start(0, 1);
  if (!sum) {
    const double step = (granule.last - granule.first + 1.0) / samples.samples, from = granule.first + step * start(random_);
    for (unsigned i = 0; i < samples.samples; ++i) give(std::min<unsigned>(static_cast<unsigned>(from + step * i), granule.last));
    return;
  }
  const double step = static_cast<double>(sum) / samples.samples;
  double next = step * start(random_);
  unsigned passed = 0, given = 0, latest = 0;
  for (unsigned page = 0; page < HT_GRANULE_PAGES; ++page) {
    if (!granule.weight[page]) continue;
    latest = page;
    passed += granule.weight[page];
    for (; next < passed && given < samples.samples; next += step, ++given) give(page);
  }
  for (; given < samples.samples; ++given) give(latest);  // lost to rounding
}

__u64 BitRates::count(__u64 fast_pages, const std::function<void(const ht_granule&)>& fold) {
  measure(fast_pages);
  squares_ *= kDispersionKeep;
  expected_ *= kDispersionKeep;
  const double unit = kHotSamples * static_cast<double>(interval_ns_) * 1e-9 / dispersion();
  __u64 counted = 0;
  ht_granule samples{};
  for (auto& [space, granules] : spaces_) {
    for (auto& [number, granule] : granules) {
      granule.carry += static_cast<float>(granule.rate() * unit);
      if (granule.carry < 1) continue;
      // no page's count may overflow, whichever gets them all
      samples.samples = static_cast<__u32>(std::min(granule.carry, 65535.0f));
      granule.carry -= std::floor(granule.carry);
      samples.space = space;
      samples.granule = number;
      give_to_pages(granule, samples);
      counted += samples.samples;
      fold(samples);
    }
  }
  return counted;
}

}  // namespace hypertier
