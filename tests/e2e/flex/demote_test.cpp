// SPDX-License-Identifier: GPL-2.0-or-later
// In the lab: the fast tier's balloon takes memory that is in use. With a policy
// seated, tierd demotes the coldest first and the hot pages stay; without, the
// driver pushes out whatever lies in its way. Judged by the truth of the memory.
#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kWindow = 650000;           // accesses, about half a second of the guest's clock
constexpr uint64_t kHot = 48 * kMiB, kLeft = 72 * kMiB;  // left to the application of the fast tier

std::string device() {
  for (const auto& entry : std::filesystem::directory_iterator("/sys/bus/virtio/drivers/hyperflex"))
    if (std::filesystem::exists(entry.path() / "fast_bytes")) return entry.path().string() + "/";
  die("hyperflex.ko drives no balloon");
}
uint64_t number(const std::string& path) { return strtoull(read_file(path).c_str(), nullptr, 10); }
uint64_t migrated_blocks(const std::string& d) {
  const std::string text = read_file(d + "fast_counters");
  return strtoull(text.c_str() + text.find("migrated_blocks_total") + 22, nullptr, 10);
}

struct Outcome {
  double before, after;
  uint64_t taken_bytes, left_bytes, demoted_pages, blocks;
};

Outcome take(Child& workload, Meter& meter, const std::string& d, bool policy) {
  workload.ask("place best", "placed");
  if (policy) tierctl({"load", "hyperplace"});
  for (int i = 0; i < 8; i++) workload.ask("run " + std::to_string(kWindow), "done");
  Outcome o{};
  meter.take();
  workload.ask("run " + std::to_string(kWindow), "done");
  o.before = meter.take().ratio();
  const uint64_t demoted = policy ? counters().demoted : 0, blocks = migrated_blocks(d);
  const uint64_t available = placement(workload.pid()).fast_pages * 4096 + tiers().fast_free_bytes;
  const uint64_t target = (available - kLeft) / (2 * kMiB) * (2 * kMiB);
  write_file(d + "fast_balloon_target_bytes", std::to_string(target));
  for (int i = 0; i < 40 && number(d + "fast_balloon_bytes") < target; i++) workload.ask("run " + std::to_string(kWindow), "done");
  o.demoted_pages = policy ? counters().demoted - demoted : 0;
  // What the order itself did: no policy repairs it while we look.
  if (policy) tierctl({"unload"});
  o.taken_bytes = number(d + "fast_balloon_bytes");
  o.blocks = migrated_blocks(d) - blocks;
  o.left_bytes = placement(workload.pid()).fast_pages * 4096;
  meter.take();
  workload.ask("run " + std::to_string(kWindow), "done");
  o.after = meter.take().ratio();
  std::printf("%-34s %3lu MiB of the fast tier taken, %3lu MiB left to the application; hit ratio %.3f -> %.3f; %lu pages demoted, %lu blocks freed by migration\n",
              policy ? "tierd demotes first:" : "the driver alone:", o.taken_bytes / kMiB, o.left_bytes / kMiB, o.before, o.after,
              o.demoted_pages, o.blocks);
  if (o.taken_bytes < target) die("the balloon has " + std::to_string(o.taken_bytes) + " bytes, wanted are " + std::to_string(target));
  write_file(d + "fast_balloon_target_bytes", "0");
  while (number(d + "fast_balloon_bytes")) workload.ask("run 1000", "done");
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (run({"insmod", argv[1]}).status) die("hyperflex.ko does not load");
  const std::string d = device();
  Child workload({"hotset", "--size", "320M", "--hot", std::to_string(kHot)});
  truth_reset();
  Meter meter(workload.pid());
  const Outcome alone = take(workload, meter, d, false);
  const Outcome first = take(workload, meter, d, true);
  workload.ask("stop", "stopped");  // its memory was right
  bool good = true;
  const auto check = [&](bool ok, const char* text) {
    std::printf("%s %s\n", ok ? "  ok  " : "  FAIL", text);
    good &= ok;
  };
  check(first.demoted_pages * 4096 >= first.taken_bytes / 4, "tierd demoted for the balloon");
  check(first.after >= first.before * 0.95, "the hot pages stayed in the fast tier");
  check(first.after > alone.after + 0.1, "more of them than without tierd");
  check(number(d + "demote_first_ms") == 0, "without a policy the driver waits for nobody");
  return good ? 0 : 1;
}
