// SPDX-License-Identifier: GPL-2.0-or-later
#include "estimated.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

namespace hypertier {
namespace {

constexpr __u32 kOrderHuge = 9;
// A rotation over all pages takes so many epochs, so that a page the kernel
// moved by itself is not taken for where it was for longer.
constexpr __u64 kWalkTurnEpochs = 64;
constexpr __u64 kWalkMinPages = 8192;
// How often finer ranges are tried.
constexpr __u64 kFinerEpochs = 16;
// While no more than this share of the fast tier is moved an epoch, as seen over so many
// epochs, passes are made each kRestEpochs.
constexpr double kQuietShare = 0.002;
constexpr double kQuietEpochs = 8;
constexpr double kMovedAtFirst = 8 * kQuietEpochs * kQuietShare;  // quiet after 16 epochs at the earliest
constexpr __u64 kRestEpochs = 4;
// The top set is at least this part of what the fast tier may hold.
constexpr __u64 kTopMin = 16;

// Huge pages that seem to be hot in a part only: how many are watched at a time, for how
// long at least, after how long it is over, and for how long those are left alone that
// were not taken apart.
constexpr std::size_t kWatchedMax = 1024;
constexpr __u64 kWatchEpochs = 8;
constexpr __u64 kWatchMaxEpochs = 64;
constexpr __u64 kLeftWholeEpochs = 128;
// A part is watched if its pages are estimated to be hotter than the cut by this, on average.
constexpr float kPartOverCut = 2;
// Samples of a granule, below which nothing is told of its parts.
constexpr float kPartCounts = 8;

// Pages on trial are scattered: their bits are not as alike as a whole granule's.
constexpr double kTrialPhiMax = 4;

__u32 saturated(double value) {
  return value <= 0 ? 0 : value >= 4294967294.0 ? HT_UNKNOWN32 - 1 : static_cast<__u32>(value);
}

// Calls f(page, samples) for each page that has any. Nearly all have none: 64 are
// passed over at a time.
template <class F>
void each_sampled(const ht_granule& granule, F&& f) {
  constexpr unsigned kWords = 16;
  __u64 fours[kWords];
  for (unsigned first = 0; first < HT_GRANULE_PAGES; first += 4 * kWords) {
    std::memcpy(fours, &granule.pages[first / 2], sizeof(fours));
    __u64 any = 0;
    for (const __u64 four : fours) any |= four;
    if (!any) continue;
    for (unsigned w = 0; w < kWords; ++w)
      for (unsigned p = first + 4 * w; fours[w]; ++p, fours[w] >>= 16)
        if (auto n = static_cast<__u32>(fours[w] & 0xffff)) f(p, n);
  }
}

// Bits of one granule's words that lie in pages [first, last).
template <class F>
void each_word(unsigned first, unsigned last, F&& f) {
  for (unsigned w = first / 64; w < HT_GRANULE_PAGES / 64 && w * 64 < last; ++w) f(w, page_mask(first, last, w));
}

// How coarse runs are: rates within a step of that ratio are one level, those beyond zone times
// the rate at the cut, either way, are all alike, and a cell is of so many granules.
struct Grain {
  float tolerance;
  float zone;
  unsigned granules;
};

}  // namespace

EstimatedPartition::EstimatedPartition(const EngineSettings& settings) : settings_(settings), moved_share_(kMovedAtFirst) {}

void EstimatedPartition::begin(__u64 epoch, float exposure) {
  epoch_ = epoch;
  exposure_ = exposure;
  exposures_ += exposure;
  estimate_.begin(epoch, exposure);
  sampled_.clear();
  counted_.clear();
  folded_.clear();
  trial_ = {};
  tier_samples_ = {};
  std::fill(std::begin(tried_bits_), std::end(tried_bits_), Bits{});
  bits_set_ = 0;
  moved_share_ -= moved_share_ / kQuietEpochs;
  trial_.hot_pages = tried_pages_[HT_TIER_SLOW];
  trial_.cold_pages = tried_pages_[HT_TIER_FAST];
  trial_.told = !estimate_.by_bits();
}

const EstimatedPartition::Mapping* EstimatedPartition::mapping_of(__u64 space, __u64 address) const {
  auto s = spaces_.find(space);
  if (s == spaces_.end()) return nullptr;
  auto m = std::upper_bound(s->second.begin(), s->second.end(), address,
                            [](__u64 a, const Mapping& mapping) { return a < mapping.end; });
  return m == s->second.end() || m->start > address ? nullptr : &*m;
}

void EstimatedPartition::fold(const ht_granule& granule, const Stray& stray) {
  const __u64 start = granule.granule << HT_GRANULE_SHIFT;
  const Mapping* mapping = nullptr;
  __u32 samples = 0;
  __u32 stores_done = 0;
  const auto first = static_cast<__u32>(sampled_.size());
  each_sampled(granule, [&](unsigned p, __u32 n) {
    const __u64 address = start + (__u64{p} << HT_PAGE_SHIFT);
    if (!mapping || address < mapping->start || address >= mapping->end) mapping = mapping_of(granule.space, address);
    samples += n;
    auto stores_until = static_cast<__u32>(
        granule.samples ? std::min<__u64>(granule.stores, __u64{granule.stores} * samples / granule.samples) : 0);
    if (mapping) {
      sampled_.push_back({address, n, stores_until - stores_done});
      counted_.push_back({p, n});
    } else {
      stray(address, n);
    }
    stores_done = stores_until;
  });
  if (sampled_.size() > first) folded_.push_back({granule.space, granule.granule, first, static_cast<__u32>(sampled_.size()) - first});
}

// Counts what was folded, by addresses: so each region is looked up once, and what
// is needed of a granule can be fetched while those before it are counted.
void EstimatedPartition::count() {
  std::sort(folded_.begin(), folded_.end(), [](const Folded& a, const Folded& b) {
    return a.space != b.space ? a.space < b.space : a.granule != b.granule ? a.granule < b.granule : a.first < b.first;
  });
  constexpr std::size_t kAhead = 8;
  std::array<Estimate::Granule*, kAhead> ahead;
  auto sampled = [this](std::size_t i) { return std::span(counted_).subspan(folded_[i].first, folded_[i].pages); };
  auto start = [&](std::size_t i) {
    if (i >= folded_.size()) return;
    ahead[i % kAhead] = &estimate_.make(folded_[i].space, folded_[i].granule);
    Estimate::fetch_pages(*ahead[i % kAhead], sampled(i));
  };
  for (std::size_t i = 0; i < kAhead; ++i) start(i);
  for (std::size_t i = 0; i < folded_.size(); ++i) {
    Estimate::Granule& g = *ahead[i % kAhead];
    start(i + kAhead);
    bool missed = false;
    for (auto [p, n] : sampled(i)) {
      missed |= !g.has(p);
      for (int t = 0; t < HT_TIERS; ++t)
        if (g.in_tier[t][p / 64] & ~g.in_tier[!t][p / 64] & 1ULL << (p % 64)) tier_samples_[t] += n;
      if (tried_.empty()) continue;
      if (g.tried[HT_TIER_SLOW][p / 64] >> (p % 64) & 1) trial_.hot_hits += n;
      if (g.tried[HT_TIER_FAST][p / 64] >> (p % 64) & 1) trial_.cold_hits += n;
    }
    if (missed) look_again(folded_[i].space, folded_[i].granule);
    if (g.huge && !watched_.empty())
      if (auto w = watched_.find({folded_[i].space, folded_[i].granule}); w != watched_.end())
        for (auto [p, n] : sampled(i)) {
          w->second.hits += n;
          if (w->second.part[p / 64] >> (p % 64) & 1) w->second.part_hits += n;
        }
    estimate_.add(g, sampled(i));
  }
}

void EstimatedPartition::fold(const ht_bits& bits) {
  const __u64 start = bits.granule << HT_GRANULE_SHIFT;
  ht_bits known = bits;
  for (__u64& word : known.checked) word = 0;
  bool any = false;
  if (auto s = spaces_.find(bits.space); s != spaces_.end())
    for (auto m = std::upper_bound(s->second.begin(), s->second.end(), start,
                                   [](__u64 a, const Mapping& mapping) { return a < mapping.end; });
         m != s->second.end() && m->start < start + HT_GRANULE_SIZE; ++m) {
      const unsigned first = m->start > start ? (m->start - start) >> HT_PAGE_SHIFT : 0;
      const unsigned last = static_cast<unsigned>(std::min(m->end - start, __u64{HT_GRANULE_SIZE}) >> HT_PAGE_SHIFT);
      each_word(first, last, [&](unsigned w, __u64 mask) {
        known.checked[w] |= bits.checked[w] & mask;
        any |= known.checked[w] != 0;
      });
    }
  if (!any || !bits.interval_ns) return;
  Estimate::Granule& g = estimate_.make(bits.space, bits.granule);
  bool missed = g.huge != (bits.huge != 0);
  for (unsigned w = 0; w < HT_GRANULE_PAGES / 64; ++w) {
    const __u64 fresh = known.checked[w] & ~g.present(w);
    missed |= fresh != 0;
    for (auto& tier : g.in_tier) tier[w] |= fresh;
    known.set[w] &= known.checked[w];
    for (int t = 0; t < HT_TIERS; ++t) {
      tried_bits_[t].checked += static_cast<unsigned>(std::popcount(g.tried[t][w] & known.checked[w]));
      tried_bits_[t].set += static_cast<unsigned>(std::popcount(g.tried[t][w] & known.set[w]));
    }
  }
  if (missed) look_again(bits.space, bits.granule);
  if (g.huge != (bits.huge != 0)) return;  // split or joined: the next check will do
  bits_set_ += estimate_.add(g, known);
}

// What pages on trial brought, as if the same number of both sides had been
// checked. Neighbours' bits are not independent: they say less than their number.
void EstimatedPartition::try_bits() {
  if (!estimate_.by_bits()) return;  // samples told
  const Bits& hot = tried_bits_[HT_TIER_SLOW];
  const Bits& cold = tried_bits_[HT_TIER_FAST];
  if (!hot.checked || !cold.checked) return;
  trial_.told = true;
  const double checked = static_cast<double>(std::min(hot.checked, cold.checked)) / std::min(kTrialPhiMax, estimate_.bit_dispersion(false));
  auto hits = [&](const Bits& bits) {
    return static_cast<__u64>(checked * static_cast<double>(bits.set) / static_cast<double>(bits.checked) + 0.5);
  };
  trial_.hot_hits += hits(hot);
  trial_.cold_hits += hits(cold);
}

__u64 EstimatedPartition::bits_interval_ns() const {
  constexpr double kNoneSet = 1e12;  // as good as for ever, and fits
  return static_cast<__u64>(std::min(estimate_.bit_interval_ns(top_pages_), kNoneSet));
}

__u64 EstimatedPartition::close(__u64 fast_pages) {
  count();
  // What others hold of the tier is not to be had.
  top_pages_ = std::max<__u64>(1, std::clamp(in_fast_pages_, fast_pages / kTopMin, fast_pages));
  try_bits();
  return estimate_.by_bits() ? bits_set_ : 0;
}

void EstimatedPartition::look_again(__u64 space, __u64 granule) {
  const Span span{space, granule << HT_GRANULE_SHIFT, (granule + 1) << HT_GRANULE_SHIFT};
  if (fresh_.empty() || fresh_.back().span.space != space || fresh_.back().span.start != span.start)
    fresh_.push_back({span, epoch_ - 1});
}

// What a space maps may have shrunk: pages outside of it are forgotten. What is
// new is walked first.
void EstimatedPartition::map(__u64 space, std::span<const ht_mapping> wanted) {
  remapped_ = true;
  std::vector<Mapping> old;
  if (auto s = spaces_.find(space); s != spaces_.end()) old = std::move(s->second);
  std::vector<Mapping> now;
  __u32 taken = 0;
  auto o = old.begin();
  for (const ht_mapping& w : wanted) {
    Mapping mapping{w.start, w.end, w.flags, 0, epoch_};
    __u64 at = w.start;
    while (o != old.end() && o->end <= w.start) ++o;
    for (auto kept = o; kept != old.end() && kept->start < w.end; ++kept) {
      if (!mapping.id && kept->flags == w.flags && kept->id != taken) {
        mapping.id = kept->id;
        mapping.made_epoch = kept->made_epoch;
      }
      if (kept->start > at) fresh_.push_back({{space, at, kept->start}, epoch_});
      at = std::max(at, kept->end);
    }
    if (at < w.end) fresh_.push_back({{space, at, w.end}, epoch_});
    if (!mapping.id) mapping.id = next_id_++;
    taken = mapping.id;
    now.push_back(mapping);
  }

  auto m = now.begin();
  for (__u64 granule : estimate_.granules(space)) {
    const __u64 start = granule << HT_GRANULE_SHIFT;
    const __u64 end = start + HT_GRANULE_SIZE;
    while (m != now.end() && m->end <= start) ++m;
    __u64 at = start;
    for (auto kept = m; at < end; ++kept) {
      __u64 until = kept == now.end() || kept->start >= end ? end : kept->start;
      if (until > at)
        estimate_.clear(space, granule, (at - start) >> HT_PAGE_SHIFT, (until - start) >> HT_PAGE_SHIFT);
      if (until == end) break;
      at = kept->end;
    }
  }
  if (now.empty())
    spaces_.erase(space);
  else
    spaces_[space] = std::move(now);
}

void EstimatedPartition::drop(__u64 space) {
  remapped_ = true;
  estimate_.drop(space);
  spaces_.erase(space);
}

// --------------------------------------------------------------- where pages are

std::vector<Partition::Span> EstimatedPartition::to_walk(__u64 budget_pages, std::span<const __u64> changed) {
  std::vector<Span> spans;
  auto take = [&](__u64 space, __u64 start, __u64 end, __u64& budget) {
    __u64 pages = std::min((end - start) >> HT_PAGE_SHIFT, budget);
    budget -= pages;
    spans.push_back({space, start, end, pages});
  };
  __u64 budget = budget_pages;
  std::size_t done = 0;
  for (; done < fresh_.size() && budget && spans.size() < HT_WALKS_MAX / 2 && fresh_[done].epoch < epoch_; ++done) {
    const Span& f = fresh_[done].span;
    auto s = spaces_.find(f.space);
    if (s == spaces_.end()) continue;
    for (auto m = std::upper_bound(s->second.begin(), s->second.end(), f.start,
                                   [](__u64 a, const Mapping& mapping) { return a < mapping.end; });
         m != s->second.end() && m->start < f.end; ++m)
      take(f.space, std::max(f.start, m->start), std::min(f.end, m->end), budget);
  }
  fresh_.erase(fresh_.begin(), fresh_.begin() + static_cast<std::ptrdiff_t>(done));

  for (__u64 space : changed)
    if (auto s = spaces_.find(space); s != spaces_.end())
      for (const Mapping& m : s->second)
        if (budget && spans.size() < HT_WALKS_MAX / 2) take(space, m.start, m.end, budget);

  budget = std::min(budget_pages, std::max(kWalkMinPages, estimate_.pages() / kWalkTurnEpochs));
  // The turn goes by presence: address space that holds nothing costs little.
  for (auto s = spaces_.lower_bound(turn_space_); s != spaces_.end() && budget && spans.size() < HT_WALKS_MAX; ++s) {
    if (s->first != turn_space_) turn_address_ = 0;
    turn_space_ = s->first;
    for (const Mapping& m : s->second) {
      if (m.end <= turn_address_ || m.made_epoch == epoch_) continue;
      __u64 start = std::max(m.start, turn_address_);
      take(s->first, start, m.end, budget);
      turn_address_ = m.end;
      if (!budget || spans.size() == HT_WALKS_MAX) return spans;
    }
    ++turn_space_;
    turn_address_ = 0;
  }
  if (spans.size() < HT_WALKS_MAX && budget) turn_space_ = turn_address_ = 0;
  return spans;
}

void EstimatedPartition::walked(const Span& span, __u64 next, std::span<const ht_page_t> pages) {
  // A walk that stopped is gone on with: at once if it was of new memory, or by
  // the turn, which passed over it.
  if (next < span.end) {
    if (span.space == turn_space_ && turn_address_ == span.end)
      turn_address_ = next;
    else
      fresh_.push_back({{span.space, next, span.end}, epoch_});
  }
  const Mapping* mapping = mapping_of(span.space, span.start);
  if (!mapping) return;
  auto page = pages.begin();
  auto here = [&](__u64 end) { return page != pages.end() && HT_PAGE_ADDR(*page) < end; };
  const __u64 until = std::min(next, mapping->end);
  // Granules where nothing is and nothing was are passed over.
  for (__u64 granule = span.start >> HT_GRANULE_SHIFT; granule << HT_GRANULE_SHIFT < until;) {
    const __u64 base = granule << HT_GRANULE_SHIFT;
    const unsigned first = base < span.start ? (span.start - base) >> HT_PAGE_SHIFT : 0;
    const unsigned last = static_cast<unsigned>(std::min<__u64>(until - base, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT);
    __u64 tiers[HT_TIERS][HT_GRANULE_PAGES / 64] = {};
    bool any = false;
    bool huge = false;
    while (here(base + HT_GRANULE_SIZE)) {
      unsigned p = (HT_PAGE_ADDR(*page) - base) >> HT_PAGE_SHIFT;
      unsigned n = 1U << std::min(HT_PAGE_ORDER(*page), kOrderHuge);
      huge |= n == HT_GRANULE_PAGES && p == 0;
      int tier = *page & HT_PAGE_FAST ? HT_TIER_FAST : HT_TIER_SLOW;
      each_word(p, std::min(last, p + n), [&](unsigned w, __u64 mask) {
        for (auto& words : tiers) words[w] &= ~mask;  // the later of overlapping folios is the truer
        tiers[tier][w] |= mask;
      });
      any = true;
      ++page;
    }
    Estimate::Granule* g = any ? &estimate_.make(span.space, granule) : estimate_.find(span.space, granule);
    if (g) {
      bool left = false;
      each_word(first, last, [&](unsigned w, __u64 mask) {
        for (int t = 0; t < HT_TIERS; ++t) g->in_tier[t][w] = (g->in_tier[t][w] & ~mask) | (tiers[t][w] & mask);
      });
      for (unsigned w = 0; w < HT_GRANULE_PAGES / 64; ++w) left |= g->present(w) != 0;
      g->huge = huge;
      if (!left) estimate_.clear(span.space, granule, first, last);
    }
    // the next that has something to say
    granule = std::min(estimate_.next(span.space, granule + 1), HT_UNKNOWN64 >> HT_GRANULE_SHIFT);
    if (page != pages.end()) granule = std::min<__u64>(granule, HT_PAGE_ADDR(*page) >> HT_GRANULE_SHIFT);
  }
}

// Calls f(number, granule, first page, last page + 1) for each known granule that the cell has
// a part of, as long as f says so.
template <class F>
void EstimatedPartition::each_granule(const RangeIndex::Cell& cell, F&& f) {
  const __u64 end = (cell.end + HT_GRANULE_SIZE - 1) >> HT_GRANULE_SHIFT;
  for (__u64 granule = cell.start >> HT_GRANULE_SHIFT; granule < end; ++granule) {
    const Estimate::Granule* g = estimate_.find_in_turn(cell.space, granule);
    if (!g) {
      granule = std::min(end, estimate_.next(cell.space, granule)) - 1;
      continue;
    }
    const __u64 base = granule << HT_GRANULE_SHIFT;
    const unsigned first = base < cell.start ? (cell.start - base) >> HT_PAGE_SHIFT : 0;
    const unsigned last = static_cast<unsigned>(std::min<__u64>(cell.end - base, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT);
    if (!f(granule, g, first, last)) return;
  }
}

void EstimatedPartition::list(std::size_t index, ht_tier tier, __u64 max_pages, std::vector<Listed>& listed) {
  const Run& run = runs_[index];
  const RangeIndex::Cell& cell = index_->cells[run.cell];
  const __u64 file = run.flags & (TIER_RANGE_SHMEM | TIER_RANGE_FILE) ? HT_PAGE_FILE : 0;
  each_granule(cell, [&](__u64 granule, const Estimate::Granule* g, unsigned first, unsigned last) {
    const __u64 base = granule << HT_GRANULE_SHIFT;
    const __u8* level = cell.scattered() ? index_->levels(cell, granule) : nullptr;
    if (g->huge) {
      if (!first && (!level || level[0] == run.level) && (g->in_tier[tier][0] & ~g->in_tier[!tier][0] & 1)) {
        listed.push_back({base | kOrderHuge | file, static_cast<__u32>(index)});
        max_pages -= std::min<__u64>(max_pages, HT_GRANULE_PAGES);
      }
      return max_pages > 0;
    }
    each_word(first, last, [&](unsigned w, __u64 mask) {
      __u64 bits = g->in_tier[tier][w] & ~g->in_tier[!tier][w] & mask;
      if (bits && level) bits &= RangeIndex::pages_of(level + w * 64, run.level);
      for (; bits && max_pages; bits &= bits - 1, --max_pages)
        listed.push_back({(base + (__u64{w * 64 + std::countr_zero(bits)} << HT_PAGE_SHIFT)) | file,
                          static_cast<__u32>(index)});
    });
    return max_pages > 0;
  });
}

void EstimatedPartition::placed(__u64 space, ht_page_t page, ht_move_result result, ht_tier wanted) {
  const __u64 address = HT_PAGE_ADDR(page);
  const __u64 granule = address >> HT_GRANULE_SHIFT;
  Estimate::Granule* g = estimate_.find(space, granule);
  if (!g) return;
  const unsigned p = (address >> HT_PAGE_SHIFT) % HT_GRANULE_PAGES;
  const unsigned n = 1U << std::min(HT_PAGE_ORDER(page), kOrderHuge);
  if (result == HT_MOVE_DONE || result == HT_MOVE_ALREADY) {
    moved_share_ += n / static_cast<double>(top_pages_);
    each_word(p, p + n, [&](unsigned w, __u64 mask) {
      g->in_tier[wanted][w] |= mask;
      g->in_tier[!wanted][w] &= ~mask;
    });
  } else if (result == HT_MOVE_GONE || result == HT_MOVE_MISMATCH) {
    // Not what it was taken for: look again.
    look_again(space, granule);
  }
}

// ------------------------------------------------------------ inside huge pages

// Chooses which huge pages are watched: those of which a part alone would bring more
// in fast memory than the whole, or than nothing of it.
void EstimatedPartition::watch() {
  std::size_t watching = 0;
  std::erase_if(watched_, [&](const auto& entry) {
    const Watched& w = entry.second;
    const Estimate::Granule* g = estimate_.find(entry.first.first, entry.first.second);
    if (!g || !g->huge) return true;
    if (!w.pages) return epoch_ >= w.since_epoch;
    if (epoch_ > w.since_epoch + kWatchMaxEpochs) return true;
    ++watching;
    return false;
  });
  const float cut = estimate_.cut();
  if (estimate_.by_bits() || !estimate_.judged() || cut <= 0) return;
  estimate_.visit([&](__u64 space, __u64 granule, Estimate::Granule& g) {
    if (!g.huge || watching >= kWatchedMax || g.count[Estimate::kScales - 1] < kPartCounts) return;
    if (watched_.contains({space, granule})) return;
    float rate[HT_GRANULE_PAGES];
    estimate_.inner_rates(g, rate);
    Watched w;
    float part = 0;
    float whole = 0;
    for (unsigned p = 0; p < HT_GRANULE_PAGES; ++p) {
      whole += rate[p] - cut;
      if (rate[p] <= cut) continue;
      part += rate[p] - cut;
      w.part[p / 64] |= 1ULL << (p % 64);
      ++w.pages;
    }
    if (!w.pages || part < (kPartOverCut - 1) * cut * static_cast<float>(w.pages) || part < 2 * whole) return;
    w.since_epoch = epoch_;
    w.since_exposures = exposures_;
    watched_.emplace(std::pair{space, granule}, w);
    ++watching;
  });
}

std::vector<Skewed> EstimatedPartition::skewed(std::size_t max) {
  std::vector<Skewed> list;
  const double cut = estimate_.worth(estimate_.cut());
  for (auto& [at, w] : watched_) {
    if (list.size() == max) break;
    if (!w.pages || epoch_ < w.since_epoch + kWatchEpochs) continue;
    const double epochs = exposures_ - w.since_exposures;
    // By one standard deviation less than what was seen.
    const double hits = w.part_hits - std::sqrt(static_cast<double>(w.part_hits));
    const double pages = w.pages;
    const double part = hits / epochs - pages * cut;
    const double whole = std::max(0.0, w.hits / epochs - HT_GRANULE_PAGES * cut);
    if (part <= whole) {
      apart(at.first, at.second << HT_GRANULE_SHIFT, HT_MOVE_NONE);
      continue;
    }
    list.push_back({at.first, at.second << HT_GRANULE_SHIFT, w.pages, hits / epochs / pages * exposure_, (cut + whole / pages) * exposure_});
  }
  return list;
}

void EstimatedPartition::apart(__u64 space, __u64 start, ht_move_result result) {
  const __u64 granule = start >> HT_GRANULE_SHIFT;
  if (result != HT_MOVE_DONE) {
    watched_[{space, granule}] = {.since_epoch = epoch_ + kLeftWholeEpochs};
    if (result == HT_MOVE_GONE || result == HT_MOVE_MISMATCH) look_again(space, granule);
    return;
  }
  watched_.erase({space, granule});
  moved_share_ += HT_GRANULE_PAGES / static_cast<double>(top_pages_);
  if (Estimate::Granule* g = estimate_.find(space, granule)) g->huge = false;
}

void EstimatedPartition::clear_trial() {
  for (auto [space, granule] : tried_)
    if (Estimate::Granule* g = estimate_.find(space, granule))
      for (auto& side : g->tried) std::fill(std::begin(side), std::end(side), 0);
  tried_.clear();
  tried_pages_[HT_TIER_FAST] = tried_pages_[HT_TIER_SLOW] = 0;
}

void EstimatedPartition::try_pages(__u64 space, ht_page_t page, ht_tier side) {
  const __u64 address = HT_PAGE_ADDR(page);
  const __u64 granule = address >> HT_GRANULE_SHIFT;
  Estimate::Granule* g = estimate_.find(space, granule);
  if (!g) return;
  const unsigned p = (address >> HT_PAGE_SHIFT) % HT_GRANULE_PAGES;
  const unsigned n = 1U << std::min(HT_PAGE_ORDER(page), kOrderHuge);
  each_word(p, p + n, [&](unsigned w, __u64 mask) { g->tried[side][w] |= mask; });
  tried_pages_[side] += n;
  if (tried_.empty() || tried_.back() != std::pair{space, granule}) tried_.emplace_back(space, granule);
}

// ----------------------------------------------------------------------- ranges

namespace {

// Which level a rate is: steps of an equal ratio, near enough (between 1 and 2, and
// from there on from power of two to power of two, they are equal differences).
class Scale {
 public:
  Scale(const Grain& grain, float cut)
      : low_(cut / grain.zone), high_(cut * grain.zone), base_(std::bit_cast<__u32>(low_)),
        step_(static_cast<__u32>(std::log2(grain.tolerance) * (1 << 23))) {}

  __u8 level(float rate) const {
    return static_cast<__u8>((std::bit_cast<__u32>(std::clamp(rate, low_, high_)) - base_) / step_);
  }

 private:
  float low_, high_;
  __u32 base_, step_;
};

// Memory of about the same age may share a cell: that of what has just come tells what
// will come next.
unsigned age_class(__u64 epochs) { return static_cast<unsigned>(std::bit_width(epochs)); }

}  // namespace

// Draws cells and their runs, granule by granule.
class EstimatedPartition::Drawing {
 public:
  Drawing(EstimatedPartition& partition, const Grain& grain, std::size_t max_runs)
      : partition_(partition), estimate_(partition.estimate_), grain_(grain), scale_(grain, estimate_.cut()), max_runs_(max_runs) {
    partition_.runs_.clear();
  }

  // False: these would be more than max_runs.
  bool draw() {
    estimate_.visit([this](__u64 space, __u64 granule, Estimate::Granule& g) { put(space, granule, g); });
    close(HT_UNKNOWN64);
    return fits_;
  }

  std::shared_ptr<const RangeIndex> index() {
    index_.pool = std::make_shared<const std::vector<__u8>>(std::move(pool_));
    return std::make_shared<const RangeIndex>(std::move(index_));
  }

 private:
  struct Sum {
    double rates;
    double squares;
    __u64 pages;
  };
  // Pages by level.
  struct Sums {
    __u64 levels = 0;
    Sum of[RangeIndex::kLevels];
    void add(__u8 level, double rates, double squares, __u64 pages) {
      if (!(levels >> level & 1)) of[level] = {0, 0, 0};
      levels |= 1ULL << level;
      of[level].rates += rates;
      of[level].squares += squares;
      of[level].pages += pages;
    }
    bool one() const { return std::has_single_bit(levels); }
  };

  void put(__u64 space, __u64 granule, Estimate::Granule& g) {
    if (!fits_) return;
    const __u64 base = granule << HT_GRANULE_SHIFT;
    float piece_rate[Estimate::kPieces];
    estimate_.piece_rates(g, piece_rate);
    Estimate::Summary piece[Estimate::kPieces];
    estimate_.summarize(g, piece_rate, piece);
    for (unsigned from = 0; from < HT_GRANULE_PAGES && fits_;) {
      if (!g.has(from)) {
        ++from;
        continue;
      }
      const __u64 address = base + (__u64{from} << HT_PAGE_SHIFT);
      if (!mapping_ || cell_.space != space || address >= mapping_->end || address < mapping_->start) {
        close(HT_UNKNOWN64);
        mapping_ = partition_.mapping_of(space, address);
        cell_.space = space;
        fresh_mapping_ = true;
        if (!mapping_) {
          ++from;
          continue;
        }
      }
      const auto to = static_cast<unsigned>(std::min<__u64>(mapping_->end - base, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT);
      part(granule, g, from, to, piece_rate, piece);
      from = to;
    }
  }

  // Pages [from, to) of a granule, all of one mapping; the first of them is there.
  void part(__u64 granule, const Estimate::Granule& g, unsigned from, unsigned to, const float* piece_rate,
            const Estimate::Summary* piece) {
    constexpr unsigned kPiece = Estimate::kPiecePages;
    part_.levels = 0;
    __u8 level[HT_GRANULE_PAGES];
    std::memset(level, RangeIndex::kNoLevel, sizeof(level));
    float huge_rate = 0;  // it is placed by its mean
    if (g.huge) {
      for (unsigned i = 0; i < Estimate::kPieces; ++i) huge_rate += piece_rate[i] / Estimate::kPieces;
    }
    for (unsigned i = from / kPiece; i * kPiece < to; ++i) {
      const unsigned first = i * kPiece;
      const __u32 inside = static_cast<__u32>(page_mask(from, to, first / 64) >> (first % 64)) & 0xffff;
      const __u32 here = g.piece_mask(i) & inside;
      if (!here) continue;
      if (g.huge) {
        put_all(level + first, here, scale_.level(huge_rate), huge_rate, huge_rate * huge_rate);
        continue;
      }
      if (here == 0xffff) {
        const __u8 low = scale_.level(piece[i].low);
        if (low == scale_.level(piece[i].high)) {
          put_all(level + first, here, low, piece[i].sum / kPiece, piece[i].squares / kPiece);
          continue;
        }
      }
      float rate[kPiece];
      estimate_.page_rates(g, i, piece_rate[i], rate);
      for (__u32 bits = here; bits; bits &= bits - 1) {
        const auto p = static_cast<unsigned>(std::countr_zero(bits));
        level[first + p] = scale_.level(rate[p]);
        part_.add(level[first + p], rate[p], rate[p] * rate[p], 1);
      }
    }
    join(granule, g, from, to, level);
  }

  void put_all(__u8* level, __u32 here, __u8 all, float rate, float square) {
    for (__u32 bits = here; bits; bits &= bits - 1) level[std::countr_zero(bits)] = all;
    const auto pages = static_cast<__u64>(std::popcount(here));
    part_.add(all, static_cast<double>(rate) * static_cast<double>(pages), static_cast<double>(square) * static_cast<double>(pages), pages);
  }

  // The part goes on with the cell before it, or begins another.
  void join(__u64 granule, const Estimate::Granule& g, unsigned from, unsigned to, const __u8 (&level)[HT_GRANULE_PAGES]) {
    const __u64 start = (granule << HT_GRANULE_SHIFT) + (__u64{from} << HT_PAGE_SHIFT);
    const __u64 end = (granule << HT_GRANULE_SHIFT) + (__u64{to} << HT_PAGE_SHIFT);
    const unsigned age = age_class(partition_.epoch_ - std::min<__u64>(g.birth, partition_.epoch_));
    const bool room = open_ && cell_.scattered() && cell_.end == start && granules_ < grain_.granules && age == age_;
    const bool alike = open_ && !cell_.scattered() && sums_.levels == part_.levels;
    if (!room && !alike) {
      close(start);
      if (!fits_) return;
      const bool scattered = !part_.one();
      cell_.start = fresh_mapping_ && !scattered ? mapping_->start : start;
      cell_.pool = scattered ? pool_.size() : RangeIndex::kOneLevel;
      open_ = true;
      fresh_mapping_ = false;
      granules_ = 0;
      age_ = age;
      sums_.levels = 0;
    }
    cell_.end = end;
    ++granules_;
    if (cell_.scattered()) pool_.insert(pool_.end(), std::begin(level), std::end(level));
    for (__u64 bits = part_.levels; bits; bits &= bits - 1) {
      const auto l = static_cast<__u8>(std::countr_zero(bits));
      sums_.add(l, part_.of[l].rates, part_.of[l].squares, part_.of[l].pages);
    }
  }

  // next: where the next cell of the mapping starts. A cell of one level has what lies
  // between: what comes there is like it until it is known better.
  void close(__u64 next) {
    if (!open_) return;
    open_ = false;
    if (!cell_.scattered()) cell_.end = std::min(next, mapping_->end);
    cell_.levels = sums_.levels;
    cell_.first = static_cast<__u32>(partition_.runs_.size());
    if (partition_.runs_.size() + cell_.ranges() > max_runs_) {
      fits_ = false;
      return;
    }
    const auto cell = static_cast<__u32>(index_.cells.size());
    index_.cells.push_back(cell_);
    for (__u64 bits = cell_.levels; bits; bits &= bits - 1) {
      const auto l = static_cast<__u8>(std::countr_zero(bits));
      const Sum& sum = sums_.of[l];
      const auto pages = static_cast<double>(sum.pages);
      partition_.runs_.push_back({cell, l, mapping_->flags, mapping_->id, mapping_->made_epoch, static_cast<float>(sum.rates / pages),
                                  static_cast<float>(sum.squares / pages), 0});
    }
  }

  EstimatedPartition& partition_;
  Estimate& estimate_;
  const Grain& grain_;
  const Scale scale_;
  const std::size_t max_runs_;
  bool fits_ = true;
  RangeIndex index_;
  std::vector<__u8> pool_;
  const Mapping* mapping_ = nullptr;
  bool fresh_mapping_ = false;  // nothing of it is in a cell yet
  // The cell in progress.
  bool open_ = false;
  RangeIndex::Cell cell_;
  unsigned granules_ = 0;
  unsigned age_ = 0;
  Sums sums_;
  Sums part_;  // of the part that is being put
};

void EstimatedPartition::draw() {
  // Larger cells cost nothing but that less is told of where a page is and how old; the
  // last are for address spaces in very many mappings.
  static constexpr std::array<Grain, 6> kGrains = {
      {{1.25F, 256, 4}, {1.25F, 256, 16}, {1.25F, 256, 64}, {1.25F, 256, 512}, {2, 16, 4096}, {16, 64, 4096}}};
  if (grain_ && epoch_ % kFinerEpochs == 0 && runs_.size() < settings_.max_estimated_ranges / 2) --grain_;
  for (;; ++grain_) {
    Drawing drawing(*this, kGrains[grain_], settings_.max_estimated_ranges);
    if (!drawing.draw() && grain_ + 1 < kGrains.size()) continue;
    index_ = drawing.index();
    break;
  }
  for (Run& run : runs_) run.worth = estimate_.worth(run.rate);
}

// Between passes: what is not mapped any more is in no cell.
void EstimatedPartition::clip() {
  auto clipped = std::make_shared<RangeIndex>();
  clipped->pool = index_->pool;
  std::vector<Run> runs;
  for (RangeIndex::Cell cell : index_->cells) {
    const Mapping* m = mapping_of(cell.space, cell.start);
    if (!m || m->id != runs_[cell.first].mapping) continue;
    cell.end = std::min(cell.end, m->end);
    const auto first = static_cast<__u32>(runs.size());
    for (unsigned r = 0; r < cell.ranges(); ++r) {
      runs.push_back(runs_[cell.first + r]);
      runs.back().cell = static_cast<__u32>(clipped->cells.size());
    }
    cell.first = first;
    clipped->cells.push_back(cell);
  }
  runs_ = std::move(runs);
  index_ = std::move(clipped);
}

// What the runs of a cell counted, and where their pages are.
void EstimatedPartition::contents(const RangeIndex::Cell& cell, std::span<Contents> of) {
  const double unit = static_cast<double>(estimate_.unit());
  std::array<__u8, RangeIndex::kLevels> run{};
  if (cell.scattered())
    for (__u64 bits = cell.levels; bits; bits &= bits - 1) {
      const auto l = static_cast<__u8>(std::countr_zero(bits));
      run[l] = static_cast<__u8>(cell.range_of(l) - cell.first);
    }
  __u32 sampled_epoch = 0;
  __u32 born_epoch = HT_UNKNOWN32;
  each_granule(cell, [&](__u64 granule, const Estimate::Granule* g, unsigned from, unsigned to) {
    sampled_epoch = std::max(sampled_epoch, g->sampled_epoch);
    born_epoch = std::min(born_epoch, g->birth);
    if (!cell.scattered()) {
      Contents& c = of[0];
      for (unsigned w = from / 64; w * 64 < to; ++w) {
        const __u64 mask = page_mask(from, to, w);
        const __u64 differ = (g->in_tier[HT_TIER_FAST][w] ^ g->in_tier[HT_TIER_SLOW][w]) & mask;
        for (int t = 0; t < HT_TIERS; ++t)
          if (const __u64 here = g->in_tier[t][w] & differ) c.tiers[t] += std::popcount(here);
      }
      if (g->huge) c.huge_pages += to - from;
      for (int s = 0; s < Estimate::kScales; ++s) c.count[s] += g->counted(s, from, to, unit);
      return true;
    }
    const __u8* level = index_->levels(cell, granule);
    each_word(from, to, [&](unsigned w, __u64 mask) {
      const __u64 fast = g->in_tier[HT_TIER_FAST][w];
      const __u64 slow = g->in_tier[HT_TIER_SLOW][w];
      for (__u64 bits = (fast | slow) & mask; bits; bits &= bits - 1) {
        const auto i = static_cast<unsigned>(std::countr_zero(bits));
        const unsigned p = w * 64 + i;
        if (level[p] == RangeIndex::kNoLevel) continue;
        Contents& c = of[run[level[p]]];
        ++c.pages;
        c.tiers[HT_TIER_FAST] += fast >> i & ~(slow >> i) & 1;
        c.tiers[HT_TIER_SLOW] += slow >> i & ~(fast >> i) & 1;
        c.huge_pages += g->huge;
        for (int s = 0; s < Estimate::kScales; ++s) c.units[s] += g->page[s][p];
      }
    });
    return true;
  });
  for (Contents& c : of) {
    c.sampled_epoch = sampled_epoch;
    c.born_epoch = born_epoch;
    for (int s = 0; s < Estimate::kScales; ++s) c.count[s] += static_cast<double>(c.units[s]) / unit;
    if (!cell.scattered()) c.pages = (cell.end - cell.start) >> HT_PAGE_SHIFT;
  }
}

bool EstimatedPartition::quiet() const { return moved_share_ <= kQuietEpochs * kQuietShare; }

// Is it time for a pass?
bool EstimatedPartition::due() const {
  __u64 every = std::clamp<__u64>(estimate_.pages() / settings_.pass_pages, 1, settings_.max_pass_epochs);
  // While hardly anything is moved nobody acts on what passes tell: fewer will do.
  if (quiet()) every = std::max(every, kRestEpochs);
  return !passed_epoch_ || epoch_ - passed_epoch_ >= every;
}

bool EstimatedPartition::rest() {
  if (due() || !quiet() || remapped_) return false;
  estimate_.end_fold(top_pages_);
  return true;
}

std::size_t EstimatedPartition::fill(std::span<tier_range> out) {
  estimate_.end_fold(top_pages_);
  if (due()) {
    estimate_.pass(top_pages_);
    watch();
    draw();
    passed_epoch_ = epoch_;
  } else if (remapped_) {
    clip();
  }
  remapped_ = false;

  residencies_.assign(runs_.size(), {});
  in_fast_pages_ = 0;
  for (std::size_t i = 0; i < index_->cells.size(); ++i) {
    const RangeIndex::Cell& cell = index_->cells[i];
    Contents has[RangeIndex::kLevels];
    contents(cell, std::span(has).first(cell.ranges()));
    const auto follows = [&](std::size_t other) {
      return runs_[index_->cells[other].first].mapping == runs_[cell.first].mapping && index_->cells[other].space == cell.space;
    };
    const bool alone = !cell.scattered() && (i == 0 || !follows(i - 1)) && (i + 1 == index_->cells.size() || !follows(i + 1));
    for (unsigned r = 0; r < cell.ranges(); ++r) describe(cell, cell.first + r, has[r], alone, out[cell.first + r]);
  }
  // Both are in the order of addresses: the cell of a sample is that of the one
  // before, or soon after it.
  auto before = [](const RangeIndex::Cell& c, std::pair<__u64, __u64> at) { return std::pair{c.space, c.end - 1} < at; };
  const std::span<tier_range> ranges = out.first(runs_.size());
  auto c = index_->cells.begin();
  const auto end = index_->cells.end();
  auto first_of_granule = c;
  for (std::size_t i = 0; i < folded_.size(); ++i) {
    const Folded& f = folded_[i];
    if (i && folded_[i - 1].space == f.space && folded_[i - 1].granule == f.granule) c = first_of_granule;
    first_of_granule = c;
    for (std::size_t j = f.first; j < f.first + f.pages; ++j) {
      const Sampled& s = sampled_[j];
      const std::pair at{f.space, s.address};
      constexpr int kNear = 8;
      for (int n = 0; n < kNear && c != end && before(*c, at); ++n) ++c;
      if (c != end && before(*c, at)) c = std::lower_bound(c, end, at, before);
      if (c == end || c->space != f.space || s.address < c->start) continue;
      const auto range = index_->range(*c, s.address);
      if (!range) continue;
      ranges[*range].samples += s.samples;
      ranges[*range].stores += s.stores;
    }
  }
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    ranges[i].count[0] = std::min<__u32>(ranges[i].samples, HT_UNKNOWN32 >> HT_COUNT_SHIFT) << HT_COUNT_SHIFT;
    const bool beside = i && ranges[i - 1].mapping == ranges[i].mapping && !((ranges[i - 1].flags | ranges[i].flags) & TIER_RANGE_SCATTERED);
    if (beside) {
      ranges[i].left_count = ranges[i - 1].count[0];
      ranges[i - 1].right_count = ranges[i].count[0];
    }
  }
  return runs_.size();
}

void EstimatedPartition::describe(const RangeIndex::Cell& cell, std::size_t index, const Contents& has, bool alone, tier_range& o) {
  const Run& run = runs_[index];
  Residency& residency = residencies_[index];
  o = {};
  o.start = cell.start;
  o.end = cell.end;
  o.space = cell.space;
  o.mapped_pages = has.pages;
  o.flags = run.flags | TIER_RANGE_MIN;
  if (alone) o.flags |= TIER_RANGE_ROOT;
  if (cell.scattered()) o.flags |= TIER_RANGE_SCATTERED;
  for (int t = 0; t < HT_TIERS; ++t) o.tier_pages[t] = residency.tier_pages[t] = has.tiers[t];
  residency.huge_pages = has.huge_pages;
  residency.walked_epoch = epoch_;
  in_fast_pages_ += has.tiers[HT_TIER_FAST];
  if (residency.huge_pages * 2 > residency.pages()) o.flags |= TIER_RANGE_HUGE;
  for (int s = 0; s < Estimate::kScales; ++s) o.count[s + 1] = saturated(has.count[s] * (1 << HT_COUNT_SHIFT));
  o.left_count = o.right_count = HT_UNKNOWN32;
  o.age_epochs = static_cast<__u32>(std::min<__u64>(epoch_ - std::max<__u64>(run.made_epoch, std::min<__u64>(has.born_epoch, epoch_)), HT_UNKNOWN32 - 1));
  o.idle_epochs = static_cast<__u32>(epoch_ - std::max<__u64>(has.sampled_epoch, run.made_epoch));
  o.walk_epochs = 0;
  o.mapping = run.mapping;
  // The first samples make their neighbours look hot, by far too much if single pages are: whether
  // they are is seen in the next epoch.
  o.rate = estimate_.judged() ? saturated(static_cast<double>(run.worth) * exposure_ * kRateUnit) : 0;
  const double mean2 = static_cast<double>(run.rate) * run.rate;
  o.uneven = mean2 > 0 ? saturated((static_cast<double>(run.square) - mean2) / mean2 * 256) : 0;
}

// Ranges follow the estimate, not the policy.
Adapted EstimatedPartition::adapt(std::span<const tier_range>) { return {}; }

}  // namespace hypertier
