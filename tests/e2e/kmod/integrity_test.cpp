// SPDX-License-Identifier: GPL-2.0-or-later
// Many moves while everything else that changes memory goes on: no write is
// lost, nothing leaks. The victims live in a process of their own; this one
// walks it and swaps whatever it finds, at random.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <numaif.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <fstream>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include "bits.hpp"
#include "flushes.hpp"
#include "harness.hpp"

namespace hypertier::test {
namespace {

// Shared by both processes.
struct Shared {
  std::atomic<bool> ready, stop;
  std::atomic<std::uint64_t> writes, lost, forks, remaps, discards, file_writes, foreign_moves, pageouts;
  char first_loss[128];
};

std::uint64_t word(std::uint64_t page, std::uint64_t version, std::uint64_t i) {
  return (page * 0x9e3779b97f4a7c15 ^ version * 0xc2b2ae3d27d4eb4f) + i;
}

constexpr int kWords = 16;  // a page is written and checked at 16 places

void stamp(char* page, std::uint64_t id, std::uint64_t version) {
  for (int i = 0; i < kWords; i++) *reinterpret_cast<std::uint64_t*>(page + i * kPage / kWords) = word(id, version, i);
}
bool intact(const char* page, std::uint64_t id, std::uint64_t version) {
  for (int i = 0; i < kWords; i++)
    if (*reinterpret_cast<const std::uint64_t*>(page + i * kPage / kWords) != word(id, version, i)) return false;
  return true;
}

class Victim {
 public:
  explicit Victim(Shared& shared) : shared_(shared) {
    for (int node : {kSlowNode, kFastNode}) {
      add(24 << 20, node, false);
      add(8 << 20, node, true);
    }
    // not aligned and too small for 2 MiB: these become 64 KiB folios
    add(kHuge + kHuge / 2, kSlowNode, true);
  }

  int run() {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 2; i++) threads.emplace_back([this, i] { write_and_check(i); });
    threads.emplace_back([this] { map_and_unmap(); });
    threads.emplace_back([this] { discard(); });
    threads.emplace_back([this] { write_to_file(); });
    threads.emplace_back([this] { fork_and_write(); });
    threads.emplace_back([this] { advise_and_move(); });
    threads.emplace_back([this] { merge(); });
    shared_.ready = true;
    for (auto& thread : threads) thread.join();
    for (std::size_t id = 0; id < pages_.size(); id++)
      if (!intact(pages_[id], id, versions_[id])) lose("final check", id);
    return shared_.lost ? 1 : 0;
  }

 private:
  void add(std::size_t bytes, int node, bool huge) {
    auto& memory = regions_.emplace_back(bytes, node, huge);
    for (std::size_t i = 0; i < memory.pages(); i++) {
      stamp(memory.data() + i * kPage, pages_.size(), 0);
      pages_.push_back(memory.data() + i * kPage);
      versions_.push_back(0);
    }
  }

  void lose(const char* who, std::uint64_t id) {
    if (!shared_.lost++) std::snprintf(shared_.first_loss, sizeof shared_.first_loss, "%s, page %lu", who, id);
  }

  void write_and_check(unsigned mine) {
    std::mt19937_64 random(mine);
    while (!shared_.stop) {
      std::size_t id = random() % (pages_.size() / 2) * 2 + mine;
      if (!intact(pages_[id], id, versions_[id])) lose("writer", id);
      stamp(pages_[id], id, ++versions_[id]);
      shared_.writes++;
    }
  }

  void map_and_unmap() {
    constexpr std::size_t bytes = 64 * kPage;
    for (std::uint64_t version = 1; !shared_.stop; version++) {
      char* data = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (version % 2) place(data, bytes, kSlowNode);
      for (std::size_t i = 0; i < 64; i++) stamp(data + i * kPage, i, version);
      mprotect(data, bytes, PROT_READ);
      for (std::size_t i = 0; i < 64; i++)
        if (!intact(data + i * kPage, i, version)) lose("after mprotect", i);
      mprotect(data, bytes, PROT_READ | PROT_WRITE);
      usleep(2000);
      char* moved = static_cast<char*>(mremap(data, bytes, 2 * bytes, MREMAP_MAYMOVE));
      for (std::size_t i = 0; i < 64; i++) {
        if (!intact(moved + i * kPage, i, version)) lose("after mremap", i);
        stamp(moved + i * kPage, i, version + 1);
      }
      madvise(moved, bytes / 2, MADV_DONTNEED);
      for (std::size_t i = 0; i < 32; i++)
        if (*reinterpret_cast<std::uint64_t*>(moved + i * kPage)) lose("after MADV_DONTNEED", i);
      for (std::size_t i = 32; i < 64; i++)
        if (!intact(moved + i * kPage, i, version + 1)) lose("before munmap", i);
      munmap(moved, 2 * bytes);
      shared_.remaps++;
    }
  }

  // MADV_DONTNEED does not wait for a move: it takes away what is on its way.
  void discard() {
    std::mt19937_64 random(5);
    for (int node : {kSlowNode, kFastNode}) discarded_.emplace_back(4 << 20, node);
    for (std::uint64_t version = 1; !shared_.stop; version++) {
      char* page = discarded_[random() % 2].data() + random() % 1024 * kPage;
      madvise(page, kPage, MADV_DONTNEED);
      for (int i = 0; i < kWords; i++)
        if (*reinterpret_cast<std::uint64_t*>(page + i * kPage / kWords)) lose("after MADV_DONTNEED of a page", version);
      stamp(page, version, version);
      if (!intact(page, version, version)) lose("after a discarded page was written anew", version);
      shared_.discards++;
    }
  }

  // What is written into a file shows in a mapping that only reads, whose entries a move drops.
  void write_to_file() {
    constexpr std::size_t kPages = 1024;
    std::mt19937_64 random(6);
    const int fd = open("/tmp/ht-integrity", O_RDWR | O_CREAT | O_TRUNC, 0600);
    unlink("/tmp/ht-integrity");
    if (fd < 0 || ftruncate(fd, kPages * kPage)) return lose("making a file", 0);
    auto* data = static_cast<char*>(mmap(nullptr, kPages * kPage, PROT_READ, MAP_PRIVATE, fd, 0));
    std::vector<std::uint64_t> versions(kPages);
    std::vector<char> page(kPage);
    for (std::uint64_t version = 1; !shared_.stop; version++) {
      const std::size_t id = random() % kPages, other = random() % kPages;
      const auto at = static_cast<off_t>(id * kPage);
      if (versions[id] && !intact(data + id * kPage, id, versions[id])) lose("page of a file", id);
      if (version % 16 == 0) {
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, kPage)) lose("fallocate", id);
        for (std::size_t i = 0; i < kPage; i += kPage / kWords)
          if (*reinterpret_cast<std::uint64_t*>(data + id * kPage + i)) lose("hole in a file", id);
      }
      stamp(page.data(), id, versions[id] = version);
      if (pwrite(fd, page.data(), kPage, at) != static_cast<ssize_t>(kPage)) lose("pwrite", id);
      if (!intact(data + id * kPage, id, version)) lose("page of a file just written", id);
      if (versions[other] && !intact(data + other * kPage, other, versions[other])) lose("other page of a file", other);
      shared_.file_writes++;
    }
    munmap(data, kPages * kPage);
    close(fd);
  }

  // The child shares every page with its parent until one of them writes.
  void fork_and_write() {
    Memory own(1 << 20, kSlowNode);
    for (std::uint64_t version = 1; !shared_.stop; version++) {
      for (std::size_t i = 0; i < own.pages(); i++) stamp(own.data() + i * kPage, i, version);
      pid_t child = fork();
      if (!child) {
        bool ok = true;
        for (std::size_t i = 0; i < own.pages(); i++) {
          ok &= intact(own.data() + i * kPage, i, version);
          stamp(own.data() + i * kPage, i, ~version);
          ok &= intact(own.data() + i * kPage, i, ~version);
        }
        _exit(ok ? 0 : 1);
      }
      int status = 1;
      waitpid(child, &status, 0);
      if (status) lose("forked child", version);
      for (std::size_t i = 0; i < own.pages(); i++)
        if (!intact(own.data() + i * kPage, i, version)) lose("parent of a fork", i);
      shared_.forks++;
      usleep(50000);
    }
  }

  // Paging out, cooling, and the other mover: move_pages(2).
  void advise_and_move() {
    std::mt19937_64 random(99);
    while (!shared_.stop) {
      auto& memory = regions_[random() % regions_.size()];
      char* start = memory.data() + random() % (memory.pages() - 32) * kPage;
      switch (random() % 4) {
        case 0:
          madvise(start, 32 * kPage, MADV_PAGEOUT);
          shared_.pageouts++;
          break;
        case 1:
          madvise(start, 32 * kPage, MADV_COLD);
          break;
        default:
          void* pages[32];
          int nodes[32], status[32];
          for (int i = 0; i < 32; i++) pages[i] = start + i * kPage, nodes[i] = static_cast<int>(random() % 2);
          move_pages(0, 32, pages, nodes, status, MPOL_MF_MOVE);
          for (int i = 0; i < 32; i++) shared_.foreign_moves += status[i] == nodes[i];
      }
      usleep(5000);
    }
  }

  // Equal pages come and go below KSM.
  void merge() {
    Memory own(1 << 20, kFastNode);
    madvise(own.data(), own.bytes(), MADV_MERGEABLE);
    for (unsigned char version = 1; !shared_.stop; version++) {
      std::memset(own.data(), version, own.bytes());
      usleep(300000);
      for (std::size_t i = 0; i < own.bytes(); i += 512)
        if (static_cast<unsigned char>(own.data()[i]) != version) lose("merged page", i);
    }
  }

  Shared& shared_;
  std::deque<Memory> regions_, discarded_;
  std::vector<char*> pages_;
  std::vector<std::uint64_t> versions_;
};

const char* const kResults[] = {"none", "done", "gone", "already", "pinned", "busy",
                                "special", "mismatch", "no memory", "partner", "other"};

// Accessed bits of all that a process has are cleared and tested all the time.
class BitReader {
 public:
  BitReader(int pid, std::uint64_t space) : thread_([=, this](std::stop_token stop) {
    while (!stop.stop_requested()) {
      bits_.clear();
      std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
      std::uint64_t next = 0;
      for (std::string line; std::getline(maps, line);) {
        std::uint64_t start = std::stoull(line, nullptr, 16), end = std::stoull(line.substr(line.find('-') + 1), nullptr, 16);
        for (std::uint64_t granule = std::max(next, start >> HT_GRANULE_SHIFT);
             granule << HT_GRANULE_SHIFT < end && end < 1ull << 47 && bits_.run().nr < 1024; granule++)
          bits_.add(pid, space, granule), next = granule + 1;
      }
      if (bits_.step(HT_CHECK_CLEAR)) failed = true;
      usleep(2000);
      if (bits_.step(HT_CHECK_TEST)) failed = true;
      visits += bits_.run().visits;
    }
  }) {}
  void stop() {
    thread_.request_stop();
    thread_.join();
  }
  std::atomic<std::uint64_t> visits = 0;
  std::atomic<bool> failed = false;

 private:
  Bits bits_;
  std::jthread thread_;
};

TEST(Integrity, NoWriteIsLostWhateverElseRuns) {
  Device device;
  write_file("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "always");
  write_file("/sys/kernel/mm/ksm/pages_to_scan", "1000");
  write_file("/sys/kernel/mm/ksm/sleep_millisecs", "20");
  write_file("/sys/kernel/mm/ksm/run", "1");
  auto* shared = static_cast<Shared*>(
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  pid_t victim = fork();
  if (!victim) {
    Victim* the_victim = new Victim(*shared);
    _exit(the_victim->run());
  }
  while (!shared->ready) {
    int status;
    ASSERT_EQ(waitpid(victim, &status, WNOHANG), 0) << "the victim died";
    usleep(10000);
  }

  std::mt19937_64 random(7);
  ht_exchange_run total{};
  FlushCounter counter;
  std::uint64_t moved = 0, runs = 0, space = mover().space_of(victim);
  std::optional<BitReader> reader;
  if (read_bits) reader.emplace(victim, space);
  while (moved < moves_wanted && !shared->lost) {
    // what it maps now, walked once a tier
    auto& spaces = mover().spaces();
    spaces.nr = 1;
    spaces.req[0] = {.space = space, .seq = 0, .tier_rss_pages = 0, .pid = static_cast<__u32>(victim)};
    ASSERT_EQ(mover().call("spaces_run"), 0);
    ASSERT_EQ(spaces.req[0].error, 0);
    auto& walks = mover().walks();
    walks.nr = 0;
    for (__u32 i = 0; i < spaces.req[0].count; i++) {
      const ht_mapping& mapping = mover().mappings()[spaces.req[0].first + i];
      for (std::uint32_t tier : {HT_TIER_SLOW, HT_TIER_FAST})
        if (mapping.end - mapping.start < 64 << 20)
          walks.walk[walks.nr++] = {.space = space, .start = mapping.start, .end = mapping.end,
                                    .pid = static_cast<__u32>(victim), .list_tier = tier};
    }
    ASSERT_EQ(mover().call("walk"), 0);
    // by tier and size: the pairs that can be swapped in place, then the rest
    std::vector<ht_page_t> lists[HT_TIERS];
    for (__u32 i = 0; i < walks.nr; i++) {
      const ht_walk& walk = walks.walk[i];
      lists[walk.list_tier].insert(lists[walk.list_tier].end(), mover().pages() + walk.list_first,
                                   mover().pages() + walk.list_first + walk.list_count);
    }
    for (auto& list : lists) {
      std::shuffle(list.begin(), list.end(), random);
      std::stable_sort(list.begin(), list.end(), [](auto a, auto b) { return HT_PAGE_ORDER(a) > HT_PAGE_ORDER(b); });
      if (list.size() > 4096) list.erase(list.begin() + 8, list.end() - 4088);
    }
    counter.start();
    // in turn: pairs, and each side alone
    if (runs % 4 == 1) lists[HT_TIER_FAST].clear();
    if (runs % 4 == 3) lists[HT_TIER_SLOW].clear();
    ht_exchange_run run = mover().move(victim, lists[HT_TIER_SLOW], victim, lists[HT_TIER_FAST]);
    counter.stop();
    total.exchanged_pairs += run.exchanged_pairs;
    total.batches += run.batches;
    total.flush_calls += run.flush_calls;
    for (int i = 0; i < HT_MOVERS; i++) total.mover_pages[i] += run.mover_pages[i];
    for (int i = 0; i < HT_MOVE_RESULTS; i++) total.failed_pages[i] += run.failed_pages[i];
    moved += run.promoted_pages + run.demoted_pages;
    if (runs % 100 == 0) std::printf("integrity: %lu page moves so far\n", moved), std::fflush(stdout);
    if (++runs % 8 == 0) write_file("/proc/sys/vm/compact_memory", "1");
    ASSERT_LT(runs, moves_wanted) << "almost nothing moves";
  }
  if (reader) {
    reader->stop();
    EXPECT_FALSE(reader->failed);
    EXPECT_GT(reader->visits, 100000u);
    std::printf("integrity: meanwhile %lu page-table entries had their accessed bits tested\n", reader->visits.load());
  }
  shared->stop = true;
  int status = -1;
  ASSERT_EQ(waitpid(victim, &status, 0), victim);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(shared->lost, 0u) << shared->first_loss;
  write_file("/sys/kernel/mm/ksm/run", "2");
  write_file("/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled", "never");

  std::printf("integrity: %lu page moves (%llu swapped in place, %llu migrated) in %lu runs, %llu batches, %llu batched flushes\n",
              moved, total.mover_pages[HT_MOVER_EXCHANGE], total.mover_pages[HT_MOVER_MIGRATE], runs,
              total.batches, total.flush_calls);
  std::printf("integrity: meanwhile %lu checked writes, %lu into a file, %lu forks, %lu remaps, %lu discards, %lu pages by move_pages, "
              "%lu page-outs\n",
              shared->writes.load(), shared->file_writes.load(), shared->forks.load(), shared->remaps.load(), shared->discards.load(),
              shared->foreign_moves.load(), shared->pageouts.load());
  for (int i = HT_MOVE_GONE; i < HT_MOVE_RESULTS; i++)
    if (total.failed_pages[i]) std::printf("integrity: not moved, %s: %llu\n", kResults[i], total.failed_pages[i]);
  auto flushes = counter.stop();
  std::printf("integrity: the mover's flushes: %lu batched, %lu by range; %lu remote, %lu local; a remote one per %lu page moves\n",
              flushes.batch, flushes.range, flushes.remote, flushes.local(), moved / std::max<std::uint64_t>(flushes.remote, 1));
  // a batch of all kinds has one for its page-table entries, its folios, and migrate
  EXPECT_LE(flushes.remote, moved / 300);
  EXPECT_GE(moved, moves_wanted);
  EXPECT_GT(total.mover_pages[HT_MOVER_EXCHANGE], moved / 4);
  EXPECT_GT(total.mover_pages[HT_MOVER_MIGRATE], moved / 8);
  EXPECT_GT(shared->writes, 1000u);
  EXPECT_GT(shared->forks, 0u);
  EXPECT_GT(shared->remaps, 0u);
  EXPECT_GT(shared->discards, 1000u);
  EXPECT_GT(shared->file_writes, 1000u);
  EXPECT_GT(shared->foreign_moves, 0u);
  EXPECT_EQ(vmstat("nr_isolated_anon"), 0u);
  EXPECT_EQ(vmstat("nr_isolated_file"), 0u);
  munmap(shared, sizeof(Shared));
}

// ----------------------------------------------------------------- cgroups

const std::string kRoot = "/sys/fs/cgroup/";

class Cgroup {
 public:
  explicit Cgroup(const std::string& name) : path_(kRoot + name) { mkdir(path_.c_str(), 0755); }
  ~Cgroup() { rmdir(path_.c_str()); }
  const std::string& path() const { return path_; }
  std::uint64_t current() const { return std::stoull(read_file(path_ + "/memory.current")); }
  // "anon N0=123 N1=456" in bytes -> pages of node
  std::uint64_t pages(const std::string& counter, int node) const {
    std::istringstream lines(read_file(path_ + "/memory.numa_stat"));
    for (std::string line; std::getline(lines, line);)
      if (line.rfind(counter + " ", 0) == 0)
        return std::stoull(line.substr(line.find("N" + std::to_string(node) + "=") + 3)) / kPage;
    throw std::runtime_error("no " + counter + " in memory.numa_stat");
  }

 private:
  std::string path_;
};

// A process of a cgroup that holds memory and does nothing.
class Holder {
 public:
  Holder(const Cgroup& cgroup, int node, bool huge) {
    int ready[2];
    if (pipe(ready)) throw std::runtime_error("pipe");
    pid_ = fork();
    if (!pid_) {
      write_file(cgroup.path() + "/cgroup.procs", std::to_string(getpid()));
      auto* memory = new Memory(kBytes, node, huge);
      char* data = memory->data();
      (void)!write(ready[1], &data, sizeof data);
      for (;;) pause();
    }
    (void)!read(ready[0], &data_, sizeof data_);
    close(ready[0]);
    close(ready[1]);
  }
  ~Holder() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  static constexpr std::size_t kBytes = 8 << 20;
  int pid() const { return pid_; }
  std::vector<ht_page_t> list(std::uint32_t tier, ht_walk& walk) const {
    return mover().walk(pid_, data_, kBytes, tier, &walk);
  }

 private:
  pid_t pid_;
  char* data_ = nullptr;
};

// Statistics of a memcg are flushed lazily, at latest after 2 s.
template <class T>
void eventually_equal(T read, std::int64_t expected, const char* what) {
  std::int64_t value = 0;
  for (int i = 0; i < 100; i++) {
    value = read();
    if (value == expected) return;
    usleep(100000);
  }
  ADD_FAILURE() << what << " is " << value << ", not " << expected;
}

// A new page is on no list before its CPU's batch is full. migrate_pages(2)
// empties every CPU's batch first, and this one has nothing to migrate.
void drain_lru_batches() {
  const unsigned long node = 1UL << kFastNode;
  if (migrate_pages(0, 8 * sizeof node, &node, &node)) throw std::runtime_error("migrate_pages");
}

TEST(Integrity, MemoryCgroupsAgreeWithThePageTables) {
  Device device;
  // a cgroup that is being removed: gone from the tree, held by something
  auto dying = [] { return field(read_file(kRoot + "cgroup.stat"), "nr_dying_descendants"); };
  std::uint64_t dying_before = dying();
  // of one cgroup: by page-table entries; of two: by folios; huge ones; one side alone
  struct Kind {
    bool huge, two, alone;
  };
  for (auto [huge, two, alone] : {Kind{false, false, false}, {false, true, false}, {true, true, false}, {false, true, true}}) {
    Cgroup a("kmod-a"), other("kmod-b");
    Cgroup& b = two ? other : a;
    {
      Holder hot(a, kSlowNode, huge), cold(b, kFastNode, huge);
      ht_walk hot_before, cold_before, hot_after, cold_after;
      auto hot_list = hot.list(HT_TIER_SLOW, hot_before);
      auto cold_list = cold.list(HT_TIER_FAST, cold_before);
      ASSERT_EQ(hot_list.size(), huge ? 4u : 2048u);
      sleep(3);
      std::int64_t charge_a = a.current(), charge_b = b.current();
      std::int64_t stat[2][2], thp[2][2];
      for (int node : {0, 1}) {
        stat[0][node] = a.pages("anon", node), stat[1][node] = b.pages("anon", node);
        thp[0][node] = a.pages("anon_thp", node), thp[1][node] = b.pages("anon_thp", node);
      }
      ht_exchange_run run = mover().move(hot.pid(), hot_list, cold.pid(), alone ? std::vector<ht_page_t>() : cold_list);
      // a page or two may sit in another CPU's LRU batch
      EXPECT_GE(alone ? run.promoted_pages : run.exchanged_pairs, hot_list.size() * 99 / 100);
      EXPECT_LE(run.flush_calls, 8u + 2 * huge * hot_list.size());
      hot.list(HT_TIER_SLOW, hot_after);
      cold.list(HT_TIER_SLOW, cold_after);
      EXPECT_EQ(a.current(), charge_a);
      EXPECT_EQ(b.current(), charge_b);
      for (int node : {0, 1}) {
        int tier = node == kFastNode ? HT_TIER_FAST : HT_TIER_SLOW;
        std::int64_t change_a = hot_after.tier_pages[tier] - hot_before.tier_pages[tier];
        std::int64_t change_b = cold_after.tier_pages[tier] - cold_before.tier_pages[tier];
        EXPECT_GE(std::abs(change_a), 2048 * 99 / 100);
        if (!two) change_a = change_b = change_a + change_b;
        eventually_equal([&] { return a.pages("anon", node); }, stat[0][node] + change_a, "anon of the hot cgroup");
        eventually_equal([&] { return b.pages("anon", node); }, stat[1][node] + change_b, "anon of the cold cgroup");
        eventually_equal([&] { return a.pages("anon_thp", node); }, thp[0][node] + huge * change_a, "anon_thp, hot");
        eventually_equal([&] { return b.pages("anon_thp", node); }, thp[1][node] + huge * change_b, "anon_thp, cold");
        // the LRU lists hold what the page tables do
        auto lru = [&](const Cgroup& cgroup) {
          drain_lru_batches();
          return cgroup.pages("inactive_anon", node) + cgroup.pages("active_anon", node);
        };
        eventually_equal([&] { return lru(a) - a.pages("anon", node); }, 0, "LRU pages beyond anon, hot");
        eventually_equal([&] { return lru(b) - b.pages("anon", node); }, 0, "LRU pages beyond anon, cold");
      }
    }
    eventually_equal([&] { return field(read_file(a.path() + "/memory.stat"), "anon"); }, 0, "anon after the end");
  }
  eventually_equal(dying, dying_before, "dying cgroups");
}

}  // namespace
}  // namespace hypertier::test
