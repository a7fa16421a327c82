// SPDX-License-Identifier: GPL-2.0-or-later
// tierd's side of the life of granule slots (see bpf/sampler.h): which slots
// hold what, and when a forgotten one may be taken again. Pure.
//
// A forgotten granule leaves in steps, one drain apart each:
//   1 its key is deleted from the index, before the sets flip. A sampler that
//     found the slot just before may still count in either set;
//   2 the grace period of that drain ends the last of them. The old set is
//     clean then, the new one may hold a late count;
//   3 the next drain cleans the new set too: the slot goes back to the ring.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

class Slots {
 public:
  explicit Slots(std::uint32_t capacity);

  // A slot was found in a drained set, holding that granule.
  void seen(std::uint32_t slot, std::uint64_t space, std::uint64_t granule);
  // The granules that [start, end) touches are to go. One that is cut and still
  // sampled in its other part simply becomes a new granule.
  void forget(std::uint64_t space, std::uint64_t start, std::uint64_t end);
  void forget_all();

  // Start of a drain: the keys to delete from the index now.
  std::vector<ht_granule_key> begin_drain();
  // End of a drain: the slots that may be taken again.
  std::vector<std::uint32_t> end_drain();

 private:
  struct Leaving {
    std::uint32_t slot;
    ht_granule_key key;
  };

  void leave(std::uint32_t slot, std::uint64_t space, std::uint64_t granule);

  std::vector<bool> known_;  // by slot: in granules_ or leaving
  std::unordered_map<std::uint64_t, std::map<std::uint64_t, std::uint32_t>> granules_;  // space, granule -> slot
  // Spaces that were forgotten as a whole, with the drains they are remembered
  // for: samples taken just before the end show up after it, and an id is
  // never used again.
  std::unordered_map<std::uint64_t, int> gone_;
  std::vector<Leaving> forgotten_;
  std::vector<std::uint32_t> deleted_;   // before the flip of this drain
  std::vector<std::uint32_t> previous_;  // before the flip of the drain before
};

}  // namespace hypertier
