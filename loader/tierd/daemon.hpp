// SPDX-License-Identifier: GPL-2.0-or-later
// tierd: one thread, one poll(). Idle means that nothing but the socket is
// waited for: no timer, no sampler, nothing of ours in the kernel.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "policy/policy.hpp"
#include "tierd/protocol.hpp"
#include "tierd/server.hpp"
#include "tierd/state.hpp"
#include "tierd/tiering.hpp"

namespace hypertier {

struct DaemonOptions {
  TieringOptions tiering;
  std::filesystem::path socket = kSocket;
  std::filesystem::path state = kStateDirectory;
  bool fresh = false;
};

class Daemon {
 public:
  explicit Daemon(DaemonOptions options);
  // Until SIGTERM or SIGINT.
  Result<> run();

 private:
  struct Event {
    std::uint64_t unix_ms;
    std::string kind, policy, text;
  };

  Json handle(const Json& request, Fd file);
  Result<Json> dispatch(const Json& request, Fd file);
  Result<Json> load(const Json& request, Fd file);
  Result<Json> restore();
  Result<Json> unload(bool force);
  Json status() const;
  Json scope_json() const;
  Result<Json> ranges(const Json& request) const;
  Json events() const;
  Json version() const;

  Result<Json> seat(PolicyObject policy);
  void reseat();
  void end_epoch();
  void arm_timer(std::uint32_t epoch_ms);  // 0: off
  void note(std::string kind, std::string policy, std::string text);

  DaemonOptions options_;
  State state_;
  Fd lock_, timer_, signals_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Tiering> tiering_;
  std::optional<PolicyExit> last_exit_;
  std::optional<Error> reseat_error_;
  std::optional<Error> epoch_error_;  // of the last epoch
  std::uint64_t epoch_errors_total_ = 0;
  std::deque<Event> events_;
};

}  // namespace hypertier
