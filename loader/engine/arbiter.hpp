// SPDX-License-Identifier: GPL-2.0-or-later
// How the fast tier is shared out between scopes. Each gets its minimum (as far
// as it has memory to fill it); what is above all minima goes page by page to
// the highest heat density, whoever's it is; nobody gets more than its maximum.
// Pure.
#pragma once

#include <span>
#include <vector>

#include "engine.hpp"

namespace hypertier {

struct Claim {
  __u64 min_pages = 0;
  __u64 max_pages = HT_UNKNOWN64;
  Demand demand;  // as of the scope's last epoch
};

struct Share {
  __u64 capacity_pages = 0;
  // What it holds beyond its capacity and a sibling has hotter pages for, and no
  // free room: to be demoted.
  __u64 surplus_pages = 0;
};

// total_pages: of the fast tier, to be shared out; free_pages: of those, that
// nobody uses now.
std::vector<Share> arbitrate(__u64 total_pages, __u64 free_pages, std::span<const Claim> claims);

}  // namespace hypertier
