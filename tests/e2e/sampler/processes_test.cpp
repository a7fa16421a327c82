// SPDX-License-Identifier: GPL-2.0-or-later
// Processes are found by themselves: a scripted tree of forks, execs, vforks,
// threads and exits against what the watcher reports.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <thread>
#include <vector>

#include "adapter/spaces.hpp"
#include "common.hpp"

namespace hypertier {
namespace {

class Processes : public testing::Test {
 protected:
  void SetUp() override { watch(256 << 10); }

  void watch(std::uint32_t ring_bytes) {
    auto programs = load_programs({.ring_bytes = ring_bytes});
    ASSERT_TRUE(programs) << programs.error().message;
    auto opened = SpaceWatcher::open(*programs);
    ASSERT_TRUE(opened) << opened.error().message;
    watcher = std::move(*opened);
    auto started = watcher->start();
    ASSERT_TRUE(started) << started.error().message;
    collect();
    first = std::exchange(events, {});
  }

  void collect() {
    auto done =
        watcher->events([&](const ht_space_event& event) { events.push_back(event); }, [&] { rescans++; });
    ASSERT_TRUE(done) << done.error().message;
  }
  std::vector<ht_space_event> of(pid_t pid, const std::vector<ht_space_event>& all) {
    std::vector<ht_space_event> found;
    std::ranges::copy_if(all, std::back_inserter(found),
                         [&](auto& event) { return event.pid == static_cast<__u32>(pid); });
    return found;
  }
  std::vector<ht_space_event> news(pid_t pid) {
    collect();
    return of(pid, events);
  }
  std::uint64_t own_space() {
    auto own = of(getpid(), first);
    return own.empty() ? 0 : own[0].space;
  }

  std::unique_ptr<SpaceWatcher> watcher;
  std::vector<ht_space_event> first, events;
  int rescans = 0;
};

// A child that says when it has started and goes on when told.
struct Child {
  int to[2], from[2];
  pid_t pid;

  template <class Body>
  explicit Child(Body body) {
    EXPECT_EQ(pipe2(to, O_CLOEXEC) | pipe2(from, O_CLOEXEC), 0);
    pid = fork();
    if (pid == 0) {
      char go = 1;
      (void)!write(from[1], &go, 1);
      (void)!read(to[0], &go, 1);
      _exit(body());
    }
    char started;
    EXPECT_EQ(read(from[0], &started, 1), 1);
  }
  void go() { EXPECT_EQ(write(to[1], "g", 1), 1); }
  void wait() { waitpid(pid, nullptr, 0); }
};

TEST_F(Processes, TheScanNamesWhatRuns) {
  std::set<__u32> pids;
  for (auto& event : first) {
    EXPECT_EQ(event.kind, HT_SPACE_TASK);
    EXPECT_NE(event.space, 0u);
    pids.insert(event.pid);
  }
  EXPECT_TRUE(pids.contains(1));
  EXPECT_TRUE(pids.contains(getpid()));
  EXPECT_FALSE(pids.contains(2)) << "kernel threads are left out";
  EXPECT_EQ(pids.size(), first.size());
  EXPECT_STREQ(of(getpid(), first).at(0).comm, "sampler_lab_tes");

  std::string line, path;
  std::ifstream cgroup("/proc/self/cgroup");
  while (std::getline(cgroup, line))
    if (line.starts_with("0::")) path = "/sys/fs/cgroup" + line.substr(3);
  struct stat status {};
  ASSERT_EQ(stat(path.c_str(), &status), 0) << path;
  EXPECT_EQ(of(getpid(), first).at(0).cgroup_id, status.st_ino);
}

TEST_F(Processes, ForkExecExit) {
  Child child([] { return execl("/bin/sleep", "sleep", "1000", nullptr); });
  auto forked = news(child.pid);
  ASSERT_EQ(forked.size(), 1u);
  EXPECT_EQ(forked[0].kind, HT_SPACE_FORK);
  EXPECT_NE(forked[0].space, own_space());
  EXPECT_NE(forked[0].space, 0u);
  child.go();
  char byte;
  close(child.from[1]);
  EXPECT_EQ(read(child.from[0], &byte, 1), 0) << "closed by exec";
  events.clear();
  std::vector<ht_space_event> execed;
  while ((execed = news(child.pid)).empty()) sched_yield();  // the pipe closes just before the event
  ASSERT_EQ(execed.size(), 1u);
  EXPECT_EQ(execed[0].kind, HT_SPACE_EXEC);
  EXPECT_NE(execed[0].space, forked[0].space);
  EXPECT_STREQ(execed[0].comm, "sleep");
  events.clear();
  kill(child.pid, SIGKILL);
  child.wait();
  auto exited = news(child.pid);
  ASSERT_GE(exited.size(), 1u);
  EXPECT_EQ(exited[0].kind, HT_SPACE_EXIT);
}

TEST_F(Processes, VforkSharesTheSpace) {
  pid_t pid = vfork();
  if (pid == 0) {
    execl("/bin/true", "true", nullptr);
    _exit(1);
  }
  waitpid(pid, nullptr, 0);
  auto seen = news(pid);
  ASSERT_GE(seen.size(), 3u);
  EXPECT_EQ(seen[0].kind, HT_SPACE_FORK);
  EXPECT_EQ(seen[0].space, own_space());
  EXPECT_EQ(seen[1].kind, HT_SPACE_EXEC);
  EXPECT_NE(seen[1].space, own_space());
  EXPECT_EQ(seen.back().kind, HT_SPACE_EXIT);
}

TEST_F(Processes, ThreadsAreNoProcesses) {
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i) threads.emplace_back([] {});
  }
  EXPECT_TRUE(news(getpid()).empty());
}

TEST_F(Processes, ExitIsThatOfTheLastThread) {
  Child child([] {
    static int hold[2];
    EXPECT_EQ(pipe(hold), 0);
    std::thread([] {
      char byte;
      (void)!read(hold[0], &byte, 1);  // until killed
    }).detach();
    return static_cast<int>(syscall(SYS_exit, 0));  // of this thread only
  });
  child.go();
  // the leader is a zombie, its group lives on
  std::string state;
  while (state.find("zombie") == state.npos) {
    std::ifstream status("/proc/" + std::to_string(child.pid) + "/status");
    state.assign(std::istreambuf_iterator<char>(status), {});
    sched_yield();
  }
  auto alive = news(child.pid);
  ASSERT_EQ(alive.size(), 1u);
  EXPECT_EQ(alive[0].kind, HT_SPACE_FORK);
  std::size_t named = 0;
  auto scanned = watcher->scan([&](const ht_space_event& event) {
    if (event.pid == static_cast<__u32>(child.pid)) {
      named++;
      EXPECT_EQ(event.space, alive[0].space);
    }
  });
  ASSERT_TRUE(scanned);
  EXPECT_GE(named, 1u) << "a scan names a group whose leader is gone";
  events.clear();
  kill(child.pid, SIGKILL);
  child.wait();
  auto exited = news(child.pid);
  ASSERT_GE(exited.size(), 1u);
  EXPECT_EQ(exited[0].kind, HT_SPACE_EXIT);
}

TEST_F(Processes, ExecOfAThreadIsNoExit) {
  Child child([] {
    std::thread([] { execl("/bin/sleep", "sleep", "1000", nullptr); }).join();
    return 0;
  });
  child.go();
  std::vector<ht_space_event> seen;
  while ((seen = news(child.pid)).size() < 2) sched_yield();
  ASSERT_EQ(seen.size(), 2u);
  EXPECT_EQ(seen[1].kind, HT_SPACE_EXEC);
  kill(child.pid, SIGKILL);
  child.wait();
}

TEST_F(Processes, CloneVmWithoutThreadSharesTheSpace) {
  static char stack[64 << 10];
  pid_t pid = clone([](void*) { return 0; }, stack + sizeof(stack), CLONE_VM | SIGCHLD, nullptr);
  ASSERT_GT(pid, 0);
  waitpid(pid, nullptr, 0);
  auto seen = news(pid);
  ASSERT_GE(seen.size(), 2u);
  EXPECT_EQ(seen[0].kind, HT_SPACE_FORK);
  EXPECT_EQ(seen[0].space, own_space());
  EXPECT_EQ(seen[1].kind, HT_SPACE_EXIT);
}

TEST_F(Processes, AReusedPidHasAnotherSpace) {
  Child one([] { return 0; });
  one.go();
  one.wait();
  pid_t again = 0;
  for (int tries = 0; tries < 50 && again != one.pid; ++tries) {
    std::ofstream("/proc/sys/kernel/ns_last_pid") << one.pid - 1 << std::flush;
    again = fork();
    if (again == 0) _exit(0);
    waitpid(again, nullptr, 0);
  }
  ASSERT_EQ(again, one.pid) << "the pid was not given again";
  auto seen = news(one.pid);
  ASSERT_GE(seen.size(), 4u);
  EXPECT_EQ(seen[0].kind, HT_SPACE_FORK);
  EXPECT_EQ(seen[1].kind, HT_SPACE_EXIT);
  EXPECT_EQ(seen[2].kind, HT_SPACE_FORK);
  EXPECT_NE(seen[2].space, seen[0].space);
  EXPECT_EQ(seen[3].kind, HT_SPACE_EXIT);
}

TEST_F(Processes, AnOverflowMakesItLookAgain) {
  watch(4096);
  Child stays([] { return 0; });
  pid_t last = 0;
  constexpr int kForks = 100;  // two events each, more than the ring holds
  for (int i = 0; i < kForks; ++i) {
    last = vfork();
    if (last == 0) _exit(0);
    waitpid(last, nullptr, 0);
  }
  collect();
  EXPECT_GE(rescans, 1);
  // what a reader of events makes of it
  std::set<__u32> alive;
  for (auto& event : first) alive.insert(event.pid);
  std::set<__u32> named;
  for (auto& event : events) {
    if (event.kind == HT_SPACE_EXIT)
      named.erase(event.pid);
    else
      named.insert(event.pid);
  }
  EXPECT_TRUE(named.contains(stays.pid));
  EXPECT_TRUE(named.contains(getpid()));
  EXPECT_FALSE(named.contains(last));
  stays.go();
  stays.wait();
}

}  // namespace
}  // namespace hypertier
