// SPDX-License-Identifier: GPL-2.0-or-later
// Which page changes places with which. Pure: lists in, entries out.
#pragma once

#include <span>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

// A page that a walk listed, and the range (index of the epoch) it lies in.
struct Listed {
  ht_page_t page = 0;
  __u32 range = 0;

  __u64 pages() const { return __u64{1} << HT_PAGE_ORDER(page); }
};

inline constexpr __u32 kNoRange = HT_UNKNOWN32;

// hot goes to fast memory, cold to slow memory; an address of 0 means that
// side is empty. Both ranges are named even then: the pair of ranges is what a
// policy admits. cold_range is kNoRange where hot takes free room. coming: cold
// makes room for memory that will be allocated, hot_range is the like of it. back:
// either page came from where it would go, lately.
struct PlanEntry {
  ht_page_t hot = 0;
  ht_page_t cold = 0;
  __u32 hot_range = kNoRange;
  __u32 cold_range = kNoRange;
  bool coming = false;
  bool back = false;

  __u64 hot_pages() const { return hot ? __u64{1} << HT_PAGE_ORDER(hot) : 0; }
  __u64 cold_pages() const { return cold ? __u64{1} << HT_PAGE_ORDER(cold) : 0; }
};

// hot: hottest first, cold: coldest first (what came lately last); heat: by range. fast_room and
// slow_room: pages that may be filled. No entry swaps equals, no page is
// demoted without a hotter one that takes its place. large_alone: room is
// made for pages above order 0 that have no partner of their size. Entries are in the order
// of their hot side; within one need, what makes room comes before what takes
// it.
std::vector<PlanEntry> make_plan(std::span<const Listed> hot, std::span<const Listed> cold,
                                 std::span<const tier_range> ranges, __u64 fast_room, __u64 slow_room,
                                 bool large_alone = true);

// The coldest pages, as many as are wanted, go so that memory like that of range
// `like` finds room when it is allocated. Takes them off the front of cold.
std::vector<PlanEntry> make_room(std::span<const Listed>& cold, std::span<const tier_range> ranges, __u32 like,
                                 __u64 wanted, __u64& slow_room);

}  // namespace hypertier
