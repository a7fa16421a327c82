// SPDX-License-Identifier: GPL-2.0-or-later
// Which NUMA nodes are fast and which are slow, and how much room they have.
#pragma once

#include <hypertier/abi.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "result.hpp"
#include "sources/source.hpp"

namespace hypertier {

struct Tiers {
  std::array<std::vector<int>, HT_TIERS> nodes;  // ascending
  std::string origin;                            // "memory tiers", "nodes without CPUs", "settings"

  ht_tiers masks() const;
};

// Node lists as the kernel writes them ("0,2-3"); empty: find out. If only one
// is given, the other tier is all other nodes with memory.
struct TierOverrides {
  std::string fast_nodes;
  std::string slow_nodes;
};

// Memory tiers of the kernel (HMAT) if they tell nodes apart, else nodes
// without CPUs are slow.
Result<Tiers> discover_tiers(const TierOverrides& overrides = {}, const Roots& roots = {});

struct TierUse {
  std::uint64_t capacity_bytes = 0;
  std::uint64_t free_bytes = 0;
};

// The lines of a node's meminfo, by key ("MemTotal:"), in KiB; those without a number are left out.
Result<> read_node_memory(int node, const Roots& roots, const std::function<void(std::string_view key, std::uint64_t kib)>& line_of);

Result<std::array<TierUse, HT_TIERS>> tier_use(const Tiers& tiers, const Roots& roots = {});

// What this thread, and those it starts, allocate from now on is slow memory if there
// is any.
void prefer_slow(const Tiers& tiers);

struct FastZones {
  // Free memory below which the kernel allocates from slow memory instead: the low
  // watermarks of the zones, and what lower zones keep for those who cannot use higher
  // ones. It is for now: where the kernel had to break up a block of 2 MiB, it raises
  // them until kswapd has been there (watermark_boost_factor).
  std::uint64_t watermark_pages = 0;
  // Free pages that lie in lists by CPU, which free memory does not count.
  std::uint64_t listed_pages = 0;
};

// Of /proc/zoneinfo. Nothing is known: 0.
FastZones zones_of_fast(const Tiers& tiers, const Roots& roots = {});

}  // namespace hypertier
