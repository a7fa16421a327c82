// SPDX-License-Identifier: GPL-2.0-or-later
// ht-bench-cell: one workload under one tiering system, inside the lab. Judged
// by the truth of the simulated memory, by where pages really are, and by the
// kernel's own counters; writes one JSON file.
#include <dirent.h>
#include <sched.h>
#include <signal.h>
#include <hypertier/abi.h>
#include <numaif.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <utility>

#include <CLI/CLI.hpp>

#include "../cases.hpp"
#include "../trace.hpp"
#include "adapter/tiers.hpp"
#include "events.hpp"
#include "system.hpp"

using namespace bench;
using e2e::Child;
using e2e::die;
using e2e::json;
using e2e::now_s;

namespace {

const std::string kCgroup = "/bench";  // of the workload, without its driver
constexpr uint64_t kPagesPerBin = 512;  // of the heat map: 2 MiB
constexpr double kVainSeconds = 5;      // 10 epochs

struct Options {
  std::string workload, system, build, out, commit;
  uint64_t seed = 1;
  unsigned seconds = 0, shift_s = 0;
  unsigned window_ms = 2000;
  uint64_t usable_mib = 0, period = 0;
  std::vector<std::string> settings;
  std::string record;
};

// ---------------------------------------------------------- the fast node

// Huge pages, which cannot be moved here, and locked ones for what is left of 2 MiB hold
// down what the workload is not to have: all systems start from the same room, pages in
// the CPUs' lists included. The kernel's watermarks stay what they are by default, its
// tiering works within them.
void hold_down(uint64_t usable_bytes) {
  e2e::write_file("/proc/sys/vm/drop_caches", "3");
  // Nor are they to be raised for a while by what is done here.
  const std::string boost = "/proc/sys/vm/watermark_boost_factor", factor = e2e::read_file(boost);
  e2e::write_file(boost, "0");
  auto tiers = hypertier::discover_tiers();
  if (!tiers) die(tiers.error().message);
  // Pages beyond what is to be left; negative: fewer are free.
  auto beyond = [&] {
    const hypertier::FastZones zones = hypertier::zones_of_fast(*tiers);
    const uint64_t free = e2e::tiers().fast_free_bytes / HT_PAGE_SIZE + zones.listed_pages;
    return static_cast<int64_t>(free) - static_cast<int64_t>(usable_bytes / HT_PAGE_SIZE + zones.watermark_pages);
  };
  const std::string pool = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
  constexpr int64_t kHuge = 512;
  for (int round = 0; round < 3 && beyond() >= kHuge; round++)  // what could not be had at once, after compaction
    e2e::write_file(pool, std::to_string(std::stoll(e2e::read_file(pool)) + beyond() / kHuge));
  for (int64_t pages; (pages = beyond()) > 0 && pages < kHuge;) {
    const size_t bytes = static_cast<size_t>(pages) * HT_PAGE_SIZE;
    const unsigned long fast = 1;
    void* held = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (held == MAP_FAILED || mbind(held, bytes, MPOL_BIND, &fast, 64, 0) || mlock(held, bytes)) die("cannot hold fast memory down");
  }
  e2e::write_file(boost, factor);
  const int64_t left = beyond();
  if (left > kHuge || left < -kHuge) die("the fast node has " + std::to_string(left) + " pages free beyond what it is to have");
}

// The measuring takes no fast memory and has the last CPU, where the workload
// does not run: the kernel flushes the pages of a process that is on no CPU one
// by one, and that is what the measuring would make of it.
void keep_apart(pid_t workload) {
  unsigned long mask = 2;
  set_mempolicy(MPOL_PREFERRED, &mask, 64);
  const size_t last = static_cast<size_t>(sysconf(_SC_NPROCESSORS_ONLN) - 1);
  cpu_set_t own, others;
  CPU_ZERO(&own);
  CPU_ZERO(&others);
  CPU_SET(last, &own);
  for (size_t cpu = 0; cpu < last; cpu++) CPU_SET(cpu, &others);
  sched_setaffinity(0, sizeof own, &own);
  const std::string tasks = "/proc/" + std::to_string(workload) + "/task";
  DIR* dir = opendir(tasks.c_str());
  while (dirent* entry = dir ? readdir(dir) : nullptr)
    if (pid_t task = std::atoi(entry->d_name)) sched_setaffinity(task, sizeof others, &others);
  if (dir) closedir(dir);
}

// --------------------------------------------------------------- workload

struct Workload {
  std::unique_ptr<e2e::Redis> redis;  // server and driver
  std::unique_ptr<Child> server, driver;
  pid_t pid = 0;  // whose memory it is about
  json ready, stopped;

  Child& hand() { return redis ? redis->load : *driver; }
  bool stop() {
    if (redis) {
      redis->stop();  // ends the program if a value was wrong
      return true;
    }
    stopped = driver->ask("stop", "stopped");
    const int status = driver->wait();
    if (server) server->signal(SIGTERM);
    if (server) server->wait();
    return status == 0 && stopped.value("ok", stopped.value("errors_total", 1) == 0);
  }
};

Workload start_workload(const Case& one, uint64_t seed) {
  constexpr uint64_t kKeys = 90000, kValueBytes = 2000;
  Workload workload;
  if (one.command[0] == "redis") {
    workload.redis = std::make_unique<e2e::Redis>(seed, kKeys, kValueBytes, kCgroup);
    workload.pid = workload.redis->server.pid();
    return workload;
  }
  std::vector<std::string> command = one.command;
  if (command[0] == "memcached") {
    const std::string socket = "/tmp/ht-memcached.sock";
    workload.server = std::make_unique<Child>(
        e2e::inside(kCgroup, {"memcached", "-s", socket, "-U", "0", "-m", "512", "-t", "1", "-u", "root"}));
    for (int i = 0; access(socket.c_str(), F_OK) != 0; i++) {
      if (i == 200) die("memcached does not start", "apt-get install memcached");
      usleep(50000);
    }
    command = {"kvload", "--memcached", "--socket", socket, "--keys", std::to_string(kKeys), "--value", std::to_string(kValueBytes)};
  }
  command.insert(command.end(), {"--seed", std::to_string(seed)});
  workload.driver = std::make_unique<Child>(workload.server ? command : e2e::inside(kCgroup, command));
  workload.ready = workload.driver->expect("ready");
  workload.pid = workload.server ? workload.server->pid() : workload.ready.value("pid", workload.driver->pid());
  return workload;
}

// Nothing: it does not count what it does.
std::optional<uint64_t> operations_of(const json& done) {
  for (const char* name : {"operations_total", "accesses_total"})
    if (done.contains(name)) return done[name].get<uint64_t>();
  return std::nullopt;
}

// --------------------------------------------------------------- counters

std::map<std::string, uint64_t> tiering_vmstat() {
  std::map<std::string, uint64_t> all;
  for (const auto& [name, value] : e2e::vmstat())
    for (const char* wanted : {"pgpromote_", "pgdemote_", "pgmigrate_", "numa_hint_faults", "numa_pte_updates", "pswpout", "compact_"})
      if (name.starts_with(wanted)) all[name] = value;
  return all;
}

// Time on a CPU by name of the task, all its threads.
std::map<std::string, uint64_t> cpu_ns() {
  std::map<std::string, uint64_t> all;
  auto each = [](const std::string& dir, auto&& use) {
    DIR* handle = opendir(dir.c_str());
    while (dirent* entry = handle ? readdir(handle) : nullptr)
      if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9') use(dir + "/" + entry->d_name);
    if (handle) closedir(handle);
  };
  each("/proc", [&](const std::string& process) {
    each(process + "/task", [&](const std::string& task) {
      std::string comm = e2e::read_file(task + "/comm");
      if (!comm.empty()) comm.pop_back();
      all[comm] += std::strtoull(e2e::read_file(task + "/schedstat").c_str(), nullptr, 10);
    });
  });
  return all;
}

// What KVM counts of the virtual machine that a process has; empty: it has none.
std::map<std::string, uint64_t> nested_stat(pid_t pid) {
  std::map<std::string, uint64_t> all;
  std::error_code error;
  for (const auto& vm : std::filesystem::directory_iterator("/sys/kernel/debug/kvm", error)) {
    if (!vm.path().filename().string().starts_with(std::to_string(pid) + "-")) continue;
    for (const auto& entry : std::filesystem::directory_iterator(vm.path(), error)) {
      const std::string name = entry.path().filename();
      for (const char* wanted : {"remote_tlb_flush", "tlb_flush", "pf_", "mmu_", "exits", "irq_exits", "halt_exits"})
        if (name.starts_with(wanted) && entry.is_regular_file()) all[name] = std::strtoull(e2e::read_file(entry.path()).c_str(), nullptr, 10);
    }
  }
  return all;
}

json difference(const std::map<std::string, uint64_t>& from, const std::map<std::string, uint64_t>& to, uint64_t least = 1) {
  json all = json::object();
  for (auto& [name, value] : to) {
    auto before = from.find(name);
    const uint64_t base = before == from.end() ? 0 : before->second;
    if (value >= base + least) all[name] = value - base;
  }
  return all;
}

// ------------------------------------------------------------------- pages

// Follows where pages are from one look to the next.
class Tracker {
 public:
  explicit Tracker(std::vector<PagePlace> places) {
    for (const PagePlace& place : places) pages_.push_back({place.page, place.node, -1e9});
  }

  void look(const std::vector<PagePlace>& places, double when) {
    std::vector<Page> next;
    next.reserve(places.size());
    size_t at = 0;
    for (const PagePlace& place : places) {
      while (at < pages_.size() && pages_[at].page < place.page) at++;
      if (at == pages_.size() || pages_[at].page != place.page) {
        next.push_back({place.page, place.node, -1e9});
        continue;
      }
      Page page = pages_[at];
      if (page.node != place.node) {
        (place.node == 0 ? promoted_ : demoted_)++;
        if (when - page.moved_s <= kVainSeconds) vain_++;  // the move before was for nothing
        page.node = place.node;
        page.moved_s = when;
      }
      next.push_back(page);
    }
    pages_ = std::move(next);
  }

  uint64_t moves() const { return promoted_ + demoted_; }

  json facts() const {
    const uint64_t moves = this->moves();
    return {{"promoted_pages_seen", promoted_}, {"demoted_pages_seen", demoted_}, {"moved_back_within_s", kVainSeconds},
            {"moves_in_vain", vain_}, {"share_in_vain", moves ? static_cast<double>(vain_) / static_cast<double>(moves) : 0.0}};
  }

 private:
  struct Page {
    uint64_t page;
    uint8_t node;
    double moved_s;
  };
  std::vector<Page> pages_;
  uint64_t promoted_ = 0, demoted_ = 0, vain_ = 0;
};

// Misses between two looks, by page; sorted by page.
std::vector<PageMisses> minus(const std::vector<PageMisses>& to, const std::vector<PageMisses>& from) {
  std::vector<PageMisses> all;
  all.reserve(to.size());
  size_t at = 0;
  for (PageMisses page : to) {
    while (at < from.size() && from[at].page < page.page) at++;
    if (at < from.size() && from[at].page == page.page)
      for (int node = 0; node < 2; node++) page.misses[node] -= from[at].misses[node];
    if (page.total()) all.push_back(page);
  }
  return all;
}

struct Best {
  double ratio = 0;
  std::vector<uint64_t> hot_pages;  // of the best ones, those well above the mean; sorted
};

// What so many fast pages could have caught, known afterwards.
Best best_of(std::vector<PageMisses> pages, uint64_t capacity, size_t resident) {
  Best best;
  std::sort(pages.begin(), pages.end(), [](auto& a, auto& b) { return a.total() > b.total(); });
  uint64_t sum = 0, top = 0;
  for (auto& page : pages) sum += page.total();
  const double mean = static_cast<double>(sum) / static_cast<double>(std::max<size_t>(resident, 1));
  for (size_t i = 0; i < pages.size() && i < capacity; i++) {
    top += pages[i].total();
    if (static_cast<double>(pages[i].total()) > 2 * mean) best.hot_pages.push_back(pages[i].page);
  }
  std::sort(best.hot_pages.begin(), best.hot_pages.end());
  best.ratio = sum ? static_cast<double>(top) / static_cast<double>(sum) : 0;
  return best;
}

uint64_t fast_among(const std::vector<uint64_t>& pages, const std::vector<PagePlace>& places) {
  uint64_t fast = 0;
  size_t at = 0;
  for (uint64_t page : pages) {
    while (at < places.size() && places[at].page < page) at++;
    fast += at < places.size() && places[at].page == page && places[at].node == 0;
  }
  return fast;
}

uint64_t fast_of(const std::vector<PagePlace>& places) {
  return static_cast<uint64_t>(std::count_if(places.begin(), places.end(), [](auto& p) { return p.node == 0; }));
}

// --------------------------------------------------------------- recording

// Writes a trace: what the replayer needs to do the run again without a VM.
class Recorder {
 public:
  Recorder(const Options& options, const Case& one, pid_t pid, const std::vector<PagePlace>& places, uint64_t capacity)
      : pid_(pid), events_(options.period, true), writer_(hypertier::trace::Writer::create(options.record, header(options, one, pid, capacity))) {
    if (!writer_) die(writer_.error().message);
    for (auto& place : places) epoch_.placed.push_back({place.page, place.node});
    last_ = places;
    events_.enable(true);
  }

  void window(uint64_t ns, const std::vector<PageMisses>& seen, const std::vector<PagePlace>& places) {
    epoch_.ns = ns;
    events_.drain([&](const Events::Record& record) {
      constexpr uint64_t kStore = 4;  // PERF_MEM_OP_STORE
      if (record.pid == static_cast<uint32_t>(pid_)) epoch_.samples.push_back({record.address, (record.source & kStore) != 0});
    });
    for (auto& page : seen) {
      epoch_.truth.push_back({page.page, page.total()});
      epoch_.fast_misses += page.misses[0];
    }
    moved(places);
    mappings();
    if (auto done = writer_->write(epoch_); !done) die(done.error().message);
    epoch_ = {};
  }

 private:
  static hypertier::trace::Header header(const Options& options, const Case& one, pid_t pid, uint64_t capacity) {
    hypertier::trace::Header header{};
    header.seed = options.seed;
    header.period = options.period;
    header.fast_pages = capacity;
    header.fast_tier_pages = e2e::tiers().fast_capacity_bytes / 4096;
    header.cpus = static_cast<uint32_t>(sysconf(_SC_NPROCESSORS_ONLN));
    header.pid = static_cast<uint32_t>(pid);
    (one.name + "/" + options.system).copy(header.run, sizeof header.run - 1);
    return header;
  }

  // The first epoch tells where the run began; what moved in it comes with the next.
  void moved(const std::vector<PagePlace>& places) {
    if (first_) {
      first_ = false;
      return;
    }
    size_t at = 0;
    for (auto& place : places) {
      for (; at < last_.size() && last_[at].page < place.page; at++) epoch_.placed.push_back({last_[at].page, hypertier::trace::kGone});
      const bool same = at < last_.size() && last_[at].page == place.page && last_[at].node == place.node;
      if (at < last_.size() && last_[at].page == place.page) at++;
      if (!same) epoch_.placed.push_back({place.page, place.node});
    }
    for (; at < last_.size(); at++) epoch_.placed.push_back({last_[at].page, hypertier::trace::kGone});
    last_ = places;
  }

  void mappings() {
    std::ifstream maps("/proc/" + std::to_string(pid_) + "/maps");
    std::vector<hypertier::trace::Mapping> now;
    for (std::string line; std::getline(maps, line);) {
      unsigned long long start, end, inode;
      char mode[5], path[2] = {};
      if (std::sscanf(line.c_str(), "%llx-%llx %4s %*x %*s %llu %1s", &start, &end, mode, &inode, path) < 4) continue;
      if (inode == 0 && mode[1] == 'w' && mode[3] == 'p' && start >> 47 == 0) now.push_back({start, end, TIER_RANGE_ANON});
    }
    epoch_.mapped = now.size() != mappings_.size() ||
                    !std::equal(now.begin(), now.end(), mappings_.begin(), [](auto& a, auto& b) { return a.start == b.start && a.end == b.end; });
    if (epoch_.mapped) epoch_.mappings = mappings_ = std::move(now);
  }

  pid_t pid_;
  Events events_;
  hypertier::Result<hypertier::trace::Writer> writer_;
  hypertier::trace::Epoch epoch_;
  std::vector<PagePlace> last_;
  std::vector<hypertier::trace::Mapping> mappings_;
  bool first_ = true;
};

// --------------------------------------------------------------------- run

// The period that makes kSparse of what the workload misses while it is left alone.
uint64_t sparse_period(const Memory& memory, Child& hand, uint64_t capacity) {
  constexpr double kEpochSeconds = 0.5;
  auto total = [&] {
    uint64_t sum = 0;
    for (const PageMisses& page : memory.misses()) sum += page.total();
    return sum;
  };
  const uint64_t before = total();
  const double from = now_s();
  hand.ask("for 2000", "done");
  const double misses_per_epoch = static_cast<double>(total() - before) / (now_s() - from) * kEpochSeconds;
  return std::max<uint64_t>(1, static_cast<uint64_t>(misses_per_epoch / (kSparse * static_cast<double>(capacity))));
}

// One stretch between two shifts of the hot set.
struct Phase {
  std::vector<PageMisses> base;
  std::vector<PagePlace> start;
};

json run(Options options, const Case& one) {
  SystemOptions settings{options.system, options.build, options.out + ".tierd.log", kCgroup, options.period, options.settings, options.record.empty()};
  std::unique_ptr<System> system = make_system(settings);
  if (one.thp)
    e2e::write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always");
  else
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);  // the workload's too: small pages for all
  system->prepare();
  if (one.nested() && e2e::run({"modprobe", "kvm_amd"}).status != 0) die("cannot load kvm_amd", "QEMU emulates its hardware where it interprets: --accel tcg");
  hold_down(options.usable_mib << 20);
  Workload workload = start_workload(one, options.seed);
  keep_apart(workload.pid);

  Memory memory(workload.pid);
  memory.reset();
  std::vector<PagePlace> places = memory.places();
  const uint64_t capacity = fast_of(places);
  std::printf("%s under %s, seed %llu: %llu pages, %llu of them fast\n", one.name.c_str(), options.system.c_str(),
              static_cast<unsigned long long>(options.seed), static_cast<unsigned long long>(places.size()), static_cast<unsigned long long>(capacity));
  std::fflush(stdout);

  Tracker tracker(places);
  std::optional<Recorder> recorder;
  if (is_sparse(options.system)) {
    options.period = sparse_period(memory, workload.hand(), capacity);
    system->sample_each(options.period);
  }
  if (!options.record.empty()) recorder.emplace(options, one, workload.pid, places, capacity);
  auto vmstat_start = tiering_vmstat();
  auto cpu_start = cpu_ns();
  auto nested_start = nested_stat(workload.pid);
  const double start_s = now_s();
  system->start(memory, workload.pid);
  // From here on: what switching a system on patches in the kernel's text (static
  // keys, BPF statistics) is flushed too, once, and by whoever switches it on.
  e2e::FlushCounter flushes;

  json windows = json::array(), phases = json::array(), blocks = json::array();
  std::vector<PageMisses> last = memory.misses(), block_base = last;
  Phase phase{last, places};
  uint64_t operations = operations_of(workload.hand().ask("for 0", "done")).value_or(0);
  double next_shift = options.shift_s ? options.shift_s : 1e18, block_start = 0;
  double work_s = 0;
  uint64_t work_operations = 0, misses_total = 0;
  auto end_phase = [&](double at) {
    const Best best = best_of(minus(last, phase.base), capacity, places.size());
    phases.push_back({{"end_s", at}, {"oracle_hit_ratio", best.ratio}, {"hot_pages", best.hot_pages.size()},
                      {"hot_pages_fast_at_start", fast_among(best.hot_pages, phase.start)},
                      {"hot_pages_fast_at_end", fast_among(best.hot_pages, places)}});
    phase = {last, places};
  };
  // The next window is asked for before the last one is looked at: a pause
  // would show up in what is measured (an idle address space is flushed page by
  // page, an idle task is not scanned).
  const std::string next_window = "for " + std::to_string(options.window_ms);
  double elapsed = 0, from = now_s();
  workload.hand().send(next_window);
  for (bool going = true; going;) {
    json done = workload.hand().expect("done");
    // It has no pages any more to be looked at.
    if (done.value("finished", false)) break;
    const double spent = now_s() - from;
    elapsed = now_s() - start_s;
    going = elapsed < options.seconds;
    const bool shift = going && elapsed >= next_shift;
    if (shift) workload.hand().ask("shift", "shifted");
    from = now_s();
    if (going) workload.hand().send(next_window);
    std::vector<PageMisses> now = memory.misses(), seen = minus(now, last);
    places = memory.places();
    tracker.look(places, elapsed);
    if (recorder) recorder->window(static_cast<uint64_t>(spent * 1e9), seen, places);
    uint64_t fast = 0, slow = 0;
    std::map<uint64_t, std::array<uint64_t, 3>> bins;  // misses, resident, fast pages
    uint64_t bin_misses = 0;
    for (size_t i = 0; i < seen.size(); i++) {
      const PageMisses& page = seen[i];
      fast += page.misses[0];
      slow += page.misses[1];
      bin_misses += page.total();
      const uint64_t bin = page.page / kPagesPerBin;
      if (i + 1 < seen.size() && seen[i + 1].page / kPagesPerBin == bin) continue;
      bins[bin][0] = std::exchange(bin_misses, 0);
    }
    std::array<uint64_t, 3>* row = nullptr;
    uint64_t row_bin = ~0ULL;
    for (auto& place : places) {
      if (const uint64_t bin = place.page / kPagesPerBin; bin != row_bin) row = &bins[row_bin = bin];
      (*row)[1]++;
      (*row)[2] += place.node == 0;
    }
    json map = json::array();
    for (auto& [bin, facts] : bins) map.push_back({bin, facts[0], facts[1], facts[2]});
    // Who does not count is judged by his misses, which no placement changes.
    const uint64_t now_operations = operations_of(done).value_or(operations + fast + slow);
    const double ratio = fast + slow ? static_cast<double>(fast) / static_cast<double>(fast + slow) : 0;
    windows.push_back({{"end_s", elapsed}, {"work_s", spent}, {"fast", fast}, {"slow", slow}, {"operations", now_operations - operations},
                       {"fast_pages", fast_of(places)}, {"moves_seen_total", tracker.moves()}, {"map", map}});
    if (done.contains("batch") && !done["batch"].is_null()) windows.back()["batch"] = done["batch"];
    operations = now_operations;
    work_operations += windows.back()["operations"].get<uint64_t>();
    work_s += spent;
    misses_total += fast + slow;
    std::printf("%s%.2f", windows.size() % 20 == 1 ? "\n  " : " ", ratio);
    std::fflush(stdout);
    last = std::move(now);
    system->window(memory, workload.pid);
    if (elapsed - block_start >= 10) {
      blocks.push_back({{"end_s", elapsed}, {"oracle_hit_ratio", best_of(minus(last, block_base), capacity, places.size()).ratio}});
      block_base = last;
      block_start = elapsed;
    }
    if (shift) {
      end_phase(elapsed);
      system->shifted();
      next_shift += options.shift_s;
    }
  }
  std::printf("\n");
  end_phase(elapsed);
  json counters = system->counters();
  const double ended_s = now_s() - start_s;
  json calls, batches, carried_out;
  for (auto& [name, count] : flushes.all()) {
    calls[name] = count.calls;
    batches[name] = count.batches;
    carried_out[name] = count.flushes;
  }
  json result = {{"vmstat", difference(vmstat_start, tiering_vmstat())}, {"cpu_ns", difference(cpu_start, cpu_ns(), 1000000)}};
  if (const auto nested = nested_stat(workload.pid); !nested.empty()) result["nested"] = difference(nested_start, nested);
  system->stop();
  const bool ok = workload.stop();
  if (!ok) die(one.name + " found wrong memory: a page was lost or corrupted");

  result.update({{"schema", 1},
                 {"workload", one.name},
                 {"system", options.system},
                 {"seed", options.seed},
                 {"commit", options.commit},
                 {"seconds", options.seconds},
                 {"elapsed_s", ended_s},
                 {"window_ms", options.window_ms},
                 {"period", options.period},
                 {"shift_s", options.shift_s},
                 {"capacity_pages", capacity},
                 {"resident_pages", places.size()},
                 {"configuration", system->configuration()},
                 {"operations_total", work_operations},
                 {"work_s", work_s},
                 {"misses_total", misses_total},
                 {"counters", counters},
                 {"flush_calls", calls},
                 {"flush_batches", batches},
                 {"flushes", carried_out},
                 {"moves", tracker.facts()},
                 {"phases", phases},
                 {"blocks", blocks},
                 {"windows", windows},
                 {"memory_verified", ok}});
  if (workload.stopped.contains("checksum")) result["checksum"] = workload.stopped["checksum"];
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"one cell of the benchmarks, inside the lab: use ./run bench"};
  app.add_option("--workload", options.workload)->required();
  app.add_option("--system", options.system, "none, kernel, kernel-tuned, damon, oracle, or POLICY[@SOURCE][@sparse]")->required();
  app.add_option("--seed", options.seed);
  app.add_option("--seconds", options.seconds, "of the guest's clock; 0: as the workload says");
  app.add_option("--window-ms", options.window_ms);
  app.add_option("--usable-mib", options.usable_mib, "of the fast node; 0: as the workload says");
  app.add_option("--period", options.period, "misses a sample; 0: as the workload says");
  app.add_option("--set", options.settings, "key=value of the policy");
  app.add_option("--build", options.build)->required();
  app.add_option("--commit", options.commit);
  app.add_option("--out", options.out, "the JSON file")->required();
  app.add_option("--record", options.record, "write a trace there, in windows of an epoch");
  CLI11_PARSE(app, argc, argv);
  const Case* one = find_case(options.workload);
  if (!one) die("there is no workload " + options.workload);
  if (!options.seconds) options.seconds = one->seconds;
  if (!options.usable_mib) options.usable_mib = one->usable_mib;
  if (!options.period) options.period = one->period;
  options.shift_s = one->shift_s;
  if (!options.record.empty()) options.window_ms = 500;

  json result = run(options, *one);
  // Whole or not at all: a cell that was cut off is run again.
  std::ofstream(options.out + ".new") << result.dump() << "\n";
  if (std::rename((options.out + ".new").c_str(), options.out.c_str())) die("cannot write " + options.out);
  return 0;
}
