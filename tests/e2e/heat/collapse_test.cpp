// SPDX-License-Identifier: GPL-2.0-or-later
// khugepaged at full speed beside a policy that places small pages, in the lab: how
// many pages it takes back to the wrong tier by joining 2 MiB that lie in both.
//
// What it joins is counted where it does: the kernel function that joins returns,
// and the pages of each node that khugepaged has just counted are noted with it.
// Those of the smaller side change their tier.
//
// Full speed: all of memory is looked at up to ten times a second (by default it takes
// minutes). That khugepaged and the workload rest in between makes the guest's clock
// leap: ten minutes of it are as many of ours at most.
#include <fcntl.h>
#include <numaif.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstring>
#include <sstream>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

const std::string kThp = "/sys/kernel/mm/transparent_hugepage/";
const std::string kHold = "/sys/module/hypertier/parameters/hold_collapse";
const std::string kHeld = "/sys/module/hypertier/parameters/collapses_held";
const std::string kTracing = "/sys/kernel/tracing/";
const std::string kEvent = kTracing + "events/ht_thp/collapsed/";

struct Options {
  std::string policy = "heattree";
  std::string piece = "64K";
  std::vector<std::string> settings;
  uint64_t seconds = 600;
  uint64_t settle_seconds = 20;
  uint64_t shift_seconds = 60;
  uint64_t control_seconds = 10;
  uint64_t scan_sleep_ms = 100;
  uint64_t alloc_sleep_ms = 1000;  // 0: it compacts full memory, to no avail, all the time
  uint64_t burst_ms = 40;  // of accesses in each half second
  bool hold = true;
};

void sleep_s(double seconds) {
  timespec wait{static_cast<time_t>(seconds), static_cast<long>((seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
  while (nanosleep(&wait, &wait) && errno == EINTR) {
  }
}

void append_line(const std::string& path, const std::string& line) {
  const int fd = open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  const std::string text = line + "\n";
  if (fd < 0 || write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
    die("cannot write \"" + line + "\" to " + path + ": " + std::strerror(errno));
  close(fd);
}

// By khugepaged, since this was made.
class Collapses {
 public:
  struct Count {
    uint64_t granules = 0;     // joined
    uint64_t mixed = 0;        // of them with pages in both tiers
    uint64_t wrong_pages = 0;  // that changed their tier by it
  };
  Collapses() {
    // struct collapse_control: bool is_khugepaged; u32 node_load[].
    append_line(kTracing + "kprobe_events",
                "r:ht_thp/collapsed collapse_huge_page ret=$retval:s32 fast=@khugepaged_collapse_control+4:u32 "
                "slow=@khugepaged_collapse_control+8:u32");
    append_line(kEvent + "trigger", "hist:keys=fast,slow:size=65536 if ret == 1");  // SCAN_SUCCEED
  }
  Count take() const {
    Count count;
    std::istringstream text(read_file(kEvent + "hist"));
    for (std::string line; std::getline(text, line);) {
      unsigned long long fast, slow, hits;
      if (std::sscanf(line.c_str(), "{ fast: %llu, slow: %llu } hitcount: %llu", &fast, &slow, &hits) != 3) continue;
      count.granules += hits;
      count.mixed += fast && slow ? hits : 0;
      count.wrong_pages += std::min(fast, slow) * hits;
    }
    return count;
  }
};

Collapses::Count operator-(const Collapses::Count& a, const Collapses::Count& b) {
  return {a.granules - b.granules, a.mixed - b.mixed, a.wrong_pages - b.wrong_pages};
}

// Small pages of one node that nobody touches again: for khugepaged to join.
class Bystander {
 public:
  Bystander(int node, uint64_t bytes) : bytes_(bytes) {
    constexpr uint64_t kHuge = 2 << 20;
    char* raw = static_cast<char*>(mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    unsigned long nodes = 1UL << node;
    if (raw == MAP_FAILED) die("there is no memory for the bystander");
    data_ = raw + (kHuge - reinterpret_cast<uint64_t>(raw) % kHuge) % kHuge;
    if (madvise(data_, bytes, MADV_NOHUGEPAGE) || mbind(data_, bytes, MPOL_BIND, &nodes, 64, 0)) die("the bystander cannot be placed");
    for (uint64_t at = 0; at < bytes; at += 4096) data_[at] = 1;
  }
  void allow() {
    if (madvise(data_, bytes_, MADV_HUGEPAGE)) die("the bystander may not have huge pages");
  }
  uint64_t granules() const { return bytes_ >> 21; }

 private:
  uint64_t bytes_;
  char* data_;
};

uint64_t held() {
  const std::string text = read_file(kHeld);
  if (text.empty()) die("the module hypertier does not say how often it kept khugepaged off");
  return std::stoull(text);
}

int run(const Options& o) {
  Checks check;
  tighten_reserve();
  write_file(kThp + "enabled", "always");
  write_file(kThp + "khugepaged/defrag", "1");
  write_file(kThp + "khugepaged/pages_to_scan", "1048576");
  write_file(kThp + "khugepaged/alloc_sleep_millisecs", std::to_string(o.alloc_sleep_ms));
  write_file(kThp + "khugepaged/scan_sleep_millisecs", std::to_string(o.scan_sleep_ms));
  tighten_reserve();  // khugepaged raises the reserve when it starts
  write_file(kHold, o.hold ? "1" : "0");
  Collapses collapses;

  Bystander bystander(1, 16 << 20);
  Child hotset({"hotset", "--size", "192M", "--hot", "32M", "--piece", o.piece, "--thp", "never", "--place", "slow-hot"});
  hotset.expect("ready");
  load_policy(o.policy, o.settings);
  Meter meter(hotset.pid());
  const auto work = [&](double seconds) {
    for (const double until = now_s() + seconds; now_s() < until;) {
      hotset.ask("for " + std::to_string(o.burst_ms), "done");
      sleep_s(0.5 - static_cast<double>(o.burst_ms) / 1000);
    }
  };
  work(static_cast<double>(o.settle_seconds));
  std::printf("      hit ratio while it settled %.3f\n", meter.take().ratio());
  std::fflush(stdout);

  hotset.ask("allow", "allowed");
  bystander.allow();
  const Counters first = counters();
  const Collapses::Count collapsed_first = collapses.take();
  const uint64_t held_first = held(), alloc_first = vmstat().at("thp_collapse_alloc");
  const double start = now_s();
  double shifted = start;
  for (double now = start; now < start + static_cast<double>(o.seconds);) {
    work(30);
    now = now_s();
    const Counters c = counters();
    const Collapses::Count seen = collapses.take() - collapsed_first;
    std::printf("      %4.0f s: hit ratio %.3f, moved %" PRIu64 " pages, joined %" PRIu64 " (%" PRIu64
                " of both tiers, %" PRIu64 " pages wrong), held %" PRIu64 "\n",
                now - start, meter.take().ratio(), c.moved() - first.moved(), seen.granules, seen.mixed, seen.wrong_pages,
                held() - held_first);
    std::fflush(stdout);
    if (now - shifted >= static_cast<double>(o.shift_seconds)) {
      hotset.ask("shift", "shifted");
      shifted = now;
    }
  }
  const Collapses::Count seen = collapses.take() - collapsed_first;
  const Counters last = counters();
  const uint64_t moves = last.moved() - first.moved();
  std::printf("      thp_collapse_alloc %" PRIu64 ", failed moves %" PRIu64 "\n", vmstat().at("thp_collapse_alloc") - alloc_first,
              last.failed - first.failed);
  check.that(moves >= 2 * 8192, "the policy moved %" PRIu64 " pages in %" PRIu64 " epochs", moves, last.epochs - first.epochs);
  check.that(seen.wrong_pages * 100 <= moves, "khugepaged took %" PRIu64 " pages to the wrong tier: %.2f %% of the moves (bound 1)",
             seen.wrong_pages, 100.0 * static_cast<double>(seen.wrong_pages) / static_cast<double>(std::max<uint64_t>(1, moves)));
  check.that(seen.granules - seen.mixed >= bystander.granules() / 2, "it joined %" PRIu64 " times 2 MiB of one tier (%" PRIu64
             " lay there untouched)", seen.granules - seen.mixed, bystander.granules());
  check.that(!o.hold || held() > held_first, "it was told %" PRIu64 " times to pass on", held() - held_first);

  // What it would have done: the same khugepaged, not told.
  const Collapses::Count before = collapses.take();
  write_file(kHold, "0");
  work(static_cast<double>(o.control_seconds));
  const Collapses::Count untold = collapses.take() - before;
  check.that(untold.wrong_pages > seen.wrong_pages, "not told, it took %" PRIu64 " pages to the wrong tier in %" PRIu64 " s (%" PRIu64
             " times 2 MiB)", untold.wrong_pages, o.control_seconds, untold.mixed);
  write_file(kHold, "1");

  tierctl({"unload"});
  check.that(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte of 192 MiB wrong");
  return check.status();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"khugepaged beside a policy of small pages, inside the lab"};
  Options o;
  bool no_hold = false;
  app.add_option("--policy", o.policy)->capture_default_str();
  app.add_option("--set", o.settings, "key=value: a setting of the policy");
  app.add_option("--piece", o.piece)->capture_default_str();
  app.add_option("--seconds", o.seconds, "of the guest's clock, with khugepaged at full speed")->capture_default_str();
  app.add_option("--settle", o.settle_seconds, "before huge pages are allowed")->capture_default_str();
  app.add_option("--shift", o.shift_seconds, "between two changes of the hot set")->capture_default_str();
  app.add_option("--scan-sleep", o.scan_sleep_ms, "of khugepaged, ms")->capture_default_str();
  app.add_option("--alloc-sleep", o.alloc_sleep_ms, "of khugepaged after it found no free huge page, ms")->capture_default_str();
  app.add_option("--burst", o.burst_ms, "ms of accesses in each half second")->capture_default_str();
  app.add_flag("--no-hold", no_hold, "do not keep khugepaged off: what it does by itself");
  CLI11_PARSE(app, argc, argv);
  o.hold = !no_hold;
  return run(o);
}
