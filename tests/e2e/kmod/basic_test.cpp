// SPDX-License-Identifier: GPL-2.0-or-later
// The device, the walk and single exchanges, with nothing else going on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <numaif.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <numeric>
#include <thread>

#include "harness.hpp"

namespace hypertier::test {
namespace {

void fill(const Memory& memory, std::uint64_t seed) {
  for (std::size_t i = 0; i < memory.bytes(); i += 8)
    *reinterpret_cast<std::uint64_t*>(memory.data() + i) = seed * 0x9e3779b97f4a7c15 + i;
}

std::size_t wrong(const Memory& memory, std::uint64_t seed) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < memory.bytes(); i += 8)
    count += *reinterpret_cast<std::uint64_t*>(memory.data() + i) != seed * 0x9e3779b97f4a7c15 + i;
  return count;
}

std::vector<ht_page_t> slow_pages(const Memory& memory) {
  return mover().walk(getpid(), memory.data(), memory.bytes(), HT_TIER_SLOW);
}
std::vector<ht_page_t> fast_pages(const Memory& memory) {
  return mover().walk(getpid(), memory.data(), memory.bytes(), HT_TIER_FAST);
}

TEST(Device, InfoNamesEveryMover) {
  Device device;
  ht_module_info info = device.info();
  EXPECT_EQ(info.abi, static_cast<__u32>(HT_ABI));
  EXPECT_EQ(info.movers, 1u << HT_MOVER_EXCHANGE | 1u << HT_MOVER_MIGRATE | 1u << HT_MOVER_SYSCALL);
  EXPECT_STREQ(info.missing, "");
}

TEST(Device, OpensOnce) {
  Device device;
  EXPECT_EQ(open(HT_DEVICE, O_RDWR), -1);
  EXPECT_EQ(errno, EBUSY);
}

TEST(Device, RefusesBadInput) {
  Device device;
  ht_tiers both{{1, 1}}, absent{{1, 1ull << 40}};
  EXPECT_EQ(ioctl(device.fd(), HT_IOC_TIERS, &both), -1);
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(ioctl(device.fd(), HT_IOC_TIERS, &absent), -1);
  EXPECT_EQ(errno, ENODEV);
  ht_restore restore{.fd = 9999, .length = 2, .value = "0\n"};
  EXPECT_EQ(ioctl(device.fd(), HT_IOC_RESTORE, &restore), -1);
  EXPECT_EQ(errno, EBADF);
  int read_only = open("/proc/sys/kernel/numa_balancing", O_RDONLY);
  restore.fd = read_only;
  EXPECT_EQ(ioctl(device.fd(), HT_IOC_RESTORE, &restore), -1);
  close(read_only);
  restore.length = 25;
  EXPECT_EQ(ioctl(device.fd(), HT_IOC_RESTORE, &restore), -1);
  EXPECT_EQ(errno, EINVAL);
  EXPECT_EQ(ioctl(device.fd(), _IO('H', 99)), -1);
  EXPECT_EQ(errno, ENOTTY);
}

// kill -9 of the holder is enough: the module writes the old value back.
TEST(Device, RestoresWhenItsHolderIsKilled) {
  const std::string knob = "/proc/sys/kernel/numa_balancing";
  write_file(knob, "1");
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (!child) {
    Device device;
    int fd = open(knob.c_str(), O_RDWR);
    ht_restore restore{.fd = fd, .length = 2, .value = "1\n"};
    char ok = ioctl(device.fd(), HT_IOC_RESTORE, &restore) == 0;
    write_file(knob, "0");
    (void)!write(ready[1], &ok, 1);
    pause();
  }
  char ok = 0;
  ASSERT_EQ(read(ready[0], &ok, 1), 1);
  EXPECT_TRUE(ok);
  EXPECT_EQ(read_file(knob), "0\n");
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  { Device next; }  // open waits for the restores of the last holder
  EXPECT_EQ(read_file(knob), "1\n");
  write_file(knob, "0");
  close(ready[0]);
  close(ready[1]);
}

TEST(Spaces, StampChangesWithTheMappingsOnly) {
  Device device;
  auto& run = mover().spaces();
  std::uint64_t space = mover().space_of(getpid());
  ASSERT_NE(space, 0u);
  auto ask = [&](std::uint64_t seq) {
    run.nr = 1;
    run.req[0] = {.space = space, .seq = seq, .tier_rss_pages = 0, .pid = static_cast<__u32>(getpid())};
    EXPECT_EQ(mover().call("spaces_run"), 0);
    EXPECT_EQ(run.req[0].error, 0);
    return run.req[0];
  };
  ht_space_req first = ask(0);
  EXPECT_GT(first.count, 3u);
  EXPECT_NE(first.seq, 0u);
  ht_space_req second = ask(first.seq);
  EXPECT_EQ(second.count, 0u);
  EXPECT_EQ(second.seq, first.seq);

  Memory memory(kHuge, kSlowNode);
  ht_space_req third = ask(first.seq);
  EXPECT_NE(third.seq, first.seq);
  bool found = false;
  for (std::uint32_t i = third.first; i < third.first + third.count; i++) {
    const ht_mapping& mapping = mover().mappings()[i];
    auto start = reinterpret_cast<std::uint64_t>(memory.data());
    found |= mapping.start <= start && mapping.end >= start + kHuge && mapping.flags == TIER_RANGE_ANON;
    if (i > third.first) EXPECT_GE(mapping.start, mover().mappings()[i - 1].end);
  }
  EXPECT_TRUE(found);
  // a space that pid does not have (any more)
  run.req[0] = {.space = space + 1000000, .seq = 0, .tier_rss_pages = 0, .pid = static_cast<__u32>(getpid())};
  EXPECT_EQ(mover().call("spaces_run"), 0);
  EXPECT_EQ(run.req[0].error, -ESRCH);
  run.nr = HT_SPACES_MAX + 1;
  EXPECT_EQ(mover().call("spaces_run"), -EINVAL);
}

TEST(Walk, CountsAndListsByTier) {
  Device device;
  Memory slow(3 * kHuge, kSlowNode), fast(2 * kHuge, kFastNode, true);
  ht_walk result;
  auto listed = mover().walk(getpid(), slow.data(), slow.bytes(), HT_TIER_SLOW, &result);
  EXPECT_EQ(result.error, 0);
  EXPECT_EQ(result.tier_pages[HT_TIER_SLOW], slow.pages());
  EXPECT_EQ(result.tier_pages[HT_TIER_FAST], 0u);
  EXPECT_EQ(result.next, result.end);
  ASSERT_EQ(listed.size(), slow.pages());
  EXPECT_EQ(HT_PAGE_ADDR(listed[7]), reinterpret_cast<std::uint64_t>(slow.data()) + 7 * kPage);
  EXPECT_EQ(HT_PAGE_ORDER(listed[7]), 0u);

  listed = mover().walk(getpid(), fast.data(), fast.bytes(), HT_TIER_FAST, &result);
  EXPECT_EQ(result.tier_pages[HT_TIER_FAST], fast.pages());
  EXPECT_EQ(result.huge_pages, fast.pages());
  ASSERT_EQ(listed.size(), 2u);
  EXPECT_EQ(HT_PAGE_ORDER(listed[0]), 9u);

  // a bound stops it, and it goes on from there
  auto& run = mover().walks();
  std::uint64_t address = reinterpret_cast<std::uint64_t>(slow.data());
  run.walk[0] = {.space = mover().space_of(getpid()), .start = address, .end = address + slow.bytes(),
                 .pid = static_cast<__u32>(getpid()), .list_tier = HT_TIER_SLOW, .list_max_pages = 100};
  run.nr = 1;
  EXPECT_EQ(mover().call("walk"), 0);
  EXPECT_EQ(run.walk[0].list_count, 100u);
  EXPECT_EQ(run.walk[0].next, address + 100 * kPage);
  EXPECT_EQ(run.walk[0].error, 0);

  // memory never touched is not counted, the zero page neither
  char* untouched = static_cast<char*>(mmap(nullptr, kHuge, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  volatile char zero = untouched[5 * kPage];
  (void)zero;
  mover().walk(getpid(), untouched, kHuge, HT_TIER_NONE, &result);
  EXPECT_EQ(result.tier_pages[HT_TIER_FAST] + result.tier_pages[HT_TIER_SLOW], 0u);
  munmap(untouched, kHuge);

  run.walk[0] = {.space = 1ull << 60, .start = 0, .end = ~0ull, .pid = static_cast<__u32>(getpid())};
  EXPECT_EQ(mover().call("walk"), 0);
  EXPECT_EQ(run.walk[0].error, -ESRCH);
  run.nr = HT_WALKS_MAX + 1;
  EXPECT_EQ(mover().call("walk"), -EINVAL);
}

TEST(Exchange, SwapsSmallPages) {
  Device device;
  Memory hot(4 << 20, kSlowNode), cold(4 << 20, kFastNode);
  fill(hot, 1);
  fill(cold, 2);
  ht_exchange_run run = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(run.promoted_pages, hot.pages());
  EXPECT_EQ(run.demoted_pages, cold.pages());
  EXPECT_EQ(run.exchanged_pairs, hot.pages());
  EXPECT_EQ(run.mover_pages[HT_MOVER_EXCHANGE], 2 * hot.pages());
  EXPECT_LE(run.batches, 2u);  // a page may sit in another CPU's LRU batch: moved by its folio then
  EXPECT_LE(run.flush_calls, run.batches);
  EXPECT_EQ(mover().pairs()[0].hot_result, HT_MOVE_DONE);
  EXPECT_EQ(mover().pairs()[0].mover, HT_MOVER_EXCHANGE);
  EXPECT_EQ(hot.pages_on(kFastNode), hot.pages());
  EXPECT_EQ(cold.pages_on(kSlowNode), cold.pages());
  EXPECT_EQ(wrong(hot, 1), 0u);
  EXPECT_EQ(wrong(cold, 2), 0u);
  // again: they are where they belong
  run = mover().move(getpid(), fast_pages(hot), getpid(), slow_pages(cold));
  EXPECT_EQ(run.promoted_pages + run.demoted_pages, 0u);
  EXPECT_EQ(run.failed_pages[HT_MOVE_ALREADY], 2 * hot.pages());
}

TEST(Exchange, SwapsHugePagesWhole) {
  Device device;
  Memory hot(4 * kHuge, kSlowNode, true), cold(4 * kHuge, kFastNode, true);
  fill(hot, 3);
  fill(cold, 4);
  ht_walk before;
  mover().walk(getpid(), hot.data(), hot.bytes(), HT_TIER_NONE, &before);
  ASSERT_EQ(before.huge_pages, hot.pages());
  ht_exchange_run run = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(run.exchanged_pairs, 4u);
  EXPECT_EQ(run.promoted_pages, hot.pages());
  EXPECT_EQ(wrong(hot, 3), 0u);
  EXPECT_EQ(wrong(cold, 4), 0u);
  ht_walk after;
  mover().walk(getpid(), hot.data(), hot.bytes(), HT_TIER_NONE, &after);
  EXPECT_EQ(after.huge_pages, hot.pages());
  EXPECT_EQ(after.tier_pages[HT_TIER_FAST], hot.pages());
}

// A huge page that is mapped by page-table entries, and 64 KiB folios.
TEST(Exchange, SwapsLargeFoliosMappedByPages) {
  Device device;
  {
    Memory hot(kHuge, kSlowNode, true), cold(kHuge, kFastNode, true);
    fill(hot, 5);
    fill(cold, 6);
    // a protection change of one page splits the mapping, not the folio
    ASSERT_EQ(mprotect(hot.data() + kPage, kPage, PROT_READ), 0);
    ASSERT_EQ(mprotect(hot.data() + kPage, kPage, PROT_READ | PROT_WRITE), 0);
    ht_walk walk;
    mover().walk(getpid(), hot.data(), hot.bytes(), HT_TIER_NONE, &walk);
    ASSERT_EQ(walk.huge_pages, 0u);
    auto list = slow_pages(hot);
    ASSERT_EQ(list.size(), 1u);
    ht_exchange_run run = mover().move(getpid(), list, getpid(), fast_pages(cold));
    EXPECT_EQ(run.exchanged_pairs, 1u);
    EXPECT_EQ(hot.pages_on(kFastNode), hot.pages());
    EXPECT_EQ(wrong(hot, 5), 0u);
    EXPECT_EQ(wrong(cold, 6), 0u);
  }
  const std::string knob = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled";
  const std::string pmd = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";
  write_file(knob, "madvise");
  write_file(pmd, "never");
  {
    Memory hot(kHuge, kSlowNode, true), cold(kHuge, kFastNode, true);
    fill(hot, 7);
    fill(cold, 8);
    auto list = slow_pages(hot);
    ASSERT_EQ(list.size(), 32u);
    EXPECT_EQ(HT_PAGE_ORDER(list[0]), 4u);
    ht_exchange_run run = mover().move(getpid(), list, getpid(), fast_pages(cold));
    EXPECT_EQ(run.exchanged_pairs, 32u);
    EXPECT_EQ(run.promoted_pages, hot.pages());
    EXPECT_EQ(wrong(hot, 7), 0u);
    EXPECT_EQ(wrong(cold, 8), 0u);
  }
  write_file(knob, "never");
  write_file(pmd, "inherit");
}

TEST(Migrate, OneSidedMovesAndOddSizes) {
  Device device;
  Memory memory(2 << 20, kSlowNode), huge(kHuge, kSlowNode, true), small(kHuge, kFastNode);
  fill(memory, 9);
  ht_exchange_run run = mover().move(getpid(), slow_pages(memory), getpid(), {});
  EXPECT_EQ(run.promoted_pages, memory.pages());
  EXPECT_EQ(run.mover_pages[HT_MOVER_MIGRATE], memory.pages());
  EXPECT_EQ(mover().pairs()[0].mover, HT_MOVER_MIGRATE);
  EXPECT_EQ(mover().pairs()[0].cold_result, HT_MOVE_NONE);
  run = mover().move(getpid(), {}, getpid(), fast_pages(memory));
  EXPECT_EQ(run.demoted_pages, memory.pages());
  EXPECT_EQ(wrong(memory, 9), 0u);
  // different sizes: refused without migrate, done with it
  auto hot = slow_pages(huge), cold = fast_pages(small);
  cold.resize(1);
  run = mover().move(getpid(), hot, getpid(), cold, HT_EXCHANGE_NO_MIGRATE);
  EXPECT_EQ(run.failed_pages[HT_MOVE_MISMATCH], 513u);
  run = mover().move(getpid(), hot, getpid(), cold);
  EXPECT_EQ(run.demoted_pages, 1u);
  EXPECT_EQ(run.promoted_pages, 512u);
}

TEST(Migrate, SharedMemoryAndFiles) {
  Device device;
  for (const char* path : {"/dev/shm/hypertier-test", "/tmp/hypertier-test"}) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    ASSERT_EQ(ftruncate(fd, 1 << 20), 0);
    char* data = static_cast<char*>(mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    std::vector<ht_page_t> list;
    for (int i = 0; i < 1 << 20; i += kPage) data[i] = static_cast<char>(i / kPage * 7);
    // wherever the first touch put them: all to fast, then back
    list = mover().walk(getpid(), data, 1 << 20, HT_TIER_FAST);
    mover().move(getpid(), {}, getpid(), list);
    list = mover().walk(getpid(), data, 1 << 20, HT_TIER_SLOW);
    ASSERT_EQ(list.size(), 256u) << path;
    EXPECT_TRUE(list[0] & HT_PAGE_FILE);
    ht_exchange_run run = mover().move(getpid(), list, getpid(), {});
    EXPECT_EQ(run.promoted_pages, 256u) << path;
    for (int i = 0; i < 1 << 20; i += kPage) ASSERT_EQ(data[i], static_cast<char>(i / kPage * 7));
    munmap(data, 1 << 20);
    close(fd);
    unlink(path);
  }
}

// A file's page that another process maps too is neither counted nor moved; alone it is.
TEST(Walk, LeavesFilesThatSeveralProcessesMap) {
  Device device;
  const int fd = open((build_dir + "/bpf/kmod/hypertier.ko").c_str(), O_RDONLY);
  ASSERT_GE(fd, 0);
  constexpr std::size_t kBytes = 8 * kPage;
  auto* data = static_cast<volatile char*>(mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE, fd, 0));
  ASSERT_NE(data, MAP_FAILED);
  const auto touch = [&] {
    for (std::size_t i = 0; i < kBytes; i += kPage) (void)data[i];
  };
  const auto listed = [&] {
    touch();  // a move may have unmapped it
    return mover().walk(getpid(), const_cast<char*>(data), kBytes, HT_TIERS);
  };
  const auto alone = listed();
  ASSERT_GT(alone.size(), 0u);
  int there[2], go[2];
  ASSERT_EQ(pipe(there) | pipe(go), 0);
  const pid_t other = fork();
  if (other == 0) {
    touch();
    char byte = 0;
    (void)!write(there[1], &byte, 1);
    (void)!read(go[0], &byte, 1);
    _exit(0);
  }
  char byte;
  ASSERT_EQ(read(there[0], &byte, 1), 1);
  EXPECT_EQ(listed().size(), 0u);
  for (bool fast : {false, true}) {
    std::vector<ht_page_t> list;
    for (ht_page_t page : alone)
      if (fast == ((page & HT_PAGE_FAST) != 0)) list.push_back(page & ~HT_PAGE_FAST);
    ht_exchange_run run = fast ? mover().move(getpid(), {}, getpid(), list) : mover().move(getpid(), list, getpid(), {});
    EXPECT_EQ(run.promoted_pages + run.demoted_pages, 0u);
    EXPECT_EQ(run.failed_pages[HT_MOVE_SPECIAL], list.size());
  }
  ASSERT_EQ(write(go[1], &byte, 1), 1);
  waitpid(other, nullptr, 0);
  EXPECT_EQ(listed().size(), alone.size());
  for (int end : {there[0], there[1], go[0], go[1]}) close(end);
  munmap(const_cast<char*>(data), kBytes);
  close(fd);
}

std::uint64_t free_pages(int node) {
  std::string text = read_file("/sys/devices/system/node/node" + std::to_string(node) + "/meminfo");
  return std::stoull(text.substr(text.find("MemFree:") + 8)) / 4;
}

constexpr std::uint64_t kFull = 900;  // pages: 1 % of 384 MiB

// A process that takes what is free of the fast node, in small pages, for as long as this lives.
class Filler {
 public:
  Filler() : reserve_(read_file(kReserve)) {
    // khugepaged has raised it to tens of MiB: below them the kernel would not fill
    write_file(kReserve, "1024");
    int ready[2];
    if (pipe(ready)) throw std::runtime_error("no pipe");
    process_ = fork();
    if (!process_) {
      // MemFree lags by what the CPUs hold: only a row of chunks that change nothing says full
      for (int stuck = 0; free_pages(kFastNode) > kFull && stuck < 16;) {
        char* data = static_cast<char*>(mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        madvise(data, 1 << 20, MADV_NOHUGEPAGE);
        unsigned long mask = 1 << kFastNode;
        mbind(data, 1 << 20, MPOL_PREFERRED, &mask, 64, 0);
        std::uint64_t before = free_pages(kFastNode);
        for (int i = 0; i < 1 << 20; i += kPage) data[i] = 1;
        stuck = free_pages(kFastNode) + 64 > before ? stuck + 1 : 0;
      }
      (void)!write(ready[1], "x", 1);
      for (;;) pause();
    }
    char c;
    (void)!read(ready[0], &c, 1);
    for (int end : ready) close(end);
  }
  ~Filler() {
    kill(process_, SIGKILL);
    write_file(kReserve, reserve_);
    waitpid(process_, nullptr, 0);
  }
  Filler(const Filler&) = delete;

 private:
  static constexpr const char* kReserve = "/proc/sys/vm/min_free_kbytes";
  std::string reserve_;
  pid_t process_;
};

// Less than 1 % of the fast tier is free, and nothing may be taken from it
// that is not given back: swapping needs no room, and migrate makes it first.
TEST(Exchange, WorksWhenTheFastTierIsFull) {
  Device device;
  Memory hot(4 << 20, kSlowNode), cold(4 << 20, kFastNode);
  fill(hot, 17);
  fill(cold, 18);
  const Filler filler;
  std::uint64_t free = free_pages(kFastNode);
  EXPECT_LT(free, 3 * kFull) << "the fast tier is not full";
  ht_exchange_run swapped = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_GE(swapped.exchanged_pairs, hot.pages() * 99 / 100);
  // and back again, by migrate alone
  ht_exchange_run migrated =
      mover().move(getpid(), slow_pages(cold), getpid(), fast_pages(hot), HT_EXCHANGE_NO_SWAP);
  std::printf("full fast tier: %lu pages free, %llu of 1024 pairs swapped; %llu demoted and %llu promoted by migrate, %llu found no room\n",
              free, swapped.exchanged_pairs, migrated.demoted_pages, migrated.promoted_pages,
              migrated.failed_pages[HT_MOVE_NO_MEMORY]);
  EXPECT_GE(migrated.demoted_pages, 900u);
  EXPECT_GE(migrated.promoted_pages, 900u);
  EXPECT_EQ(wrong(hot, 17), 0u);
  EXPECT_EQ(wrong(cold, 18), 0u);
}

// The room that small pages made for a huge one is nowhere in one piece.
TEST(Migrate, AHugePageWithoutABlockOfItsSizeGoesInPieces) {
  Device device;
  Memory cold(2 * kHuge, kFastNode), hot(kHuge, kSlowNode, true);
  fill(hot, 19);  // first: a huge page of zeros is split by who looks for free memory
  fill(cold, 20);
  const Filler filler;
  const Memory blocks(4 * kHuge, kFastNode, true);  // those that are left, and in the CPUs' lists
  auto up = slow_pages(hot), all = fast_pages(cold);
  ASSERT_EQ(up.size(), 1u);
  ASSERT_EQ(all.size(), 1024u);
  std::vector<ht_page_t> down;  // each second one: they leave no block
  for (std::size_t i = 0; i < all.size(); i += 2) down.push_back(all[i]);
  const std::uint64_t space = mover().space_of(getpid());
  const auto pid = static_cast<__u32>(getpid());
  auto pairs = mover().pairs();
  for (std::size_t i = 0; i < down.size(); i++)
    pairs[i] = {.hot_space = 0, .hot_addr = 0, .cold_space = space, .cold_addr = HT_PAGE_ADDR(down[i]), .hot_pid = 0, .cold_pid = pid};
  pairs[down.size()] = {.hot_space = space, .hot_addr = HT_PAGE_ADDR(up[0]), .cold_space = 0, .cold_addr = 0, .hot_pid = pid, .cold_pid = 0};
  mover().exchange() = {};
  mover().exchange().nr = static_cast<__u32>(down.size() + 1);
  ASSERT_EQ(mover().call("exchange_run"), 0);
  EXPECT_EQ(mover().exchange().demoted_pages, 512u);
  EXPECT_EQ(mover().exchange().promoted_pages, 512u);
  EXPECT_EQ(slow_pages(hot).size(), 0u);
  std::printf("a huge page came to the full fast tier in %zu pieces\n", fast_pages(hot).size());
  EXPECT_EQ(wrong(hot, 19), 0u);
  EXPECT_EQ(wrong(cold, 20), 0u);
}

TEST(Exchange, FailuresAreNamed) {
  Device device;
  Memory cold(kHuge, kFastNode), hot(kHuge, kSlowNode);
  auto fast = fast_pages(cold), slow = slow_pages(hot);
  fast.resize(1);
  auto one = [&](ht_page_t page) { return std::vector<ht_page_t>{page}; };
  // nothing mapped: the partner stays as well
  ht_exchange_run run = mover().move(getpid(), one(0x10000), getpid(), fast);
  EXPECT_EQ(mover().pairs()[0].hot_result, HT_MOVE_GONE);
  EXPECT_EQ(mover().pairs()[0].cold_result, HT_MOVE_PARTNER);
  EXPECT_EQ(run.promoted_pages + run.demoted_pages, 0u);
  // a kernel address and a space that is gone
  run = mover().move(getpid(), one(~0xfffull), getpid(), fast);
  EXPECT_EQ(mover().pairs()[0].hot_result, HT_MOVE_GONE);
  mover().pairs()[0] = {.hot_space = 1ull << 50, .hot_addr = HT_PAGE_ADDR(slow[0]), .cold_space = 0,
                      .cold_addr = 0, .hot_pid = static_cast<__u32>(getpid()), .cold_pid = 0};
  mover().exchange().nr = 1;
  EXPECT_EQ(mover().call("exchange_run"), 0);
  EXPECT_EQ(mover().pairs()[0].hot_result, HT_MOVE_GONE);
  EXPECT_EQ(mover().pairs()[0].cold_result, HT_MOVE_NONE);
  mover().exchange().nr = HT_PAIRS_MAX + 1;
  EXPECT_EQ(mover().call("exchange_run"), -EINVAL);
}

// Copy-on-write sharing, and who is exclusive, survive.
TEST(Exchange, SharedAfterForkStaysSharedAndPrivate) {
  Device device;
  Memory hot(1 << 20, kSlowNode), cold(1 << 20, kFastNode);
  fill(hot, 10);
  fill(cold, 11);
  int go[2], done[2];
  ASSERT_EQ(pipe(go) | pipe(done), 0);
  pid_t child = fork();
  if (!child) {
    char c;
    (void)!read(go[0], &c, 1);
    // the parent has moved and written: the child must still see the old contents
    bool ok = wrong(hot, 10) == 0 && wrong(cold, 11) == 0;
    fill(hot, 12);
    ok &= wrong(hot, 12) == 0;
    (void)!write(done[1], &ok, 1);
    _exit(0);
  }
  ht_exchange_run run = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(run.exchanged_pairs, hot.pages());
  EXPECT_EQ(wrong(hot, 10), 0u);
  fill(hot, 13);
  (void)!write(go[1], "x", 1);
  bool ok = false;
  (void)!read(done[0], &ok, 1);
  EXPECT_TRUE(ok);
  EXPECT_EQ(wrong(hot, 13), 0u);
  EXPECT_EQ(wrong(cold, 11), 0u);
  waitpid(child, nullptr, 0);
  for (int fd : {go[0], go[1], done[0], done[1]}) close(fd);
}

// Long-term pins of io_uring and plain references of a pipe.
TEST(Exchange, PinnedPagesStay) {
  Device device;
  Memory hot(kHuge, kSlowNode), cold(kHuge, kFastNode);
  fill(hot, 14);
  io_uring_params params{};
  int ring = static_cast<int>(syscall(SYS_io_uring_setup, 4, &params));
  ASSERT_GE(ring, 0) << std::strerror(errno);
  iovec buffer{hot.data(), 16 * kPage};
  ASSERT_EQ(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1), 0) << std::strerror(errno);
  int spliced[2];
  ASSERT_EQ(pipe(spliced), 0);
  iovec referenced{hot.data() + 16 * kPage, 4 * kPage};
  ASSERT_EQ(vmsplice(spliced[1], &referenced, 1, 0), static_cast<ssize_t>(4 * kPage));

  std::vector<std::uint64_t> before;
  for (int i = 0; i < 20; i++) before.push_back(pfn(hot.data() + i * kPage));
  auto slow = slow_pages(hot);
  for (std::uint32_t flags : {0u, static_cast<std::uint32_t>(HT_EXCHANGE_NO_SWAP)}) {
    auto list = std::vector(slow.begin(), slow.begin() + 20);
    mover().move(getpid(), list, getpid(), fast_pages(cold), flags);
    for (int i = 0; i < 20; i++) {
      EXPECT_EQ(pfn(hot.data() + i * kPage), before[i]) << i;
      EXPECT_NE(mover().pairs()[i].hot_result, HT_MOVE_DONE) << i;
      if (!flags) EXPECT_EQ(mover().pairs()[i].hot_result, HT_MOVE_PINNED) << i;
      if (!flags) EXPECT_EQ(mover().pairs()[i].cold_result, HT_MOVE_PARTNER) << i;
    }
  }
  EXPECT_EQ(wrong(hot, 14), 0u);
  close(ring);
  close(spliced[0]);
  close(spliced[1]);
}

TEST(Exchange, MergedPagesStay) {
  Device device;
  Memory hot(1 << 20, kSlowNode), cold(1 << 20, kFastNode);
  std::memset(hot.data(), 0x5a, hot.bytes());
  ASSERT_EQ(madvise(hot.data(), hot.bytes(), MADV_MERGEABLE), 0);
  write_file("/sys/kernel/mm/ksm/merge_across_nodes", "1");
  write_file("/sys/kernel/mm/ksm/pages_to_scan", "10000");
  write_file("/sys/kernel/mm/ksm/run", "1");
  std::uint64_t scans = std::stoull(read_file("/sys/kernel/mm/ksm/full_scans"));
  while (std::stoull(read_file("/sys/kernel/mm/ksm/full_scans")) < scans + 3) usleep(10000);
  write_file("/sys/kernel/mm/ksm/run", "0");
  ASSERT_GT(std::stoull(read_file("/sys/kernel/mm/ksm/pages_sharing")), 100u);
  std::uint64_t before = pfn(hot.data());
  std::vector<ht_page_t> list{reinterpret_cast<std::uint64_t>(hot.data())};
  mover().move(getpid(), list, getpid(), fast_pages(cold));
  EXPECT_EQ(mover().pairs()[0].hot_result, HT_MOVE_SPECIAL);
  EXPECT_EQ(pfn(hot.data()), before);
  write_file("/sys/kernel/mm/ksm/run", "2");
}

TEST(Exchange, SoftDirtyStays) {
  Device device;
  Memory hot(1 << 20, kSlowNode), cold(1 << 20, kFastNode);
  constexpr std::uint64_t kSoftDirty = 1ull << 55;
  write_file("/proc/self/clear_refs", "4");
  for (std::size_t i = 0; i < hot.pages(); i += 2) hot.data()[i * kPage] = 2;
  ht_exchange_run run = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(run.exchanged_pairs, hot.pages());
  for (std::size_t i = 0; i < hot.pages(); i++) {
    EXPECT_EQ(!!(pagemap(getpid(), hot.data() + i * kPage) & kSoftDirty), i % 2 == 0) << i;
    EXPECT_FALSE(pagemap(getpid(), cold.data() + i * kPage) & kSoftDirty) << i;
  }
}

TEST(Exchange, UserfaultfdWriteProtectionStays) {
  Device device;
  Memory hot(1 << 20, kSlowNode), cold(1 << 20, kFastNode);
  fill(hot, 15);
  int uffd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  ASSERT_GE(uffd, 0);
  uffdio_api api{.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP, .ioctls = 0};
  ASSERT_EQ(ioctl(uffd, UFFDIO_API, &api), 0);
  auto address = reinterpret_cast<std::uint64_t>(hot.data());
  uffdio_register reg{.range = {address, hot.bytes()}, .mode = UFFDIO_REGISTER_MODE_WP, .ioctls = 0};
  ASSERT_EQ(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
  uffdio_writeprotect protect{.range = {address, hot.bytes() / 2}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
  ASSERT_EQ(ioctl(uffd, UFFDIO_WRITEPROTECT, &protect), 0);
  ht_exchange_run run = mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(run.exchanged_pairs, hot.pages());
  constexpr std::uint64_t kWp = 1ull << 57;
  for (std::size_t i = 0; i < hot.pages(); i++)
    EXPECT_EQ(!!(pagemap(getpid(), hot.data() + i * kPage) & kWp), i < hot.pages() / 2) << i;
  // a write to a protected page is still reported, and goes through when resolved
  std::thread writer([&] { hot.data()[3 * kPage] = 77; });
  pollfd wait{uffd, POLLIN, 0};
  EXPECT_EQ(poll(&wait, 1, 20000), 1);
  uffd_msg message{};
  EXPECT_EQ(read(uffd, &message, sizeof message), static_cast<ssize_t>(sizeof message));
  EXPECT_TRUE(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP);
  uffdio_writeprotect release{.range = {address, hot.bytes()}, .mode = 0};
  EXPECT_EQ(ioctl(uffd, UFFDIO_WRITEPROTECT, &release), 0);
  writer.join();
  EXPECT_EQ(hot.data()[3 * kPage], 77);
  close(uffd);
}

TEST(Exchange, LockedMemoryStaysLocked) {
  Device device;
  Memory hot(1 << 20, kSlowNode), cold(1 << 20, kFastNode);
  fill(hot, 16);
  ASSERT_EQ(mlock(hot.data(), hot.bytes()), 0);
  std::uint64_t locked = vmstat("nr_mlock");
  mover().move(getpid(), slow_pages(hot), getpid(), fast_pages(cold));
  EXPECT_EQ(vmstat("nr_mlock"), locked);
  EXPECT_EQ(wrong(hot, 16), 0u);
  munlock(hot.data(), hot.bytes());
  EXPECT_EQ(vmstat("nr_mlock"), locked - hot.pages());
}

}  // namespace
}  // namespace hypertier::test
