// SPDX-License-Identifier: GPL-2.0-or-later
// What the host holds for a tier of a VM, as the host itself measures it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "result.hpp"

namespace hypertier {

struct TierUsage {
  uint64_t resident_bytes = 0;
  uint64_t swapped_bytes = 0;
  // 0 unless BPF counts them
  uint64_t in_pages_total = 0;       // entered the file, for whatever reason
  uint64_t out_pages_total = 0;      // left it
  uint64_t refault_pages_total = 0;  // of those that entered: above the target

  TierUsage& operator+=(const TierUsage& other) {
    resident_bytes += other.resident_bytes;
    swapped_bytes += other.swapped_bytes;
    in_pages_total += other.in_pages_total;
    out_pages_total += other.out_pages_total;
    refault_pages_total += other.refault_pages_total;
    return *this;
  }
};

class Accounting {
 public:
  virtual ~Accounting() = default;
  virtual std::string name() const = 0;  // how it measures, for people
  // The file behind a tier; fails if it is gone.
  [[nodiscard]] virtual Result<TierUsage> read(const std::string& path) = 0;
  virtual void set_target(const std::string& path, uint64_t target_bytes) = 0;
  virtual void forget(const std::string& path) = 0;  // the VM is gone, maybe its file too
};

enum class AccountingMode { kBpf, kTracepoint, kBlocks };

// The wanted mode, or the next one that this kernel carries; note says which it
// is, and why not the better one.
[[nodiscard]] std::unique_ptr<Accounting> open_accounting(AccountingMode wanted, std::string& note);

}  // namespace hypertier
