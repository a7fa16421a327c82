// SPDX-License-Identifier: GPL-2.0-or-later
// What the simulated memory knows of one process, read in place: the true
// misses of each page, and where each page is.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

struct vpebs_shared;

namespace bench {

struct PageMisses {
  uint64_t page;  // number
  uint32_t misses[2];
  uint64_t total() const { return uint64_t{misses[0]} + misses[1]; }
};

struct PagePlace {
  uint64_t page;  // number
  uint8_t node;
};

class Memory {
 public:
  explicit Memory(pid_t pid);  // ends the program if there is no lab around it

  // Everything is counted anew from here on.
  void reset();
  // Sorted by page, all misses since the reset.
  std::vector<PageMisses> misses() const;
  // Sorted by page: resident anonymous and shmem pages of the process.
  std::vector<PagePlace> places() const;
  // Guest-physical memory of a node: first and one past the last address.
  std::array<uint64_t, 2> span(unsigned node) const;

 private:
  pid_t pid_;
  uint64_t cr3_;
  vpebs_shared* shared_;
};

}  // namespace bench
