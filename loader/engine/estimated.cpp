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

// Of all 512 pages.
Estimate::Summary summary_of(const Estimate::Summary (&pieces)[Estimate::kPieces]) {
  Estimate::Summary all = pieces[0];
  for (unsigned i = 1; i < Estimate::kPieces; ++i) {
    all.low = std::min(all.low, pieces[i].low);
    all.high = std::max(all.high, pieces[i].high);
    all.sum += pieces[i].sum;
    all.squares += pieces[i].squares;
  }
  return all;
}

}  // namespace

EstimatedPartition::EstimatedPartition(const EngineSettings& settings) : settings_(settings), moved_share_(kMovedAtFirst) {}

void EstimatedPartition::begin(__u64 epoch) {
  epoch_ = epoch;
  estimate_.begin(epoch);
  sampled_.clear();
  counted_.clear();
  folded_.clear();
  trial_ = {};
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
  return bits_set_;
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

void EstimatedPartition::list(std::size_t index, ht_tier tier, __u64 max_pages, std::vector<Listed>& listed) {
  const Run& run = runs_[index];
  const __u64 file = run.flags & (TIER_RANGE_SHMEM | TIER_RANGE_FILE) ? HT_PAGE_FILE : 0;
  const __u64 end_granule = (run.end + HT_GRANULE_SIZE - 1) >> HT_GRANULE_SHIFT;
  for (__u64 granule = run.start >> HT_GRANULE_SHIFT; granule < end_granule && max_pages; ++granule) {
    const Estimate::Granule* g = estimate_.find(run.space, granule);
    if (!g) continue;
    const __u64 base = granule << HT_GRANULE_SHIFT;
    const unsigned first = base < run.start ? (run.start - base) >> HT_PAGE_SHIFT : 0;
    const unsigned last = static_cast<unsigned>(std::min<__u64>(run.end - base, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT);
    if (g->huge) {
      if (!first && (g->in_tier[tier][0] & ~g->in_tier[!tier][0] & 1)) {
        listed.push_back({base | kOrderHuge | file, static_cast<__u32>(index)});
        max_pages -= std::min<__u64>(max_pages, HT_GRANULE_PAGES);
      }
      continue;
    }
    each_word(first, last, [&](unsigned w, __u64 mask) {
      for (__u64 bits = g->in_tier[tier][w] & ~g->in_tier[!tier][w] & mask; bits && max_pages; bits &= bits - 1, --max_pages)
        listed.push_back({(base + (__u64{w * 64 + std::countr_zero(bits)} << HT_PAGE_SHIFT)) | file,
                          static_cast<__u32>(index)});
    });
  }
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
    const auto epochs = static_cast<double>(epoch_ - w.since_epoch);
    // By one standard deviation less than what was seen.
    const double hits = w.part_hits - std::sqrt(static_cast<double>(w.part_hits));
    const double pages = w.pages;
    const double part = hits / epochs - pages * cut;
    const double whole = std::max(0.0, w.hits / epochs - HT_GRANULE_PAGES * cut);
    if (part <= whole) {
      apart(at.first, at.second << HT_GRANULE_SHIFT, HT_MOVE_NONE);
      continue;
    }
    list.push_back({at.first, at.second << HT_GRANULE_SHIFT, w.pages, hits / epochs / pages, cut + whole / pages});
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

// Draws runs; false: more than max_runs.
bool EstimatedPartition::build(const Grain& grain, std::size_t max_runs) {
  using Summary = Estimate::Summary;
  runs_.clear();
  const float cut = estimate_.cut();
  const float floor = cut / grain.zone;
  const float ceiling = cut * grain.zone;
  const Mapping* mapping = nullptr;
  __u64 mapping_space = 0;
  bool fits = true;
  // of the run in progress
  float low = 0;
  float high = 0;
  double sum = 0;
  double squares = 0;
  __u64 pages = 0;
  __u64 last_unit = 0;
  auto close = [&](__u64 end) {
    if (!pages) return;
    runs_.back().end = end;
    runs_.back().rate = static_cast<float>(sum / static_cast<double>(pages));
    runs_.back().square = static_cast<float>(squares / static_cast<double>(pages));
    pages = 0;
  };
  auto open = [&](__u64 start) {
    if (runs_.size() == max_runs) {
      fits = false;
      return;
    }
    runs_.push_back({mapping_space, start, 0, mapping->flags, mapping->id, mapping->made_epoch, 0, 0, 0});
    sum = squares = 0;
  };
  // n pages at address; unit: what they belong to and is not taken apart. False,
  // and nothing is done: they would not end up in one run, put them one by one.
  auto put = [&](__u64 address, unsigned n, const Summary& of, __u64 unit) {
    float l = std::clamp(of.low, floor, ceiling);
    float h = std::clamp(of.high, floor, ceiling);
    const bool goes_on = pages && unit == last_unit;
    if (pages && !goes_on) {
      const float with_low = std::min(low, l);
      const float with_high = std::max(high, h);
      if (with_high <= with_low * grain.tolerance) {
        l = with_low;
        h = with_high;
      } else {
        if (l != h) return false;
        close(address);
      }
    } else if (!pages && h > l * grain.tolerance) {
      return false;
    }
    if (!pages) {
      const bool follows = !runs_.empty() && runs_.back().space == mapping_space && runs_.back().mapping == mapping->id;
      open(follows ? address : mapping->start);
      if (!fits) return true;
    }
    if (!goes_on) {
      low = l;
      high = h;
    }
    last_unit = unit;
    sum += of.sum;
    squares += of.squares;
    pages += n;
    return true;
  };

  estimate_.visit([&](__u64 space, __u64 granule, Estimate::Granule& g) {
    if (!fits) return;
    const __u64 base = granule << HT_GRANULE_SHIFT;
    float piece_rate[Estimate::kPieces];
    estimate_.piece_rates(g, piece_rate);
    Summary piece[Estimate::kPieces];
    estimate_.summarize(g, piece_rate, piece);
    const Summary all = summary_of(piece);
    // Single pages' rates, of the pieces where they matter.
    float rates[HT_GRANULE_PAGES];
    __u32 told = 0;
    auto rate = [&](unsigned page) {
      const unsigned i = page / Estimate::kPiecePages;
      if (!(told >> i & 1)) estimate_.page_rates(g, i, piece_rate[i], rates + i * Estimate::kPiecePages);
      told |= 1U << i;
      return rates[page];
    };
    // Whether all pages of [from, from + n) are there and in the one mapping.
    auto whole = [&](unsigned from, unsigned n) {
      for (unsigned w = from / 64; w <= (from + n - 1) / 64; ++w)
        if (const __u64 mask = page_mask(from, from + n, w); (g.present(w) & mask) != mask) return false;
      return base + (__u64{from + n} << HT_PAGE_SHIFT) <= mapping->end;
    };
    unsigned unit = g.huge ? HT_GRANULE_PAGES : std::min<unsigned>(grain.unit_pages, HT_GRANULE_PAGES);
    for (unsigned p = 0; p < HT_GRANULE_PAGES && fits;) {
      // the next stretch that is not taken apart
      const unsigned end = unit > 1 ? std::min<unsigned>(HT_GRANULE_PAGES, (p / unit + 1) * unit) : p + 1;
      for (unsigned from = p; from < end;) {
        if (!g.has(from)) {
          ++from;
          continue;
        }
        const __u64 address = base + (__u64{from} << HT_PAGE_SHIFT);
        if (!mapping || mapping_space != space || address >= mapping->end || address < mapping->start) {
          if (mapping) close(mapping->end);
          mapping = mapping_of(space, address);
          mapping_space = space;
          if (!mapping) {
            pages = 0;
            ++from;
            continue;
          }
        }
        // As much at once as goes into one run.
        const __u64 first = granule * HT_GRANULE_PAGES;
        constexpr unsigned kPiece = Estimate::kPiecePages;
        if (!from && (unit == 1 || unit == HT_GRANULE_PAGES) && whole(0, HT_GRANULE_PAGES) &&
            put(address, HT_GRANULE_PAGES, unit == 1 ? all : all.as_one(HT_GRANULE_PAGES), first)) {
          p = HT_GRANULE_PAGES;
          break;
        }
        if (from % kPiece == 0 && (unit == 1 || unit == kPiece) && whole(from, kPiece)) {
          const Summary& of = piece[from / kPiece];
          if (!put(address, kPiece, unit == 1 ? of : of.as_one(kPiece), first + from / unit))
            for (unsigned i = from; i < from + kPiece && fits; ++i)
              put(base + (__u64{i} << HT_PAGE_SHIFT), 1, Summary::of(rate(i)), first + i);
          p = from + kPiece;
          break;
        }
        const unsigned stop =
            static_cast<unsigned>(std::min<__u64>(end, (std::min(mapping->end - base, __u64{HT_GRANULE_SIZE})) >> HT_PAGE_SHIFT));
        unsigned n = 0;
        Summary of;
        for (unsigned i = from; i < stop; ++i)
          if (g.has(i)) {
            ++n;
            of.sum += rate(i);
            of.squares += rate(i) * rate(i);
          }
        if (n) put(address, n, of.as_one(n), first + p / unit);
        from = stop;
      }
      p = std::max(p, end);
    }
  });
  if (mapping && fits) close(mapping->end);
  return fits;
}

void EstimatedPartition::draw() {
  static constexpr std::array<Grain, 13> kGrains = {{{1.25F, 256, 1},
                                                     {1.25F, 16, 1},
                                                     {1.25F, 4, 1},
                                                     {1.6F, 3, 1},
                                                     {2, 2, 1},
                                                     {4, 16, 1},
                                                     {8, 64, 1},
                                                     {16, 64, 1},
                                                     {1.25F, 8, 16},
                                                     {1.6F, 3, 16},
                                                     {1.25F, 64, 512},
                                                     {2, 4, 512},
                                                     {2, 1.5F, 512}}};
  if (grain_ && epoch_ % kFinerEpochs == 0 && runs_.size() < settings_.max_estimated_ranges / 2) --grain_;
  while (!build(kGrains[grain_], settings_.max_estimated_ranges) && grain_ + 1 < kGrains.size()) ++grain_;
  for (Run& run : runs_) run.worth = estimate_.worth(run.rate);
}

// Between passes: what is not mapped any more is in no run.
void EstimatedPartition::clip() {
  std::erase_if(runs_, [this](Run& run) {
    const Mapping* m = mapping_of(run.space, run.start);
    if (!m || m->id != run.mapping) return true;
    run.end = std::min(run.end, m->end);
    return false;
  });
}

// What a run counted, and where its pages are.
EstimatedPartition::Contents EstimatedPartition::contents(const Run& run) {
  Contents c;
  const double unit = static_cast<double>(estimate_.unit());
  const __u64 end_granule = (run.end + HT_GRANULE_SIZE - 1) >> HT_GRANULE_SHIFT;
  for (__u64 granule = run.start >> HT_GRANULE_SHIFT; granule < end_granule; ++granule) {
    if (granule != at_.granule || run.space != at_.space) at_ = {run.space, granule, estimate_.find_in_turn(run.space, granule)};
    const Estimate::Granule* g = at_.found;
    if (!g) {
      granule = std::min(end_granule, estimate_.next(run.space, granule)) - 1;
      continue;
    }
    const __u64 base = granule << HT_GRANULE_SHIFT;
    const unsigned from = base < run.start ? (run.start - base) >> HT_PAGE_SHIFT : 0;
    const unsigned to = static_cast<unsigned>(std::min<__u64>(run.end - base, HT_GRANULE_SIZE) >> HT_PAGE_SHIFT);
    c.sampled_epoch = std::max(c.sampled_epoch, g->sampled_epoch);
    c.born_epoch = std::min(c.born_epoch, g->birth);
    for (unsigned w = from / 64; w * 64 < to; ++w) {
      const __u64 mask = page_mask(from, to, w);
      const __u64 differ = (g->in_tier[HT_TIER_FAST][w] ^ g->in_tier[HT_TIER_SLOW][w]) & mask;
      for (int t = 0; t < HT_TIERS; ++t)
        if (const __u64 here = g->in_tier[t][w] & differ) c.tiers[t] += std::popcount(here);
    }
    if (g->huge) c.huge_pages += to - from;
    for (int s = 0; s < Estimate::kScales; ++s) c.count[s] += g->counted(s, from, to, unit);
  }
  return c;
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
  at_ = {};
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    const Run& run = runs_[i];
    tier_range& o = out[i];
    Residency& residency = residencies_[i];
    o = {};
    o.start = run.start;
    o.end = run.end;
    o.space = run.space;
    o.mapped_pages = (run.end - run.start) >> HT_PAGE_SHIFT;
    o.flags = run.flags | TIER_RANGE_MIN;
    const bool first = i == 0 || runs_[i - 1].mapping != run.mapping || runs_[i - 1].space != run.space;
    const bool last = i + 1 == runs_.size() || runs_[i + 1].mapping != run.mapping || runs_[i + 1].space != run.space;
    if (first && last) o.flags |= TIER_RANGE_ROOT;
    const Contents has = contents(run);
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
    o.rate = estimate_.judged() ? saturated(static_cast<double>(run.worth) * kRateUnit) : 0;
    const double mean2 = static_cast<double>(run.rate) * run.rate;
    o.uneven = mean2 > 0 ? saturated((static_cast<double>(run.square) - mean2) / mean2 * 256) : 0;
  }
  // Both are in the order of addresses: the range of a sample is that of the one
  // before, or soon after it.
  auto before = [](const tier_range& r, std::pair<__u64, __u64> at) { return std::pair{r.space, r.end - 1} < at; };
  const std::span<tier_range> ranges = out.first(runs_.size());
  auto r = ranges.begin();
  auto first_of_granule = r;
  for (std::size_t i = 0; i < folded_.size(); ++i) {
    const Folded& f = folded_[i];
    if (i && folded_[i - 1].space == f.space && folded_[i - 1].granule == f.granule) r = first_of_granule;
    first_of_granule = r;
    for (std::size_t j = f.first; j < f.first + f.pages; ++j) {
      const Sampled& s = sampled_[j];
      const std::pair at{f.space, s.address};
      constexpr int kNear = 8;
      for (int n = 0; n < kNear && r != ranges.end() && before(*r, at); ++n) ++r;
      if (r != ranges.end() && before(*r, at)) r = std::lower_bound(r, ranges.end(), at, before);
      if (r == ranges.end() || r->space != f.space || s.address < r->start) continue;
      r->samples += s.samples;
      r->stores += s.stores;
    }
  }
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    ranges[i].count[0] = std::min<__u32>(ranges[i].samples, HT_UNKNOWN32 >> HT_COUNT_SHIFT) << HT_COUNT_SHIFT;
    const bool same = i && ranges[i - 1].mapping == ranges[i].mapping;
    if (same) {
      ranges[i].left_count = ranges[i - 1].count[0];
      ranges[i - 1].right_count = ranges[i].count[0];
    }
  }
  return runs_.size();
}

// Ranges follow the estimate, not the policy.
Adapted EstimatedPartition::adapt(std::span<const tier_range>) { return {}; }

}  // namespace hypertier
