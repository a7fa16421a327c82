// SPDX-License-Identifier: GPL-2.0-or-later
// The policy type: seats, hot swap, what a run says, what is refused.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "harness.hpp"

namespace hypertier::test {
namespace {

// As in policies.bpf.c. No skeletons: those of bpftool 7.5 for struct_ops need a
// newer libbpf than Debian 12 has.
struct Seen {
  __u32 inits, exits, epochs, classified, moved_pages, exit_kind, last_samples;
};

bpf_object* open_object(const char* name) {
  return bpf_object__open_file((build_dir + "/tests/e2e/kmod/" + name + ".bpf.o").c_str(), nullptr);
}

class Policy : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    object_ = open_object("policies");
    ASSERT_NE(object_, nullptr);
    ASSERT_EQ(bpf_object__load(object_), 0);
    int fd = bpf_map__fd(bpf_object__find_map_by_name(object_, ".bss"));
    first_ = static_cast<Seen*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    ASSERT_NE(first_, MAP_FAILED);
    second_ = first_ + 1;
  }
  static void TearDownTestSuite() {
    munmap(first_, kPage);
    bpf_object__close(object_);
  }
  void SetUp() override {
    *first_ = *second_ = {};
    for (__u32 i = 0; i < 100; i++)
      mover().ranges()[i] = {.start = i * kHuge, .end = (i + 1) * kHuge, .space = 1, .samples = i};
    mover().run() = {};
    mover().run().scope = {.cgroup_id = 1, .epoch = 9};
    mover().run().nr = 100;
  }

  int classify() { return mover().call("classify"); }
  ht_run& run() { return mover().run(); }

  bpf_map* policy(const std::string& name) {
    return bpf_object__find_map_by_name(object_, ("policy_" + name).c_str());
  }

  Device device_;
  static inline Seen *first_ = nullptr, *second_ = nullptr;
  static inline bpf_object* object_ = nullptr;
};

class Link {
 public:
  explicit Link(bpf_map* map) : link_(bpf_map__attach_struct_ops(map)), error_(link_ ? 0 : errno) {}
  ~Link() { reset(); }
  void reset() {
    if (link_) bpf_link__destroy(link_);
    link_ = nullptr;
  }
  int error() const { return error_; }
  int swap(bpf_map* map) { return bpf_link__update_map(link_, map); }

 private:
  bpf_link* link_;
  int error_;
};

TEST_F(Policy, EmptySeatAnswersNoEntry) {
  EXPECT_EQ(classify(), -ENOENT);
  EXPECT_EQ(run().status, -ENOENT);
  EXPECT_EQ(run().done, 0u);
}

TEST_F(Policy, ClassifiesEveryRangeOnce) {
  Link link(policy("first"));
  ASSERT_EQ(link.error(), 0);
  EXPECT_EQ(device_.info().seats, 1u);
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(run().done, 100u);
  EXPECT_GT(run().policy_ns, 0u);
  EXPECT_GT(run().generation, 0u);
  for (__u32 i = 0; i < 100; i++) {
    EXPECT_EQ(mover().ranges()[i].heat, i);
    EXPECT_EQ(mover().ranges()[i].action, TIER_KEEP);
    EXPECT_EQ(mover().ranges()[i].samples, i);
  }
  EXPECT_EQ(first_->inits, 1u);
  EXPECT_EQ(first_->epochs, 1u);
  EXPECT_EQ(first_->classified, 100u);
}

TEST_F(Policy, AdmitAndMovedReachIt) {
  Link link(policy("first"));
  mover().admits()[0] = {.hot = {.heat = 5}, .cold = {.heat = 4}, .pages = 1, .admitted = 9};
  mover().admits()[1] = {.hot = {.heat = 4}, .cold = {.heat = 5}, .pages = 1, .admitted = 9};
  run().nr = 2;
  EXPECT_EQ(mover().call("admit"), 0);
  EXPECT_EQ(mover().admits()[0].admitted, 1u);
  EXPECT_EQ(mover().admits()[1].admitted, 0u);
  mover().results()[0] = {.range = {.samples = 31}, .promoted_pages = 7};
  run().nr = 1;
  EXPECT_EQ(mover().call("moved"), 0);
  EXPECT_EQ(first_->moved_pages, 7u);
  EXPECT_EQ(first_->last_samples, 31u);
  // without the callbacks everything is admitted, and nothing is missed
  ASSERT_EQ(link.swap(policy("empty")), 0);
  run().nr = 2;
  EXPECT_EQ(mover().call("admit"), 0);
  EXPECT_EQ(mover().admits()[1].admitted, 1u);
  run().nr = 100;
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(run().done, 100u);
}

TEST_F(Policy, SeatHoldsOne) {
  Link link(policy("first"));
  Link other(policy("second"));
  EXPECT_EQ(other.error(), EBUSY);
  Link elsewhere(policy("elsewhere"));
  EXPECT_EQ(elsewhere.error(), 0);
  EXPECT_EQ(device_.info().seats, 2u);
  run().scope.cgroup_id = 4711;
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(mover().ranges()[3].heat, 42u);
  // a link stands for its seat
  EXPECT_EQ(link.swap(policy("elsewhere")), -EINVAL);
}

TEST_F(Policy, HotSwapTellsTheOldOne) {
  Link link(policy("first"));
  classify();
  auto generation = run().generation;
  ASSERT_EQ(link.swap(policy("second")), 0);
  EXPECT_EQ(first_->exits, 1u);
  EXPECT_EQ(first_->exit_kind, static_cast<__u32>(TIER_EXIT_REPLACED));
  EXPECT_EQ(second_->inits, 1u);
  classify();
  EXPECT_GT(run().generation, generation);
  EXPECT_EQ(mover().ranges()[3].heat, 3000u);
  link.reset();
  for (int i = 0; i < 100 && device_.info().seats; i++) usleep(20000);  // released by a worker
  EXPECT_EQ(second_->exit_kind, static_cast<__u32>(TIER_EXIT_UNLOADED));
}

TEST_F(Policy, FailedSwapKeepsTheOldOne) {
  Link link(policy("first"));
  classify();
  auto generation = run().generation;
  EXPECT_EQ(link.swap(policy("refusing")), -25);
  EXPECT_EQ(link.swap(policy("abi")), -EPROTONOSUPPORT);
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(run().generation, generation);
  EXPECT_EQ(mover().ranges()[7].heat, 7u);
  EXPECT_EQ(first_->exits, 0u);
}

TEST_F(Policy, BadOnesAreNotSeated) {
  EXPECT_EQ(Link(policy("refusing")).error(), 25);
  EXPECT_EQ(Link(policy("abi")).error(), EPROTONOSUPPORT);
  EXPECT_EQ(Link(policy("nowhere")).error(), EINVAL);
  EXPECT_EQ(Link(policy("flags")).error(), EOPNOTSUPP);
  EXPECT_EQ(device_.info().seats, 0u);
  EXPECT_EQ(classify(), -ENOENT);
}

TEST_F(Policy, InvalidActionEjects) {
  Link link(policy("invalid"));
  for (__u32 i = 5; i < 100; i++) mover().ranges()[i].heat = 7;
  EXPECT_EQ(classify(), -EINVAL);
  EXPECT_EQ(run().status, -EINVAL);
  EXPECT_EQ(run().exit.kind, static_cast<__u32>(TIER_EXIT_EJECTED));
  EXPECT_EQ(run().exit.code, static_cast<__u32>(TIER_CODE_INVALID_ACTION));
  EXPECT_EQ(run().exit.epoch, 9u);
  EXPECT_STREQ(run().exit.message, "classify: action 77 for the range at a00000, but there are 0 to 2 only");
  EXPECT_EQ(run().done, 5u);
  EXPECT_EQ(mover().ranges()[4].action, TIER_SPLIT);
  for (__u32 i = 5; i < 100; i++) {  // the rest stays as it is
    EXPECT_EQ(mover().ranges()[i].action, TIER_KEEP);
    EXPECT_EQ(mover().ranges()[i].heat, 0u);
  }
  // later runs are refused, with the reason, whatever they ask
  for (const char* program : {"classify", "admit", "moved"}) {
    run().exit = {};
    EXPECT_EQ(mover().call(program), -ECANCELED);
    EXPECT_EQ(run().status, -ECANCELED);
    EXPECT_EQ(run().done, 0u);
    EXPECT_EQ(run().exit.code, static_cast<__u32>(TIER_CODE_INVALID_ACTION));
  }
  ht_seat seat = device_.seat(1);
  EXPECT_EQ(seat.generation, run().generation);
  EXPECT_STREQ(seat.name, "policy_invalid");
  EXPECT_EQ(seat.exit.code, static_cast<__u32>(TIER_CODE_INVALID_ACTION));
  // until another one is seated
  ASSERT_EQ(link.swap(policy("first")), 0);
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(run().exit.kind, static_cast<__u32>(TIER_EXIT_NONE));
  EXPECT_EQ(device_.seat(1).exit.kind, static_cast<__u32>(TIER_EXIT_NONE));
}

// Rules that the engine watches: it tells the module, which tells the policy.
TEST_F(Policy, IsEjectedByTheEngine) {
  Link link(policy("first"));
  ASSERT_EQ(classify(), 0);
  EXPECT_EQ(device_.eject(1, run().generation + 1, TIER_CODE_BUDGET), ESTALE);
  EXPECT_EQ(device_.eject(2, run().generation, TIER_CODE_BUDGET), ENOENT);
  EXPECT_EQ(device_.eject(1, run().generation, TIER_CODE_OK), EINVAL);
  EXPECT_EQ(device_.eject(1, run().generation, TIER_CODES), EINVAL);
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(device_.eject(1, run().generation, TIER_CODE_BUDGET), 0);
  EXPECT_EQ(device_.eject(1, run().generation, TIER_CODE_TIMEOUT), 0);
  EXPECT_EQ(classify(), -ECANCELED);
  EXPECT_EQ(run().exit.code, static_cast<__u32>(TIER_CODE_BUDGET));  // the first reason counts
  EXPECT_STREQ(run().exit.message, "a test's reason");
  ASSERT_EQ(link.swap(policy("second")), 0);
  EXPECT_EQ(first_->exit_kind, static_cast<__u32>(TIER_EXIT_EJECTED));
  EXPECT_EQ(classify(), 0);
}

// admit and moved have the same deadline.
TEST_F(Policy, DeadlineHoldsInEveryCallback) {
  Link link(policy("dawdling"));
  for (const char* program : {"admit", "moved"}) {
    SCOPED_TRACE(program);
    ASSERT_EQ(link.swap(policy("dawdling")), 0);
    run().nr = 100;
    run().budget_ns = 20000;
    for (__u32 i = 0; i < 100; i++) mover().admits()[i] = {.admitted = 9};
    EXPECT_EQ(mover().call(program), -ETIME);
    EXPECT_GE(run().done, 1u);
    EXPECT_LT(run().done, 100u);
    EXPECT_EQ(run().exit.code, static_cast<__u32>(TIER_CODE_TIMEOUT));
    EXPECT_EQ(std::string(run().exit.message).substr(0, 5), std::string(program).substr(0, 5));
    if (std::string(program) == "admit") {
      for (__u32 i = run().done; i < 100; i++) EXPECT_EQ(mover().admits()[i].admitted, 0u);
    }
    EXPECT_EQ(classify(), -ECANCELED);
  }
}

// A callback that is slow in itself: nobody else waits for it, neither another
// seat's run, nor its hot swap.
TEST_F(Policy, OtherSeatsNeverWait) {
  Link slow(policy("endless"));
  ASSERT_EQ(slow.error(), 0);
  Link link(policy("first"));
  run() = {};
  run().scope = {.cgroup_id = 2, .epoch = 9};
  run().nr = 1;
  run().budget_ns = 1'000'000;
  std::atomic<bool> returned{false};
  Mover other;  // its own maps: the slow scope's thread
  other.ranges()[0] = mover().ranges()[0];
  other.run() = run();
  std::thread thread([&] {
    EXPECT_EQ(other.call("classify"), -ETIME);
    returned = true;
  });
  int runs = 0, swaps = 0;
  while (!returned) {
    run() = {};
    run().scope = {.cgroup_id = 1, .epoch = 9};
    run().nr = 100;
    ASSERT_EQ(classify(), 0);
    ASSERT_EQ(link.swap(policy(runs % 2 ? "first" : "second")), 0);
    if (returned) break;
    runs++;
    swaps++;
  }
  thread.join();
  EXPECT_EQ(other.run().exit.code, static_cast<__u32>(TIER_CODE_TIMEOUT));
  EXPECT_GE(runs, 100);
  std::printf("one callback of %llu ms, %d runs and %d hot swaps of another seat meanwhile\n",
              static_cast<unsigned long long>(other.run().policy_ns / 1000000), runs, swaps);
}

TEST_F(Policy, BudgetEndsTheRun) {
  Link link(policy("slow"));
  run().budget_ns = 20000;
  EXPECT_EQ(classify(), -ETIME);
  EXPECT_EQ(run().status, -ETIME);
  EXPECT_GE(run().done, 1u);
  EXPECT_LT(run().done, 100u);
  EXPECT_GT(run().policy_ns, 20000u);
  EXPECT_EQ(run().exit.code, static_cast<__u32>(TIER_CODE_TIMEOUT));
  run().budget_ns = 0;
  EXPECT_EQ(classify(), -ECANCELED);
  ASSERT_EQ(link.swap(policy("slow")), 0);
  EXPECT_EQ(classify(), 0);
}

TEST_F(Policy, BothKindsOfProgramsAreTaken) {
  Link link(policy("sleepable"));
  ASSERT_EQ(link.error(), 0);
  EXPECT_EQ(classify(), 0);
  EXPECT_EQ(mover().ranges()[99].heat, 42u);
}

TEST_F(Policy, BadHeadersAreRefused) {
  Link link(policy("first"));
  run().nr = HT_CALL_RANGES + 1;
  EXPECT_EQ(classify(), -EINVAL);
  run().nr = HT_CALL_PAIRS + 1;
  EXPECT_EQ(mover().call("admit"), -EINVAL);
  run().nr = HT_CALL_RESULTS + 1;
  EXPECT_EQ(mover().call("moved"), -EINVAL);
}

int load(const char* name) {
  bpf_object* object = open_object(name);
  int err = bpf_object__load(object);
  bpf_object__close(object);
  return err;
}

std::string verifier_log;
int keep_log(libbpf_print_level, const char* format, va_list arguments) {
  char line[65536];
  vsnprintf(line, sizeof line, format, arguments);
  verifier_log += line;
  return 0;
}

TEST(PolicyVerifier, RefusesForbiddenWrites) {
  verifier_log.clear();
  auto old = libbpf_set_print(keep_log);
  EXPECT_EQ(load("forbidden_samples"), -EACCES);
  EXPECT_NE(verifier_log.find("may write only heat and action"), std::string::npos) << verifier_log;
  EXPECT_EQ(load("forbidden_start"), -EACCES);
  EXPECT_EQ(load("forbidden_scope"), -EACCES);
  libbpf_set_print(old);
}

// Whoever seated it is killed: the seat empties by itself.
TEST_F(Policy, LeavesWithItsLoader) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (!child) {
    Link link(policy("first"));
    char ok = !link.error();
    (void)!write(ready[1], &ok, 1);
    pause();
  }
  char ok = 0;
  (void)!read(ready[0], &ok, 1);
  EXPECT_TRUE(ok);
  EXPECT_EQ(device_.info().seats, 1u);
  EXPECT_EQ(unload_module(), EAGAIN);  // in use
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  for (int i = 0; i < 100 && device_.info().seats; i++) usleep(20000);
  EXPECT_EQ(device_.info().seats, 0u);
  EXPECT_EQ(first_->exit_kind, static_cast<__u32>(TIER_EXIT_LOADER_GONE));
  close(ready[0]);
  close(ready[1]);
}

// Runs under constant hot swaps: always a policy, always one alone.
TEST_F(Policy, TwoHundredSwapsUnderLoad) {
  Link link(policy("first"));
  std::atomic<bool> stop{false};
  std::atomic<int> failed_swaps{0}, swaps{0}, runs{0};
  std::thread swapper([&] {
    for (int i = 0; i < 200; i++) {
      while (runs * 10 < i) std::this_thread::yield();  // under load, however busy the machine is
      if (link.swap(i % 2 ? policy("first") : policy("second"))) failed_swaps++;
      swaps++;
    }
    stop = true;
  });
  int torn = 0, empty = 0;
  std::uint64_t generation = 0, went_back = 0;
  while (!stop) {
    if (classify()) empty++;
    __u32 factor = mover().ranges()[1].heat;
    for (__u32 i = 0; i < 100; i++) torn += mover().ranges()[i].heat != i * factor;
    went_back += run().generation < generation;
    generation = run().generation;
    runs++;
  }
  swapper.join();
  EXPECT_EQ(swaps, 200);
  EXPECT_EQ(failed_swaps, 0);
  EXPECT_EQ(empty, 0);
  EXPECT_EQ(torn, 0);
  EXPECT_EQ(went_back, 0u);
  EXPECT_EQ(first_->inits + second_->inits, 201u);
  EXPECT_EQ(first_->exits + second_->exits, 200u);
  std::printf("hot swaps: 200 done, %d runs meanwhile, none without a policy\n", runs.load());
}

}  // namespace
}  // namespace hypertier::test
