// SPDX-License-Identifier: GPL-2.0-or-later
#include "results.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <set>

#include "../cases.hpp"

namespace bench {
namespace {

constexpr double kEpochS = 0.5;  // of HyperTier; others have none, and are told by it too
// What the lab's firmware tells (HMAT), and the CPU that time is modelled for:
// 2e9 instructions/s, where the guest's clock counts 2 ns an instruction.
constexpr double kFastNs = 80, kSlowNs = 250, kClockShare = 0.25;

Cell digest(json raw) {
  Cell cell;
  cell.workload = raw.at("workload");
  cell.system = raw.at("system");
  cell.commit = raw.value("commit", "");
  cell.seed = raw.at("seed");
  double fast = 0, slow = 0, operations = 0, work_s = 0;
  const json& windows = raw.at("windows");
  const double end = windows.back().at("end_s"), from = end - std::max(5.0, end / 10);
  double final_fast = 0, final_slow = 0, final_operations = 0, final_s = 0;
  for (const json& w : windows) {
    const double f = w.at("fast"), s = w.at("slow"), o = w.at("operations"), t = w.at("work_s");
    cell.points.push_back({w.at("end_s"), f + s > 0 ? f / (f + s) : 0});
    fast += f, slow += s, operations += o, work_s += t;
    if (w.at("end_s").get<double>() <= from) continue;
    final_fast += f, final_slow += s, final_operations += o, final_s += t;
  }
  cell.final_ratio = final_fast / std::max(1.0, final_fast + final_slow);
  for (const json& phase : raw.at("phases")) cell.phase_end_s.push_back(phase.at("end_s"));
  const json& last = raw.at("phases").back();
  cell.oracle_ratio = last.at("oracle_hit_ratio");
  cell.hot_gained = last.at("hot_pages_fast_at_end").get<int64_t>() - last.at("hot_pages_fast_at_start").get<int64_t>();
  cell.operations_per_s = operations / work_s;
  cell.misses_per_operation = (fast + slow) / operations;
  cell.instructions_ns_per_operation = final_s / final_operations * 1e9 * kClockShare;
  cell.modelled_ns = cell.instructions_ns_per_operation + (kFastNs * final_fast + kSlowNs * final_slow) / final_operations;
  const json& counters = raw.at("counters");
  if (counters.is_object() && counters.contains("samples_total"))
    cell.s = counters["samples_total"].get<double>() / std::max(1.0, counters["epochs_total"].get<double>()) / raw.at("capacity_pages").get<double>();
  if (counters.is_object() && counters.contains("promoted_pages_total"))
    cell.moved_pages = counters["promoted_pages_total"].get<uint64_t>() + counters["demoted_pages_total"].get<uint64_t>();
  else
    cell.moved_pages = raw.at("vmstat").value("pgmigrate_success", 0);
  cell.vain_share = raw.at("moves").at("share_in_vain");
  if (const size_t quarter = windows.size() - windows.size() / 4 - 1; windows.back().contains("moves_seen_total")) {
    const json &since = windows[quarter], &last = windows.back();
    const double moves = last["moves_seen_total"].get<double>() - since["moves_seen_total"].get<double>();
    const double epochs = (last["end_s"].get<double>() - since["end_s"].get<double>()) / kEpochS;
    if (epochs > 0) cell.last_moves = moves / epochs / raw.at("capacity_pages").get<double>();
  }
  for (auto& [name, calls] : raw.at("flush_calls").items())
    if (!name.starts_with("ht-bench") && name != "tierctl") cell.flush_calls += calls.get<uint64_t>();
  if (raw.contains("flushes")) {
    cell.flushes_carried_out = 0;
    for (auto& [name, count] : raw["flushes"].items())
      for (const char* wanted : {"tierd", "kswapd", "kdamond", "hotset", "kernels", "redis", "memcached", "liblinear"})
        if (name.starts_with(wanted)) *cell.flushes_carried_out += count.get<double>();
  }
  const double elapsed = raw.at("elapsed_s");
  cell.flush_calls_per_s = static_cast<double>(cell.flush_calls) / elapsed;
  for (auto& [name, ns] : raw.at("cpu_ns").items())
    if (name.starts_with("tierd") || name.starts_with("kdamond") || name.starts_with("kswapd")) cell.cpu_share += ns.get<double>() / 1e9 / elapsed;
  cell.raw = std::move(raw);
  return cell;
}

}  // namespace

std::optional<double> Cell::reached(double ratio, size_t phase) const {
  const double start = phase ? phase_end_s[phase - 1] : 0, end = phase_end_s.at(phase);
  constexpr int kHeld = 2;
  int held = 0;
  double first = 0;
  for (const Point& point : points) {
    if (point.seconds <= start || point.seconds > end) continue;
    if (point.ratio < ratio) {
      held = 0;
      continue;
    }
    if (held++ == 0) first = point.seconds - start;
    if (held == kHeld) return first;
  }
  return std::nullopt;
}

std::optional<Cell> read_cell(const std::filesystem::path& file) {
  json raw = json::parse(std::ifstream(file), nullptr, false);
  if (raw.is_discarded() || !raw.contains("workload") || raw.contains("failed")) return std::nullopt;
  return digest(std::move(raw));
}

double Agreement::final_difference() const { return std::abs(first.final_ratio - second.final_ratio); }

double Agreement::window_difference() const {
  double most = 0;
  for (size_t i = 0; i < std::min(first.points.size(), second.points.size()); i++) most = std::max(most, std::abs(first.points[i].ratio - second.points[i].ratio));
  return most;
}

namespace {

// Which of two stands in the report.
struct Age {
  size_t root = 0;
  std::filesystem::file_time_type written = std::filesystem::file_time_type::min();
  auto operator<=>(const Age&) const = default;
};

// Calls f(path, age) for each file of a folder of each root.
template <class F>
void each_file(const Roots& roots, const char* folder, F&& f) {
  for (size_t root = 0; root < roots.size(); root++) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(roots[root] / folder, error)) f(entry.path(), Age{root, entry.last_write_time()});
  }
}

}  // namespace

std::vector<Agreement> agreements(const Roots& roots) {
  std::map<std::pair<Key, uint64_t>, std::pair<Age, Agreement>> newest;
  each_file(roots, "agree", [&](const std::filesystem::path& file, const Age& age) {
    const std::string name = file.filename().string();
    constexpr std::string_view kFirst = ".1.json";
    if (!name.ends_with(kFirst)) return;
    auto first = read_cell(file), second = read_cell(file.parent_path() / (name.substr(0, name.size() - kFirst.size()) + ".2.json"));
    if (!first || !second) return;
    auto& found = newest[{{first->workload, first->system}, first->seed}];
    if (found.first < age) found = {age, {std::move(*first), std::move(*second)}};
  });
  std::vector<Agreement> all;
  for (auto& [key, found] : newest) all.push_back(std::move(found.second));
  return all;
}

size_t code_lines(const std::filesystem::path& file) {
  std::ifstream in(file);
  size_t lines = 0;
  bool comment = false;
  for (std::string line; std::getline(in, line);) {
    bool code = false;
    for (size_t i = 0; i < line.size(); i++) {
      if (comment) {
        if (line.compare(i, 2, "*/") == 0) comment = false, i++;
      } else if (line.compare(i, 2, "/*") == 0) {
        comment = true, i++;
      } else if (line.compare(i, 2, "//") == 0) {
        break;
      } else {
        code |= !std::isspace(static_cast<unsigned char>(line[i]));
      }
    }
    lines += code;
  }
  return lines;
}

Results::Results(const Roots& roots) {
  struct Found {
    Age age;
    json raw;
  };
  std::map<std::pair<Key, uint64_t>, Found> newest;
  each_file(roots, "cells", [&](const std::filesystem::path& file, const Age& age) {
    if (file.extension() != ".json") return;
    json raw = json::parse(std::ifstream(file), nullptr, false);
    if (raw.is_discarded() || !raw.contains("workload")) return;
    const Key key{raw["workload"], raw["system"]};
    if (raw.contains("failed")) {
      failures_[key] = raw["failed"];
      return;
    }
    Found& found = newest[{key, raw["seed"].get<uint64_t>()}];
    if (found.age < age) found = {age, std::move(raw)};
  });
  for (auto& [key, found] : newest) {
    failures_.erase(key.first);
    cells_[key.first].push_back(digest(std::move(found.raw)));
  }
}

std::vector<const Cell*> Results::all() const {
  std::vector<const Cell*> all;
  for (auto& [key, cells] : cells_)
    for (const Cell& cell : cells) all.push_back(&cell);
  return all;
}

const std::vector<Cell>& Results::of(const std::string& workload, const std::string& system) const {
  static const std::vector<Cell> none;
  auto found = cells_.find({workload, system});
  return found == cells_.end() ? none : found->second;
}

std::optional<std::string> Results::failure(const std::string& workload, const std::string& system) const {
  auto found = failures_.find({workload, system});
  return found == failures_.end() ? std::nullopt : std::optional(found->second);
}

bool Results::any(const std::string& workload) const {
  return std::any_of(cells_.begin(), cells_.end(), [&](auto& cell) { return cell.first.workload == workload; });
}

std::vector<std::string> Results::systems() const {
  std::vector<std::string> order = known_systems();
  for (auto& [key, cells] : cells_)
    if (std::find(order.begin(), order.end(), key.system) == order.end()) order.push_back(key.system);
  return order;
}

const Cell* Results::none(const std::string& workload, uint64_t seed) const {
  const Cell* any = nullptr;
  for (const Cell& cell : of(workload, "none")) {
    if (cell.seed == seed) return &cell;
    any = &cell;
  }
  return any;
}

std::optional<double> Results::gain(const Cell& cell) const {
  const Cell* base = none(cell.workload, cell.seed);
  if (!base) return std::nullopt;
  const double way = cell.oracle_ratio - base->final_ratio;
  if (way < 0.02) return std::nullopt;  // nothing to gain
  return (cell.final_ratio - base->final_ratio) / way;
}

double Results::own_flush_calls(const Cell& cell) const {
  const Cell* base = none(cell.workload, cell.seed);
  const double elapsed = cell.raw.at("elapsed_s");
  return std::max(0.0, static_cast<double>(cell.flush_calls) - (base ? base->flush_calls_per_s * elapsed : 0));
}

std::optional<double> Results::lost_time(const Cell& cell) const {
  const Cell* base = none(cell.workload, cell.seed);
  if (!base) return std::nullopt;
  return 1 - cell.operations_per_s / base->operations_per_s;
}

const std::vector<std::string>& known_systems() {
  static const std::vector<std::string> all = {"none", "kernel", "kernel-tuned", "damon", "hyperplace", "heattree", "heattree@sparse", "heattree@abit", "heattree@vpebs+abit", "heattree@vpebs+abit@sparse", "oracle"};
  return all;
}

std::string title_of(const std::string& system) {
  static const std::map<std::string, std::string> titles = {
      {"none", "first touch"}, {"kernel", "kernel, defaults"}, {"kernel-tuned", "kernel, tuned"}, {"damon", "DAMON"}, {"oracle", "oracle"}};
  auto found = titles.find(system);
  return found == titles.end() ? system : found->second;
}

std::string colour_of(const std::string& system) {
  static const std::map<std::string, std::string> colours = {
      {"none", "#9a9a9a"}, {"kernel", "#8ec4e8"}, {"kernel-tuned", "#2872b3"}, {"damon", "#8456a8"}, {"oracle", "#111111"},
      {"hyperplace", "#e8740c"}, {"heattree", "#b3003c"}, {"heattree@sparse", "#e58aa3"}, {"hyperplace@abit", "#d4a017"}, {"heattree@abit", "#6b8e23"}, {"heattree@vpebs+abit", "#1b7a4b"}, {"heattree@vpebs+abit@sparse", "#7bc8a0"}};
  auto found = colours.find(system);
  return found == colours.end() ? "#2e8b57" : found->second;
}

}  // namespace bench
