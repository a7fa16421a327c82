// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/mover.hpp"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "adapter/syscall_mover.hpp"
#include "mover.skel.h"

namespace hypertier {
namespace {

// The CPU that the main thread of a process ran on last; -1: it is gone.
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
// one that unmaps; one that ran here alone it flushes page by page. So pages
// are moved from a CPU that their processes were not on last, if there is one.
class Elsewhere {
 public:
  explicit Elsewhere(std::span<const ht_pair> pairs) {
    if (sched_getaffinity(0, sizeof before_, &before_)) return;
    std::set<__u32> pids;
    for (const ht_pair& pair : pairs) {
      if (pair.hot_addr) pids.insert(pair.hot_pid);
      if (pair.cold_addr) pids.insert(pair.cold_pid);
    }
    cpu_set_t others = before_;
    for (__u32 pid : pids)
      if (int cpu = last_cpu(pid); cpu >= 0) CPU_CLR(static_cast<std::size_t>(cpu), &others);
    moved_ = CPU_COUNT(&others) > 0 && CPU_COUNT(&others) < CPU_COUNT(&before_) && sched_setaffinity(0, sizeof others, &others) == 0;
  }
  ~Elsewhere() {
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
  }
  Elsewhere(const Elsewhere&) = delete;
  Elsewhere& operator=(const Elsewhere&) = delete;

 private:
  cpu_set_t before_;
  bool moved_ = false;
};

}  // namespace

Result<std::unique_ptr<Mover>> Mover::open(const std::optional<std::array<int, HT_TIERS>>& syscall_nodes) {
  std::unique_ptr<Mover> mover(new Mover);
  mover->syscall_nodes_ = syscall_nodes;
  LibbpfMessages messages;
  mover->skeleton_ = mover_bpf__open_and_load();
  if (!mover->skeleton_)
    return messages.fail(
        "cannot load the mover's BPF programs", errno,
        "the module hypertier must be loaded, in the version of this tierd (tierctl version)");
  auto& maps = mover->skeleton_->maps;
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

Mover::~Mover() { mover_bpf__destroy(skeleton_); }

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

}  // namespace

Result<> Mover::run_spaces() { return run(skeleton_->progs.spaces_run); }
Result<> Mover::run_walks() { return run(skeleton_->progs.walk); }

Result<> Mover::run_exchange(ht_exchange_run& header) {
  Elsewhere elsewhere(pairs().first(header.nr));
  if (syscall_nodes_) {
    move_by_syscall(pairs().first(std::min<std::size_t>(header.nr, HT_PAIRS_MAX)), *syscall_nodes_, header);
    return {};
  }
  *exchange_.as<ht_exchange_run>() = header;
  auto done = run(skeleton_->progs.exchange_run);
  header = *exchange_.as<ht_exchange_run>();
  return done;
}

// The ht_call map of one scope.
class Caller final : public PolicyCaller {
 public:
  Caller(Mover& mover, __u32 number) : mover_(mover), at_{number} {}
  ~Caller() override {
    if (map_) bpf_map_delete_elem(bpf_map__fd(mover_.skeleton_->maps.calls), &at_.number);
    if (call_) munmap(call_, kBytes);
    std::lock_guard held(mover_.numbers_lock_);
    mover_.numbers_[at_.number] = false;
  }

  Result<> make() {
    LIBBPF_OPTS(bpf_map_create_opts, options, .map_flags = BPF_F_MMAPABLE);
    Fd map(bpf_map_create(BPF_MAP_TYPE_ARRAY, "call", sizeof(__u32), sizeof(ht_call), 1, &options));
    if (!map) return fail_errno("cannot make a scope's map", errno);
    void* call = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, map.get(), 0);
    if (call == MAP_FAILED) return fail_errno("cannot mmap a scope's map", errno);
    call_ = static_cast<ht_call*>(call);
    int fd = map.get();
    if (int err = bpf_map_update_elem(bpf_map__fd(mover_.skeleton_->maps.calls), &at_.number, &fd, BPF_ANY); err < 0)
      return fail_errno("cannot enter a scope's map", -err);
    map_ = std::move(map);
    return {};
  }

  std::span<tier_range> ranges() override { return call_->ranges; }
  std::span<tier_pair> pairs() override { return call_->pairs; }
  std::span<tier_result> results() override { return call_->results; }
  Result<> run_classify(ht_run& header) override { return ask(mover_.skeleton_->progs.classify, header); }
  Result<> run_admit(ht_run& header) override { return ask(mover_.skeleton_->progs.admit, header); }
  Result<> run_moved(ht_run& header) override { return ask(mover_.skeleton_->progs.moved, header); }

 private:
  static constexpr std::size_t kBytes = (sizeof(ht_call) + HT_PAGE_SIZE - 1) & ~(HT_PAGE_SIZE - 1);

  Result<> ask(const bpf_program* program, ht_run& header) {
    header.status = 0;
    call_->run = header;
    LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = &at_, .ctx_size_in = sizeof(at_));
    auto done = run(program, options);
    header = call_->run;
    // The program returns the status: the run was made, it is the policy that failed.
    if (header.status != 0) return {};
    return done;
  }

  Mover& mover_;
  ht_call_number at_;
  Fd map_;
  ht_call* call_ = nullptr;
};

Result<std::unique_ptr<PolicyCaller>> Mover::caller() {
  __u32 number = 0;
  {
    std::lock_guard held(numbers_lock_);
    while (number < HT_CALLS_MAX && numbers_[number]) ++number;
    if (number == HT_CALLS_MAX)
      return fail("there are " + std::to_string(HT_CALLS_MAX) + " scopes already, as many as there can be",
                  "give policies and budgets to fewer cgroups; a common parent can have one for all");
    numbers_[number] = true;
  }
  auto caller = std::make_unique<Caller>(*this, number);
  if (auto made = caller->make(); !made) return std::unexpected(made.error());
  return caller;
}

}  // namespace hypertier
