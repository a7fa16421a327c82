// SPDX-License-Identifier: GPL-2.0-or-later
// How address spaces are cut into ranges, and what is counted for each. The
// scope knows only this interface, so that another partition (an estimate over
// a radix tree) can take its place on the same samples.
#pragma once

#include <algorithm>
#include <cstddef>
#include <array>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include <hypertier/abi.h>

#include "plan.hpp"
#include "range_index.hpp"

namespace hypertier {

// Rates of a tier_range are in 1/64 samples per epoch and GiB; this is one sample per epoch and page.
inline constexpr double kRateUnit = 64.0 * (1 << 18);

// What page-table walks found in a range. A large range is walked in several
// steps; its counts are published when the walk has come round.
struct Residency {
  __u64 tier_pages[HT_TIERS] = {HT_UNKNOWN64, HT_UNKNOWN64};
  __u64 huge_pages = 0;
  __u64 walked_epoch = 0;  // 0: never
  bool moved = false;      // pages were moved since: walk again before using it
  __u64 cursor = 0;        // where the unfinished walk goes on; 0: at the start
  __u64 partial_pages[HT_TIERS] = {0, 0};
  __u64 partial_huge_pages = 0;
  // The policy refused all of its pages: they are not offered again before then.
  __u64 held_until_epoch = 0;
  __u32 hold_epochs = 0;
  // When its pages were seen to go to and fro, and for how many epochs after
  // they stay where they are.
  __u64 cooled_epoch = 0;
  __u32 cool_epochs = 0;

  bool known() const { return tier_pages[HT_TIER_FAST] != HT_UNKNOWN64; }
  __u64 pages() const { return tier_pages[HT_TIER_FAST] + tier_pages[HT_TIER_SLOW]; }

  void restart() {
    cursor = 0;
    partial_pages[HT_TIER_FAST] = partial_pages[HT_TIER_SLOW] = partial_huge_pages = 0;
  }

  // A page was moved to that tier. Where the page has been counted, in the last
  // walk and in the one that goes on, it is counted there from now on.
  void move(ht_page_t page, ht_tier to) {
    const ht_tier from = to == HT_TIER_FAST ? HT_TIER_SLOW : HT_TIER_FAST;
    auto count = [&](__u64* counts) {
      const __u64 n = std::min(counts[from], __u64{1} << HT_PAGE_ORDER(page));
      counts[from] -= n;
      counts[to] += n;
    };
    if (known()) count(tier_pages);
    if (HT_PAGE_ADDR(page) < cursor) count(partial_pages);
  }
};

struct Adapted {
  __u32 splits = 0;
  __u32 merges = 0;
  __u32 splits_refused = 0;
};

// Pages put on trial in the last epoch, by the tier they were in, and the
// samples they had in this one.
struct Trial {
  __u64 hot_pages = 0;   // in slow memory
  __u64 cold_pages = 0;  // in fast memory
  __u64 hot_hits = 0;
  __u64 cold_hits = 0;
  bool told = true;  // accessed bits: those of both sides were read
};

// A huge page that is hot in a part only.
struct Skewed {
  __u64 space = 0;
  __u64 start = 0;
  __u32 pages = 0;        // of the hot part
  double part_rate = 0;   // samples per epoch and page of the part
  double whole_rate = 0;  // what such a page brings as long as the huge page is whole
};

class Partition {
 public:
  virtual ~Partition() = default;

  // A new epoch: what is folded from here on belongs to it. Epochs follow each other.
  // exposure: how many epochs of the first period its samples say as much as.
  virtual void begin(__u64 epoch, float exposure = 1) = 0;

  // Counts one granule, exactly by page. stray(address, samples) is called for
  // pages with samples that lie in no range.
  using Stray = std::function<void(__u64 address, __u32 samples)>;
  virtual void fold(const ht_granule& granule, const Stray& stray) = 0;

  // Takes in what the accessed bits of one granule told. Pages outside of all
  // ranges are left out.
  virtual void fold(const ht_bits& bits) = 0;

  // The epoch is folded. How many samples its bits amount to; 0 without bits.
  virtual __u64 close(__u64 fast_pages) = 0;

  // The interval at which bits tell most: 1 / mean rate of the hottest
  // fast_pages of the last close(). 0: not known.
  virtual __u64 bits_interval_ns() const = 0;

  // All that the space maps and that is to be managed: sorted, disjoint.
  virtual void map(__u64 space, std::span<const ht_mapping> mappings) = 0;
  virtual void drop(__u64 space) = 0;

  // Writes the ranges, in the order space, address; returns how many. pid,
  // heat and action are left at 0.
  virtual std::size_t fill(std::span<tier_range> out) = 0;

  // Both take indices of the last fill, up to the next map, drop or adapt.
  virtual Residency& residency(std::size_t index) = 0;
  virtual Adapted adapt(std::span<const tier_range> answers) = 0;

  // The rest is for partitions that keep track of where each page is. They say
  // what to walk, list the pages of a range themselves, and count what pages on
  // trial bring.
  struct Span {
    __u64 space = 0;
    __u64 start = 0;
    __u64 end = 0;
    __u64 pages = HT_UNKNOWN64;  // to be found at most
  };
  virtual bool knows_pages() const { return false; }
  // Which range of the last fill() a page belongs to; null: that in which its address lies.
  virtual std::shared_ptr<const RangeIndex> index() const { return nullptr; }
  virtual std::size_t bytes() const { return 0; }  // of memory for counters, by what is resident
  // Each within one mapping, about so many pages in all. changed: spaces that may
  // have got or lost pages; of the others some are looked at in turn.
  virtual std::vector<Span> to_walk(__u64 /*pages*/, std::span<const __u64> /*changed*/) { return {}; }
  // The walk of a span ended at next; pages of both tiers, by address.
  virtual void walked(const Span& /*span*/, __u64 /*next*/, std::span<const ht_page_t> /*pages*/) {}
  virtual void list(std::size_t /*index*/, ht_tier /*tier*/, __u64 /*max_pages*/, std::vector<Listed>& /*listed*/) {}
  // What became of a page that was to come to a tier.
  virtual void placed(__u64 /*space*/, ht_page_t /*page*/, ht_move_result /*result*/, ht_tier /*wanted*/) {}
  // Huge pages that were seen to be hot in a part only, at most so many; and what
  // became of one that was to be taken apart. HT_MOVE_NONE: it does not pay.
  virtual std::vector<Skewed> skewed(std::size_t /*max*/) { return {}; }
  virtual void apart(__u64 /*space*/, __u64 /*start*/, ht_move_result /*result*/) {}
  virtual Trial trial() { return {}; }
  // Samples of this epoch of pages whose tier is known, by tier.
  virtual std::array<__u64, HT_TIERS> tier_samples() const { return {}; }
  // In place of fill(). True: what fill() last wrote stands but for the samples of this epoch,
  // and lately so little was moved that nobody has to look at it. False: nothing was done.
  virtual bool rest() { return false; }
  virtual void clear_trial() {}
  virtual void try_pages(__u64 /*space*/, ht_page_t /*page*/, ht_tier /*side*/) {}
};

}  // namespace hypertier
