// SPDX-License-Identifier: GPL-2.0-or-later
// ht-demo: shows the whole pipeline at work, inside the lab. Real redis-server
// and an exact exerciser start with their hot memory in the slow tier; a policy
// is loaded, swapped and loaded again while they run. All hit ratios are the
// truth of the simulated memory.
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>

#include <CLI/CLI.hpp>

#include "../pipeline/harness.hpp"
#include "heatmap.hpp"

using namespace e2e;

namespace {

constexpr uint64_t kGranule = 2 << 20;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kPageStep = 16;  // every 16th page tells the tier of a granule well enough for a picture

struct Options {
  std::string out = "build/demo";
  uint64_t seed = 1;
  bool live = false;
};

double guest_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// What time is modelled from: a CPU of 2e9 instructions/s, and the latencies
// that the firmware's HMAT tells. The guest's clock counts 2 ns for each
// instruction of whatever runs, ours included.
struct Model {
  double clock_share = 0.25;
  double fast_ns = 0, slow_ns = 0;
};

Model model() {
  double latency[2] = {};
  for (int node = 0; node < 2; node++) {
    const std::string text = read_file("/sys/devices/system/node/node" + std::to_string(node) + "/access0/initiators/read_latency");
    latency[node] = text.empty() ? 0 : std::stod(text);
  }
  if (latency[0] <= 0 || latency[1] <= latency[0]) die("the guest's HMAT tells no latencies", "boot the lab with ./run lab");
  return {.fast_ns = latency[0], .slow_ns = latency[1]};
}

// Everything that is measured over some windows.
struct Sum {
  Truth truth;
  double seconds = 0;
  uint64_t operations = 0;

  double ratio() const { return truth.ratio(); }
  double ns_per_operation(const Model& model) const {
    return (seconds * 1e9 * model.clock_share + model.fast_ns * static_cast<double>(truth.fast) + model.slow_ns * static_cast<double>(truth.slow)) /
           static_cast<double>(operations);
  }
  void add(const Sum& other) {
    truth.fast += other.truth.fast;
    truth.slow += other.truth.slow;
    seconds += other.seconds;
    operations += other.operations;
  }
};

struct Result {
  std::string name, what;
  Sum before, after;
  uint64_t moved_pages = 0, flushes = 0, flush_calls = 0, samples = 0, sampler_ns = 0, sampler_runs = 0, epochs = 0;
};

struct Cost {
  uint64_t moved = 0, flushes = 0, flush_calls = 0, samples = 0, sampler_ns = 0, sampler_runs = 0, epochs = 0;
};

class Stage {
 public:
  Stage(const Options& options, std::string name, pid_t pid, Child& driver, uint64_t operations)
      : options_(options), name_(std::move(name)), pid_(pid), driver_(driver), meter_(pid), operations_(operations) {}

  void seat(const std::string& policy) {
    tierctl({"load", policy});
    event_ = policy_.empty() ? policy + " loaded" : policy + " swapped in";
    policy_ = policy;
    say();
  }
  void event(const std::string& text) { event_ = text; }

  // One stretch of work, measured.
  Sum window() {
    Sum sum;
    double start = guest_seconds();
    driver_.ask("run " + std::to_string(operations_), "done");
    sum.seconds = guest_seconds() - start;
    sum.truth = meter_.take();
    sum.operations = operations_;
    record(sum);
    return sum;
  }
  Sum windows(int count) {
    Sum sum;
    for (int i = 0; i < count; i++) sum.add(window());
    return sum;
  }
  // Until nothing is gained any more, at most so many epochs.
  void settle(uint64_t epochs) {
    constexpr size_t kFlat = 8;
    std::vector<double> seen;
    const uint64_t until = counters().epochs + epochs;
    while (counters().epochs < until) {
      seen.push_back(window().ratio());
      if (seen.size() < 2 * kFlat) continue;
      auto mean = [](auto from, auto to) { return std::accumulate(from, to, 0.0) / static_cast<double>(to - from); };
      double recent = mean(seen.end() - kFlat, seen.end()), earlier = mean(seen.end() - 2 * kFlat, seen.end() - kFlat);
      if (recent - earlier < 0.005) return;
    }
  }

  demo::Picture picture;

 private:
  void say() {
    if (!options_.live) std::printf("  %-14s %s\n", name_.c_str(), event_.c_str());
    std::fflush(stdout);
  }

  void record(const Sum& sum) {
    demo::Frame frame;
    frame.seconds = guest_seconds();
    frame.fast_hit_ratio = sum.ratio();
    frame.policy = policy_;
    frame.event = std::exchange(event_, {});
    frame.cells = cells();
    picture.frames.push_back(std::move(frame));
    progress(sum.ratio());
  }

  void progress(double ratio) {
    constexpr int kBar = 40;
    int filled = static_cast<int>(std::lround(ratio * kBar));
    std::string bar = std::string(static_cast<size_t>(filled), '#') + std::string(static_cast<size_t>(kBar - filled), '.');
    const bool every = picture.frames.size() % 8 == 0;
    if (options_.live)
      std::printf("\r  %-14s %-11s %5.1f s  true fast hits [%s] %5.1f %%\033[K", name_.c_str(), policy_.c_str(), picture.frames.back().seconds - picture.frames.front().seconds, bar.c_str(), 100 * ratio);
    else if (every)
      std::printf("  %-14s %-11s %5.1f s  true fast hits [%s] %5.1f %%\n", name_.c_str(), policy_.c_str(), picture.frames.back().seconds - picture.frames.front().seconds, bar.c_str(), 100 * ratio);
    std::fflush(stdout);
  }

  // What HyperTier saw, in granules, with the tier that each is really in.
  std::vector<demo::Cell> cells() {
    std::vector<demo::Cell> cells;
    std::vector<uint64_t> pages;
    std::vector<size_t> owner;
    const json answer = tierctl({"ranges", "--pid", std::to_string(pid_)});
    for (const json& range : answer.at("ranges")) {
      const uint64_t start = range.at("start"), end = range.at("end");
      if (end - start < kGranule / 2) continue;  // libraries, stacks: lost in the picture
      // counts[0] halves each epoch: in a steady state it is twice the samples of one.
      const double rate = range.at("counts").at(0).get<double>() / 2 / (static_cast<double>(end - start) / (1 << 20));
      for (uint64_t from = start; from < end;) {
        uint64_t to = std::min(end, (from / kGranule + 1) * kGranule);
        for (uint64_t page = from; page < to; page += kPageStep * kPage) {
          pages.push_back(page);
          owner.push_back(cells.size());
        }
        cells.push_back({from, to, rate, -1});
        from = to;
      }
    }
    std::vector<int> nodes = nodes_of(pid_, pages);
    std::vector<double> fast(cells.size()), resident(cells.size());
    for (size_t i = 0; i < nodes.size(); i++) {
      resident[owner[i]] += nodes[i] >= 0;
      fast[owner[i]] += nodes[i] == 0;
    }
    for (size_t i = 0; i < cells.size(); i++)
      if (resident[i] > 0) cells[i].fast_share = fast[i] / resident[i];
    return cells;
  }

  const Options& options_;
  std::string name_;
  pid_t pid_;
  Child& driver_;
  Meter meter_;
  uint64_t operations_;
  std::string policy_, event_;
};

// Costs since the sampler started.
Cost cost(FlushCounter& flushes) {
  json status = tierctl({"status"});
  const json& counters = status.at("scopes").at(0).at("counters");
  Cost cost;
  cost.moved = counters.at("promoted_pages_total").get<uint64_t>() + counters.at("demoted_pages_total").get<uint64_t>();
  FlushCounter::Count flushed = flushes.by("tierd");
  cost.flushes = flushed.flushes;
  cost.flush_calls = flushed.calls;
  cost.samples = counters.at("samples_total");
  cost.sampler_ns = counters.at("sampler_ns_total");
  cost.sampler_runs = counters.at("sampler_runs_total");
  cost.epochs = counters.at("epochs_total");
  return cost;
}

void account(Result& result, const Cost& from, const Cost& to) {
  result.moved_pages = to.moved - from.moved;
  result.flushes = to.flushes - from.flushes;
  result.flush_calls = to.flush_calls - from.flush_calls;
  result.samples = to.samples - from.samples;
  result.sampler_ns = to.sampler_ns - from.sampler_ns;
  result.sampler_runs = to.sampler_runs - from.sampler_runs;
  result.epochs = to.epochs - from.epochs;
}

void write_picture(const Options& options, const std::string& file, demo::Picture& picture, std::string title, std::string subtitle) {
  picture.title = std::move(title);
  picture.subtitle = std::move(subtitle);
  std::ofstream(options.out + "/" + file) << demo::heat_map_svg(picture);
}

void say(const Options& options, const std::string& text) {
  std::printf("%s%s\n", options.live ? "\r\033[K" : "", text.c_str());
  std::fflush(stdout);
}

std::vector<Result> redis_stage(const Options& options, FlushCounter& flushes) {
  constexpr uint64_t kKeys = 90000, kValue = 2000, kOperations = 12500;
  say(options, "redis: redis-server of this distribution, 90,000 keys of 2000 bytes; old keys fill the fast tier, young ones get the slow one");
  tighten_reserve();
  truth_reset();
  Redis redis(options.seed, kKeys, kValue);
  Placement at = placement(redis.server.pid());
  say(options, "redis: filled, " + std::to_string(at.fast_pages / 256) + " MiB fast, " + std::to_string(at.slow_pages / 256) + " MiB slow");

  Result latest{"redis_latest", "redis, youngest keys hottest", {}, {}};
  Stage stage(options, "redis latest", redis.server.pid(), redis.load, kOperations);
  stage.seat("static");
  stage.windows(4);
  latest.before = stage.windows(6);
  Cost from = cost(flushes);
  stage.seat("hyperplace");
  stage.settle(60);
  latest.after = stage.windows(6);
  account(latest, from, cost(flushes));
  stage.seat("static");
  stage.windows(4);

  Result zipf{"redis_zipf", "redis, hot keys scattered", {}, {}};
  redis.load.ask("dist zipf", "ok");
  stage.event("keys scattered");
  stage.windows(2);
  zipf.before = stage.windows(4);
  from = cost(flushes);
  stage.seat("hyperplace");
  stage.settle(40);
  zipf.after = stage.windows(4);
  account(zipf, from, cost(flushes));
  write_picture(options, "redis.svg", stage.picture, "redis-server: where its memory is and how hot",
                "youngest keys hottest (YCSB latest, 5 % inserts), then the same skew over scattered keys (zipf); seed " + std::to_string(options.seed));
  tierctl({"unload"});
  redis.stop();
  return {latest, zipf};
}

Result hotset_stage(const Options& options, FlushCounter& flushes) {
  constexpr uint64_t kOperations = 650000;
  say(options, "hotset: 384 MiB, of which 64 MiB in scattered pieces of 2 MiB take 90 % of the accesses; all of them start slow, the fast tier is full");
  tighten_reserve();
  truth_reset();
  Child hotset({"hotset", "--seed", std::to_string(options.seed), "--place", "slow-hot"});
  json where = hotset.expect("ready");
  char text[96];
  std::snprintf(text, sizeof text, "hotset: placed, %.2f %% of the fast tier is free", 100 * tiers().free_share());
  say(options, text);

  Result result{"hotset", "hotset, 2 MiB pieces", {}, {}};
  Stage stage(options, "hotset", hotset.pid(), hotset, kOperations);
  stage.seat("static");
  stage.windows(2);
  result.before = stage.windows(6);
  Cost from = cost(flushes);
  stage.seat("hyperplace");
  stage.settle(40);
  result.after = stage.windows(4);
  account(result, from, cost(flushes));
  stage.seat("static");
  stage.windows(2);
  hotset.ask("shift", "shifted");
  stage.event("hot set shifts");
  stage.windows(4);
  stage.seat("hyperplace");
  stage.settle(40);
  write_picture(options, "hotset.svg", stage.picture, "hotset: 64 MiB hot in scattered 2 MiB pieces of 384 MiB",
                "90 % of accesses to the hot pieces, all slow at the start, fast tier full; seed " + std::to_string(options.seed));
  tierctl({"unload"});
  if (!hotset.ask("stop", "stopped").at("ok") || hotset.wait() != 0) die("hotset found wrong memory: a page was lost or corrupted");
  return result;
}

double ratio_of(uint64_t a, uint64_t b) { return b ? static_cast<double>(a) / static_cast<double>(b) : 0; }

json report_entry(const Result& r, const Model& model) {
  return {{"name", r.name},
          {"fast_hit_ratio_before", r.before.ratio()},
          {"fast_hit_ratio_after", r.after.ratio()},
          {"moved_pages_total", r.moved_pages},
          {"flushes_total", r.flushes},
          {"flush_calls_total", r.flush_calls},
          {"flushes_per_moved_page", ratio_of(r.flushes, r.moved_pages)},
          {"samples_total", r.samples},
          {"sampler_ns_per_sample", ratio_of(r.sampler_ns, r.sampler_runs)},
          {"epochs_total", r.epochs},
          {"modelled_ns_per_operation_before", r.before.ns_per_operation(model)},
          {"modelled_ns_per_operation_after", r.after.ns_per_operation(model)},
          {"modelled_time_ratio", r.after.ns_per_operation(model) / r.before.ns_per_operation(model)}};
}

void table(const std::vector<Result>& results, const Model& model) {
  std::printf("\n%-30s %17s %9s %9s %11s %10s %14s\n", "", "true fast hits", "pages", "flushes", "sampler ns", "samples", "modelled time");
  std::printf("%-30s %8s %8s %9s %9s %11s %10s %14s\n", "workload", "before", "after", "moved", "per page", "per sample", "", "after/before");
  for (const Result& r : results)
    std::printf("%-30s %7.1f%% %7.1f%% %9llu %9.5f %11.0f %10llu %13.2f\n", r.what.c_str(), 100 * r.before.ratio(), 100 * r.after.ratio(),
                static_cast<unsigned long long>(r.moved_pages), ratio_of(r.flushes, r.moved_pages), ratio_of(r.sampler_ns, r.sampler_runs),
                static_cast<unsigned long long>(r.samples), r.after.ns_per_operation(model) / r.before.ns_per_operation(model));
  std::printf("\nbefore: policy static, same samples, nothing moved. after: hyperplace. Hit ratios are the truth of the\n"
              "simulated memory. Flushes: TLB flushes that tierd's moves caused. Modelled time of an\n"
              "operation: all instructions meanwhile, ours included, at 2e9/s, + %.0f ns (fast) or %.0f ns (slow) for each\n"
              "access that missed the cache.\n", model.fast_ns, model.slow_ns);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  std::string only;
  CLI::App app{"the pipeline at work: run it with ./run demo"};
  app.add_option("--out", options.out, "directory for report.json and the pictures")->capture_default_str();
  app.add_option("--seed", options.seed)->capture_default_str();
  app.add_option("--only", only, "one workload")->check(CLI::IsMember({"redis", "hotset"}));
  app.add_flag("--live", options.live, "one line that changes, for a terminal");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  if (error) die("cannot make " + options.out + ": " + error.message());

  write_file("/proc/sys/kernel/bpf_stats_enabled", "1");
  const Model timing = model();
  FlushCounter flushes;
  std::vector<Result> results;
  json machine = tierctl({"status"});
  if (only != "hotset") results = redis_stage(options, flushes);
  if (only != "redis") results.push_back(hotset_stage(options, flushes));
  table(results, timing);

  json report = {{"schema", 1}, {"seed", options.seed}, {"policy", "hyperplace"}, {"baseline_policy", "static"},
                 {"modelled_fast_ns", timing.fast_ns}, {"modelled_slow_ns", timing.slow_ns}, {"modelled_instructions_per_second", 2e9}, {"tiers", machine.at("tiers")}, {"workloads", json::array()}};
  for (const Result& r : results) report["workloads"].push_back(report_entry(r, timing));
  std::ofstream file(options.out + "/report.json");
  file << report.dump(2) << "\n";
  file.close();
  if (!file) die("cannot write " + options.out + "/report.json");
  std::printf("\nreport: %s/report.json", options.out.c_str());
  for (const auto& entry : std::filesystem::directory_iterator(options.out))
    if (entry.path().extension() == ".svg") std::printf("\npicture: %s", entry.path().c_str());
  std::printf("\n");
  return 0;
}
