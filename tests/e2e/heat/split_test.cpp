// SPDX-License-Identifier: GPL-2.0-or-later
// Huge pages that are hot in parts, in the lab: hot 64 KiB pieces scattered over memory
// that is all huge pages. Taken apart by skew, the pieces come to the fast tier; left
// whole, every huge page is about as hot as any other.
#include <algorithm>
#include <cinttypes>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kEpochAccesses = 650000;  // about half a second of the guest's clock

struct Options {
  std::string piece = "64K";
  std::string hot = "12M";  // one piece in a huge page, on average
  std::vector<std::string> settings;
  uint64_t windows = 50;
  bool whole = false;  // huge pages are left whole
};

uint64_t split_pages() {
  const auto scope = root_scope();
  return scope ? scope->at("counters").at("split_pages_total").get<uint64_t>() : 0;
}

int run(const Options& o) {
  Checks check;
  write_file("/sys/kernel/mm/transparent_hugepage/enabled", "always");
  tighten_reserve();
  Child hotset({"hotset", "--size", "384M", "--hot", o.hot, "--piece", o.piece, "--thp", "always"});
  hotset.expect("ready");
  Meter meter(hotset.pid());
  const auto window = [&] {
    hotset.ask("run " + std::to_string(kEpochAccesses), "done");
    return meter.take().ratio();
  };
  window();
  const double before = window();
  std::vector<std::string> settings = o.settings;
  if (o.whole) settings.push_back("split_swaps=4294967295");
  load_policy("heattree", settings);
  double settled = 0;
  std::printf("      nothing seated %.3f; epoch:hit(pages taken apart, moved)", before);
  for (uint64_t w = 0; w < o.windows; ++w) {
    const double ratio = window();
    if (w >= o.windows * 3 / 4) settled += ratio / static_cast<double>(o.windows - o.windows * 3 / 4);
    if (w % 5) continue;
    const Counters c = counters();
    std::printf(" %" PRIu64 ":%.3f(%" PRIu64 ",%" PRIu64 ")", c.epochs, ratio, split_pages(), c.moved());
    std::fflush(stdout);
  }
  std::printf("\n");
  const uint64_t split = split_pages();
  std::printf("      %" PRIu64 " huge pages taken apart, hit ratio of the last quarter %.3f\n", split / 512, settled);
  if (o.whole) {
    check.that(split == 0, "none is taken apart");
  } else {
    // Those in slow memory, and those that must make room in fast memory.
    check.that(split >= 16 * 512, "at least 16 of 192 huge pages are taken apart (%" PRIu64 ")", split / 512);
    check.that(settled >= before + 0.6 * (0.93 - before), "true hit ratio %.3f, at first %.3f", settled, before);
  }
  tierctl({"unload"});
  check.that(hotset.ask("stop", "stopped").at("ok") && hotset.wait() == 0, "no byte of 384 MiB wrong");
  return check.status();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"huge pages that are hot in parts, inside the lab"};
  Options o;
  app.add_option("--piece", o.piece)->capture_default_str();
  app.add_option("--hot", o.hot)->capture_default_str();
  app.add_option("--set", o.settings, "key=value: a setting of heattree");
  app.add_option("--windows", o.windows, "of half a second")->capture_default_str();
  app.add_flag("--whole", o.whole, "leave huge pages whole");
  CLI11_PARSE(app, argc, argv);
  return run(o);
}
