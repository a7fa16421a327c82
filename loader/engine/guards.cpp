// SPDX-License-Identifier: GPL-2.0-or-later
#include "guards.hpp"

#include <algorithm>
#include <bit>

namespace hypertier {
namespace {

constexpr __u64 kSecond = 1'000'000'000;
// The largest single step is a pair of 2 MiB pages: a bucket that cannot hold it
// would never let it pass.
constexpr __u64 kLeastDepthBytes = 2 * HT_GRANULE_SIZE;

__u64 bytes_in(__u64 bytes_per_s, __u64 ns) {
  const __u64 whole = ns / kSecond;
  if (whole != 0 && bytes_per_s > HT_UNKNOWN64 / 2 / whole) return HT_UNKNOWN64 / 2;
  return bytes_per_s * whole + static_cast<__u64>(static_cast<unsigned __int128>(bytes_per_s) * (ns % kSecond) / kSecond);
}

}  // namespace

void RateLimit::refill(__u64 ns) {
  // An epoch may be longer than a second: it gets all of its own time.
  const __u64 depth = std::max(bytes_in(bytes_per_s_, std::max(ns, kSecond)), kLeastDepthBytes);
  bytes_ = std::min(depth, std::min(bytes_, depth) + bytes_in(bytes_per_s_, ns));
}

__u64 RateLimit::pages() const { return bytes_per_s_ == 0 ? HT_UNKNOWN64 : bytes_ / HT_PAGE_SIZE; }

void RateLimit::spend(__u64 pages) { bytes_ -= std::min(bytes_, pages * HT_PAGE_SIZE); }

// The upper bits of the product choose the bucket: they alone spread neighbours evenly
// (those in the middle put 30,000 pages of a hot set into 7,500 places). The bits below
// them name the page: one of 5e11 is taken for another of its bucket.
MoveHistory::Place MoveHistory::place(__u64 space, __u64 address) const {
  const __u64 mixed = ((address >> HT_PAGE_SHIFT) ^ space << 40) * 0x9e3779b97f4a7c15ULL;
  const int bits = std::bit_width(table_.size() - 1);
  return {static_cast<std::size_t>(mixed >> (64 - bits)), mixed << bits >> (64 - kNameBits)};
}

void MoveHistory::expect(__u64 moves) {
  if (table_.empty()) table_.resize(std::clamp<std::size_t>(std::bit_ceil(moves / kBucket), kLeast / kBucket, most_ / kBucket));
}

bool MoveHistory::reverses(__u64 space, __u64 address, ht_tier to, __u64 epoch, __u32 window_epochs) const {
  if (table_.empty()) return false;
  const auto [bucket, name] = place(space, address);
  for (const Entry& entry : table_[bucket])
    if (entry.used && entry.name == name) return entry.to != to && entry.age(epoch) <= window_epochs;
  return false;
}

void MoveHistory::moved(__u64 space, __u64 address, ht_tier to, __u64 epoch) {
  expect(0);
  const auto [bucket, name] = place(space, address);
  Entry* into = nullptr;  // its own, a free one, or the oldest
  for (Entry& entry : table_[bucket]) {
    if (!entry.used || entry.name == name) {
      into = &entry;
      break;
    }
    if (!into || entry.age(epoch) > into->age(epoch)) into = &entry;
  }
  *into = {name, static_cast<__u64>(to), 1, epoch};
}

bool Conduct::begin(__u64 generation) {
  if (generation == generation_) return false;
  generation_ = generation;
  silent_ = 0;
  restless_ = 0;
  return true;
}

std::optional<Verdict> Conduct::classified(__u64 samples, bool any_heat, bool any_action) {
  if (any_heat || any_action) silent_ = 0;
  else if (samples >= settings_.silent_samples) ++silent_;
  if (silent_ < settings_.silent_epochs) return {};
  return Verdict{TIER_CODE_NEVER_CLASSIFIES,
                 "no range was given heat or an action in " + std::to_string(silent_) + " epochs with samples"};
}

std::optional<Verdict> Conduct::asked(__u64 wanted_pages, __u64 reversing_pages, __u64 limit_pages) {
  const bool restless = wanted_pages >= limit_pages && reversing_pages >= (wanted_pages + 1) / 2 && wanted_pages != 0;
  const __u64 window = settings_.restless_window_epochs >= 64 ? ~0ULL : (1ULL << settings_.restless_window_epochs) - 1;
  restless_ = (restless_ << 1 | restless) & window;
  const auto times = static_cast<__u32>(std::popcount(restless_));
  if (!restless || times < settings_.restless_epochs) return {};
  return Verdict{TIER_CODE_BUDGET, std::to_string(times) + " of " + std::to_string(settings_.restless_window_epochs) +
                                       " epochs: now " + std::to_string(wanted_pages) + " pages to move, " +
                                       std::to_string(limit_pages) + " allowed, " + std::to_string(reversing_pages) +
                                       " of them back"};
}

}  // namespace hypertier
