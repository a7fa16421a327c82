// SPDX-License-Identifier: GPL-2.0-or-later
#include "history.hpp"

#include <algorithm>

namespace hypertier {
namespace {

__u32 narrow(__u64 pages) {
  return pages == HT_UNKNOWN64 ? HT_UNKNOWN32 : static_cast<__u32>(std::min<__u64>(pages, HT_UNKNOWN32 - 1));
}

__u64 widen(__u32 pages) { return pages == HT_UNKNOWN32 ? HT_UNKNOWN64 : pages; }

}  // namespace

void History::add(__u64 epoch, __u32 cut_heat, std::span<const tier_range> ranges,
                  std::span<const tier_result> moved) {
  Epoch now{epoch, cut_heat, {}};
  while (!epochs_.empty() && (epochs_.size() >= max_epochs_ || ranges_ + ranges.size() > max_ranges_)) {
    ranges_ -= epochs_.front().ranges.size();
    now.ranges = std::move(epochs_.front().ranges);  // its memory is used again
    epochs_.pop_front();
  }
  now.ranges.clear();
  now.ranges.reserve(ranges.size());
  for (const tier_range& range : ranges)
    now.ranges.push_back({range.space, range.start, range.end, range.heat, range.samples,
                          {narrow(range.tier_pages[HT_TIER_FAST]), narrow(range.tier_pages[HT_TIER_SLOW])}, 0, 0});
  for (const tier_result& result : moved) {
    auto at = std::lower_bound(now.ranges.begin(), now.ranges.end(), result.range, [](const Range& a, const tier_range& b) {
      return a.space != b.space ? a.space < b.space : a.start < b.start;
    });
    if (at == now.ranges.end() || at->space != result.range.space || at->start != result.range.start) continue;
    at->promoted_pages = result.promoted_pages;
    at->demoted_pages = result.demoted_pages;
  }
  ranges_ += now.ranges.size();
  epochs_.push_back(std::move(now));
}

std::vector<PastRange> History::of(__u64 space, __u64 address) const {
  std::vector<PastRange> found;
  for (auto epoch = epochs_.rbegin(); epoch != epochs_.rend(); ++epoch) {
    auto after = std::upper_bound(epoch->ranges.begin(), epoch->ranges.end(), address, [&](__u64 at, const Range& range) {
      return range.space != space ? space < range.space : at < range.start;
    });
    if (after == epoch->ranges.begin()) continue;
    const Range& range = *std::prev(after);
    if (range.space != space || address >= range.end) continue;
    found.push_back({epoch->number, range.start, range.end, range.heat, epoch->cut_heat, range.samples,
                     range.promoted_pages, range.demoted_pages, widen(range.pages[HT_TIER_FAST]),
                     widen(range.pages[HT_TIER_SLOW])});
  }
  return found;
}

}  // namespace hypertier
