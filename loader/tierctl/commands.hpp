// SPDX-License-Identifier: GPL-2.0-or-later
// What each verb of tierctl does; the exit code is returned.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "tierd/protocol.hpp"

namespace hypertier {

struct Context {
  std::filesystem::path socket = kSocket;
  bool json = false;
};

struct LoadArguments {
  std::string file;
  std::string cgroup = "/";
  std::vector<std::string> settings;  // "key=value"
};

struct BudgetArguments {
  std::string cgroup;
  std::string fast_max, fast_min;  // empty: as it is
};

int command_load(const Context& context, const LoadArguments& arguments);
int command_unload(const Context& context, const std::string& cgroup, bool force);
int command_restore(const Context& context, const std::string& cgroup);
// cgroup: empty for all scopes.
int command_status(const Context& context, const std::string& cgroup);
int command_ranges(const Context& context, std::optional<std::uint32_t> pid, const std::string& cgroup);
int command_events(const Context& context);
int command_cgroup_set(const Context& context, const BudgetArguments& arguments);
int command_cgroup_reset(const Context& context, const std::string& cgroup);
int command_cgroup_show(const Context& context, const std::string& cgroup);
int command_policy_list(const Context& context);
int command_policy_show(const Context& context, const std::string& file);
int command_policy_check(const Context& context, const LoadArguments& arguments, bool verbose);
int command_version(const Context& context);
int command_doctor(const Context& context);

}  // namespace hypertier
