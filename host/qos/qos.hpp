// SPDX-License-Identifier: GPL-2.0-or-later
// Who gets how much of which tier. Pure arithmetic: no clock, no system call,
// no QEMU; tierhostd feeds it what it measured and carries out what it says.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <hypertier/abi.h>

#include "result.hpp"

namespace hypertier::qos {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kGranuleBytes = HT_GRANULE_SIZE;  // targets are multiples of it

template <class T>
using PerTier = std::array<T, HT_TIERS>;

// What was sold to a VM, of one tier.
struct Share {
  uint64_t guarantee_bytes = 0;
  uint64_t limit_bytes = kNoLimit;
  uint64_t weight = 100;
};

// One VM as an allocator sees it. demand and slow_miss_share are claims of the
// guest: they move its part between guarantee and limit, never beyond.
struct Request {
  std::string name;
  PerTier<Share> share;
  PerTier<uint64_t> demand_bytes{kNoLimit, kNoLimit};
  double slow_miss_share = 0;  // of the guest's memory accesses, 0..1
};

using Parts = std::vector<PerTier<uint64_t>>;  // one entry a request, in bytes

// One party of a water-filling, in any unit.
struct Basin {
  uint64_t floor = 0;
  uint64_t ceiling = 0;
  uint64_t weight = 1;
};

// Weighted max-min fairness: part = clamp(weight * level, floor, ceiling) with
// the one level at which the parts add up to min(capacity, sum of ceilings).
// Exact: the level is a rational number; whole units that remain after
// rounding down go to the largest remainders, the earlier party on a tie.
// Fails if the floors exceed the capacity. Weights are at least 1.
[[nodiscard]] Result<std::vector<uint64_t>> water_fill(uint64_t capacity, std::span<const Basin> basins);

// A pluggable way to divide both tiers. May keep state between ticks.
class Allocator {
 public:
  virtual ~Allocator() = default;
  virtual const char* name() const = 0;
  // Fails, with a sentence, when the guarantees do not fit the capacity.
  [[nodiscard]] virtual Result<Parts> divide(PerTier<uint64_t> capacity_bytes, std::span<const Request> requests) = 0;
};

// max-min | drf | pool | slowdown | p-states
[[nodiscard]] Result<std::unique_ptr<Allocator>> make_allocator(const std::string& name);
std::vector<std::string> allocator_names();

// ------------------------------------------------------------- controller

struct Settings {
  uint64_t dead_band_bytes = 16 << 20;  // a smaller difference starts no move
  uint64_t slack_bytes = 2 << 20;       // measured above target that is no offence
  uint64_t step_divisor = 4;            // a target moves at most capacity / this a tick
  uint64_t progress_divisor = 256;      // giving back capacity / this a tick is progress; a trickle is not
  // The ladder: ticks without progress until a step is taken.
  unsigned retry_ticks = 5;
  unsigned cap_ticks = 10;
  unsigned lose_bonus_ticks = 15;
  unsigned pause_ticks = 20;
  unsigned forgive_ticks = 10;  // compliant that long: back to the bottom
};

// What tierhostd knows of a VM at a tick.
struct Observation {
  Request request;
  PerTier<uint64_t> measured_bytes{};  // by the host itself
  // What the guest says it still uses; kNoLimit: it says nothing.
  PerTier<uint64_t> claimed_bytes{kNoLimit, kNoLimit};
  PerTier<uint64_t> found_target_bytes{};  // taken over when the VM is new to us
  bool reachable = true;                   // its QMP answers
  bool cap_allowed = false;                // its owner accepted that a cap can kill it
};

enum class Step { kTarget, kRetry, kCap, kLoseBonus, kPause, kForgive, kLie };
const char* step_name(Step step);

// Something to carry out, or to note, for one VM and tier.
struct Action {
  Step step;
  std::string vm;
  ht_tier tier;
  uint64_t bytes = 0;  // kTarget, kRetry, kCap: target; kLie: measured above claim
  std::string reason;
};

// Turns parts into targets. Two phases: what is to shrink is told at once,
// what is to grow waits until the memory is measured to be free.
class Controller {
 public:
  explicit Controller(Settings settings = {}) : settings_(settings) {}

  [[nodiscard]] Result<std::vector<Action>> tick(PerTier<uint64_t> capacity_bytes, std::span<const Observation> vms,
                                                 Allocator& allocator);

  // HT_UNKNOWN64 for a VM never seen.
  uint64_t target_bytes(const std::string& vm, ht_tier tier) const;
  const char* rung(const std::string& vm, ht_tier tier) const;  // "none" or the last step taken

 private:
  struct TierState {
    uint64_t target_bytes = 0;
    uint64_t last_measured_bytes = 0;
    bool moving = false;
    bool lie = false;
    unsigned overdue_ticks = 0;
    unsigned good_ticks = 0;
    Step rung = Step::kTarget;  // kTarget: nothing held against it
  };
  struct VmState {
    PerTier<TierState> tier;
    bool bonus_lost = false;
    bool seen = false;
  };

  void climb(const Observation& vm, VmState& all, ht_tier tier, uint64_t capacity, bool others_short,
             std::vector<Action>& actions);

  bool rules_changed(PerTier<uint64_t> capacity, std::span<const Observation> vms, const Allocator& allocator);

  Settings settings_;
  std::string rules_;
  std::map<std::string, VmState> vms_;
};

}  // namespace hypertier::qos
