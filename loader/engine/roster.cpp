// SPDX-License-Identifier: GPL-2.0-or-later
#include "roster.hpp"

#include <algorithm>
#include <cstring>

namespace hypertier {

std::optional<std::string> nearest_ancestor(const std::map<std::string, __u64>& paths, std::string_view path) {
  for (std::string at(path); !at.empty();) {
    if (paths.contains(at)) return at;
    if (at == "/") break;
    at.resize(at.rfind('/'));
    if (at.empty()) at = "/";
  }
  return std::nullopt;
}

__u64 Roster::scope_of_cgroup(__u64 cgroup_id) {
  auto [cached, added] = scope_cache_.try_emplace(cgroup_id, kNoScope);
  if (!added) return cached->second;
  // The path of a cgroup that is gone is not known any more: who is left in it
  // is about to end. The root is everybody's ancestor.
  auto path = path_of_(cgroup_id);
  auto nearest = nearest_ancestor(scopes_, path.value_or("/"));
  cached->second = nearest ? scopes_.at(*nearest) : kNoScope;
  return cached->second;
}

__u64 Roster::scope_of_space(__u64 space) const {
  auto found = spaces_.find(space);
  return found == spaces_.end() ? kNoScope : found->second.scope;
}

void Roster::event(const ht_space_event& event) {
  if (event.kind == HT_SPACE_CGROUP_GONE) {
    scope_cache_.erase(event.cgroup_id);
    return;
  }
  if (event.kind == HT_SPACE_EXIT) {
    auto process = processes_.find(event.pid);
    if (process == processes_.end()) return;
    if (process->second.scope) deliver_(process->second.scope, event);
    __u64 space = process->second.space;
    processes_.erase(process);
    leave(event.pid, space);
    return;
  }
  Process& process = processes_[event.pid];
  process.cgroup_id = event.cgroup_id;
  process.comm.assign(event.comm, strnlen(event.comm, sizeof(event.comm)));
  __u64 left = 0;
  if (event.space && event.space != process.space) {
    left = std::exchange(process.space, event.space);
    spaces_[event.space].pids.push_back(event.pid);
  }
  // A scope that keeps the process gets the event itself: it may have brought
  // another space. A scope that is new to it gets it by give().
  __u64 scope = process.scope;
  if (left) leave(event.pid, left);
  if (process.space)
    settle(process.space);
  else
    give(event.pid, process, scope_of_cgroup(process.cgroup_id));
  if (scope && process.scope == scope) deliver_(scope, event);
}

void Roster::leave(__u32 pid, __u64 space) {
  auto found = spaces_.find(space);
  if (found == spaces_.end()) return;
  std::erase(found->second.pids, pid);
  if (!found->second.pids.empty()) return settle(space);
  spaces_.erase(found);
  ended_.push_back(space);
}

// All processes of a space are in the scope of its oldest one.
void Roster::settle(__u64 space) {
  Space& s = spaces_.at(space);
  const __u64 scope = scope_of_cgroup(processes_.at(s.pids.front()).cgroup_id);
  const __u64 before = std::exchange(s.scope, scope);
  for (__u32 pid : s.pids) give(pid, processes_.at(pid), scope);
  if (before != scope) moved_(space, before, scope);
}

void Roster::give(__u32 pid, Process& process, __u64 scope) {
  if (process.scope == scope) return;
  ht_space_event event{};
  event.space = process.space;
  event.cgroup_id = process.cgroup_id;
  event.pid = pid;
  std::memcpy(event.comm, process.comm.data(), std::min(process.comm.size(), sizeof(event.comm)));
  event.kind = HT_SPACE_EXIT;
  if (process.scope) deliver_(process.scope, event);
  event.kind = HT_SPACE_TASK;
  if (scope) deliver_(scope, event);
  process.scope = scope;
}

void Roster::settle_all() {
  scope_cache_.clear();
  for (auto& [space, unused] : spaces_) settle(space);
  for (auto& [pid, process] : processes_)
    if (!process.space) give(pid, process, scope_of_cgroup(process.cgroup_id));
}

void Roster::add_scope(__u64 cgroup_id, const std::string& path) {
  scopes_[path] = cgroup_id;
  settle_all();
}

void Roster::remove_scope(__u64 cgroup_id) {
  std::erase_if(scopes_, [&](const auto& scope) { return scope.second == cgroup_id; });
  settle_all();
}

}  // namespace hypertier
