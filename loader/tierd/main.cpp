// SPDX-License-Identifier: GPL-2.0-or-later
// tierd: options, then Daemon.
#include <malloc.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "tierd/daemon.hpp"

namespace {

// An epoch needs the memory that the last one needed: giving it back in between costs page
// faults and flushes, and an arena for each thread costs a split of its mapping whenever it grows.
void keep_memory() {
  constexpr int kKept = 32 << 20;
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_TRIM_THRESHOLD, kKept);
  mallopt(M_MMAP_THRESHOLD, kKept);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace hypertier;
  keep_memory();
  DaemonOptions options;
  CLI::App app{
      "tierd " HT_VERSION " - tiers memory by the policy that is seated.\n"
      "Starts idle, or with the policy that was seated when it ended; `tierctl load heattree` seats one.\n"
      "Stays in the foreground and logs to stderr; SIGTERM ends it and restores the machine."};
  app.name("tierd");
  app.set_version_flag("--version", std::string("tierd " HT_VERSION));
  app.add_option("--fast-nodes", options.tiering.tiers.fast_nodes, "NUMA nodes of the fast tier, as 0,2-3 (default: found out)");
  app.add_option("--slow-nodes", options.tiering.tiers.slow_nodes, "NUMA nodes of the slow tier (default: found out)");
  app.add_option("--source", options.tiering.source, "take heat from this source only: pebs, ibs, vpebs or abit; pebs+abit and the like, or best+abit: from accessed bits beside samples (default: the best that works)");
  app.add_option("--period", options.tiering.sampling.period, "misses per sample (default: the source's own)")
      ->check(CLI::Range(1U, 1U << 30));
  double cpu_percent = 0;
  auto* cpu_budget = app.add_option("--cpu-budget", cpu_percent,
                                    "CPU time for sampling, % of all online CPUs: the period, or the share of memory whose accessed bits are read, follows (default: 0.5; the lab's virtual PEBS: none)")
                         ->check(CLI::Range(0.01, 50.0));
  app.add_option("--burst", options.tiering.burst, "so many times as many samples in the first 8 s of an estimate, beyond the CPU budget; 1: not more")
      ->check(CLI::Range(1U, 16U))
      ->capture_default_str();
  app.add_option("--granules", options.tiering.granules, "2 MiB pieces that can be tracked at once (default: from RAM size)")
      ->check(CLI::Range(1024U, 1U << 26));
  app.add_option("--socket", options.socket, "where tierctl finds it")->capture_default_str();
  app.add_option("--state-dir", options.state, "where the seated policy is kept over a restart")->capture_default_str();
  app.add_flag("--fresh", options.fresh, "start idle even if a policy was seated before");
  app.add_flag_callback("--foreground", [] {}, "stay in the foreground (the default)");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (*cpu_budget) options.tiering.cpu_share = cpu_percent / 100;
  // A period that was asked for stays, unless a budget is asked for as well.
  else if (options.tiering.sampling.period) options.tiering.hold_cpu_share = false;
  const auto end = [](const Error& error) {
    std::fprintf(stderr, "tierd: %s\n", error.message.c_str());
    if (!error.hint.empty()) std::fprintf(stderr, "HINT: %s\n", error.hint.c_str());
    return 1;
  };
  if (geteuid() != 0) return end({"tierd needs root", "run it again as root, for example with sudo", 0});
  Daemon daemon(std::move(options));
  if (auto done = daemon.run(); !done) return end(done.error());
  return 0;
}
