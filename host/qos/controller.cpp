// SPDX-License-Identifier: GPL-2.0-or-later
#include <algorithm>
#include <utility>

#include "qos.hpp"

namespace hypertier::qos {
namespace {

uint64_t minus(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

std::string mib(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

const char* step_name(Step step) {
  switch (step) {
    case Step::kTarget: return "target";
    case Step::kRetry: return "retry";
    case Step::kCap: return "cap";
    case Step::kLoseBonus: return "lose_bonus";
    case Step::kPause: return "pause";
    case Step::kForgive: return "forgive";
    case Step::kLie: return "lie";
  }
  return "?";
}

uint64_t Controller::target_bytes(const std::string& vm, ht_tier tier) const {
  auto it = vms_.find(vm);
  return it == vms_.end() ? HT_UNKNOWN64 : it->second.tier[tier].target_bytes;
}

const char* Controller::rung(const std::string& vm, ht_tier tier) const {
  auto it = vms_.find(vm);
  if (it == vms_.end() || it->second.tier[tier].rung == Step::kTarget) return "none";
  return step_name(it->second.tier[tier].rung);
}

Result<std::vector<Action>> Controller::tick(PerTier<uint64_t> capacity, std::span<const Observation> vms,
                                             Allocator& allocator) {
  std::vector<Action> actions;

  // Who is here. A VM that is new to us keeps the target it has.
  for (auto& [name, state] : vms_) state.seen = false;
  for (const auto& vm : vms) {
    auto [it, fresh] = vms_.try_emplace(vm.request.name);
    it->second.seen = true;
    if (fresh)
      for (int t = 0; t < HT_TIERS; t++) it->second.tier[t].target_bytes = vm.found_target_bytes[t];
  }
  std::erase_if(vms_, [](const auto& entry) { return !entry.second.seen; });

  // What everybody should have. Who lost his bonus, has his guarantee. Who cannot
  // be reached, is left alone, but the others do not divide his part: it would
  // move them to and fro with every hiccup of his.
  std::vector<Request> requests;
  std::vector<const Observation*> parties;
  for (const auto& vm : vms) {
    const auto& state = vms_.at(vm.request.name);
    requests.push_back(vm.request);
    if (state.bonus_lost)
      for (auto& share : requests.back().share) share.limit_bytes = share.guarantee_bytes;
    parties.push_back(&vm);
  }
  auto parts = allocator.divide(capacity, requests);
  if (!parts) return std::unexpected(parts.error());

  const bool exactly = rules_changed(capacity, vms, allocator);
  for (int t = 0; t < HT_TIERS; t++) {
    const auto tier = static_cast<ht_tier>(t);
    const uint64_t step = std::max(capacity[t] / settings_.step_divisor, kGranuleBytes);
    std::vector<uint64_t> lacking(parties.size(), 0);
    std::vector<uint64_t> before(parties.size());

    uint64_t given = 0;
    for (const auto& vm : vms) given += vms_.at(vm.request.name).tier[t].target_bytes;

    // First phase: shrink.
    for (size_t i = 0; i < parties.size(); i++) {
      auto& state = vms_.at(parties[i]->request.name).tier[t];
      before[i] = state.target_bytes;
      const uint64_t want = (*parts)[i][t];
      const uint64_t gap = std::max(minus(want, state.target_bytes), minus(state.target_bytes, want));
      // The dead band only keeps a move from starting: one that is under way
      // goes to its end, so that the split is the exact one.
      // Below a guarantee, with more given out than there is, or under new rules
      // every difference counts.
      if (gap >= settings_.dead_band_bytes || exactly || given > capacity[t] ||
          (want > state.target_bytes && state.target_bytes < parties[i]->request.share[t].guarantee_bytes))
        state.moving = true;
      if (gap == 0) state.moving = false;
      if (!state.moving || !parties[i]->reachable) continue;
      if (want < state.target_bytes) state.target_bytes = std::max(want, minus(state.target_bytes, step));
      else lacking[i] = std::min(want - state.target_bytes, step);
    }

    // Second phase: grow, out of what is measured to be free. A target that is
    // not used yet is not free, nor is memory that somebody still holds.
    uint64_t held = 0;
    for (const auto& vm : vms)
      held += std::max(vms_.at(vm.request.name).tier[t].target_bytes, vm.measured_bytes[t]);
    uint64_t free_granules = minus(capacity[t], held) / kGranuleBytes;

    // A raise up to the guarantee comes before anybody's bonus.
    for (const bool guaranteed : {true, false}) {
      std::vector<Basin> basins;
      uint64_t asked = 0;
      for (size_t i = 0; i < parties.size(); i++) {
        const auto& request = parties[i]->request;
        uint64_t raise = lacking[i];
        if (guaranteed)
          raise = std::min(raise, minus(request.share[t].guarantee_bytes + kGranuleBytes - 1,
                                        vms_.at(request.name).tier[t].target_bytes));
        raise = raise / kGranuleBytes;
        basins.push_back({0, raise, std::max<uint64_t>(request.share[t].weight, 1)});
        asked += raise;
      }
      auto granted = water_fill(std::min(free_granules, asked), basins);
      for (size_t i = 0; i < parties.size(); i++) {
        const uint64_t bytes = (*granted)[i] * kGranuleBytes;
        vms_.at(parties[i]->request.name).tier[t].target_bytes += bytes;
        lacking[i] -= bytes;
        free_granules -= (*granted)[i];
      }
    }

    bool short_of_guarantee = false;
    for (size_t i = 0; i < parties.size(); i++) {
      const auto& request = parties[i]->request;
      const auto& state = vms_.at(request.name).tier[t];
      if (state.target_bytes != before[i])
        actions.push_back({Step::kTarget, request.name, tier, state.target_bytes,
                           std::string(allocator.name()) + ": " + mib(before[i]) + " -> " + mib(state.target_bytes)});
      if (lacking[i] && state.target_bytes < request.share[t].guarantee_bytes) short_of_guarantee = true;
    }
    for (const auto& vm : vms)
      if (vm.reachable) climb(vm, vms_.at(vm.request.name), tier, capacity[t], short_of_guarantee, actions);
  }
  return actions;
}

// What root configured, as opposed to what guests claim or use.
bool Controller::rules_changed(PerTier<uint64_t> capacity, std::span<const Observation> vms, const Allocator& allocator) {
  std::string rules = std::string(allocator.name()) + " " + std::to_string(capacity[0]) + " " + std::to_string(capacity[1]);
  for (const auto& vm : vms) {
    rules += "\n" + vm.request.name;
    for (const auto& share : vm.request.share)
      rules += " " + std::to_string(share.guarantee_bytes) + " " + std::to_string(share.limit_bytes) + " " + std::to_string(share.weight);
  }
  const bool changed = rules != rules_;
  rules_ = std::move(rules);
  return changed;
}

void Controller::climb(const Observation& vm, VmState& all, ht_tier tier, uint64_t capacity, bool others_short,
                       std::vector<Action>& actions) {
  auto& state = all.tier[tier];
  const auto& name = vm.request.name;
  const uint64_t measured = vm.measured_bytes[tier];
  const uint64_t last_measured = std::exchange(state.last_measured_bytes, measured);
  auto act = [&](Step step, uint64_t bytes, std::string reason) {
    actions.push_back({step, name, tier, bytes, std::move(reason)});
  };

  const uint64_t claimed = vm.claimed_bytes[tier];
  // Claims are a little old: a guest that grows into its target is no liar.
  const bool lie = claimed != kNoLimit && minus(measured, std::max(claimed, state.target_bytes)) > settings_.slack_bytes;
  if (lie && !state.lie)
    act(Step::kLie, measured - claimed, "the guest says it uses " + mib(claimed) + ", measured are " + mib(measured));
  state.lie = lie;

  const uint64_t excess = minus(measured, state.target_bytes);
  if (excess <= settings_.slack_bytes) {
    state.overdue_ticks = 0;
    if (state.rung == Step::kTarget || ++state.good_ticks < settings_.forgive_ticks) return;
    act(Step::kForgive, state.target_bytes, "kept its target for " + std::to_string(state.good_ticks) + " ticks");
    state.rung = Step::kTarget;
    state.good_ticks = 0;
    all.bonus_lost = std::any_of(all.tier.begin(), all.tier.end(),
                                 [](const TierState& s) { return s.rung >= Step::kLoseBonus; });
    return;
  }
  state.good_ticks = 0;
  const bool progress = minus(last_measured, measured) >= std::max(capacity / settings_.progress_divisor, kGranuleBytes);
  if (progress) return;
  state.overdue_ticks++;
  const std::string reason = mib(measured) + " measured, target " + mib(state.target_bytes);
  if (state.overdue_ticks == settings_.retry_ticks) {
    act(Step::kRetry, state.target_bytes, reason);
    state.rung = std::max(state.rung, Step::kRetry);
  } else if (state.overdue_ticks == settings_.cap_ticks && vm.cap_allowed) {
    act(Step::kCap, state.target_bytes, reason);
    state.rung = std::max(state.rung, Step::kCap);
  } else if (state.overdue_ticks == settings_.lose_bonus_ticks) {
    act(Step::kLoseBonus, vm.request.share[tier].guarantee_bytes, reason);
    state.rung = std::max(state.rung, Step::kLoseBonus);
    all.bonus_lost = true;
  } else if (state.overdue_ticks >= settings_.pause_ticks && others_short && state.rung != Step::kPause) {
    // Stopping a guest frees nothing, but it stops the growth: only when
    // somebody else waits for what was guaranteed to him.
    act(Step::kPause, state.target_bytes, reason + ", and a guarantee of another VM is not met");
    state.rung = Step::kPause;
  }
}

}  // namespace hypertier::qos
