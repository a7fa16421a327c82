// SPDX-License-Identifier: GPL-2.0-or-later
// What a move costs in TLB flushes, beside move_pages(2) and the kernel's own
// tiering (numa_balancing=2) in the same VM.
#include "flushes.hpp"

#include <bpf/libbpf.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <numaif.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <thread>

#include "harness.hpp"

namespace hypertier::test {

// As in flushes.bpf.c.
struct FlushCounter::Values {
  std::uint32_t watched;
  std::uint32_t pad;
  Counts counts;
};

FlushCounter::FlushCounter()
    : object_(bpf_object__open_file((build_dir + "/tests/e2e/kmod/flushes.bpf.o").c_str(), nullptr)) {
  if (!object_ || bpf_object__load(object_)) throw std::runtime_error("flushes.bpf.o does not load");
  int i = 0;
  bpf_program* program;
  bpf_object__for_each_program(program, object_) {
    links_[i] = bpf_program__attach(program);
    if (!links_[i++]) throw std::runtime_error("a kprobe cannot be attached");
  }
  int fd = bpf_map__fd(bpf_object__find_map_by_name(object_, ".bss"));
  values_ = static_cast<Values*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  if (values_ == MAP_FAILED) throw std::runtime_error("flushes.bpf.o has no .bss");
  reset();
}
FlushCounter::~FlushCounter() {
  for (void* link : links_) bpf_link__destroy(static_cast<bpf_link*>(link));
  munmap(values_, kPage);
  bpf_object__close(object_);
}
void FlushCounter::start(bool all) { values_->watched = all ? 0 : gettid(); }
FlushCounter::Counts FlushCounter::stop() {
  values_->watched = ~0u;
  return values_->counts;
}
void FlushCounter::reset() { *values_ = {.watched = ~0u, .pad = 0, .counts = {}}; }

namespace {

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof set, &set);
}

// A process whose threads, one on each CPU given, write to its memory all the time.
class Worker {
 public:
  Worker(std::initializer_list<int> cpus, std::size_t bytes, bool huge) : bytes_(bytes) {
    int ready[2];
    if (pipe(ready)) throw std::runtime_error("pipe");
    pid_ = fork();
    if (!pid_) {
      pin(*cpus.begin());
      auto* slow = new Memory(bytes, kSlowNode, huge);
      auto* fast = new Memory(bytes, kFastNode, huge);
      for (int cpu : cpus)
        if (cpu != *cpus.begin()) std::thread([=] { pin(cpu); work(slow, fast); }).detach();
      usleep(200000);
      char* data[2] = {slow->data(), fast->data()};
      (void)!write(ready[1], data, sizeof data);
      work(slow, fast);
    }
    (void)!read(ready[0], data_, sizeof data_);
    close(ready[0]);
    close(ready[1]);
  }
  ~Worker() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  int pid() const { return pid_; }
  std::vector<ht_page_t> hot() const { return mover().walk(pid_, data_[0], bytes_, HT_TIER_SLOW); }
  std::vector<ht_page_t> cold() const { return mover().walk(pid_, data_[1], bytes_, HT_TIER_FAST); }

 private:
  [[noreturn]] static void work(Memory* slow, Memory* fast) {
    for (;;)
      for (std::size_t i = 0; i < slow->bytes(); i += kPage) slow->data()[i]++, fast->data()[i]++;
  }
  std::size_t bytes_;
  pid_t pid_;
  char* data_[2] = {};
};

void print(const char* what, std::uint64_t pages, const FlushCounter::Counts& counts) {
  std::printf("flushes: %-42s %7lu page moves, %6lu batched, %6lu by range; %6lu remote, %6lu local; a remote one per %.0f\n",
              what, pages, counts.batch, counts.range, counts.remote, counts.local(),
              counts.remote ? static_cast<double>(pages) / counts.remote : 0.0);
}

class Flushes : public testing::Test {
 protected:
  void SetUp() override {
    sched_getaffinity(0, sizeof old_, &old_);
    pin(0);
    write_file("/proc/sys/kernel/numa_balancing", "0");
  }
  void TearDown() override {
    sched_setaffinity(0, sizeof old_, &old_);
    write_file("/proc/sys/kernel/numa_balancing", "0");
  }
  ht_exchange_run exchange(const Worker& worker, FlushCounter::Counts& counts) {
    auto hot = worker.hot(), cold = worker.cold();
    counter_.reset();
    auto& run = mover().exchange();
    std::uint64_t space = mover().space_of(worker.pid());
    for (std::size_t i = 0; i < hot.size(); i++)
      mover().pairs()[i] = {.hot_space = space, .hot_addr = HT_PAGE_ADDR(hot[i]), .cold_space = space,
                            .cold_addr = HT_PAGE_ADDR(cold[i]), .hot_pid = static_cast<__u32>(worker.pid()),
                            .cold_pid = static_cast<__u32>(worker.pid())};
    run = {};
    run.nr = static_cast<__u32>(std::min(hot.size(), cold.size()));
    counter_.start();
    int err = mover().call("exchange_run");
    counts = counter_.stop();
    EXPECT_EQ(err, 0);
    return run;
  }

  Device device_;
  FlushCounter counter_;
  cpu_set_t old_;
};

TEST_F(Flushes, OneABatch) {
  Worker worker({1, 0}, 16 << 20, false);
  FlushCounter::Counts counts;
  ht_exchange_run run = exchange(worker, counts);
  std::uint64_t pages = run.promoted_pages + run.demoted_pages;
  print("exchange, threads on both CPUs", pages, counts);
  EXPECT_GE(pages, 2 * 4096 * 95 / 100);
  // of 1024 pairs, and one more of the pages in another CPU's LRU batch
  EXPECT_GE(run.batches, 4u);
  EXPECT_LE(run.batches, 5u);
  // page-table entries: one a batch; the few pages of another kind are batched by the kernel
  EXPECT_GE(counts.range, 4u);
  EXPECT_EQ(counts.batch + counts.range, run.flush_calls);
  EXPECT_LE(counts.remote, run.batches);
  EXPECT_LE(counts.batch + counts.range, pages / 450);
}

TEST_F(Flushes, HugePagesCostOneEach) {
  Worker worker({1, 0}, 8 << 20, true);
  FlushCounter::Counts counts;
  ht_exchange_run run = exchange(worker, counts);
  std::uint64_t pages = run.promoted_pages + run.demoted_pages;
  print("exchange, huge pages", pages, counts);
  ASSERT_GE(pages, 2048u);
  EXPECT_LE(counts.remote, pages / 512);
}

// An mm that has run on the mover's CPU alone: nobody is interrupted, and still one a batch,
// where the kernel's own unmapping flushes each page locally.
TEST_F(Flushes, OneABatchOnTheMoversCpuToo) {
  Worker worker({0}, 8 << 20, false);
  FlushCounter::Counts counts;
  ht_exchange_run run = exchange(worker, counts);
  std::uint64_t pages = run.promoted_pages + run.demoted_pages;
  print("exchange, one thread on the mover's CPU", pages, counts);
  EXPECT_EQ(counts.remote, 0u);
  EXPECT_LE(counts.batch + counts.range, pages / 450);
  Worker other({1}, 8 << 20, false);
  run = exchange(other, counts);
  pages = run.promoted_pages + run.demoted_pages;
  print("exchange, one thread on another CPU", pages, counts);
  EXPECT_LE(counts.batch + counts.range, pages / 450);
}

// Reads a file through its mapping, waits, and reads it again.
class Reader {
 public:
  explicit Reader(const std::string& path) {
    if (pipe(ready_) || pipe(go_)) throw std::runtime_error("pipe");
    pid_ = fork();
    if (!pid_) {
      const int fd = open(path.c_str(), O_RDONLY);
      const std::size_t bytes = static_cast<std::size_t>(lseek(fd, 0, SEEK_END)) / kPage * kPage;
      auto* data = static_cast<char*>(mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0));
      if (fd < 0 || data == MAP_FAILED) _exit(2);
      const std::uint64_t sum = sum_of(data, bytes);
      std::uint64_t said[2] = {reinterpret_cast<std::uint64_t>(data), bytes};
      (void)!write(ready_[1], said, sizeof said);
      (void)!read(go_[0], said, 1);
      _exit(sum_of(data, bytes) != sum);
    }
    std::uint64_t said[2] = {};
    if (read(ready_[0], said, sizeof said) != sizeof said) throw std::runtime_error("cannot map " + path);
    data_ = reinterpret_cast<char*>(said[0]);
    bytes_ = said[1];
  }
  ~Reader() {
    for (int fd : {ready_[0], ready_[1], go_[0], go_[1]}) close(fd);
  }
  // True: it read the same.
  bool again() {
    int status = -1;
    (void)!write(go_[1], "", 1);
    waitpid(pid_, &status, 0);
    return status == 0;
  }
  std::uint64_t rss_pages() const { return field(read_file("/proc/" + std::to_string(pid_) + "/status"), "RssFile:") / 4; }
  std::vector<ht_page_t> on(enum ht_tier tier) const { return mover().walk(pid_, data_, bytes_, tier); }
  int pid() const { return pid_; }

 private:
  static std::uint64_t sum_of(const char* data, std::size_t bytes) {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i + sizeof sum <= bytes; i += sizeof sum) {
      std::uint64_t word;
      memcpy(&word, data + i, sizeof word);
      sum = sum * 31 + word;
    }
    return sum;
  }
  int ready_[2], go_[2];
  pid_t pid_;
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Of a process that sleeps, on whose pages the kernel's unmapping would spend a flush each.
TEST_F(Flushes, PagesOfFilesThatAreReadCostOneABatch) {
  Reader reader(build_dir + "/bin/ht-bench");
  const std::uint64_t rss = reader.rss_pages();
  const auto cold = reader.on(HT_TIER_FAST);
  ASSERT_GE(cold.size(), 200u);
  counter_.reset();
  counter_.start();
  const ht_exchange_run run = mover().move(0, {}, reader.pid(), cold);
  const FlushCounter::Counts counts = counter_.stop();
  print("migrate, pages of a file", run.demoted_pages, counts);
  EXPECT_GE(run.demoted_pages, cold.size() * 95 / 100);
  EXPECT_LE(counts.batch + counts.range, 2 * run.batches);
  EXPECT_LE(counts.batch + counts.range, run.flush_calls);
  // its statistics know that they are not mapped any more
  EXPECT_LE(reader.rss_pages(), rss - run.demoted_pages);
  EXPECT_TRUE(reader.again());
}

TEST_F(Flushes, BesideMovePagesAndNumaBalancing) {
  {
    Worker worker({1, 0}, 16 << 20, false);
    std::uint64_t moved = 0;
    auto hot = worker.hot(), cold = worker.cold();
    FlushCounter::Counts counts;
    // as much room as it needs: one direction after the other, as a user would
    for (auto [list, node] : {std::pair{&cold, kSlowNode}, std::pair{&hot, kFastNode}}) {
      std::vector<void*> pages;
      for (ht_page_t page : *list) pages.push_back(reinterpret_cast<void*>(HT_PAGE_ADDR(page)));
      std::vector<int> nodes(pages.size(), node), status(pages.size(), -1);
      counter_.start();
      move_pages(worker.pid(), pages.size(), pages.data(), nodes.data(), status.data(), MPOL_MF_MOVE);
      counts = counter_.stop();
      for (int at : status) moved += at == node;
    }
    print("move_pages(2)", moved, counts);
    EXPECT_GT(moved, 1000u);
  }
  const std::string debug = "/sys/kernel/debug/sched/numa_balancing/";
  for (auto [knob, value] : {std::pair{"scan_delay_ms", "100"}, {"scan_period_min_ms", "100"}, {"hot_threshold_ms", "10000"}})
    write_file(debug + knob, value);
  Worker worker({1, 0}, 16 << 20, false);
  std::uint64_t before = vmstat("pgpromote_success"), promoted = 0;
  counter_.reset();
  write_file("/proc/sys/kernel/numa_balancing", "2");
  counter_.start(true);
  for (int i = 0; i < 40 && promoted < 4096; i++) {
    usleep(500000);
    promoted = vmstat("pgpromote_success") - before;
  }
  auto counts = counter_.stop();
  print("numa_balancing=2, all tasks, promoted", promoted, counts);
}

}  // namespace
}  // namespace hypertier::test
