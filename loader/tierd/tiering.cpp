// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/tiering.hpp"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

#include "tierd/protocol.hpp"

namespace hypertier {
namespace {

constexpr std::size_t kDensityEpochs = 20;
// What sampling costs is judged over at least so long.
constexpr std::uint64_t kJudgeNs = 400'000'000;

std::string abi_text(std::uint32_t abi) { return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff); }

}  // namespace

std::uint64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000ULL + static_cast<std::uint64_t>(now.tv_nsec);
}

Result<std::array<TierPages, HT_TIERS>> tier_pages(const Tiers& tiers, const Roots& roots) {
  std::array<TierPages, HT_TIERS> pages{};
  for (std::size_t tier = 0; tier < HT_TIERS; ++tier) {
    for (const int node : tiers.nodes[tier]) {
      const auto path = roots.sys / "devices/system/node" / ("node" + std::to_string(node)) / "meminfo";
      std::ifstream file(path);
      if (!file) return fail_errno("cannot open " + path.string(), errno);
      // "Node 0 MemTotal:  123 kB"
      for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string skip, key;
        std::uint64_t kib = 0;
        words >> skip >> skip >> key >> kib;
        const std::uint64_t count = kib / (HT_PAGE_SIZE / 1024);
        if (key == "MemTotal:") pages[tier].total += count;
        else if (key == "MemFree:") pages[tier].free += count;
        else if (key == "AnonPages:" || key == "FilePages:") pages[tier].used += count;
      }
    }
  }
  return pages;
}

Result<PolicyObject> open_default_policy() {
  const auto path = installed_policies() / (std::string(kDefaultPolicy) + ".bpf.o");
  Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file)
    return fail_errno("the default policy " + std::string(kDefaultPolicy) + " is not installed: cannot open " + path.string(),
                      errno, "install it beside tierd, or load a policy by its file");
  auto bytes = read_policy_file(file.get(), path.string());
  if (!bytes) return std::unexpected(bytes.error());
  return PolicyObject::open(std::move(*bytes), kDefaultPolicy);
}

Result<std::unique_ptr<Tiering>> Tiering::start(const TieringOptions& options, PolicyObject policy) {
  std::unique_ptr<Tiering> tiering(new Tiering());
  Tiering& t = *tiering;

  auto tiers = discover_tiers(options.tiers);
  if (!tiers) return std::unexpected(tiers.error());
  t.tiers_ = std::move(*tiers);

  auto module = Module::open();
  if (!module) return std::unexpected(module.error());
  t.module_.emplace(std::move(*module));
  auto info = t.module_->info();
  if (!info) return std::unexpected(info.error());
  t.module_info_ = *info;
  if (info->abi >> 16 != HT_ABI_MAJOR)
    return fail("hypertier.ko speaks ABI " + abi_text(info->abi) + ", but this tierd " + abi_text(HT_ABI),
                "load the hypertier.ko of this release: rmmod hypertier, then modprobe hypertier");
  if (auto set = t.module_->set_tiers(t.tiers_.masks()); !set) return std::unexpected(set.error());

  if (auto loaded = policy.load(kRootCgroupId); !loaded) return std::unexpected(loaded.error());
  t.policy_ = std::move(policy);

  auto source = choose_source(options.sampling, options.source);
  if (!source) return std::unexpected(source.error());
  t.source_ = std::move(*source);

  AdapterOptions adapter_options;
  adapter_options.granules = options.granules;
  if (info->movers == 1U << HT_MOVER_SYSCALL)
    adapter_options.syscall_nodes = {t.tiers_.nodes[HT_TIER_FAST].front(), t.tiers_.nodes[HT_TIER_SLOW].front()};
  if (t.source_.events.empty()) adapter_options.bits_cpu_share = options.cpu_share.value_or(RateControl::kDefaultShare);
  auto adapter = Adapter::open(adapter_options);
  if (!adapter) return std::unexpected(adapter.error());
  t.adapter_ = std::move(*adapter);

  t.settings_ = std::make_unique<KernelSettings>(&*t.module_);
  if (auto off = t.settings_->seat(); !off) return std::unexpected(off.error());

  t.engine_ = std::make_unique<Engine>(t.adapter_->machine(), t.adapter_->samples());
  t.cpus_ = static_cast<std::uint32_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  if (auto started = t.adapter_->start(t.source_); !started) return std::unexpected(started.error());
  auto seat = Seat::take(t.policy_);
  if (!seat) return std::unexpected(seat.error());
  t.seat_.emplace(std::move(*seat));
  if ((t.source_.holds_budget && options.hold_cpu_share) || options.cpu_share) t.cpu_share_max_ = options.cpu_share.value_or(RateControl::kDefaultShare);
  // Accessed bits hold their budget themselves.
  t.rate_ = RateControl(t.source_.events.empty() ? 0 : t.cpu_share_max_, t.source_.own_period, t.source_.period);
  t.load_default();
  t.last_epoch_ns_ = now_ns();
  return tiering;
}

Tiering::~Tiering() {
  // The order of design: the policy leaves, sampling ends, then the kernel's
  // own tiering comes back. A failed restore is left to the module, which
  // restores when its descriptor closes.
  seat_.reset();
  engine_.reset();
  adapter_.reset();
  if (settings_) (void)settings_->restore();
}

void Tiering::load_default() {
  if (default_) return;
  auto opened = open_default_policy();
  if (opened && opened->load(kRootCgroupId)) default_.emplace(std::move(*opened));
}

Result<> Tiering::swap(PolicyObject policy) {
  if (auto loaded = policy.load(kRootCgroupId); !loaded) return loaded;
  if (seat_) {
    if (auto replaced = seat_->replace(policy); !replaced) return replaced;
  } else {
    auto seat = Seat::take(policy);
    if (!seat) return std::unexpected(seat.error());
    seat_.emplace(std::move(*seat));
  }
  policy_ = std::move(policy);
  ++generation_;
  load_default();
  return {};
}

Result<> Tiering::take_events() {
  // After an overflow the running processes are listed again: who is not among
  // them ended unseen.
  std::optional<std::set<std::pair<__u32, __u64>>> unseen;
  auto taken = adapter_->events(
      [&](const ht_space_event& event) {
        if (unseen) unseen->erase({event.pid, event.space});
        engine_->space_event(event);
      },
      [&] {
        unseen.emplace();
        for (const auto& process : engine_->processes()) unseen->insert({process.pid, process.space});
      });
  if (unseen) {
    for (const auto& [pid, space] : *unseen) {
      ht_space_event event{};
      event.kind = HT_SPACE_EXIT;
      event.pid = pid;
      event.space = space;
      engine_->space_event(event);
    }
  }
  return taken;
}

bool Tiering::eject(const ht_run& run, std::optional<PolicyExit>& ejected) {
  PolicyExit exit;
  exit.kind = "ejected";
  exit.policy = policy_.info().name;
  exit.epoch = run.scope.epoch;
  exit.message = "status " + std::to_string(run.status) + " after " + std::to_string(run.done) + " of " +
                 std::to_string(run.nr) + " ranges";
  switch (run.status) {
    case -ETIME:
      exit.code = "timeout";
      exit.reason = "policy " + exit.policy + " took " + std::to_string(run.policy_ns / 1'000'000) +
                    " ms for an epoch's ranges, more than its " + std::to_string(run.budget_ns / 1'000'000) + " ms";
      break;
    case -EINVAL:
      exit.code = "invalid_action";
      exit.reason = "policy " + exit.policy + " answered with an action that does not exist";
      break;
    default:
      exit.code = "empty_seat";
      exit.reason = "the seat was found empty: policy " + exit.policy + " had left";
      ++empty_epochs_total_;
  }
  ejected = std::move(exit);
  if (!default_) {
    seat_.reset();
    return false;
  }
  if (run.status == -ENOENT) {
    seat_.reset();  // a link that holds no seat any more
    if (auto seat = Seat::take(*default_)) seat_.emplace(std::move(*seat));
  } else if (!seat_->replace(*default_)) {
    seat_.reset();
  }
  if (!seat_) return false;
  policy_ = std::move(*default_);
  default_.reset();
  ++generation_;
  return true;
}

// BPF programs are timed by the kernel, the interrupt around them was by the probe.
std::uint64_t Tiering::sampling_ns() const {
  const SamplerCost cost = adapter_->cost();
  if (source_.events.empty()) return cost.ns_total;
  return cost.ns_total + adapter_->samples().stats().samples_total * source_.probe.sample_ns;
}

void Tiering::hold_cpu_share(std::uint64_t elapsed_ns) {
  unjudged_ns_ += elapsed_ns;
  if (unjudged_ns_ < kJudgeNs) return;
  const std::uint64_t ns = sampling_ns();
  const std::uint64_t period = rate_.update(ns - std::exchange(sampling_ns_, ns), std::exchange(unjudged_ns_, 0), cpus_);
  if (period != source_.period && adapter_->set_period(period)) source_.period = period;
}

Result<> Tiering::epoch(std::optional<PolicyExit>& ejected) {
  if (auto taken = take_events(); !taken) return taken;
  const auto pages = tier_pages(tiers_);
  if (!pages) return std::unexpected(pages.error());
  const auto& fast = (*pages)[HT_TIER_FAST];
  const auto& slow = (*pages)[HT_TIER_SLOW];

  const std::uint64_t now = now_ns();
  EpochInput input;
  input.epoch_ns = now - std::exchange(last_epoch_ns_, now);
  input.fast_tier_pages = fast.total;
  input.fast_free_pages = fast.free;
  input.slow_free_pages = slow.free;
  // What the kernel itself holds of the fast tier is not to be had.
  input.fast_capacity_pages = std::min(fast.total, fast.free + fast.used);
  input.tier_pages[HT_TIER_FAST] = fast.used;
  input.tier_pages[HT_TIER_SLOW] = slow.used;
  input.cpus = cpus_;
  input.period = static_cast<std::uint32_t>(std::min<std::uint64_t>(source_.period, UINT32_MAX));
  input.budget_ns = static_cast<std::uint64_t>(epoch_ms()) * 1'000'000ULL;
  input.moves = (policy_.info().flags & HT_POLICY_NO_MOVES) == 0;
  input.estimated = (policy_.info().flags & HT_POLICY_ESTIMATED) != 0;
  input.policy_failed = [&](const ht_run& run) { return eject(run, ejected); };

  auto report = engine_->epoch(input);
  if (!report) return std::unexpected(report.error());
  report_ = std::move(*report);
  hold_cpu_share(input.epoch_ns);
  densities_.push_back(fast.total != 0 ? static_cast<double>(report_->scope.samples) / static_cast<double>(fast.total) : 0);
  if (densities_.size() > kDensityEpochs) densities_.pop_front();
  return {};
}

double Tiering::density() const {
  if (densities_.empty()) return 0;
  return std::accumulate(densities_.begin(), densities_.end(), 0.0) / static_cast<double>(densities_.size());
}

}  // namespace hypertier
