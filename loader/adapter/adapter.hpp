// SPDX-License-Identifier: GPL-2.0-or-later
// The one owner of the sampler's, the process watcher's and the mover's BPF
// objects: everything that tierd needs of the kernel, without libbpf in the
// interface.
//
//   auto module = Module::open();                 // /dev/hypertier
//   auto tiers = discover_tiers(...);             // tiers.hpp
//   module->set_tiers(tiers->masks());
//   auto adapter = Adapter::open({});             // loads; nothing runs yet
//   auto source = choose_source(...);             // sources/source.hpp
//   settings.seat(); adapter->start(*source);     // first seat
//   poll {adapter->events_fd(), POLLIN} -> adapter->events(handler)
//   Engine engine(adapter->machine(), adapter->samples()); engine.epoch(...)
//   adapter->stop(); settings.restore();          // last unload
#pragma once

#include <hypertier/abi.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "machine.hpp"
#include "result.hpp"
#include "sources/source.hpp"

namespace hypertier {

struct AdapterOptions {
  std::uint32_t granules = 0;  // 2 MiB granules that can be tracked at once; 0: from RAM size
  // Where pages of each tier go by move_pages(2), if the module can move none
  // (ht_module_info::movers).
  std::optional<std::array<int, HT_TIERS>> syscall_nodes;
  std::filesystem::path pins = "/sys/fs/bpf/hypertier/v1";  // empty: pin nothing
  // Read accessed bits, in so much of all CPUs' time; 0: none are read.
  double bits_cpu_share = 0;
  bool samples = true;  // false: bits alone
  // Returns when no sampler that ran before runs any more: Module::settle, which
  // waits for no policy in its callback. Empty: a grace period, which does.
  std::function<Result<>()> settle;
};

// What the sampler program itself costs, from the kernel's BPF statistics.
struct SamplerCost {
  std::uint64_t ns_total = 0;
  std::uint64_t runs_total = 0;
};

// What reading accessed bits did and cost, since open().
struct BitsStats {
  std::uint64_t interval_ns = 0;  // between clearing and testing, now
  std::uint64_t passes_total = 0;  // over all memory; the one in progress included
  std::uint64_t cycles_total = 0;
  std::uint64_t granules_total = 0;
  std::uint64_t visits_total = 0;  // page-table entries, clearing and testing
  std::uint64_t flush_calls_total = 0;  // of a process's TLB entries, after clearing
  std::uint64_t pages_total = 0;   // mapped both times
  std::uint64_t pages_set_total = 0;
  std::uint64_t cpu_ns_total = 0;   // of the whole thread
  std::uint64_t read_ns_total = 0;  // of that, in the module
};

struct GranuleUse {
  std::uint32_t used = 0;  // slots that hold a granule, or wait to be recycled
  std::uint32_t capacity = 0;
};

class Adapter {
 public:
  // Loads all BPF objects (hypertier.ko must be there) and pins the data maps.
  // Nothing is attached: no sample is taken, no process event is delivered.
  static Result<std::unique_ptr<Adapter>> open(const AdapterOptions& options = {});

  virtual ~Adapter() = default;  // stops and unpins

  virtual Machine& machine() = 0;
  // One for each scope; the adapter must outlive it.
  virtual Result<std::unique_ptr<PolicyCaller>> policy_caller(__u64 cgroup_id) = 0;
  virtual SampleSource& samples() = 0;

  // Starts watching processes and sampling on every CPU. Sends an
  // HT_SPACE_TASK event for each process that already runs through the first
  // events() call. On error nothing runs.
  [[nodiscard]] virtual Result<> start(const ChosenSource& source) = 0;

  // Sampling ends, every granule is forgotten, no process is watched. Does
  // nothing when not started.
  virtual void stop() = 0;
  virtual bool running() const = 0;

  // Process events: poll the descriptor for POLLIN, then call events().
  // Valid as long as the adapter is. After an overflow of the ring the handler
  // sees HT_SPACE_TASK events for all running processes again, preceded by
  // on_rescan: whatever is not named by then is gone.
  virtual int events_fd() const = 0;
  [[nodiscard]] virtual Result<> events(const std::function<void(const ht_space_event&)>& handler,
                                        const std::function<void()>& on_rescan) = 0;

  // Of sampling, or of reading bits where these are alone (else see bits()); since
  // open(); 0 while the kernel's BPF statistics cannot be had.
  virtual SamplerCost cost() const = 0;
  virtual GranuleUse granules() const = 0;
  virtual BitsStats bits() const = 0;  // zero where none are read

  // One sample in so many from now on.
  [[nodiscard]] virtual Result<> set_period(std::uint64_t period) = 0;

  // CPUs that are sampled now; follows hotplug.
  virtual std::uint32_t sampling_cpus() const = 0;
};

// Granules for so much RAM: four times what RAM holds, at least 8192.
std::uint32_t granules_for(std::uint64_t ram_bytes);

// Removes what a dead tierd left pinned; true if there was something.
// Refuses while another one lives only by the caller's lock.
Result<bool> remove_stale_pins(const std::filesystem::path& pins = "/sys/fs/bpf/hypertier/v1");

}  // namespace hypertier
