// SPDX-License-Identifier: GPL-2.0-or-later
#include "plan.hpp"

#include <algorithm>
#include <array>

namespace hypertier {

std::vector<PlanEntry> make_plan(std::span<const Listed> hot, std::span<const Listed> cold,
                                 std::span<const tier_range> ranges, __u64 fast_room, __u64 slow_room,
                                 bool large_alone) {
  constexpr std::size_t kOrders = HT_PAGE_ORDER_MASK + 1;
  auto heat = [&](const Listed& listed) { return ranges[listed.range].heat; };
  std::vector<PlanEntry> plan;
  plan.reserve(hot.size());

  // In place: both anonymous and of one order, or there is nothing to swap.
  std::array<std::vector<std::size_t>, kOrders> swappable;
  for (std::size_t c = 0; c < cold.size(); ++c)
    if (!(cold[c].page & HT_PAGE_FILE)) swappable[HT_PAGE_ORDER(cold[c].page)].push_back(c);
  std::array<std::size_t, kOrders> next{};
  std::vector<bool> taken(cold.size());
  std::vector<std::size_t> left;
  for (std::size_t h = 0; h < hot.size(); ++h) {
    __u32 order = HT_PAGE_ORDER(hot[h].page);
    std::size_t& n = next[order];
    if ((hot[h].page & HT_PAGE_FILE) || n == swappable[order].size() ||
        heat(cold[swappable[order][n]]) >= heat(hot[h])) {
      left.push_back(h);
      continue;
    }
    std::size_t c = swappable[order][n++];
    taken[c] = true;
    plan.push_back({hot[h].page, cold[c].page, hot[h].range, cold[c].range});
  }

  // The rest by migration: into free room first, then into room that colder
  // pages make.
  std::size_t c = 0;
  __u32 provider = kNoRange;  // whose pages made the room in use; kNoRange: it was free
  for (std::size_t h : left) {
    if (!large_alone && HT_PAGE_ORDER(hot[h].page) != 0 && fast_room < hot[h].pages()) continue;
    std::size_t mark = plan.size();
    __u64 fast = fast_room;
    __u64 slow = slow_room;
    std::size_t at = c;
    __u32 from = provider != kNoRange && ranges[provider].heat < heat(hot[h]) ? provider : kNoRange;
    while (fast < hot[h].pages()) {
      while (at < cold.size() && taken[at]) ++at;
      if (at == cold.size() || heat(cold[at]) >= heat(hot[h]) || slow < cold[at].pages()) break;
      plan.push_back({0, cold[at].page, hot[h].range, cold[at].range});
      from = cold[at].range;
      fast += cold[at].pages();
      slow -= cold[at].pages();
      ++at;
    }
    if (fast < hot[h].pages()) {  // not enough: take back what was to make room
      plan.resize(mark);
      if (HT_PAGE_ORDER(hot[h].page) == 0) break;
      continue;
    }
    plan.push_back({hot[h].page, 0, hot[h].range, from});
    fast_room = fast - hot[h].pages();
    slow_room = slow + hot[h].pages();
    c = at;
    provider = from;
  }

  std::stable_sort(plan.begin(), plan.end(), [&](const PlanEntry& a, const PlanEntry& b) {
    return ranges[a.hot_range].heat > ranges[b.hot_range].heat;
  });
  return plan;
}

std::vector<PlanEntry> make_room(std::span<const Listed>& cold, std::span<const tier_range> ranges, __u32 like,
                                 __u64 wanted, __u64& slow_room) {
  std::vector<PlanEntry> plan;
  __u64 made = 0;
  while (made < wanted && !cold.empty()) {
    const Listed& coldest = cold.front();
    if (ranges[coldest.range].heat >= ranges[like].heat || coldest.pages() > slow_room) break;
    plan.push_back({0, coldest.page, like, coldest.range, true});
    made += coldest.pages();
    slow_room -= coldest.pages();
    cold = cold.subspan(1);
  }
  return plan;
}

}  // namespace hypertier
