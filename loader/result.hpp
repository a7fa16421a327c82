// SPDX-License-Identifier: GPL-2.0-or-later
// Recoverable errors are returned, never thrown. An Error is one full sentence
// with its facts in it (which map, which errno, which node) and a hint that
// tells the user what to do next.
#pragma once

#include <cstring>
#include <expected>
#include <string>
#include <utility>

namespace hypertier {

struct Error {
  std::string message;  // one sentence, no newline, no trailing hint
  std::string hint;     // what to do; may be empty
  int err = 0;          // errno behind it, 0 if none
};

template <class T = void>
using Result = std::expected<T, Error>;

[[nodiscard]] inline std::unexpected<Error> fail(std::string message, std::string hint = {}) {
  return std::unexpected(Error{std::move(message), std::move(hint), 0});
}

// "cannot open map ht_index: Permission denied (errno 13)"
[[nodiscard]] inline std::unexpected<Error> fail_errno(std::string what, int err, std::string hint = {}) {
  return std::unexpected(Error{std::move(what) + ": " + std::strerror(err) + " (errno " + std::to_string(err) + ")",
                               std::move(hint), err});
}

}  // namespace hypertier
