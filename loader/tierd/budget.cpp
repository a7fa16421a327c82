// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/budget.hpp"

#include <charconv>
#include <cstdio>

#include "engine/roster.hpp"

namespace hypertier {
namespace {

std::string mib(std::uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

std::string Amount::text() const {
  if (percent == 0) return std::to_string(bytes);
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%g%%", percent);
  return buffer;
}

Result<Amount> parse_amount(const std::string& what, const std::string& text) {
  const auto refuse = [&](const std::string& why) {
    return fail(what + " cannot be \"" + text.substr(0, 64) + "\": " + why, "give a size such as 512M or 2G, or a share such as 40%");
  };
  const char* end = text.data() + text.size();
  Amount amount;
  if (text.ends_with('%')) {
    const auto read = std::from_chars(text.data(), end - 1, amount.percent, std::chars_format::fixed);
    if (read.ec != std::errc() || read.ptr != end - 1) return refuse("it is no percentage");
    if (!(amount.percent >= 0 && amount.percent <= 100)) return refuse("it is not within 0% and 100%");
    return amount;
  }
  const auto read = std::from_chars(text.data(), end, amount.bytes);
  if (read.ec != std::errc()) return refuse("it is no size");
  int shift = 0;
  if (const std::string unit(read.ptr, end); !unit.empty()) {
    const std::size_t at = std::string("KMGT").find(unit[0]);
    if (unit.size() != 1 || at == std::string::npos) return refuse("it is no size");
    shift = 10 * (static_cast<int>(at) + 1);
  }
  if (shift != 0 && amount.bytes >> (64 - shift) != 0) return refuse("it is too large");
  amount.bytes <<= shift;
  return amount;
}

Result<std::uint64_t> parse_rate(const std::string& text) {
  std::string amount = text;
  for (const char* suffix : {"/s", "B"})
    if (amount.ends_with(suffix)) amount.resize(amount.size() - std::string(suffix).size());
  auto parsed = parse_amount("--rate", amount);
  if (!parsed || parsed->percent != 0 || amount.ends_with('%'))
    return fail("--rate cannot be \"" + text.substr(0, 64) + "\": it is no number of bytes a second",
                "give a rate such as 200MB/s or 1G/s; 0 is no limit");
  return parsed->bytes;
}

std::string rate_text(std::uint64_t bytes_per_s) {
  if (bytes_per_s != 0 && bytes_per_s % (1 << 20) == 0) return std::to_string(bytes_per_s >> 20) + "MB/s";
  return std::to_string(bytes_per_s) + "B/s";
}

std::map<std::string, std::string> plan_scopes(const std::map<std::string, __u64>& seats, const Budgets& budgets) {
  std::map<std::string, std::string> plan;
  for (const auto& [path, id] : seats) plan[path] = path;
  for (const auto& [path, budget] : budgets)
    if (auto seat = nearest_ancestor(seats, path)) plan[path] = *seat;
  return plan;
}

Result<> check_budgets(const Budgets& budgets, std::uint64_t fast_tier_bytes) {
  std::uint64_t minima = 0;
  std::string names;
  for (const auto& [cgroup, budget] : budgets) {
    const std::uint64_t min = budget.fast_min ? budget.fast_min->of(fast_tier_bytes) : 0;
    if (budget.fast_max && min > budget.fast_max->of(fast_tier_bytes))
      return fail("fast-min of " + cgroup + " (" + mib(min) + ") is above its fast-max (" +
                      mib(budget.fast_max->of(fast_tier_bytes)) + ")",
                  "raise --fast-max or lower --fast-min");
    if (min == 0) continue;
    if (min > fast_tier_bytes - minima || minima > fast_tier_bytes)
      return fail("the fast tier of " + mib(fast_tier_bytes) + " cannot hold all minima: fast-min of " + cgroup +
                      " asks for " + mib(min) + ", and " + (names.empty() ? "nothing" : mib(minima)) + " is promised" +
                      (names.empty() ? "" : " to " + names),
                  "lower --fast-min here or there; `tierctl cgroup show` lists them");
    minima += min;
    names += (names.empty() ? "" : ", ") + cgroup;
  }
  return {};
}

}  // namespace hypertier
