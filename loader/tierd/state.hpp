// SPDX-License-Identifier: GPL-2.0-or-later
// What tierd remembers over its own end: which policy holds which seat, as the
// bytes that were loaded (the user's file may be gone by then) and the settings
// that were given; and the budgets.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "result.hpp"
#include "tierd/budget.hpp"
#include "tierd/policy_seat.hpp"

namespace hypertier {

class State {
 public:
  explicit State(std::filesystem::path directory) : directory_(std::move(directory)) {}

  // All or nothing: after a crash at any point either the old seat or the new one is there.
  Result<> save(const SavedSeat& seat) const;
  Result<> clear(const std::string& cgroup) const;
  struct Loaded {
    std::string cgroup;  // "" where not even that can be read
    Result<SavedSeat> seat;
  };
  // All that were saved, the root's first.
  std::vector<Loaded> load() const;

  Result<> save(const Budgets& budgets) const;
  Result<Budgets> load_budgets() const;

 private:
  Result<> write_json(const std::string& name, const std::string& text) const;
  std::filesystem::path directory_;
};

}  // namespace hypertier
