// SPDX-License-Identifier: GPL-2.0-or-later
// Who gets the fast tier, in the lab, under heattree: processes that share it get
// it by the rate of their pages, whatever their size; those that do not live long
// cost nothing. Judged by the truth of the simulated memory and by counters.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <unordered_map>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kPagesPerMiB = kMiB / 4096;

// ---------------------------------------------------------- by rate, not by size

struct Sharer {
  std::string name;
  uint64_t mib;
  uint64_t rate;  // accesses of a page, in some unit
  std::unique_ptr<Child> child;

  uint64_t accesses(uint64_t unit) const { return mib * rate * unit; }
};

// A page, over all processes.
using PageKey = std::pair<pid_t, uint64_t>;
struct PageHash {
  std::size_t operator()(const PageKey& key) const { return std::hash<uint64_t>()(key.second ^ static_cast<uint64_t>(key.first) << 48); }
};
using PageCounts = std::unordered_map<PageKey, PageTruth, PageHash>;

PageCounts counts_of(const std::string& path, const std::set<pid_t>& pids) {
  PageCounts counts;
  for (const PageTruth& page : load_page_truth(path))
    if (pids.contains(page.pid)) counts[{page.pid, page.address}] = page;
  return counts;
}

struct Shares {
  double ratio = 0;
  double oracle = 0;                     // what it would have been
  std::map<pid_t, double> oracle_share;  // of a process's pages
};

// The pages that had most of what came before, in as much fast memory as is in use,
// judged by what came after: an oracle that knew what it judges would choose among
// equals by chance, and be right.
Shares judge(const PageCounts& before, const PageCounts& after, uint64_t fast_pages) {
  std::vector<std::pair<uint64_t, PageKey>> order;
  for (const auto& [key, page] : before) order.push_back({page.total(), key});
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a > b; });
  order.resize(std::min<std::size_t>(order.size(), fast_pages));
  uint64_t fast = 0, best = 0, total = 0;
  for (const auto& [key, page] : after) {
    fast += page.fast;
    total += page.total();
  }
  Shares shares;
  std::map<pid_t, uint64_t> pages;
  for (const auto& [key, page] : before) ++pages[key.first];
  for (const auto& [count, key] : order) {
    if (auto found = after.find(key); found != after.end()) best += found->second.total();
    shares.oracle_share[key.first] += 1.0 / static_cast<double>(pages[key.first]);
  }
  shares.ratio = static_cast<double>(fast) / static_cast<double>(std::max<uint64_t>(1, total));
  shares.oracle = static_cast<double>(best) / static_cast<double>(std::max<uint64_t>(1, total));
  return shares;
}

void fair_test(Checks& checks, const std::vector<std::string>& settings, uint64_t epochs) {
  std::printf("four processes: a big one whose pages are cold, a small one whose pages are hot, and two\n"
              "of different size whose pages are equally warm\n");
  tighten_reserve();
  std::vector<Sharer> all;
  all.push_back({"big", 96, 1, {}});
  all.push_back({"twin 32", 32, 3, {}});
  all.push_back({"twin 64", 64, 3, {}});
  all.push_back({"small", 12, 8, {}});
  uint64_t seed = 0;
  for (Sharer& one : all) {
    const std::string size = std::to_string(one.mib) + "M";
    // By size: the big one has all of the fast tier, those that came later have the rest.
    one.child = std::make_unique<Child>(std::vector<std::string>{"hotset", "--size", size, "--hot", size, "--seed", std::to_string(++seed),
                                                                 "--place", seed == 1 ? "fast" : "slow"});
    one.child->expect("ready");
  }
  std::set<pid_t> pids;
  for (const Sharer& one : all) pids.insert(one.child->pid());
  // About half a second of the guest's clock.
  auto round = [&] {
    for (Sharer& one : all) one.child->send("run " + std::to_string(one.accesses(1350)));
    for (Sharer& one : all) one.child->expect("done");
  };
  auto show = [&](const char* when) {
    std::printf("      %s, share in fast memory:", when);
    for (const Sharer& one : all) std::printf("  %s %.3f", one.name.c_str(), placement(one.child->pid()).fast_share());
    std::printf("\n");
  };
  auto ratio = [&] {
    Truth sum;
    for (pid_t pid : pids) {
      const Truth one = truth(pid);
      sum.fast += one.fast;
      sum.slow += one.slow;
    }
    return sum.ratio();
  };
  show("at the start");
  round();
  truth_reset();
  round();
  const double before = ratio();

  load_policy("heattree", settings);
  const Counters first = counters();
  std::printf("      epoch:true hit ratio(moved)");
  Counters last = first;
  for (uint64_t epoch = 0; epoch < epochs;) {
    // labctl and tierctl are short-lived processes themselves: seldom.
    for (int i = 0; i < 3; ++i) round();
    truth_reset();
    round();
    const Counters now = counters();
    epoch = now.epochs - first.epochs;
    std::printf(" %" PRIu64 ":%.3f(%" PRIu64 ")", epoch, ratio(), now.moved() - last.moved());
    std::fflush(stdout);
    last = now;
  }
  std::printf("\n");
  constexpr int kRounds = 6;
  truth_reset();
  for (int i = 0; i < kRounds; ++i) round();
  const std::string known_path = "/tmp/ht-truth-known", seen_path = "/tmp/ht-truth-seen";
  save_page_truth(known_path);
  truth_reset();
  for (int i = 0; i < kRounds; ++i) round();
  const Counters end = counters();
  show("at the end");
  uint64_t fast_pages = 0;
  std::map<pid_t, double> fast_share;
  for (pid_t pid : pids) {
    const Placement place = placement(pid);
    fast_pages += place.fast_pages;
    fast_share[pid] = place.fast_share();
  }
  save_page_truth(seen_path);
  tierctl({"unload"});
  const PageCounts known = counts_of(known_path, pids), seen = counts_of(seen_path, pids);
  const Shares shares = judge(known, seen, fast_pages);
  std::map<std::string, double> has, rate;
  for (const Sharer& one : all) {
    const pid_t pid = one.child->pid();
    uint64_t misses = 0, pages = 0;
    for (const auto& [key, page] : seen)
      if (key.first == pid && ++pages) misses += page.total();
    has[one.name] = fast_share.at(pid);
    rate[one.name] = static_cast<double>(misses) / static_cast<double>(one.mib * kPagesPerMiB);
    std::printf("      %-8s %3" PRIu64 " MiB, true accesses of a page %.1f: %.3f in fast memory, by the oracle %.3f\n", one.name.c_str(), one.mib,
                rate[one.name], has[one.name], shares.oracle_share.contains(pid) ? shares.oracle_share.at(pid) : 0.0);
  }
  std::printf("      %" PRIu64 " pages of fast memory are theirs; moved in the last %d rounds: %" PRIu64 " pages\n", fast_pages, 2 * kRounds, end.moved() - last.moved());

  const double gain = (shares.ratio - before) / (shares.oracle - before);
  checks.that(rate["small"] > 2 * rate["twin 32"] && rate["twin 32"] > 2 * rate["big"], "the rates of their pages are far apart");
  const double alike = rate["twin 32"] / rate["twin 64"];
  checks.that(alike > 0.9 && alike < 1.1, "and those of the twins' are equal (%.3f)", alike);
  checks.that(fast_pages < 108 * kPagesPerMiB, "fast memory is too small for all that is warm: %" PRIu64 " MiB", fast_pages / kPagesPerMiB);
  checks.that(gain >= 0.95, "true hit ratio %.3f, oracle %.3f, nothing seated %.3f: %.3f of the oracle's gain (at least 0.95)", shares.ratio, shares.oracle, before, gain);
  checks.that(has["small"] >= 0.97, "the small one whose pages are hottest is fast: %.3f", has["small"]);
  checks.that(has["big"] <= 0.05, "the big one whose pages are coldest is slow: %.3f", has["big"]);
  const double equal = has["twin 32"] / std::max(has["twin 64"], 1e-3);
  checks.that(equal >= 0.9 && equal <= 1.1, "pages of equal rate have equal shares, whatever their process's size: %.3f and %.3f, ratio %.3f (0.9 to 1.1)",
              has["twin 32"], has["twin 64"], equal);
  for (Sharer& one : all)
    checks.that(one.child->ask("stop", "stopped").at("ok") && one.child->wait() == 0, "%s: no byte wrong, no write lost", one.name.c_str());
}

// ------------------------------------------------------- those that do not live long

// CPU time of all of a process's threads.
uint64_t cpu_ns(pid_t pid) {
  uint64_t sum = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
    std::ifstream file(task.path() / "schedstat");
    uint64_t ns = 0;
    file >> ns;
    sum += ns;
  }
  return sum;
}

uint64_t rss_anon_kib(pid_t pid) {
  const std::string text = read_file("/proc/" + std::to_string(pid) + "/status"), word = "RssAnon:";
  const auto at = text.find(word);
  return at == std::string::npos ? 0 : std::stoull(text.substr(at + word.size()));
}

// What tierd keeps and spends.
struct Keeps {
  uint64_t epoch = 0, cpu_ns = 0, rss_kib = 0, granules = 0, estimate_bytes = 0, ranges = 0, processes = 0;
};
Keeps keeps() {
  const json status = tierctl({"status"});
  const pid_t pid = status.at("pid");
  const auto root = root_scope();
  if (!root) die("tierd tells nothing of the root");
  const json& scope = *root;
  return {scope.at("counters").at("epochs_total"), cpu_ns(pid), rss_anon_kib(pid), status.at("granules").at("used"),
          scope.at("estimate_bytes"), scope.at("ranges"), scope.at("processes")};
}

struct Phase {
  double ratio = 0, cpu_us = 0;  // of an epoch
  uint64_t epochs = 0, promoted = 0, demoted = 0;
  Keeps end;
};

void short_test(Checks& checks, const std::vector<std::string>& settings, uint64_t processes) {
  std::printf("a hot set, and beside it processes that live for half an epoch\n");
  tighten_reserve();
  Child steady({"hotset", "--size", "144M", "--hot", "32M", "--piece", "64K", "--place", "slow-hot"});
  steady.expect("ready");
  const uint64_t kChildMib = 2;
  Child brood({"shortlived", "--size", std::to_string(kChildMib) + "M", "--ms", "250", "--alive", "5"});
  brood.expect("ready");
  load_policy("heattree", settings);
  auto phase = [&](const char* name, const std::function<bool(uint64_t epochs)>& go_on) {
    truth_reset();
    Meter meter(steady.pid());
    const Keeps first = keeps();
    const Counters before = counters();
    Phase phase;
    do {
      steady.ask("run 600000", "done");
      phase.epochs = counters().epochs - first.epoch;
    } while (go_on(phase.epochs));
    phase.ratio = meter.take().ratio();
    const Counters after = counters();
    phase.end = keeps();
    phase.epochs = phase.end.epoch - first.epoch;
    phase.cpu_us = static_cast<double>(phase.end.cpu_ns - first.cpu_ns) / 1e3 / static_cast<double>(std::max<uint64_t>(1, phase.epochs));
    phase.promoted = after.promoted - before.promoted;
    phase.demoted = after.demoted - before.demoted;
    std::printf("      %s: %" PRIu64 " epochs, true hit ratio %.4f, promoted %" PRIu64 ", demoted %" PRIu64 " pages; tierd: %.0f us an epoch, %" PRIu64
                " KiB, %" PRIu64 " granules, estimate %" PRIu64 " KiB, %" PRIu64 " ranges, %" PRIu64 " processes\n",
                name, phase.epochs, phase.ratio, phase.promoted, phase.demoted, phase.cpu_us, phase.end.rss_kib, phase.end.granules,
                phase.end.estimate_bytes >> 10, phase.end.ranges, phase.end.processes);
    std::fflush(stdout);
    return phase;
  };
  auto epochs = [](uint64_t wanted) { return [wanted](uint64_t now) { return now < wanted; }; };
  phase("comes to rest", epochs(28));
  const Phase alone = phase("alone", epochs(12));
  brood.ask("go", "ok");
  // As many again after half of them: what grows with the dead is seen between the two.
  auto born = [&](uint64_t wanted) {
    return [&brood, wanted](uint64_t) {
      return brood.ask("go", "ok").at("processes_total").get<uint64_t>() < wanted;
    };
  };
  const Phase half = phase("beside them", born(processes / 2));
  const Phase beside = phase("beside as many again", born(processes));
  const json done = brood.ask("pause", "paused");
  phase("they have gone", epochs(24));
  const Phase after = phase("alone again", epochs(12));
  tierctl({"unload"});

  const uint64_t total = done.at("processes_total");
  checks.that(done.at("failed_total") == 0 && total >= processes, "%" PRIu64 " processes came and went", total);
  const double with = (half.ratio * static_cast<double>(half.epochs) + beside.ratio * static_cast<double>(beside.epochs)) /
                      static_cast<double>(half.epochs + beside.epochs);
  checks.that(with >= alone.ratio - 0.01, "the hot set's true hit ratio beside them %.4f, alone %.4f (at most 0.01 less)", with, alone.ratio);
  // What is still moved when there is nobody else is not for them.
  const double moved_alone = static_cast<double>(alone.promoted + alone.demoted) / static_cast<double>(alone.epochs);
  const double moved = static_cast<double>(half.promoted + half.demoted + beside.promoted + beside.demoted) / static_cast<double>(half.epochs + beside.epochs);
  const double touched = static_cast<double>(total * kChildMib * kPagesPerMiB) / static_cast<double>(half.epochs + beside.epochs);
  checks.that(moved <= moved_alone + touched / 50, "pages moved in an epoch: %.0f, alone %.0f (at most 2 %% of the %.0f that they touched more)", moved, moved_alone, touched);
  // Lists of ranges grow with what is alive, and what explain remembers up to its bound.
  checks.that(after.end.rss_kib <= beside.end.rss_kib + 512, "tierd's memory does not grow any more when they have gone: %" PRIu64 " KiB, then %" PRIu64,
              beside.end.rss_kib, after.end.rss_kib);
  // tierd's own memory is counted as well, and it has grown; a granule for each of the dead would be far more.
  const uint64_t kept = total / 4;
  checks.that(after.end.estimate_bytes <= alone.end.estimate_bytes + kept * 2048, "the estimate's counters are freed: %" PRIu64 " KiB before, %" PRIu64 " after",
              alone.end.estimate_bytes >> 10, after.end.estimate_bytes >> 10);
  checks.that(after.end.granules <= alone.end.granules + kept, "and the sampler's: %" PRIu64 " granules before, %" PRIu64 " after", alone.end.granules,
              after.end.granules);
  // Whoever asks, tierctl and labctl, is a process itself if an epoch finds it.
  checks.that(after.end.processes <= alone.end.processes + 2, "no dead process is kept: %" PRIu64 " before, %" PRIu64 " after", alone.end.processes, after.end.processes);
  checks.that(after.cpu_us <= 1.25 * alone.cpu_us, "an epoch costs what is alive: %.0f us before, %.0f after (at most 1.25 times)", alone.cpu_us, after.cpu_us);
  brood.ask("stop", "stopped");
  checks.that(brood.wait() == 0 && steady.ask("stop", "stopped").at("ok") && steady.wait() == 0, "no byte wrong, no write lost");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"who gets the fast tier, inside the lab"};
  app.require_subcommand(1);
  // As in the bench: the lab's clock makes swaps dear beside misses (docs/heattree.md).
  std::vector<std::string> settings = {"slow_extra_ns=1360"};
  uint64_t epochs = 32, processes = 240;
  app.add_option("--set", settings, "key=value: a setting of heattree");
  CLI::App* fair = app.add_subcommand("fair", "by the rate of pages, not by the size of processes");
  fair->add_option("--epochs", epochs)->capture_default_str();
  CLI::App* brief = app.add_subcommand("short", "processes that do not live long cost nothing");
  brief->add_option("--processes", processes)->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  setvbuf(stdout, nullptr, _IOLBF, 0);
  Checks checks;
  if (fair->parsed()) fair_test(checks, settings, epochs);
  if (brief->parsed()) short_test(checks, settings, processes);
  return checks.status();
}
