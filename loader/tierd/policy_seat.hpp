// SPDX-License-Identifier: GPL-2.0-or-later
// The seat of one cgroup: the policy in it, and the default that takes over. The
// main thread swaps; the threads of the scopes that it answers for eject.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <hypertier/abi.h>

#include "policy/policy.hpp"
#include "result.hpp"
#include "tierd/budget.hpp"

namespace hypertier {

// Why a policy left its seat, as status shows it.
struct PolicyExit {
  std::string kind;     // "replaced", "ejected", "unloaded", "cgroup_removed"
  std::string code;     // "ok", or of enum tier_exit_code: "timeout", ...; "empty_seat"
  std::string reason;   // one sentence
  std::string message;  // what the kernel said, if anything
  std::string policy;
  std::uint64_t epoch = 0;
  std::uint64_t unix_ms = 0;
  std::uint64_t generation = 0;  // of the seat, while it had that policy
};

// How a seat may move pages.
struct MoveTerms {
  std::uint64_t rate_bytes_per_s = kDefaultRate;  // 0: no limit
  bool dry_run = false;
};

// What is kept of a seat over a restart.
struct SavedSeat {
  std::string cgroup = "/";
  std::string policy;  // name, for humans
  std::string file;    // as it was given to load
  std::map<std::string, std::string> settings;
  std::string object;  // the bytes
  MoveTerms moves{};
};

const char* exit_code_name(__u32 code);  // enum tier_exit_code: "timeout", ...

class PolicySeat {
 public:
  // policy: loaded for that cgroup.
  static Result<std::shared_ptr<PolicySeat>> take(std::uint64_t cgroup_id, std::string cgroup, PolicyObject policy,
                                                  const MoveTerms& moves);

  std::uint64_t cgroup_id() const { return cgroup_id_; }
  const std::string& cgroup() const { return cgroup_; }

  // The policy, by its values: it may be another one a moment later.
  struct Terms {
    std::string policy, file;
    std::map<std::string, std::string> settings;  // all, as they are
    std::uint32_t epoch_ms = 500;
    std::uint64_t flags = 0;
    std::uint64_t generation = 0;
    MoveTerms moves;
    PolicyIds ids;
    std::vector<std::string> callbacks;
  };
  Terms terms() const;
  SavedSeat saved() const;

  // Hot swap (policy not loaded yet). On error the old one stays.
  Result<> swap(PolicyObject policy, const MoveTerms& moves);
  // Loads the default beside it, if it is not there: it can then take over at
  // once. Tried once for each policy in the seat.
  void prepare_default();
  // The policy of that generation broke a rule. Nothing if another thread has
  // ejected it, or a swap replaced it, by now. False: the seat is empty.
  bool eject(const ht_run& run, std::uint64_t generation, std::optional<PolicyExit>& ejected);

 private:
  PolicySeat(std::uint64_t cgroup_id, std::string cgroup) : cgroup_id_(cgroup_id), cgroup_(std::move(cgroup)) {}

  const std::uint64_t cgroup_id_;
  const std::string cgroup_;
  mutable std::mutex lock_;
  // Destroyed the other way round: the seat first.
  std::optional<PolicyObject> default_;  // loaded, not seated
  PolicyObject policy_;
  MoveTerms moves_;  // the default that takes over keeps them
  std::optional<Seat> seat_;
  std::uint64_t generation_ = 1;
  std::uint64_t default_tried_ = 0;  // for the policy of that generation
};

// Opens the default policy (installed beside tierd); not loaded.
Result<PolicyObject> open_default_policy();

}  // namespace hypertier
