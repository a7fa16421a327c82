// SPDX-License-Identifier: GPL-2.0-or-later
// What scopes and budgets must do, in the lab. Hit ratios are the truth of the
// simulated memory, sizes the kernel's own count of a cgroup's pages by node;
// what tierd says of itself is only used to tell its epochs apart.
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kMiB = 1 << 20, kPageBytes = 4096;
const std::string kCgroups = "/sys/fs/cgroup";

void make_cgroup(const std::string& path) { std::filesystem::create_directories(kCgroups + path); }

void seat(const std::string& cgroup, const std::string& policy) { tierctl({"load", policy, "--cgroup", cgroup}); }
void unseat(const std::string& cgroup) { tierctl({"unload", "--cgroup", cgroup}); }

json scope_of(const json& status, const std::string& cgroup) {
  for (const json& scope : status.at("scopes"))
    if (scope.at("cgroup") == cgroup) return scope;
  die("tierctl status has no scope " + cgroup);
}
uint64_t epoch_of(const std::string& cgroup) {
  return scope_of(tierctl({"status", "--cgroup", cgroup}), cgroup).at("epoch");
}
void wait_epochs(const std::string& cgroup, uint64_t epochs) {
  for (const uint64_t until = epoch_of(cgroup) + epochs; epoch_of(cgroup) < until;) usleep(100'000);
}

// ------------------------------------------------- two with opposite workloads

struct Tenant {
  std::string cgroup, policy, fast_max;
  std::vector<std::string> workload;
  bool moves;  // its hot set moves
};

constexpr uint64_t kWarmMs = 14000, kStretchMs = 8000;
constexpr int kStretches = 2;

// True hit ratios of the tenants that run at the same time: once warm, over
// stretches at whose start the hot set of some moves.
std::vector<double> hit_ratios(Checks& checks, const std::vector<Tenant>& tenants) {
  truth_reset();
  // Under icount the CPUs share one clock: two workloads make half as many accesses
  // each in an epoch. So one alone has a process beside it that only computes.
  std::unique_ptr<Child> computing;
  if (tenants.size() == 1) {
    computing = std::make_unique<Child>(std::vector<std::string>{"scopework", "compute"});
    computing->expect("ready");
    computing->ask("go", "ok");
  }
  std::vector<std::unique_ptr<Child>> children;
  for (const Tenant& tenant : tenants) {
    children.push_back(std::make_unique<Child>(inside(tenant.cgroup, tenant.workload)));
    children.back()->expect("ready");
    tierctl({"cgroup", "set", tenant.cgroup, "--fast-max", tenant.fast_max});
  }
  for (const Tenant& tenant : tenants) seat(tenant.cgroup, tenant.policy);
  auto all_for = [&](uint64_t ms) {
    for (auto& child : children) child->send("for " + std::to_string(ms));
    for (auto& child : children) child->expect("done");
  };
  all_for(kWarmMs);
  std::vector<Meter> meters;
  for (auto& child : children) meters.emplace_back(child->pid());
  for (int stretch = 0; stretch < kStretches; ++stretch) {
    for (size_t i = 0; i < tenants.size(); ++i)
      if (tenants[i].moves) children[i]->ask("shift", "shifted");
    all_for(kStretchMs);
  }
  std::vector<double> ratios;
  for (size_t i = 0; i < tenants.size(); ++i) {
    const Truth truth = meters[i].take();
    const json scope = scope_of(tierctl({"status", "--cgroup", tenants[i].cgroup}), tenants[i].cgroup);
    const Placement placed = placement(children[i]->pid());
    ratios.push_back(truth.ratio());
    std::printf("      %s (%s), %zu at once: true hit ratio %.4f of %" PRIu64 " accesses; %" PRIu64 " of %" PRIu64
                " MiB fast, at most %s; %" PRIu64 " epochs, promoted %" PRIu64 ", demoted %" PRIu64 " pages\n",
                tenants[i].cgroup.c_str(), tenants[i].policy.c_str(), tenants.size(), truth.ratio(), truth.total(),
                placed.fast_pages * kPageBytes / kMiB, (placed.fast_pages + placed.slow_pages) * kPageBytes / kMiB,
                tenants[i].fast_max.c_str(), scope.at("epoch").get<uint64_t>(),
                scope.at("counters").at("promoted_pages_total").get<uint64_t>(),
                scope.at("counters").at("demoted_pages_total").get<uint64_t>());
    checks.that(scope.at("counters").at("policy_failures_total") == 0, "%s: its policy was never thrown out", tenants[i].cgroup.c_str());
  }
  for (size_t i = 0; i < tenants.size(); ++i) {
    unseat(tenants[i].cgroup);
    tierctl({"cgroup", "reset", tenants[i].cgroup});
    checks.that(children[i]->ask("stop", "stopped").at("ok") && children[i]->wait() == 0, "%s: no byte wrong, no write lost", tenants[i].cgroup.c_str());
  }
  return ratios;
}

void two_test(Checks& checks) {
  std::printf("two cgroups, each with its workload, its policy and its fast-max\n");
  tighten_reserve();
  const std::vector<Tenant> both = {
      {"/still", "hyperplace", "80M", {"hotset", "--size", "160M", "--hot", "48M", "--seed", "1", "--place", "slow"}, false},
      {"/moving", "heattree", "80M", {"hotset", "--size", "160M", "--hot", "32M", "--piece", "256K", "--seed", "2", "--place", "slow"}, true}};
  std::vector<double> alone;
  for (const Tenant& tenant : both) {
    make_cgroup(tenant.cgroup);
    alone.push_back(hit_ratios(checks, {tenant})[0]);
  }
  const std::vector<double> together = hit_ratios(checks, both);
  for (size_t i = 0; i < both.size(); ++i)
    checks.that(together[i] >= 0.97 * alone[i], "%s: true hit ratio %.4f beside the other, %.3f of the %.4f it has alone (at least 0.97)",
                both[i].cgroup.c_str(), together[i], together[i] / alone[i], alone[i]);
}

// ---------------------------------------------------------- a noisy neighbour

void neighbour_test(Checks& checks) {
  std::printf("a cgroup with a hot set of 64 MiB, and one that streams through new memory\n");
  tighten_reserve();
  for (const char* cgroup : {"/victim", "/noisy"}) make_cgroup(cgroup);
  Child victim(inside("/victim", {"hotset", "--size", "192M", "--hot", "64M", "--place", "slow-hot"}));
  victim.expect("ready");
  Child noisy(inside("/noisy", {"scopework", "stream", "--size", "384M"}));
  noisy.expect("ready");
  seat("/victim", "hyperplace");
  seat("/noisy", "hyperplace");
  Meter meter(victim.pid());
  auto budget = [&](const char* limit, const char* size) { tierctl({"cgroup", "set", "/victim", limit, size}); };
  auto window = [&](const char* when) {
    victim.ask("for 8000", "done");  // what was changed takes effect
    meter.take();
    victim.ask("for 5000", "done");
    const Truth truth = meter.take();
    const Placement own = placement(victim.pid()), other = noisy.pid() > 0 ? placement(noisy.pid()) : Placement{};
    std::printf("      %s: true hit ratio %.4f; %" PRIu64 " MiB of the victim and %" PRIu64 " MiB of the neighbour in fast memory\n",
                when, truth.ratio(), own.fast_pages * kPageBytes / kMiB, other.fast_pages * kPageBytes / kMiB);
    return truth.ratio();
  };
  window("alone, at first");
  const double alone = window("alone");
  budget("--fast-min", "160M");
  noisy.ask("go", "ok");
  const double kept = window("beside the neighbour, fast-min 160M");
  victim.ask("shift", "shifted");
  const double shifted = window("its hot set moved, fast-min 160M");
  budget("--fast-min", "96M");
  const double kept_96 = window("fast-min 96M");
  tierctl({"cgroup", "reset", "/victim"});
  const double open = window("no fast-min");
  victim.ask("shift", "shifted");
  const double open_shifted = window("its hot set moved, no fast-min");
  const json status = tierctl({"status"});
  unseat("/noisy");
  noisy.ask("stop", "stopped");
  noisy.wait();
  budget("--fast-max", "96M");
  const double alone_96 = window("alone, fast-max 96M");
  const json counters = scope_of(status, "/noisy").at("counters");
  std::printf("      neighbour: promoted %" PRIu64 ", demoted %" PRIu64 " pages\n", counters.at("promoted_pages_total").get<uint64_t>(),
              counters.at("demoted_pages_total").get<uint64_t>());
  auto drop = [](double ratio, double before) { return 100 * (1 - ratio / before); };
  checks.that(drop(kept, alone) < 2, "with fast-min 160M the victim's true hit ratio drops by %.2f %% (less than 2)", drop(kept, alone));
  checks.that(drop(shifted, alone) < 2, "and by %.2f %% after its hot set has moved (less than 2)", drop(shifted, alone));
  checks.that(drop(kept_96, alone_96) < 2, "with fast-min 96M by %.2f %% of what it has alone in 96 MiB (less than 2)", drop(kept_96, alone_96));
  std::printf("      with fast-min 96M by %.2f %% of what it has alone in all of the tier; without fast-min by %.2f %%, and by %.2f %% after its hot set has moved\n",
              drop(kept_96, alone), drop(open, alone), drop(open_shifted, alone));
  unseat("/victim");
  checks.that(victim.ask("stop", "stopped").at("ok") && victim.wait() == 0, "no byte of the victim wrong, no write lost");
}

// ------------------------------------------------------------------ 64 scopes

constexpr uint64_t kBatchPages = 1024;  // the mover's: BATCH_PAIRS of bpf/kmod/move.c

// What the kernel counts for a cgroup: anonymous pages on a node, page faults.
uint64_t number_after(const std::string& text, const std::string& word) {
  auto at = text.find(word);
  return at == std::string::npos ? 0 : std::stoull(text.substr(at + word.size()));
}

// Anonymous pages of mappings of small files (data of libraries), which nobody manages.
uint64_t unmanaged_fast_pages(pid_t pid) {
  std::istringstream maps(read_file("/proc/" + std::to_string(pid) + "/numa_maps"));
  uint64_t pages = 0;
  for (std::string line; std::getline(maps, line);)
    if (line.find(" file=") != std::string::npos && line.find(" anon=") != std::string::npos) pages += number_after(line, " N0=");
  return pages;
}

struct Limited {
  std::string cgroup, kind;
  std::unique_ptr<Child> child;
  uint64_t unmanaged = 0;
  struct Seen {
    uint64_t fast_pages = 0, faults = 0, epoch = 0;  // the epoch that had ended, asked for after the others
  };
  std::vector<Seen> seen;

  void look() {
    Seen now;
    now.fast_pages = number_after(read_file(kCgroups + cgroup + "/memory.numa_stat"), "anon N0=") / kPageBytes;
    now.faults = number_after(read_file(kCgroups + cgroup + "/memory.stat"), "\npgfault ");
    seen.push_back(now);
  }
};

struct Worst {
  int64_t excess = 0;          // beyond fast-max
  int64_t unexplained = 0;     // of that, beyond what was first touched since the last epoch
  uint64_t over = 0, samples = 0;
  uint64_t lasting = 0;        // most epochs on end with an excess that is not first touched
  std::string cgroup;
};

// Each sample against the faults since the last sample that saw the epoch before
// the last one as the newest: no later than the last epoch's end.
Worst judge(const std::vector<Limited>& all, const std::string& kind, size_t first, uint64_t max_pages) {
  Worst worst;
  for (const Limited& one : all) {
    if (one.kind != kind) continue;
    uint64_t lasting = 0, last_epoch = 0;
    for (size_t i = first; i < one.seen.size(); ++i) {
      const uint64_t ended = one.seen[i - 1].epoch;
      size_t since = i - 1;
      while (since > 0 && one.seen[since].epoch >= ended) --since;
      const auto excess = static_cast<int64_t>(one.seen[i].fast_pages) - static_cast<int64_t>(max_pages + one.unmanaged);
      const int64_t unexplained = excess - static_cast<int64_t>(one.seen[i].faults - one.seen[since].faults);
      ++worst.samples;
      worst.over += excess > 0;
      worst.excess = std::max(worst.excess, excess);
      if (unexplained > worst.unexplained) {
        worst.unexplained = unexplained;
        worst.cgroup = one.cgroup;
      }
      if (unexplained <= 0) lasting = 0;
      else if (ended != last_epoch) ++lasting;
      last_epoch = ended;
      worst.lasting = std::max(worst.lasting, lasting);
    }
  }
  return worst;
}

void many_test(Checks& checks, int scopes, uint64_t samples, const std::string& policy) {
  constexpr uint64_t kMaxBytes = 3 * kMiB;
  const uint64_t max_pages = kMaxBytes / kPageBytes;
  std::printf("%d cgroups, each with a policy (%s) and a fast-max of 3 MiB\n", scopes, policy.c_str());
  std::vector<Limited> all(static_cast<size_t>(scopes));
  for (int i = 0; i < scopes; ++i) {
    Limited& one = all[static_cast<size_t>(i)];
    one.cgroup = "/many-" + std::to_string(i);
    one.kind = i % 4 == 0 ? "map" : i % 4 == 1 ? "fork" : "steady";
    make_cgroup(one.cgroup);
    one.child = std::make_unique<Child>(inside(one.cgroup, {"scopework", one.kind, "--seed", std::to_string(i + 1)}));
    one.child->expect("ready");
    tierctl({"cgroup", "set", one.cgroup, "--fast-max", std::to_string(kMaxBytes)});
  }
  std::printf("      all have started\n");
  for (Limited& one : all) seat(one.cgroup, policy);
  std::printf("      all have a policy\n");
  wait_epochs(all.back().cgroup, 8);

  std::map<std::string, Limited*> by_cgroup;
  for (Limited& one : all) by_cgroup[one.cgroup] = &one;
  auto look = [&](uint64_t times) {
    for (uint64_t i = 0; i < times; ++i) {
      for (Limited& one : all) one.look();
      const json status = tierctl({"status"});
      for (const json& scope : status.at("scopes"))
        if (auto one = by_cgroup.find(scope.at("cgroup")); one != by_cgroup.end()) one->second->seen.back().epoch = scope.at("epoch");
      usleep(150'000);
    }
  };
  auto tell = [&](const char* command) {
    for (Limited& one : all) one.child->ask(command, "ok");
  };
  for (Limited& one : all) one.unmanaged = unmanaged_fast_pages(one.child->pid());
  const Tiers tier = tiers();
  uint64_t most_unmanaged = 0;
  for (Limited& one : all) most_unmanaged = std::max(most_unmanaged, one.unmanaged);
  std::printf("      fast tier: %" PRIu64 " MiB free; data of libraries, not managed: %" PRIu64 " pages a process at most\n",
              tier.fast_free_bytes / kMiB, most_unmanaged);
  look(2);
  tell("go");
  look(samples);
  const json status = tierctl({"status"});
  uint64_t demoted = 0, promoted = 0, failed = 0, limited = 0, epochs = UINT64_MAX;
  for (const Limited& one : all) {
    const json counters = scope_of(status, one.cgroup).at("counters");
    demoted += counters.at("demoted_pages_total").get<uint64_t>();
    promoted += counters.at("promoted_pages_total").get<uint64_t>();
    failed += counters.at("policy_failures_total").get<uint64_t>();
    limited += counters.at("rate_limited_pages_total").get<uint64_t>();
    epochs = std::min(epochs, one.seen.back().epoch - one.seen[2].epoch);
  }
  std::printf("      at least %" PRIu64 " epochs of each looked at, %zu looks; promoted %" PRIu64 ", demoted %" PRIu64 " pages, %" PRIu64
              " left for want of rate\n", epochs, all[0].seen.size(), promoted, demoted, limited);
  checks.that(failed == 0, "no policy was thrown out");
  for (const char* kind : {"steady", "map", "fork"}) {
    const Worst worst = judge(all, kind, 2, max_pages);
    std::printf("      %s: %" PRIu64 " of %" PRIu64 " looks beyond fast-max, by %" PRId64 " pages at most; beyond what was first touched since the last epoch %" PRId64 " (%s), for %" PRIu64 " epochs on end\n",
                kind, worst.over, worst.samples, worst.excess, worst.unexplained, worst.cgroup.c_str(), worst.lasting);
    const int64_t bound = std::string(kind) == "steady" ? worst.excess : worst.unexplained;
    checks.that(bound <= static_cast<int64_t>(kBatchPages), "%s: the excess is within %s one batch", kind, std::string(kind) == "steady" ? "" : "first touches and ");
    checks.that(worst.lasting <= 2, "%s: and gone within 2 epochs", kind);
  }
  tell("pause");
  look(1);
  const size_t paused = all[0].seen.size() - 1;
  const auto two_more = [&] {
    return std::all_of(all.begin(), all.end(), [&](const Limited& one) { return one.seen.back().epoch >= one.seen[paused].epoch + 3; });
  };
  while (!two_more()) look(1);
  look(1);
  int64_t left = 0;
  for (const Limited& one : all)
    left = std::max(left, static_cast<int64_t>(one.seen.back().fast_pages) - static_cast<int64_t>(max_pages + one.unmanaged));
  checks.that(left <= 0, "2 whole epochs after the last fork and mapping nobody is beyond fast-max (%" PRId64 " pages)", left);
  for (Limited& one : all) one.child->ask("stop", "stopped");
  for (Limited& one : all) unseat(one.cgroup);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"the goals of scopes and budgets, inside the lab"};
  app.require_subcommand(1);
  CLI::App* two = app.add_subcommand("two", "two cgroups do not disturb each other");
  CLI::App* neighbour = app.add_subcommand("neighbour", "fast-min protects from a neighbour that streams");
  CLI::App* many = app.add_subcommand("many", "fast-max holds for many cgroups with forks and mmaps going on");
  int scopes = 64;
  uint64_t samples = 24;
  std::string policy = "hyperplace";
  many->add_option("--scopes", scopes)->capture_default_str();
  many->add_option("--samples", samples)->capture_default_str();
  many->add_option("--policy", policy)->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  setvbuf(stdout, nullptr, _IOLBF, 0);
  Checks checks;
  if (two->parsed()) two_test(checks);
  if (neighbour->parsed()) neighbour_test(checks);
  if (many->parsed()) many_test(checks, scopes, samples, policy);
  return checks.status();
}
