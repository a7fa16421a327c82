// SPDX-License-Identifier: GPL-2.0-or-later
// Which range a page belongs to, where ranges are not stretches of addresses: pages
// that are alike in heat lie scattered among others. A cell is a stretch of one mapping;
// its pages have levels, and those of one level are one range.
#pragma once

#include <emmintrin.h>  // of every x86-64

#include <algorithm>
#include <bit>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

// The one of stretches of addresses (by space, start; disjoint) that an address is in.
template <class Stretches>
auto stretch_of(const Stretches& stretches, __u64 space, __u64 address) {
  auto after = std::upper_bound(stretches.begin(), stretches.end(), std::pair{space, address},
                                [](const auto& at, const auto& one) { return at < std::pair{one.space, one.start}; });
  if (after == stretches.begin()) return stretches.end();
  --after;
  return after->space == space && address < after->end ? after : stretches.end();
}

struct RangeIndex {
  static constexpr unsigned kLevels = 64;
  static constexpr __u8 kNoLevel = 0xff;  // no page, or it came since
  static constexpr std::size_t kOneLevel = ~std::size_t{0};

  struct Cell {
    __u64 space = 0;
    __u64 start = 0;  // bytes, as of a tier_range
    __u64 end = 0;
    __u64 levels = 0;             // bit l: there is a range of level l; by level they follow each other
    std::size_t pool = kOneLevel;  // of its pages' levels, from its first granule's first page on; else it is one range
    __u32 first = 0;              // range

    bool scattered() const { return pool != kOneLevel; }
    unsigned ranges() const { return static_cast<unsigned>(std::popcount(levels)); }
    __u32 range_of(__u8 level) const { return first + static_cast<__u32>(std::popcount(levels & ((1ULL << level) - 1))); }
  };

  std::vector<Cell> cells;  // by space, start; disjoint
  std::shared_ptr<const std::vector<__u8>> pool;

  // Levels of the 512 pages of a granule that a scattered cell has a part of.
  const __u8* levels(const Cell& cell, __u64 granule) const {
    return pool->data() + cell.pool + ((granule - (cell.start >> HT_GRANULE_SHIFT)) << (HT_GRANULE_SHIFT - HT_PAGE_SHIFT));
  }

  // Which of 64 pages have a level.
  static __u64 pages_of(const __u8* levels, __u8 level) {
    const __m128i wanted = _mm_set1_epi8(static_cast<char>(level));
    __u64 bits = 0;
    for (unsigned i = 0; i < 4; ++i) {
      const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels) + i);
      bits |= static_cast<__u64>(static_cast<__u32>(_mm_movemask_epi8(_mm_cmpeq_epi8(some, wanted)))) << (16 * i);
    }
    return bits;
  }

  // The range of a page of a cell.
  std::optional<__u32> range(const Cell& cell, __u64 address) const {
    if (!cell.scattered()) return cell.first;
    const __u8 level = levels(cell, address >> HT_GRANULE_SHIFT)[(address >> HT_PAGE_SHIFT) % HT_GRANULE_PAGES];
    return level == kNoLevel ? std::nullopt : std::optional(cell.range_of(level));
  }

  std::optional<__u32> find(__u64 space, __u64 address) const {
    const auto cell = stretch_of(cells, space, address);
    if (cell == cells.end()) return std::nullopt;
    return range(*cell, address);
  }

  std::size_t bytes() const { return cells.capacity() * sizeof(Cell) + (pool ? pool->capacity() : 0); }
};

// The range that a page belongs to. ranges: by space, start; without an index disjoint.
template <class Ranges>
std::optional<__u32> range_of(const Ranges& ranges, const RangeIndex* index, __u64 space, __u64 address) {
  if (index) return index->find(space, address);
  const auto range = stretch_of(ranges, space, address);
  if (range == ranges.end()) return std::nullopt;
  return static_cast<__u32>(range - ranges.begin());
}

}  // namespace hypertier
