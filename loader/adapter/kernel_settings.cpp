// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/kernel_settings.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <string_view>
#include <utility>

namespace hypertier {
namespace {

constexpr std::string_view kOff = "0";

constexpr std::string_view kNumaBalancing = "sys/kernel/numa_balancing";
// The kernel's score of a node that needs compaction is the share of its free
// memory that is not in whole huge pages: that of a node which a policy has
// filled is mostly above 90 of 100 (the default threshold), however it is
// compacted. kcompactd then unmaps page by page, with a flush each.
constexpr std::string_view kCompactionProactiveness = "sys/vm/compaction_proactiveness";

// What the kernel does where kinds of memory come to share blocks of a node, as on a full
// one they must: raise its watermarks for a while, which wakes kswapd to reclaim up to
// there, and kcompactd after it.
constexpr std::string_view kWatermarkBoost = "sys/vm/watermark_boost_factor";

// A sysctl takes one write() of the whole value.
Result<> write_value(int fd, const std::string& value, const std::filesystem::path& file) {
  if (pwrite(fd, value.data(), value.size(), 0) != static_cast<ssize_t>(value.size()))
    return fail_errno("cannot write " + value + " to " + file.string(), errno);
  return {};
}

class File {
 public:
  explicit File(const std::filesystem::path& file) : fd_(open(file.c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

KernelSettings::KernelSettings(const Module* module, Roots roots)
    : module_(module), roots_(std::move(roots)) {}

KernelSettings::~KernelSettings() {
  // the module writes what this cannot when the device closes
  (void)restore();
}

std::optional<std::string> KernelSettings::numa_balancing() const {
  return read_line(roots_.proc / kNumaBalancing);
}

std::optional<std::string> KernelSettings::compaction_proactiveness() const {
  return read_line(roots_.proc / kCompactionProactiveness);
}

std::optional<std::string> KernelSettings::demotion_enabled() const {
  return read_line(roots_.sys / "kernel/mm/numa/demotion_enabled");
}

Result<> KernelSettings::turn_off(const std::filesystem::path& path) {
  auto found = read_line(path);
  if (!found || *found == kOff) return {};
  File file(path);
  if (file.fd() < 0) return fail_errno("cannot open " + path.string(), errno, "run as root");
  // first who restores it, then the change: whenever tierd dies, it is undone
  if (module_)
    if (auto left = module_->leave_restore(file.fd(), *found); !left) return left;
  if (auto written = write_value(file.fd(), std::string(kOff), path); !written) return written;
  off_.push_back({path, *found});
  return {};
}

Result<> KernelSettings::seat() {
  if (seated_) return {};
  seated_ = true;
  for (const auto setting : {kNumaBalancing, kCompactionProactiveness, kWatermarkBoost})
    if (auto off = turn_off(roots_.proc / setting); !off) {
      (void)restore();
      return off;
    }
  return {};
}

Result<> KernelSettings::restore() {
  if (!seated_) return {};
  while (!off_.empty()) {
    const auto& [path, found] = off_.back();
    if (read_line(path) == kOff) {
      File file(path);
      if (file.fd() < 0) return fail_errno("cannot open " + path.string(), errno);
      if (auto written = write_value(file.fd(), found, path); !written) return written;
    }
    off_.pop_back();
  }
  seated_ = false;
  return module_ ? module_->forget() : Result<>{};
}

}  // namespace hypertier
