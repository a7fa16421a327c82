// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/policy_seat.hpp"

#include <fcntl.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "tierd/events.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {

const char* exit_code_name(__u32 code) {
  static constexpr std::array names = {"ok", "timeout", "invalid_action", "budget", "never_classifies"};
  return code < names.size() ? names[code] : "unknown";
}

Result<PolicyObject> open_default_policy() {
  const auto path = installed_policies() / (std::string(kDefaultPolicy) + ".bpf.o");
  Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file)
    return fail_errno("the default policy " + std::string(kDefaultPolicy) + " is not installed: cannot open " + path.string(),
                      errno, "install it beside tierd, or load a policy by its file");
  auto bytes = read_policy_file(file.get(), path.string());
  if (!bytes) return std::unexpected(bytes.error());
  return PolicyObject::open(std::move(*bytes), kDefaultPolicy);
}

Result<std::shared_ptr<PolicySeat>> PolicySeat::take(std::uint64_t cgroup_id, std::string cgroup, PolicyObject policy,
                                                     const MoveTerms& moves) {
  std::shared_ptr<PolicySeat> taken(new PolicySeat(cgroup_id, std::move(cgroup)));
  taken->policy_ = std::move(policy);
  taken->moves_ = moves;
  auto seat = Seat::take(taken->policy_);
  if (!seat) return std::unexpected(seat.error());
  taken->seat_.emplace(std::move(*seat));
  return taken;
}

PolicySeat::Terms PolicySeat::terms() const {
  std::lock_guard held(lock_);
  const PolicyInfo& info = policy_.info();
  Terms terms{info.name, policy_.file(), {}, info.epoch_ms, info.flags, generation_, moves_, policy_.ids(), info.callbacks};
  for (const auto& setting : info.settings) terms.settings[setting.key] = setting.value;
  return terms;
}

SavedSeat PolicySeat::saved() const {
  std::lock_guard held(lock_);
  return {cgroup_, policy_.info().name, policy_.file(), policy_.changed(), policy_.bytes(), moves_};
}

Result<> PolicySeat::swap(PolicyObject policy, const MoveTerms& moves) {
  if (auto loaded = policy.load(cgroup_id_); !loaded) return loaded;
  std::lock_guard held(lock_);
  if (seat_) {
    if (auto replaced = seat_->replace(policy); !replaced) return replaced;
  } else {
    auto seat = Seat::take(policy);
    if (!seat) return std::unexpected(seat.error());
    seat_.emplace(std::move(*seat));
  }
  policy_ = std::move(policy);
  moves_ = moves;
  ++generation_;
  return {};
}

void PolicySeat::prepare_default() {
  {
    std::lock_guard held(lock_);
    if (default_ || default_tried_ == generation_) return;
    default_tried_ = generation_;
  }
  // Not under the lock: status asks for the terms meanwhile.
  auto opened = open_default_policy();
  if (!opened || !opened->load(cgroup_id_)) return;
  std::lock_guard held(lock_);
  if (!default_) default_.emplace(std::move(*opened));
}

bool PolicySeat::eject(const ht_run& run, std::uint64_t generation, std::optional<PolicyExit>& ejected) {
  prepare_default();
  std::lock_guard held(lock_);
  if (generation != generation_) return seat_.has_value();
  PolicyExit exit;
  exit.kind = "ejected";
  exit.policy = policy_.info().name;
  exit.epoch = run.scope.epoch;
  exit.unix_ms = unix_ms_now();
  exit.generation = generation;
  const bool told = run.exit.kind == TIER_EXIT_EJECTED;
  exit.message = told ? std::string(run.exit.message, strnlen(run.exit.message, sizeof(run.exit.message)))
                      : "status " + std::to_string(run.status);
  exit.code = told ? exit_code_name(run.exit.code) : "empty_seat";
  switch (told ? run.exit.code : __u32{TIER_CODE_OK}) {
    case TIER_CODE_TIMEOUT:
      exit.reason = "policy " + exit.policy + " took " + std::to_string(run.policy_ns / 1'000'000) +
                    " ms for an epoch's ranges, more than its " + std::to_string(run.budget_ns / 1'000'000) + " ms";
      if (run.status == -ECANCELED) exit.reason = "policy " + exit.policy + " took longer than its epoch";
      break;
    case TIER_CODE_INVALID_ACTION:
      exit.reason = "policy " + exit.policy + " answered with an action that does not exist";
      break;
    case TIER_CODE_BUDGET:
      exit.reason = "policy " + exit.policy + " asked for more moves than an epoch may carry, and to take most of them back";
      break;
    case TIER_CODE_NEVER_CLASSIFIES:
      exit.reason = "policy " + exit.policy + " never classifies: no range has heat or an action, though there are samples";
      break;
    default:
      exit.reason = "the seat was found empty: policy " + exit.policy + " had left";
  }
  ejected = std::move(exit);
  ++generation_;
  if (!default_) {
    seat_.reset();
    return false;
  }
  if (run.status == -ENOENT) {
    seat_.reset();  // a link that holds no seat any more
    if (auto seat = Seat::take(*default_)) seat_.emplace(std::move(*seat));
  } else if (!seat_ || !seat_->replace(*default_)) {
    seat_.reset();
  }
  if (!seat_) return false;
  policy_ = std::move(*default_);
  default_.reset();
  return true;
}

}  // namespace hypertier
