// SPDX-License-Identifier: GPL-2.0-or-later
#include "accounting/accounting.hpp"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>

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
};

class Bpf final : public Accounting {
 public:
  // gauge: the shmem hooks are there; without them the sum is st_blocks and
  // only what left is counted.
  static Result<std::unique_ptr<Accounting>> open(bool gauge) {
    std::unique_ptr<Bpf> self(new Bpf(gauge));
    self->skeleton_ = balloon_accounting_bpf__open();
    if (!self->skeleton_) return fail_errno("cannot open the accounting programs", errno);
    bpf_program__set_autoload(self->skeleton_->progs.ht_recalc, gauge);
    bpf_program__set_autoload(self->skeleton_->progs.ht_add, gauge);
    if (const int error = balloon_accounting_bpf__load(self->skeleton_))
      return fail_errno("the kernel refuses the accounting programs", -error);
    if (const int error = balloon_accounting_bpf__attach(self->skeleton_))
      return fail_errno("cannot attach the accounting programs", -error);
    self->map_ = bpf_map__fd(self->skeleton_->maps.balloon_tiers);
    self->targets_ = bpf_map__fd(self->skeleton_->maps.balloon_targets);
    // For bpftool. A stale pin is of a tierhostd that died.
    std::error_code ignored;
    std::filesystem::create_directories(kPinDirectory, ignored);
    unlink(kPin);
    self->pinned_ = bpf_map__pin(self->skeleton_->maps.balloon_tiers, kPin) == 0;
    return self;
  }
  ~Bpf() override {
    if (pinned_) unlink(kPin);
    balloon_accounting_bpf__destroy(skeleton_);
  }
  std::string name() const override { return gauge_ ? "bpf" : "tracepoint and st_blocks"; }

  Result<TierUsage> read(const std::string& path) override {
    auto file = look_at(path);
    if (!file) return std::unexpected(file.error());
    const auto key = key_of(*file);
    hf_tier_usage counted{};
    // The first sum is st_blocks, if nothing changed while it was entered; from
    // then on the hooks write the file's own number.
    for (int i = 0; i < 8 && bpf_map_lookup_elem(map_, &key, &counted) != 0; i++) {
      counted.alloced_pages = static_cast<uint64_t>(file->st_blocks) / 8;
      bpf_map_update_elem(map_, &key, &counted, BPF_NOEXIST);
      auto again = look_at(path);
      if (!again) return std::unexpected(again.error());
      if (again->st_blocks != file->st_blocks) bpf_map_delete_elem(map_, &key);
      file = again;
    }
    TierUsage usage;
    usage.swapped_bytes = counted.swapped_pages << HF_PAGE_SHIFT;
    usage.resident_bytes = (gauge_ ? counted.alloced_pages - counted.swapped_pages : static_cast<uint64_t>(file->st_blocks) / 8)
                           << HF_PAGE_SHIFT;
    usage.in_pages_total = counted.in_pages_total;
    usage.out_pages_total = counted.out_pages_total;
    usage.refault_pages_total = counted.refault_pages_total;
    return usage;
  }

  void set_target(const std::string& path, uint64_t target_bytes) override {
    auto file = look_at(path);
    if (!file) return;
    const auto key = key_of(*file);
    const uint64_t pages = target_bytes >> HF_PAGE_SHIFT;
    bpf_map_update_elem(targets_, &key, &pages, BPF_ANY);
  }

 private:
  explicit Bpf(bool gauge) : gauge_(gauge) {}
  static hf_tier_key key_of(const struct stat& file) {
    return {(static_cast<uint64_t>(major(file.st_dev)) << 20) | minor(file.st_dev), file.st_ino};
  }

  bool gauge_;
  bool pinned_ = false;
  balloon_accounting_bpf* skeleton_ = nullptr;
  int map_ = -1;
  int targets_ = -1;
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
  const bool gauge = kernel && has_function(kernel, "shmem_recalc_inode") && has_function(kernel, "shmem_add_to_page_cache");
  btf__free(kernel);
  if (!kernel) {
    note = "st_blocks, because this kernel has no BTF";
    return std::make_unique<Blocks>();
  }
  std::string why;
  for (const bool with_gauge : {true, false}) {
    if (with_gauge && wanted == AccountingMode::kTracepoint) continue;
    if (with_gauge && !gauge) {
      why = "this kernel's shmem has other functions";
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
