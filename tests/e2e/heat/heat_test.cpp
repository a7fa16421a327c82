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
  uint64_t size_mib = 384, hot_mib = 64;
  std::string fs;        // empty: anonymous memory; ext4: a file on the disk, shmem: a file on a tmpfs
  std::string map = "shared";
};

// Where the file is to be.
std::string make_file(const std::string& fs) {
  if (fs == "shmem") return "/dev/shm/ht-hotset";
  const std::string disk = "/dev/vda", dir = "/tmp/ht-disk";
  for (const std::vector<std::string>& command : std::vector<std::vector<std::string>>{
           {"modprobe", "virtio_blk"}, {"mkfs.ext4", "-q", "-F", disk}, {"mkdir", "-p", dir}, {"mount", "-t", "ext4", disk, dir}})
    if (::e2e::run(command).status != 0) die("`" + command[0] + "` failed", "the lab needs a disk: --disk 768M");
  return dir + "/hotset";
}

int run(const Options& o) {
  std::vector<std::string> command = {"hotset", "--size", std::to_string(o.size_mib) + "M", "--hot", std::to_string(o.hot_mib) + "M",
                                      "--piece", o.piece, "--thp", o.thp, "--seed", std::to_string(o.seed), "--place", "slow-hot"};
  if (!o.fs.empty()) {
    command.insert(command.end(), {"--file", make_file(o.fs), "--map", o.map});
    if (o.map == "private") command.insert(command.end(), {"--rmw", "0"});  // or each write would make the page an anonymous one
  }
  tighten_reserve();
  Child hotset(command);
  const json where = hotset.expect("ready");
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
  std::printf("hotset in pieces of %s, thp %s, seed %" PRIu64 ", %s%s%s%s: best %.3f, nothing seated %.3f\n", o.piece.c_str(),
              o.thp.c_str(), o.seed, o.policy.c_str(), o.fs.empty() ? "" : ", a file on ", o.fs.c_str(),
              o.fs.empty() ? "" : (", mapped " + o.map).c_str(), best, before);

  load_policy(o.policy, o.settings);
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
  std::vector<uint64_t> hot;
  for (uint64_t start : where.at("hot"))
    for (uint64_t at = 0; at < where.at("piece_bytes").get<uint64_t>(); at += 4096) hot.push_back(start + at);
  const std::vector<int> nodes = nodes_of(hotset.pid(), hot);
  const auto hot_fast = std::count(nodes.begin(), nodes.end(), tiers().fast_node);
  const uint64_t migrated = status.at("mover_pages").at("migrate");
  std::printf("      movers: %s; failures: %s\n", status.at("mover_pages").dump().c_str(), status.at("move_failures").dump().c_str());
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
  if (!o.fs.empty()) {
    const auto hot_pages = static_cast<double>(hot.size());
    check(static_cast<double>(hot_fast) >= 0.95 * hot_pages, "hot pages in fast memory", static_cast<double>(hot_fast) / hot_pages, 0.95);
    check(static_cast<double>(migrated) >= 1.9 * hot_pages, "pages that came and went by migrate, of the hot ones", static_cast<double>(migrated) / hot_pages, 1.9);
    const double demoted = static_cast<double>(last.demoted - first.demoted) / hot_pages;
    check(demoted >= 0.9, "cold pages demoted, of the hot ones", demoted, 0.9);
  }
  check(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte wrong, no write lost", 1, 1);
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
  app.add_option("--size-mib", o.size_mib)->capture_default_str();
  app.add_option("--hot-mib", o.hot_mib)->capture_default_str();
  app.add_option("--fs", o.fs, "the memory is a file's: ext4, shmem")->check(CLI::IsMember({"ext4", "shmem"}));
  app.add_option("--map", o.map, "shared, private")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return run(o);
}
