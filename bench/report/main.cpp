// SPDX-License-Identifier: GPL-2.0-or-later
// ht-bench: runs cells of the benchmarks in the lab, one VM after another, and
// writes what they say: table, JSON, pictures, docs/results.md.
#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include <CLI/CLI.hpp>

#include "../cases.hpp"
#include "results.hpp"

namespace fs = std::filesystem;
using namespace bench;

namespace {

struct Options {
  fs::path repo, build;
  std::string commit = "unknown";
  std::vector<std::string> names;  // WORKLOAD[/SYSTEM[/SEED]]
  bool full = false, report_only = false, docs = false, quick = false, any_commit = false, list = false, agree = false;
  unsigned seconds = 0;
  std::vector<std::string> settings;
  bool record = false;
};

struct Job {
  const Case* one;
  std::string system;
  uint64_t seed;
  fs::path file;
};

int shell(const std::vector<std::string>& command) {
  const pid_t pid = fork();
  if (pid == 0) {
    std::vector<char*> argv;
    for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// How long a system is watched: what stands still needs less, the kernel's
// tiering and DAMON need tens of seconds, ours 40 epochs and some on the named ones.
unsigned seconds_for(const Case& one, const std::string& system) {
  if (is_sparse(system)) return 100;
  if (one.shift_s) return one.seconds;
  if (system == "none" && !one.name.starts_with("redis") && !one.name.starts_with("memcached")) return 10;
  if (system == "oracle") return 16;
  // The kernel's defaults still rise after 60 s there, in steps: two runs of a seed differ by 0.05 then.
  if (system == "kernel" && one.name.starts_with("hotset-2m") && !one.thp) return 90;
  if (system == "kernel" || system == "kernel-tuned" || system == "damon" || !one.named) return one.seconds;
  return std::min(one.seconds, 30u);
}

bool named(const Options& options, const std::string& workload, const std::string& system, uint64_t seed) {
  if (options.names.empty()) return true;
  const std::string cell = workload + "/" + system + "/" + std::to_string(seed);
  return std::any_of(options.names.begin(), options.names.end(), [&](const std::string& name) { return name == cell || cell.starts_with(name + "/"); });
}

std::vector<Job> jobs_of(const Options& options) {
  std::vector<std::string> systems = known_systems();
  std::vector<uint64_t> seeds = {1, 2, 3};
  for (const std::string& name : options.names) {  // a system or seed of its own
    const size_t slash = name.find('/'), next = slash == std::string::npos ? slash : name.find('/', slash + 1);
    if (slash == std::string::npos) continue;
    const std::string system = name.substr(slash + 1, next == std::string::npos ? next : next - slash - 1);
    if (std::find(systems.begin(), systems.end(), system) == systems.end()) systems.push_back(system);
    if (next != std::string::npos)
      if (uint64_t seed = std::strtoull(name.c_str() + next + 1, nullptr, 10); seed > 3) seeds.push_back(seed);
  }
  std::vector<Job> jobs;
  for (uint64_t seed : seeds)
    for (const Case& one : cases())
      for (const std::string& system : systems) {
        const bool exact = std::find(options.names.begin(), options.names.end(), one.name + "/" + system + "/" + std::to_string(seed)) != options.names.end();
        const bool three = one.name == "hotset-2m" || one.name == "hotset-64k" || one.name == "btree";
        if (!exact && !options.full && !(seed == 1 || (seed <= 3 && three))) continue;
        if (options.names.empty() && !options.full && !one.named) continue;
        if (!named(options, one.name, system, seed) || (unfit(one, system) && !exact)) continue;
        jobs.push_back({&one, system, seed,
                        options.build / (options.record ? "bench/traces" : "bench/cells") / (one.name + "." + system + ".s" + std::to_string(seed) + "." + options.commit + ".json")});
      }
  return jobs;
}

bool done_before(const Options& options, const Job& job) {
  if (fs::exists(job.file)) return true;
  if (!options.any_commit) return false;
  const std::string start = job.one->name + "." + job.system + ".s" + std::to_string(job.seed) + ".";
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(job.file.parent_path(), error))
    if (entry.path().filename().string().starts_with(start) && !entry.path().filename().string().ends_with(".failed.json")) return true;
  return false;
}

fs::path trace_of(const Options& options, const Job& job) {
  return options.build / "bench/traces" / (job.one->name + "." + job.system + ".s" + std::to_string(job.seed) + ".trace");
}

bool run_job(const Options& options, const Job& job) {
  const unsigned seconds = options.seconds ? options.seconds : seconds_for(*job.one, job.system);
  std::vector<std::string> command = {
      options.repo / "tests/lab/lab", "--build", options.build, "--name", "bench-" + job.one->name + "-" + job.system + "-" + std::to_string(job.seed),
      // or it depends on the boot whether the kernel's image (37 MiB) lies in the fast node
      "--append", "nokaslr",
      "--icount", "--no-tierd", "--timeout", std::to_string(300 + 40 * seconds), "--",
      options.build / "bin/ht-bench-cell", "--workload", job.one->name, "--system", job.system, "--seed", std::to_string(job.seed),
      "--build", options.build, "--commit", options.commit, "--seconds", std::to_string(seconds), "--out", job.file};
  for (const std::string& setting : options.settings) command.insert(command.end(), {"--set", setting});
  if (options.record) command.insert(command.end(), {"--record", trace_of(options, job)});
  int status = shell(command);
  const std::string policy = job.system.substr(0, job.system.find('@'));
  if (options.record && status == 0 && (policy == "hyperplace" || policy == "heattree")) {
    const fs::path trace = trace_of(options, job);
    status = shell({options.build / "bin/replay", "--trace", trace, "--policy", policy, "--out", fs::path(trace).replace_extension(".replay.json")});
  }
  fs::path failed = job.file;
  failed.replace_extension(".failed.json");
  if (status == 0 && fs::exists(job.file)) {
    fs::remove(failed);
    return true;
  }
  std::ofstream(failed) << json{{"workload", job.one->name}, {"system", job.system}, {"seed", job.seed}, {"failed", "the lab ended with status " + std::to_string(status)}};
  std::cerr << "bench: " << job.file.stem().string() << " failed with status " << status << "\n";
  return false;
}

// One cell and the micro figure of the sampler, always anew.
int quick(const Options& options) {
  const json bounds = json::parse(std::ifstream(options.repo / "bench/bounds.json"));
  Options short_run = options;
  short_run.seconds = 20;
  const Job job{find_case("hotset-2m"), "heattree", 1, options.build / "bench/quick/cells/hotset-2m.json"};
  const fs::path out = options.build / "bench/quick", micro_file = out / "micro.json";
  fs::remove_all(out);
  fs::create_directories(job.file.parent_path());
  if (!run_job(short_run, job)) return 1;
  if (shell({options.repo / "tests/lab/lab", "--build", options.build, "--name", "bench-quick-micro", "--icount", "--no-tierd", "--", options.build / "bin/ht-bench-micro",
             "--build", options.build, "--out", micro_file, "--accesses", "1500000", "--only", "sampler"}))
    return 1;
  Results results({out});
  const Cell& cell = results.of("hotset-2m", "heattree").at(0);
  const json micro = json::parse(std::ifstream(micro_file)).at(0).at("numbers");
  uint64_t calls = 0;
  for (auto& [name, count] : cell.raw.at("flush_calls").items())
    if (name.starts_with("tierd")) calls += count.get<uint64_t>();
  bool ok = true;
  auto check = [&](const char* what, double value, const char* bound, bool least) {
    const double limit = bounds.at(bound);
    const bool holds = least ? value >= limit : value <= limit;
    ok &= holds;
    std::printf("%-7s %s: %.4f, %s %g\n", holds ? "ok" : "FAILED", what, value, least ? "at least" : "at most", limit);
  };
  check("hotset-2m: true hit ratio as a share of the best possible", cell.final_ratio / cell.oracle_ratio, "hotset_2m_share_of_best_ratio_min", true);
  check("hotset-2m: flush calls of tierd per moved page", static_cast<double>(calls) / static_cast<double>(cell.moved_pages), "hotset_2m_flush_calls_per_moved_page_max", false);
  check("a sample: cost in user space beside the sampler", micro.at("user_ns").get<double>() / micro.at("sampler_ns").get<double>(), "sampler_times_cheaper_than_user_space_min", true);
  if (!ok) std::fprintf(stderr, "bench: a ratio is out of its bound\nHINT: bounds are in bench/bounds.json; the cell is in build/bench/quick\n");
  return ok ? 0 : 1;
}

// Each cell twice; files beside the cells.
int agree(const Options& options, const std::vector<Job>& jobs) {
  bool ok = true;
  for (const Job& job : jobs) {
    Agreement pair;
    for (const char* number : {"1", "2"}) {
      Job once = job;
      once.file = options.build / "bench/agree" / job.file.stem().concat(std::string(".") + number + ".json");
      if (!fs::exists(once.file) && !run_job(options, once)) return 1;
      (number[0] == '1' ? pair.first : pair.second) = read_cell(once.file).value();
    }
    const bool holds = pair.final_difference() <= Agreement::kMost;
    ok &= holds;
    std::printf("%-7s %s/%s/%llu: final hit ratios %.4f and %.4f, difference %.4f (at most %.2f); largest of a window %.4f\n", holds ? "ok" : "FAILED", job.one->name.c_str(), job.system.c_str(),
                static_cast<unsigned long long>(job.seed), pair.first.final_ratio, pair.second.final_ratio, pair.final_difference(), Agreement::kMost, pair.window_difference());
  }
  if (!ok) std::fprintf(stderr, "bench: two runs of one seed differ\nHINT: both are kept in build/bench/agree\n");
  return ok ? 0 : 1;
}

void write(const fs::path& path, const std::string& text) {
  if (text.empty()) return;
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

std::vector<fs::path> files(const fs::path& dir, const std::string& ending) {
  std::vector<fs::path> all;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(dir, error))
    if (entry.path().filename().string().ends_with(ending)) all.push_back(entry.path());
  std::sort(all.begin(), all.end());
  return all;
}

// What the docs are written from, kept with them: a fresh clone goes on from there.
fs::path kept(const Options& options) { return options.repo / "docs/results/data"; }

std::string in_lines(const json& value) {  // a difference of two such files can be read
  if (!value.is_object()) return value.dump(1) + "\n";
  std::string text = "{";
  for (auto& [key, part] : value.items()) {
    text += (text.size() > 1 ? ",\n" : "\n") + json(key).dump() + ": ";
    if (!part.is_array() || part.empty() || !part[0].is_object()) {
      text += part.dump();
      continue;
    }
    for (size_t i = 0; i < part.size(); i++) text += (i ? ",\n  " : "[\n  ") + part[i].dump();
    text += "]";
  }
  return text + "}\n";
}

void keep(const Cell& cell, const fs::path& dir, const std::string& ending) {
  json raw = cell.raw;
  for (json& window : raw.at("windows")) window.erase("map");  // nine tenths of it, in the pictures already
  write(dir / (cell.workload + "." + cell.system + ".s" + std::to_string(cell.seed) + ending), in_lines(raw));
}

json read_json(const fs::path& file) {
  std::ifstream in(file);
  return in ? json::parse(in, nullptr, false) : json();
}

void report(const Options& options) {
  const fs::path out = options.build / "bench", data = kept(options);
  const Roots roots = {data, out};
  Results results(roots);
  Extras extras;
  extras.agreements = agreements(roots);
  const auto newest = [&](const char* name) {  // and keeps it
    json found = read_json(out / name);
    if (!found.is_array() && !found.is_object()) return read_json(data / name);
    if (options.docs) write(data / name, in_lines(found));
    return found;
  };
  for (const char* part : {"micro-sampling.json", "micro-moving.json", "micro-scopes.json"})
    if (const json more = newest(part); more.is_array()) extras.micro.insert(extras.micro.end(), more.begin(), more.end());
  if (const json engine = newest("engine.json"); engine.contains("benchmarks")) extras.engine = engine["benchmarks"];
  std::map<std::string, json> replays;  // by the name of the recorded run; an array, by policy
  for (const fs::path& root : roots)
    for (const fs::path& file : files(root / "traces", ".replay.json"))
      if (json all = read_json(file); all.is_array()) replays[file.filename()] = std::move(all);
  for (auto& [name, all] : replays) {
    if (options.docs) write(data / "traces" / name, in_lines(all));
    extras.replays.insert(extras.replays.end(), all.begin(), all.end());
  }
  if (options.docs) {
    for (const Cell* cell : results.all()) keep(*cell, data / "cells", ".json");
    for (const Agreement& pair : extras.agreements) {
      keep(pair.first, data / "agree", ".1.json");
      keep(pair.second, data / "agree", ".2.json");
    }
  }
  for (const char* ending : {".c", ".h"})
    for (const fs::path& file : files(options.repo / "policies", ending)) extras.policy_lines[file.filename()] = code_lines(file);
  std::ifstream notes_file(options.repo / "bench/notes.md");
  extras.notes.assign(std::istreambuf_iterator<char>(notes_file), {});
  auto pictures = [&](const fs::path& dir) {
    write(dir / "bench-bars.svg", bars_svg(results));
    write(dir / "bench-time.svg", time_svg(results));
    for (const Case& one : cases())
      if (results.any(one.name)) write(dir / ("bench-heat-" + one.name + ".svg"), heat_svg(results, one.name));
  };
  pictures(out);
  write(out / "summary.json", summary(results).dump(2) + "\n");
  write(out / "results.md", results_markdown(results, ".", extras));
  if (options.docs) {
    pictures(options.repo / "docs/results");
    write(options.repo / "docs/results.md", results_markdown(results, "results", extras));
  }
  std::cout << table_text(results) << "\nbench: " << (out / "results.md").string() << ", summary.json and pictures beside it\n";
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"HyperTier beside the systems that a user would otherwise choose, in the lab", "./run bench"};
  app.add_option("--repo", options.repo)->required()->group("");
  app.add_option("--build", options.build)->required()->group("");
  app.add_option("--commit", options.commit)->group("");
  app.add_option("NAME", options.names, "WORKLOAD[/SYSTEM[/SEED]]: only these cells");
  app.add_flag("--full", options.full, "all workloads, three seeds each");
  app.add_flag("--any-commit", options.any_commit, "a cell that another commit ran counts as run");
  app.add_flag("--report", options.report_only, "run nothing, write the report of what is there");
  app.add_flag("--docs", options.docs, "also write docs/results.md");
  app.add_flag("--list", options.list, "say which cells would run");
  app.add_option("--seconds", options.seconds, "of the guest's clock, instead of what suits the system");
  app.add_option("--set", options.settings, "key=value of the policy");
  app.add_flag("--record", options.record, "write a trace of each cell, and the cell in epochs instead of 2 s, to build/bench/traces; replay it, and compare");
  app.add_flag("--agree", options.agree, "run each cell named twice and compare: fails if the final hit ratios differ by more than 0.02");
  app.add_flag("--quick", options.quick, "three ratios against the bounds of bench/bounds.json");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }
  fs::create_directories(options.build / "bench/cells");
  fs::create_directories(options.build / "bench/traces");
  fs::create_directories(options.build / "bench/agree");
  if (options.quick) return quick(options);
  const std::vector<Job> jobs = jobs_of(options);
  if (jobs.empty()) {
    std::cerr << "bench: no cell has this name\nHINT: ./run bench --list --full names them all\n";
    return 1;
  }
  if (options.agree && options.names.empty()) {
    std::cerr << "bench: --agree needs the cell to run twice\nHINT: ./run bench --agree hotset-2m/heattree/1\n";
    return 2;
  }
  if (options.agree) return agree(options, jobs);
  bool ok = true;
  size_t number = 0;
  for (const Job& job : jobs) {
    number++;
    const bool before = done_before(options, job);
    if (options.list) std::cout << job.one->name << "/" << job.system << "/" << job.seed << (before ? "  (there)" : "") << "\n";
    if (options.list || options.report_only || before) continue;
    std::cout << "bench: " << number << " of " << jobs.size() << ": " << job.one->name << "/" << job.system << "/" << job.seed << std::endl;
    ok &= run_job(options, job);
  }
  if (!options.list) report(options);
  return ok ? 0 : 1;
}
