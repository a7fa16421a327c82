// SPDX-License-Identifier: GPL-2.0-or-later
// ht-bench-micro: what single steps cost, as ratios in one run inside the lab.
// Under icount the guest's clock counts instructions of all CPUs together.
#include <bpf/bpf.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <numaif.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <fstream>
#include <thread>
#include <unordered_map>

#include <CLI/CLI.hpp>

#include "../../tests/e2e/pipeline/harness.hpp"
#include "adapter/module.hpp"
#include "adapter/mover.hpp"
#include "system.hpp"

using namespace hypertier;
using e2e::Child;
using e2e::die;
using e2e::json;

namespace {

json figures = json::array();

std::string format(const char* pattern, auto... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

void figure(const std::string& what, const std::string& value, const std::string& goal, std::optional<bool> holds, json numbers) {
  json entry = {{"what", what}, {"figure", value}, {"goal", goal}, {"numbers", std::move(numbers)}};
  if (holds) entry["holds"] = *holds;
  std::printf("%-64s %s%s\n", what.c_str(), value.c_str(), holds ? *holds ? "  (holds)" : "  (DOES NOT HOLD)" : "");
  std::fflush(stdout);
  figures.push_back(entry);
}

uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
}

template <class F>
uint64_t timed(F&& f) {
  const uint64_t start = now_ns();
  f();
  return now_ns() - start;
}

// ---------------------------------------------------------------- sampling

// The virtual PEBS on each CPU.
class Events {
 public:
  Events(uint64_t period, bool ring) {
    perf_event_attr attr{};
    attr.size = sizeof attr;
    attr.type = static_cast<uint32_t>(std::stoul(e2e::read_file("/sys/bus/event_source/devices/vpebs/type")));
    attr.sample_period = period;
    attr.sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT;
    attr.exclude_kernel = 1;
    attr.disabled = 1;
    if (ring) {
      attr.watermark = 1;  // wakes up its reader when half full, as a thrifty collector does
      attr.wakeup_watermark = kRing / 2;
    } else {
      attr.wakeup_events = 1;
    }
    for (int cpu = 0; cpu < static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); cpu++) {
      int fd = static_cast<int>(syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC));
      if (fd < 0) die("cannot open the virtual PEBS");
      fds_.push_back(fd);
      if (ring) {
        void* map = mmap(nullptr, kRing + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) die("cannot map the perf ring buffer");
        rings_.push_back(static_cast<perf_event_mmap_page*>(map));
      }
    }
  }
  ~Events() {
    for (auto* ring : rings_) munmap(ring, kRing + 4096);
    for (int fd : fds_) close(fd);
  }
  // A program that looks at nothing and says that the sample is dealt with.
  void attach_empty() {
    const bpf_insn code[] = {{BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, 0}, {BPF_JMP | BPF_EXIT, 0, 0, 0, 0}};
    program_ = bpf_prog_load(BPF_PROG_TYPE_PERF_EVENT, "empty", "GPL", code, 2, nullptr);
    if (program_ < 0) die("cannot load an empty BPF program");
    for (int fd : fds_)
      if (ioctl(fd, PERF_EVENT_IOC_SET_BPF, program_)) die("cannot attach a BPF program to the virtual PEBS");
    close(program_);
  }
  void enable(bool on) {
    for (int fd : fds_) ioctl(fd, on ? PERF_EVENT_IOC_ENABLE : PERF_EVENT_IOC_DISABLE, 0);
  }
  const std::vector<int>& fds() const { return fds_; }

  struct Record {
    perf_event_header header;
    uint32_t pid, tid;
    uint64_t address, weight, source;
  };
  template <class F>
  uint64_t drain(F&& use) {
    uint64_t count = 0;
    for (auto* ring : rings_) {
      const char* data = reinterpret_cast<const char*>(ring) + 4096;
      uint64_t tail = ring->data_tail;
      const uint64_t head = __atomic_load_n(&ring->data_head, __ATOMIC_ACQUIRE);
      while (tail < head) {
        Record record;
        const uint64_t at = tail % kRing, first = std::min<uint64_t>(sizeof record, kRing - at);
        std::memcpy(&record, data + at, first);
        if (first < sizeof record) std::memcpy(reinterpret_cast<char*>(&record) + first, data, sizeof record - first);
        if (record.header.type == PERF_RECORD_SAMPLE) use(record), count++;
        tail += record.header.size;
      }
      __atomic_store_n(&ring->data_tail, tail, __ATOMIC_RELEASE);
    }
    return count;
  }

 private:
  static constexpr uint64_t kRing = 1 << 18;
  std::vector<int> fds_;
  std::vector<perf_event_mmap_page*> rings_;
  int program_ = -1;
};

uint64_t delivered() { return std::stoull(e2e::read_file("/sys/bus/event_source/devices/vpebs/stats/delivered")); }

void sampling(const std::string& build, uint64_t accesses) {
  constexpr uint64_t kPeriod = 37;
  Child hotset({"hotset", "--place", "slow", "--size", "256M", "--hot", "64M"});
  hotset.expect("ready");
  const std::string run = "run " + std::to_string(accesses);
  auto work = [&] { return timed([&] { hotset.ask(run, "done"); }); };
  work();
  const uint64_t plain = work();

  uint64_t empty, empty_samples;
  {
    Events events(kPeriod, false);
    events.attach_empty();
    events.enable(true);
    const uint64_t before = delivered();
    empty = work();
    empty_samples = delivered() - before;
  }
  // The user-space route: the kernel copies each sample into a ring buffer, a
  // thread takes it out and counts it by page.
  uint64_t shipped, shipped_samples = 0;
  {
    Events events(kPeriod, true);
    std::unordered_map<uint64_t, uint32_t> counts;
    counts.reserve(1 << 18);
    std::atomic<bool> stop = false;
    events.enable(true);
    std::thread reader([&] {
      while (!stop) {
        std::vector<pollfd> polls;
        for (int fd : events.fds()) polls.push_back({fd, POLLIN, 0});
        poll(polls.data(), polls.size(), 100);
        shipped_samples += events.drain([&](const Events::Record& record) { counts[record.address >> 12 ^ uint64_t{record.pid} << 40]++; });
      }
      shipped_samples += events.drain([&](const Events::Record& record) { counts[record.address >> 12 ^ uint64_t{record.pid} << 40]++; });
    });
    shipped = timed([&] {
      hotset.ask(run, "done");
      events.enable(false);
      stop = true;
      reader.join();
    });
  }
  bench::SystemOptions options{"static", build, build + "/bench/micro.tierd.log", kPeriod, {}};
  auto system = bench::make_system(options);
  system->prepare();
  bench::Memory memory(hotset.pid());
  system->start(memory, hotset.pid());
  work();  // the sampler gets to know the granules
  const json before = system->counters();
  const uint64_t ours = work();
  const json after = system->counters();
  auto delta = [&](const char* name) { return after.at(name).get<double>() - before.at(name).get<double>(); };

  const double user_ns = (static_cast<double>(shipped) - static_cast<double>(empty)) / static_cast<double>(shipped_samples);
  const double ours_samples = delta("samples_total");
  const double sampler_ns = delta("sampler_ns_total") / delta("sampler_runs_total");
  const double pmu_ns = (static_cast<double>(empty) - static_cast<double>(plain)) / static_cast<double>(empty_samples);
  const double whole_ns = (static_cast<double>(ours) - static_cast<double>(empty)) / ours_samples;
  figure("sampler beside shipping each sample to user space, per sample", format("%.0f ns against %.0f ns: %.1f x", sampler_ns, user_ns, user_ns / sampler_ns), ">= 5 x",
         user_ns >= 5 * sampler_ns, {{"sampler_ns", sampler_ns}, {"user_ns", user_ns}, {"samples", {empty_samples, shipped_samples, ours_samples}}, {"virtual_pmu_ns", pmu_ns}});
  figure("whole pipeline without moves, per sample (epochs, policy, tierd included)", format("%.0f ns: %.1f x cheaper", whole_ns, user_ns / whole_ns), "-", std::nullopt, {{"ns", whole_ns}});
  const double density = ours_samples / std::max(1.0, delta("epochs_total")) / 65536;
  const double overhead = (static_cast<double>(ours) - static_cast<double>(empty)) / static_cast<double>(empty);
  figure("no-op policy seated (static): share of all instructions, without the virtual PMU", format("%.2f %% at s = %.2f of 256 MiB", 100 * overhead, density), "<= 1 %",
         overhead <= 0.01, {{"plain_ns", plain}, {"empty_ns", empty}, {"seated_ns", ours}, {"s", density}});

  // Idle: seated, and nothing runs.
  {
    e2e::FlushCounter flushes;
    const uint64_t base = flushes.calls()["tierd"];
    sleep(10);
    const uint64_t calls = flushes.calls()["tierd"] - base;
    figure("flush calls of tierd in 10 s of an idle machine, policy seated", format("%llu", static_cast<unsigned long long>(calls)), "0", calls == 0, {{"calls", calls}});
  }

  // Swap against unload and load. hyperplace and static in turn.
  auto swap_ns = [&](bool whole) {
    std::vector<uint64_t> each;
    for (int i = 0; i < 8; i++) {
      const char* policy = i % 2 ? "static" : "hyperplace";
      each.push_back(timed([&] {
        if (whole) e2e::tierctl({"unload"});
        e2e::tierctl({"load", policy});
      }));
    }
    std::sort(each.begin(), each.end());
    return static_cast<double>(each[each.size() / 2]) / 1e6;
  };
  const double swap = swap_ns(false), reload = swap_ns(true);
  figure("swap of a policy beside unload and load (tierctl included, median of 8)", format("%.0f ms against %.0f ms of virtual time: %.1f x", swap, reload, reload / swap), "-", std::nullopt,
         {{"swap_ms", swap}, {"reload_ms", reload}});
  e2e::tierctl({"unload"});
  system->stop();
  if (!hotset.ask("stop", "stopped").at("ok")) die("hotset found wrong memory");
}

// ------------------------------------------------------------------ moving

void moving() {
  constexpr size_t kBytes = 48 << 20, kPages = kBytes / 4096;
  prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
  struct Shared {
    char* memory[2];
  };
  int ready[2];
  if (pipe(ready)) die("pipe");
  // Somebody else's pages, as always: a process that works on them.
  const pid_t pid = fork();
  if (pid == 0) {
    Shared shared{};
    for (int node = 0; node < 2; node++) {
      shared.memory[node] = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      unsigned long mask = 1UL << node;
      mbind(shared.memory[node], kBytes, MPOL_BIND, &mask, 64, 0);
      for (size_t i = 0; i < kBytes; i += 4096) shared.memory[node][i] = 1;
      mbind(shared.memory[node], kBytes, MPOL_DEFAULT, nullptr, 0, 0);
    }
    (void)!write(ready[1], &shared, sizeof shared);
    for (;;)
      for (size_t i = 0; i < kBytes; i += 4096 * 16) shared.memory[0][i]++, shared.memory[1][i]++, usleep(1);
  }
  Shared shared;
  if (read(ready[0], &shared, sizeof shared) != sizeof shared) die("the process to move did not start");
  auto module = Module::open();
  if (!module) die(module.error().message);
  if (auto set = module->set_tiers({{1, 2}}); !set) die(set.error().message);
  auto mover = Mover::open();
  if (!mover) die(mover.error().message);
  (*mover)->spaces().nr = 1;
  (*mover)->spaces().req[0] = {};
  (*mover)->spaces().req[0].pid = static_cast<__u32>(pid);
  if (auto done = (*mover)->run_spaces(); !done) die(done.error().message);
  const __u64 space = (*mover)->spaces().req[0].space;

  int hot = 1;  // whose pages are slow now
  auto exchange = [&](__u32 flags, double& per_page) {
    auto pairs = (*mover)->pairs();
    for (size_t i = 0; i < kPages; i++)
      pairs[i] = {.hot_space = space, .hot_addr = reinterpret_cast<__u64>(shared.memory[hot] + i * 4096), .cold_space = space,
                  .cold_addr = reinterpret_cast<__u64>(shared.memory[1 - hot] + i * 4096), .hot_pid = static_cast<__u32>(pid),
                  .cold_pid = static_cast<__u32>(pid), .hot_result = 0, .cold_result = 0, .mover = 0, ._pad = 0, .user = 0};
    ht_exchange_run run{};
    run.nr = kPages;
    run.flags = flags;
    const uint64_t ns = timed([&] {
      if (auto done = (*mover)->run_exchange(run); !done) die(done.error().message);
    });
    hot = 1 - hot;
    per_page = static_cast<double>(ns) / static_cast<double>(std::max<__u64>(1, run.promoted_pages + run.demoted_pages));
    return run.promoted_pages + run.demoted_pages;
  };
  auto move_pages_twice = [&](double& per_page) {
    std::vector<void*> out(kPages), in(kPages);
    for (size_t i = 0; i < kPages; i++) out[i] = shared.memory[1 - hot] + i * 4096, in[i] = shared.memory[hot] + i * 4096;
    std::vector<int> slow(kPages, 1), fast(kPages, 0), status(kPages, -1);
    uint64_t moved = 0;
    const uint64_t ns = timed([&] {
      move_pages(pid, kPages, out.data(), slow.data(), status.data(), MPOL_MF_MOVE);
      moved += static_cast<uint64_t>(std::count(status.begin(), status.end(), 1));
      move_pages(pid, kPages, in.data(), fast.data(), status.data(), MPOL_MF_MOVE);
      moved += static_cast<uint64_t>(std::count(status.begin(), status.end(), 0));
    });
    hot = 1 - hot;
    per_page = static_cast<double>(ns) / static_cast<double>(std::max<uint64_t>(1, moved));
    return moved;
  };
  double swapped_ns[2], migrated_ns, called_ns;
  const uint64_t swapped = exchange(HT_EXCHANGE_NO_MIGRATE, swapped_ns[0]);
  const uint64_t called = move_pages_twice(called_ns);
  exchange(HT_EXCHANGE_NO_MIGRATE, swapped_ns[1]);
  const uint64_t migrated = exchange(HT_EXCHANGE_NO_SWAP, migrated_ns);
  const double ns = (swapped_ns[0] + swapped_ns[1]) / 2;
  const json numbers = {{"exchange_ns_per_page", ns}, {"move_pages_ns_per_page", called_ns}, {"migrate_ns_per_page", migrated_ns}, {"pages", {swapped, called, migrated}}};
  figure("exchange beside two move_pages calls, per page moved", format("%.0f ns against %.0f ns: %.1f x", ns, called_ns, called_ns / ns), ">= 3 x", called_ns >= 3 * ns, numbers);
  figure("exchange beside the module's own migrate, per page moved", format("%.0f ns against %.0f ns: %.1f x", ns, migrated_ns, migrated_ns / ns), "-", std::nullopt, numbers);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

}  // namespace

int main(int argc, char** argv) {
  std::string build, out;
  uint64_t accesses = 4000000;
  CLI::App app{"what single steps cost, inside the lab: use ./run bench micro"};
  app.add_option("--build", build)->required();
  app.add_option("--out", out)->required();
  app.add_option("--accesses", accesses);
  CLI11_PARSE(app, argc, argv);
  e2e::write_file("/proc/sys/kernel/numa_balancing", "0");
  sampling(build, accesses);
  moving();
  std::ofstream(out) << figures.dump(1) << "\n";
  return 0;
}
