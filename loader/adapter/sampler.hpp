// SPDX-License-Identifier: GPL-2.0-or-later
// SampleSource over bpf/sampler.bpf.c: the range maps, and the PMU events that
// feed them.
#pragma once

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "adapter/adapter.hpp"
#include "adapter/maps.hpp"
#include "adapter/programs.hpp"
#include "adapter/slots.hpp"
#include "machine.hpp"

namespace hypertier {

class Sampler : public SampleSource {
 public:
  // programs: loaded with granules. settle: see AdapterOptions.
  static Result<std::unique_ptr<Sampler>> open(Programs programs, std::function<Result<>()> settle = {});

  [[nodiscard]] Result<> start(const ChosenSource& source);
  void stop();
  bool running() const { return running_; }
  // Of events open now and later: one sample in so many, where the source that
  // was started has its own period.
  [[nodiscard]] Result<> set_period(std::uint64_t period);

  [[nodiscard]] Result<> drain(const std::function<void(const ht_granule&)>& fold) override;
  void forget(__u64 space, __u64 start, __u64 end) override { slots_.forget(space, start, end); }
  ht_sampler_stats stats() override;

  SamplerCost cost() const;
  GranuleUse granules() const;
  std::uint32_t sampling_cpus() const { return static_cast<std::uint32_t>(cpus_.size()); }

  [[nodiscard]] Result<> pin(const std::filesystem::path& dir);

 private:
  // One event on one CPU; detached and closed with it.
  struct Attached {
    Fd leader;
    bpf_link* link = nullptr;  // owns fd
    int fd = -1;
    std::uint64_t period = 0;  // as the source has it
    Attached() = default;
    Attached(Attached&& other) noexcept
        : leader(std::move(other.leader)), link(std::exchange(other.link, nullptr)), fd(other.fd), period(other.period) {}
    Attached& operator=(Attached&&) = delete;
    ~Attached() { bpf_link__destroy(link); }
  };

  Sampler(Programs programs, std::uint32_t capacity, std::function<Result<>()> settle)
      : programs_(std::move(programs)), settle_(std::move(settle)), slots_(capacity) {}
  Result<Attached> attach(const SourceEvent& event, int cpu);
  void follow_hotplug();
  Result<> attach_new_cpus(bool all_or_error);
  ht_control& control() const;
  Result<> delete_keys(const std::vector<Slots::Leaving>& leaving);
  void clear_hints(const std::vector<Slots::Leaving>& leaving);

  Programs programs_;  // first: what is attached to them goes before them
  std::function<Result<>()> settle_;
  std::uint64_t counted_total_ = 0;  // samples drained
  MappedMap granules_, changed_, free_;
  Slots slots_;
  std::vector<SourceEvent> events_;
  std::uint64_t own_period_ = 1, period_ = 1;
  std::uint64_t scaled(std::uint64_t period) const { return std::max<std::uint64_t>(1, period * period_ / own_period_); }
  std::map<int, std::vector<Attached>> cpus_;
  Fd uevents_;   // hotplug news of the kernel
  Fd run_time_;  // keeps the kernel's BPF statistics on
  bool running_ = false;
};

}  // namespace hypertier
