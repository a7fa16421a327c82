// SPDX-License-Identifier: GPL-2.0-or-later
// tierd's side of the life of granule slots (see bpf/sampler.h): which slots
// hold what, and when a forgotten one may be taken again. Pure.
//
// A forgotten granule leaves in steps, one drain apart each:
//   1 its key is deleted from the index, and its hint, before the sets flip.
//     A sampler that looked just before may still count in either set, and set
//     the hint again: so that is cleared once more after the grace period;
//   2 a sampler that read that late hint is waited for by the second drain. It
//     may have counted in the set that this drain does not clean;
//   3 the third drain cleans that one too: the slot goes back to the ring.
#pragma once

#include <hypertier/abi.h>

#include <array>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

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

  struct Leaving {
    std::uint32_t slot;
    ht_granule_key key;
  };
  // Start of a drain: whose keys are to be deleted now.
  std::vector<Leaving> begin_drain();
  // End of a drain: the slots that may be taken again.
  std::vector<std::uint32_t> end_drain();

 private:
  void leave(std::uint32_t slot, std::uint64_t space, std::uint64_t granule);

  std::vector<bool> known_;  // by slot: in granules_ or leaving
  std::unordered_map<std::uint64_t, std::map<std::uint64_t, std::uint32_t>>
      granules_;  // space, granule -> slot
  // Spaces that were forgotten as a whole, with the drains they are remembered
  // for: samples taken just before the end show up after it, and an id is
  // never used again.
  std::unordered_map<std::uint64_t, int> gone_;
  std::vector<Leaving> forgotten_;
  std::array<std::vector<std::uint32_t>, 3> deleted_;  // in this drain, and in the two before
};

}  // namespace hypertier
