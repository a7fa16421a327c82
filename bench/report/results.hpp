// SPDX-License-Identifier: GPL-2.0-or-later
// Cells that were run, and what they say together.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace bench {

using nlohmann::json;

// As printf, at most 511 characters.
inline std::string format(const char* pattern, auto... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

// One cell: what its JSON says, digested.
struct Cell {
  std::string workload, system, commit;
  uint64_t seed = 0;
  json raw;

  double final_ratio = 0;      // mean of the last tenth of the time, at least 5 s
  double oracle_ratio = 0;     // of the last phase, static
  double operations_per_s = 0; // of the guest's clock, while the workload had it
  double misses_per_operation = 0;
  double s = 0;                // samples per usable fast page and epoch
  uint64_t moved_pages = 0;
  double vain_share = 0;
  std::optional<double> last_moves;  // an epoch of 0.5 s, share of the usable fast pages: mean of the last quarter
  int64_t hot_gained = 0;
  uint64_t flush_calls = 0;    // of everybody but the measuring; the workload's own are in it
  double flush_calls_per_s = 0;
  std::optional<double> flushes_carried_out;  // by the system's threads and the workload
  double cpu_share = 0;        // of one CPU: threads of the system
  double instructions_ns_per_operation = 0;
  double modelled_ns = 0;      // per operation
  struct Point {
    double seconds, ratio;
  };
  std::vector<Point> points;
  std::vector<double> phase_end_s;

  // Seconds after the phase's start from which on the ratio, over two windows, was at
  // least so much; nothing: never.
  std::optional<double> reached(double ratio, size_t phase) const;
};

// Nothing: the file is not there, not whole, or says that the run failed.
std::optional<Cell> read_cell(const std::filesystem::path& file);

// One cell run twice with the same seed.
struct Agreement {
  Cell first, second;
  double final_difference() const;
  double window_difference() const;  // the largest of all windows
  static constexpr double kMost = 0.02;
};
// Where data lie, the later before the earlier.
using Roots = std::vector<std::filesystem::path>;

// Under agree/ of each; of two pairs in one folder the newer.
std::vector<Agreement> agreements(const Roots&);

struct Key {
  std::string workload, system;
  auto operator<=>(const Key&) const = default;
};

class Results {
 public:
  // Cells under cells/ of each; of two files in one folder the newer.
  explicit Results(const Roots&);

  // By seed; empty: not run.
  const std::vector<Cell>& of(const std::string& workload, const std::string& system) const;
  std::optional<std::string> failure(const std::string& workload, const std::string& system) const;
  std::vector<std::string> systems() const;  // in the order of the tables
  bool any(const std::string& workload) const;
  std::vector<const Cell*> all() const;
  // Share of the way from "none" to the oracle; needs a cell of none.
  std::optional<double> gain(const Cell& cell) const;
  const Cell* none(const std::string& workload, uint64_t seed) const;
  // Flush calls beyond those that the workload makes with nothing loaded.
  double own_flush_calls(const Cell& cell) const;
  // How much less work got done in the same virtual time, beside none.
  std::optional<double> lost_time(const Cell& cell) const;

 private:
  std::map<Key, std::vector<Cell>> cells_;
  std::map<Key, std::string> failures_;
};

// Systems of the must-have matrix, in the order of the tables.
const std::vector<std::string>& known_systems();
std::string title_of(const std::string& system);
std::string colour_of(const std::string& system);

// Pictures.
std::string bars_svg(const Results&);
std::string time_svg(const Results&);
// Empty where a cell has no map: those kept with the docs are without.
std::string heat_svg(const Results&, const std::string& workload);

// Texts.
std::string table_text(const Results&);
// What stands in the report beside the cells. Empty: not run.
struct Extras {
  std::vector<Agreement> agreements;
  json replays = json::array();  // what `replay --trace` says of each recorded run
  json micro = json::array();
  json engine = json::array();   // google-benchmark's
  std::map<std::string, size_t> policy_lines;  // of code, by file
  std::string notes;
};
std::string results_markdown(const Results&, const std::string& picture_dir, const Extras&);
// Lines of C that are neither empty nor comment alone.
size_t code_lines(const std::filesystem::path& file);
json summary(const Results&);

}  // namespace bench
