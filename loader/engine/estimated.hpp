// SPDX-License-Identifier: GPL-2.0-or-later
// Estimated ranges: runs are pages of a stretch of addresses whose estimated rates are
// about the same, scattered among others or all that is there. They are drawn anew with every pass of the estimate; policies neither split
// nor merge them. Which tier each page is in is known here, from walks and from
// what was moved, so that nothing is walked to list the pages of a range.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "engine.hpp"
#include "estimate.hpp"
#include "partition.hpp"

namespace hypertier {

class EstimatedPartition final : public Partition {
 public:
  explicit EstimatedPartition(const EngineSettings& settings);

  void begin(__u64 epoch, float exposure = 1) override;
  void fold(const ht_granule& granule, const Stray& stray) override;
  void fold(const ht_bits& bits) override;
  __u64 close(__u64 fast_pages) override;
  __u64 bits_interval_ns() const override;
  void map(__u64 space, std::span<const ht_mapping> mappings) override;
  void drop(__u64 space) override;
  std::size_t fill(std::span<tier_range> out) override;
  Residency& residency(std::size_t index) override { return residencies_[index]; }
  Adapted adapt(std::span<const tier_range> answers) override;

  bool knows_pages() const override { return true; }
  std::size_t bytes() const override { return estimate_.bytes() + index_->bytes(); }
  std::shared_ptr<const RangeIndex> index() const override { return index_; }
  std::vector<Span> to_walk(__u64 pages, std::span<const __u64> changed) override;
  void walked(const Span& span, __u64 next, std::span<const ht_page_t> pages) override;
  void list(std::size_t index, ht_tier tier, __u64 max_pages, std::vector<Listed>& listed) override;
  void placed(__u64 space, ht_page_t page, ht_move_result result, ht_tier wanted) override;
  std::vector<Skewed> skewed(std::size_t max) override;
  void apart(__u64 space, __u64 start, ht_move_result result) override;
  void try_pages(__u64 space, ht_page_t page, ht_tier side) override;
  Trial trial() override { return trial_; }
  std::array<__u64, HT_TIERS> tier_samples() const override { return tier_samples_; }
  void clear_trial() override;
  bool rest() override;

  const Estimate& estimate() const { return estimate_; }

 private:
  struct Mapping {
    __u64 start = 0;
    __u64 end = 0;
    __u32 flags = 0;
    __u32 id = 0;
    __u64 made_epoch = 0;
  };
  struct Run {
    __u32 cell;
    __u8 level;
    __u32 flags;
    __u32 mapping;
    __u64 made_epoch;
    float rate;  // mean over its pages
    float square;  // mean of the squares
    float worth;  // of that rate, as of the pass
  };
  class Drawing;
  struct Fresh {
    Span span;
    __u64 epoch;  // it is walked in a later one: what lives shorter costs nothing
  };
  struct Sampled {
    __u64 address;
    __u32 samples;
    __u32 stores;
  };
  // What came of one granule: pages of sampled_ and counted_, from first on.
  struct Folded {
    __u64 space;
    __u64 granule;
    __u32 first;
    __u32 pages;
  };

  // A huge page that seems to be hot in a part only. Which part is told by what was
  // counted before; whether it is so, by samples that came after that.
  struct Watched {
    std::array<__u64, HT_GRANULE_PAGES / 64> part{};
    __u32 pages = 0;  // of the part; 0: left whole until then
    __u32 part_hits = 0;
    __u32 hits = 0;
    __u64 since_epoch = 0;
    double since_exposures = 0;
  };

  struct Contents {
    __u64 pages = 0;
    __u64 tiers[HT_TIERS] = {0, 0};
    __u64 huge_pages = 0;
    double count[Estimate::kScales] = {0, 0, 0};
    __u64 units[Estimate::kScales] = {0, 0, 0};  // of single pages' counts, 1 / unit()
    __u32 sampled_epoch = 0;
    __u32 born_epoch = HT_UNKNOWN32;  // of the oldest
  };

  void count();
  void watch();
  void try_bits();
  template <class F>
  void each_granule(const RangeIndex::Cell& cell, F&& f);
  void contents(const RangeIndex::Cell& cell, std::span<Contents> of);
  void describe(const RangeIndex::Cell& cell, std::size_t index, const Contents& has, bool alone, tier_range& o);
  void look_again(__u64 space, __u64 granule);
  void clip();
  void draw();
  bool due() const;
  bool quiet() const;
  const Mapping* mapping_of(__u64 space, __u64 address) const;

  const EngineSettings& settings_;
  Estimate estimate_;
  __u64 epoch_ = 0;
  float exposure_ = 1;    // of this epoch
  double exposures_ = 0;  // of all
  __u64 passed_epoch_ = 0;
  double moved_share_;  // of the top set's size: what was moved in each epoch, decayed
  __u64 top_pages_ = 1;
  __u64 in_fast_pages_ = 0;  // as of the last fill
  __u32 next_id_ = 1;
  std::map<__u64, std::vector<Mapping>> spaces_;
  std::vector<Run> runs_;
  std::shared_ptr<const RangeIndex> index_ = std::make_shared<const RangeIndex>();  // of runs_
  bool remapped_ = false;  // since the runs were drawn
  std::size_t grain_ = 0;
  std::vector<Residency> residencies_;
  std::vector<Sampled> sampled_;
  std::vector<Estimate::PageSamples> counted_;  // the same pages, in their granules
  std::vector<Folded> folded_;
  // Walks: what is new goes first, then round and round.
  std::vector<Fresh> fresh_;
  __u64 turn_space_ = 0;
  __u64 turn_address_ = 0;
  std::map<std::pair<__u64, __u64>, Watched> watched_;  // by space, granule
  // Granules with pages on trial, and what the epoch brought them.
  std::vector<std::pair<__u64, __u64>> tried_;
  __u64 tried_pages_[HT_TIERS] = {0, 0};
  struct Bits {
    __u64 checked = 0;
    __u64 set = 0;
  };
  Bits tried_bits_[HT_TIERS];  // of pages on trial, in this epoch
  __u64 bits_set_ = 0;
  Trial trial_;
  std::array<__u64, HT_TIERS> tier_samples_{};
};

}  // namespace hypertier
