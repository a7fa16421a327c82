// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/abit.hpp"

#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>

#include "guest.skel.h"

namespace hypertier {
namespace {

// Bits that nobody has drained for so long are dropped: memory stays bounded.
constexpr std::size_t kReadMax = 1 << 16;

std::uint64_t thread_cpu_ns() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000ULL + static_cast<std::uint64_t>(now.tv_nsec);
}

}  // namespace

Result<std::unique_ptr<Abit>> Abit::open(Programs programs, double cpu_share) {
  const double cpus = static_cast<double>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  std::unique_ptr<Abit> abit(new Abit(std::move(programs), static_cast<std::uint64_t>(cpu_share * cpus * 1e9)));
  auto map = MappedMap::map(abit->programs_->maps.checks);
  if (!map) return std::unexpected(map.error());
  abit->map_ = std::move(*map);
  return abit;
}

Result<> Abit::pin(const std::filesystem::path& dir) {
  return hypertier::pin(bpf_map__fd(programs_->maps.checks), dir / "ht_checks");
}

Abit::~Abit() { stop(); }

void Abit::start() {
  if (!running()) thread_ = std::jthread([this](std::stop_token stop) { loop(std::move(stop)); });
}

void Abit::stop() {
  thread_ = {};  // asks it to stop, and waits
  std::lock_guard lock(mutex_);
  read_.clear();
}

Result<> Abit::step(ht_check_phase phase) {
  run().phase = phase;
  LIBBPF_OPTS(bpf_test_run_opts, options);
  if (int err = bpf_prog_test_run_opts(bpf_program__fd(programs_->progs.bits), &options); err < 0)
    return fail_errno("accessed bits cannot be read", -err);
  if (int err = static_cast<int>(options.retval); err < 0) return fail_errno("reading accessed bits failed", -err);
  return {};
}

void Abit::loop(std::stop_token stop) {
  prctl(PR_SET_NAME, "tierd-abit");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // intervals may be as short as 200 us
  using Clock = std::chrono::steady_clock;
  const auto after = [](Clock::time_point start, std::uint64_t ns) { return start + std::chrono::nanoseconds(ns); };
  std::unique_lock lock(mutex_);
  while (wake_.wait(lock, stop, [&] { return !plan_.empty(); })) {
    const auto start = Clock::now();
    const std::uint64_t cpu_before = thread_cpu_ns();
    const AbitPlan::Cycle cycle = plan_.next_cycle();
    const auto targets = plan_.take(cycle.granules);
    // The map belongs to this thread: the engine need not wait for a step.
    lock.unlock();
    ht_bits_run& run = this->run();
    run.nr = static_cast<__u32>(targets.size());
    for (std::size_t i = 0; i < targets.size(); ++i) {
      ht_check& check = run.check[i];
      check = {};
      check.bits.space = targets[i].space;
      check.bits.granule = targets[i].granule;
      check.pid = targets[i].pid;
    }
    auto done = step(HT_CHECK_CLEAR);
    std::uint64_t visits = run.visits, read_ns = run.ns;
    const std::uint64_t flush_calls = run.flush_calls;
    lock.lock();
    wake_.wait_until(lock, stop, after(start, cycle.interval_ns), [] { return false; });
    lock.unlock();
    // Also when asked to stop: it puts back what was cleared.
    if (done) done = step(HT_CHECK_TEST);
    visits += run.visits;
    read_ns += run.ns;
    lock.lock();

    std::uint64_t pages = 0, pages_set = 0;
    for (__u32 i = 0; i < run.nr; ++i) {
      const ht_check& check = run.check[i];
      if (!done || check.error) continue;
      std::uint64_t checked = 0, set = 0;
      for (std::size_t word = 0; word < std::size(check.bits.checked); ++word) {
        checked += static_cast<unsigned>(std::popcount(check.bits.checked[word]));
        set += static_cast<unsigned>(std::popcount(check.bits.checked[word] & check.bits.set[word]));
      }
      plan_.mapped(check.bits.space, check.bits.granule, checked != 0);
      pages += checked;
      pages_set += set;
      if (read_.size() < kReadMax) read_.push_back(check.bits);
    }
    error_ = done ? std::nullopt : std::optional(done.error());
    const std::uint64_t cpu_ns = thread_cpu_ns() - cpu_before;
    ++stats_.cycles_total;
    stats_.granules_total += run.nr;
    stats_.visits_total += visits;
    stats_.flush_calls_total += flush_calls;
    stats_.pages_total += pages;
    stats_.pages_set_total += pages_set;
    stats_.cpu_ns_total += cpu_ns;
    stats_.read_ns_total += read_ns;
    const std::uint64_t next = plan_.spent(cycle, run.nr, cpu_ns, pages ? static_cast<double>(pages_set) / static_cast<double>(pages) : 0);
    wake_.wait_until(lock, stop, after(start, next), [] { return false; });
    if (stop.stop_requested()) break;
  }
}

Result<> Abit::drain(const std::function<void(const ht_granule&)>&) {
  std::lock_guard lock(mutex_);
  if (error_) return std::unexpected(*error_);
  return {};
}

void Abit::drain_bits(const std::function<void(const ht_bits&)>& fold) {
  std::vector<ht_bits> read;
  {
    std::lock_guard lock(mutex_);
    read.swap(read_);
  }
  for (const ht_bits& bits : read) fold(bits);
}

void Abit::manage(__u64 space, __u32 pid, std::span<const ht_mapping> mappings) {
  std::lock_guard lock(mutex_);
  plan_.manage(space, pid, mappings);
  wake_.notify_all();
}

void Abit::aim(__u64 interval_ns) {
  std::lock_guard lock(mutex_);
  plan_.aim(interval_ns);
}

BitsStats Abit::bits_stats() const {
  std::lock_guard lock(mutex_);
  BitsStats stats = stats_;
  stats.interval_ns = plan_.interval_ns();
  stats.passes_total = plan_.passes_total();
  return stats;
}

}  // namespace hypertier
