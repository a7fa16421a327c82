// SPDX-License-Identifier: GPL-2.0-or-later
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "qos.hpp"

namespace hypertier::qos {
namespace {

using u128 = unsigned __int128;

// A water level: p / q.
struct Level {
  uint64_t p;
  uint64_t q;
};

bool operator<(const Level& a, const Level& b) { return u128{a.p} * b.q < u128{b.p} * a.q; }

// q times what a basin holds at the level.
u128 held(const Basin& basin, const Level& level) {
  return std::clamp(u128{basin.weight} * level.p, u128{basin.floor} * level.q, u128{basin.ceiling} * level.q);
}

std::string gib(uint64_t bytes) {
  char text[32];
  snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1ULL << 30));
  return text;
}

const char* tier_word(int tier) { return tier == HT_TIER_FAST ? "fast" : "slow"; }

uint64_t granules_down(uint64_t bytes) { return bytes / kGranuleBytes; }
uint64_t granules_up(uint64_t bytes) { return bytes / kGranuleBytes + (bytes % kGranuleBytes != 0); }

uint64_t saturating_sum(std::span<const Basin> basins, uint64_t Basin::*field) {
  u128 sum = 0;
  for (const auto& basin : basins) sum += basin.*field;
  return sum > kNoLimit ? kNoLimit : static_cast<uint64_t>(sum);
}

// One tier by water-filling, in granules.
Result<void> fill_tier(int tier, uint64_t capacity_bytes, const std::vector<Basin>& basins, Parts& parts) {
  auto filled = water_fill(granules_down(capacity_bytes), basins);
  if (!filled)
    return fail("the guarantees add up to " + gib(saturating_sum(basins, &Basin::floor) * kGranuleBytes) + " of the " +
                    tier_word(tier) + " tier, but it has " + gib(capacity_bytes),
                "Lower a guarantee, or give the tier more memory.");
  for (size_t i = 0; i < filled->size(); i++) parts[i][tier] = (*filled)[i] * kGranuleBytes;
  return {};
}

Basin basin_of(const Share& share, uint64_t demand_bytes, uint64_t weight, uint64_t capacity_bytes) {
  Basin basin;
  basin.floor = granules_up(share.guarantee_bytes);
  // The ceiling never exceeds the capacity: it keeps the arithmetic small.
  basin.ceiling = granules_down(std::min({share.limit_bytes, demand_bytes, capacity_bytes}));
  basin.ceiling = std::max(basin.ceiling, basin.floor);
  basin.weight = std::max<uint64_t>(weight, 1);
  return basin;
}

class MaxMin final : public Allocator {
 public:
  const char* name() const override { return "max-min"; }
  Result<Parts> divide(PerTier<uint64_t> capacity, std::span<const Request> requests) override {
    Parts parts(requests.size());
    for (int tier = 0; tier < HT_TIERS; tier++) {
      std::vector<Basin> basins;
      for (const auto& r : requests)
        basins.push_back(basin_of(r.share[tier], kNoLimit, r.share[tier].weight, capacity[tier]));
      if (auto done = fill_tier(tier, capacity[tier], basins, parts); !done) return std::unexpected(done.error());
    }
    return parts;
  }
};

// vTMM: memory that nobody asks for stays in the pool. A guarantee is lent out
// while its owner does not want it, and comes back with the demand.
class Pool final : public Allocator {
 public:
  const char* name() const override { return "pool"; }
  Result<Parts> divide(PerTier<uint64_t> capacity, std::span<const Request> requests) override {
    Parts parts(requests.size());
    for (int tier = 0; tier < HT_TIERS; tier++) {
      uint64_t guaranteed = 0;
      std::vector<Basin> basins;
      for (const auto& r : requests) {
        Share share = r.share[tier];
        guaranteed += granules_up(share.guarantee_bytes) * kGranuleBytes;
        share.guarantee_bytes = std::min(share.guarantee_bytes, r.demand_bytes[tier]);
        basins.push_back(basin_of(share, r.demand_bytes[tier], share.weight, capacity[tier]));
      }
      // Refused even while it would fit today: the demand may come any time.
      if (guaranteed > capacity[tier])
        return fail("the guarantees add up to " + gib(guaranteed) + " of the " + tier_word(tier) +
                        " tier, but it has " + gib(capacity[tier]),
                    "Lower a guarantee, or give the tier more memory.");
      if (auto done = fill_tier(tier, capacity[tier], basins, parts); !done) return std::unexpected(done.error());
    }
    return parts;
  }
};

// Memstrata: fast memory goes to the VMs that suffer most from slow memory.
// The claim counts as weight, so it cannot lift a VM over its limit, nor push
// another one below its guarantee.
class Slowdown final : public Allocator {
 public:
  const char* name() const override { return "slowdown"; }
  Result<Parts> divide(PerTier<uint64_t> capacity, std::span<const Request> requests) override {
    constexpr double kGain = 8;  // a VM whose every miss is slow counts as nine of its weight
    Parts parts(requests.size());
    for (int tier = 0; tier < HT_TIERS; tier++) {
      std::vector<Basin> basins;
      for (const auto& r : requests) {
        const double share = std::isfinite(r.slow_miss_share) ? std::clamp(r.slow_miss_share, 0.0, 1.0) : 0.0;
        // Sixteenths, so that noise in the claim moves nothing.
        const auto bonus = tier == HT_TIER_FAST ? static_cast<uint64_t>(std::lround(share * 16) * kGain) : 0;
        basins.push_back(basin_of(r.share[tier], kNoLimit, r.share[tier].weight * (16 + bonus), capacity[tier]));
      }
      if (auto done = fill_tier(tier, capacity[tier], basins, parts); !done) return std::unexpected(done.error());
    }
    return parts;
  }
};

// HeteroVisor: a VM's fast memory takes one of a few fixed sizes between
// guarantee and limit. It goes up one state a tick while the guest misses into
// slow memory, down one while it hardly does. Slow memory goes by max-min.
class PStates final : public Allocator {
 public:
  const char* name() const override { return "p-states"; }
  Result<Parts> divide(PerTier<uint64_t> capacity, std::span<const Request> requests) override {
    constexpr double kUp = 0.20, kDown = 0.02;
    Parts parts(requests.size());
    std::vector<Basin> fast, slow;
    uint64_t used = 0;
    std::map<std::string, unsigned> next;
    for (const auto& r : requests) {
      fast.push_back(basin_of(r.share[0], kNoLimit, r.share[0].weight, capacity[0]));
      slow.push_back(basin_of(r.share[1], kNoLimit, r.share[1].weight, capacity[1]));
      unsigned state = 0;
      if (auto it = state_.find(r.name); it != state_.end()) state = it->second;
      if (r.slow_miss_share > kUp) state = std::min(state + 1, kStates - 1);
      else if (r.slow_miss_share < kDown && state > 0) state--;
      next[r.name] = state;
    }
    const uint64_t room = granules_down(capacity[0]);
    if (saturating_sum(fast, &Basin::floor) > room) {
      if (auto done = fill_tier(HT_TIER_FAST, capacity[0], fast, parts); !done) return std::unexpected(done.error());
    }
    auto size = [&](size_t i) {
      return fast[i].floor + (fast[i].ceiling - fast[i].floor) * next[requests[i].name] / (kStates - 1);
    };
    for (size_t i = 0; i < requests.size(); i++) used += size(i);
    while (used > room) {  // the one that holds most for its weight goes down one state
      size_t loser = requests.size();
      for (size_t i = 0; i < requests.size(); i++) {
        if (next[requests[i].name] == 0) continue;
        if (loser == requests.size() || u128{size(i)} * fast[loser].weight > u128{size(loser)} * fast[i].weight) loser = i;
      }
      used -= size(loser);
      next[requests[loser].name]--;
      used += size(loser);
    }
    for (size_t i = 0; i < requests.size(); i++) parts[i][HT_TIER_FAST] = size(i) * kGranuleBytes;
    if (auto done = fill_tier(HT_TIER_SLOW, capacity[1], slow, parts); !done) return std::unexpected(done.error());
    state_ = std::move(next);
    return parts;
  }

 private:
  static constexpr unsigned kStates = 5;
  std::map<std::string, unsigned> state_;
};

// HeteroOS: dominant-resource fairness over both tiers. Every VM grows along
// its demand vector until a tier is full; those that want that tier stop, the
// others go on. A guarantee is a floor below the progress.
class Drf final : public Allocator {
 public:
  const char* name() const override { return "drf"; }
  Result<Parts> divide(PerTier<uint64_t> capacity, std::span<const Request> requests) override {
    const size_t n = requests.size();
    std::vector<PerTier<double>> want(n), floor(n);
    std::vector<double> dominant(n, 0), stop(n, -1);  // stop: the level at which it was frozen
    PerTier<u128> guaranteed{};
    for (size_t i = 0; i < n; i++) {
      for (int t = 0; t < HT_TIERS; t++) {
        const auto& share = requests[i].share[t];
        const uint64_t g = granules_up(share.guarantee_bytes);
        guaranteed[t] += g;
        floor[i][t] = static_cast<double>(g);
        want[i][t] = static_cast<double>(
            granules_down(std::min({share.limit_bytes, requests[i].demand_bytes[t], capacity[t]})));
        if (capacity[t] >= kGranuleBytes)
          dominant[i] = std::max(dominant[i], want[i][t] / static_cast<double>(granules_down(capacity[t])) /
                                                  static_cast<double>(std::max<uint64_t>(share.weight, 1)));
      }
    }
    for (int t = 0; t < HT_TIERS; t++) {
      if (guaranteed[t] <= granules_down(capacity[t])) continue;
      return fail("the guarantees add up to " + gib(static_cast<uint64_t>(guaranteed[t]) * kGranuleBytes) +
                      " of the " + tier_word(t) + " tier, but it has " + gib(capacity[t]),
                  "Lower a guarantee, or give the tier more memory.");
    }
    auto part = [&](size_t i, int t, double level) {
      const double at = stop[i] >= 0 ? stop[i] : level;
      const double progress = dominant[i] > 0 ? std::min(1.0, at / dominant[i]) : 1.0;
      return std::max(floor[i][t], progress * want[i][t]);
    };
    auto fits = [&](int t, double level) {
      double sum = 0;
      for (size_t i = 0; i < n; i++) sum += part(i, t, level);
      return sum <= static_cast<double>(granules_down(capacity[t])) * (1 + 1e-12);
    };
    double top = 0;
    for (double d : dominant) top = std::max(top, d);
    double level = 0;
    for (int round = 0; round < HT_TIERS; round++) {
      PerTier<double> reach{};
      for (int t = 0; t < HT_TIERS; t++) {
        double low = level, high = top;
        if (fits(t, high)) low = high;
        for (int k = 0; k < 100 && low < high; k++) {
          const double mid = (low + high) / 2;
          (fits(t, mid) ? low : high) = mid;
        }
        reach[t] = low;
      }
      const int full = reach[0] <= reach[1] ? 0 : 1;
      level = reach[full];
      if (level >= top) break;
      for (size_t i = 0; i < n; i++)
        if (stop[i] < 0 && want[i][full] > floor[i][full]) stop[i] = level;
    }
    Parts parts(n);
    for (size_t i = 0; i < n; i++)
      for (int t = 0; t < HT_TIERS; t++)
        parts[i][t] = static_cast<uint64_t>(part(i, t, std::max(level, 0.0)) + 1e-6) * kGranuleBytes;
    return parts;
  }
};

}  // namespace

Result<std::vector<uint64_t>> water_fill(uint64_t capacity, std::span<const Basin> basins) {
  std::vector<uint64_t> parts(basins.size());
  if (saturating_sum(basins, &Basin::floor) > capacity) return fail("the floors exceed the capacity");
  if (saturating_sum(basins, &Basin::ceiling) <= capacity) {
    for (size_t i = 0; i < basins.size(); i++) parts[i] = basins[i].ceiling;
    return parts;
  }

  // The levels at which a basin leaves its floor or reaches its ceiling; in
  // between, what all hold together is linear.
  std::vector<Level> bends{{0, 1}};
  for (const auto& basin : basins) {
    bends.push_back({basin.floor, basin.weight});
    bends.push_back({basin.ceiling, basin.weight});
  }
  std::sort(bends.begin(), bends.end());
  auto fits = [&](const Level& level) {
    u128 sum = 0;
    for (const auto& basin : basins) sum += held(basin, level);
    return sum <= u128{capacity} * level.q;
  };
  const auto above = std::partition_point(bends.begin(), bends.end(), fits);
  const Level bend = *(above - 1);  // {0, 1} always fits

  u128 rest = capacity;
  uint64_t weights = 0;
  std::vector<size_t> rising;
  for (size_t i = 0; i < basins.size(); i++) {
    const auto& basin = basins[i];
    const bool left_floor = !(bend < Level{basin.floor, basin.weight});
    const bool at_ceiling = !(bend < Level{basin.ceiling, basin.weight});
    if (left_floor && !at_ceiling) {
      rising.push_back(i);
      weights += basin.weight;
    } else {
      parts[i] = at_ceiling ? basin.ceiling : basin.floor;
      rest -= parts[i];
    }
  }
  u128 left = rest;
  std::vector<std::pair<u128, size_t>> remainders;
  for (size_t i : rising) {
    const u128 share = u128{basins[i].weight} * rest;
    parts[i] = static_cast<uint64_t>(share / weights);
    left -= parts[i];
    remainders.emplace_back(share % weights, i);
  }
  std::stable_sort(remainders.begin(), remainders.end(), [](auto& a, auto& b) { return a.first > b.first; });
  for (size_t k = 0; k < left; k++) parts[remainders[k].second]++;
  return parts;
}

std::vector<std::string> allocator_names() { return {"max-min", "drf", "pool", "slowdown", "p-states"}; }

Result<std::unique_ptr<Allocator>> make_allocator(const std::string& name) {
  if (name == "max-min") return std::make_unique<MaxMin>();
  if (name == "drf") return std::make_unique<Drf>();
  if (name == "pool") return std::make_unique<Pool>();
  if (name == "slowdown") return std::make_unique<Slowdown>();
  if (name == "p-states") return std::make_unique<PStates>();
  std::string known;
  for (const auto& n : allocator_names()) known += (known.empty() ? "" : ", ") + n;
  return fail("there is no allocator \"" + name + "\"", "Known allocators: " + known + ".");
}

}  // namespace hypertier::qos
