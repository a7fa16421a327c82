// SPDX-License-Identifier: GPL-2.0-or-later
// labctl: what the simulated memory knows. Runs inside the lab.
//
// Linked statically and short of work before it reads the counters: its own
// memory accesses are counted like everybody's.
#include <dirent.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "../vpebs_shared.h"
#include "result.hpp"

using hypertier::fail;
using hypertier::fail_errno;
using hypertier::Result;
using nlohmann::json;

namespace {

constexpr std::uint64_t kPageBytes = 4096;
const char* const kPmu = "/sys/bus/event_source/devices/vpebs";

template <class T>
T load(const T& x) {
  return __atomic_load_n(&x, __ATOMIC_ACQUIRE);
}

std::uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::uint64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

struct Counts {
  std::uint64_t misses[VPEBS_NODES] = {};
  std::uint64_t other = 0, accesses = 0, ns = 0;
};

class Memory {
 public:
  static Result<Memory> open() {
    const std::string root = "/sys/bus/pci/devices/";
    DIR* dir = opendir(root.c_str());
    if (!dir) return fail_errno("cannot read " + root, errno);
    Memory memory;
    while (dirent* entry = readdir(dir)) {
      auto id = [&](const char* name) {
        std::ifstream file(root + entry->d_name + "/" + name);
        std::string text;
        file >> text;
        return text.empty() ? 0ul : std::stoul(text, nullptr, 16);
      };
      if (entry->d_name[0] == '.' || id("vendor") != VPEBS_PCI_VENDOR || id("device") != VPEBS_PCI_DEVICE) continue;
      std::string path = root + entry->d_name + "/resource2";
      int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
      struct stat st;
      if (fd < 0 || fstat(fd, &st)) return fail_errno("cannot open " + path, errno, "labctl needs root");
      void* map = mmap(nullptr, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      close(fd);
      if (map == MAP_FAILED) return fail_errno("cannot map " + path, errno);
      memory.shared = static_cast<vpebs_shared*>(map);
    }
    closedir(dir);
    if (!memory.shared || memory.shared->magic != VPEBS_MAGIC)
      return fail("there is no simulated memory here", "labctl works inside the lab only: ./run lab");
    return memory;
  }

  Counts total() const {
    Counts c;
    for (unsigned i = 0; i < shared->cpus; i++) {
      for (int node = 0; node < VPEBS_NODES; node++) c.misses[node] += load(shared->cpu[i].misses[node]);
      c.other += load(shared->cpu[i].misses_other);
      c.accesses += load(shared->cpu[i].accesses);
    }
    c.ns = now_ns();
    return c;
  }

  Counts since_reset() const {
    Counts c = total();
    for (int node = 0; node < VPEBS_NODES; node++) c.misses[node] -= shared->base_misses[node];
    c.other -= shared->base_other;
    c.accesses -= shared->base_accesses;
    c.ns -= shared->base_ns;
    return c;
  }

  // The plugin clears the page counts at the next miss of any CPU; our own
  // walk through fresh memory makes one. Waits until it says so.
  void reset() {
    std::uint64_t request = load(shared->pages_request) + 1;
    __atomic_store_n(&shared->pages_request, request, __ATOMIC_RELEASE);
    for (std::size_t bytes = 1 << 20; load(shared->pages_generation) != request; bytes *= 2) {
      std::vector<char> fresh(bytes);
      for (std::size_t i = 0; i < bytes && load(shared->pages_generation) != request; i += 64)
        static_cast<volatile char*>(fresh.data())[i] = 1;
    }
    Counts c = total();
    std::copy(c.misses, c.misses + VPEBS_NODES, shared->base_misses);
    shared->base_other = c.other;
    shared->base_accesses = c.accesses;
    shared->base_ns = c.ns;
  }

  template <class F>
  void for_each_page(F&& visit) const {
    auto* pages = reinterpret_cast<const vpebs_page*>(reinterpret_cast<const char*>(shared) + shared->pages_offset);
    for (std::uint64_t i = 0; i < shared->pages_entries; i++)
      if (load(pages[i].key)) visit(pages[i]);
  }

  std::optional<int> node_of(std::uint64_t paddr) const {
    for (const vpebs_span& span : shared->span)
      if (paddr >= span.start && paddr < span.end) return int(span.node);
    return std::nullopt;
  }

  vpebs_shared* shared = nullptr;
};

Result<std::uint64_t> cr3_of(unsigned pid) {
  int fd = ::open(VPEBS_DEVICE, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return fail_errno("cannot open " VPEBS_DEVICE, errno, "vpebs.ko is not loaded");
  vpebs_space space{pid, 0, 0};
  int err = ioctl(fd, VPEBS_IOC_SPACE, &space) ? errno : 0;
  close(fd);
  if (err) return fail_errno("process " + std::to_string(pid) + " has no memory of its own", err, "is it still running?");
  return space.cr3;
}

std::map<std::uint64_t, unsigned> pids_by_cr3() {
  std::map<std::uint64_t, unsigned> pids;
  if (DIR* dir = opendir("/proc")) {
    while (dirent* entry = readdir(dir))
      if (unsigned pid = std::strtoul(entry->d_name, nullptr, 10))
        if (auto cr3 = cr3_of(pid)) pids[*cr3] = pid;
    closedir(dir);
  }
  return pids;
}

json ratio(std::uint64_t fast, std::uint64_t slow) {
  return fast + slow ? json(double(fast) / double(fast + slow)) : json(nullptr);
}

struct Options {
  bool as_json = false, reset = false;
  unsigned pid = 0;
  std::string pages_file;
  std::uint64_t best_bytes = 0, penalty_ns = 0;
};

void print(const Options& options, const json& answer) {
  if (options.as_json) {
    std::cout << answer.dump() << "\n";
    return;
  }
  for (auto& [key, value] : answer.items())
    if (key != "schema") std::cout << key << ": " << value.dump() << "\n";
}

Result<> truth(const Options& options) {
  auto memory = Memory::open();
  if (!memory) return std::unexpected(memory.error());
  Counts c = memory->since_reset();
  json answer{{"schema", 1}};
  if (options.pid || !options.pages_file.empty() || options.best_bytes) {
    std::uint64_t cr3 = 0;
    if (options.pid) {
      auto found = cr3_of(options.pid);
      if (!found) return std::unexpected(found.error());
      cr3 = *found;
    }
    std::vector<vpebs_page> pages;
    memory->for_each_page([&](const vpebs_page& page) {
      if (!cr3 || VPEBS_PAGE_CR3(page.key) == cr3) pages.push_back(page);
    });
    auto count = [](const vpebs_page& page) { return std::uint64_t(page.misses[0]) + page.misses[1]; };
    std::sort(pages.begin(), pages.end(), [&](auto& a, auto& b) { return count(a) > count(b); });
    std::uint64_t sum = 0, best = 0, fast = 0, i = 0;
    for (const vpebs_page& page : pages) {
      sum += count(page);
      fast += page.misses[0];
      if (i++ < options.best_bytes / kPageBytes) best += count(page);
    }
    if (options.pid) {
      c.misses[0] = fast;
      c.misses[1] = sum - fast;
      answer["pid"] = options.pid;
    }
    if (options.best_bytes) {
      answer["best_capacity_bytes"] = options.best_bytes;
      answer["best_fast_hit_ratio"] = ratio(best, sum - best);
    }
    answer["pages_counted"] = pages.size();
    answer["pages_lost_accesses"] = load(memory->shared->pages_lost);
    if (!options.pages_file.empty()) {
      auto pids = pids_by_cr3();
      std::ofstream out(options.pages_file);
      out << "pid\taddress\tfast_accesses\tslow_accesses\n";
      for (const vpebs_page& page : pages) {
        auto pid = pids.find(VPEBS_PAGE_CR3(page.key));
        out << (pid == pids.end() ? 0 : pid->second) << "\t0x" << std::hex << VPEBS_PAGE_VADDR(page.key) << std::dec
            << "\t" << page.misses[0] << "\t" << page.misses[1] << "\n";
      }
      if (!out.flush()) return fail("cannot write " + options.pages_file, "choose a writable directory");
    }
  }
  answer["fast_accesses"] = c.misses[0];
  answer["slow_accesses"] = c.misses[1];
  answer["fast_hit_ratio"] = ratio(c.misses[0], c.misses[1]);
  answer["cpu_accesses"] = c.accesses;
  answer["window_ns"] = c.ns;
  if (options.reset) memory->reset();
  print(options, answer);
  return {};
}

Result<> modelled(const Options& options) {
  auto memory = Memory::open();
  if (!memory) return std::unexpected(memory.error());
  Counts c = memory->since_reset();
  print(options, {{"schema", 1},
                  {"window_ns", c.ns},
                  {"slow_accesses", c.misses[1]},
                  {"penalty_ns", options.penalty_ns},
                  {"modelled_ns", c.ns + options.penalty_ns * c.misses[1]}});
  return {};
}

Result<> place(const Options& options) {
  auto memory = Memory::open();
  if (!memory) return std::unexpected(memory.error());
  const std::string proc = "/proc/" + std::to_string(options.pid);
  std::ifstream maps(proc + "/maps");
  int pagemap = ::open((proc + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC);
  if (!maps || pagemap < 0) return fail_errno("cannot read the mappings of process " + std::to_string(options.pid), errno, "is it still running?");
  struct { std::uint64_t anon = 0, file = 0; } nodes[VPEBS_NODES];
  std::uint64_t swapped = 0, elsewhere = 0;
  std::vector<std::uint64_t> entries;
  for (std::string line; std::getline(maps, line);) {
    unsigned long long start, end;
    if (std::sscanf(line.c_str(), "%llx-%llx", &start, &end) != 2 || start >> 47) continue;
    while (start < end) {
      entries.resize(std::min<std::uint64_t>((end - start) / kPageBytes, 65536));
      ssize_t n = pread(pagemap, entries.data(), entries.size() * 8, start / kPageBytes * 8);
      if (n <= 0) break;
      for (ssize_t i = 0; i < n / 8; i++) {
        constexpr std::uint64_t present = 1ull << 63, swap = 1ull << 62, file = 1ull << 61;
        if (entries[i] & swap) swapped++;
        if (!(entries[i] & present)) continue;
        auto node = memory->node_of((entries[i] & ((1ull << 55) - 1)) * kPageBytes);
        if (!node) elsewhere++;
        else if (entries[i] & file) nodes[*node].file++;
        else nodes[*node].anon++;
      }
      start += n / 8 * kPageBytes;
    }
  }
  close(pagemap);
  json list = json::array();
  for (int i = 0; i < VPEBS_NODES; i++)
    list.push_back({{"node", i}, {"pages", nodes[i].anon + nodes[i].file}, {"anon_pages", nodes[i].anon}, {"file_pages", nodes[i].file}});
  print(options, {{"schema", 1},
                  {"pid", options.pid},
                  {"fast_pages", nodes[0].anon + nodes[0].file},
                  {"slow_pages", nodes[1].anon + nodes[1].file},
                  {"nodes", list},
                  {"swapped_pages", swapped},
                  {"device_pages", elsewhere}});
  return {};
}

Result<> vpebs(const Options& options) {
  auto memory = Memory::open();
  if (!memory) return std::unexpected(memory.error());
  json answer{{"schema", 1}};
  auto read = [&](const std::string& name, const std::string& path) -> bool {
    std::ifstream file(std::string(kPmu) + "/" + path);
    std::uint64_t value;
    if (!(file >> value)) return false;
    answer[name] = value;
    return true;
  };
  if (!read("default_period", "default_period")) return fail("there is no PMU vpebs", "vpebs.ko is not loaded; see dmesg");
  for (const char* name : {"produced", "drained", "delivered", "lost", "unmatched", "unused", "batch_hidden"})
    read(std::string(name) + "_total", std::string("stats/") + name);
  std::uint64_t stale = 0, switches = 0;
  json periods = json::array();
  for (unsigned i = 0; i < memory->shared->cpus; i++) {
    stale += load(memory->shared->cpu[i].stale);
    switches += load(memory->shared->cpu[i].switches);
    periods.push_back(load(memory->shared->cpu[i].period));
  }
  answer["stale_total"] = stale;
  answer["switches_total"] = switches;
  answer["cpu_periods"] = periods;
  answer["cache_bytes"] = memory->shared->cache_bytes * memory->shared->cpus;
  answer["penalty_ns"] = memory->shared->penalty_ns;
  print(options, answer);
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"What the lab's simulated memory knows"};
  app.require_subcommand(1);
  Options options;
  std::function<Result<>(const Options&)> run;
  auto command = [&](const char* name, const char* help, auto action) {
    auto* sub = app.add_subcommand(name, help);
    sub->add_flag("-j,--json", options.as_json, "JSON on stdout");
    sub->callback([&run, action] { run = action; });
    return sub;
  };
  auto* t = command("truth", "accesses that went to each tier since the last reset", truth);
  t->add_flag("--reset", options.reset, "start counting anew after the answer");
  t->add_option("--pid", options.pid, "of this process only");
  t->add_option("--pages", options.pages_file, "write each page's accesses to FILE, most accessed first");
  t->add_option("--best", options.best_bytes, "also the best ratio that a fast tier of SIZE could have had")
      ->transform(CLI::AsSizeValue(false));
  command("place", "pages of a process by node", place)->add_option("PID", options.pid)->required();
  command("vpebs", "state of the virtual PEBS", vpebs);
  command("modelled", "time since the reset if a slow access costs so much more", modelled)
      ->add_option("--penalty-ns", options.penalty_ns, "of one access to the slow tier")
      ->default_val(170);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (auto result = run(options); !result) {
    std::cerr << "labctl: " << result.error().message << "\n";
    if (!result.error().hint.empty()) std::cerr << "HINT: " << result.error().hint << "\n";
    return 1;
  }
  return 0;
}
