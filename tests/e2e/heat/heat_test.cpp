// SPDX-License-Identifier: GPL-2.0-or-later
// Heat in small pieces, in the lab: hot pieces of a given size scattered over
// memory come to the fast tier and stay there. Judged by the truth of the
// simulated memory and by counters.
#include <algorithm>
#include <cinttypes>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kEpochAccesses = 650000;  // about half a second of the guest's clock

int failed = 0;
void check(bool ok, const char* what, double seen, double bound) {
  std::printf("%s %s: %.3f (bound %.3f)\n", ok ? "  ok  " : "  FAIL", what, seen, bound);
  std::fflush(stdout);
  failed += !ok;
}

struct Options {
  std::string policy = "heattree";
  std::vector<std::string> settings;
  std::string piece = "64K";
  std::string thp = "never";
  uint64_t seed = 1;
  uint64_t epochs = 60;
  uint64_t reach_epochs = 40;
  double reach = 0.9;    // of the best, within reach_epochs
  double final = 0.95;   // of the best, at the end
};

int run(const Options& o) {
  tighten_reserve();
  Child hotset({"hotset", "--size", "384M", "--hot", "64M", "--piece", o.piece, "--thp", o.thp, "--seed",
                std::to_string(o.seed), "--place", "slow-hot"});
  hotset.expect("ready");
  Meter meter(hotset.pid());
  auto window = [&](uint64_t operations) {
    hotset.ask("run " + std::to_string(operations), "done");
    return meter.take();
  };
  hotset.ask("place best", "placed");
  window(kEpochAccesses);
  const double best = window(2 * kEpochAccesses).ratio();
  hotset.ask("place worst", "placed");
  window(kEpochAccesses / 2);
  const double before = window(kEpochAccesses / 2).ratio();
  std::printf("hotset in pieces of %s, thp %s, seed %" PRIu64 ", %s: best %.3f, nothing seated %.3f\n", o.piece.c_str(),
              o.thp.c_str(), o.seed, o.policy.c_str(), best, before);

  std::vector<std::string> load = {"load", o.policy};
  for (const std::string& setting : o.settings) load.insert(load.end(), {"--set", setting});
  tierctl(load);
  const Counters first = counters();
  Counters last = first;
  uint64_t reached = 0;
  double settled = 0;
  int settled_windows = 0;
  Counters settled_from = first;
  std::printf("      epoch:hit(moved)");
  for (uint64_t epoch = 0; epoch < o.epochs;) {
    const double ratio = window(kEpochAccesses).ratio();
    const Counters now = counters();
    epoch = now.epochs - first.epochs;
    std::printf(" %" PRIu64 ":%.3f(%" PRIu64 ")", epoch, ratio, now.moved() - last.moved());
    std::fflush(stdout);
    last = now;
    if (!reached && ratio >= o.reach * best) reached = epoch;
    if (epoch > o.epochs * 3 / 4) {
      if (!settled_windows++) settled_from = now;
      settled += ratio;
    }
  }
  std::printf("\n");
  json status = tierctl({"status"});
  tierctl({"unload"});
  settled /= std::max(1, settled_windows);
  const Tiers tier = tiers();
  const double moved = 100.0 * static_cast<double>(last.promoted - settled_from.promoted) * 4096 /
                       static_cast<double>(tier.fast_capacity_bytes) /
                       static_cast<double>(std::max<uint64_t>(1, last.epochs - settled_from.epochs));
  std::printf("      s = %.3f; promoted %" PRIu64 ", demoted %" PRIu64 ", failed %" PRIu64 " pages; share of the gain %.3f\n",
              status.at("s").get<double>(), last.promoted - first.promoted, last.demoted - first.demoted,
              last.failed - first.failed, (settled - before) / (best - before));
  check(reached && reached <= o.reach_epochs, "epochs to the bound's share of the best", static_cast<double>(reached),
        static_cast<double>(o.reach_epochs));
  check(settled >= o.final * best, "true hit ratio of the last quarter, of the best", settled / best, o.final);
  check(moved <= 0.5, "moves of the last quarter, % of the fast tier an epoch", moved, 0.5);
  check(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte of 384 MiB wrong", 1, 1);
  return failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"hot pieces of any size, inside the lab"};
  Options o;
  app.add_option("--policy", o.policy)->capture_default_str();
  app.add_option("--set", o.settings, "key=value: a setting of the policy");
  app.add_option("--piece", o.piece)->capture_default_str();
  app.add_option("--thp", o.thp)->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--epochs", o.epochs)->capture_default_str();
  app.add_option("--reach-epochs", o.reach_epochs)->capture_default_str();
  app.add_option("--reach", o.reach)->capture_default_str();
  app.add_option("--final", o.final)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return run(o);
}
