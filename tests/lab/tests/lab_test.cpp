// SPDX-License-Identifier: GPL-2.0-or-later
// The lab tests itself, inside the lab: is the truth true, does a sample reach
// the process that made it, is none lost. One boot runs all of it.
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <numaif.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include <bpf/bpf.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace {

using nlohmann::json;
constexpr std::size_t kMiB = 1 << 20;
constexpr std::size_t kBufferBytes = 24 * kMiB;  // several times the simulated cache
const std::string kPmu = "/sys/bus/event_source/devices/vpebs/";

std::uint64_t read_number(const std::string& path) {
  std::uint64_t value = ~0ull;
  std::ifstream(path) >> value;
  return value;
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream out(path);
  out << text;
  out.flush();
  ASSERT_TRUE(out) << "cannot write " << text << " to " << path;
}

json labctl(const std::string& arguments) {
  FILE* pipe = popen(("labctl " + arguments).c_str(), "r");
  std::string text(1 << 16, 0);
  text.resize(fread(text.data(), 1, text.size(), pipe));
  EXPECT_EQ(pclose(pipe), 0) << "labctl " << arguments;
  return json::parse(text, nullptr, false);
}

struct Stats {
  std::uint64_t produced, drained, delivered, lost, unmatched, unused, hidden;
  static Stats now() {
    auto n = [](const char* name) { return read_number(kPmu + "stats/" + name); };
    return {n("produced"), n("drained"), n("delivered"), n("lost"), n("unmatched"), n("unused"), n("batch_hidden")};
  }
  Stats operator-(const Stats& b) const {
    return {produced - b.produced, drained - b.drained, delivered - b.delivered, lost - b.lost,
            unmatched - b.unmatched, unused - b.unused, hidden - b.hidden};
  }
};

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  ASSERT_EQ(sched_setaffinity(0, sizeof(set), &set), 0);
}

// A process that reads and writes random lines of its buffer. Buffers of two
// workers never overlap, so an address tells whose it is. It runs from go()
// to done(), both hand-shakes, and keeps its memory until it is destroyed.
class Worker {
 public:
  Worker(int index, int cpu, std::array<std::size_t, 2> node_bytes, std::uint64_t accesses)
      : base_(0x100000000000ull + std::uint64_t(index) * 0x10000000000ull) {
    EXPECT_EQ(pipe(to_), 0);
    EXPECT_EQ(pipe(from_), 0);
    fflush(nullptr);
    pid_ = fork();
    if (pid_ == 0) child(cpu, node_bytes, accesses);
    wait_byte();
  }
  ~Worker() {
    close(to_[1]);
    waitpid(pid_, nullptr, 0);
    close(to_[0]);
    close(from_[0]);
    close(from_[1]);
  }
  void go() { EXPECT_EQ(write(to_[1], "g", 1), 1); }
  void done() { wait_byte(); }
  bool owns(std::uint64_t address) const { return address >= base_ && address < base_ + 0x1000000000ull; }
  int pid() const { return pid_; }

 private:
  void wait_byte() {
    char c;
    EXPECT_EQ(read(from_[0], &c, 1), 1) << "a worker died";
  }
  [[noreturn]] void child(int cpu, std::array<std::size_t, 2> node_bytes, std::uint64_t accesses) {
    close(to_[1]);
    pin(cpu);
    std::size_t bytes = node_bytes[0] + node_bytes[1];
    auto* memory = static_cast<char*>(mmap(reinterpret_cast<void*>(base_), bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    if (memory == MAP_FAILED) _exit(1);
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    char* at = memory;
    for (unsigned long node = 0; node < 2; at += node_bytes[node++]) {
      unsigned long mask = 1ul << node;
      if (node_bytes[node] && mbind(at, node_bytes[node], MPOL_BIND, &mask, 8, 0)) _exit(1);
    }
    memset(memory, 1, bytes);
    char c = 'r';
    if (write(from_[1], &c, 1) != 1) _exit(1);
    if (read(to_[0], &c, 1) != 1) _exit(1);
    std::uint64_t x = 88172645463325252ull + base_, lines = bytes / 64;
    for (std::uint64_t i = 0; i < accesses; i++) {
      x ^= x << 13, x ^= x >> 7, x ^= x << 17;
      volatile char* line = memory + (x % lines) * 64;
      if (x >> 62) (void)*line;
      else *line = char(x);
      if (i % 3000 == 0) sched_yield();
    }
    c = 'd';
    if (write(from_[1], &c, 1) != 1) _exit(1);
    if (read(to_[0], &c, 1) < 0) _exit(1);
    _exit(0);
  }

  std::uint64_t base_;
  int to_[2], from_[2];
  pid_t pid_;
};

struct Sample {
  std::uint32_t pid, tid;
  std::uint64_t address, weight, source;
};

class Event {
 public:
  Event(int pid, int cpu, std::uint64_t period, unsigned long flags = 0, bool wakeup = true) {
    perf_event_attr attr{};
    attr.size = sizeof(attr);
    attr.type = read_number(kPmu + "type");
    attr.sample_period = period;
    attr.sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_ADDR | PERF_SAMPLE_WEIGHT | PERF_SAMPLE_DATA_SRC;
    attr.exclude_kernel = attr.exclude_hv = attr.disabled = 1;
    attr.wakeup_events = wakeup;
    fd_ = syscall(SYS_perf_event_open, &attr, pid, cpu, -1, flags | PERF_FLAG_FD_CLOEXEC);
    EXPECT_GE(fd_, 0) << strerror(errno);
    map_ = static_cast<char*>(mmap(nullptr, kRing + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0));
    EXPECT_NE(map_, MAP_FAILED) << strerror(errno);
  }
  ~Event() {
    munmap(map_, kRing + 4096);
    close(fd_);
  }
  void enable() { EXPECT_EQ(ioctl(fd_, PERF_EVENT_IOC_ENABLE, 0), 0); }
  void disable() { EXPECT_EQ(ioctl(fd_, PERF_EVENT_IOC_DISABLE, 0), 0); }
  int fd() const { return fd_; }

  std::vector<Sample> samples() {
    auto* page = reinterpret_cast<perf_event_mmap_page*>(map_);
    std::uint64_t head = __atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE), tail = page->data_tail;
    std::vector<Sample> out;
    std::vector<char> record;
    while (tail < head) {
      perf_event_header header;
      copy(&header, tail, sizeof(header));
      if (header.type == PERF_RECORD_SAMPLE) {
        Sample s;
        copy(&s, tail + sizeof(header), sizeof(s));
        out.push_back(s);
      } else {
        EXPECT_NE(header.type, PERF_RECORD_LOST) << "the ring buffer overflowed";
        EXPECT_NE(header.type, PERF_RECORD_THROTTLE) << "perf throttled the event";
      }
      tail += header.size;
    }
    page->data_tail = tail;
    return out;
  }

 private:
  static constexpr std::size_t kRing = 8 * kMiB;
  void copy(void* to, std::uint64_t at, std::size_t n) {
    for (std::size_t i = 0; i < n; i++) static_cast<char*>(to)[i] = map_[4096 + (at + i) % kRing];
  }
  int fd_;
  char* map_;
};

// --------------------------------------------------------------------- truth

double truth_with(std::size_t fast, std::size_t slow) {
  Worker worker(0, 0, {fast, slow}, 1'500'000);
  labctl("truth --reset --json");
  worker.go();
  worker.done();
  json answer = labctl("truth --json");
  json mine = labctl("truth --json --pid " + std::to_string(worker.pid()));
  json place = labctl("place --json " + std::to_string(worker.pid()));
  EXPECT_GT(answer.at("fast_accesses").get<std::uint64_t>() + answer.at("slow_accesses").get<std::uint64_t>(), 1'000'000u);
  EXPECT_NEAR(place.at("fast_pages").get<double>(), double(fast >> 12), 1000);
  EXPECT_NEAR(place.at("slow_pages").get<double>(), double(slow >> 12), 500);
  EXPECT_EQ(mine.at("pages_lost_accesses"), 0);
  std::printf("fast %zu MiB, slow %zu MiB: hit ratio %.5f, of the process alone %.5f\n", fast / kMiB, slow / kMiB,
              answer.at("fast_hit_ratio").get<double>(), mine.at("fast_hit_ratio").get<double>());
  EXPECT_NEAR(answer.at("fast_hit_ratio").get<double>(), mine.at("fast_hit_ratio").get<double>(), 0.005);
  return answer.at("fast_hit_ratio");
}

TEST(Truth, AllFast) { EXPECT_NEAR(truth_with(kBufferBytes, 0), 1.0, 0.005); }
TEST(Truth, Half) { EXPECT_NEAR(truth_with(kBufferBytes / 2, kBufferBytes / 2), 0.5, 0.005); }
TEST(Truth, AllSlow) { EXPECT_NEAR(truth_with(0, kBufferBytes), 0.0, 0.005); }

// The page counts must add up to the truth, and the best possible placement
// follows from them: random lines, so n % of the pages give n % of the hits.
TEST(Truth, PageCountsAndBestRatio) {
  Worker worker(0, 0, {kBufferBytes / 2, kBufferBytes / 2}, 1'000'000);
  labctl("truth --reset --json");
  worker.go();
  worker.done();
  json all = labctl("truth --json --best 12M --pid " + std::to_string(worker.pid()));
  EXPECT_NEAR(all.at("best_fast_hit_ratio").get<double>(), 0.5, 0.05);
  EXPECT_GT(all.at("best_fast_hit_ratio").get<double>(), 0.5);
  EXPECT_GE(all.at("pages_counted").get<std::uint64_t>(), kBufferBytes >> 12);
  json modelled = labctl("modelled --penalty-ns 100 --json");
  EXPECT_EQ(modelled.at("modelled_ns").get<std::uint64_t>(),
            modelled.at("window_ns").get<std::uint64_t>() + 100 * modelled.at("slow_accesses").get<std::uint64_t>());
}

// A reset starts at zero at once, without waiting, however often.
TEST(Truth, ResetIsAHandshake) {
  for (int i = 0; i < 10; i++) {
    labctl("truth --reset --json");
    json after = labctl("truth --json --best 256M");
    EXPECT_LT(after.at("fast_accesses").get<std::uint64_t>(), 30'000u);
    EXPECT_LT(after.at("pages_counted").get<std::uint64_t>(), 5'000u);
  }
}

// ------------------------------------------------------------------- samples

struct Attribution {
  std::size_t right = 0, wrong = 0, elsewhere = 0;
};

// Two processes on one CPU, one's memory fast and the other's slow: no sample
// may carry one's pid and the other's address, or another node than the page.
void attribution(std::size_t want, std::uint64_t accesses) {
  Worker a(0, 0, {kBufferBytes, 0}, accesses), b(1, 0, {0, kBufferBytes}, accesses);
  const std::string group = "/sys/fs/cgroup/lab_test";
  mkdir(group.c_str(), 0755);
  write_file(group + "/cgroup.procs", std::to_string(a.pid()));
  int cgroup = open(group.c_str(), O_RDONLY | O_CLOEXEC);
  Stats before = Stats::now();
  Attribution per_cpu, per_task, per_cgroup;
  {
    constexpr std::uint64_t period = 20;
    Event cpu_event(-1, 0, period), task_event(a.pid(), -1, period), cgroup_event(cgroup, 0, period, PERF_FLAG_PID_CGROUP);
    for (Event* e : {&cpu_event, &task_event, &cgroup_event}) e->enable();
    a.go();
    b.go();
    a.done();
    b.done();
    for (Event* e : {&cpu_event, &task_event, &cgroup_event}) e->disable();
    auto count = [&](Event& event, Attribution& r, bool only_a) {
      for (const Sample& s : event.samples()) {
        const Worker *self = int(s.pid) == a.pid() ? &a : int(s.pid) == b.pid() ? &b : nullptr;
        bool in_a = a.owns(s.address), in_b = b.owns(s.address);
        if (!in_a && !in_b && (!only_a || self == &a)) r.elsewhere++;
        else if (self && self->owns(s.address) && (!only_a || in_a)) r.right++;
        else r.wrong++;
        perf_mem_data_src source{.val = s.source};
        if (!in_a && !in_b) continue;
        EXPECT_EQ(source.mem_remote, in_b);
        EXPECT_EQ(s.weight, in_b ? 250u : 80u);
      }
    };
    count(cpu_event, per_cpu, false);
    count(task_event, per_task, true);
    count(cgroup_event, per_cgroup, true);
  }
  close(cgroup);
  write_file("/sys/fs/cgroup/cgroup.procs", std::to_string(a.pid()));
  rmdir(group.c_str());
  Stats stats = Stats::now() - before;
  std::printf("attribution: cpu %zu right %zu wrong %zu elsewhere, task %zu/%zu/%zu, cgroup %zu/%zu/%zu; "
              "produced %lu, unmatched %lu, lost %lu\n",
              per_cpu.right, per_cpu.wrong, per_cpu.elsewhere, per_task.right, per_task.wrong, per_task.elsewhere,
              per_cgroup.right, per_cgroup.wrong, per_cgroup.elsewhere, stats.produced, stats.unmatched, stats.lost);
  EXPECT_EQ(per_cpu.wrong + per_task.wrong + per_cgroup.wrong, 0u);
  EXPECT_GE(per_cpu.right, want);
  EXPECT_GE(per_task.right, want / 2 * 0.9);
  EXPECT_GE(per_cgroup.right, want / 2 * 0.9);
  EXPECT_EQ(stats.lost, 0u);
  EXPECT_EQ(labctl("vpebs --json").at("stale_total"), 0);
}

TEST(Samples, TwoProcessesOnOneCpu) { attribution(50'000, 700'000); }

TEST(Samples, TwoProcessesOnOneCpuFromNmi) {
  write_file("/sys/module/vpebs/parameters/nmi", "1");
  attribution(20'000, 300'000);
  write_file("/sys/module/vpebs/parameters/nmi", "0");
}

TEST(Samples, NoneLostAtTheDefaultPeriod) {
  std::uint64_t period = read_number(kPmu + "default_period");
  Worker a(0, 0, {kBufferBytes, 0}, 1'500'000), b(1, 1, {0, kBufferBytes}, 1'500'000);
  Event event0(-1, 0, period), event1(-1, 1, period);
  Stats before = Stats::now();
  json misses = labctl("truth --reset --json");
  event0.enable();
  event1.enable();
  a.go();
  b.go();
  a.done();
  b.done();
  event0.disable();
  event1.disable();
  misses = labctl("truth --json");
  Stats stats = Stats::now() - before;
  double expected = (misses.at("fast_accesses").get<double>() + misses.at("slow_accesses").get<double>()) / double(period);
  std::printf("default period %lu: produced %lu (%.0f expected), delivered %lu, unmatched %lu, unused %lu, lost %lu\n", period,
              stats.produced, expected, stats.delivered, stats.unmatched, stats.unused, stats.lost);
  EXPECT_EQ(stats.lost, 0u);
  EXPECT_EQ(stats.drained, stats.produced);
  EXPECT_EQ(stats.delivered + stats.unmatched + stats.unused, stats.produced);
  EXPECT_LE(stats.unmatched + stats.unused, stats.produced / 100);
  EXPECT_NEAR(double(stats.produced), expected, expected * 0.01);
  EXPECT_EQ(event0.samples().size() + event1.samples().size(), stats.delivered);
}

// ---------------------------------------------------------------- large PEBS

// A BPF program that counts its calls in map[0], as the sampler would see them.
int counting_program(int map) {
  const bpf_insn code[] = {
      {BPF_ST | BPF_MEM | BPF_W, 10, 0, -4, 0},                       // *(u32 *)(fp - 4) = 0
      {BPF_ALU64 | BPF_MOV | BPF_X, 2, 10, 0, 0},                     // r2 = fp
      {BPF_ALU64 | BPF_ADD | BPF_K, 2, 0, 0, -4},                     // r2 -= 4
      {BPF_LD | BPF_DW | BPF_IMM, 1, BPF_PSEUDO_MAP_FD, 0, map},      // r1 = map
      {0, 0, 0, 0, 0},
      {BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_map_lookup_elem},
      {BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 2, 0},                        // if (r0 == 0) goto out
      {BPF_ALU64 | BPF_MOV | BPF_K, 1, 0, 0, 1},
      {BPF_STX | BPF_ATOMIC | BPF_DW, 0, 1, 0, BPF_ADD},              // lock *(u64 *)r0 += 1
      {BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, 0},                      // out:
      {BPF_JMP | BPF_EXIT, 0, 0, 0, 0},
  };
  return bpf_prog_load(BPF_PROG_TYPE_PERF_EVENT, "count", "GPL", code, std::size(code), nullptr);
}

struct Seen {
  std::uint64_t by_bpf, delivered;
  double share() const { return double(by_bpf) / double(delivered); }
};

Seen seen_by_bpf(bool wakeup) {
  int map = bpf_map_create(BPF_MAP_TYPE_ARRAY, "calls", 4, 8, 1, nullptr);
  int program = counting_program(map);
  EXPECT_GE(program, 0) << strerror(errno);
  Worker worker(0, 0, {kBufferBytes, 0}, 400'000);
  Event event(worker.pid(), -1, 47, 0, wakeup);
  EXPECT_EQ(ioctl(event.fd(), PERF_EVENT_IOC_SET_BPF, program), 0) << strerror(errno);
  Stats before = Stats::now();
  event.enable();
  worker.go();
  worker.done();
  event.disable();
  Stats stats = Stats::now() - before;
  std::uint32_t key = 0;
  std::uint64_t calls = 0;
  bpf_map_lookup_elem(map, &key, &calls);
  close(program);
  close(map);
  EXPECT_GT(stats.delivered, 5000u);
  return {calls, stats.delivered};
}

// The trap that the source has to avoid: with large PEBS only one record of a
// batch reaches BPF, unless attr.wakeup_events is 1.
TEST(LargePebs, HidesSamplesFromBpfUnlessWakeupEvents) {
  Seen plain = seen_by_bpf(false);
  write_file("/sys/module/vpebs/parameters/large_pebs", "1");
  Seen large = seen_by_bpf(false), guarded = seen_by_bpf(true);
  write_file("/sys/module/vpebs/parameters/large_pebs", "0");
  std::printf("samples that BPF sees: %.4f; with large PEBS %.4f, and wakeup_events=1 %.4f\n", plain.share(), large.share(),
              guarded.share());
  EXPECT_EQ(plain.by_bpf, plain.delivered);
  EXPECT_LT(large.share(), 0.2);
  EXPECT_EQ(guarded.by_bpf, guarded.delivered);
}

// ------------------------------------------------------------------ the guest

TEST(Guest, UpInFiveSecondsOfItsOwnClock) {
  const char* clock = getenv("LAB_CLOCK");
  ASSERT_NE(clock, nullptr);
  std::printf("guest clock at hand-over: %s s\n", clock);
  EXPECT_LT(std::stod(clock), 5.0);
}

TEST(Guest, HasTwoTiersAndItsFileSystems) {
  std::string tiers;
  for (int tier = 0; tier < 256; tier++) {
    std::ifstream file("/sys/devices/virtual/memory_tiering/memory_tier" + std::to_string(tier) + "/nodelist");
    if (std::string nodes; file >> nodes) tiers += "[" + nodes + "]";
  }
  EXPECT_EQ(tiers, "[0][1]");
  std::ifstream controllers("/sys/fs/cgroup/cgroup.subtree_control");
  std::string text((std::istreambuf_iterator<char>(controllers)), {});
  for (const char* name : {"memory", "cpu", "cpuset", "pids"}) EXPECT_NE(text.find(name), std::string::npos) << name;
  for (const char* path : {"/sys/fs/bpf", "/sys/kernel/tracing/events", "/dev/shm", "/sys/kernel/debug/sched"})
    EXPECT_EQ(access(path, F_OK), 0) << path;
}

}  // namespace
