// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/slots.hpp"

#include <utility>

namespace hypertier {

Slots::Slots(std::uint32_t capacity) : known_(capacity) {}

void Slots::leave(std::uint32_t slot, std::uint64_t space, std::uint64_t granule) {
  forgotten_.push_back({slot, {space, granule}});
}

void Slots::seen(std::uint32_t slot, std::uint64_t space, std::uint64_t granule) {
  if (known_[slot]) return;
  known_[slot] = true;
  if (gone_.contains(space))
    leave(slot, space, granule);
  else
    granules_[space][granule] = slot;
}

void Slots::forget(std::uint64_t space, std::uint64_t start, std::uint64_t end) {
  if (start >= end) return;
  // Two drains: a sample of the space may be in either set.
  if (start == 0 && end == ~0ULL) gone_[space] = 2;
  auto found = granules_.find(space);
  if (found == granules_.end()) return;
  auto& granules = found->second;
  auto first = granules.lower_bound(start >> HT_GRANULE_SHIFT);
  auto last = granules.upper_bound((end - 1) >> HT_GRANULE_SHIFT);
  for (auto at = first; at != last; ++at) leave(at->second, space, at->first);
  granules.erase(first, last);
  if (granules.empty()) granules_.erase(found);
}

void Slots::forget_all() {
  for (auto& [space, granules] : granules_)
    for (auto& [granule, slot] : granules) leave(slot, space, granule);
  granules_.clear();
}

std::vector<Slots::Leaving> Slots::begin_drain() {
  for (const auto& leaving : forgotten_) deleted_[0].push_back(leaving.slot);
  return std::exchange(forgotten_, {});
}

std::vector<std::uint32_t> Slots::end_drain() {
  for (auto space = gone_.begin(); space != gone_.end();)
    space = --space->second ? std::next(space) : gone_.erase(space);
  auto free = std::exchange(deleted_[2], std::exchange(deleted_[1], std::exchange(deleted_[0], {})));
  for (auto slot : free) known_[slot] = false;
  return free;
}

}  // namespace hypertier
