// SPDX-License-Identifier: GPL-2.0-or-later
// Which scope a process belongs to.
#include "engine/roster.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace hypertier {
namespace {

TEST(NearestAncestor, IsThePathItselfOrTheOneAbove) {
  const std::map<std::string, __u64> paths = {{"/", 1}, {"/a", 2}, {"/a/b", 3}, {"/ab", 4}};
  EXPECT_EQ(nearest_ancestor(paths, "/a/b"), "/a/b");
  EXPECT_EQ(nearest_ancestor(paths, "/a/b/c/d"), "/a/b");
  EXPECT_EQ(nearest_ancestor(paths, "/a/c"), "/a");
  EXPECT_EQ(nearest_ancestor(paths, "/a/bc"), "/a");  // a name is whole
  EXPECT_EQ(nearest_ancestor(paths, "/abc"), "/");
  EXPECT_EQ(nearest_ancestor(paths, "/x/a/b"), "/");
  EXPECT_EQ(nearest_ancestor(paths, "/"), "/");
}

TEST(NearestAncestor, IsNobodyWithoutARoot) {
  const std::map<std::string, __u64> paths = {{"/a", 2}};
  EXPECT_EQ(nearest_ancestor(paths, "/"), std::nullopt);
  EXPECT_EQ(nearest_ancestor(paths, "/b/a"), std::nullopt);
  EXPECT_EQ(nearest_ancestor(paths, "/a/a"), "/a");
  EXPECT_EQ(nearest_ancestor({}, "/a"), std::nullopt);
  EXPECT_EQ(nearest_ancestor(paths, ""), std::nullopt);
}

// A roster with cgroups /a (10), /a/b (11), /c (12), and the scopes' own view.
struct Cgroups {
  std::map<__u64, std::string> paths = {{1, "/"}, {10, "/a"}, {11, "/a/b"}, {12, "/c"}};
  std::map<__u32, __u64> scope_of;  // by pid, as told
  int moved = 0;
  Roster roster{[this](__u64 id) -> std::optional<std::string> {
                  auto path = paths.find(id);
                  return path == paths.end() ? std::nullopt : std::optional(path->second);
                },
                [this](__u64 scope, const ht_space_event& event) {
                  if (event.kind == HT_SPACE_EXIT) {
                    EXPECT_EQ(scope_of.at(event.pid), scope);
                    scope_of.erase(event.pid);
                  } else {
                    EXPECT_TRUE(!scope_of.contains(event.pid) || scope_of[event.pid] == scope);
                    scope_of[event.pid] = scope;
                  }
                },
                [this](__u64, __u64, __u64) { ++moved; }};

  void tell(ht_space_event_kind kind, __u32 pid, __u64 space, __u64 cgroup) {
    ht_space_event event{};
    event.kind = kind;
    event.pid = pid;
    event.space = space;
    event.cgroup_id = cgroup;
    std::strcpy(event.comm, "work");
    roster.event(event);
  }
  __u64 of(__u32 pid) const { return scope_of.contains(pid) ? scope_of.at(pid) : kNoScope; }
};

TEST(Roster, AProcessIsThatOfTheNearestScope) {
  Cgroups machine;
  machine.roster.add_scope(10, "/a");
  machine.tell(HT_SPACE_TASK, 100, 1, 11);
  machine.tell(HT_SPACE_TASK, 101, 2, 12);
  EXPECT_EQ(machine.of(100), 10u);
  EXPECT_EQ(machine.of(101), kNoScope);
  machine.roster.add_scope(1, "/");
  EXPECT_EQ(machine.of(100), 10u);
  EXPECT_EQ(machine.of(101), 1u);
  machine.roster.add_scope(11, "/a/b");
  EXPECT_EQ(machine.of(100), 11u);
  machine.roster.remove_scope(11);
  EXPECT_EQ(machine.of(100), 10u);
  machine.roster.remove_scope(10);
  EXPECT_EQ(machine.of(100), 1u);
  machine.roster.remove_scope(1);
  EXPECT_EQ(machine.of(100), kNoScope);
  EXPECT_EQ(machine.roster.scope_of_space(1), kNoScope);
}

TEST(Roster, AProcessThatMovesChangesItsScope) {
  Cgroups machine;
  machine.roster.add_scope(1, "/");
  machine.roster.add_scope(10, "/a");
  machine.tell(HT_SPACE_FORK, 100, 1, 10);
  machine.tell(HT_SPACE_MOVED, 100, 1, 12);
  EXPECT_EQ(machine.of(100), 1u);
  machine.tell(HT_SPACE_MOVED, 100, 1, 11);
  EXPECT_EQ(machine.of(100), 10u);
  machine.tell(HT_SPACE_EXIT, 100, 1, 0);
  EXPECT_EQ(machine.of(100), kNoScope);
  EXPECT_EQ(machine.roster.take_ended(), std::vector<__u64>{1});
}

// A space is one scope's, that of its oldest process.
TEST(Roster, ASharedSpaceIsOneScopes) {
  Cgroups machine;
  machine.roster.add_scope(10, "/a");
  machine.roster.add_scope(12, "/c");
  machine.tell(HT_SPACE_FORK, 100, 1, 10);
  machine.tell(HT_SPACE_FORK, 101, 1, 12);
  EXPECT_EQ(machine.of(101), 10u);
  machine.tell(HT_SPACE_EXIT, 100, 1, 0);
  EXPECT_EQ(machine.of(101), 12u);
  machine.tell(HT_SPACE_EXEC, 101, 2, 12);
  EXPECT_EQ(machine.roster.take_ended(), std::vector<__u64>{1});
  EXPECT_EQ(machine.roster.scope_of_space(2), 12u);
}

// Whoever is left in a cgroup that is gone falls to the root.
TEST(Roster, ARemovedCgroupIsTheRoots) {
  Cgroups machine;
  machine.roster.add_scope(1, "/");
  machine.roster.add_scope(10, "/a");
  machine.paths.erase(10);
  machine.roster.remove_scope(10);
  machine.tell(HT_SPACE_TASK, 100, 1, 10);
  EXPECT_EQ(machine.of(100), 1u);
}

}  // namespace
}  // namespace hypertier
