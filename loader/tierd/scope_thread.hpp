// SPDX-License-Identifier: GPL-2.0-or-later
// The thread of one scope: it ends an epoch each epoch_ms of the policy that
// answers for the scope. A slow policy holds up this thread and no other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "engine/engine.hpp"
#include "tierd/policy_seat.hpp"

namespace hypertier {

class ScopeThread {
 public:
  // What one epoch gave, beyond what the engine shows.
  struct Outcome {
    std::optional<PolicyExit> ejected;
    bool seated = true;  // false: the seat is empty, no default could take over
    std::optional<Error> error;
    double density = 0;  // samples per page of the fast tier
  };
  using Epoch = std::function<Outcome(Scope&, PolicySeat&, std::uint64_t epoch_ns)>;

  ScopeThread(Scope& scope, std::shared_ptr<PolicySeat> seat, Epoch epoch);
  ~ScopeThread();  // waits for the epoch in progress

  Scope& scope() { return scope_; }
  std::shared_ptr<PolicySeat> seat() const;
  // Another seat answers from the next epoch on.
  void reseat(std::shared_ptr<PolicySeat> seat);
  // The length of an epoch may have changed.
  void hurry();

  struct Shown {
    std::optional<Error> error;  // of the last epoch
    std::uint64_t epoch_errors_total = 0;
    std::uint64_t empty_epochs_total = 0;
    double density = 0;  // mean of the last 20 epochs
  };
  Shown shown() const;

 private:
  void work();

  Scope& scope_;
  const Epoch epoch_;
  mutable std::mutex lock_;
  std::condition_variable woken_;
  std::shared_ptr<PolicySeat> seat_;
  bool stopping_ = false;
  bool hurried_ = false;
  Shown shown_;
  std::deque<double> densities_;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace hypertier
