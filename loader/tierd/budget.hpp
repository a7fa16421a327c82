// SPDX-License-Identifier: GPL-2.0-or-later
// What a cgroup may use of the fast tier, and what is kept for it. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include <hypertier/abi.h>

#include "result.hpp"

namespace hypertier {

// Bytes, or a share of the fast tier.
struct Amount {
  std::uint64_t bytes = 0;
  double percent = 0;  // if not 0, it counts

  std::uint64_t of(std::uint64_t fast_tier_bytes) const {
    return percent != 0 ? static_cast<std::uint64_t>(static_cast<double>(fast_tier_bytes) * percent / 100) : bytes;
  }
  std::string text() const;  // as parse_amount takes it
};

// "2G", "512M", "40%". what: the option, for messages.
Result<Amount> parse_amount(const std::string& what, const std::string& text);

// Of the pages that change tiers, both ways together.
inline constexpr std::uint64_t kDefaultRate = 200ULL << 20;  // bytes a second
// "200MB/s", "1G", "0" (no limit): binary multiples, B and /s may be left out.
Result<std::uint64_t> parse_rate(const std::string& text);
std::string rate_text(std::uint64_t bytes_per_s);  // as parse_rate takes it

struct Budget {
  std::optional<Amount> fast_max, fast_min;
  // Where given, instead of what the seat was loaded with.
  std::optional<std::uint64_t> rate_bytes_per_s;
  std::optional<bool> dry_run;
};

using Budgets = std::map<std::string, Budget>;  // by cgroup path

// Which scopes there are to be: path of the scope -> path of its seat. seats: cgroup
// id by path.
std::map<std::string, std::string> plan_scopes(const std::map<std::string, __u64>& seats, const Budgets& budgets);

// May these be in force together on a fast tier of that size? A cgroup's minimum
// is not above its maximum, and the tier holds all minima.
Result<> check_budgets(const Budgets& budgets, std::uint64_t fast_tier_bytes);

}  // namespace hypertier
