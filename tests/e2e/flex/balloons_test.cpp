// SPDX-License-Identifier: GPL-2.0-or-later
// hyperflex.ko in a real guest on stock QEMU: one balloon a tier, exact on the
// host, beside what the stock driver does with the same device.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include <hypertier/flex.h>

#include "guest.hpp"

using namespace hypertier;
using namespace hypertier::test;
using namespace std::chrono_literals;

namespace {

constexpr unsigned long long kMiB = 1 << 20;
constexpr unsigned long long kFast = 256 * kMiB, kSlow = 512 * kMiB, kSlack = 2 * kMiB;
const int kRounds = getenv("FLEX_ROUNDS") ? atoi(getenv("FLEX_ROUNDS")) : 50;

class Balloons : public ::testing::Test {
 protected:
  std::unique_ptr<Guest> guest;

  void boot(const std::string& append) {
    GuestOptions options;
    options.kernel = getenv("FLEX_KERNEL");
    options.initramfs = getenv("FLEX_INITRAMFS");
    options.fast_bytes = kFast;
    options.slow_bytes = kSlow;
    options.append = append;
    auto started = Guest::start(options);
    ASSERT_TRUE(started) << started.error().message;
    guest = std::move(*started);
  }
  std::string run(const std::string& line, int timeout = 120) {
    auto output = guest->run(line, timeout);
    EXPECT_TRUE(output) << line << ": " << output.error().message;
    return output ? *output : "";
  }
  unsigned long long free_bytes(int node) {
    return number("grep -o 'MemFree: *[0-9]*' /sys/devices/system/node/node" + std::to_string(node) + "/meminfo | grep -o '[0-9]*$'") << 10;
  }
  std::string driver() { return run("for d in /sys/bus/virtio/devices/*; do case $(cat $d/device) in 0x0005) basename $(readlink $d/driver);; esac; done"); }
  unsigned long long number(const std::string& line) { return strtoull(run(line).c_str(), nullptr, 10); }
  void order(unsigned num_pages) {
    // QMP takes what is to remain, and hands (memory - that) to the device.
    auto done = guest->qmp().command("balloon", {{"value", kFast + kSlow - (num_pages * 4096ULL)}});
    ASSERT_TRUE(done) << done.error().message;
  }
  void targets(unsigned long long fast, unsigned long long slow) {
    order(hf_pack(kFast >> 12, kSlow >> 12, (kFast - fast) >> 12, (kSlow - slow) >> 12));
  }
  // Until both balloons are where they are to go, as the driver itself says.
  bool settle(unsigned long long fast, unsigned long long slow, int seconds = 120) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    std::string want = std::to_string(kFast - fast) + "\n" + std::to_string(kSlow - slow) + "\n", have;
    do {
      have = run("cat $B/virtio*/fast_balloon_bytes $B/virtio*/slow_balloon_bytes");
      if (have == want) return true;
      std::this_thread::sleep_for(50ms);
    } while (std::chrono::steady_clock::now() < end);
    ADD_FAILURE() << "wanted " << want << "have " << have << run("cat $B/virtio*/*_counters; cat /sys/devices/system/node/node*/meminfo | grep -E 'MemTotal|MemFree|Anon'");
    return false;
  }
  void no_complaints() {
    const auto console = guest->console();
    for (const char* word : {"WARNING", "BUG", "Oops", "Out of memory", "oom-kill", "Call Trace"})
      EXPECT_EQ(console.find(word), std::string::npos) << console;
  }
};

// init_on_free makes the guest touch all it owns, at boot and whenever a page
// comes back: what is resident is exactly what it owns.
TEST_F(Balloons, FollowRandomTargetsToThePage) {
  boot("init_on_free=1");
  ASSERT_TRUE(guest);

  run("insmod /modules/hyperflex.ko");
  EXPECT_EQ(number("cat $B/virtio*/fast_bytes"), kFast);
  EXPECT_EQ(number("cat $B/virtio*/slow_bytes"), kSlow);

  run("flexwork hold 0 16777216 a & flexwork hold 1 67108864 b & while ! [ -e /tmp/a.in -a -e /tmp/b.in ]; do sleep 0.2; done");
  ASSERT_FALSE(HasFailure());
  targets(kFast, kSlow);
  ASSERT_TRUE(settle(kFast, kSlow));

  std::mt19937 random(42);
  long long worst_above = 0, worst_below = 0;
  for (int round = 0; round < kRounds; round++) {
    // At least what the kernel and the two holders use; at most everything.
    const auto fast = (112 + random() % 73 * 2) * kMiB, slow = (96 + random() % 209 * 2) * kMiB;
    const bool one = random() % 2;  // now and then only one tier moves
    static unsigned long long last_fast = kFast;
    const auto goal = one ? last_fast : fast;
    last_fast = goal;
    targets(goal, slow);
    ASSERT_TRUE(settle(goal, slow)) << "round " << round;
    const long long fast_off = static_cast<long long>(guest->resident_bytes("fast")) - static_cast<long long>(goal);
    const long long slow_off = static_cast<long long>(guest->resident_bytes("slow")) - static_cast<long long>(slow);
    if (getenv("FLEX_VERBOSE")) printf("round %d: %llu %lld, %llu %lld KiB\n", round, goal / kMiB, fast_off / 1024, slow / kMiB, slow_off / 1024);
    for (long long off : {fast_off, slow_off}) {
      worst_above = std::max(worst_above, off);
      worst_below = std::max(worst_below, -off);
      EXPECT_LE(off, static_cast<long long>(kSlack)) << "round " << round;
      EXPECT_GE(off, -static_cast<long long>(kSlack)) << "round " << round;
    }
    if (round % 10 == 9 || round == kRounds - 1) {
      EXPECT_EQ(run("echo verify >/tmp/a.in; cat /tmp/a.out"), "ok 4096\n") << "round " << round;
      EXPECT_EQ(run("echo verify >/tmp/b.in; cat /tmp/b.out"), "ok 16384\n") << "round " << round;
    }
  }
  printf("%d random targets a tier: at most %lld KiB above and %lld KiB below the target\n", kRounds, worst_above / 1024,
         worst_below / 1024);

  // The same device with the stock driver: one balloon takes where it likes.
  targets(kFast, kSlow);
  ASSERT_TRUE(settle(kFast, kSlow));
  run("rmmod hyperflex; insmod /modules/virtio_balloon.ko");
  EXPECT_EQ(driver(), "virtio_balloon\n");
  const auto fast_free = free_bytes(0), slow_free = free_bytes(1);
  const unsigned long long taken = 256 * kMiB;
  order(taken >> 12);
  for (int i = 0; i < 600; i++) {
    auto balloon = guest->qmp().command("query-balloon");
    ASSERT_TRUE(balloon);
    if ((*balloon)["actual"] == kFast + kSlow - taken) break;
    std::this_thread::sleep_for(200ms);
  }
  const auto stock_fast = (fast_free - free_bytes(0)) / kMiB, stock_slow = (slow_free - free_bytes(1)) / kMiB;
  EXPECT_NEAR(static_cast<double>(stock_fast + stock_slow), 256, 8);

  // Taken over while inflated, told to take the same from the slow tier.
  run("insmod /modules/hyperflex.ko");
  EXPECT_EQ(driver(), "hyperflex\n");
  targets(kFast, kSlow - taken);
  ASSERT_TRUE(settle(kFast, kSlow - taken));
  const auto flex_fast = number("cat $B/virtio*/fast_balloon_bytes") / kMiB, flex_slow = number("cat $B/virtio*/slow_balloon_bytes") / kMiB;
  printf("256 MiB to be taken from the slow tier (free were %llu MiB fast, %llu MiB slow):\n"
         "  stock driver  %3llu MiB from fast, %3llu MiB from slow\n  hyperflex     %3llu MiB from fast, %3llu MiB from slow\n",
         fast_free / kMiB, slow_free / kMiB, stock_fast, stock_slow, flex_fast, flex_slow);
  EXPECT_EQ(flex_fast, 0u);
  EXPECT_GE(free_bytes(0) + 8 * kMiB, fast_free);  // and nothing was taken behind our back
  EXPECT_GT(stock_fast, 32u);

  // Given back to the stock driver.
  order(0);
  run("rmmod hyperflex");
  EXPECT_EQ(driver(), "virtio_balloon\n");
  EXPECT_EQ(run("echo verify >/tmp/a.in; cat /tmp/a.out"), "ok 4096\n");
  no_complaints();
}

// docs/security.md: what the driver takes by sysfs.
TEST_F(Balloons, SysfsIsRootsAndChecked) {
  boot("");
  ASSERT_TRUE(guest);
  run("insmod /modules/hyperflex.ko");
  const auto refused = [&](const std::string& file, const std::string& value) {
    const auto before = run("cat $B/virtio*/" + file);
    EXPECT_NE(run("echo " + value + " 2>/dev/null >$(echo $B/virtio*)/" + file + "; echo $?"), "0\n") << file << " took " << value;
    EXPECT_EQ(run("cat $B/virtio*/" + file), before) << file << " after " << value;
  };
  for (const char* value : {"-1", "many", "18446744073709551616", "268439552", "1K"}) refused("fast_balloon_target_bytes", value);
  for (const char* value : {"-1", "536875008"}) refused("slow_balloon_target_bytes", value);
  for (const char* value : {"-1", "65537", "0.5"}) refused("slow_miss_share", value);
  for (const char* value : {"-1", "60001"}) refused("demote_first_ms", value);
  for (const char* file : {"fast_bytes", "slow_bytes", "fast_balloon_bytes", "slow_balloon_bytes", "fast_counters", "slow_counters", "fast_missing_bytes"})
    EXPECT_EQ(run("stat -c %a $B/virtio*/" + std::string(file)), "444\n") << file;
  for (const char* file : {"fast_balloon_target_bytes", "slow_balloon_target_bytes", "slow_miss_share", "demote_first_ms"})
    EXPECT_EQ(run("stat -c %a $B/virtio*/" + std::string(file)), "644\n") << file;
  EXPECT_EQ(run("cat $B/virtio*/fast_balloon_bytes $B/virtio*/slow_balloon_bytes"), "0\n0\n");
  // The whole tier fits: it takes what it gets, and the guest lives.
  run("echo 268435456 >$(echo $B/virtio*)/fast_balloon_target_bytes; sleep 3; echo 0 >$(echo $B/virtio*)/fast_balloon_target_bytes");
  ASSERT_TRUE(settle(kFast, kSlow));
  run("rmmod hyperflex");
  const auto console = guest->console();
  for (const char* word : {"WARNING", "BUG", "Oops", "Call Trace"}) EXPECT_EQ(console.find(word), std::string::npos) << console;
}

TEST_F(Balloons, ThreeQuartersOfAFastTierInUse) {
  boot("");
  ASSERT_TRUE(guest);
  run("insmod /modules/hyperflex.ko");
  // The application fills the fast tier, up to the watermarks; the slow one has room for what is pushed out.
  const auto free = free_bytes(0);
  const auto application = (free - 28 * kMiB) / kMiB * kMiB;
  run("flexwork hold 0 " + std::to_string(application) + " app & while [ ! -e /tmp/app.in ]; do sleep 0.2; done");
  ASSERT_FALSE(HasFailure());
  const auto before = run("echo nodes >/tmp/app.in; cat /tmp/app.out");
  const auto in_use = std::strtoull(before.c_str(), nullptr, 10) * 4096;
  EXPECT_GE(in_use, application * 9 / 10) << before;
  const auto slow_before = guest->resident_bytes("slow");
  const auto fast = kFast - in_use * 3 / 4 / kSlack * kSlack;
  targets(fast, kSlow);
  ASSERT_TRUE(settle(fast, kSlow, 300));
  EXPECT_LE(guest->resident_bytes("fast"), fast + kSlack);
  EXPECT_EQ(run("echo verify >/tmp/app.in; cat /tmp/app.out"), "ok " + std::to_string(application / 4096) + "\n");
  std::string after = run("echo nodes >/tmp/app.in; cat /tmp/app.out");
  std::erase(after, '\n');
  printf("in-use fast tier: %llu MiB used by the application, %llu MiB taken; its pages per node were %sare now %s; "
         "slow tier grew by %lld MiB\n%s",
         in_use / kMiB, (kFast - fast) / kMiB, before.c_str(), after.c_str(),
         (static_cast<long long>(guest->resident_bytes("slow")) - static_cast<long long>(slow_before)) / static_cast<long long>(kMiB),
         run("cat $B/virtio*/fast_counters").c_str());
  no_complaints();
}

}  // namespace
