// SPDX-License-Identifier: GPL-2.0-or-later
// ht-bench-micro: what single steps cost, as ratios in one run inside the lab.
// Under icount the guest's clock counts instructions of all CPUs together.
#include <numaif.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/mman.h>
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
#include "events.hpp"
#include "system.hpp"

using namespace hypertier;
using bench::Events;
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

uint64_t delivered() { return std::stoull(e2e::read_file("/sys/bus/event_source/devices/vpebs/stats/delivered")); }

void sampling(const std::string& build, uint64_t accesses, bool only_sampler) {
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
  bench::SystemOptions options{.name = "static", .build = build, .log = build + "/bench/micro.tierd.log", .period = kPeriod, .settings = {}};
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

  auto end = [&] {
    e2e::tierctl({"unload"});
    system->stop();
    if (!hotset.ask("stop", "stopped").at("ok")) die("hotset found wrong memory");
  };
  if (only_sampler) return end();

  // Idle: seated, and nothing runs.
  {
    e2e::FlushCounter flushes;
    const uint64_t base = flushes.by("tierd").calls;
    sleep(10);
    const uint64_t calls = flushes.by("tierd").calls - base;
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
  end();
}

// ------------------------------------------------------------------ scopes

// The same work by 1, 2 and 4 processes, each in a cgroup with a policy of its
// own. Under icount the clock counts the instructions of all CPUs: what the work
// takes longer than with nothing loaded is what the whole system adds.
void scopes(const std::string& build, uint64_t accesses) {
  constexpr uint64_t kPeriod = 37, kSizeMiB = 256, kHotMiB = 64;
  json numbers = json::array();
  std::string text;
  for (const uint64_t count : {1, 2, 4}) {
    auto cgroup = [](uint64_t i) { return "/micro" + std::to_string(i); };
    std::vector<std::unique_ptr<Child>> children;
    for (uint64_t i = 0; i < count; i++) {
      children.push_back(std::make_unique<Child>(e2e::inside(
          cgroup(i), {"hotset", "--place", "slow", "--size", std::to_string(kSizeMiB / count) + "M", "--hot", std::to_string(kHotMiB / count) + "M", "--seed", std::to_string(i + 1)})));
      children.back()->expect("ready");
    }
    auto work = [&] {
      return static_cast<double>(timed([&] {
        for (auto& child : children) child->send("run " + std::to_string(accesses / count));
        for (auto& child : children) child->expect("done");
      }));
    };
    work();
    double plain;
    {
      Events events(kPeriod, false);  // the virtual PMU's own cost is not the system's
      events.attach_empty();
      events.enable(true);
      plain = work();
    }
    bench::SystemOptions options{.name = "heattree", .build = build, .log = build + "/bench/micro.tierd.log", .cgroup = cgroup(0), .period = kPeriod, .settings = {}};
    auto system = bench::make_system(options);
    system->prepare();
    bench::Memory memory(children[0]->pid());
    system->start(memory, children[0]->pid());
    for (uint64_t i = 1; i < count; i++) e2e::tierctl({"load", "heattree", "--cgroup", cgroup(i)});
    auto total = [&] {
      json sum = {{"epochs_total", 0}, {"samples_total", 0}, {"promoted_pages_total", 0}, {"demoted_pages_total", 0}};
      const json status = e2e::tierctl({"status"});
      for (const json& scope : status.at("scopes"))
        for (auto& [name, value] : sum.items()) value = value.get<uint64_t>() + scope.at("counters").value(name, uint64_t{0});
      return sum;
    };
    auto seated = [&](json& change) {
      const json before = total();
      const double ns = work();
      change = total();
      for (auto& [name, value] : change.items()) value = value.get<uint64_t>() - before.at(name).get<uint64_t>();
      return ns;
    };
    json moving, settled;
    const double first = seated(moving), last = seated(settled);
    for (uint64_t i = count; i-- > 0;) e2e::tierctl({"unload", "--cgroup", cgroup(i)});
    system->stop();
    for (auto& child : children)
      if (!child->ask("stop", "stopped").at("ok")) die("hotset found wrong memory");
    for (int i = 0; e2e::run({"rmmod", "hypertier"}).status != 0; i++) {  // after a grace period
      if (i == 20) die("hypertier.ko cannot be unloaded");
      usleep(100000);
    }
    constexpr double kInstructionNs = 2, kEpochNs = 5e8;
    auto per_epoch = [&](double ns) { return (ns - plain) / kInstructionNs / (ns / kEpochNs) / 1e6; };  // millions, all scopes
    text += format("%s%llu: %.0f and %.0f M (%.0f and %.0f %%)", text.empty() ? "" : ", ", static_cast<unsigned long long>(count), per_epoch(first), per_epoch(last), 100 * (first - plain) / first, 100 * (last - plain) / last);
    numbers.push_back({{"scopes", count}, {"plain_ns", plain}, {"moving_ns", first}, {"settled_ns", last}, {"moving", moving}, {"settled", settled}});
  }
  figure("the whole system's own instructions an epoch of 0.5 s with 1, 2 and 4 scopes, the same work (heattree; while it moves, and after)", text, "-", std::nullopt, numbers);
}

// ------------------------------------------------------------------ moving

// By the clock on the wall: run it without --icount, whose one clock would count
// what the other process does as time of the move.
void moving(const std::string& build) {
  e2e::run({"insmod", build + "/bpf/kmod/hypertier.ko"});  // may be there already
  constexpr size_t kBytes = 64 << 20, kPages = kBytes / 4096;
  prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
  struct Shared {
    char* memory[2];
  };
  int ready[2];
  if (pipe(ready)) die("pipe");
  // Somebody else's pages, as always: a process whose two threads work on them.
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
    auto work = [&shared](size_t own) {
      for (;;)
        for (size_t i = own * 64; i < kBytes; i += 4096) shared.memory[0][i]++, shared.memory[1][i]++;
    };
    std::thread other(work, 1);
    work(2);
  }
  Shared shared;
  if (read(ready[0], &shared, sizeof shared) != sizeof shared) die("the process to move did not start");
  auto module = Module::open();
  if (!module) die(module.error().message);
  if (auto set = module->set_tiers({{1, 2}}); !set) die(set.error().message);
  auto programs = load_programs({.moves = true});
  if (!programs) die(programs.error().message);
  auto mover = Mover::open(*programs);
  if (!mover) die(mover.error().message);
  (*mover)->spaces().nr = 1;
  (*mover)->spaces().req[0] = {};
  (*mover)->spaces().req[0].pid = static_cast<__u32>(pid);
  if (auto done = (*mover)->run_spaces(); !done) die(done.error().message);
  const __u64 space = (*mover)->spaces().req[0].space;

  int hot = 1;  // whose pages are slow now
  struct Moved {
    uint64_t pages = 0;
    std::vector<double> ns;  // per page, each round
  };
  auto median = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  };
  // All of both memories, so many pairs a call.
  auto round = [&](size_t batch, Moved& moved, auto&& move) {
    uint64_t pages = 0;
    const uint64_t ns = timed([&] {
      for (size_t first = 0; first < kPages; first += batch) pages += move(first, std::min(batch, kPages - first));
    });
    hot = 1 - hot;
    moved.pages += pages;
    moved.ns.push_back(static_cast<double>(ns) / static_cast<double>(std::max<uint64_t>(1, pages)));
  };
  auto exchange = [&](size_t batch, __u32 flags, Moved& moved) {
    round(batch, moved, [&](size_t first, size_t count) {
      auto pairs = (*mover)->pairs();
      for (size_t i = 0; i < count; i++)
        pairs[i] = {.hot_space = space, .hot_addr = reinterpret_cast<__u64>(shared.memory[hot] + (first + i) * 4096), .cold_space = space,
                    .cold_addr = reinterpret_cast<__u64>(shared.memory[1 - hot] + (first + i) * 4096), .hot_pid = static_cast<__u32>(pid),
                    .cold_pid = static_cast<__u32>(pid), .hot_result = 0, .cold_result = 0, .mover = 0, ._pad = 0, .user = 0};
      ht_exchange_run run{};
      run.nr = static_cast<__u32>(count);
      run.flags = flags;
      if (auto done = (*mover)->run_exchange(run); !done) die(done.error().message);
      return run.promoted_pages + run.demoted_pages;
    });
  };
  auto move_pages_twice = [&](size_t batch, Moved& moved) {
    round(batch, moved, [&](size_t first, size_t count) {
      uint64_t pages = 0;
      for (int node : {1, 0}) {  // room is made first
        std::vector<void*> list(count);
        for (size_t i = 0; i < count; i++) list[i] = shared.memory[node == 1 ? 1 - hot : hot] + (first + i) * 4096;
        const std::vector<int> nodes(count, node);
        std::vector<int> status(count, -1);
        move_pages(pid, count, list.data(), nodes.data(), status.data(), MPOL_MF_MOVE);
        pages += static_cast<uint64_t>(std::count(status.begin(), status.end(), node));
      }
      return pages;
    });
  };
  // What an epoch moves in a guest of 256 MiB and one of 4 GiB of fast memory or more. In
  // turn, and compared round by round, so that whatever else the machine does hits all alike.
  constexpr int kRounds = 11;
  for (size_t batch : {size_t{256}, size_t{4096}}) {
    Moved swapped, called, migrated;
    for (int i = 0; i < kRounds; i++) {
      exchange(batch, HT_EXCHANGE_NO_MIGRATE, swapped);
      move_pages_twice(batch, called);
      exchange(batch, HT_EXCHANGE_NO_SWAP, migrated);
    }
    const json numbers = {{"exchange_ns_per_page", median(swapped.ns)}, {"move_pages_ns_per_page", median(called.ns)},
                          {"migrate_ns_per_page", median(migrated.ns)}, {"pairs_a_call", batch}, {"rounds", kRounds},
                          {"pages", {swapped.pages, called.pages, migrated.pages}}};
    auto beside = [&](const char* what, const Moved& other, bool goal) {
      std::vector<double> ratios;
      for (size_t i = 0; i < other.ns.size(); i++) ratios.push_back(other.ns[i] / swapped.ns[i]);
      const auto [low, high] = std::minmax_element(ratios.begin(), ratios.end());
      figure(format("exchange beside %s, %zu pairs a call", what, batch),
             format("%.1f x as many pages a second (%d rounds: %.1f to %.1f)", median(ratios), kRounds, *low, *high), goal ? ">= 3 x" : "-",
             goal ? std::optional(median(ratios) >= 3) : std::nullopt, numbers);
    };
    beside("two move_pages calls", called, batch == 256);
    beside("the module's own migrate", migrated, false);
  }
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

}  // namespace

int main(int argc, char** argv) {
  std::string build, out;
  std::string only;
  uint64_t accesses = 4000000;
  CLI::App app{"what single steps cost, inside the lab: use ./run bench micro"};
  app.add_option("--build", build)->required();
  app.add_option("--out", out)->required();
  app.add_option("--accesses", accesses);
  app.add_option("--only", only, "sampler: the first figure; sampling, moving, scopes")->check(CLI::IsMember({"sampler", "sampling", "moving", "scopes"}));
  CLI11_PARSE(app, argc, argv);
  e2e::write_file("/proc/sys/kernel/numa_balancing", "0");
  if (only == "scopes") scopes(build, accesses);
  else if (only != "moving") sampling(build, accesses, only == "sampler");
  if (only.empty() || only == "moving") moving(build);
  std::ofstream(out) << figures.dump(1) << "\n";
  return 0;
}
