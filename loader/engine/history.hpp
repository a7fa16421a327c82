// SPDX-License-Identifier: GPL-2.0-or-later
// What the ranges were in the last epochs, so that a page's whereabouts can be
// explained. Ranges split and merge: so an address is looked up, not a range.
#pragma once

#include <deque>
#include <memory>
#include <span>
#include <vector>

#include <hypertier/abi.h>

#include "range_index.hpp"

namespace hypertier {

// The range that held an address in one epoch.
struct PastRange {
  __u64 epoch = 0;
  __u64 start = 0;
  __u64 end = 0;
  __u32 heat = 0;
  __u32 cut_heat = 0;  // of the epoch: heat of the last range above the cut
  __u32 samples = 0;
  __u32 promoted_pages = 0;
  __u32 demoted_pages = 0;
  __u64 fast_pages = HT_UNKNOWN64;
  __u64 slow_pages = HT_UNKNOWN64;
};

class History {
 public:
  // At most so many epochs, and fewer as the ranges of all of them together, with what
  // tells their pages, would take more than max_ranges; the last one is always kept.
  History(std::size_t max_epochs, std::size_t max_ranges) : max_epochs_(max_epochs), max_ranges_(max_ranges) {}

  // ranges: sorted by space and address. index: which of them a page belongs to; null:
  // that in which its address lies. moved: results of those that were touched.
  struct Moved {
    __u32 range;
    __u32 promoted_pages;
    __u32 demoted_pages;
  };
  void add(__u64 epoch, __u32 cut_heat, std::span<const tier_range> ranges, std::shared_ptr<const RangeIndex> index,
           std::span<const Moved> moved);

  // Newest first.
  std::vector<PastRange> of(__u64 space, __u64 address) const;

 private:
  struct Range {
    __u64 space;
    __u64 start;
    __u64 end;
    __u32 heat;
    __u32 samples;
    __u32 pages[HT_TIERS];  // HT_UNKNOWN32: not known; 16 TiB and more count as that less a page
    __u32 promoted_pages;
    __u32 demoted_pages;
  };
  struct Epoch {
    __u64 number;
    __u32 cut_heat;
    std::vector<Range> ranges;
    std::shared_ptr<const RangeIndex> index;
    std::size_t weight() const { return ranges.size() + (index ? index->bytes() / sizeof(Range) : 0); }
  };

  std::size_t max_epochs_;
  std::size_t max_ranges_;
  std::size_t weight_ = 0;
  std::deque<Epoch> epochs_;
};

}  // namespace hypertier
