// SPDX-License-Identifier: GPL-2.0-or-later
// Adaptive ranges: each mapping starts as one range; the policy splits and
// merges.
#pragma once

#include <unordered_map>
#include <vector>

#include "bits.hpp"
#include "engine.hpp"
#include "partition.hpp"

namespace hypertier {

class AdaptivePartition final : public Partition {
 public:
  explicit AdaptivePartition(const EngineSettings& settings)
      : settings_(settings), bits_(settings.min_range_bytes < HT_GRANULE_SIZE) {}

  void begin(__u64 epoch, float exposure = 1) override;
  void fold(const ht_granule& granule, const Stray& stray) override;
  // Nobody knows what a bit is worth in samples: where these are, they alone count.
  void fold(const ht_bits& bits) override {
    if (!sampled_) bits_.fold(bits);
  }
  __u64 close(__u64 fast_pages) override;
  __u64 bits_interval_ns() const override { return bits_.interval_ns(); }
  void map(__u64 space, std::span<const ht_mapping> mappings) override;
  void drop(__u64 space) override;
  std::size_t fill(std::span<tier_range> out) override;
  Residency& residency(std::size_t index) override { return filled_[index]->residency; }
  Adapted adapt(std::span<const tier_range> answers) override;

 private:
  struct Range {
    __u64 start = 0;
    __u64 end = 0;
    __u64 made_epoch = 0;
    __u64 sampled_epoch = 0;  // samples, stores and touched belong to it
    __u32 samples = 0;
    __u32 stores = 0;
    __s32 touched = -1;  // head of its chain in touched_, newest first
    __u32 count[HT_SCALES] = {};  // as of counted_epoch
    __u64 counted_epoch = 0;
    // Evidence of unevenness: pairs of samples of one epoch that fell into the
    // same unit, how many would by chance, and the variance of that.
    __u64 epoch_pairs = 0;  // of sampled_epoch
    double pairs = 0;
    double expected_pairs = 0;
    double variance = 0;
    __u64 judged_epoch = 0;
    Residency residency;

    __u64 bytes() const { return end - start; }
  };

  struct Mapping {
    __u64 start = 0;
    __u64 end = 0;
    __u32 flags = 0;
    __u32 id = 0;
    std::vector<Range> ranges;  // sorted, without gaps
  };

  // What one granule brought a range in this epoch: a split needs it.
  struct Touch {
    __s32 next;
    __s32 pages;  // index in pages_, or -1 where no split can cut the granule
    __u64 granule;
    __u32 samples;
    __u32 stores;
  };

  struct Pages {
    __u32 words[HT_GRANULE_PAGES / 2];
  };

  void take(const ht_granule& granule, const Stray& stray);
  static __u32 decayed(__u32 count, int scale, __u64 epochs);
  void decay(Range& range) const;
  void count(Range& range, const ht_granule& granule, __u32 samples, __u32 stores);
  void judge(Range& range) const;
  __u32 uneven(const Range& range) const;
  __u64 cut(const Range& range) const;  // where a split would cut; 0: nowhere
  Range part(const Range& range, __u64 start, __u64 end) const;
  void split(const Range& range, __u64 at, Range& left, Range& right) const;
  Range merged(const Range& left, const Range& right) const;
  void inherit(Mapping& mapping, const std::vector<Mapping>& old);

  const EngineSettings& settings_;
  BitRates bits_;
  bool sampled_ = false;
  __u64 epoch_ = 0;
  __u32 next_id_ = 1;
  std::size_t ranges_ = 0;    // all
  std::size_t mappings_ = 0;  // all
  std::unordered_map<__u64, std::vector<Mapping>> spaces_;
  std::vector<Touch> touched_;
  std::vector<Pages> pages_;
  std::vector<Range*> filled_;
  std::vector<__u64> filled_spaces_;
};

}  // namespace hypertier
