// SPDX-License-Identifier: GPL-2.0-or-later
#include "sources/rate_control.hpp"

#include <algorithm>
#include <cmath>

namespace hypertier {
namespace {

constexpr double kSmooth = 0.25;
// Within this of the budget the period is left alone: each change disturbs the
// counts of an epoch.
constexpr double kDeadBand = 0.1;
// Room in the budget is taken up in small steps, an excess ends at once.
constexpr double kShrinkMost = 0.75;
constexpr double kGrowMost = 16;
// PMUs that count in steps of 16 (IBS) take no other period.
constexpr std::uint64_t kStep = 16;

}  // namespace

RateControl::RateControl(double budget_share, std::uint64_t own_period, std::uint64_t period)
    : budget_share_(budget_share), period_(period) {
  const double own = static_cast<double>(own_period);
  period_min_ = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(own * kPeriodMin));
  period_max_ = static_cast<std::uint64_t>(own * kPeriodMax);
  if (own_period % kStep == 0) period_min_ = std::max(kStep, period_min_ / kStep * kStep);
}

// Periods of events that count in steps of 16 are a whole number of them.
std::uint64_t RateControl::at_least_min(std::uint64_t period) const {
  if (period_min_ % kStep == 0) period = (period + kStep - 1) / kStep * kStep;
  return std::max(period, period_min_);
}

std::uint64_t RateControl::period() const {
  return burst_ns_ ? std::min(period_, at_least_min(period_ / burst_times_)) : period_;
}

std::uint64_t RateControl::burst(unsigned times) {
  burst_times_ = std::max(1U, times);
  burst_ns_ = kBurstNs;
  since_burst_ns_ = 0;
  return period();
}

std::uint64_t RateControl::update(std::uint64_t cost_ns, std::uint64_t elapsed_ns, unsigned cpus) {
  if (!elapsed_ns || !cpus) return period();
  // As if there were no burst.
  const double now = static_cast<double>(cost_ns) / (static_cast<double>(elapsed_ns) * cpus * times());
  burst_ns_ -= std::min(burst_ns_, elapsed_ns);
  since_burst_ns_ += std::min(elapsed_ns, kBurstEachNs);
  share_ = share_ < 0 ? now : (1 - kSmooth) * share_ + kSmooth * now;
  if (budget_share_ <= 0) return period();
  // An excess is judged by what is now, room by what has been for a while.
  const double judged = now > budget_share_ ? now : std::max(now, share_);
  double factor = judged / budget_share_;
  if (std::abs(factor - 1) <= kDeadBand) return period();
  factor = std::clamp(factor, kShrinkMost, kGrowMost);
  const std::uint64_t period = std::min(
      at_least_min(static_cast<std::uint64_t>(std::ceil(static_cast<double>(period_) * factor))), period_max_);
  if (period != period_) {
    // what has been was at another period
    share_ *= static_cast<double>(period_) / static_cast<double>(period);
    period_ = period;
  }
  return this->period();
}

}  // namespace hypertier
