// SPDX-License-Identifier: GPL-2.0-or-later
// Accessed bits: what they show, what reading them leaves behind, and what of it a
// TLB hides: nothing, for one flush.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <stdexcept>

#include "bits.hpp"
#include "flushes.hpp"
#include "harness.hpp"

namespace hypertier::test {

bool read_bits = false;

Bits::Bits() : object_(bpf_object__open_file((build_dir + "/bpf/parts/abit.bpf.o").c_str(), nullptr)) {
  if (!object_ || bpf_object__load(object_)) throw std::runtime_error("abit.bpf.o does not load");
  bpf_map* map = bpf_object__find_map_by_name(object_, "checks");
  void* run = mmap(nullptr, sizeof(ht_bits_run), PROT_READ | PROT_WRITE, MAP_SHARED, bpf_map__fd(map), 0);
  if (run == MAP_FAILED) throw std::runtime_error("abit.bpf.o's map cannot be mapped");
  run_ = static_cast<ht_bits_run*>(run);
}

Bits::~Bits() {
  munmap(run_, sizeof(ht_bits_run));
  bpf_object__close(object_);
}

void Bits::add(int pid, const void* start, std::size_t bytes) {
  std::uint64_t space = mover().space_of(pid);
  for (std::uint64_t granule = reinterpret_cast<std::uint64_t>(start) >> HT_GRANULE_SHIFT;
       granule << HT_GRANULE_SHIFT < reinterpret_cast<std::uint64_t>(start) + bytes && run_->nr < HT_CHECKS_MAX; granule++)
    add(pid, space, granule);
}

void Bits::add(int pid, std::uint64_t space, std::uint64_t granule) {
  ht_check& check = run_->check[run_->nr++];
  check = {};
  check.bits.space = space;
  check.bits.granule = granule;
  check.pid = static_cast<__u32>(pid);
}

int Bits::step(ht_check_phase phase) {
  run_->phase = phase;
  LIBBPF_OPTS(bpf_test_run_opts, options);
  if (bpf_prog_test_run_opts(bpf_program__fd(bpf_object__find_program_by_name(object_, "bits")), &options))
    throw std::runtime_error("abit.bpf.o does not run");
  return static_cast<int>(options.retval);
}

namespace {

bool bit(const __u64* words, std::size_t page) { return words[page / 64] >> page % 64 & 1; }

std::size_t count(const __u64* words) {
  std::size_t pages = 0;
  for (std::size_t page = 0; page < HT_GRANULE_PAGES; page++) pages += bit(words, page);
  return pages;
}

// Write-protecting drops what the TLB holds, and keeps the bits.
void drop_tlb(const Memory& memory) {
  mprotect(memory.data(), memory.bytes(), PROT_READ);
  mprotect(memory.data(), memory.bytes(), PROT_READ | PROT_WRITE);
}

// Kilobytes of the mapping at start that the kernel takes for referenced.
std::uint64_t referenced_kib(const void* start) {
  std::ifstream smaps("/proc/self/smaps");
  bool mine = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.find('-') != line.npos && line.find(':') > line.find('-')) mine = std::stoull(line, nullptr, 16) == reinterpret_cast<std::uint64_t>(start);
    if (mine && line.starts_with("Referenced:")) return std::stoull(line.substr(11));
  }
  return 0;
}

class AccessedBits : public testing::Test {
 protected:
  Device device_;
  Bits bits_;
};

TEST_F(AccessedBits, TouchedInBetweenAndNothingElse) {
  Memory memory(2 * kHuge, kSlowNode);
  bits_.add(getpid(), memory.data(), memory.bytes());
  std::mt19937 random(3);
  for (int round = 0; round < 5; round++) {
    std::set<std::size_t> touched;
    for (int i = 0; i < 100; i++) touched.insert(random() % memory.pages());
    ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
    for (std::size_t page : touched) {
      if (page % 2) memory.data()[page * kPage] = 1;
      else (void)*const_cast<volatile char*>(memory.data() + page * kPage);
    }
    ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
    for (int g = 0; g < 2; g++) {
      const ht_check& check = bits_.run().check[g];
      EXPECT_EQ(check.error, 0);
      EXPECT_EQ(check.bits.huge, 0u);
      EXPECT_EQ(count(check.bits.checked), std::size_t{HT_GRANULE_PAGES});
      EXPECT_GT(check.bits.interval_ns, 0u);
      EXPECT_LT(check.bits.interval_ns, 60'000'000'000u);
      for (std::size_t page = 0; page < HT_GRANULE_PAGES; page++)
        EXPECT_EQ(bit(check.bits.set, page), touched.contains(g * HT_GRANULE_PAGES + page)) << "round " << round << " page " << page;
    }
    EXPECT_EQ(bits_.run().visits, 2u * HT_GRANULE_PAGES);
  }
}

// Pages touched before and in between stay young for reclaim, untouched ones old.
TEST_F(AccessedBits, TellReclaimWhatTheyToldBefore) {
  Memory memory(kHuge, kSlowNode);
  write_file("/proc/self/clear_refs", "1");
  EXPECT_EQ(referenced_kib(memory.data()), 0u);
  drop_tlb(memory);  // clear_refs does not flush
  for (std::size_t page = 0; page < 128; page++) memory.data()[page * kPage] = 2;
  ASSERT_EQ(referenced_kib(memory.data()), 128u * 4);
  bits_.add(getpid(), memory.data(), memory.bytes());
  ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
  EXPECT_EQ(count(bits_.run().check[0].bits.set), 128u);
  for (std::size_t page = 100; page < 160; page++) memory.data()[page * kPage] = 3;
  ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
  EXPECT_EQ(count(bits_.run().check[0].bits.set), 60u);
  EXPECT_EQ(referenced_kib(memory.data()), 160u * 4);
  // and again, with nothing touched
  bits_.clear();
  bits_.add(getpid(), memory.data(), memory.bytes());
  ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
  EXPECT_EQ(count(bits_.run().check[0].bits.set), 160u);
  ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
  EXPECT_EQ(referenced_kib(memory.data()), 160u * 4);
}

TEST_F(AccessedBits, AHugePageIsOne) {
  Memory memory(2 * kHuge, kSlowNode, true);
  bits_.add(getpid(), memory.data(), memory.bytes());
  ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
  memory.data()[kHuge + 77 * kPage] = 1;
  ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
  for (int g = 0; g < 2; g++) {
    const ht_bits& bits = bits_.run().check[g].bits;
    EXPECT_EQ(bits.huge, 1u) << "no huge page was to be had";
    EXPECT_EQ(count(bits.checked), std::size_t{HT_GRANULE_PAGES});
    EXPECT_EQ(count(bits.set), g * std::size_t{HT_GRANULE_PAGES});
  }
  EXPECT_EQ(bits_.run().visits, 2u);
  // split in between: nothing is claimed
  bits_.clear();
  bits_.add(getpid(), memory.data(), memory.bytes());
  ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
  munmap(memory.data() + 16 * kPage, kPage);
  ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
  EXPECT_EQ(count(bits_.run().check[0].bits.checked), 0u);
  EXPECT_EQ(count(bits_.run().check[1].bits.checked), std::size_t{HT_GRANULE_PAGES});
}

TEST_F(AccessedBits, PagesOfALargeFolioEachHaveTheirOwn) {
  write_file("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "always");
  Memory memory(kHuge / 2, kSlowNode, true);  // too small for a huge page
  write_file("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "never");
  std::size_t large = 0;
  for (ht_page_t page : mover().walk(getpid(), memory.data(), memory.bytes(), HT_TIER_SLOW)) large += HT_PAGE_ORDER(page) == 4;
  ASSERT_GT(large, 0u) << "no 64 KiB folio was to be had";
  bits_.add(getpid(), memory.data(), memory.bytes());
  ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
  for (std::size_t page = 0; page < memory.pages(); page += 16) memory.data()[page * kPage] = 1;
  ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
  EXPECT_EQ(count(bits_.run().check[0].bits.set), memory.pages() / 16);
}

TEST_F(AccessedBits, OneFlushAStepWhereBitsWereCleared) {
  constexpr std::size_t kBytes = 64 << 20;
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t worker = fork();
  if (!worker) {  // on another CPU, all the time
    Memory memory(kBytes, kSlowNode);
    char* data = memory.data();
    (void)!write(ready[1], &data, sizeof data);
    for (;;)
      for (std::size_t i = 0; i < kBytes; i += kPage) data[i]++;
  }
  char* data = nullptr;
  ASSERT_EQ(read(ready[0], &data, sizeof data), static_cast<ssize_t>(sizeof data));
  bits_.add(worker, data, kBytes);
  FlushCounter counter;
  std::uint64_t visits = 0, ns = 0, set = 0;
  constexpr unsigned kRounds = 20;
  for (unsigned round = 0; round < kRounds; round++) {
    counter.start();
    for (auto phase : {HT_CHECK_CLEAR, HT_CHECK_TEST}) {
      ASSERT_EQ(bits_.step(phase), 0);
      visits += bits_.run().visits;
      ns += bits_.run().ns;
      EXPECT_EQ(bits_.run().flush_calls, phase == HT_CHECK_CLEAR ? 1u : 0u);
      if (phase == HT_CHECK_CLEAR) usleep(20000);
    }
    counter.stop();
    for (__u32 i = 0; i < bits_.run().nr; i++) set += count(bits_.run().check[i].bits.set);
  }
  auto flushes = counter.stop();
  // Idle: the first step may still find bits to clear, the second does not.
  kill(worker, SIGSTOP);
  usleep(100000);
  for (int round = 0; round < 2; round++) {
    for (__u32 i = 0; i < bits_.run().nr; i++) std::memset(&bits_.run().check[i].bits.set, 0, sizeof bits_.run().check[i].bits.set);
    ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
    if (round) EXPECT_EQ(bits_.run().flush_calls, 0u);
  }
  kill(worker, SIGKILL);
  waitpid(worker, nullptr, 0);
  std::printf("bits: %lu page-table entries read, %lu ns each (emulated), %lu seen set; flushes: %lu batched, %lu by range, %lu remote\n",
              visits, ns / std::max<std::uint64_t>(visits, 1), set, flushes.batch, flushes.range, flushes.remote);
  EXPECT_EQ(visits, kRounds * 2 * kBytes / kPage);
  EXPECT_GT(set, 0u);
  EXPECT_EQ(flushes.range, kRounds);
  EXPECT_EQ(flushes.batch, 0u);
  EXPECT_LE(flushes.remote, kRounds);
}

// Pages that are touched all the time by a process that is never switched out,
// few enough for the TLB to hold them all: are they seen?
TEST_F(AccessedBits, TheTlbHidesNothing) {
  for (std::size_t pages : {64, 512, 4096, 16384}) {
    int ready[2];
    ASSERT_EQ(pipe(ready), 0);
    pid_t worker = fork();
    if (!worker) {
      Memory memory(std::max(pages * kPage, kHuge), kSlowNode);
      char* data = memory.data();
      (void)!write(ready[1], &data, sizeof data);
      for (;;)
        for (std::size_t i = 0; i < pages; i++) data[i * kPage]++;
    }
    char* data = nullptr;
    ASSERT_EQ(read(ready[0], &data, sizeof data), static_cast<ssize_t>(sizeof data));
    close(ready[0]);
    close(ready[1]);
    std::printf("bits: %5zu pages touched all the time, share seen after", pages);
    for (unsigned ms : {1, 4, 16, 64, 256}) {
      double share = 0;
      for (int round = 0; round < 4; round++) {
        bits_.clear();
        bits_.add(worker, data, pages * kPage);
        ASSERT_EQ(bits_.step(HT_CHECK_CLEAR), 0);
        usleep(ms * 1000);
        ASSERT_EQ(bits_.step(HT_CHECK_TEST), 0);
        for (__u32 i = 0; i < bits_.run().nr; i++) share += static_cast<double>(count(bits_.run().check[i].bits.set)) / static_cast<double>(4 * pages);
      }
      std::printf(" %u ms %.3f", ms, share);
      if (ms >= 64) EXPECT_GT(share, 0.95) << pages << " pages, " << ms << " ms";
    }
    std::printf("\n");
    kill(worker, SIGKILL);
    waitpid(worker, nullptr, 0);
  }
}

TEST_F(AccessedBits, WhatIsNotThere) {
  Memory memory(kHuge, kSlowNode);
  std::uint64_t space = mover().space_of(getpid());
  bits_.add(getpid(), space + 12345, 1);                                     // another space than pid has
  bits_.add(0x7fffffff, space, 1);                                           // no such process
  bits_.add(getpid(), space, ~0ull);                                         // no user address
  bits_.add(getpid(), space, (0xffff800000000000ull) >> HT_GRANULE_SHIFT);   // the kernel's
  bits_.add(getpid(), space, 0x100000000000ull >> HT_GRANULE_SHIFT);         // nothing mapped
  bits_.add(getpid(), memory.data(), memory.bytes());
  for (auto phase : {HT_CHECK_CLEAR, HT_CHECK_TEST}) {
    ASSERT_EQ(bits_.step(phase), 0);
    int expected[] = {-ESRCH, -ESRCH, -EINVAL, -EINVAL, 0, 0};
    for (int i = 0; i < 6; i++) {
      EXPECT_EQ(bits_.run().check[i].error, expected[i]) << i;
      EXPECT_EQ(count(bits_.run().check[i].bits.checked), i == 5 ? std::size_t{HT_GRANULE_PAGES} : 0u) << i;
    }
  }
  bits_.run().nr = HT_CHECKS_MAX + 1;
  EXPECT_EQ(bits_.step(HT_CHECK_CLEAR), -EINVAL);
  bits_.run().nr = 1;
  EXPECT_EQ(bits_.step(static_cast<ht_check_phase>(2)), -EINVAL);
}

}  // namespace
}  // namespace hypertier::test
