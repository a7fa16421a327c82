// SPDX-License-Identifier: GPL-2.0-or-later
#include "history.hpp"

#include <algorithm>
#include <utility>

namespace hypertier {
namespace {

__u32 narrow(__u64 pages) {
  return pages == HT_UNKNOWN64 ? HT_UNKNOWN32 : static_cast<__u32>(std::min<__u64>(pages, HT_UNKNOWN32 - 1));
}

__u64 widen(__u32 pages) { return pages == HT_UNKNOWN32 ? HT_UNKNOWN64 : pages; }

}  // namespace

void History::add(__u64 epoch, __u32 cut_heat, std::span<const tier_range> ranges, std::shared_ptr<const RangeIndex> index,
                  std::span<const Moved> moved) {
  Epoch now{epoch, cut_heat, {}, std::move(index)};
  const std::size_t weight = ranges.size() + now.weight();
  while (!epochs_.empty() && (epochs_.size() >= max_epochs_ || weight_ + weight > max_ranges_)) {
    weight_ -= epochs_.front().weight();
    now.ranges = std::move(epochs_.front().ranges);  // its memory is used again
    epochs_.pop_front();
  }
  now.ranges.clear();
  now.ranges.reserve(ranges.size());
  for (const tier_range& range : ranges)
    now.ranges.push_back({range.space, range.start, range.end, range.heat, range.samples,
                          {narrow(range.tier_pages[HT_TIER_FAST]), narrow(range.tier_pages[HT_TIER_SLOW])}, 0, 0});
  for (const Moved& m : moved) {
    now.ranges[m.range].promoted_pages = m.promoted_pages;
    now.ranges[m.range].demoted_pages = m.demoted_pages;
  }
  weight_ += weight;
  epochs_.push_back(std::move(now));
}

std::vector<PastRange> History::of(__u64 space, __u64 address) const {
  std::vector<PastRange> found;
  for (auto epoch = epochs_.rbegin(); epoch != epochs_.rend(); ++epoch) {
    const auto index = range_of(epoch->ranges, epoch->index.get(), space, address);
    if (!index) continue;
    const Range& range = epoch->ranges[*index];
    found.push_back({epoch->number, range.start, range.end, range.heat, epoch->cut_heat, range.samples,
                     range.promoted_pages, range.demoted_pages, widen(range.pages[HT_TIER_FAST]),
                     widen(range.pages[HT_TIER_SLOW])});
  }
  return found;
}

}  // namespace hypertier
