// SPDX-License-Identifier: GPL-2.0-or-later
// The picture of a run: address x time, coloured by tier and heat, with the
// true fast-tier hit ratio on the same time axis above it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace demo {

// One stretch of address space at one time.
struct Cell {
  uint64_t start = 0, end = 0;
  double rate = 0;        // samples per epoch and MiB
  double fast_share = 0;  // of its resident pages; negative: nothing resident
};

struct Frame {
  double seconds = 0;  // guest clock, end of the window
  double fast_hit_ratio = 0;
  std::string policy;  // seated during the window
  std::string event;   // what happened just before it; empty: nothing
  std::vector<Cell> cells;
};

struct Picture {
  std::string title, subtitle;
  std::vector<Frame> frames;
};

std::string heat_map_svg(const Picture& picture);

}  // namespace demo
