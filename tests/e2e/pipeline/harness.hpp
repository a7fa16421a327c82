// SPDX-License-Identifier: GPL-2.0-or-later
// What the end-to-end tests and the demo share: workloads as children that are
// driven by hand-shake, and the answers of tierctl and labctl.
// Whatever goes wrong here ends the program with one sentence.
#pragma once

#include <sys/types.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace e2e {

using nlohmann::json;

[[noreturn]] void die(const std::string& message, const std::string& hint = {});

struct Output {
  int status = -1;  // exit status, 128 + signal
  std::string out;  // its stdout; stderr goes through
};
Output run(const std::vector<std::string>& command);
// Must exit with 0 and print JSON.
json run_json(const std::vector<std::string>& command);

inline json tierctl(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "tierctl");
  arguments.push_back("--json");
  return run_json(arguments);
}

// A workload that speaks the protocol of bench/workloads/commands.hpp, or a
// server that says nothing. Dies with us.
class Child {
 public:
  explicit Child(const std::vector<std::string>& command);
  ~Child();  // kills it if it still runs
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  void send(const std::string& command);
  json expect(const std::string& word);          // the next answer must be this one
  void skip_until(const std::string& part);       // reads its output up to a line with this in it
  json ask(const std::string& command, const std::string& word) {
    send(command);
    return expect(word);
  }
  int wait();  // closes its stdin, returns its exit status
  void signal(int number);

 private:
  std::string name_;
  pid_t pid_ = -1;
  int in_ = -1;
  FILE* out_ = nullptr;
};

// The command, which joins the cgroup (made if need be) before it has memory of its own.
std::vector<std::string> inside(const std::string& cgroup, const std::vector<std::string>& command);

// redis-server from the distribution on a unix socket, and kvload that drives it.
struct Redis {
  Child server;
  Child load;
  Redis(uint64_t seed, uint64_t keys, uint64_t value_bytes, const std::string& cgroup = {});  // of the server
  void stop();  // checks that no value came back wrong
};

// Truth of the simulated memory: a process's accesses that missed the cache.
struct Truth {
  uint64_t fast = 0, slow = 0;
  uint64_t total() const { return fast + slow; }
  double ratio() const { return total() ? static_cast<double>(fast) / static_cast<double>(total()) : 0; }
  Truth operator-(const Truth& before) const { return {fast - before.fast, slow - before.slow}; }
};
Truth truth(pid_t pid);  // since truth_reset()
void truth_reset();
// What a process did since the last take().
class Meter {
 public:
  explicit Meter(pid_t pid) : pid_(pid), last_(truth(pid)) {}
  Truth take() {
    Truth now = truth(pid_), seen = now - last_;
    last_ = now;
    return seen;
  }

 private:
  pid_t pid_;
  Truth last_;
};
// The ratio that the best placement of a process's pages could have had since
// truth_reset() in a fast tier of so many pages, known afterwards.
double best_ratio(pid_t pid, uint64_t fast_pages);

// The same page by page, of all processes; most accessed first. Kept in a file until
// it is read: tens of MiB that come and go would be part of what is measured.
struct PageTruth {
  pid_t pid = 0;
  uint64_t address = 0;
  uint64_t fast = 0, slow = 0;
  uint64_t total() const { return fast + slow; }
};
void save_page_truth(const std::string& path);
std::vector<PageTruth> load_page_truth(const std::string& path);

// Seats it at the root; settings: key=value.
void load_policy(const std::string& policy, const std::vector<std::string>& settings = {});

// The root scope in `tierctl status --json`; nothing where no policy is seated there.
std::optional<json> root_scope();

// Counters of the root scope in `tierctl status --json`.
struct Counters {
  uint64_t epochs = 0, samples = 0, promoted = 0, demoted = 0, exchanged = 0, failed = 0;
  uint64_t moved() const { return promoted + demoted; }
};
Counters counters();

std::map<std::string, uint64_t> vmstat();
double now_s();  // of the guest's clock, from anywhere

struct Tiers {
  int fast_node = 0, slow_node = 1;
  uint64_t fast_capacity_bytes = 0, fast_free_bytes = 0;
  double free_share() const { return static_cast<double>(fast_free_bytes) / static_cast<double>(fast_capacity_bytes); }
};
Tiers tiers();  // read from sysfs, not from tierd

// Resident anonymous memory of a process in each tier.
struct Placement {
  uint64_t fast_pages = 0, slow_pages = 0;
  double fast_share() const {
    return fast_pages + slow_pages ? static_cast<double>(fast_pages) / static_cast<double>(fast_pages + slow_pages) : 0;
  }
};
Placement placement(pid_t pid);

// Lets the fast node fill up to less than 1 % free: the kernel's own reserve
// is made small, page cache is dropped.
void tighten_reserve();

// Node of each page; negative: not there.
std::vector<int> nodes_of(pid_t pid, const std::vector<uint64_t>& addresses);

// TLB flushes that a task asked for, by its name: what tierd's moves cost, not
// what exec and munmap of everybody else do. `flushes` were carried out, here or
// by an interrupt to other CPUs (tracepoint tlb_flush); `calls` also holds those
// that found nothing to flush, since the process is not running on any CPU
// (kprobes on flush_tlb_mm_range and arch_tlbbatch_flush). `batches`: those of
// arch_tlbbatch_flush, one for many pages; the others are of one address space,
// mostly for one page.
class FlushCounter {
 public:
  FlushCounter();
  ~FlushCounter();
  struct Count {
    uint64_t flushes = 0, calls = 0, batches = 0;
  };
  Count by(const std::string& comm);
  std::map<std::string, Count> all();  // of everybody, by name
};

void write_file(const std::string& path, const std::string& text);  // dies on failure
std::string read_file(const std::string& path);                    // empty if unreadable

// Says what holds and what does not, and counts it.
class Checks {
 public:
  [[gnu::format(printf, 3, 4)]] void that(bool ok, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::printf("%s ", ok ? "  ok  " : "  FAIL");
    std::vprintf(format, arguments);
    std::printf("\n");
    std::fflush(stdout);
    va_end(arguments);
    failed_ += !ok;
  }
  int status() const { return failed_ ? 1 : 0; }

 private:
  int failed_ = 0;
};

}  // namespace e2e
