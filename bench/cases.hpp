// SPDX-License-Identifier: GPL-2.0-or-later
// The workloads that are measured, and how much fast memory each may have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace bench {

struct Case {
  std::string name;
  std::string what;
  std::vector<std::string> command;  // "redis" and "memcached" stand for server and driver
  uint64_t usable_mib;  // of the fast node; the rest is held down by huge pages
  uint64_t period;      // misses a sample: s of about 0.2 in what is usable
  unsigned seconds;     // of the guest's clock
  unsigned shift_s;     // another hot set each so many seconds; 0: never
  bool named;           // one of the eight that a whole run fills
  bool thp = false;     // huge pages always; else none

  // A virtual machine inside the lab has the memory, and its host tiers it.
  bool nested() const { return std::find(command.begin(), command.end(), "--nested") != command.end(); }
};

inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"hotset-2m", "64 MiB hot in pieces of 2 MiB of 384 MiB, all slow at the start", {"hotset", "--piece", "2M", "--place", "slow-hot"}, 118, 83, 60, 0, true},
      {"hotset-64k", "the same in pieces of 64 KiB", {"hotset", "--piece", "64K", "--place", "slow-hot"}, 118, 83, 60, 0, true},
      {"hotset-4k", "the same in single pages", {"hotset", "--piece", "4K", "--place", "slow-hot"}, 118, 83, 60, 0, true},
      {"gups", "read-modify-write of random lines of 384 MiB: nothing to gain", {"kernels", "gups"}, 118, 83, 30, 0, true},
      {"btree", "B+tree of 384 MiB, zipf over scattered keys", {"kernels", "btree"}, 118, 83, 60, 0, true},
      {"pagerank", "PageRank on a Kronecker graph, vertices slow at the start", {"kernels", "pagerank", "--size", "192M"}, 48, 83, 60, 0, true},
      {"redis", "redis-server, 90,000 values of 2000 bytes, youngest hottest, 5 % inserts", {"redis"}, 72, 83, 45, 0, true},
      {"memcached", "memcached, the same", {"memcached"}, 72, 83, 45, 0, true},
      {"hotset-2m-moving", "hotset-2m, another hot set each 30 s", {"hotset", "--piece", "2M", "--place", "slow-hot"}, 118, 83, 90, 30, false},
      {"hotset-64k-moving", "hotset-64k, another hot set each 30 s", {"hotset", "--piece", "64K", "--place", "slow-hot"}, 118, 83, 90, 30, false},
      {"hotset-4k-moving", "hotset-4k, another hot set each 30 s", {"hotset", "--piece", "4K", "--place", "slow-hot"}, 118, 83, 90, 30, false},
      {"hotset-2m-thp", "hotset-2m with huge pages always", {"hotset", "--piece", "2M", "--place", "slow-hot", "--thp", "always"}, 118, 83, 60, 0, false, true},
      {"oltp", "OLTP engine of 384 MiB, another hot eighth each 30 s", {"kernels", "oltp"}, 118, 83, 90, 30, false},
      {"stencil", "7-point stencil that sweeps over 384 MiB", {"kernels", "stencil"}, 118, 83, 45, 0, false},
      {"xsbench", "XSBench-like lookups, 48 MiB of tables slow at the start", {"kernels", "xsbench"}, 118, 83, 45, 0, false},
      {"liblinear", "liblinear-train (dual SVM) on sparse rows by zipf: 32 MiB of weights, 96 MiB of rows", {"trainload"}, 36, 997, 16, 0, false},  // by then it has learned, and writes its model
      {"sqlite", "SQLite, a database of 192 MiB in memory, transactions between accounts by zipf", {"kernels", "sqlite", "--size", "192M"}, 48, 83, 45, 0, false},
      {"hotset-2m-nested", "hotset-2m in a virtual machine, whose host tiers it from outside", {"hotset", "--nested", "--piece", "2M", "--place", "slow-hot"}, 118, 83, 60, 0, false},
      {"bfs", "breadth-first search on a Kronecker graph", {"kernels", "bfs", "--size", "192M"}, 48, 83, 45, 0, false},
  };
  return all;
}

inline const Case* find_case(const std::string& name) {
  for (const Case& one : cases())
    if (one.name == name) return &one;
  return nullptr;
}

// Systems are none, kernel, kernel-tuned, damon, oracle, or POLICY[@SOURCE][@sparse].
inline constexpr std::string_view kSparseSuffix = "@sparse";
inline bool is_sparse(std::string_view system) { return system.ends_with(kSparseSuffix); }
// The source of its name, or nothing.
inline std::string source_of(std::string system) {
  if (is_sparse(system)) system.resize(system.size() - kSparseSuffix.size());
  const auto at = system.find('@');
  return at == std::string::npos ? "" : system.substr(at + 1);
}

// Why a system is not for a workload; nothing: it is.
inline std::optional<std::string> unfit(const Case& one, const std::string& system) {
  if (!one.nested() || (!system.starts_with("heattree") && !system.starts_with("hyperplace"))) return std::nullopt;
  if (system.ends_with("@abit")) return "a guest's accesses set accessed bits in nested page tables, and it reads those of the process";
  return "it samples inside the guest, which is hotset-2m; to its host a guest's samples are addresses of the guest (the lab's are not: it gives the guest those of its process)";
}

}  // namespace bench
