// SPDX-License-Identifier: GPL-2.0-or-later
#pragma once

#include <cstddef>
#include <cstdint>

#include <hypertier/abi.h>

struct bpf_object;

namespace hypertier::test {

extern bool read_bits;  // of the integrity test: all the time, meanwhile

// abit.bpf.o: granules whose accessed bits are cleared, then tested.
class Bits {
 public:
  Bits();
  ~Bits();
  Bits(const Bits&) = delete;
  void add(int pid, const void* start, std::size_t bytes);
  void add(int pid, std::uint64_t space, std::uint64_t granule);
  void clear() { run_->nr = 0; }
  int step(ht_check_phase phase);  // what the kfunc returned
  ht_bits_run& run() { return *run_; }

 private:
  bpf_object* object_;
  ht_bits_run* run_;
};

}  // namespace hypertier::test
