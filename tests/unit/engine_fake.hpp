// SPDX-License-Identifier: GPL-2.0-or-later
// A machine of the tests' own: spaces with page tables, two tiers of bounded
// size, and a policy made of functions. It keeps the contracts of abi.h and
// fails the test where the engine breaks one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "../../policies/heattree.h"
#include "../../policies/hyperplace.h"
#include "engine/engine.hpp"
#include "engine/scope.hpp"

namespace hypertier::fake {

inline constexpr __u64 kMiB = 1 << 20;
inline constexpr __u64 kGranulePages = HT_GRANULE_PAGES;

struct Page {
  ht_tier tier = HT_TIER_SLOW;
  __u32 order = 0;
  bool file = false;
  ht_move_result stuck = HT_MOVE_NONE;  // it answers every move with this
};

struct FakeSpace {
  std::set<__u32> pids;
  __u64 seq = 1;
  std::vector<ht_mapping> mappings;  // sorted
  std::map<__u64, Page> pages;       // by address of the folio's head
  __u64 rss_pages = 0;
};

class FakeMachine : public Machine {
 public:
  FakeMachine()
      : pages_(HT_PAGES_MAX), pairs_(HT_PAIRS_MAX), spaces_run_(std::make_unique<ht_spaces_run>()),
        walks_run_(std::make_unique<ht_walks_run>()) {}

  // ------------------------------------------------------------- the memory
  __u64 size_pages[HT_TIERS] = {1 << 20, 1 << 20};
  __u64 withheld_pages = 0;  // free pages of the fast tier that migration does not get
  std::map<__u64, FakeSpace> spaces_by_id;

  void map(__u64 space, __u64 start, __u64 end, __u32 flags = TIER_RANGE_ANON) {
    FakeSpace& s = spaces_by_id[space];
    s.mappings.push_back({start, end, flags, 0});
    std::sort(s.mappings.begin(), s.mappings.end(), [](auto& a, auto& b) { return a.start < b.start; });
    ++s.seq;
  }

  void unmap(__u64 space, __u64 start, __u64 end) {
    FakeSpace& s = spaces_by_id[space];
    std::vector<ht_mapping> left;
    for (const ht_mapping& m : s.mappings) {
      if (m.start < start) left.push_back({m.start, std::min(m.end, start), m.flags, 0});
      if (m.end > end) left.push_back({std::max(m.start, end), m.end, m.flags, 0});
    }
    s.mappings = left;
    auto first = s.pages.lower_bound(start);
    auto last = s.pages.lower_bound(end);
    for (auto p = first; p != last; ++p) account(s, p->second, -1);
    s.pages.erase(first, last);
    ++s.seq;
  }

  // Faults pages in: every folio of [start, end) of the given order.
  void populate(__u64 space, __u64 start, __u64 end, ht_tier tier, __u32 order = 0, bool file = false) {
    for (__u64 a = start; a < end; a += HT_PAGE_SIZE << order)
      add(spaces_by_id[space], a, {tier, order, file, HT_MOVE_NONE});
    EXPECT_LE(used(tier), size_pages[tier]);
  }

  __u64 used(ht_tier tier) const { return used_[tier]; }

  void remove(std::map<__u64, FakeSpace>::iterator space) {
    for (auto& p : space->second.pages) account(space->second, p.second, -1);
    spaces_by_id.erase(space);
  }

  __u64 resident(__u64 space, __u64 start, __u64 end, ht_tier tier) const {
    __u64 pages = 0;
    const FakeSpace& s = spaces_by_id.at(space);
    for (auto p = s.pages.lower_bound(start); p != s.pages.end() && p->first < end; ++p)
      if (p->second.tier == tier) pages += __u64{1} << p->second.order;
    return pages;
  }

  EpochInput input() const {
    EpochInput in;
    in.epoch_ns = 500'000'000;
    in.fast_tier_pages = size_pages[HT_TIER_FAST];
    in.fast_capacity_pages = size_pages[HT_TIER_FAST];
    in.fast_free_pages = size_pages[HT_TIER_FAST] - used(HT_TIER_FAST);
    in.slow_free_pages = size_pages[HT_TIER_SLOW] - used(HT_TIER_SLOW);
    in.cpus = 2;
    in.period = 64;
    return in;
  }

  // --------------------------------------------------------------- counters
  __u64 walked_pages = 0;
  __u64 spaces_asked = 0;
  __u64 lists_given = 0;
  __u32 mappings_max = HT_MAPPINGS_MAX;
  std::vector<ht_pair> last_pairs;  // of the last exchange run

  // ---------------------------------------------------------------- Machine
  ht_spaces_run& spaces() override { return *spaces_run_; }
  std::span<const ht_mapping> mappings() override { return mappings_; }
  ht_walks_run& walks() override { return *walks_run_; }
  std::span<const ht_page_t> pages() override { return pages_; }
  std::span<ht_pair> pairs() override { return pairs_; }

  Result<> run_spaces() override {
    mappings_.clear();
    EXPECT_LE(spaces_run_->nr, __u32{HT_SPACES_MAX});
    for (__u32 i = 0; i < spaces_run_->nr; ++i) {
      ht_space_req& req = spaces_run_->req[i];
      ++spaces_asked;
      req.error = 0;
      req.first = static_cast<__u32>(mappings_.size());
      req.count = 0;
      auto found = std::find_if(spaces_by_id.begin(), spaces_by_id.end(),
                                [&](auto& s) { return s.second.pids.contains(req.pid); });
      if (found == spaces_by_id.end() || (req.space && found->first != req.space)) {
        req.error = -ESRCH;
        continue;
      }
      req.space = found->first;
      const FakeSpace& s = found->second;
      req.tier_rss_pages = s.rss_pages;
      if (req.seq == s.seq) continue;
      if (mappings_.size() + s.mappings.size() > mappings_max) {
        req.error = -ENOSPC;
        continue;
      }
      req.seq = s.seq;
      req.count = static_cast<__u32>(s.mappings.size());
      mappings_.insert(mappings_.end(), s.mappings.begin(), s.mappings.end());
      ++lists_given;
    }
    spaces_run_->used = static_cast<__u32>(mappings_.size());
    return {};
  }

  Result<> run_walks() override {
    ht_walks_run& run = *walks_run_;
    run.pages_used = 0;
    EXPECT_LE(run.nr, __u32{HT_WALKS_MAX});
    for (__u32 i = 0; i < run.nr; ++i) {
      ht_walk& w = run.walk[i];
      EXPECT_LT(w.start, w.end);
      auto found = spaces_by_id.find(w.space);
      w.list_first = run.pages_used;
      w.list_count = 0;
      if (found == spaces_by_id.end() || !found->second.pids.contains(w.pid)) {
        w.error = -ESRCH;
        continue;
      }
      w.next = w.end;
      __u64 listed = 0;
      auto& pages = found->second.pages;
      for (auto p = pages.lower_bound(w.start); p != pages.end() && p->first < w.end; ++p) {
        bool list = p->second.tier == w.list_tier || w.list_tier == HT_TIERS;
        if (list && run.pages_used == HT_PAGES_MAX) {
          w.error = -ENOSPC;
          w.next = p->first;
          break;
        }
        if (list && w.list_max_pages && listed >= w.list_max_pages) {
          w.next = p->first;
          break;
        }
        ++walked_pages;
        __u64 n = __u64{1} << p->second.order;
        w.tier_pages[p->second.tier] += n;
        if (p->second.order >= 9) w.huge_pages += n;
        if (!list) continue;
        pages_[run.pages_used++] = p->first | p->second.order | (p->second.file ? HT_PAGE_FILE : 0) |
                                   (w.list_tier == HT_TIERS && p->second.tier == HT_TIER_FAST ? HT_PAGE_FAST : 0);
        ++w.list_count;
        listed += n;
      }
    }
    return {};
  }

  Result<> run_exchange(ht_exchange_run& run) override {
    EXPECT_GT(run.nr, 0u);
    last_pairs.assign(pairs_.begin(), pairs_.begin() + run.nr);
    auto find = [&](__u64 space, __u64 address, ht_tier from, __u8& result) -> Page* {
      auto s = spaces_by_id.find(space);
      if (s == spaces_by_id.end()) return result = HT_MOVE_GONE, nullptr;
      auto p = s->second.pages.find(address);
      if (p == s->second.pages.end()) return result = HT_MOVE_GONE, nullptr;
      if (p->second.tier != from) return result = HT_MOVE_ALREADY, nullptr;
      if (p->second.stuck != HT_MOVE_NONE) return result = static_cast<__u8>(p->second.stuck), nullptr;
      result = HT_MOVE_DONE;
      return &p->second;
    };
    auto fail = [&](const Page* page, __u8 result) { run.failed_pages[result] += page ? 1ull << page->order : 1; };
    auto migrate = [&](Page* page, ht_tier to, __u8& result) {
      __u64 n = 1ull << page->order;
      if (used_[to] + n + (to == HT_TIER_FAST ? withheld_pages : 0) > size_pages[to]) {
        result = HT_MOVE_NO_MEMORY;
        return fail(page, result);
      }
      used_[to] += n;
      used_[page->tier] -= n;
      page->tier = to;
      (to == HT_TIER_FAST ? run.promoted_pages : run.demoted_pages) += n;
      run.mover_pages[HT_MOVER_MIGRATE] += n;
    };
    for (__u32 i = 0; i < run.nr && run.flags & HT_EXCHANGE_SPLIT; ++i) {
      ht_pair& pair = pairs_[i];
      auto& pages = spaces_by_id.at(pair.hot_space).pages;
      auto p = pages.find(pair.hot_addr);
      pair.hot_result = p == pages.end() ? HT_MOVE_GONE : p->second.order == 0 ? HT_MOVE_MISMATCH : HT_MOVE_DONE;
      if (pair.hot_result != HT_MOVE_DONE) continue;
      const __u64 n = 1ull << p->second.order;
      p->second.order = 0;
      const Page single = p->second;
      for (__u64 i2 = 1; i2 < n; ++i2) pages[pair.hot_addr + i2 * HT_PAGE_SIZE] = single;
      run.split_pages += n;
    }
    if (run.flags & HT_EXCHANGE_SPLIT) return {};
    for (__u32 i = 0; i < run.nr; ++i) {
      ht_pair& pair = pairs_[i];
      EXPECT_TRUE(pair.hot_addr || pair.cold_addr);
      Page* hot = pair.hot_addr ? find(pair.hot_space, pair.hot_addr, HT_TIER_SLOW, pair.hot_result) : nullptr;
      Page* cold = pair.cold_addr ? find(pair.cold_space, pair.cold_addr, HT_TIER_FAST, pair.cold_result) : nullptr;
      if (pair.hot_addr && !hot) fail(nullptr, pair.hot_result);
      if (pair.cold_addr && !cold) fail(nullptr, pair.cold_result);
      if (pair.hot_addr && pair.cold_addr) {
        if (!hot || !cold) {
          if (hot) fail(hot, pair.hot_result = HT_MOVE_PARTNER);
          if (cold) fail(cold, pair.cold_result = HT_MOVE_PARTNER);
          continue;
        }
        EXPECT_EQ(hot->order, cold->order);
        EXPECT_FALSE(hot->file || cold->file);
        std::swap(hot->tier, cold->tier);
        pair.mover = HT_MOVER_EXCHANGE;
        __u64 n = 1ull << hot->order;
        run.promoted_pages += n;
        run.demoted_pages += n;
        run.mover_pages[HT_MOVER_EXCHANGE] += 2 * n;
        ++run.exchanged_pairs;
      } else if (hot) {
        migrate(hot, HT_TIER_FAST, pair.hot_result);
      } else if (cold) {
        migrate(cold, HT_TIER_SLOW, pair.cold_result);
      }
    }
    EXPECT_LE(used_[HT_TIER_FAST], size_pages[HT_TIER_FAST]);
    EXPECT_LE(used_[HT_TIER_SLOW], size_pages[HT_TIER_SLOW]);
    ++run.batches;
    return {};
  }

 private:
  void account(FakeSpace& space, const Page& page, int sign) {
    __u64 pages = (__u64{1} << page.order) * static_cast<__u64>(sign);
    used_[page.tier] += pages;
    space.rss_pages += pages;
  }
  void add(FakeSpace& space, __u64 address, const Page& page) {
    ASSERT_TRUE(space.pages.emplace(address, page).second);
    account(space, page, 1);
  }

  __u64 used_[HT_TIERS] = {0, 0};
  std::vector<ht_mapping> mappings_;
  std::vector<ht_page_t> pages_;
  std::vector<ht_pair> pairs_;
  std::unique_ptr<ht_spaces_run> spaces_run_;
  std::unique_ptr<ht_walks_run> walks_run_;
};

// A policy made of functions; any number of scopes may have the same.
struct FakePolicy {
  std::function<void(tier_range&, const tier_scope&)> classify = [](tier_range&, const tier_scope&) {};
  std::function<void(const tier_scope&)> epoch_begin;
  std::function<bool(tier_range&, const tier_range&)> admit;
  std::function<void(const tier_result&)> moved;
  int classify_status = 0;
  bool estimated = false;  // the policy's flag

  void use_hyperplace(hyperplace_settings settings = HYPERPLACE_DEFAULTS) {
    classify = [settings](tier_range& r, const tier_scope& scope) {
      r.heat = hyperplace_heat(&r, &settings);
      r.action = hyperplace_action(&r, scope.cpus, &settings);
    };
    admit = [settings](const tier_range& hot, const tier_range& cold) {
      return hyperplace_admit(&hot, &cold, &settings) != 0;
    };
    epoch_begin = {};
    estimated = false;
  }

  heattree_trial trial{};
  void use_heattree(heattree_settings settings = HEATTREE_DEFAULTS) {
    trial = {};
    epoch_begin = [this, settings](const tier_scope& scope) {
      judged = scope;
      heattree_judge(&trial, &scope, &settings);
    };
    classify = [](tier_range& r, const tier_scope&) { r.heat = heattree_heat(&r); };
    admit = [this, settings](tier_range& hot, const tier_range& cold) {
      return heattree_admit(&hot, &cold, &judged, &trial, &settings) != 0;
    };
    estimated = true;
  }

  tier_scope judged{};   // of heattree's last epoch
  __u64 classified = 0;  // epochs
  __u64 generation = 1;  // another one: another policy
};

class FakeCaller : public PolicyCaller {
 public:
  explicit FakeCaller(FakePolicy& policy) : policy_(policy), call_(std::make_unique<ht_call>()) {}

  std::span<tier_range> ranges() override { return call_->ranges; }
  std::span<tier_pair> pairs() override { return call_->pairs; }
  std::span<tier_result> results() override { return call_->results; }

  Result<> run_classify(ht_run& run) override {
    if (!run.first) ++policy_.classified;
    EXPECT_LE(run.nr, __u32{HT_CALL_RANGES});
    run.status = policy_.classify_status;
    if (run.status) return {};
    run.generation = policy_.generation;
    if (!run.first && policy_.epoch_begin) policy_.epoch_begin(run.scope);
    for (__u32 i = 0; i < run.nr; ++i) {
      tier_range before = call_->ranges[i];
      policy_.classify(call_->ranges[i], run.scope);
      tier_range after = call_->ranges[i];
      before.heat = after.heat;
      before.action = after.action;
      EXPECT_EQ(std::memcmp(&before, &after, sizeof(before)), 0);
    }
    run.done = run.nr;
    return {};
  }

  Result<> run_admit(ht_run& run) override {
    run.generation = policy_.generation;
    for (__u32 i = 0; i < run.nr; ++i) {
      tier_pair& pair = call_->pairs[i];
      EXPECT_GT(pair.pages, 0u);
      EXPECT_LT(pair.hot.start, pair.hot.end);
      if (pair.cold.start != pair.cold.end) {
        EXPECT_GT(pair.hot.heat, pair.cold.heat);
      }
      pair.admitted = !policy_.admit || policy_.admit(pair.hot, pair.cold);
    }
    return {};
  }

  Result<> run_moved(ht_run& run) override {
    run.generation = policy_.generation;
    for (__u32 i = 0; i < run.nr && policy_.moved; ++i) policy_.moved(call_->results[i]);
    return {};
  }

 private:
  FakePolicy& policy_;
  std::unique_ptr<ht_call> call_;
};

class FakeSource : public SampleSource {
 public:
  void touch(__u64 space, __u64 address, __u32 samples = 1, bool store = false) {
    ht_granule& g = granules[{space, address >> HT_GRANULE_SHIFT}];
    g.space = space;
    g.granule = address >> HT_GRANULE_SHIFT;
    g.samples += samples;
    if (store) g.stores += samples;
    unsigned page = (address >> HT_PAGE_SHIFT) & (HT_GRANULE_PAGES - 1);
    g.pages[page / 2] += page & 1 ? samples << 16 : samples;
  }

  Result<> drain(const std::function<void(const ht_granule&)>& fold) override {
    for (const auto& g : granules) fold(g.second);
    granules.clear();
    return {};
  }
  void drain_bits(const std::function<void(const ht_bits&)>& fold) override {
    for (const ht_bits& b : bits) fold(b);
    bits.clear();
  }
  void manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) override {
    managed[space] = {pid, {mappings.begin(), mappings.end()}};
    if (mappings.empty()) managed.erase(space);
  }
  void aim(__u64 interval_ns) override { aimed_ns = interval_ns; }
  void forget(__u64 space, __u64 start, __u64 end) override { forgotten.push_back({space, start, end}); }
  ht_sampler_stats stats() override { return {}; }

  struct Forgotten {
    __u64 space, start, end;
    bool operator==(const Forgotten&) const = default;
  };
  std::map<std::pair<__u64, __u64>, ht_granule> granules;
  std::vector<Forgotten> forgotten;
  std::vector<ht_bits> bits;
  std::map<__u64, std::pair<__u32, std::vector<ht_mapping>>> managed;  // by space
  __u64 aimed_ns = 0;
};

inline ht_space_event event(ht_space_event_kind kind, __u32 pid, __u64 space, const char* comm = "work") {
  ht_space_event e{};
  e.kind = kind;
  e.pid = pid;
  e.space = space;
  e.cgroup_id = 1;
  std::strncpy(e.comm, comm, sizeof(e.comm) - 1);
  return e;
}

// An engine on a fake machine.
struct Rig {
  explicit Rig(EngineSettings settings = {})
      : engine(machine, source, settings), root(engine.add_scope(1, "/", std::make_unique<FakeCaller>(policy))) {}

  void start(__u32 pid, __u64 space, ht_space_event_kind kind = HT_SPACE_FORK) {
    for (auto& s : machine.spaces_by_id) s.second.pids.erase(pid);
    machine.spaces_by_id[space].pids.insert(pid);
    engine.space_event(event(kind, pid, space));
  }

  void stop(__u32 pid) {
    for (auto s = machine.spaces_by_id.begin(); s != machine.spaces_by_id.end();) {
      auto space = s++;
      space->second.pids.erase(pid);
      if (space->second.pids.empty()) machine.remove(space);
    }
    engine.space_event(event(HT_SPACE_EXIT, pid, 0));
  }

  EpochReport epoch() { return epoch(machine.input()); }
  EpochReport epoch(EpochInput input) {
    input.estimated = policy.estimated;
    auto report = engine.epoch(root, input);
    EXPECT_TRUE(report.has_value()) << (report ? "" : report.error().message);
    return report.value_or(EpochReport{});
  }

  std::vector<RangeView> ranges(std::optional<__u32> pid = {}) const { return engine.ranges(root, pid); }

  FakeMachine machine;
  FakePolicy policy;
  FakeSource source;
  Engine engine;
  Scope& root;
};

}  // namespace hypertier::fake
