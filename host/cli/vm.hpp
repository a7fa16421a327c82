// SPDX-License-Identifier: GPL-2.0-or-later
// "tierctl vm ...": to be registered with one line in tierctl's grammar.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace hypertier {

// Adds the verb "vm" to the app. The chosen command is stored in run, which
// returns the exit code; json is read when it runs.
void add_vm_commands(CLI::App& app, const bool& json, std::function<int()>& run);

}  // namespace hypertier
