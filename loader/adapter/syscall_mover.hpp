// SPDX-License-Identifier: GPL-2.0-or-later
// The mover of last resort, for a kernel on which the module can neither
// exchange nor migrate: move_pages(2), cold pages out before hot ones come in.
#pragma once

#include <hypertier/abi.h>

#include <array>
#include <span>

namespace hypertier {

// Fills the answers of pairs and of run as the module does (abi.h). nodes: where
// pages of each tier go. A page counts once, a huge page as 512.
void move_by_syscall(std::span<ht_pair> pairs, const std::array<int, HT_TIERS>& nodes, ht_exchange_run& run);

}  // namespace hypertier
