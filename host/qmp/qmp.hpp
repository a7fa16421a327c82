// SPDX-License-Identifier: GPL-2.0-or-later
// A QMP connection: one command at a time, every wait has an end.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>

#include "result.hpp"

namespace hypertier {

class Qmp {
 public:
  static constexpr std::chrono::milliseconds kTimeout{5000};

  Qmp(Qmp&& other) noexcept;
  Qmp& operator=(Qmp&& other) noexcept;
  ~Qmp();

  [[nodiscard]] static Result<Qmp> connect(const std::string& path, std::chrono::milliseconds timeout = kTimeout);

  // The "return" value. Events that arrive meanwhile are dropped. After a
  // timeout the connection is of no use: a late answer would be taken for the
  // next command's.
  [[nodiscard]] Result<nlohmann::json> command(const std::string& name,
                                               nlohmann::json arguments = nlohmann::json::object());

 private:
  Qmp(int fd, std::string path, std::chrono::milliseconds timeout)
      : fd_(fd), path_(std::move(path)), timeout_(timeout) {}
  Result<nlohmann::json> read_message(std::chrono::steady_clock::time_point deadline);

  int fd_;
  std::string path_;
  std::chrono::milliseconds timeout_;
  std::string buffer_;
};

}  // namespace hypertier
