// SPDX-License-Identifier: GPL-2.0-or-later
// The guest's BPF programs (bpf/mover, sampler, spaces, abit), loaded as one object.
// Its users share it: the maps live as long as one of them.
#pragma once

#include <cstdint>
#include <memory>

#include "result.hpp"

struct guest_bpf;

namespace hypertier {

// What is not asked for is not loaded and takes no memory.
struct ProgramsWanted {
  bool moves = false, bits = false;  // need the module
  std::uint32_t granules = 0;        // that samples are counted in: 2 to 2^22, rounded up to a power of two
  std::uint32_t ring_bytes = 0;      // of process events that wait: a power of two of pages
};

using Programs = std::shared_ptr<guest_bpf>;

Result<Programs> load_programs(const ProgramsWanted& wanted);

}  // namespace hypertier
