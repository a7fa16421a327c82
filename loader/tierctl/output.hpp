// SPDX-License-Identifier: GPL-2.0-or-later
// Text for humans: aligned columns, plain units.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tierd/protocol.hpp"

namespace hypertier {

// Rows of cells, columns aligned; right[i] aligns column i to the right.
void print_table(const std::vector<std::vector<std::string>>& rows, const std::vector<bool>& right = {});
void print_json(const Json& json);
int print_error(const Error& error, bool json);

std::string size_text(std::uint64_t bytes);     // "1.5 GiB"
std::string size_text(const Json& bytes);       // "-" for null
std::string number_text(const Json& number);    // "-" for null
std::string duration_text(std::uint64_t ns);    // "12.3 ms"
std::string percent_text(double part, double whole);

}  // namespace hypertier
