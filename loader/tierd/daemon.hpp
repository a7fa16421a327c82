// SPDX-License-Identifier: GPL-2.0-or-later
// tierd's main thread: one poll() for the socket, process events and what the
// scopes' threads have to tell. Idle means that nothing but the socket is waited
// for: no thread, no sampler, nothing of ours in the kernel.
#pragma once

#include <map>
#include <memory>
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
  Json handle(const Json& request, Fd file);
  Result<Json> dispatch(const Json& request, Fd file);
  Result<Json> load(const Json& request, const std::string& cgroup, Fd file);
  Result<Json> restore(const std::string& cgroup);
  Result<Json> unload(const std::string& cgroup, bool force);
  Result<Json> set_budget(const Json& request, const std::string& cgroup);
  Result<Json> reset_budget(const std::string& cgroup);
  Json show_budgets() const;
  Result<> take_budgets(Budgets budgets);
  Json status(const std::string& cgroup) const;  // "": all scopes
  Json scope_json(const std::string& path) const;
  Result<Json> ranges(const Json& request, const std::string& cgroup) const;
  Result<Json> explain(const Json& request) const;
  Json policies() const;
  Json version() const;

  Result<Json> seat(const std::string& cgroup, PolicyObject policy, const MoveTerms& moves);
  void unseat(const std::string& cgroup, PolicyExit exit);
  void reseat();
  void hear(const News& news);
  void end_removed();
  void end_if_empty();
  std::uint64_t epoch_of(const std::string& cgroup) const;
  void note(std::string kind, std::string cgroup, std::string policy, std::string text);

  DaemonOptions options_;
  State state_;
  EventLog events_{2048};  // a record has at most kMovesShown moves: 3 MiB
  Cgroups cgroups_;
  Fd lock_, signals_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Tiering> tiering_;
  Budgets budgets_;
  // By cgroup; kept when the scope is gone, as what is shown of it.
  std::map<std::string, PolicyExit> last_exits_;
  std::map<std::string, Error> reseat_errors_;
};

}  // namespace hypertier
