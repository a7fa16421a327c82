// SPDX-License-Identifier: GPL-2.0-or-later
// Accessed bits as samples. A granule is read once in a while, all of memory is
// ranked in each epoch: so every granule keeps the rate that its bits told last,
// and counts that many samples in each epoch, in a unit that is the same for
// all. See docs/architecture.md.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <span>
#include <unordered_map>

#include <hypertier/abi.h>

namespace hypertier {

class BitRates {
 public:
  // by_page: which pages of a granule have the samples is worth knowing: there
  // are ranges smaller than a granule.
  explicit BitRates(bool by_page) : by_page_(by_page) {}

  void fold(const ht_bits& bits);

  // What is managed of a space now: the rest is forgotten.
  void keep(__u64 space, std::span<const ht_mapping> mappings);

  // Hands out an epoch's samples of all granules. Returns how many.
  __u64 count(__u64 fast_pages, const std::function<void(const ht_granule&)>& fold);

  // 1 / mean rate of the hottest fast_pages of the last count(); 0: none.
  __u64 interval_ns() const { return interval_ns_; }
  // How much more a granule's bits vary than independent ones would.
  double dispersion() const;

 private:
  struct Granule {
    float touches = 0;  // of all its pages, decayed by check
    float seconds = 0;  // in which they happened
    float carry = 0;    // share of a sample left over
    std::uint32_t pages = 0;
    std::uint16_t first = 0, last = 0;  // of the pages checked
    std::uint32_t set = 0;  // of the last check
    float interval = 0;     // of it, seconds
    std::array<std::uint8_t, HT_GRANULE_PAGES> weight{};  // by_page only: how often set of late
    double rate() const { return seconds > 0 ? touches / seconds : 0; }
  };
  using Granules = std::map<__u64, Granule>;

  void measure(__u64 fast_pages);
  void give_to_pages(const Granule& granule, ht_granule& samples);  // sets its pages

  const bool by_page_;
  std::unordered_map<__u64, Granules> spaces_;
  __u64 interval_ns_ = 0;
  double squares_ = 0;   // of differences between two checks of a granule
  double expected_ = 0;  // if bits were independent
  std::minstd_rand random_;
};

}  // namespace hypertier
