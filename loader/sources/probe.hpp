// SPDX-License-Identifier: GPL-2.0-or-later
// The two halves of an active probe: taking samples of a known buffer, and
// what they mean.
#pragma once

#include "sources/source.hpp"

namespace hypertier {

struct ProbeCounts {
  std::uint64_t records = 0;       // samples delivered
  std::uint64_t with_address = 0;  // whose address is not 0
  std::uint64_t inside = 0;        // whose address lies in the buffer
  std::uint64_t sample_ns = 0;     // CPU time a sample took from the thread that was sampled
};

// Whether that proves the source; guest: we run in a virtual machine, which
// explains missing addresses.
Result<ProbeResult> judge_probe(const ProbeCounts& counts, bool guest);

// Opens the events for this thread on one of their CPUs and touches a buffer.
Result<ProbeCounts> take_probe(const std::vector<SourceEvent>& events);

// From /proc/cpuinfo.
bool is_guest(const Roots& roots);

}  // namespace hypertier
