// SPDX-License-Identifier: GPL-2.0-or-later
// In the lab: what tierd does for the balloon of the fast tier. It tells the
// driver the share of misses that go to slow memory; and where the balloon takes
// memory in use, it demotes the coldest first and the hot pages stay, while the
// driver alone pushes out whatever lies in its way. Judged by the truth of the
// memory.
//   flex-demotion-test HYPERFLEX_KO
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kWindow = 650000;                     // accesses, about half a second of the guest's clock
constexpr uint64_t kHot = 48 * kMiB, kLeft = 72 * kMiB;  // left to the application of the fast tier

uint64_t number(const std::string& path) { return strtoull(read_file(path).c_str(), nullptr, 10); }

class Balloon {
 public:
  Balloon() {
    for (const auto& entry : std::filesystem::directory_iterator("/sys/bus/virtio/drivers/hyperflex"))
      if (std::filesystem::exists(entry.path() / "fast_bytes")) directory_ = entry.path().string() + "/";
    if (directory_.empty()) die("hyperflex.ko drives no balloon");
  }
  void aim(uint64_t bytes) const { write_file(directory_ + "fast_balloon_target_bytes", std::to_string(bytes)); }
  uint64_t bytes() const { return number(directory_ + "fast_balloon_bytes"); }
  uint64_t patience_ms() const { return number(directory_ + "demote_first_ms"); }
  double slow_miss_share() const { return static_cast<double>(number(directory_ + "slow_miss_share")) / 65536; }
  uint64_t migrated_blocks() const {
    const std::string text = read_file(directory_ + "fast_counters");
    return strtoull(text.c_str() + text.find("migrated_blocks_total") + 22, nullptr, 10);
  }

 private:
  std::string directory_;
};

void work(Child& workload, int windows) {
  for (int i = 0; i < windows; i++) workload.ask("run " + std::to_string(kWindow), "done");
}

// The told share against the true one, until they agree; the last pair.
bool tells(Child& workload, Meter& meter, const Balloon& balloon, const char* where) {
  double told = 0, real = 0;
  for (int i = 0; i < 40; i++) {
    meter.take();
    work(workload, 1);
    real = 1 - meter.take().ratio();
    told = balloon.slow_miss_share();
    if (i >= 4 && std::abs(told - real) <= 0.1) break;
  }
  std::printf("%s: %.3f of the misses go to slow memory, tierd says %.3f\n", where, real, told);
  return std::abs(told - real) <= 0.1;
}

struct Outcome {
  double before, after;
  uint64_t wanted_bytes, taken_bytes, demoted_pages;
};

Outcome take(Child& workload, Meter& meter, const Balloon& balloon, bool policy) {
  workload.ask("place best", "placed");
  if (policy) tierctl({"load", "hyperplace"});
  work(workload, 8);
  Outcome o{};
  meter.take();
  work(workload, 1);
  o.before = meter.take().ratio();
  const uint64_t demoted = policy ? counters().demoted : 0, blocks = balloon.migrated_blocks();
  const uint64_t available = placement(workload.pid()).fast_pages * 4096 + tiers().fast_free_bytes;
  o.wanted_bytes = (available - kLeft) / (2 * kMiB) * (2 * kMiB);
  balloon.aim(o.wanted_bytes);
  for (int i = 0; i < 40 && balloon.bytes() < o.wanted_bytes; i++) work(workload, 1);
  o.demoted_pages = policy ? counters().demoted - demoted : 0;
  // What the order itself did: no policy repairs it while we look.
  if (policy) tierctl({"unload"});
  o.taken_bytes = balloon.bytes();
  meter.take();
  work(workload, 1);
  o.after = meter.take().ratio();
  std::printf("%-21s %lu of %lu MiB of the fast tier taken, %lu MiB left to the application; hit ratio %.3f -> %.3f; "
              "%lu pages demoted, %lu blocks freed by migration\n",
              policy ? "tierd demotes first:" : "the driver alone:", o.taken_bytes / kMiB, o.wanted_bytes / kMiB,
              placement(workload.pid()).fast_pages * 4096 / kMiB, o.before, o.after, o.demoted_pages, balloon.migrated_blocks() - blocks);
  std::fflush(stdout);
  balloon.aim(0);
  while (balloon.bytes()) workload.ask("run 1000", "done");
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (run({"insmod", argv[1]}).status) die("hyperflex.ko does not load");
  const Balloon balloon;
  Child workload({"hotset", "--size", "320M", "--hot", std::to_string(kHot)});
  workload.expect("ready");
  truth_reset();
  Meter meter(workload.pid());
  Checks checks;

  // Nothing is moved meanwhile.
  tierctl({"load", "hyperplace", "--dry-run"});
  workload.ask("place worst", "placed");
  checks.that(tells(workload, meter, balloon, "hot pages in slow memory"), "the share of slow misses is told, within 0.1");
  workload.ask("place best", "placed");
  checks.that(tells(workload, meter, balloon, "hot pages in fast memory"), "and followed when it falls");
  tierctl({"unload"});
  checks.that(balloon.slow_miss_share() == 0, "without a policy nothing is claimed");

  const Outcome alone = take(workload, meter, balloon, false);
  const Outcome first = take(workload, meter, balloon, true);
  checks.that(alone.taken_bytes == alone.wanted_bytes && first.taken_bytes == first.wanted_bytes, "the balloon got all it was to get");
  checks.that(first.demoted_pages * 4096 >= first.taken_bytes / 4, "tierd demoted for it");
  checks.that(first.after >= first.before * 0.95, "the hot pages stayed in the fast tier");
  checks.that(first.after > alone.after + 0.1, "more of them than without tierd");
  checks.that(balloon.patience_ms() == 0, "without a policy the driver waits for nobody");
  workload.ask("stop", "stopped");  // its memory was right
  return checks.status();
}
