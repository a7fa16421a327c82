// SPDX-License-Identifier: GPL-2.0-or-later
// Why a page is where it is, in words.
#pragma once

#include <optional>

#include "engine/engine.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {

// The fields tier, reason, heat, rank, history of `tierctl explain`.
void explain_into(Json& reply, const Explanation& found, const std::optional<EpochReport>& report);

}  // namespace hypertier
