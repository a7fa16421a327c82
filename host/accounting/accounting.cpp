// SPDX-License-Identifier: GPL-2.0-or-later
#include "accounting/accounting.hpp"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <map>

#include <hypertier/flex.h>

#include "balloon_accounting.skel.h"

namespace hypertier {
namespace {

constexpr char kPinDirectory[] = "/sys/fs/bpf/hypertier/v1";
constexpr char kPin[] = "/sys/fs/bpf/hypertier/v1/balloon_tiers";

Result<struct stat> look_at(const std::string& path) {
  struct stat file{};
  if (stat(path.c_str(), &file) != 0) return fail_errno("cannot look at " + path, errno);
  return file;
}

// The kernel's own sum: exact, but silent about what came and went.
class Blocks final : public Accounting {
 public:
  std::string name() const override { return "st_blocks"; }
  Result<TierUsage> read(const std::string& path) override {
    auto file = look_at(path);
    if (!file) return std::unexpected(file.error());
    TierUsage usage;
    usage.resident_bytes = static_cast<uint64_t>(file->st_blocks) * 512;
    return usage;
  }
  void set_target(const std::string&, uint64_t) override {}
  void forget(const std::string&) override {}
};

class Bpf final : public Accounting {
 public:
  // gauge: the shmem hook is there; without it the sum is st_blocks and only
  // what left is counted.
  static Result<std::unique_ptr<Accounting>> open(bool gauge) {
    std::unique_ptr<Bpf> self(new Bpf(gauge));
    self->skeleton_ = balloon_accounting_bpf__open();
    if (!self->skeleton_) return fail_errno("cannot open the accounting programs", errno);
    bpf_program__set_autoload(self->skeleton_->progs.ht_recalc, gauge);
    if (const int error = balloon_accounting_bpf__load(self->skeleton_))
      return fail_errno("the kernel refuses the accounting programs", -error);
    const bpf_map* map = self->skeleton_->maps.balloon_tiers;
    void* memory = mmap(nullptr, kMapBytes, PROT_READ | PROT_WRITE, MAP_SHARED, bpf_map__fd(map), 0);
    if (memory == MAP_FAILED) return fail_errno("cannot map the accounting's counters", errno);
    self->slots_ = static_cast<hf_tier_slot*>(memory);
    if (const int error = balloon_accounting_bpf__attach(self->skeleton_))
      return fail_errno("cannot attach the accounting programs", -error);
    // For bpftool. A stale pin is of a tierhostd that died.
    std::error_code ignored;
    std::filesystem::create_directories(kPinDirectory, ignored);
    unlink(kPin);
    self->pinned_ = bpf_map__pin(self->skeleton_->maps.balloon_tiers, kPin) == 0;
    return self;
  }
  ~Bpf() override {
    if (pinned_) unlink(kPin);
    if (slots_) munmap(slots_, kMapBytes);
    balloon_accounting_bpf__destroy(skeleton_);
  }
  std::string name() const override { return gauge_ ? "bpf" : "tracepoint and st_blocks"; }

  Result<TierUsage> read(const std::string& path) override {
    auto file = look_at(path);
    if (!file) return std::unexpected(file.error());
    auto found = slot_for(path, *file);
    if (!found) return std::unexpected(found.error());
    const hf_tier_slot& slot = **found;
    const auto load = [](const __u64& counter) { return __atomic_load_n(&counter, __ATOMIC_RELAXED); };
    TierUsage usage;
    usage.swapped_bytes = load(slot.usage.swapped_pages) << HF_PAGE_SHIFT;
    usage.resident_bytes = gauge_ ? (load(slot.usage.alloced_pages) << HF_PAGE_SHIFT) - usage.swapped_bytes
                                  : static_cast<uint64_t>(file->st_blocks) * 512;
    usage.in_pages_total = load(slot.usage.in_pages_total);
    usage.out_pages_total = load(slot.usage.out_pages_total);
    usage.refault_pages_total = load(slot.usage.refault_pages_total);
    return usage;
  }

  void set_target(const std::string& path, uint64_t target_bytes) override {
    auto file = look_at(path);
    if (!file) return;
    if (auto slot = slot_for(path, *file))
      __atomic_store_n(&(*slot)->target_pages, std::max<uint64_t>(target_bytes >> HF_PAGE_SHIFT, 1), __ATOMIC_RELAXED);
  }

  void forget(const std::string& path) override {
    const auto known = entered_.find(path);
    if (known == entered_.end()) return;
    // The key first: from then on no hook finds it.
    __atomic_store_n(&known->second->key.ino, 0, __ATOMIC_SEQ_CST);
    entered_.erase(known);
  }

 private:
  static constexpr size_t kMapBytes = HF_SLOTS * sizeof(hf_tier_slot);

  explicit Bpf(bool gauge) : gauge_(gauge) {}

  Result<hf_tier_slot*> slot_for(const std::string& path, const struct stat& file) {
    const hf_tier_key key{(static_cast<uint64_t>(major(file.st_dev)) << 20) | minor(file.st_dev), file.st_ino};
    if (const auto known = entered_.find(path); known != entered_.end()) {
      if (known->second->key.ino == key.ino && known->second->key.dev == key.dev) return known->second;
      forget(path);  // another file of that name
    }
    for (uint32_t probe = 0; probe < HF_SLOT_PROBES; probe++) {
      hf_tier_slot& slot = slots_[hf_slot(key, probe)];
      if (slot.key.ino) continue;
      slot.target_pages = 0;
      slot.usage = {};
      slot.key.dev = key.dev;
      // From here on the hooks store the file's own number; until it changes
      // for the first time it is st_blocks.
      __atomic_store_n(&slot.key.ino, key.ino, __ATOMIC_SEQ_CST);
      for (int i = 0; i < 8; i++) {
        auto now = look_at(path);
        if (!now) break;
        __u64 counted = __atomic_load_n(&slot.usage.alloced_pages, __ATOMIC_SEQ_CST);
        const __u64 blocks = static_cast<__u64>(now->st_blocks) / 8;
        if (counted == blocks) break;
        __atomic_compare_exchange_n(&slot.usage.alloced_pages, &counted, blocks, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
      }
      return entered_[path] = &slot;
    }
    return fail("too many tiers are accounted for " + path);
  }

  bool gauge_;
  bool pinned_ = false;
  balloon_accounting_bpf* skeleton_ = nullptr;
  hf_tier_slot* slots_ = nullptr;
  std::map<std::string, hf_tier_slot*> entered_;
};

bool has_function(const btf* kernel, const char* name) {
  return btf__find_by_name_kind(kernel, name, BTF_KIND_FUNC) > 0;
}

}  // namespace

std::unique_ptr<Accounting> open_accounting(AccountingMode wanted, std::string& note) {
  if (wanted == AccountingMode::kBlocks) {
    note = "st_blocks, as asked";
    return std::make_unique<Blocks>();
  }
  btf* kernel = btf__load_vmlinux_btf();
  const bool gauge = kernel && has_function(kernel, "shmem_recalc_inode");
  btf__free(kernel);
  if (!kernel) {
    note = "st_blocks, because this kernel has no BTF";
    return std::make_unique<Blocks>();
  }
  std::string why;
  for (const bool with_gauge : {true, false}) {
    if (with_gauge && wanted == AccountingMode::kTracepoint) continue;
    if (with_gauge && !gauge) {
      why = "this kernel's shmem has no shmem_recalc_inode";
      continue;
    }
    auto opened = Bpf::open(with_gauge);
    if (opened) {
      note = (*opened)->name() + (why.empty() ? "" : ", because " + why);
      return std::move(*opened);
    }
    why = opened.error().message;
  }
  note = "st_blocks, because " + why;
  return std::make_unique<Blocks>();
}

}  // namespace hypertier
