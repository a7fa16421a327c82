// SPDX-License-Identifier: GPL-2.0-or-later
// The accounting against the files themselves, in the lab (it loads BPF): after
// everything that can change a tier, the counted sum is st_blocks, to the page.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>

#include <hypertier/flex.h>

#include "accounting/accounting.hpp"
#include "qtest_guest.hpp"

using namespace hypertier;
using namespace hypertier::test;

namespace {

constexpr uint64_t kMiB = 1 << 20, kPage = 4096;
constexpr char kCgroup[] = "/sys/fs/cgroup/flex";
constexpr uint64_t kFast = 32 * kMiB, kSlow = 32 * kMiB;

class AccountingTest : public ::testing::TestWithParam<AccountingMode> {
 protected:
  std::unique_ptr<Accounting> accounting;
  std::unique_ptr<QtestGuest> guest;
  int checkpoints = 0;

  void open() {
    std::string note;
    accounting = open_accounting(GetParam(), note);
    const bool bpf = GetParam() == AccountingMode::kBpf;
    ASSERT_EQ(accounting->name(), bpf ? "bpf" : "tracepoint and st_blocks") << note;
  }
  void start(const std::string& directory) {
    GuestOptions options;
    options.fast_bytes = kFast;
    options.slow_bytes = kSlow;
    options.directory = directory;
    auto started = QtestGuest::start(options);
    ASSERT_TRUE(started) << started.error().message;
    guest = std::move(*started);
  }
  void checkpoint(const std::string& what) {
    for (const char* tier : {"fast", "slow"}) {
      auto usage = accounting->read(guest->vm().file(tier));
      ASSERT_TRUE(usage) << usage.error().message;
      EXPECT_EQ(usage->resident_bytes + usage->swapped_bytes, guest->vm().resident_bytes(tier)) << tier << " after " << what;
    }
    EXPECT_EQ(guest->failure(), "") << what;
    checkpoints++;
  }
  TierUsage usage(const char* tier) { return *accounting->read(guest->vm().file(tier)); }
};

TEST_P(AccountingTest, EqualsTheFilesAtEveryStep) {
  // What QEMU touches is charged here, so that it can be reclaimed.
  mkdir(kCgroup, 0755);
  std::ofstream(std::string(kCgroup) + "/cgroup.procs") << getpid();
  open();
  ASSERT_FALSE(HasFatalFailure());
  start("");
  ASSERT_TRUE(guest);
  const std::string fast = guest->vm().file("fast");
  checkpoint("start");
  guest->touch(4 * kMiB, 8 * kMiB);
  checkpoint("touching 8 MiB of the fast tier");
  guest->touch(kFast + kMiB, 8 * kMiB);
  checkpoint("touching 8 MiB of the slow tier");

  auto before = usage("fast");
  std::vector<uint32_t> pfns;
  for (uint32_t i = 0; i < 300; i++) pfns.push_back((4 * kMiB >> 12) + i);
  const auto resident = guest->vm().resident_bytes("fast");
  guest->inflate(pfns);
  EXPECT_EQ(resident - guest->vm().resident_bytes("fast"), 300 * kPage);
  checkpoint("300 single pages");
  EXPECT_EQ(usage("fast").out_pages_total - before.out_pages_total, 300u);
  guest->inflate({static_cast<uint32_t>((kFast + kMiB) >> 12), static_cast<uint32_t>((kFast + 2 * kMiB) >> 12)});
  checkpoint("two pages of the slow tier");
  guest->report({{6 * kMiB, 2 * kMiB}, {8 * kMiB, 2 * kMiB}});
  checkpoint("two blocks of 2 MiB");
  guest->report({{kFast + 2 * kMiB, 2 * kMiB}, {kFast + 4 * kMiB, 2 * kMiB}, {kFast + 6 * kMiB, 2 * kMiB}});
  checkpoint("three blocks of the slow tier");

  // Refaults, some of them above the target.
  accounting->set_target(fast, guest->vm().resident_bytes("fast") + kMiB);
  before = usage("fast");
  guest->touch(6 * kMiB, 2 * kMiB);
  checkpoint("touching a block that was given back");
  if (GetParam() == AccountingMode::kBpf) {
    EXPECT_EQ(usage("fast").in_pages_total - before.in_pages_total, 512u);
    EXPECT_EQ(usage("fast").refault_pages_total - before.refault_pages_total, 256u);
  }

  // Others than the guest: a punch, a write, a preallocation, a mapping.
  const int file = ::open(fast.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(file, 0);
  ASSERT_EQ(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 7 * kMiB, 64 * kPage), 0);
  checkpoint("a punch by somebody else");
  ASSERT_EQ(pwrite(file, "x", 1, 20 * kMiB + 5), 1);
  checkpoint("a write by somebody else");
  ASSERT_EQ(fallocate(file, FALLOC_FL_KEEP_SIZE, 21 * kMiB, kMiB), 0);
  checkpoint("a preallocation");
  void* mapping = mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, file, 24 * kMiB);
  ASSERT_NE(mapping, MAP_FAILED);
  memset(mapping, 1, kMiB / 2);
  checkpoint("a mapping of somebody else");

  // Claims change nothing.
  const auto held_fast = guest->vm().resident_bytes("fast"), held_slow = guest->vm().resident_bytes("slow");
  guest->claim_actual(0xffffffff);
  checkpoint("a false actual");
  guest->claim_stats({{HF_TAG_MAGIC, HF_MAGIC}, {HF_TAG_FAST, ~0ULL}, {4, 1}});
  checkpoint("false statistics");
  guest->inflate({0xffffffff, 0x7fffffff, static_cast<uint32_t>((kFast + kSlow) >> 12), 0xfee00});
  checkpoint("PFNs of no memory");
  EXPECT_EQ(guest->vm().resident_bytes("fast"), held_fast);
  EXPECT_EQ(guest->vm().resident_bytes("slow"), held_slow);
  const uint32_t page = static_cast<uint32_t>(10 * kMiB >> 12);
  guest->inflate({page, page, page, page});
  checkpoint("the same page four times");

  // Swap, if the machine has any.
  std::ifstream swaps("/proc/swaps");
  std::string line, swap;
  std::getline(swaps, line);
  if (std::getline(swaps, swap)) {
    guest->touch(kFast + 16 * kMiB, 8 * kMiB);
    std::ofstream(std::string(kCgroup) + "/memory.reclaim") << "64M";
    checkpoint("reclaim");
    printf("swap: %llu KiB of the slow tier are swapped\n", static_cast<unsigned long long>(usage("slow").swapped_bytes / 1024));
    guest->touch(kFast + 16 * kMiB, 8 * kMiB);
    checkpoint("swapping in");
  }
  munmap(mapping, kMiB);
  close(file);

  // The same on huge pages.
  guest.reset();
  const std::string huge = "/tmp/flex-huge";
  mkdir(huge.c_str(), 0700);
  ASSERT_EQ(mount("tmpfs", huge.c_str(), "tmpfs", 0, "huge=always,size=128M"), 0);
  start(huge);
  ASSERT_TRUE(guest);
  checkpoint("start on huge pages");
  guest->touch(4 * kMiB, 8 * kMiB);
  EXPECT_EQ(guest->vm().resident_bytes("fast") % (2 * kMiB), 0u) << "no huge page was used";
  checkpoint("touching huge pages");
  guest->inflate({static_cast<uint32_t>((4 * kMiB >> 12) + 7)});
  checkpoint("one page out of a huge one");
  guest->report({{6 * kMiB, 2 * kMiB}});
  checkpoint("a whole huge page");
  guest->touch(6 * kMiB, 2 * kMiB);
  checkpoint("touching it again");
  guest.reset();
  umount2(huge.c_str(), MNT_DETACH);

  EXPECT_GE(checkpoints, 16);
  printf("%s: equal to st_blocks at %d checkpoints\n", accounting->name().c_str(), checkpoints);
}

// What the hooks cost where pages are faulted in, interleaved. Under --icount a
// nanosecond is half an instruction, whatever else this machine does: only there
// the bound is asserted.
TEST_P(AccountingTest, CostOfAFault) {
  if (GetParam() != AccountingMode::kBpf) GTEST_SKIP();
  const char* path = "/dev/shm/flex-cost";
  const int file = ::open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  constexpr size_t kBytes = 8 * kMiB;
  const bool counted = getenv("FLEX_ICOUNT");
  ASSERT_EQ(ftruncate(file, kBytes), 0);
  auto round = [&] {
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kBytes);
    auto* memory = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    for (size_t i = 0; i < kBytes; i += kPage) memory[i] = 1;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    munmap(memory, kBytes);
    return (static_cast<double>(b.tv_sec - a.tv_sec) * 1e9 + static_cast<double>(b.tv_nsec - a.tv_nsec)) / (kBytes / kPage);
  };
  round();
  std::vector<double> with, without;
  for (int i = 0; i < 7; i++) {
    // Attaching changes the code that runs: a round to warm up first.
    round();
    without.push_back(round());
    open();
    accounting->set_target(path, kBytes / 2);
    (void)accounting->read(path);
    round();
    with.push_back(round());
    accounting.reset();
  }
  std::sort(with.begin(), with.end());
  std::sort(without.begin(), without.end());
  const double cost = with[3] / without[3] - 1;
  printf("a fault: %.0f %s without, %.0f with the hooks: %+.1f %%\n", without[3] / (counted ? 2 : 1), counted ? "instructions" : "ns",
         with[3] / (counted ? 2 : 1), cost * 100);
  if (counted) {
    EXPECT_LT(cost, 0.10);
  }
  RecordProperty("overhead_permille", static_cast<int>(cost * 1000));
  close(file);
  unlink(path);
}

// A whole guest with its own kernel, inside the lab: what it does by itself is
// counted as exactly as what the tests above do in its name.
TEST(NestedGuest, IsCountedToThePage) {
  std::string note;
  auto accounting = open_accounting(AccountingMode::kBpf, note);
  ASSERT_EQ(accounting->name(), "bpf") << note;
  GuestOptions options;
  options.kernel = getenv("FLEX_KERNEL");
  options.initramfs = getenv("FLEX_INITRAMFS");
  options.fast_bytes = 160 * kMiB;
  options.slow_bytes = 128 * kMiB;
  // Emulated twice: by the wall clock a timer interrupt would last longer than
  // the time to the next one.
  options.boot_seconds = 2000;
  options.icount = true;
  options.cpus = 1;
  options.append = "tsc=reliable lpj=5000000 no_timer_check nowatchdog audit=0 rcupdate.rcu_expedited=1 "
                   "initcall_blacklist=jent_mod_init,load_system_certificate_list";
  auto started = Guest::start(options);
  ASSERT_TRUE(started) << started.error().message;
  auto& guest = **started;
  const auto run = [&](const std::string& line) {
    auto output = guest.run(line, 400);
    EXPECT_TRUE(output) << line << ": " << output.error().message;
    return output ? *output : "";
  };
  int checkpoints = 0;
  const auto checkpoint = [&](const std::string& what) {
    for (const char* tier : {"fast", "slow"}) {
      // The guest runs on: a moment is looked for in which nothing changes.
      bool still = false;
      for (int i = 0; i < 200 && !still; i++) {
        const auto before = guest.resident_bytes(tier);
        auto usage = accounting->read(guest.file(tier));
        still = usage && guest.resident_bytes(tier) == before;
        if (still) {
          EXPECT_EQ(usage->resident_bytes + usage->swapped_bytes, before) << tier << " after " << what;
        }
      }
      EXPECT_TRUE(still) << tier << " never stood still after " << what;
    }
    checkpoints++;
  };
  checkpoint("boot");
  run("insmod /modules/hyperflex.ko");
  checkpoint("loading the driver");
  run("flexwork hold 1 33554432 a & while ! [ -e /tmp/a.in ]; do sleep 0.2; done");
  checkpoint("32 MiB in the slow tier");
  const auto before = *accounting->read(guest.file("slow"));
  for (const unsigned long long taken : {48, 16, 40, 0}) {
    const std::string bytes = std::to_string(taken * kMiB);
    run("D=$(echo $B/virtio*); echo " + bytes + " >$D/slow_balloon_target_bytes; "
        "for i in $(seq 200); do [ \"$(cat $D/slow_balloon_bytes)\" = " + bytes + " ] && break; sleep 0.2; done");
    checkpoint("taking " + std::to_string(taken) + " MiB");
  }
  EXPECT_GT(accounting->read(guest.file("slow"))->out_pages_total, before.out_pages_total);
  EXPECT_EQ(run("echo verify >/tmp/a.in; cat /tmp/a.out"), "ok 8192\n");
  checkpoint("verifying");
  printf("a nested guest: equal to st_blocks at %d checkpoints\n", checkpoints);
}

INSTANTIATE_TEST_SUITE_P(Modes, AccountingTest, ::testing::Values(AccountingMode::kBpf, AccountingMode::kTracepoint),
                         [](const auto& info) { return info.param == AccountingMode::kBpf ? "Bpf" : "Tracepoint"; });

}  // namespace
