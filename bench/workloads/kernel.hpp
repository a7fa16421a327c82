// SPDX-License-Identifier: GPL-2.0-or-later
// A small computing kernel behind the hand-shake of commands.hpp. What it reads
// it checks, so that a page that was lost or mixed up shows.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "commands.hpp"

namespace workload {

struct KernelOptions {
  uint64_t size = 384 << 20;  // bytes, about; the graph's is set by its scale
  uint64_t seed = 1;
  uint64_t filler = 340;  // instructions for each access that will miss, about
};

class Kernel {
 public:
  explicit Kernel(const KernelOptions& options) : options_(options), random_(options.seed) {}
  virtual ~Kernel() = default;

  virtual void run(uint64_t operations) = 0;
  virtual void shift() {}  // another hot set, where there is one
  // Reads everything; true if all of it is as it must be.
  virtual bool verify() = 0;

  uint64_t operations() const { return operations_; }
  uint64_t errors() const { return errors_; }

 protected:
  void expect(bool right, const void* where) {
    if (right) return;
    if (errors_++ < 5) std::fprintf(stderr, "kernels: wrong memory at %p\n", where);
  }
  void fill_time(uint64_t accesses = 1) const { burn(accesses * (options_.filler / 32)); }

  KernelOptions options_;
  Random random_;
  uint64_t operations_ = 0, errors_ = 0;
};

// Fresh zeroed memory in small pages: what is touched first is where the
// kernel puts it first.
template <class T>
T* fresh(uint64_t count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("kernels: cannot map memory");
    std::exit(1);
  }
  madvise(memory, count * sizeof(T), MADV_NOHUGEPAGE);
  return static_cast<T*>(memory);
}

// A cache line that knows where it belongs and what it holds.
struct Line {
  uint64_t value;
  uint64_t check;
  uint64_t unused[6];
};

std::unique_ptr<Kernel> make_gups(const KernelOptions&);
std::unique_ptr<Kernel> make_btree(const KernelOptions&);
std::unique_ptr<Kernel> make_stencil(const KernelOptions&);
std::unique_ptr<Kernel> make_xsbench(const KernelOptions&);
std::unique_ptr<Kernel> make_bfs(const KernelOptions&);
std::unique_ptr<Kernel> make_pagerank(const KernelOptions&);
std::unique_ptr<Kernel> make_oltp(const KernelOptions&);
std::unique_ptr<Kernel> make_sqlite(const KernelOptions&);

}  // namespace workload
