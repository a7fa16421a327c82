// SPDX-License-Identifier: GPL-2.0-or-later
#include "adaptive.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace hypertier {
namespace {

constexpr std::array<__u32, HT_SCALES> kHalfLife = {1, 8, 48, 256};

// 2^(-i/h) in 1/2^32 for i < h.
const std::array<std::vector<__u64>, HT_SCALES>& fractions() {
  static const auto tables = [] {
    std::array<std::vector<__u64>, HT_SCALES> t;
    for (int s = 0; s < HT_SCALES; ++s)
      for (__u32 i = 0; i < kHalfLife[s]; ++i)
        t[s].push_back(static_cast<__u64>(std::exp2(32.0 - static_cast<double>(i) / kHalfLife[s])));
    return t;
  }();
  return tables;
}

// Unevenness is judged over about as many epochs as scale 1 remembers.
constexpr double kJudgeHalfLife = 8;

__u32 saturated(__u64 value) {
  return static_cast<__u32>(std::min<__u64>(value, std::numeric_limits<__u32>::max() - 1));
}

__u32 page_count(const __u32* words, unsigned page) {
  return page & 1 ? words[page / 2] >> 16 : words[page / 2] & 0xffff;
}

__u64 share(__u64 value, __u64 part, __u64 whole) {
  return static_cast<__u64>(static_cast<unsigned __int128>(value) * part / whole);
}

__u64 pairs_of(__u64 samples) { return samples ? samples * (samples - 1) : 0; }

}  // namespace

__u32 AdaptivePartition::decayed(__u32 count, int scale, __u64 epochs) {
  if (!epochs || !count) return count;
  __u64 halvings = epochs / kHalfLife[scale];
  if (halvings >= 32) return 0;
  return static_cast<__u32>((count * fractions()[scale][epochs % kHalfLife[scale]] >> 32) >> halvings);
}

void AdaptivePartition::decay(Range& range) const {
  for (int s = 0; s < HT_SCALES; ++s) range.count[s] = decayed(range.count[s], s, epoch_ - range.counted_epoch);
  range.counted_epoch = epoch_;
}

void AdaptivePartition::begin(__u64 epoch, float /*exposure*/) {
  epoch_ = epoch;
  touched_.clear();
  pages_.clear();
}

void AdaptivePartition::count(Range& range, const ht_granule& granule, __u32 samples, __u32 stores) {
  if (range.sampled_epoch != epoch_) {
    range.sampled_epoch = epoch_;
    range.samples = range.stores = 0;
    range.epoch_pairs = 0;
    range.touched = -1;
    decay(range);
  }
  range.samples = saturated(__u64{range.samples} + samples);
  range.stores = saturated(__u64{range.stores} + stores);
  for (__u32& c : range.count) c = saturated(c + (__u64{samples} << HT_COUNT_SHIFT));

  __u64 granule_start = granule.granule << HT_GRANULE_SHIFT;
  __s32 pages = -1;
  if (range.bytes() <= HT_GRANULE_SIZE) {
    unsigned first = range.start > granule_start ? (range.start - granule_start) >> HT_PAGE_SHIFT : 0;
    unsigned last = std::min<__u64>(range.end - granule_start, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT;
    for (unsigned p = first; p < last; ++p) range.epoch_pairs += pairs_of(page_count(granule.pages, p));
  } else {
    range.epoch_pairs += pairs_of(samples);
  }
  if (__u64 at = cut(range); at > granule_start && at < granule_start + HT_GRANULE_SIZE) {
    pages = static_cast<__s32>(pages_.size());
    std::copy(std::begin(granule.pages), std::end(granule.pages), pages_.emplace_back().words);
  }
  touched_.push_back({range.touched, pages, granule.granule, samples, stores});
  range.touched = static_cast<__s32>(touched_.size()) - 1;
}

void AdaptivePartition::fold(const ht_granule& granule, const Stray& stray) {
  sampled_ = true;
  take(granule, stray);
}

void AdaptivePartition::take(const ht_granule& granule, const Stray& stray) {
  const __u64 start = granule.granule << HT_GRANULE_SHIFT;
  const __u64 end = start + HT_GRANULE_SIZE;

  // Pages of [from, to), which lie in one range or, if range is null, in none.
  __u32 samples_done = 0;
  __u32 stores_done = 0;
  auto slice = [&](Range* range, __u64 from, __u64 to) {
    __u32 samples = 0;
    for (unsigned p = (from - start) >> HT_PAGE_SHIFT; p < (to - start) >> HT_PAGE_SHIFT; ++p) {
      __u32 n = page_count(granule.pages, p);
      if (n && !range) stray(start + (__u64{p} << HT_PAGE_SHIFT), n);
      samples += n;
    }
    if (!samples) return;
    // Stores are known for the granule only: in proportion, none lost to rounding.
    samples_done += samples;
    auto stores_until = static_cast<__u32>(
        granule.samples ? std::min<__u64>(granule.stores, __u64{granule.stores} * samples_done / granule.samples) : 0);
    if (range) count(*range, granule, samples, stores_until - stores_done);
    stores_done = stores_until;
  };

  auto space = spaces_.find(granule.space);
  if (space == spaces_.end()) return slice(nullptr, start, end);
  auto& mappings = space->second;
  auto mapping = std::upper_bound(mappings.begin(), mappings.end(), start,
                                  [](__u64 address, const Mapping& m) { return address < m.end; });
  __u64 at = start;
  for (; mapping != mappings.end() && mapping->start < end; ++mapping) {
    if (mapping->start > at) slice(nullptr, at, mapping->start);
    at = std::max(at, mapping->start);
    auto range = std::upper_bound(mapping->ranges.begin(), mapping->ranges.end(), at,
                                  [](__u64 address, const Range& r) { return address < r.end; });
    if (range->start <= start && range->end >= end) {  // the common case: no look at the pages
      if (granule.samples) count(*range, granule, granule.samples, granule.stores);
      return;
    }
    for (; range != mapping->ranges.end() && range->start < end; ++range) {
      slice(&*range, at, std::min(range->end, end));
      at = std::min(range->end, end);
    }
  }
  if (at < end) slice(nullptr, at, end);
}

__u64 AdaptivePartition::close(__u64 fast_pages) {
  // What lies in no range was unmapped since it was read.
  return sampled_ ? 0 : bits_.count(fast_pages, [this](const ht_granule& granule) { take(granule, [](__u64, __u32) {}); });
}

// Fills mapping.ranges: what old ranges of the same kind cover stays theirs,
// the rest is grown or new.
void AdaptivePartition::inherit(Mapping& mapping, const std::vector<Mapping>& old) {
  auto o = std::upper_bound(old.begin(), old.end(), mapping.start,
                            [](__u64 address, const Mapping& m) { return address < m.end; });
  __u64 at = mapping.start;
  auto fresh = [&](__u64 start, __u64 end) {
    Range range;
    range.start = start;
    range.end = end;
    range.made_epoch = range.counted_epoch = range.judged_epoch = epoch_;
    mapping.ranges.push_back(range);
  };
  // [at, to) is new memory: the range before or after it grows as long as it
  // at most doubles, so that a heap growing in small steps stays few ranges.
  auto grows = [](Range& range, __u64 bytes) {
    if (bytes > range.bytes()) return false;
    range.residency = {};
    return true;
  };
  for (; o != old.end() && o->start < mapping.end; ++o) {
    if (o->flags != mapping.flags) continue;
    if (!mapping.id) mapping.id = o->id;
    for (const Range& range : o->ranges) {
      __u64 start = std::max(range.start, mapping.start);
      __u64 end = std::min(range.end, mapping.end);
      if (start >= end) continue;
      Range kept = part(range, start, end);
      if (start > at) {
        if (mapping.ranges.empty() && grows(kept, start - at))
          kept.start = at;
        else if (!mapping.ranges.empty() && grows(mapping.ranges.back(), start - at))
          mapping.ranges.back().end = start;
        else
          fresh(at, start);
      }
      mapping.ranges.push_back(kept);
      at = end;
    }
  }
  if (at < mapping.end) {
    if (!mapping.ranges.empty() && grows(mapping.ranges.back(), mapping.end - at))
      mapping.ranges.back().end = mapping.end;
    else
      fresh(at, mapping.end);
  }
}

void AdaptivePartition::map(__u64 space, std::span<const ht_mapping> wanted) {
  bits_.keep(space, wanted);
  std::vector<Mapping>& mappings = spaces_[space];
  std::vector<Mapping> old = std::move(mappings);
  mappings = {};
  for (const Mapping& m : old) ranges_ -= m.ranges.size();
  mappings_ -= old.size();

  __u32 taken = 0;  // a mapping with a hole cut into it is two from now on
  for (const ht_mapping& w : wanted) {
    Mapping mapping{w.start, w.end, w.flags, 0, {}};
    inherit(mapping, old);
    if (ranges_ + mapping.ranges.size() > HT_RANGES_MAX) continue;
    if (!mapping.id || mapping.id == taken)
      mapping.id = next_id_++;
    else
      taken = mapping.id;
    ranges_ += mapping.ranges.size();
    mappings.push_back(std::move(mapping));
  }
  mappings_ += mappings.size();
  if (mappings.empty()) spaces_.erase(space);
}

void AdaptivePartition::drop(__u64 space) { map(space, {}); }

// Adds the epoch that ended to the evidence of unevenness. With n samples over
// G units that are equally hot, n(n-1)/G pairs are expected to share a unit,
// with a variance of twice that.
void AdaptivePartition::judge(Range& range) const {
  if (range.judged_epoch == epoch_) return;
  if (range.sampled_epoch != epoch_ && range.expected_pairs < 1e-6) {  // no evidence to fade
    range.judged_epoch = epoch_;
    return;
  }
  double keep = std::exp2(-static_cast<double>(epoch_ - range.judged_epoch) / kJudgeHalfLife);
  range.pairs *= keep;
  range.expected_pairs *= keep;
  range.variance *= keep * keep;
  range.judged_epoch = epoch_;
  if (range.sampled_epoch != epoch_) return;
  __u64 units = range.bytes() <= HT_GRANULE_SIZE
                    ? range.bytes() >> HT_PAGE_SHIFT
                    : ((range.end - 1) >> HT_GRANULE_SHIFT) - (range.start >> HT_GRANULE_SHIFT) + 1;
  double expected = static_cast<double>(pairs_of(range.samples)) / static_cast<double>(units);
  range.pairs += static_cast<double>(range.epoch_pairs);
  range.expected_pairs += expected;
  range.variance += 2 * expected;
}

__u32 AdaptivePartition::uneven(const Range& range) const {
  if (range.pairs == 0) return 0;
  // Two standard deviations, and 8 because a few pairs are no normal distribution.
  double excess = range.pairs - range.expected_pairs - 2 * std::sqrt(range.variance) - 8;
  if (excess <= 0 || range.expected_pairs <= 0) return 0;
  return static_cast<__u32>(std::min(excess / range.expected_pairs * 256, 4e9));
}

// At the midpoint, on a multiple of the smallest size; above two granules on a
// granule's border, so that a split does not cut through huge pages. Pieces at
// the edges of a mapping may come out smaller.
__u64 AdaptivePartition::cut(const Range& range) const {
  __u64 align = settings_.min_range_bytes;
  if (range.bytes() > 2 * HT_GRANULE_SIZE) align = std::max<__u64>(align, HT_GRANULE_SIZE);
  __u64 at = (range.start + range.bytes() / 2 + align / 2) & ~(align - 1);
  if (at >= range.end) at -= align;
  return at > range.start && at < range.end ? at : 0;
}

// The part of range that [start, end) covers: older counts in proportion, the
// age stays.
AdaptivePartition::Range AdaptivePartition::part(const Range& range, __u64 start, __u64 end) const {
  Range result = range;
  if (start == range.start && end == range.end) return result;
  result.start = start;
  result.end = end;
  result.samples = static_cast<__u32>(share(range.samples, end - start, range.bytes()));
  result.stores = static_cast<__u32>(share(range.stores, end - start, range.bytes()));
  for (__u32& c : result.count) c = static_cast<__u32>(share(c, end - start, range.bytes()));
  result.touched = -1;
  result.epoch_pairs = 0;
  result.pairs = result.expected_pairs = result.variance = 0;
  result.residency = {};
  return result;
}

void AdaptivePartition::split(const Range& range, __u64 at, Range& left, Range& right) const {
  __u32 samples[2] = {0, 0};
  __u32 stores[2] = {0, 0};
  if (range.sampled_epoch == epoch_) {
    for (__s32 t = range.touched; t >= 0; t = touched_[t].next) {
      const Touch& touch = touched_[t];
      __u64 start = touch.granule << HT_GRANULE_SHIFT;
      if (at <= start || at >= start + HT_GRANULE_SIZE) {
        int side = at <= start;
        samples[side] += touch.samples;
        stores[side] += touch.stores;
        continue;
      }
      __u32 before = 0;
      for (__u64 a = std::max(start, range.start); a < at; a += HT_PAGE_SIZE)
        before += page_count(pages_[touch.pages].words, (a - start) >> HT_PAGE_SHIFT);
      samples[0] += before;
      samples[1] += touch.samples - before;
      auto stores_before = static_cast<__u32>(share(touch.stores, before, touch.samples));
      stores[0] += stores_before;
      stores[1] += touch.stores - stores_before;
    }
  }
  for (int side = 0; side < 2; ++side) {
    Range& child = side ? right : left;
    child = {};
    child.start = side ? at : range.start;
    child.end = side ? range.end : at;
    child.made_epoch = child.counted_epoch = child.judged_epoch = epoch_;
    child.sampled_epoch = samples[side] ? epoch_ : 0;
    child.samples = samples[side];
    child.stores = stores[side];
    for (int s = 0; s < HT_SCALES; ++s) {
      __u64 now = __u64{samples[0] + samples[1]} << HT_COUNT_SHIFT;
      __u64 total = decayed(range.count[s], s, epoch_ - range.counted_epoch);
      __u64 older = total > now ? total - now : 0;
      __u64 older_left = share(older, at - range.start, range.bytes());
      child.count[s] =
          saturated((side ? older - older_left : older_left) + (__u64{samples[side]} << HT_COUNT_SHIFT));
    }
  }
}

AdaptivePartition::Range AdaptivePartition::merged(const Range& left, const Range& right) const {
  Range result;
  result.start = left.start;
  result.end = right.end;
  result.made_epoch = result.counted_epoch = result.judged_epoch = epoch_;
  result.sampled_epoch = std::max(left.sampled_epoch, right.sampled_epoch);
  for (const Range* side : {&left, &right}) {
    for (int s = 0; s < HT_SCALES; ++s)
      result.count[s] = saturated(__u64{result.count[s]} +
                                  decayed(side->count[s], s, epoch_ - side->counted_epoch));
    if (side->sampled_epoch == epoch_) {
      result.samples = saturated(__u64{result.samples} + side->samples);
      result.stores = saturated(__u64{result.stores} + side->stores);
    }
  }
  if (left.residency.known() && right.residency.known()) {
    for (int t = 0; t < HT_TIERS; ++t)
      result.residency.tier_pages[t] = left.residency.tier_pages[t] + right.residency.tier_pages[t];
    result.residency.huge_pages = left.residency.huge_pages + right.residency.huge_pages;
    result.residency.walked_epoch = std::min(left.residency.walked_epoch, right.residency.walked_epoch);
    result.residency.moved = left.residency.moved || right.residency.moved;
  }
  return result;
}

std::size_t AdaptivePartition::fill(std::span<tier_range> out) {
  filled_.clear();
  filled_spaces_.clear();
  for (const auto& space : spaces_) filled_spaces_.push_back(space.first);
  std::sort(filled_spaces_.begin(), filled_spaces_.end());
  for (__u64 space : filled_spaces_) {
    for (Mapping& mapping : spaces_.find(space)->second) {
      const std::size_t first = filled_.size();
      for (Range& range : mapping.ranges) {
        judge(range);
        const Residency& residency = range.residency;
        tier_range& o = out[filled_.size()];
        o = {};
        o.start = range.start;
        o.end = range.end;
        o.space = space;
        o.mapped_pages = range.bytes() >> HT_PAGE_SHIFT;
        for (int t = 0; t < HT_TIERS; ++t) o.tier_pages[t] = residency.tier_pages[t];
        o.flags = mapping.flags;
        if (mapping.ranges.size() == 1) o.flags |= TIER_RANGE_ROOT;
        if (residency.known() && residency.huge_pages * 2 > residency.pages()) o.flags |= TIER_RANGE_HUGE;
        if (!cut(range)) o.flags |= TIER_RANGE_MIN;
        if (range.sampled_epoch == epoch_) {
          o.samples = range.samples;
          o.stores = range.stores;
        }
        for (int s = 0; s < HT_SCALES; ++s) o.count[s] = decayed(range.count[s], s, epoch_ - range.counted_epoch);
        o.left_count = o.right_count = HT_UNKNOWN32;
        if (filled_.size() > first) {
          o.left_count = out[filled_.size() - 1].count[0];
          out[filled_.size() - 1].right_count = o.count[0];
        }
        o.age_epochs = saturated(epoch_ - range.made_epoch);
        o.idle_epochs = saturated(epoch_ - std::max(range.sampled_epoch, range.made_epoch));
        o.walk_epochs = residency.walked_epoch ? saturated(epoch_ - residency.walked_epoch) : HT_UNKNOWN32;
        o.mapping = mapping.id;
        o.uneven = uneven(range);
        filled_.push_back(&range);
      }
    }
  }
  return filled_.size();
}

Adapted AdaptivePartition::adapt(std::span<const tier_range> answers) {
  Adapted adapted;
  // max_ranges bounds what splits add to one range per mapping. Where not all
  // may split, the hottest do.
  std::vector<std::size_t> wanted;
  for (std::size_t i = 0; i < filled_.size(); ++i) {
    if (answers[i].action != TIER_SPLIT) continue;
    if (cut(*filled_[i]))
      wanted.push_back(i);
    else
      ++adapted.splits_refused;
  }
  std::size_t extra = ranges_ - mappings_;
  std::size_t room = std::min<std::size_t>(extra < settings_.max_ranges ? settings_.max_ranges - extra : 0,
                                           HT_RANGES_MAX - ranges_);
  if (wanted.size() > room) {
    std::stable_sort(wanted.begin(), wanted.end(),
                     [&](std::size_t a, std::size_t b) { return answers[a].heat > answers[b].heat; });
    adapted.splits_refused += static_cast<__u32>(wanted.size() - room);
    wanted.resize(room);
  }
  std::vector<bool> splits(filled_.size());
  for (std::size_t i : wanted) splits[i] = true;

  std::size_t i = 0;
  for (__u64 space : filled_spaces_) {
    for (Mapping& mapping : spaces_.find(space)->second) {
      const std::size_t end = i + mapping.ranges.size();
      // Most stay as they are in most epochs: a merge takes two.
      bool changes = false;
      for (std::size_t k = i; k < end && !changes; ++k)
        changes = splits[k] || (k + 1 < end && answers[k].action == TIER_MERGE && answers[k + 1].action == TIER_MERGE);
      if (!changes) {
        i = end;
        continue;
      }
      std::vector<Range> ranges;
      ranges.reserve(mapping.ranges.size());
      for (; i < end; ++i) {
        const Range& range = *filled_[i];
        if (splits[i]) {
          Range left, right;
          split(range, cut(range), left, right);
          ranges.push_back(left);
          ranges.push_back(right);
          ++adapted.splits;
        } else if (answers[i].action == TIER_MERGE && i + 1 < end && answers[i + 1].action == TIER_MERGE) {
          ranges.push_back(merged(range, *filled_[i + 1]));
          ++adapted.merges;
          ++i;
        } else {
          ranges.push_back(range);
        }
      }
      mapping.ranges = std::move(ranges);
    }
  }
  ranges_ += adapted.splits;
  ranges_ -= adapted.merges;
  filled_.clear();
  return adapted;
}

}  // namespace hypertier
