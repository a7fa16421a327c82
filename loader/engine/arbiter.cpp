// SPDX-License-Identifier: GPL-2.0-or-later
#include "arbiter.hpp"

#include <algorithm>
#include <numeric>

namespace hypertier {
namespace {

// Densities waver by chance: so small an excess, as a share of the capacity, is
// not worth the moves.
constexpr __u64 kSlack = 64;

__u64 part(__u64 value, __u64 of, __u64 whole) {
  return whole ? static_cast<__u64>(static_cast<unsigned __int128>(value) * of / whole) : 0;
}

__u64 sum(const std::vector<__u64>& values) { return std::accumulate(values.begin(), values.end(), __u64{0}); }

}  // namespace

std::vector<Share> arbitrate(__u64 total_pages, __u64 free_pages, std::span<const Claim> claims) {
  const std::size_t n = claims.size();
  std::vector<__u64> guaranteed(n), wanted(n), given(n);
  for (std::size_t i = 0; i < n; ++i) {
    const Claim& claim = claims[i];
    const __u64 has = claim.demand.fast_pages + claim.demand.slow_pages;
    guaranteed[i] = std::min({claim.min_pages, claim.max_pages, has});
  }
  // What the kernel itself uses may leave less than the minima promise.
  if (const __u64 promised = sum(guaranteed); promised > total_pages)
    for (__u64& pages : guaranteed) pages = part(pages, total_pages, promised);
  given = guaranteed;

  // From the densest bucket down, as long as all of a bucket fits.
  auto bounded = [&](std::size_t i, __u64 want) {
    return std::max(guaranteed[i], std::min(want, claims[i].max_pages));
  };
  int bucket = kDensityBuckets - 1;
  for (; bucket >= 0; --bucket) {
    std::vector<__u64> next(n);
    for (std::size_t i = 0; i < n; ++i)
      next[i] = bounded(i, wanted[i] + claims[i].demand.pages[static_cast<std::size_t>(bucket)]);
    if (sum(next) > total_pages) break;
    for (std::size_t i = 0; i < n; ++i) wanted[i] += claims[i].demand.pages[static_cast<std::size_t>(bucket)];
    given = next;
  }
  if (bucket >= 0) {
    // Of the bucket at the cut, what is there already stays; the rest in proportion.
    std::vector<__u64> more(n);
    for (int step = 0; step < 2; ++step) {
      const __u64 left = total_pages - sum(given);
      for (std::size_t i = 0; i < n; ++i) {
        const __u64 next = bounded(i, wanted[i] + claims[i].demand.pages[static_cast<std::size_t>(bucket)]);
        more[i] = next - given[i];
        if (step == 0) {
          const __u64 fast = claims[i].demand.fast_pages;
          more[i] = std::min(more[i], fast > given[i] ? fast - given[i] : 0);
        }
      }
      const __u64 asked = sum(more);
      for (std::size_t i = 0; i < n; ++i) given[i] += asked <= left ? more[i] : part(more[i], left, asked);
    }
  }
  // What nobody asks for may be used by whoever comes first: a capacity too
  // large does no harm, since a pair of pages changes places only for heat.
  const __u64 idle = total_pages - std::min(total_pages, sum(given));

  std::vector<Share> shares(n);
  std::vector<__u64> excess(n);
  __u64 needed = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const Demand& demand = claims[i].demand;
    shares[i].capacity_pages = std::max(given[i], std::min(given[i] + idle, claims[i].max_pages));
    const __u64 hot = std::accumulate(demand.pages.begin() + 1, demand.pages.end(), __u64{0});
    const __u64 needs = std::min(given[i], std::max(hot, guaranteed[i]));
    if (needs > demand.fast_pages) needed += needs - demand.fast_pages;
    const __u64 bound = shares[i].capacity_pages;
    if (demand.fast_pages > bound + bound / kSlack) excess[i] = demand.fast_pages - bound;
  }
  needed -= std::min(needed, free_pages);
  const __u64 all = sum(excess);
  for (std::size_t i = 0; i < n; ++i) shares[i].surplus_pages = needed >= all ? excess[i] : part(excess[i], needed, all);
  return shares;
}

}  // namespace hypertier
