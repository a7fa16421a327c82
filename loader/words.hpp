// SPDX-License-Identifier: GPL-2.0-or-later
// Reads lines of /proc and /sys word by word. A stream for each line would cost more
// than all the rest of an idle epoch.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>

namespace hypertier {

class Words {
 public:
  explicit Words(std::string_view line) : rest_(line) {}

  // Empty: no more.
  std::string_view next() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t"), rest_.size()));
    const std::string_view word = rest_.substr(0, rest_.find_first_of(" \t"));
    rest_.remove_prefix(word.size());
    return word;
  }

  // The next decimal number, whatever stands before it.
  std::optional<std::uint64_t> number() {
    rest_.remove_prefix(std::min(rest_.find_first_of("0123456789"), rest_.size()));
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc{}) return {};
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return value;
  }

 private:
  std::string_view rest_;
};

}  // namespace hypertier
