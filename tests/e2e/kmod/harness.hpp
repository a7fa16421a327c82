// SPDX-License-Identifier: GPL-2.0-or-later
// What the module's tests share: the module itself, mover.bpf.o with its maps
// mapped, and memory placed on a chosen node. Runs in the lab VM as root.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <hypertier/abi.h>

struct bpf_object;

namespace hypertier::test {

inline constexpr int kFastNode = 0, kSlowNode = 1;
inline constexpr std::size_t kPage = 4096, kHuge = 2 << 20;

// Loads and unloads hypertier.ko; 0 or an errno.
int load_module(const std::string& path);
int unload_module();

// /dev/hypertier, with node 0 as the fast tier and node 1 as the slow one.
class Device {
 public:
  Device();
  ~Device();
  int fd() const { return fd_; }
  ht_module_info info() const;
  ht_seat seat(std::uint64_t cgroup_id) const;
  int eject(std::uint64_t cgroup_id, std::uint64_t generation, std::uint32_t code) const;  // 0 or an errno

 private:
  int fd_;
};

// The programs of mover.bpf.o.
class Mover {
 public:
  Mover();
  ~Mover();

  // The buffer of one scope: ranges, pairs and results share their place.
  ht_run& run() { return call_->run; }
  tier_range* ranges() { return call_->ranges; }
  tier_pair* admits() { return call_->pairs; }
  tier_result* results() { return call_->results; }
  ht_spaces_run& spaces() { return *as<ht_spaces_run>("spaces"); }
  ht_mapping* mappings() { return as<ht_mapping>("mappings"); }
  ht_walks_run& walks() { return *as<ht_walks_run>("walks"); }
  ht_page_t* pages() { return as<ht_page_t>("pages"); }
  ht_pair* pairs() { return as<ht_pair>("pairs"); }
  ht_exchange_run& exchange() { return *as<ht_exchange_run>("exchange"); }

  // Runs a program; what the kfunc returned.
  int call(const char* program);

  // The space of a process, 0 if it is gone.
  std::uint64_t space_of(int pid);
  // Walks [start, end) of a process; the pages of list_tier.
  std::vector<ht_page_t> walk(int pid, const void* start, std::size_t bytes, std::uint32_t list_tier,
                              ht_walk* result = nullptr);
  // Pairs lists up to the shorter one and moves them. Empty lists are one-sided moves.
  ht_exchange_run move(int hot_pid, const std::vector<ht_page_t>& hot, int cold_pid,
                       const std::vector<ht_page_t>& cold, std::uint32_t flags = 0);

 private:
  template <class T>
  T* as(const char* map) {
    return static_cast<T*>(values_.at(map));
  }
  bpf_object* object_;
  ht_call* call_;
  std::map<std::string, void*> values_;
  std::map<std::string, int> programs_;
};

// Anonymous memory, on a node when touched the first time.
class Memory {
 public:
  // huge: madvise(MADV_HUGEPAGE) or MADV_NOHUGEPAGE; touches every page.
  Memory(std::size_t bytes, int node, bool huge = false, int flags = 0);
  ~Memory();
  Memory(const Memory&) = delete;

  char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  std::size_t pages() const { return bytes_ / kPage; }
  // Counts pages of this process per node through pagemap-independent move_pages(2).
  std::size_t pages_on(int node) const;

 private:
  char* data_;
  std::size_t bytes_;
};

// One for all tests; main() lets go of it before it unloads the module.
Mover& mover();
void drop_mover();

void place(void* start, std::size_t bytes, int node);          // policy for later touches
void write_file(const std::string& path, const std::string& value);  // throws
std::string read_file(const std::string& path);
std::uint64_t field(const std::string& text, const std::string& name);  // "name VALUE" line
std::uint64_t vmstat(const std::string& name);                 // refreshed
std::uint64_t pagemap(int pid, const void* address);
std::uint64_t pfn(const void* address);

extern std::string build_dir;      // <build>
extern std::uint64_t moves_wanted;  // of the integrity test

}  // namespace hypertier::test
