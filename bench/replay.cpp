// SPDX-License-Identifier: GPL-2.0-or-later
// The engine and a policy's rules on simulated page streams, without a VM:
// what share of the best possible gain does a rule reach from so many samples?
// With --trace: on the pages and samples of a recorded run.
//
// An epoch's accesses go through a 4 MiB cache; what misses is the truth, a
// random part of it the samples. With --source abit there are none: accessed
// bits are cleared and tested by the plan of the real source, which is as good as
// its budget of page-table entries. The placement that epoch t chose is scored on
// the misses of t + 1: share = (hit - random) / (oracle - random). The oracle
// knows all misses up to t, not only the samples, with the half-life out of
// kOracleHalfLives that serves the workload best.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "../policies/heattree.h"
#include "../policies/hyperplace.h"
#include "engine/engine.hpp"
#include "engine/scope.hpp"
#include "sources/abit_plan.hpp"
#include "trace.hpp"
#include "workloads/commands.hpp"

namespace hypertier {
namespace {

constexpr __u64 kBase = 0x7f0000000000;
constexpr __u64 kBasePage = kBase >> HT_PAGE_SHIFT;
constexpr __u64 kSpace = 1;
constexpr __u32 kPid = 100;
constexpr __u64 kMiBPages = 256;
constexpr __u64 kEpochNs = 500'000'000;
using Rng = std::mt19937_64;

// ------------------------------------------------------------------- accesses

class Cache {
 public:
  bool miss(__u64 line) {
    std::array<__u32, kWays>& set = sets_[line % kSets];
    const auto tag = static_cast<__u32>(line / kSets) + 1;
    auto way = std::find(set.begin(), set.end(), tag);
    const bool hit = way != set.end();
    if (!hit) way = set.end() - 1;
    std::move_backward(set.begin(), way, way + 1);
    set[0] = tag;
    return !hit;
  }

 private:
  static constexpr __u64 kWays = 8;
  static constexpr __u64 kSets = (4 << 20) / 64 / kWays;
  std::vector<std::array<__u32, kWays>> sets_ = std::vector<std::array<__u32, kWays>>(kSets);
};

// Draws ranks with p ~ 1 / rank^a in constant time (alias method).
class Zipf {
 public:
  Zipf(std::size_t n, double a) : keep_(n), alias_(n) {
    std::vector<double> p(n);
    for (std::size_t i = 0; i < n; ++i) p[i] = std::pow(static_cast<double>(i + 1), -a);
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    std::vector<std::size_t> small, large;
    for (std::size_t i = 0; i < n; ++i) {
      p[i] *= static_cast<double>(n) / sum;
      (p[i] < 1 ? small : large).push_back(i);
    }
    while (!small.empty() && !large.empty()) {
      std::size_t s = small.back(), l = large.back();
      small.pop_back();
      keep_[s] = p[s];
      alias_[s] = l;
      p[l] -= 1 - p[s];
      if (p[l] < 1) {
        large.pop_back();
        small.push_back(l);
      }
    }
    for (std::size_t i : small) keep_[i] = 1;
    for (std::size_t i : large) keep_[i] = 1;
  }
  template <typename Random>
  std::size_t operator()(Random& rng) const {
    std::size_t i = rng() % keep_.size();
    return std::generate_canonical<double, 32>(rng) < keep_[i] ? i : alias_[i];
  }

 private:
  std::vector<double> keep_;
  std::vector<std::size_t> alias_;
};

using Touch = std::function<void(__u64 page, unsigned line)>;

struct Workload {
  __u64 pages = 0;
  virtual ~Workload() = default;
  virtual void epoch(Rng&) {}                      // what changes from one to the next
  virtual void operate(Rng& rng, const Touch& touch) = 0;  // one operation
};

// 90 % of the accesses to 64 MiB in pieces scattered over 384 MiB.
struct Hotset : Workload {
  __u64 piece;
  double moving;  // pieces replaced in an epoch, share
  double due = 0;
  std::vector<__u64> order;  // hot pieces first
  std::size_t hot;
  Hotset(__u64 piece_pages, double moving_share, Rng& rng) : piece(piece_pages), moving(moving_share) {
    pages = 384 * kMiBPages;
    order.resize(pages / piece);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    hot = 64 * kMiBPages / piece;
  }
  void epoch(Rng& rng) override {
    for (due += moving * static_cast<double>(hot); due >= 1; --due)
      std::swap(order[rng() % hot], order[hot + rng() % (order.size() - hot)]);
  }
  void operate(Rng& rng, const Touch& touch) override {
    __u64 p = rng() % 10 ? order[rng() % hot] : order[hot + rng() % (order.size() - hot)];
    touch(p * piece + rng() % piece, rng() % 64);
  }
};

// Values of 2 KiB, read whole; popularity by zipf, scattered. Moving: the
// ranking slides.
struct KeyValue : Workload {
  static constexpr std::size_t kKeys = 180000;
  Zipf zipf{kKeys, 0.99};
  std::vector<__u32> key;
  std::size_t slide;
  std::size_t at = 0;
  KeyValue(std::size_t keys_per_epoch, Rng& rng) : key(kKeys), slide(keys_per_epoch) {
    pages = kKeys / 2 + kKeys * 16 / HT_PAGE_SIZE + 1;
    std::iota(key.begin(), key.end(), 0);
    std::shuffle(key.begin(), key.end(), rng);
  }
  void epoch(Rng&) override { at = (at + slide) % kKeys; }
  void operate(Rng& rng, const Touch& touch) override {
    __u32 k = key[(zipf(rng) + at) % kKeys];
    touch(kKeys / 2 + k * 16ULL / HT_PAGE_SIZE, k * 16ULL % HT_PAGE_SIZE / 64);
    for (unsigned l = 0; l < 32; ++l) touch(k / 2, k % 2 * 32 + l);
  }
};

// Leaves of 4 KiB with a dozen keys each, inner pages above.
struct Btree : Workload {
  static constexpr std::size_t kLeaves = 98304;
  static constexpr std::size_t kKeys = 12 * kLeaves;
  Zipf zipf{kKeys, 0.99};
  std::vector<__u32> leaf;
  explicit Btree(Rng& rng) : leaf(kKeys) {
    pages = kLeaves + kLeaves / 128 + 1;
    for (std::size_t i = 0; i < kKeys; ++i) leaf[i] = static_cast<__u32>(i % kLeaves);
    std::shuffle(leaf.begin(), leaf.end(), rng);
  }
  void operate(Rng& rng, const Touch& touch) override {
    __u32 l = leaf[zipf(rng)];
    touch(kLeaves + kLeaves / 128, rng() % 4);
    for (unsigned i = 0; i < 3; ++i) touch(kLeaves + l / 128, rng() % 64);
    for (unsigned i = 0; i < 6; ++i) touch(l, rng() % 64);
  }
};

struct Gups : Workload {
  Gups() { pages = 384 * kMiBPages; }
  void operate(Rng& rng, const Touch& touch) override { touch(rng() % pages, rng() % 64); }
};

// Sweeps over three grids, line by line.
struct Stencil : Workload {
  __u64 at = 0;
  Stencil() { pages = 384 * kMiBPages; }
  void operate(Rng&, const Touch& touch) override {
    const __u64 grid = pages / 3;
    for (__u64 g = 0; g < 3; ++g) touch(g * grid + at / 64 % grid, at % 64);
    ++at;
  }
};

// Edges streamed, ranks of their ends looked up at random by a power law; the
// ranks are one array.
struct PageRank : Workload {
  static constexpr __u64 kVertices = 48 * kMiBPages * 512;  // 8 bytes each
  Zipf zipf{1 << 20, 0.6};
  __u64 at = 0;
  PageRank() { pages = 432 * kMiBPages; }
  void operate(Rng& rng, const Touch& touch) override {
    const __u64 edges = pages - kVertices / 512;
    touch(kVertices / 512 + at / 64 % edges, at % 64);
    ++at;
    for (int i = 0; i < 16; ++i) {
      __u64 v = (zipf(rng) * 0x9e3779b97f4a7c15ULL >> 20) % kVertices;
      touch(v / 512, v % 512 / 8);
    }
  }
};

// A stream of random numbers that costs nothing to begin (Steele, Lea, Flood 2014).
struct SplitMix {
  using result_type = __u64;
  __u64 state;
  static constexpr __u64 min() { return 0; }
  static constexpr __u64 max() { return ~__u64{0}; }
  __u64 operator()() {
    const __u64 drawn = workload::mix(state);
    state += 0x9e3779b97f4a7c15;
    return drawn;
  }
};

// Breadth first from one vertex after another: a queue, where each vertex's edges begin,
// the edges, and who came first to their ends. Degrees by a power law.
struct Bfs : Workload {
  static constexpr __u64 kVertices = 1 << 21, kEdgesEach = 40;
  static constexpr __u64 kEdgesAt = kVertices * (4 + 8 + 8) / HT_PAGE_SIZE;  // queue, offsets, parents
  Zipf zipf{kVertices, 0.6};
  std::vector<__u32> offset = std::vector<__u32>(kVertices + 1), queue;
  std::vector<bool> seen;
  std::size_t at = 0;
  Bfs() {
    double sum = 0;
    for (__u64 rank = 1; rank <= kVertices; ++rank) sum += std::pow(static_cast<double>(rank), -0.6);
    for (__u64 rank = 0; rank < kVertices; ++rank)
      offset[vertex(rank) + 1] = static_cast<__u32>(1 + kVertices * (kEdgesEach - 1) * std::pow(static_cast<double>(rank + 1), -0.6) / sum);
    std::partial_sum(offset.begin(), offset.end(), offset.begin());
    pages = kEdgesAt + offset.back() * 4ULL / HT_PAGE_SIZE + 1;
  }
  static __u64 vertex(__u64 rank) { return rank * 0x9e3779b1 % kVertices; }
  void touch_item(__u64 first_page, __u64 index, __u64 bytes, const Touch& touch) {
    touch(first_page + index * bytes / HT_PAGE_SIZE, static_cast<unsigned>(index * bytes % HT_PAGE_SIZE / 64));
  }
  void operate(Rng& rng, const Touch& touch) override {
    if (at == queue.size()) {
      seen.assign(kVertices, false);
      queue.assign(1, static_cast<__u32>(rng() % kVertices));
      seen[queue[0]] = true;
      at = 0;
    }
    touch_item(0, at, 4, touch);
    const __u32 v = queue[at++];
    touch_item(kVertices * 4 / HT_PAGE_SIZE, v, 8, touch);
    for (__u32 edge = offset[v]; edge < offset[v + 1]; ++edge) {
      touch_item(kEdgesAt, edge, 4, touch);
      SplitMix end{edge};  // the same each time
      const __u64 u = vertex(zipf(end));
      touch_item(kVertices * 12 / HT_PAGE_SIZE, u, 8, touch);
      if (seen[u]) continue;
      seen[u] = true;
      touch_item(0, queue.size(), 4, touch);
      queue.push_back(static_cast<__u32>(u));
    }
  }
};

// A small index in one piece, half of the accesses; the rest anywhere.
struct XsBench : Workload {
  XsBench() { pages = 480 * kMiBPages; }
  void operate(Rng& rng, const Touch& touch) override {
    const __u64 index = 64 * kMiBPages;
    touch(rng() % 2 ? rng() % index : index + rng() % (pages - index), rng() % 64);
  }
};

std::unique_ptr<Workload> make_workload(const std::string& name, Rng& rng) {
  if (name == "hot2m") return std::make_unique<Hotset>(512, 0, rng);
  if (name == "hot64k") return std::make_unique<Hotset>(16, 0, rng);
  if (name == "hot4k") return std::make_unique<Hotset>(1, 0, rng);
  if (name == "hot64k-moving") return std::make_unique<Hotset>(16, 1.0 / 128, rng);
  if (name == "hot4k-moving") return std::make_unique<Hotset>(1, 1.0 / 128, rng);
  if (name == "kv") return std::make_unique<KeyValue>(0, rng);
  if (name == "kv-moving") return std::make_unique<KeyValue>(KeyValue::kKeys / 1000, rng);
  if (name == "btree") return std::make_unique<Btree>(rng);
  if (name == "xsbench") return std::make_unique<XsBench>();
  if (name == "pagerank") return std::make_unique<PageRank>();
  if (name == "bfs") return std::make_unique<Bfs>();
  if (name == "stencil") return std::make_unique<Stencil>();
  if (name == "gups") return std::make_unique<Gups>();
  return nullptr;
}
const std::vector<std::string> kWorkloads = {"hot2m", "hot64k",  "hot4k",    "hot64k-moving", "hot4k-moving", "kv", "kv-moving",
                                             "btree", "xsbench", "pagerank", "bfs", "stencil",       "gups"};

// ---------------------------------------------------------------- the machine

// One process, its memory in two tiers.
class Memory final : public Machine {
 public:
  explicit Memory(__u64 room_pages) : room_pages(room_pages) {}

  __u64 room_pages;  // of the fast tier

  void map(std::vector<ht_mapping> mappings) {
    mappings_ = std::move(mappings);
    ++seq_;
  }
  // HT_TIER_NONE: not resident.
  __u8 tier(__u64 page) const {
    auto found = granules_.find(page / HT_GRANULE_PAGES);
    return found == granules_.end() ? __u8{HT_TIER_NONE} : found->second[page % HT_GRANULE_PAGES];
  }
  void put(__u64 page, __u8 to) {
    auto [granule, fresh] = granules_.try_emplace(page / HT_GRANULE_PAGES);
    if (fresh) granule->second.fill(HT_TIER_NONE);
    __u8& tier = granule->second[page % HT_GRANULE_PAGES];
    if (tier < HT_TIERS) --resident_[tier];
    tier = to;
    if (tier < HT_TIERS) ++resident_[tier];
  }
  __u64 resident(ht_tier tier) const { return resident_[tier]; }
  // Of all moves, those that the page took back within 10 epochs.
  double vain_share() const { return moves_ ? static_cast<double>(vain_) / static_cast<double>(moves_) : 0; }
  void next_epoch() { ++epoch_; }
  __u64 free_fast() const { return room_pages > resident_[HT_TIER_FAST] ? room_pages - resident_[HT_TIER_FAST] : 0; }

  ht_spaces_run& spaces() override { return *spaces_; }
  std::span<const ht_mapping> mappings() override { return mappings_; }
  ht_walks_run& walks() override { return *walks_; }
  std::span<const ht_page_t> pages() override { return pages_; }
  std::span<ht_pair> pairs() override { return pairs_; }

  Result<> run_spaces() override {
    spaces_->used = static_cast<__u32>(mappings_.size());
    for (__u32 i = 0; i < spaces_->nr; ++i) {
      ht_space_req& r = spaces_->req[i];
      r.error = 0;
      r.first = 0;
      r.count = r.seq == seq_ ? 0 : spaces_->used;
      r.seq = seq_;
      r.space = kSpace;
      r.tier_rss_pages = resident_[HT_TIER_FAST] + resident_[HT_TIER_SLOW];
    }
    return {};
  }
  Result<> run_walks() override {
    walks_->pages_used = 0;
    for (__u32 i = 0; i < walks_->nr; ++i) {
      ht_walk& w = walks_->walk[i];
      w.list_first = walks_->pages_used;
      w.list_count = 0;
      w.next = w.end;
      const std::array<__u8, HT_GRANULE_PAGES>* granule = nullptr;
      for (__u64 a = w.start; a < w.end; a += HT_PAGE_SIZE) {
        if (a == w.start || a % HT_GRANULE_SIZE == 0) {
          auto found = granules_.find(a >> HT_GRANULE_SHIFT);
          granule = found == granules_.end() ? nullptr : &found->second;
        }
        const __u8 t = granule ? (*granule)[(a >> HT_PAGE_SHIFT) % HT_GRANULE_PAGES] : __u8{HT_TIER_NONE};
        if (t == HT_TIER_NONE) continue;
        if (t == w.list_tier || w.list_tier == HT_TIERS) {
          if (walks_->pages_used == HT_PAGES_MAX || (w.list_max_pages && w.list_count == w.list_max_pages)) {
            w.next = a;
            break;
          }
          pages_[walks_->pages_used++] = a | (w.list_tier == HT_TIERS && t == HT_TIER_FAST ? HT_PAGE_FAST : 0);
          ++w.list_count;
        }
        ++w.tier_pages[t];
      }
    }
    return {};
  }
  Result<> run_exchange(ht_exchange_run& run) override {
    for (__u32 i = 0; i < run.nr; ++i) {
      ht_pair& p = pairs_[i];
      auto move = [&](__u64 address, ht_tier to, __u8& result, __u64& moved) {
        if (!address) return;
        const __u8 from = tier(address >> HT_PAGE_SHIFT);
        result = from == HT_TIER_NONE ? HT_MOVE_GONE : from == to ? HT_MOVE_ALREADY : HT_MOVE_DONE;
        if (result != HT_MOVE_DONE) return;
        ++moved;
        put(address >> HT_PAGE_SHIFT, to);
        ++moves_;
        auto [last, first] = moved_.try_emplace(address >> HT_PAGE_SHIFT, epoch_);
        if (!first && epoch_ - last->second <= kVainEpochs) ++vain_;
        last->second = epoch_;
      };
      move(p.cold_addr, HT_TIER_SLOW, p.cold_result, run.demoted_pages);
      if (p.hot_addr && !free_fast())
        p.hot_result = HT_MOVE_NO_MEMORY;
      else
        move(p.hot_addr, HT_TIER_FAST, p.hot_result, run.promoted_pages);
    }
    run.ns = run.nr * 8500;  // 50 slow accesses a pair
    return {};
  }

 private:
  std::unordered_map<__u64, std::array<__u8, HT_GRANULE_PAGES>> granules_;
  std::array<__u64, HT_TIERS> resident_{};
  static constexpr __u64 kVainEpochs = 10;
  std::unordered_map<__u64, __u64> moved_;  // by page: when last
  __u64 epoch_ = 0;
  __u64 moves_ = 0;
  __u64 vain_ = 0;
  std::vector<ht_page_t> pages_ = std::vector<ht_page_t>(HT_PAGES_MAX);
  std::vector<ht_pair> pairs_ = std::vector<ht_pair>(HT_PAIRS_MAX);
  std::unique_ptr<ht_spaces_run> spaces_ = std::make_unique<ht_spaces_run>();
  std::unique_ptr<ht_walks_run> walks_ = std::make_unique<ht_walks_run>();
  std::vector<ht_mapping> mappings_;
  __u64 seq_ = 0;
};

// A policy's rules, run natively.
struct Rules {
  hyperplace_settings hyperplace = HYPERPLACE_DEFAULTS;
  heattree_settings heattree = HEATTREE_DEFAULTS;
  heattree_trial trial{};
  bool tree = false;
};

class Caller final : public PolicyCaller {
 public:
  explicit Caller(Rules& rules) : rules_(rules), call_(std::make_unique<ht_call>()) {}

  std::span<tier_range> ranges() override { return call_->ranges; }
  std::span<tier_pair> pairs() override { return call_->pairs; }
  std::span<tier_result> results() override { return call_->results; }

  Result<> run_classify(ht_run& run) override {
    if (rules_.tree && !run.first) heattree_judge(&rules_.trial, &run.scope, &rules_.heattree);
    for (__u32 i = 0; i < run.nr; ++i) {
      tier_range& r = call_->ranges[i];
      if (rules_.tree) {
        r.heat = heattree_heat(&r);
      } else {
        r.heat = hyperplace_heat(&r, &rules_.hyperplace);
        r.action = hyperplace_action(&r, run.scope.cpus, &rules_.hyperplace);
      }
    }
    return {};
  }
  Result<> run_admit(ht_run& run) override {
    for (__u32 i = 0; i < run.nr; ++i) {
      tier_pair& p = call_->pairs[i];
      p.admitted = rules_.tree ? heattree_admit(&p.hot, &p.cold, &run.scope, &rules_.trial, &rules_.heattree)
                               : hyperplace_admit(&p.hot, &p.cold, &rules_.hyperplace);
    }
    return {};
  }
  Result<> run_moved(ht_run&) override { return {}; }

 private:
  Rules& rules_;
  std::unique_ptr<ht_call> call_;
};

class Samples final : public SampleSource {
 public:
  bool keep = false;
  std::vector<trace::Sample> kept;  // of this epoch

  void count(__u64 page, bool store) {
    if (keep) kept.push_back({page << HT_PAGE_SHIFT, store});
    ht_granule& g = granules_[page / HT_GRANULE_PAGES];
    ++g.samples;
    g.stores += store;
    const unsigned p = page % HT_GRANULE_PAGES;
    g.pages[p / 2] += p & 1 ? 1 << 16 : 1;
  }
  Result<> drain(const std::function<void(const ht_granule&)>& fold) override {
    for (auto& [granule, g] : granules_) {
      g.space = kSpace;
      g.granule = granule;
      fold(g);
    }
    granules_.clear();
    return {};
  }
  void forget(__u64, __u64, __u64) override {}
  ht_sampler_stats stats() override { return {}; }

 private:
  std::map<__u64, ht_granule> granules_;
};

// Accessed bits, cleared and tested when the real source's plan says so. Any
// touch sets the bit: no TLB hides it.
class Bits final : public SampleSource {
 public:
  // visits: page-table entries an epoch may read, as a share of the pages.
  Bits(__u64 pages, double visits)
      : plan_(static_cast<__u64>(visits * static_cast<double>(pages) * kVisitNs * 1e9 / kEpochNs)), accessed_(pages) {}

  void touch(__u64 page) { accessed_[page] = 1; }
  // What is due by now.
  void advance(__u64 now_ns) {
    if (!visits_total) due_ns_ = now_ns;
    while (!plan_.empty() && now_ns >= due_ns_) cleared_ ? test() : clear();
  }
  __u64 interval_ns() const { return plan_.interval_ns(); }

  Result<> drain(const std::function<void(const ht_granule&)>&) override { return {}; }
  void drain_bits(const std::function<void(const ht_bits&)>& fold) override {
    for (const ht_bits& bits : std::exchange(read_, {})) fold(bits);
  }
  void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) override { plan_.manage(space, pid, mappings); }
  void aim(__u64 interval_ns) override { plan_.aim(interval_ns); }
  void forget(__u64, __u64, __u64) override {}
  ht_sampler_stats stats() override { return {}; }

  __u64 visits_total = 0;
  __u64 set_total = 0;  // of the tested
  __u64 tested_total = 0;

 private:
  static constexpr __u64 kVisitNs = 10;

  // Calls f(page of the process, page of the granule) for each page of it.
  template <class F>
  void each_page(__u64 granule, F&& f) {
    const __u64 first = ((granule << HT_GRANULE_SHIFT) - kBase) >> HT_PAGE_SHIFT;
    for (unsigned p = 0; p < HT_GRANULE_PAGES && first + p < accessed_.size(); ++p, ++visits_total) f(first + p, p);
  }
  void clear() {
    cycle_ = plan_.next_cycle();
    targets_ = plan_.take(cycle_.granules);
    visits_before_ = visits_total;
    for (const AbitPlan::Target& target : targets_)
      each_page(target.granule, [&](__u64 page, unsigned) { accessed_[page] = 0; });
    started_ns_ = due_ns_;
    due_ns_ += cycle_.interval_ns;
    cleared_ = true;
  }
  void test() {
    __u64 tested = 0, set = 0;
    for (const AbitPlan::Target& target : targets_) {
      ht_bits bits{};
      bits.space = target.space;
      bits.granule = target.granule;
      bits.interval_ns = cycle_.interval_ns;
      each_page(target.granule, [&](__u64 page, unsigned p) {
        bits.checked[p / 64] |= 1ULL << p % 64;
        if (accessed_[page]) bits.set[p / 64] |= 1ULL << p % 64;
        ++tested;
        set += accessed_[page];
      });
      plan_.mapped(target.space, target.granule, true);
      read_.push_back(bits);
    }
    tested_total += tested;
    set_total += set;
    due_ns_ = started_ns_ + plan_.spent(cycle_, targets_.size(), (visits_total - visits_before_) * kVisitNs,
                                        tested ? static_cast<double>(set) / static_cast<double>(tested) : 0);
    cleared_ = false;
  }

  AbitPlan plan_;
  std::vector<__u8> accessed_;
  std::vector<ht_bits> read_;
  std::vector<AbitPlan::Target> targets_;
  AbitPlan::Cycle cycle_;
  __u64 visits_before_ = 0;
  __u64 started_ns_ = 0;
  __u64 due_ns_ = 0;
  bool cleared_ = false;
};

// ------------------------------------------------------------------- the run

constexpr std::array<double, 3> kOracleHalfLives = {4, 16, 256};  // epochs
constexpr int kOracles = kOracleHalfLives.size();

constexpr int kBurstEpochs = 16;  // 8 s

struct Options {
  double density = 0.048;
  unsigned burst = 1;  // so many times as many samples in the first kBurstEpochs, as tierd takes
  double visits = 0;  // accessed bits: entries read an epoch, share of the pages
  bool samples = true;  // false: bits alone
  int epochs = 300;
  __u64 misses = 200000;  // per epoch
  double fast_share = 0.2;
  unsigned seed = 1;
  heattree_settings heattree = HEATTREE_DEFAULTS;
  EngineSettings engine;
  bool verbose = false;
  std::string record;
};

[[noreturn]] void die(const Error& error) {
  std::fprintf(stderr, "replay: %s\n", error.message.c_str());
  if (!error.hint.empty()) std::fprintf(stderr, "HINT: %s\n", error.hint.c_str());
  std::exit(1);
}

// The engine with one policy over one process.
struct Tierer {
  Rules rules;
  Engine engine;
  Scope& scope;
  EpochInput input;

  Tierer(Memory& memory, SampleSource& source, const std::string& policy, const Options& options)
      : engine(memory, source, options.engine), scope(engine.add_scope(1, "/", std::make_unique<Caller>(rules))) {
    rules.tree = policy == "heattree";
    rules.heattree = options.heattree;
    ht_space_event event{};
    event.kind = HT_SPACE_FORK;
    event.pid = kPid;
    event.space = kSpace;
    event.cgroup_id = 1;
    engine.space_event(event);
    input.moves = policy != "static";
    input.estimated = rules.tree;
    input.slow_free_pages = HT_UNKNOWN32;  // slow memory has room for all
    input.is_default = policy == "hyperplace";
  }
  EpochReport epoch() {
    auto report = engine.epoch(scope, input);
    if (!report) die(report.error());
    return *report;
  }
};

struct Outcome {
  double share = 0;   // mean of the last third
  double hit = 0;     // the same
  double oracle = 0;
  double random = 0;
  double moved = 0;   // % of the fast tier an epoch, the same
  double vain = 0;    // share of all moves, of the whole run
  int reached = -1;   // first epoch with 90 % of the oracle's hits
  double engine_ms = 0;
};

// Writes a simulated run as the lab records a real one.
class Recorder {
 public:
  Recorder(const std::string& path, const std::string& run, const Options& options, __u64 fast, __u64 period, const Memory& memory, __u64 pages)
      : writer_(trace::Writer::create(path, header(run, options, fast, period))), memory_(memory), tiers_(pages) {
    if (!writer_) die(writer_.error());
    epoch_.mapped = true;
    epoch_.mappings = {{kBase, kBase + pages * HT_PAGE_SIZE, TIER_RANGE_ANON}};
    for (__u64 p = 0; p < pages; ++p) epoch_.placed.push_back({kBasePage + p, tiers_[p] = memory.tier(kBasePage + p)});
  }
  // Its misses and samples; the engine has not seen it yet.
  void epoch(__u64 ns, const std::vector<__u32>& misses, __u64 fast_misses, std::vector<trace::Sample> samples) {
    if (epoch_.placed.empty())
      for (__u64 p = 0; p < tiers_.size(); ++p)
        if (const __u8 tier = memory_.tier(kBasePage + p); tier != tiers_[p]) epoch_.placed.push_back({kBasePage + p, tiers_[p] = tier});
    for (__u64 p = 0; p < misses.size(); ++p)
      if (misses[p]) epoch_.truth.push_back({kBasePage + p, misses[p]});
    epoch_.samples = std::move(samples);
    epoch_.ns = ns;
    epoch_.fast_misses = fast_misses;
    if (auto done = writer_->write(epoch_); !done) die(done.error());
    epoch_ = {};
  }

 private:
  static trace::Header header(const std::string& run, const Options& options, __u64 fast, __u64 period) {
    trace::Header header{};
    header.seed = options.seed;
    header.period = period;
    header.fast_pages = header.fast_tier_pages = fast;
    header.cpus = 1;
    header.pid = kPid;
    run.copy(header.run, sizeof header.run - 1);
    return header;
  }

  Result<trace::Writer> writer_;
  const Memory& memory_;
  std::vector<__u8> tiers_;
  trace::Epoch epoch_;
};

Outcome replay(const std::string& name, const std::string& policy, const Options& options) {
  Rng rng(options.seed);
  std::unique_ptr<Workload> workload = make_workload(name, rng);
  const __u64 pages = workload->pages;
  const auto fast = static_cast<__u64>(options.fast_share * static_cast<double>(pages));
  const double sampled = options.density * static_cast<double>(fast) / static_cast<double>(options.misses);

  Memory memory(fast);
  std::vector<__u64> all(pages);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), rng);
  memory.map({{kBase, kBase + pages * HT_PAGE_SIZE, TIER_RANGE_ANON, 0}});
  for (__u64 i = 0; i < pages; ++i) memory.put(kBasePage + all[i], i < fast ? HT_TIER_FAST : HT_TIER_SLOW);

  Samples samples;
  Bits bits(pages, options.visits);
  BothSources both(samples, bits);
  const bool by_bits = options.visits > 0;
  SampleSource& source = !by_bits ? static_cast<SampleSource&>(samples) : options.samples ? static_cast<SampleSource&>(both) : bits;
  Tierer tierer(memory, source, policy, options);
  EpochInput& input = tierer.input;
  input.epoch_ns = kEpochNs;
  input.fast_tier_pages = input.fast_capacity_pages = fast;
  std::optional<Recorder> recorder;
  if (!options.record.empty()) recorder.emplace(options.record, name + "/" + policy, options, fast, static_cast<__u64>(std::max(1.0, 1 / sampled)), memory, pages);
  samples.keep = recorder.has_value();

  Cache cache;
  std::vector<__u32> misses(pages);
  std::array<std::vector<float>, kOracles> known;  // to the oracle
  known.fill(std::vector<float>(pages));
  std::array<double, kOracles> oracle{};
  Outcome outcome;
  int counted = 0;
  for (int e = 0; e < options.epochs; ++e) {
    const unsigned times = e < kBurstEpochs ? options.burst : 1;
    std::bernoulli_distribution take(std::min(1.0, sampled * times));
    input.period = !options.samples ? 0 : static_cast<__u32>(std::max(1.0, 1 / sampled / times));
    workload->epoch(rng);
    std::fill(misses.begin(), misses.end(), 0);
    __u64 total = 0;
    const Touch touch = [&](__u64 page, unsigned line) {
      if (by_bits) bits.touch(page);
      if (!cache.miss(page * 64 + line)) return;
      ++misses[page];
      ++total;
      if (options.samples && take(rng)) samples.count(kBasePage + page, false);
    };
    while (total < options.misses) {
      workload->operate(rng, touch);
      if (by_bits) bits.advance(static_cast<__u64>(e) * kEpochNs + kEpochNs * std::min(total, options.misses) / options.misses);
    }

    __u64 hit = 0;
    for (__u64 p = 0; p < pages; ++p)
      if (memory.tier(kBasePage + p) == HT_TIER_FAST) hit += misses[p];
    std::array<double, kOracles> bests{};
    for (int o = 0; o < kOracles; ++o) {
      std::vector<float>& k = known[o];
      std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(fast), all.end(),
                       [&](__u64 a, __u64 b) { return k[a] > k[b]; });
      bests[o] = std::accumulate(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(fast), 0.0,
                                 [&](double sum, __u64 p) { return sum + misses[p]; }) /
                 static_cast<double>(total);
      const auto keep = static_cast<float>(std::exp2(-1 / kOracleHalfLives[o]));
      for (__u64 p = 0; p < pages; ++p) k[p] = keep * k[p] + static_cast<float>(misses[p]);
    }
    const double best = *std::max_element(bests.begin(), bests.end());
    const double ratio = static_cast<double>(hit) / static_cast<double>(total);
    if (outcome.reached < 0 && e && ratio >= 0.9 * best) outcome.reached = e;

    if (recorder) recorder->epoch(input.epoch_ns, misses, hit, std::exchange(samples.kept, {}));
    const std::clock_t begin = std::clock();
    const EpochReport report = tierer.epoch();
    memory.next_epoch();
    const double spent = 1e3 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    outcome.engine_ms += spent / options.epochs;
    const double moved = 100 * static_cast<double>(report.moved.promoted_pages) / static_cast<double>(fast);
    if (options.verbose && e % 10 == 0) {
      std::printf("  %4d hit %.3f best %.3f ranges %5u samples %5llu %-14s moved %.2f %% trial %llu %lld/%lld open %d\n", e, ratio, best,
                  report.scope.ranges, report.scope.samples, decision_name(report.decision), moved,
                  report.scope.trial_pages[1], report.scope.trial_hits[1], report.scope.trial_hits[0], tierer.rules.trial.open);
      if (by_bits)
        std::printf("       interval %.2f ms, %.3f of the bits set, %.1f %% of the pages read\n", 1e-6 * static_cast<double>(bits.interval_ns()),
                    static_cast<double>(bits.set_total) / static_cast<double>(std::max<__u64>(1, bits.tested_total)),
                    100.0 * static_cast<double>(bits.visits_total) / static_cast<double>(pages) / (e + 1));
    }
    if (e < options.epochs * 2 / 3) continue;
    ++counted;
    outcome.hit += ratio;
    for (int o = 0; o < kOracles; ++o) oracle[o] += bests[o];
    outcome.moved += moved;
  }
  outcome.hit /= counted;
  outcome.oracle = *std::max_element(oracle.begin(), oracle.end()) / counted;
  outcome.moved /= counted;
  outcome.vain = memory.vain_share();
  outcome.random = options.fast_share;
  outcome.share = (outcome.hit - outcome.random) / std::max(1e-9, outcome.oracle - outcome.random);
  return outcome;
}

// A recorded run, epoch by epoch: what it maps, touches and samples is the
// record's, where its pages are is at first the record's too and then what the engine
// makes of it. Pages that come later are fast where there is room, as the kernel has it,
// without its watermarks and its lists by CPU.
nlohmann::json replay_trace(const std::string& path, const std::string& policy, const Options& options) {
  auto trace = trace::Reader::open(path);
  if (!trace) die(trace.error());
  const trace::Header& header = trace->header;
  Memory memory(header.fast_pages);
  Samples samples;
  Rng rng(options.seed);
  Tierer tierer(memory, samples, policy, options);
  EpochInput& input = tierer.input;
  input.fast_tier_pages = header.fast_tier_pages;
  input.cpus = header.cpus;
  input.period = static_cast<__u32>(header.period);

  struct Sum {
    double fast = 0, all = 0;
    double ratio() const { return all > 0 ? fast / all : 0; }
  };
  struct Point {
    double seconds;
    Sum live, replayed;
  };
  std::vector<Point> points;
  double seconds = 0;
  __u64 live_fast = 0, moved = 0;
  std::unordered_map<__u64, bool> live;  // page -> is fast
  std::unordered_map<__u64, double> misses_of;
  for (trace::Epoch epoch;;) {
    auto more = trace->next(epoch);
    if (!more) die(more.error());
    if (!*more) break;
    if (epoch.mapped) {
      std::vector<ht_mapping> mappings;
      for (const trace::Mapping& m : epoch.mappings) mappings.push_back({m.start, m.end, m.flags, 0});
      memory.map(std::move(mappings));
    }
    for (const trace::Place& place : epoch.placed) {
      const bool gone = place.node == trace::kGone, fast = place.node == 0;
      auto [was, fresh] = live.try_emplace(place.page, false);
      live_fast += (!gone && fast) - was->second;
      was->second = fast;
      if (gone) live.erase(was);
      memory.room_pages = std::max<__u64>(header.fast_pages, live_fast);
      if (gone)
        memory.put(place.page, HT_TIER_NONE);
      else if (fresh)
        memory.put(place.page, (points.empty() ? fast : memory.free_fast() > 0) ? HT_TIER_FAST : HT_TIER_SLOW);
    }
    Point point{seconds += static_cast<double>(epoch.ns) * 1e-9, {}, {}};
    for (const trace::Misses& misses : epoch.truth) {
      const auto count = static_cast<double>(misses.count);
      point.replayed.all += count;
      misses_of[misses.page] += count;
      if (memory.tier(misses.page) == HT_TIER_FAST) point.replayed.fast += count;
    }
    point.live = {static_cast<double>(epoch.fast_misses), point.replayed.all};
    points.push_back(point);
    if (options.burst > 1) {
      // Other samples than the record's, of what it says was missed.
      input.period = static_cast<__u32>(points.size() <= kBurstEpochs ? std::max<__u64>(1, header.period / options.burst) : header.period);
      for (const trace::Misses& misses : epoch.truth)
        for (auto left = std::binomial_distribution<__u64>(misses.count, 1.0 / input.period)(rng); left; --left) samples.count(misses.page, false);
    } else {
      for (const trace::Sample& sample : epoch.samples) samples.count(sample.address >> HT_PAGE_SHIFT, sample.store);
    }
    input.epoch_ns = epoch.ns;
    input.fast_free_pages = memory.free_fast();
    input.fast_capacity_pages = memory.room_pages;
    const EpochReport report = tierer.epoch();
    memory.next_epoch();
    moved += report.moved.promoted_pages + report.moved.demoted_pages;
    if (options.verbose) {
      std::printf("  %7.2f s live %.3f replayed %.3f ranges %5u samples %5llu %-14s promoted %5llu demoted %5llu", seconds, point.live.ratio(),
                  point.replayed.ratio(), report.scope.ranges, report.scope.samples, decision_name(report.decision), report.moved.promoted_pages, report.moved.demoted_pages);
      std::printf(" refused %5llu free %llu trial %llu %lld/%lld open %d\n", report.refused_pages, memory.free_fast(), report.scope.trial_pages[HT_TIER_SLOW],
                  report.scope.trial_hits[HT_TIER_SLOW], report.scope.trial_hits[HT_TIER_FAST], tierer.rules.trial.open);
    }
  }
  if (points.empty()) die({"the trace " + path + " holds no whole epoch", "record it again: ./run bench --record WORKLOAD/SYSTEM", 0});

  // Means of 2 s, as the cells have them; the end is the last tenth, at least 5 s.
  const double from = seconds - std::max(5.0, seconds / 10);
  Sum live_end, replayed_end, live_all, replayed_all;
  std::vector<Point> windows;
  for (const Point& point : points) {
    auto add = [](Sum& sum, const Sum& more) { sum.fast += more.fast, sum.all += more.all; };
    if (point.seconds > from) add(live_end, point.live), add(replayed_end, point.replayed);
    add(live_all, point.live), add(replayed_all, point.replayed);
    if (windows.empty() || point.seconds > (static_cast<double>(windows.size()) * 2 + 0.25)) windows.push_back({});
    windows.back().seconds = point.seconds;
    add(windows.back().live, point.live), add(windows.back().replayed, point.replayed);
  }
  // As the report has it: of the best static placement, nine tenths, held for two looks (of an epoch each here).
  std::vector<double> by_misses;
  for (const auto& [page, count] : misses_of) by_misses.push_back(count);
  std::sort(by_misses.begin(), by_misses.end(), std::greater<>());
  by_misses.resize(std::min<std::size_t>(by_misses.size(), header.fast_pages));
  const double oracle = live_all.all > 0 ? std::accumulate(by_misses.begin(), by_misses.end(), 0.0) / live_all.all : 0;
  auto arrival = [&](Sum Point::*which) -> nlohmann::json {
    for (std::size_t i = 0; i + 1 < points.size(); ++i)
      if ((points[i].*which).ratio() >= 0.9 * oracle && (points[i + 1].*which).ratio() >= 0.9 * oracle) return points[i].seconds;
    return nullptr;
  };
  nlohmann::json steps = nlohmann::json::array();
  for (const Point& window : windows) steps.push_back({{"end_s", window.seconds}, {"live_hit_ratio", window.live.ratio()}, {"replayed_hit_ratio", window.replayed.ratio()}});
  return {{"schema", 1}, {"run", header.run}, {"seed", header.seed}, {"policy", policy}, {"period", header.period}, {"epochs", points.size()}, {"seconds", seconds},
          {"live_final_hit_ratio", live_end.ratio()}, {"replayed_final_hit_ratio", replayed_end.ratio()},
          {"live_mean_hit_ratio", live_all.ratio()}, {"replayed_mean_hit_ratio", replayed_all.ratio()}, {"replayed_moved_pages", moved}, {"replayed_moved_in_vain", memory.vain_share()},
          {"oracle_hit_ratio", oracle}, {"live_arrival_s", arrival(&Point::live)}, {"replayed_arrival_s", arrival(&Point::replayed)}, {"windows", steps}};
}

void print_trace(const nlohmann::json& result) {
  std::printf("%s, seed %d, replayed with %s: %d epochs\n%8s %8s %8s\n", result.at("run").get<std::string>().c_str(), result.at("seed").get<int>(), result.at("policy").get<std::string>().c_str(),
              result.at("epochs").get<int>(), "second", "live", "replayed");
  for (const auto& window : result.at("windows"))
    std::printf("%8.1f %8.3f %8.3f\n", window.at("end_s").get<double>(), window.at("live_hit_ratio").get<double>(), window.at("replayed_hit_ratio").get<double>());
  const double live = result.at("live_final_hit_ratio"), replayed = result.at("replayed_final_hit_ratio");
  std::printf("90 %% of the best static placement (%.4f), s: %s live, %s replayed\n", result.at("oracle_hit_ratio").get<double>(), result.at("live_arrival_s").dump().c_str(),
              result.at("replayed_arrival_s").dump().c_str());
  std::printf("replayed: %llu pages moved, %.1f %% of them in vain\n", result.at("replayed_moved_pages").get<unsigned long long>(), result.at("replayed_moved_in_vain").get<double>() * 100);
  std::printf("at the end %.4f live, %.4f replayed: %+.4f\n", live, replayed, replayed - live);
}

}  // namespace
}  // namespace hypertier

int main(int argc, char** argv) {
  using namespace hypertier;
  CLI::App app{"the engine and a policy's rules on simulated page streams, or on a recorded run"};
  Options options;
  std::vector<std::string> names = kWorkloads;
  std::vector<std::string> policies = {"hyperplace", "heattree"};
  app.add_option("workload", names, "which; all if none is named")->check(CLI::IsMember(kWorkloads));
  app.add_option("--policy", policies)->check(CLI::IsMember({"static", "hyperplace", "heattree"}));
  std::string source = "samples";
  double visits = 10;
  app.add_option("--source", source)->check(CLI::IsMember({"samples", "abit", "both"}))->capture_default_str();
  app.add_option("--visits", visits, "abit and both: page-table entries read an epoch, % of the pages")->capture_default_str();
  app.add_option("--s", options.density, "samples per page of the fast tier and epoch")->capture_default_str();
  auto* burst = app.add_option("--burst", options.burst, "so many times as many samples in the first 8 s, as tierd takes by default (4); of a recorded run drawn anew from what was missed")
                    ->check(CLI::Range(1U, 16U))
                    ->capture_default_str();
  app.add_option("--epochs", options.epochs)->capture_default_str();
  app.add_option("--misses", options.misses, "an epoch")->capture_default_str();
  app.add_option("--fast", options.fast_share, "fast tier's share of the footprint")->capture_default_str();
  app.add_option("--seed", options.seed)->capture_default_str();
  heattree_settings& tree = options.heattree;
  for (auto [setting, value] : {std::pair("margin_percent", &tree.margin_percent), std::pair("back_percent", &tree.back_percent), std::pair("vain_percent", &tree.vain_percent), std::pair("trial_keep", &tree.trial_keep),
                                std::pair("recent_keep", &tree.recent_keep), std::pair("open_epochs", &tree.open_epochs),
                                std::pair("pay_epochs", &tree.pay_epochs), std::pair("slow_extra_ns", &tree.slow_extra_ns),
                                std::pair("swap_misses", &tree.swap_misses)})
    app.add_option(std::string("--") + setting, *value, "of heattree")->capture_default_str();
  app.add_option("--max-ranges", options.engine.max_estimated_ranges, "of heattree")->capture_default_str();
  app.add_flag("--verbose", options.verbose, "each tenth epoch; of a recorded run each");
  app.add_option("--record", options.record, "write the run there as a trace: one workload, one policy")->excludes(burst);
  std::string recorded, out;
  double within = 1;
  auto* trace = app.add_option("--trace", recorded, "replay a run that `./run bench --record` has recorded, beside what it was live");
  app.add_option("--out", out, "of --trace: also write JSON there")->needs(trace);
  app.add_option("--within", within, "of --trace: fail if live and replayed differ by more, at the end or as a whole")->needs(trace);
  CLI11_PARSE(app, argc, argv);

  if (!recorded.empty()) {
    nlohmann::json all = nlohmann::json::array();
    bool ok = true;
    for (const std::string& policy : policies) {
      const auto& result = all.emplace_back(replay_trace(recorded, policy, options));
      print_trace(result);
      for (const char* which : {"final", "mean"})
        ok &= std::abs(result.at(std::string("live_") + which + "_hit_ratio").get<double>() - result.at(std::string("replayed_") + which + "_hit_ratio").get<double>()) <= within;
    }
    if (!out.empty() && !(std::ofstream(out) << all.dump(1) << "\n").flush()) die({"cannot write " + out, "", 0});
    if (!ok) std::fprintf(stderr, "replay: live and replayed differ by more than %g\n", within);
    return ok ? 0 : 1;
  }

  if (!options.record.empty() && (names.size() * policies.size() != 1 || source != "samples"))
    die({"--record takes one workload and one policy, and samples", "for example: replay hot64k --policy heattree --record FILE", 0});
  options.samples = source != "abit";
  if (source != "samples") options.visits = visits / 100;
  if (options.samples) std::printf("s = %g", options.density);
  if (options.visits > 0) std::printf("%saccessed bits, entries read an epoch: %g %% of the pages", options.samples ? ", " : "", visits);
  std::printf(", %d epochs of %llu misses, fast tier %.0f %%; means of the last third\n", options.epochs, options.misses,
              100 * options.fast_share);
  std::printf("%-14s %-11s %6s %6s %7s %9s %8s %8s %10s\n", "workload", "policy", "share", "hit", "oracle", "moved %", "in vain",
              "90 % at", "engine ms");
  for (const std::string& name : names)
    for (const std::string& policy : policies) {
      Outcome o = replay(name, policy, options);
      const bool gainful = o.oracle > o.random + 0.02;  // else a share says nothing
      char share[16];
      std::snprintf(share, sizeof share, "%.3f", o.share);
      std::printf("%-14s %-11s %6s %6.3f %7.3f %9.3f %8.3f %8s %10.2f\n", name.c_str(), policy.c_str(),
                  gainful ? share : "-", o.hit, o.oracle, o.moved, o.vain,
                  gainful && o.reached >= 0 ? std::to_string(o.reached).c_str() : "-", o.engine_ms);
      std::fflush(stdout);
    }
  return 0;
}
