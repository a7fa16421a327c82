// SPDX-License-Identifier: GPL-2.0-or-later
// SampleSource over accessed bits: a thread of its own reads them through
// hypertier.ko at the times of an AbitPlan, since the interval between clearing
// and testing is far shorter than an epoch.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "adapter/adapter.hpp"
#include "adapter/maps.hpp"
#include "adapter/programs.hpp"
#include "machine.hpp"
#include "sources/abit_plan.hpp"

namespace hypertier {

class Abit : public SampleSource {
 public:
  // programs: loaded with bits. cpu_share: of the time of all online CPUs.
  static Result<std::unique_ptr<Abit>> open(Programs programs, double cpu_share);
  ~Abit() override;

  [[nodiscard]] Result<> pin(const std::filesystem::path& dir);
  void start();
  void stop();
  bool running() const { return thread_.joinable(); }

  [[nodiscard]] Result<> drain(const std::function<void(const ht_granule&)>&) override;
  void drain_bits(const std::function<void(const ht_bits&)>& fold) override;
  void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) override;
  void aim(__u64 interval_ns) override;
  void forget(__u64, __u64, __u64) override {}
  ht_sampler_stats stats() override { return {}; }

  BitsStats bits_stats() const;

 private:
  Abit(Programs programs, std::uint64_t budget_ns_per_s) : programs_(std::move(programs)), plan_(budget_ns_per_s) {}
  void loop(std::stop_token stop);
  Result<> step(ht_check_phase phase);
  ht_bits_run& run() const { return *map_.as<ht_bits_run>(); }

  Programs programs_;
  MappedMap map_;
  mutable std::mutex mutex_;  // what follows is shared by the thread and the engine's
  std::condition_variable_any wake_;
  AbitPlan plan_;
  std::vector<ht_bits> read_;
  BitsStats stats_;
  std::optional<Error> error_;  // of the last step, for the next drain()
  std::jthread thread_;
};

}  // namespace hypertier
