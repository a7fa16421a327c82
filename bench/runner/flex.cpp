// SPDX-License-Identifier: GPL-2.0-or-later
// How fast a guest gives memory to the host and takes it back: hyperflex.ko beside
// the stock driver, on the same device of the same guest, interleaved. Ratios
// within one run; the guest is QEMU's without the lab.
//   ht-bench-flex --kernel DIR --initramfs FILE [--rounds 5] [--out FILE] [--check]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include <hypertier/flex.h>

#include "../../tests/e2e/flex/guest.hpp"

using namespace hypertier;
using namespace hypertier::test;
using namespace std::chrono_literals;
using Json = nlohmann::json;

namespace {

constexpr unsigned long long kMiB = 1 << 20, kFast = 256 * kMiB, kSlow = 512 * kMiB, kTaken = 256 * kMiB;

[[noreturn]] void die(const std::string& message, const std::string& hint = {}) {
  fprintf(stderr, "ht-bench-flex: %s\n", message.c_str());
  if (!hint.empty()) fprintf(stderr, "HINT: %s\n", hint.c_str());
  exit(1);
}

template <class T>
T sure(Result<T> result) {
  if (!result) die(result.error().message, result.error().hint);
  return *result;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// QMP takes what is to remain, and hands the difference to the driver.
double seconds_until(Guest& guest, unsigned num_pages, unsigned long long taken) {
  const auto start = std::chrono::steady_clock::now();
  sure(guest.qmp().command("balloon", {{"value", kFast + kSlow - num_pages * 4096ULL}}));
  while (sure(guest.qmp().command("query-balloon"))["actual"] != kFast + kSlow - taken) {
    if (std::chrono::steady_clock::now() - start > 120s) die("the balloon does not get to " + std::to_string(taken >> 20) + " MiB");
    std::this_thread::sleep_for(2ms);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Json compare(GuestOptions options, const std::string& append, int rounds, double at_least) {
  options.append = append;
  auto guest = Guest::start(options);
  if (!guest) die(guest.error().message, guest.error().hint);
  std::vector<double> stock, flex, deflate;
  for (int round = 0; round < rounds; round++) {
    sure((*guest)->run("insmod /modules/virtio_balloon.ko; sleep 1"));
    stock.push_back(seconds_until(**guest, kTaken >> 12, kTaken));
    seconds_until(**guest, 0, 0);
    sure((*guest)->run("rmmod virtio_balloon; insmod /modules/hyperflex.ko; sleep 1"));
    flex.push_back(seconds_until(**guest, hf_pack(kFast >> 12, kSlow >> 12, 0, kTaken >> 12), kTaken));
    deflate.push_back(seconds_until(**guest, 0, 0));
    sure((*guest)->run("rmmod hyperflex"));
  }
  if ((*guest)->console().find("Call Trace") != std::string::npos) die("the guest's kernel complains: " + (*guest)->console());
  const double ratio = median(stock) / median(flex);
  printf("%-22s %8.0f %10.0f %7.1f   >= %-4.1f %12.0f\n", append.empty() ? "Debian's defaults" : append.c_str(), 256 / median(stock),
         256 / median(flex), ratio, at_least, 256 / median(deflate));
  fflush(stdout);
  return {{"kernel_arguments", append}, {"taken_bytes", kTaken}, {"rounds", rounds}, {"stock_seconds", stock}, {"hyperflex_seconds", flex},
          {"hyperflex_deflate_seconds", deflate}, {"ratio", ratio}, {"ratio_wanted", at_least}};
}

}  // namespace

int main(int argc, char** argv) {
  GuestOptions options;
  options.fast_bytes = kFast;
  options.slow_bytes = kSlow;
  int rounds = 5;
  bool check = false;
  std::string out;
  CLI::App app{"inflate and deflate speed of hyperflex.ko beside the stock balloon driver"};
  app.add_option("--kernel", options.kernel, "directory of the unpacked kernel package")->required();
  app.add_option("--initramfs", options.initramfs, "of the test guest")->required();
  app.add_option("--rounds", rounds, "the median is taken of")->check(CLI::Range(1, 100))->capture_default_str();
  app.add_option("--out", out, "JSON");
  app.add_flag("--check", check, "fail below the wanted ratios");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  printf("256 MiB of 768 taken from a guest, median of %d, MiB/s of this machine's clock\n%-22s %8s %10s %7s %9s %12s\n", rounds,
         "guest", "stock", "hyperflex", "ratio", "wanted", "giving back");
  const Json cells = {compare(options, "", rounds, 1.6), compare(options, "init_on_alloc=0", rounds, 8)};
  if (!out.empty()) {
    std::ofstream file(out);
    file << Json{{"schema", 1}, {"cells", cells}}.dump(2) << "\n" << std::flush;
    if (!file) die("cannot write " + out);
  }
  bool good = true;
  for (const auto& cell : cells) good &= cell["ratio"] >= cell["ratio_wanted"];
  return check && !good ? 1 : 0;
}
