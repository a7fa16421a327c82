// SPDX-License-Identifier: GPL-2.0-or-later
// What tierd remembers over its own end: which policy holds the seat, as the
// bytes that were loaded (the user's file may be gone by then) and the
// settings that were given.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "result.hpp"

namespace hypertier {

struct SavedSeat {
  std::string policy;  // name, for humans
  std::string file;    // as it was given to load
  std::map<std::string, std::string> settings;
  std::string object;  // the bytes
};

class State {
 public:
  explicit State(std::filesystem::path directory) : directory_(std::move(directory)) {}

  // All or nothing: after a crash at any point either the old seat or the new one is there.
  Result<> save(const SavedSeat& seat) const;
  Result<> clear() const;
  // nullopt: nothing was saved.
  Result<std::optional<SavedSeat>> load() const;

 private:
  std::filesystem::path directory_;
};

}  // namespace hypertier
