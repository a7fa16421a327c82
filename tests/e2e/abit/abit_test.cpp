// SPDX-License-Identifier: GPL-2.0-or-later
// What sources do for tiering, in the lab: accessed bits alone, accessed bits beside
// few samples, and sampling that holds its CPU budget. Judged by the truth of the simulated memory and by
// counters, never by time.
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <numeric>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kEpochs = 60;             // the bound of the project's goal
constexpr uint64_t kMoreEpochs = 12;         // once it is reached: it must stay
constexpr size_t kWindows = 3;               // judged by the mean of the last: single ones may hold a trial
constexpr uint64_t kEpochAccesses = 650000;  // about half a second of the guest's clock

Checks checks;

// A tierd of our own, with what it is told.
class Tierd {
 public:
  explicit Tierd(std::vector<std::string> options) : child_(command(std::move(options))) {
    for (int i = 0; i < 200 && access("/run/hypertier/tierd.sock", F_OK) != 0; ++i) usleep(100000);
  }
  ~Tierd() {
    child_.signal(SIGTERM);
    child_.wait();
  }

 private:
  static std::vector<std::string> command(std::vector<std::string> options) {
    const auto build = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path();
    if (access("/dev/hypertier", F_OK) != 0 && run({"insmod", build / "bpf/kmod/hypertier.ko"}).status != 0) die("hypertier.ko does not load");
    options.insert(options.begin(), {"tierd", "--fresh", "--state-dir", "/tmp/abit-state"});
    return options;
  }
  Child child_;
};

Truth window(Child& workload, Meter& meter, uint64_t operations) {
  workload.ask("run " + std::to_string(operations), "done");
  return meter.take();
}

unsigned long long ull(uint64_t value) { return value; }

// ------------------------------------------------------------ accessed bits

struct Hotset {
  std::string piece;
  double bound;  // share of the best possible that must be reached; 0: printed
};

void abit_test(const Hotset& set, const std::string& policy, uint64_t seed) {
  truth_reset();  // the one before left its page counts
  std::printf("accessed bits alone, %s, hot pieces of %s, seed %llu\n", policy.c_str(), set.piece.c_str(), ull(seed));
  tighten_reserve();
  Child hotset({"hotset", "--size", "384M", "--hot", "64M", "--piece", set.piece, "--seed", std::to_string(seed), "--place", "slow-hot"});
  hotset.expect("ready");
  Meter meter(hotset.pid());
  hotset.ask("place best", "placed");
  window(hotset, meter, kEpochAccesses);
  const double best = window(hotset, meter, 2 * kEpochAccesses).ratio();
  hotset.ask("place worst", "placed");
  window(hotset, meter, kEpochAccesses);
  const double before = window(hotset, meter, kEpochAccesses).ratio();

  Tierd tierd({"--source", "abit"});
  FlushCounter flushes;
  tierctl({"load", policy});
  const uint64_t first = counters().epochs;
  uint64_t epoch = 0, reached = 0;
  std::vector<double> ratios;
  std::printf("      nothing seated %.3f, best %.3f; epoch:true hit ratio", before, best);
  while (epoch < kEpochs) {
    const double ratio = window(hotset, meter, kEpochAccesses).ratio();
    ratios.push_back(ratio);
    epoch = counters().epochs - first;
    std::printf(" %llu:%.3f", ull(epoch), ratio);
    std::fflush(stdout);
    if (!reached && ratio >= 0.9 * best) reached = epoch;
    if (reached && epoch >= reached + kMoreEpochs) break;
  }
  const auto last = ratios.end() - static_cast<std::ptrdiff_t>(std::min(kWindows, ratios.size()));
  const double ratio = std::accumulate(last, ratios.end(), 0.0) / static_cast<double>(ratios.end() - last);
  std::printf("\n");
  const json status = tierctl({"status"});
  std::printf("      last epoch: %s\n", status.at("scopes").at(0).at("last_epoch").at("text").get<std::string>().c_str());
  std::printf("      sampling %s\n", status.at("sampling").dump().c_str());
  const json& sampling = status.at("sampling");
  const double share = sampling.at("cpu_share"), share_max = sampling.at("cpu_share_max");
  checks.that(status.at("source") == "abit", "the source is %s", status.at("source").get<std::string>().c_str());
  if (set.bound > 0)
    checks.that(ratio >= set.bound * best, "true hit ratio %.3f, %.3f of the best possible (%.3f), which needs %.2f within %llu epochs: 0.90 after %llu",
          ratio, ratio / best, best, set.bound, ull(kEpochs), ull(reached));
  else
    std::printf("      true hit ratio %.3f, %.3f of the best possible (%.3f) after %llu epochs\n", ratio, ratio / best, best, ull(epoch));
  checks.that(share <= share_max, "reading bits takes %.3f %% of all CPUs' time, of %.3f %%", 100 * share, 100 * share_max);
  // The thread that reads has its own name: its flushes are not the mover's. One for each process of a cycle,
  // and all but one have little memory.
  const auto own = flushes.by("tierd-abit");
  const uint64_t cycles = sampling.at("cycles_total"), granules = sampling.at("granules_total");
  checks.that(own.calls > 0 && own.calls * 4 <= granules, "it asked for %llu TLB flushes in %llu cycles of %llu granules in all, %llu were done", ull(own.calls),
              ull(cycles), ull(granules), ull(own.flushes));
  const auto done = counters();
  std::printf("      pages moved: %llu up, %llu down; the mover's flushes %llu\n", ull(done.promoted), ull(done.demoted), ull(flushes.by("tierd").calls));
  tierctl({"unload"});
  checks.that(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte of 384 MiB wrong, no write lost");
}

// The true hit ratio after so many epochs of few samples, from the worst placement.
double few_samples(Child& hotset, Meter& meter, const std::string& source, uint64_t period, uint64_t epochs) {
  hotset.ask("place worst", "placed");
  Tierd tierd({"--source", source, "--period", std::to_string(period), "--burst", "1"});
  tierctl({"load", "heattree"});
  const uint64_t first = counters().epochs;
  std::printf("     ");
  for (uint64_t at = 0, shown = 0; (at = counters().epochs - first) < epochs;) {
    const double ratio = window(hotset, meter, kEpochAccesses / 2).ratio();
    if (at < shown) continue;
    const json sampling = tierctl({"status"}).at("sampling");
    std::printf(" %llu:%.3f", ull(at), ratio);
    if (sampling.contains("interval_ns")) std::printf(" (%.0f ms)", 1e-6 * sampling.at("interval_ns").get<double>());
    shown = at + 4;
  }
  std::printf("\n");
  const double ratio = window(hotset, meter, 2 * kEpochAccesses).ratio();
  const json status = tierctl({"status"});
  const json& sampling = status.at("sampling");
  checks.that(status.at("source") == source && sampling.contains("period"), "the source is %s, and samples", status.at("source").get<std::string>().c_str());
  checks.that(sampling.contains("pages_set_total") == source.ends_with("+abit"), "bits are %sread", sampling.contains("pages_set_total") ? "" : "not ");
  std::printf("      true hit ratio %.3f with s = %.4f, sampling %s\n", ratio, status.at("s").get<double>(), sampling.dump().c_str());
  tierctl({"unload"});
  return ratio;
}

void both_test(uint64_t period, uint64_t epochs) {
  std::printf("accessed bits beside few samples, hot single pages, %llu epochs each\n", ull(epochs));
  tighten_reserve();
  Child hotset({"hotset", "--size", "384M", "--hot", "64M", "--piece", "4K", "--seed", "1", "--place", "slow-hot"});
  hotset.expect("ready");
  Meter meter(hotset.pid());
  const double samples = few_samples(hotset, meter, "vpebs", period, epochs);
  const double both = few_samples(hotset, meter, "vpebs+abit", period, epochs);
  checks.that(both >= samples + 0.1, "true hit ratio %.3f by samples, %.3f with accessed bits beside them", samples, both);
  checks.that(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte of 384 MiB wrong, no write lost");
}

// -------------------------------------------------------------- rate control

// Guest time of so many accesses, by the workload's own clock.
double seconds(Child& hotset, uint64_t operations) {
  timespec from{}, to{};
  clock_gettime(CLOCK_MONOTONIC, &from);
  hotset.ask("run " + std::to_string(operations), "done");
  clock_gettime(CLOCK_MONOTONIC, &to);
  return static_cast<double>(to.tv_sec - from.tv_sec) + static_cast<double>(to.tv_nsec - from.tv_nsec) * 1e-9;
}

void rate_test() {
  std::printf("sampling holds its CPU budget\n");
  const double budget = 0.005;
  Child hotset({"hotset", "--size", "128M", "--hot", "32M", "--seed", "1", "--place", "slow-hot"});
  hotset.expect("ready");
  seconds(hotset, 8 * kEpochAccesses);  // caches and QEMU's TLB settle
  const double unsampled = seconds(hotset, 8 * kEpochAccesses);
  Tierd tierd({"--source", "vpebs", "--period", "2", "--cpu-budget", "0.5"});
  tierctl({"load", "static"});
  json sampling = tierctl({"status"}).at("sampling");
  const uint64_t start = sampling.at("period");
  checks.that(start <= 16, "the period starts at %llu, far too low", ull(start));
  std::printf("      period after each epoch's worth:");
  for (int i = 0; i < 16; ++i) {
    seconds(hotset, kEpochAccesses);
    sampling = tierctl({"status"}).at("sampling");
    std::printf(" %llu (%.2f %%)", ull(sampling.at("period")), 100 * sampling.at("cpu_share").get<double>());
    std::fflush(stdout);
  }
  std::printf("\n      %s\n", sampling.dump().c_str());
  const uint64_t period = sampling.at("period");
  checks.that(period > start, "it is %llu now", ull(period));
  checks.that(period >= sampling.at("period_min") && period <= sampling.at("period_max"), "which is within its bounds, %llu to %llu",
        ull(sampling.at("period_min")), ull(sampling.at("period_max")));
  checks.that(sampling.at("cpu_share") <= 1.2 * budget, "sampling takes %.3f %% of all CPUs' time by its own account, of %.3f %%",
        100 * sampling.at("cpu_share").get<double>(), 100 * budget);
  // What the workload lost, whoever took it: the interrupts, the sampler, tierd.
  const double sampled = seconds(hotset, 8 * kEpochAccesses);
  const double lost = (sampled - unsampled) / sampled / static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
  std::printf("      the workload's accesses took %.3f s without, %.3f s with it: %.3f %% of all CPUs' time\n", unsampled, sampled, 100 * lost);
  checks.that(lost <= 2 * budget, "the workload lost %.3f %% of all CPUs' time to everything of ours, at most %.3f %% is allowed", 100 * lost, 200 * budget);
  tierctl({"unload"});
  hotset.ask("stop", "stopped");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"sources of heat, inside the lab"};
  app.require_subcommand(1);
  uint64_t seed = 1;
  CLI::App* abit = app.add_subcommand("abit", "accessed bits alone find the hot set");
  abit->add_option("--seed", seed);
  std::string policy = "hyperplace";
  abit->add_option("--policy", policy)->capture_default_str();
  std::vector<std::string> pieces = {"2M", "64K", "4K"};
  abit->add_option("--piece", pieces);
  uint64_t epochs = 40, period = 2000;
  CLI::App* both = app.add_subcommand("both", "accessed bits beside few samples tell more than these");
  both->add_option("--epochs", epochs)->capture_default_str();
  both->add_option("--period", period, "misses a sample")->capture_default_str();
  CLI::App* rate = app.add_subcommand("rate", "sampling holds its CPU budget");
  CLI11_PARSE(app, argc, argv);
  if (abit->parsed())
    for (const std::string& piece : pieces) abit_test({piece, piece == "2M" ? 0.9 : 0}, policy, seed);
  if (both->parsed()) both_test(period, epochs);
  if (rate->parsed()) rate_test();
  return checks.status();
}
