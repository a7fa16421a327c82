// SPDX-License-Identifier: GPL-2.0-or-later
// A guest inside the lab: the simulated memory counts its misses where its pages are,
// and pages that its host moves while it runs keep what it wrote.
#include <numaif.h>
#include <unistd.h>

#include <cmath>

#include "harness.hpp"

using namespace e2e;

int main() {
  if (run({"modprobe", "kvm_amd"}).status != 0 || access("/dev/kvm", R_OK | W_OK)) {
    std::printf("skipped: the lab has no /dev/kvm, so no guest can run in it\nHINT: QEMU emulates AMD's SVM where it interprets: --accel tcg\n");
    return 77;
  }
  write_file("/proc/sys/kernel/numa_balancing", "0");  // Debian's default brings everything to the node that has the CPUs
  Checks checks;
  constexpr double kRun = 300000, kCold = 0.1 * kRun;  // of them to 80 MiB, so that all miss the cache; the others to 16 MiB
  Child guest({"hotset", "--nested", "--size", "96M", "--hot", "16M", "--piece", "2M", "--place", "slow-hot"});
  const json where = guest.expect("ready");
  truth_reset();
  Meter meter(guest.pid());
  guest.ask("run 300000", "done");
  const Truth slow = meter.take();
  checks.that(slow.total() > 200000 && std::abs(static_cast<double>(slow.fast) - kCold) < 0.02 * kRun, "hot pages slow: %llu of %llu misses fast", static_cast<unsigned long long>(slow.fast),
              static_cast<unsigned long long>(slow.total()));
  guest.ask("place best", "placed");
  meter.take();
  guest.ask("run 300000", "done");
  const Truth fast = meter.take();
  checks.that(fast.total() > 200000 && std::abs(static_cast<double>(fast.slow) - kCold * 16 / 80) < 0.005 * kRun, "hot pages fast, as many cold ones slow: %llu of %llu misses slow",
              static_cast<unsigned long long>(fast.slow), static_cast<unsigned long long>(fast.total()));

  std::vector<void*> pages;
  for (uint64_t start : where.at("hot"))
    for (uint64_t offset = 0; offset < where.at("piece_bytes").get<uint64_t>(); offset += 4096) pages.push_back(reinterpret_cast<void*>(start + offset));
  uint64_t moved = 0;
  guest.ask("go", "ok");
  for (int round = 0; round < 20; round++) {
    const int node = round % 2 == 0;
    std::vector<int> nodes(pages.size(), node), status(pages.size(), -1);
    if (move_pages(guest.pid(), pages.size(), pages.data(), nodes.data(), status.data(), MPOL_MF_MOVE) < 0) die("move_pages failed");
    for (int now : status) moved += now == node;
  }
  checks.that(moved > 10 * pages.size(), "%llu pages moved while the guest used them", static_cast<unsigned long long>(moved));
  guest.ask("pause", "ok");
  checks.that(guest.ask("stop", "stopped").at("ok") && guest.wait() == 0, "no byte wrong, no write lost");
  return checks.status();
}
