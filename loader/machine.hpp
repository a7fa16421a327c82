// SPDX-License-Identifier: GPL-2.0-or-later
// What the engine asks of the machine. The adapter implements it with BPF
// programs and hypertier.ko, the tests with a memory of their own; the engine
// knows neither libbpf nor a system call.
//
// Every buffer is shared with the kernel: the caller fills entries in place,
// makes the call, reads the answers in place. The fields' meaning and errors
// are those of <hypertier/abi.h>.
#pragma once

#include <functional>
#include <mutex>
#include <span>

#include <hypertier/abi.h>

#include "result.hpp"

namespace hypertier {

// One for all scopes: from filling a buffer to reading the answers `lock` is
// held.
class Machine {
 public:
  virtual ~Machine() = default;

  std::mutex lock;

  virtual ht_spaces_run& spaces() = 0;
  virtual std::span<const ht_mapping> mappings() = 0;    // HT_MAPPINGS_MAX
  virtual ht_walks_run& walks() = 0;
  virtual std::span<const ht_page_t> pages() = 0;        // HT_PAGES_MAX
  virtual std::span<ht_pair> pairs() = 0;                // HT_PAIRS_MAX

  // One BPF run each. An error means that the run itself failed; what
  // happened to an entry is in the entry.
  [[nodiscard]] virtual Result<> run_spaces() = 0;
  [[nodiscard]] virtual Result<> run_walks() = 0;
  [[nodiscard]] virtual Result<> run_exchange(ht_exchange_run& run) = 0;
};

// A scope's way to its policy: each scope has its own, so that a slow callback
// holds up nobody else. The three share one buffer: what one call answers is
// there until the next.
class PolicyCaller {
 public:
  virtual ~PolicyCaller() = default;

  virtual std::span<tier_range> ranges() = 0;    // HT_CALL_RANGES
  virtual std::span<tier_pair> pairs() = 0;      // HT_CALL_PAIRS
  virtual std::span<tier_result> results() = 0;  // HT_CALL_RESULTS

  // An error means that the run itself failed; what happened to the policy is
  // in run.status.
  [[nodiscard]] virtual Result<> run_classify(ht_run& run) = 0;
  [[nodiscard]] virtual Result<> run_admit(ht_run& run) = 0;
  [[nodiscard]] virtual Result<> run_moved(ht_run& run) = 0;
};

// Where counts come from: one epoch's worth at a time.
class SampleSource {
 public:
  virtual ~SampleSource() = default;

  // Ends the epoch of the range maps: flips the sets, waits until no sampler
  // is in the old one, and hands over every granule that was touched. The
  // reference is valid during the call only.
  [[nodiscard]] virtual Result<> drain(const std::function<void(const ht_granule&)>& fold) = 0;

  // Accessed bits that were read since the last call; a source of samples has
  // none. The reference is valid during the call only.
  virtual void drain_bits(const std::function<void(const ht_bits&)>& fold) { (void)fold; }

  // Where accessed bits are worth reading: all that is managed of a space, by a
  // process that has it; nothing when the space is gone.
  virtual void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) {
    (void)space, (void)pid, (void)mappings;
  }

  // The interval between clearing and testing that would tell most now.
  virtual void aim(__u64 interval_ns) { (void)interval_ns; }

  // The space is gone or unmapped [start, end): its granules may be reused.
  virtual void forget(__u64 space, __u64 start, __u64 end) = 0;

  // Sum over all CPUs, since start.
  virtual ht_sampler_stats stats() = 0;
};

// Samples, and accessed bits beside them.
class BothSources final : public SampleSource {
 public:
  BothSources(SampleSource& samples, SampleSource& bits) : samples_(samples), bits_(bits) {}

  [[nodiscard]] Result<> drain(const std::function<void(const ht_granule&)>& fold) override {
    if (auto drained = samples_.drain(fold); !drained) return drained;
    return bits_.drain(fold);  // it has no samples, but may have failed
  }
  void drain_bits(const std::function<void(const ht_bits&)>& fold) override { bits_.drain_bits(fold); }
  void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) override { bits_.manage(space, pid, mappings); }
  void aim(__u64 interval_ns) override { bits_.aim(interval_ns); }
  void forget(__u64 space, __u64 start, __u64 end) override {
    samples_.forget(space, start, end);
    bits_.forget(space, start, end);
  }
  ht_sampler_stats stats() override { return samples_.stats(); }

 private:
  SampleSource& samples_;
  SampleSource& bits_;
};

}  // namespace hypertier
