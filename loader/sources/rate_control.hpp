// SPDX-License-Identifier: GPL-2.0-or-later
// Holds a budget of CPU time by the period of sampling: what it costs is
// measured, epoch by epoch, and the period follows. And bursts: for some seconds
// more samples than the budget allows, where nothing is known yet.
#pragma once

#include <cstdint>

namespace hypertier {

class RateControl {
 public:
  // Share of all online CPUs' time, the interrupts included.
  static constexpr double kDefaultShare = 0.005;
  // The period stays within these multiples of the source's own.
  static constexpr double kPeriodMin = 1.0 / 16, kPeriodMax = 1024;
  // A burst: so many times as many samples (tierd --burst), for so long.
  static constexpr unsigned kBurst = 4;
  static constexpr std::uint64_t kBurstNs = 8'000'000'000;
  // One that is not the first of an estimate begins so long after the last one did: on average
  // no more than twice the budget is used.
  static constexpr std::uint64_t kBurstEachNs = 24'000'000'000;

  RateControl() = default;
  // budget_share 0: only measures. own_period: the source's default, that the bounds are taken from; period: to
  // begin with.
  RateControl(double budget_share, std::uint64_t own_period, std::uint64_t period);

  // Sampling took cost_ns in elapsed_ns on so many CPUs. Returns the period to go
  // on with.
  std::uint64_t update(std::uint64_t cost_ns, std::uint64_t elapsed_ns, unsigned cpus);

  // Begins a burst; one that goes on lasts kBurstNs from now. Returns the period to go on with.
  std::uint64_t burst(unsigned times);
  // May another one begin because something has changed?
  bool may_burst() const { return since_burst_ns_ >= kBurstEachNs; }
  std::uint64_t period() const;

  // How many times as many samples are taken now as without a burst.
  double times() const { return static_cast<double>(period_) / static_cast<double>(period()); }
  double share() const { return share_ * times(); }  // smoothed over about four updates
  std::uint64_t period_min() const { return period_min_; }
  std::uint64_t period_max() const { return period_max_; }

 private:
  std::uint64_t at_least_min(std::uint64_t period) const;

  double budget_share_ = 0;
  std::uint64_t period_ = 1, period_min_ = 1, period_max_ = 1;  // without a burst
  double share_ = -1;                                            // the same
  unsigned burst_times_ = 1;
  std::uint64_t burst_ns_ = 0;        // that are left of it
  std::uint64_t since_burst_ns_ = kBurstEachNs;
};

}  // namespace hypertier
