// SPDX-License-Identifier: GPL-2.0-or-later
// Where samples come from: one Source per kind of PMU. A source says which
// perf events it would open here, and a probe proves that they deliver
// addresses. The probe and the real open share `events()`: what was proved is
// what is used.
#pragma once

#include <linux/perf_event.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "result.hpp"

namespace hypertier {

// The files of the machine, below directories that tests replace.
struct Roots {
  std::filesystem::path sys = "/sys";
  std::filesystem::path proc = "/proc";
};

struct SourceSettings {
  std::uint64_t period = 0;        // misses per sample; 0: the source's own default
  std::uint64_t store_period = 0;  // stores per sample; 0: stores are not sampled
};

// One event, opened on each CPU of its list.
struct SourceEvent {
  std::string name;                       // as in sysfs or the vendor's manual: "mem-loads"
  perf_event_attr attr{};                 // opened disabled; see open_event()
  std::optional<perf_event_attr> leader;  // opened first, as group leader (mem-loads-aux)
  std::filesystem::path cpu_list;  // file with the online CPUs that have this PMU; changes with hotplug
};

// What an active probe found. Only made when enough addresses were right.
struct ProbeResult {
  std::uint64_t samples = 0;  // with an address, while a known buffer was touched
  std::uint64_t inside = 0;   // those of samples whose address lay in the buffer
  std::uint64_t sample_ns = 0;  // CPU time that a sample took from what it interrupted
};

class Source {
 public:
  virtual ~Source() = default;

  virtual std::string_view name() const = 0;

  // What it is and which event it takes here, in one line: "load latency
  // (cpu/mem-loads/, ldlat 64), one sample in 4093".
  virtual std::string describe(const SourceSettings& settings) const = 0;

  // False: it reads accessed bits, and opens no event.
  virtual bool samples() const { return true; }

  // False: its period is left alone unless a CPU budget is asked for, so that
  // figures compare.
  virtual bool holds_budget() const { return true; }

  // One sample in so many while probing: some hundred samples of a touch that
  // takes a fraction of a second.
  virtual std::uint64_t probe_period() const { return 199; }

  // Misses per sample with these settings.
  virtual std::uint64_t period(const SourceSettings& settings) const = 0;

  // Every way to sample here, best first (load latency, then an L3-miss
  // event); a way is the set of events that are open together. Reads sysfs
  // only. The error says why there is none.
  virtual Result<std::vector<std::vector<SourceEvent>>> events(const SourceSettings& settings) const = 0;
};

// A source that was proved to deliver, with what to open.
struct ChosenSource {
  std::string name;         // "pebs", "ibs", "vpebs", "abit", or "pebs+abit" and the like
  std::string description;  // one line for humans
  std::uint64_t period = 0;      // now
  std::uint64_t own_period = 0;  // the source's default
  bool holds_budget = false;     // by itself, see Source
  bool bits = false;                // accessed bits are read, alone or beside samples
  std::vector<SourceEvent> events;  // none: no samples
  ProbeResult probe;
  bool samples() const { return !events.empty(); }
};

// One line of `tierctl doctor`.
struct SourceReport {
  std::string name;
  bool works = false;
  std::string text;  // works: what it delivers; else the reason, one sentence
  std::string hint;  // what to do about it; empty when it works
};

// All sources of this build, in order of preference.
std::vector<std::unique_ptr<Source>> make_sources(const Roots& roots = {});

// Opens the source's events for this thread, touches a known buffer, and
// requires that >= 90 % of the addresses fall inside. Tries one way after the
// other and returns the first that works.
Result<ChosenSource> probe_source(const Source& source, const SourceSettings& settings = {},
                                  const Roots& roots = {});

// The first source that works; only the one called `only` if that is not
// empty. "X+abit" is source X with accessed bits beside its samples, "best+abit" the
// first that samples. The error says for each why it was refused.
Result<ChosenSource> choose_source(const SourceSettings& settings = {}, std::string_view only = {},
                                   const Roots& roots = {});

// Every source, probed.
std::vector<SourceReport> diagnose_sources(const SourceSettings& settings = {}, const Roots& roots = {});

// A perf event descriptor, with its group leader's if it has one.
struct OpenEvent {
  int fd = -1;
  int leader_fd = -1;
};

// perf_event_open() on a CPU for all tasks (pid -1), or for a task (pid 0 is
// the caller) on any CPU (cpu -1). Disabled: attach, then enable leader and
// event. Closing both is up to the caller. The error says what the errno means
// for a PMU.
Result<OpenEvent> open_event(const SourceEvent& event, int pid, int cpu);

// Opens and closes an event on each CPU: the kernel keeps the blocks of several
// pages that its events are made in. While the fast node is full such a block wakes
// its reclaim and compaction, which flush page by page (seen with memcached: 1,277
// flushes for one block). Failing is no harm.
void warm_events(const Roots& roots = {});

// "0,2-3" -> {0, 2, 3}: the kernel's notation for sets of CPUs and nodes.
Result<std::vector<int>> parse_list(std::string_view text);
Result<std::vector<int>> read_list(const std::filesystem::path& file);

// The content of a one-line file of /proc or /sys, trimmed.
std::optional<std::string> read_line(const std::filesystem::path& file);

}  // namespace hypertier
