// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/adapter.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <fstream>

#include "adapter/abit.hpp"
#include "adapter/mover.hpp"
#include "adapter/sampler.hpp"
#include "adapter/spaces.hpp"

namespace hypertier {
namespace {

namespace fs = std::filesystem;

class LoadedAdapter : public Adapter {
 public:
  ~LoadedAdapter() override {
    stop();
    (void)remove_stale_pins(pins_);
  }

  Result<> load(const AdapterOptions& options) {
    std::uint32_t granules = options.granules;
    if (!granules) {
      std::uint64_t ram_bytes = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) * HT_PAGE_SIZE;
      granules = granules_for(ram_bytes);
    }
    const bool bits = options.bits_cpu_share > 0;
    auto programs = load_programs({.moves = true, .bits = bits, .granules = granules, .ring_bytes = 256 << 10});
    if (!programs) return std::unexpected(programs.error());
    auto mover = Mover::open(*programs, options.syscall_nodes);
    if (!mover) return std::unexpected(mover.error());
    auto sampler = Sampler::open(*programs, options.settle);
    if (!sampler) return std::unexpected(sampler.error());
    auto spaces = SpaceWatcher::open(*programs);
    if (!spaces) return std::unexpected(spaces.error());
    mover_ = std::move(*mover);
    sampler_ = std::move(*sampler);
    spaces_ = std::move(*spaces);
    if (bits) {
      auto abit = Abit::open(*programs, options.bits_cpu_share);
      if (!abit) return std::unexpected(abit.error());
      abit_ = std::move(*abit);
      if (options.samples) both_.emplace(*sampler_, *abit_);
    }
    if (options.pins.empty()) return {};

    if (auto removed = remove_stale_pins(options.pins); !removed) return std::unexpected(removed.error());
    std::error_code error;
    fs::create_directories(options.pins, error);
    if (error)
      return fail_errno("cannot make " + options.pins.string(), error.value(),
                        "is the BPF file system mounted at /sys/fs/bpf?");
    pins_ = options.pins;
    if (auto pinned = sampler_->pin(pins_); !pinned) return pinned;
    if (auto pinned = spaces_->pin(pins_); !pinned) return pinned;
    if (auto pinned = abit_ ? abit_->pin(pins_) : Result<>(); !pinned) return pinned;
    return mover_->pin(pins_);
  }

  Machine& machine() override { return *mover_; }
  Result<std::unique_ptr<PolicyCaller>> policy_caller(__u64 cgroup_id) override {
    return mover_->caller(cgroup_id);
  }
  SampleSource& samples() override {
    if (both_) return *both_;
    if (abit_) return *abit_;
    return *sampler_;
  }

  Result<> start(const ChosenSource& source) override {
    if (auto watching = spaces_->start(); !watching) return watching;
    if (source.samples())
      if (auto sampling = sampler_->start(source); !sampling) return spaces_->stop(), sampling;
    if (source.bits) abit_->start();
    return {};
  }

  void stop() override {
    if (!running()) return;
    if (abit_) abit_->stop();
    sampler_->stop();
    spaces_->stop();
  }

  bool running() const override { return (sampler_ && sampler_->running()) || (abit_ && abit_->running()); }

  int events_fd() const override { return spaces_->fd(); }

  Result<> events(const std::function<void(const ht_space_event&)>& handler,
                  const std::function<void()>& on_rescan) override {
    return spaces_->events(handler, on_rescan);
  }

  SamplerCost cost() const override {
    if (!abit_ || both_) return sampler_->cost();
    const BitsStats read = bits();
    return {read.cpu_ns_total, read.cycles_total};
  }
  GranuleUse granules() const override { return sampler_->granules(); }
  Result<> set_period(std::uint64_t period) override { return sampler_->set_period(period); }
  BitsStats bits() const override { return abit_ ? abit_->bits_stats() : BitsStats{}; }
  std::uint32_t sampling_cpus() const override { return sampler_->sampling_cpus(); }

 private:
  fs::path pins_;
  std::unique_ptr<Mover> mover_;
  std::unique_ptr<Sampler> sampler_;
  std::unique_ptr<Abit> abit_;  // in its place or beside it, if asked for
  std::optional<BothSources> both_;  // beside it
  std::unique_ptr<SpaceWatcher> spaces_;
};

}  // namespace

Result<std::unique_ptr<Adapter>> Adapter::open(const AdapterOptions& options) {
  auto adapter = std::make_unique<LoadedAdapter>();
  if (auto loaded = adapter->load(options); !loaded) return std::unexpected(loaded.error());
  return adapter;
}

std::uint32_t granules_for(std::uint64_t ram_bytes) {
  constexpr std::uint64_t kMin = 8192, kMax = 1 << 22;
  return static_cast<std::uint32_t>(std::bit_ceil(std::clamp(4 * ram_bytes / HT_GRANULE_SIZE, kMin, kMax)));
}

Result<bool> remove_stale_pins(const fs::path& pins) {
  std::error_code error;
  if (pins.empty() || !fs::exists(pins, error)) return false;
  fs::remove_all(pins, error);
  if (error) return fail_errno("cannot remove " + pins.string(), error.value(), "run as root");
  fs::remove(pins.parent_path(), error);  // stays if a later version has a directory in it
  return true;
}

}  // namespace hypertier
