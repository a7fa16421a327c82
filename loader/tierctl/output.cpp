// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierctl/output.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

namespace hypertier {
namespace {

std::string one_decimal(double value, const char* unit) {
  char text[48];
  std::snprintf(text, sizeof(text), value < 100 ? "%.1f %s" : "%.0f %s", value, unit);
  return text;
}

}  // namespace

void print_table(const std::vector<std::vector<std::string>>& rows, const std::vector<bool>& right) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      const bool to_right = i < right.size() && right[i];
      line += to_right ? space + row[i] : row[i] + space;
      line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::puts(line.c_str());
  }
}

void print_json(const Json& json) {
  std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

int print_error(const Error& error, bool json) {
  if (json) print_json(error_json(error));
  std::fprintf(stderr, "tierctl: %s\n", error.message.c_str());
  if (!error.hint.empty()) std::fprintf(stderr, "HINT: %s\n", error.hint.c_str());
  return 1;
}

std::string size_text(std::uint64_t bytes) {
  if (bytes == 0) return "0";
  constexpr std::array units{"KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  return one_decimal(value, units[unit]);
}

std::string size_text(const Json& bytes) { return bytes.is_number() ? size_text(bytes.get<std::uint64_t>()) : "-"; }

std::string number_text(const Json& number) { return number.is_null() ? "-" : number.dump(); }

std::string duration_text(std::uint64_t ns) {
  const auto value = static_cast<double>(ns);
  if (value < 1e3) return std::to_string(ns) + " ns";
  if (value < 1e6) return one_decimal(value / 1e3, "us");
  if (value < 1e9) return one_decimal(value / 1e6, "ms");
  return one_decimal(value / 1e9, "s");
}

std::string percent_text(double part, double whole) {
  return whole > 0 ? one_decimal(100 * part / whole, "%") : "-";
}

}  // namespace hypertier
