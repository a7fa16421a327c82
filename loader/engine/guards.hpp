// SPDX-License-Identifier: GPL-2.0-or-later
// What keeps a policy from doing harm by moving: a rate limit, a memory of what
// was moved lately, and the rules that a policy is ejected for although its
// callbacks are quick and their answers valid. Pure.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

// Token bucket over the pages that change tiers, both directions together. What
// an idle time leaves over is kept for a second at most.
class RateLimit {
 public:
  // 0: no limit.
  void set(__u64 bytes_per_s) { bytes_per_s_ = bytes_per_s; }
  // So much time went by.
  void refill(__u64 ns);
  // Pages that may be moved now; HT_UNKNOWN64: any number.
  __u64 pages() const;
  void spend(__u64 pages);

 private:
  __u64 bytes_per_s_ = 0;
  __u64 bytes_ = 0;
};

// Which pages were moved lately, and where to: so that a move that takes another
// one back is known as such. A table of fixed size in which a newer move takes
// the place of the oldest of its bucket: it may forget, but never grows.
class MoveHistory {
 public:
  // Moves that are remembered at most, a power of two of at least kLeast; 8 bytes each.
  explicit MoveHistory(std::size_t most) : most_(most) {}

  // So many moves may be made while they matter. Counts before the first one.
  void expect(__u64 moves);
  // Was the page moved out of `to` in the last window_epochs?
  bool reverses(__u64 space, __u64 address, ht_tier to, __u64 epoch, __u32 window_epochs) const;
  void moved(__u64 space, __u64 address, ht_tier to, __u64 epoch);
  void clear() { table_.clear(); }

  static constexpr std::size_t kLeast = 256;

 private:
  static constexpr std::size_t kBucket = 8;  // a cache line
  static constexpr int kNameBits = 39, kEpochBits = 23;
  struct Entry {
    __u64 name : kNameBits = 0;
    __u64 to : 1 = 0;
    __u64 used : 1 = 0;
    __u64 epoch : kEpochBits = 0;

    __u64 age(__u64 now) const { return (now - epoch) & ((1ULL << kEpochBits) - 1); }
  };
  struct Place {
    std::size_t bucket;
    __u64 name;
  };
  Place place(__u64 space, __u64 address) const;

  std::size_t most_;
  std::vector<std::array<Entry, kBucket>> table_;  // empty until the first move
};

struct ConductSettings {
  // A policy that gives no range heat and asks for no split or merge in so many
  // epochs in a row, each with at least so many samples in its ranges, is not
  // classifying. Epochs with fewer samples neither count nor excuse.
  __u32 silent_epochs = 8;
  __u64 silent_samples = 64;
  // A policy that asks for more moves than an epoch may carry, at least half of
  // which would take recent moves back, in so many of the last
  // restless_window_epochs (at most 64), is moving for its own sake. Not all of
  // them: what it gets in one epoch it need not ask for in the next.
  __u32 restless_epochs = 6;
  __u32 restless_window_epochs = 16;
};

struct Verdict {
  tier_exit_code code = TIER_CODE_OK;
  std::string message;
};

// The record of one policy, from its seating on.
class Conduct {
 public:
  explicit Conduct(const ConductSettings& settings = {}) : settings_(settings) {}

  // Who answers. True: another policy than before, its record is empty.
  bool begin(__u64 generation);

  // After classify.
  std::optional<Verdict> classified(__u64 samples, bool any_heat, bool any_action);
  // After admit: pages it wants moved, how many of them take moves back, and how
  // many an epoch may carry.
  std::optional<Verdict> asked(__u64 wanted_pages, __u64 reversing_pages, __u64 limit_pages);

 private:
  ConductSettings settings_;
  __u64 generation_ = 0;
  __u32 silent_ = 0;
  __u64 restless_ = 0;  // a bit for each epoch, the last one lowest
};

}  // namespace hypertier
