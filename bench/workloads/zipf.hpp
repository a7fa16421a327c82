// SPDX-License-Identifier: GPL-2.0-or-later
#pragma once

#include <cmath>
#include <cstdint>

#include "commands.hpp"

namespace workload {

// Ranks 0.. with probability ~ 1/(rank+1)^0.99 (Gray et al., as in YCSB); the
// number of items may grow.
class Zipf {
 public:
  explicit Zipf(uint64_t items) { grow(items); zeta2_ = 1 + std::pow(2, -kTheta); }

  // Exact term by term, but for a long way the integral with its first
  // correction: millions of powers would take the lab minutes.
  void grow(uint64_t items) {
    constexpr uint64_t kExact = 100000;
    while (items_ < items) {
      if (items_ >= kExact && items - items_ > 1000) {
        auto from = static_cast<double>(items_), to = static_cast<double>(items);
        zeta_ += (std::pow(to, 1 - kTheta) - std::pow(from, 1 - kTheta)) / (1 - kTheta) + (std::pow(to, -kTheta) - std::pow(from, -kTheta)) / 2;
        items_ = items;
      } else {
        items_++;
        zeta_ += std::pow(static_cast<double>(items_), -kTheta);
      }
    }
  }

  uint64_t rank(Random& random) const {
    double u = random.unit(), uz = u * zeta_;
    if (uz < 1) return 0;
    if (uz < zeta2_) return 1;
    auto n = static_cast<double>(items_);
    double eta = (1 - std::pow(2 / n, 1 - kTheta)) / (1 - zeta2_ / zeta_);
    auto rank = static_cast<uint64_t>(n * std::pow(eta * u - eta + 1, 1 / (1 - kTheta)));
    return rank < items_ ? rank : items_ - 1;
  }

 private:
  static constexpr double kTheta = 0.99;
  uint64_t items_ = 0;
  double zeta_ = 0, zeta2_ = 0;
};

}  // namespace workload
