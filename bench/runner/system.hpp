// SPDX-License-Identifier: GPL-2.0-or-later
// The tiering systems that are compared, each as its documentation recommends.
#pragma once

#include <memory>
#include <string>

#include "../../tests/e2e/pipeline/harness.hpp"
#include "memory.hpp"

namespace bench {

struct SystemOptions {
  std::string name;   // none, kernel, kernel-tuned, damon, oracle, or POLICY[@SOURCE][@sparse]
  std::string build;  // where hypertier.ko is
  std::string log;    // of tierd
  // Whose memory is tiered, where the system can be told: the kernel's cannot.
  // Else what the measuring and the drivers keep would have fast memory too.
  std::string cgroup = "/";
  uint64_t period = 0;
  std::vector<std::string> settings;  // key=value of the policy
  bool bursts = true;  // false: one period all the time, as a record has it
};

class System {
 public:
  virtual ~System() = default;
  // What must be set before the workload has memory.
  virtual void prepare() {}
  // Misses a sample, where that is known only now that the workload runs.
  virtual void sample_each(uint64_t) {}
  virtual void start(Memory&, pid_t) {}
  // After each window of the workload; pages by their misses in that window.
  virtual void window(Memory&, pid_t) {}
  virtual void shifted() {}
  virtual e2e::json counters() { return nullptr; }
  virtual e2e::json configuration() = 0;
  virtual void stop() {}
};

std::unique_ptr<System> make_system(const SystemOptions&);

// POLICY@sparse: as few samples as a guest of 64 GiB has, a fifth of it fast, at 50,000 a second.
constexpr double kSparse = 0.0075;  // samples per fast page and epoch

}  // namespace bench
