// SPDX-License-Identifier: GPL-2.0-or-later
// Holds a budget of CPU time by the period of sampling: what it costs is
// measured, epoch by epoch, and the period follows.
#pragma once

#include <cstdint>

namespace hypertier {

class RateControl {
 public:
  // Share of all online CPUs' time, the interrupts included.
  static constexpr double kDefaultShare = 0.005;
  // The period stays within these multiples of the source's own.
  static constexpr double kPeriodMin = 1.0 / 16, kPeriodMax = 1024;

  RateControl() = default;
  // budget_share 0: only measures. own_period: the source's default, that the bounds are taken from; period: to
  // begin with.
  RateControl(double budget_share, std::uint64_t own_period, std::uint64_t period);

  // Sampling took cost_ns in elapsed_ns on so many CPUs. Returns the period to go
  // on with.
  std::uint64_t update(std::uint64_t cost_ns, std::uint64_t elapsed_ns, unsigned cpus);

  double share() const { return share_; }  // smoothed over about four updates
  std::uint64_t period_min() const { return period_min_; }
  std::uint64_t period_max() const { return period_max_; }

 private:
  double budget_share_ = 0;
  std::uint64_t period_ = 1, period_min_ = 1, period_max_ = 1;
  double share_ = -1;
};

}  // namespace hypertier
