// SPDX-License-Identifier: GPL-2.0-or-later
// In the lab, driven together with tierers_test: another tierer at work while the
// host's targets change, under two balloons and under the stock driver's one.
//   flex-tierers-guest HYPERFLEX_KO SYSTEM      SYSTEM as in bench/runner: kernel-tuned, damon
// Prints "order N" where the host is to set the device's number, then results.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include <hypertier/flex.h>

#include "../../../bench/runner/system.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kFastPages = 256 * kMiB / 4096, kSlowPages = 640 * kMiB / 4096;
constexpr unsigned kWindow = 300000;

struct Target {
  uint64_t fast, slow;  // MiB to be taken
};
constexpr Target kTargets[] = {{32, 96}, {64, 0}, {0, 128}, {48, 48}, {0, 0}};

uint64_t vmstat(const std::string& name) {
  const std::string text = read_file("/proc/vmstat");
  const auto at = text.find("\n" + name + " ");
  return at == std::string::npos ? 0 : strtoull(text.c_str() + at + name.size() + 2, nullptr, 10);
}

uint64_t ballooned_pages(bool two) {
  if (!two) return vmstat("balloon_inflate") - vmstat("balloon_deflate");
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/bus/virtio/drivers/hyperflex"))
    for (const char* file : {"/fast_balloon_bytes", "/slow_balloon_bytes"})
      bytes += strtoull(read_file(entry.path().string() + file).c_str(), nullptr, 10);
  return bytes / 4096;
}

void order(uint64_t num_pages) {
  std::printf("order %lu\n", num_pages);
  std::fflush(stdout);
}

double mean_ratio(Child& workload, Meter& meter, bool two) {
  const uint64_t start = two ? 0 : ballooned_pages(false);
  uint64_t fast = 0, slow = 0;
  for (const Target& target : kTargets) {
    const uint64_t pages = (target.fast + target.slow) * kMiB / 4096;
    order(two ? hf_pack(kFastPages, kSlowPages, target.fast * kMiB / 4096, target.slow * kMiB / 4096) : pages);
    int waited = 0;
    for (; waited < 60 && ballooned_pages(two) - start != pages; waited++) workload.ask("run 50000", "done");
    if (waited == 60) die("the balloon does not get to " + std::to_string(pages) + " pages, it has " + std::to_string(ballooned_pages(two) - start));
    meter.take();
    for (int i = 0; i < 8; i++) workload.ask("run " + std::to_string(kWindow), "done");
    const Truth seen = meter.take();
    std::printf("  %s: %3lu MiB fast and %3lu MiB slow to be taken: hit ratio %.3f, %lu MiB of the application in fast memory\n",
                two ? "two balloons" : "one balloon ", target.fast, target.slow, seen.ratio(), placement(workload.pid()).fast_pages / 256);
    std::fflush(stdout);
    fast += seen.fast;
    slow += seen.slow;
  }
  return static_cast<double>(fast) / static_cast<double>(fast + slow);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string module = argv[1], name = argv[2];
  auto system = bench::make_system({name, "", "", "", 0, {}});
  system->prepare();
  Child workload({"hotset", "--size", "320M", "--hot", "48M"});
  workload.expect("ready");
  bench::Memory memory(workload.pid());
  memory.reset();
  Meter meter(workload.pid());
  system->start(memory, workload.pid());
  for (int i = 0; i < 6; i++) workload.ask("run " + std::to_string(kWindow), "done");
  if (run({"modprobe", "virtio_balloon"}).status) die("the stock driver does not load");
  const double one = mean_ratio(workload, meter, false);
  if (run({"insmod", module}).status) die("hyperflex.ko does not load");
  const double two = mean_ratio(workload, meter, true);
  system->stop();
  workload.ask("stop", "stopped");  // its memory was right
  std::printf("%s: hit ratio %.3f under one balloon, %.3f under two, while targets change; memory verified\n", name.c_str(), one, two);
  return 0;
}
