// SPDX-License-Identifier: GPL-2.0-or-later
// Who belongs where: every process, its space and its cgroup, and the scope
// that manages it: that of the nearest ancestor of its cgroup. A space belongs
// to one scope, that of the process that has had it longest. Pure.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <hypertier/abi.h>

namespace hypertier {

inline constexpr __u64 kNoScope = 0;

// Of the given cgroup paths ("/", "/a/b") the nearest at or above path; nullopt: none.
std::optional<std::string> nearest_ancestor(const std::map<std::string, __u64>& paths, std::string_view path);

class Roster {
 public:
  // Path of a cgroup below the v2 root ("/", "/a/b"); nullopt: it is gone.
  using PathOf = std::function<std::optional<std::string>(__u64 cgroup_id)>;
  // Tells a scope (its cgroup id) of one of its processes.
  using Deliver = std::function<void(__u64 scope, const ht_space_event&)>;
  // The space changes its scope; kNoScope: nobody's.
  using Moved = std::function<void(__u64 space, __u64 from, __u64 to)>;

  struct Process {
    __u64 space = 0;
    __u64 cgroup_id = 0;
    __u64 scope = kNoScope;
    std::string comm;
  };

  Roster(PathOf path_of, Deliver deliver, Moved moved)
      : path_of_(std::move(path_of)), deliver_(std::move(deliver)), moved_(std::move(moved)) {}

  void event(const ht_space_event& event);
  void add_scope(__u64 cgroup_id, const std::string& path);
  void remove_scope(__u64 cgroup_id);

  __u64 scope_of_space(__u64 space) const;
  bool has_space(__u64 space) const { return spaces_.contains(space); }
  const std::map<__u32, Process>& processes() const { return processes_; }
  // Spaces whose last process has left since the last call.
  std::vector<__u64> take_ended() { return std::exchange(ended_, {}); }

 private:
  struct Space {
    std::vector<__u32> pids;  // in the order of their coming
    __u64 scope = kNoScope;
  };

  __u64 scope_of_cgroup(__u64 cgroup_id);
  void leave(__u32 pid, __u64 space);
  void settle(__u64 space);
  void give(__u32 pid, Process& process, __u64 scope);
  void settle_all();

  PathOf path_of_;
  Deliver deliver_;
  Moved moved_;
  std::map<std::string, __u64> scopes_;           // path -> cgroup id
  std::unordered_map<__u64, __u64> scope_cache_;  // cgroup id -> scope
  std::map<__u32, Process> processes_;
  std::unordered_map<__u64, Space> spaces_;
  std::vector<__u64> ended_;
};

}  // namespace hypertier
