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
  std::string rate;                   // empty: the default
  bool dry_run = false;
  std::uint32_t wait_epochs = 0;      // fail if it is ejected within so many
};

struct BudgetArguments {
  std::string cgroup;
  std::string fast_max, fast_min, rate, dry_run;  // empty: as it is
};

int command_load(const Context& context, const LoadArguments& arguments);
int command_unload(const Context& context, const std::string& cgroup, bool force);
int command_restore(const Context& context, const std::string& cgroup);
// cgroup: empty for all scopes.
int command_status(const Context& context, const std::string& cgroup);
int command_ranges(const Context& context, std::optional<std::uint32_t> pid, const std::string& cgroup);
// after: only what came later than that record.
int command_events(const Context& context, bool follow, std::uint64_t after);
int command_explain(const Context& context, std::uint32_t pid, std::uint64_t address);
int command_cgroup_set(const Context& context, const BudgetArguments& arguments);
int command_cgroup_reset(const Context& context, const std::string& cgroup);
int command_cgroup_show(const Context& context, const std::string& cgroup);
int command_policy_list(const Context& context);
// file, or the policy seated in a cgroup.
int command_policy_show(const Context& context, const std::string& file, const std::string& cgroup);
int command_policy_check(const Context& context, const LoadArguments& arguments, bool verbose);
int command_version(const Context& context);
int command_doctor(const Context& context);

}  // namespace hypertier
