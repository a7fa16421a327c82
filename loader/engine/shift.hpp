// SPDX-License-Identifier: GPL-2.0-or-later
// Tells when what is hot has changed: of the samples, suddenly far fewer are of
// pages in fast memory. Pure.
#pragma once

#include <algorithm>
#include <cmath>

#include <hypertier/abi.h>

namespace hypertier {

class ShiftWatch {
 public:
  // An epoch's samples of pages whose tier is known. True: in this epoch the share of
  // those in fast memory fell to three quarters of what it was, and not by chance.
  bool epoch(__u64 fast, __u64 samples) {
    if (samples < kSamplesMin) return false;
    const double share = static_cast<double>(fast) / static_cast<double>(samples);
    const double deviation = std::sqrt(std::max(share * (1 - share), 0.01) / static_cast<double>(samples));
    const bool fell = share_ >= 0 && share + kDeviations * deviation < kFellTo * share_;
    share_ = share_ < 0 || fell ? share : share_ + kNew * (share - share_);
    return fell;
  }

 private:
  static constexpr __u64 kSamplesMin = 64;
  static constexpr double kFellTo = 0.75;
  static constexpr double kDeviations = 3;
  static constexpr double kNew = 0.16;  // half-life of 4 epochs
  double share_ = -1;                   // lately
};

}  // namespace hypertier
