// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/mover.hpp"

#include <bpf/btf.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "adapter/syscall_mover.hpp"
#include "guest.skel.h"

namespace hypertier {
namespace {

// The CPU that a thread (of a process the main one) ran on last; -1: it is gone.
int last_cpu(__u32 pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(file, text);
  const auto name_end = text.rfind(')');
  if (name_end == std::string::npos) return -1;
  constexpr int kProcessor = 39, kAfterName = 3;  // proc(5)
  auto at = name_end;
  for (int field = kAfterName; field <= kProcessor && at != std::string::npos; field++) at = text.find(' ', at + 1);
  return at == std::string::npos ? -1 : std::atoi(text.c_str() + at);
}

// The kernel batches the flushes of an mm that has run on another CPU than the
// one that unmaps; one that ran here alone it flushes page by page. So pages are
// moved from the CPUs that the processes of the fewest of them were on last. Nor
// from one that another scope's policy runs on: it may not give it up for seconds.
// Room for a process is made on its own CPU: what is freed stays in lists by CPU at
// first, which hold thousands of pages, and from which nobody else allocates.
class MovingCpu {
 public:
  MovingCpu(std::span<const ht_pair> pairs, const std::set<pid_t>& calling) {
    if (sched_getaffinity(0, sizeof before_, &before_)) return;
    const auto is_room = [](const ht_pair& pair) { return !pair.hot_addr && pair.hot_pid; };
    if (!pairs.empty() && std::ranges::all_of(pairs, is_room)) {
      const int cpu = last_cpu(pairs.front().hot_pid);
      if (cpu < 0 || !CPU_ISSET(static_cast<std::size_t>(cpu), &before_)) return;
      cpu_set_t there;
      CPU_ZERO(&there);
      CPU_SET(static_cast<std::size_t>(cpu), &there);
      moved_ = sched_setaffinity(0, sizeof there, &there) == 0;
      return;
    }
    std::map<__u32, std::size_t> pages_of;
    for (const ht_pair& pair : pairs) {
      if (pair.hot_addr) ++pages_of[pair.hot_pid];
      if (pair.cold_addr) ++pages_of[pair.cold_pid];
    }
    cpu_set_t others = before_;
    for (pid_t thread : calling)
      if (int cpu = last_cpu(static_cast<__u32>(thread)); cpu >= 0) CPU_CLR(static_cast<std::size_t>(cpu), &others);
    std::map<int, std::size_t> pages_on;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(static_cast<std::size_t>(cpu), &others)) pages_on[cpu] = 0;
    for (auto [pid, pages] : pages_of)
      if (auto on = pages_on.find(last_cpu(pid)); on != pages_on.end()) on->second += pages;
    std::size_t fewest = SIZE_MAX;
    for (auto [cpu, pages] : pages_on) fewest = std::min(fewest, pages);
    if (auto here = pages_on.find(sched_getcpu()); here != pages_on.end() && here->second == fewest) return;
    for (auto [cpu, pages] : pages_on)
      if (pages > fewest) CPU_CLR(static_cast<std::size_t>(cpu), &others);
    moved_ = CPU_COUNT(&others) > 0 && CPU_COUNT(&others) < CPU_COUNT(&before_) && sched_setaffinity(0, sizeof others, &others) == 0;
  }
  ~MovingCpu() {
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
  }
  MovingCpu(const MovingCpu&) = delete;
  MovingCpu& operator=(const MovingCpu&) = delete;

 private:
  cpu_set_t before_;
  bool moved_ = false;
};

}  // namespace

Result<std::unique_ptr<Mover>> Mover::open(Programs programs, const std::optional<std::array<int, HT_TIERS>>& syscall_nodes) {
  std::unique_ptr<Mover> mover(new Mover(std::move(programs)));
  mover->syscall_nodes_ = syscall_nodes;
  auto& maps = mover->programs_->maps;
  for (auto [mapped, map] :
       {std::pair(&mover->spaces_, maps.spaces), std::pair(&mover->mappings_, maps.mappings),
        std::pair(&mover->walks_, maps.walks), std::pair(&mover->pages_, maps.pages),
        std::pair(&mover->pairs_, maps.pairs), std::pair(&mover->exchange_, maps.exchange)}) {
    auto result = MappedMap::map(map);
    if (!result) return std::unexpected(result.error());
    *mapped = std::move(*result);
  }
  return mover;
}

Result<> Mover::pin(const std::filesystem::path& dir) {
  auto& maps = programs_->maps;
  for (auto [name, map] : {std::pair("ht_spaces", maps.spaces), std::pair("ht_mappings", maps.mappings),
                           std::pair("ht_walks", maps.walks), std::pair("ht_pages", maps.pages),
                           std::pair("ht_pairs", maps.pairs), std::pair("ht_exchange", maps.exchange)})
    if (auto pinned = hypertier::pin(bpf_map__fd(map), dir / name); !pinned) return pinned;
  pins_ = dir;
  return {};
}

namespace {

Result<> run(const bpf_program* program, bpf_test_run_opts& options) {
  std::string what = std::string("the BPF run ") + bpf_program__name(program);
  if (int err = bpf_prog_test_run_opts(bpf_program__fd(program), &options); err < 0)
    return fail_errno(what + " cannot be made", -err);
  if (int err = static_cast<int>(options.retval); err < 0) return fail_errno(what + " failed", -err);
  return {};
}

Result<> run(const bpf_program* program) {
  LIBBPF_OPTS(bpf_test_run_opts, options);
  return run(program, options);
}

// Of this thread. What others do on its CPU meanwhile is not what moving costs, and
// policies weigh that cost.
std::uint64_t cpu_ns() {
  timespec used{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return static_cast<std::uint64_t>(used.tv_sec) * 1'000'000'000ULL + static_cast<std::uint64_t>(used.tv_nsec);
}

}  // namespace

Result<> Mover::run_spaces() { return run(programs_->progs.spaces_run); }
Result<> Mover::run_walks() { return run(programs_->progs.walk); }

Result<> Mover::run_exchange(ht_exchange_run& header) {
  std::set<pid_t> calling;
  {
    std::lock_guard held(callers_lock_);
    calling = calling_;
  }
  const MovingCpu cpu(pairs().first(header.nr), calling);
  const std::uint64_t start_ns = cpu_ns();
  if (syscall_nodes_) {
    move_by_syscall(pairs().first(std::min<std::size_t>(header.nr, HT_PAIRS_MAX)), *syscall_nodes_, header);
    header.ns = cpu_ns() - start_ns;
    return {};
  }
  *exchange_.as<ht_exchange_run>() = header;
  auto done = run(programs_->progs.exchange_run);
  header = *exchange_.as<ht_exchange_run>();
  header.ns = cpu_ns() - start_ns;
  return done;
}

// The ht_call map of one scope.
class Caller final : public PolicyCaller {
 public:
  Caller(Mover& mover, __u32 number, __u64 cgroup_id) : mover_(mover), at_{number}, cgroup_id_(cgroup_id) {}
  ~Caller() override {
    if (map_ && !mover_.pins_.empty()) unlink(pin_path().c_str());
    if (map_) bpf_map_delete_elem(bpf_map__fd(mover_.programs_->maps.calls), &at_.number);
    if (call_) munmap(call_, kBytes);
    std::lock_guard held(mover_.callers_lock_);
    mover_.numbers_[at_.number] = false;
  }

  Result<> make() {
    // Its type is told, so that who looks at it sees fields and not bytes.
    const btf* types = bpf_object__btf(mover_.programs_->obj);
    const __s32 key = btf__find_by_name_kind(types, "unsigned int", BTF_KIND_INT);
    const __s32 value = btf__find_by_name_kind(types, "ht_call", BTF_KIND_STRUCT);
    if (key < 0 || value < 0) return fail_errno("the mover's BTF lacks struct ht_call", ENOENT);
    LIBBPF_OPTS(bpf_map_create_opts, options, .btf_fd = static_cast<__u32>(bpf_object__btf_fd(mover_.programs_->obj)),
                .btf_key_type_id = static_cast<__u32>(key), .btf_value_type_id = static_cast<__u32>(value),
                .map_flags = BPF_F_MMAPABLE);
    Fd map(bpf_map_create(BPF_MAP_TYPE_ARRAY, "ht_call", sizeof(__u32), sizeof(ht_call), 1, &options));
    if (!map) return fail_errno("cannot make a scope's map", errno);
    void* call = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, map.get(), 0);
    if (call == MAP_FAILED) return fail_errno("cannot mmap a scope's map", errno);
    call_ = static_cast<ht_call*>(call);
    int fd = map.get();
    if (int err = bpf_map_update_elem(bpf_map__fd(mover_.programs_->maps.calls), &at_.number, &fd, BPF_ANY); err < 0)
      return fail_errno("cannot enter a scope's map", -err);
    map_ = std::move(map);
    return mover_.pins_.empty() ? Result<>() : hypertier::pin(map_.get(), pin_path());
  }

  std::span<tier_range> ranges() override { return call_->ranges; }
  std::span<tier_pair> pairs() override { return call_->pairs; }
  std::span<tier_result> results() override { return call_->results; }
  Result<> run_classify(ht_run& header) override { return ask(mover_.programs_->progs.classify, header); }
  Result<> run_admit(ht_run& header) override { return ask(mover_.programs_->progs.admit, header); }
  Result<> run_moved(ht_run& header) override { return ask(mover_.programs_->progs.moved, header); }

 private:
  std::filesystem::path pin_path() const { return mover_.pins_ / ("ht_call_" + std::to_string(cgroup_id_)); }

  static constexpr std::size_t kBytes = (sizeof(ht_call) + HT_PAGE_SIZE - 1) & ~(HT_PAGE_SIZE - 1);

  Result<> ask(const bpf_program* program, ht_run& header) {
    header.status = 0;
    call_->run = header;
    LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = &at_, .ctx_size_in = sizeof(at_));
    {
      std::lock_guard held(mover_.callers_lock_);
      mover_.calling_.insert(gettid());
    }
    auto done = run(program, options);
    {
      std::lock_guard held(mover_.callers_lock_);
      mover_.calling_.erase(gettid());
    }
    header = call_->run;
    // The program returns the status: the run was made, it is the policy that failed.
    if (header.status != 0) return {};
    return done;
  }

  Mover& mover_;
  ht_call_number at_;
  const __u64 cgroup_id_;
  Fd map_;
  ht_call* call_ = nullptr;
};

Result<std::unique_ptr<PolicyCaller>> Mover::caller(__u64 cgroup_id) {
  __u32 number = 0;
  {
    std::lock_guard held(callers_lock_);
    while (number < HT_CALLS_MAX && numbers_[number]) ++number;
    if (number == HT_CALLS_MAX)
      return fail("there are " + std::to_string(HT_CALLS_MAX) + " scopes already, as many as there can be",
                  "give policies and budgets to fewer cgroups; a common parent can have one for all");
    numbers_[number] = true;
  }
  auto caller = std::make_unique<Caller>(*this, number, cgroup_id);
  if (auto made = caller->make(); !made) return std::unexpected(made.error());
  return caller;
}

}  // namespace hypertier
