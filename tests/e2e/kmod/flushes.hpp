// SPDX-License-Identifier: GPL-2.0-or-later
#pragma once

#include <cstdint>

struct bpf_object;

namespace hypertier::test {

// Counts TLB flushes where the kernel does them, by kprobes.
class FlushCounter {
 public:
  struct Counts {
    std::uint64_t batch = 0;   // one for all pages of a batch, whatever their mm
    std::uint64_t range = 0;   // of one mm's address range: a page, a huge page
    std::uint64_t remote = 0;  // of both, those that interrupt another CPU
    std::uint64_t local() const { return batch + range - remote; }
  };
  FlushCounter();
  ~FlushCounter();
  // Of this thread only, or of all.
  void start(bool all = false);
  Counts stop();  // since start(), added to what was before
  void reset();

 private:
  struct Values;
  bpf_object* object_;
  void* links_[3];
  Values* values_;
};

}  // namespace hypertier::test
