// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/kernel_settings.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <utility>

namespace hypertier {
namespace {

constexpr std::string_view kOff = "0";

// kernel.numa_balancing and the like take one write() of the whole value.
Result<> write_value(int fd, const std::string& value, const std::filesystem::path& file) {
  if (pwrite(fd, value.data(), value.size(), 0) != static_cast<ssize_t>(value.size()))
    return fail_errno("cannot write " + value + " to " + file.string(), errno);
  return {};
}

class File {
 public:
  explicit File(const std::filesystem::path& file) : fd_(open(file.c_str(), O_WRONLY | O_CLOEXEC)) {}
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

std::filesystem::path KernelSettings::numa_balancing_file() const {
  return roots_.proc / "sys/kernel/numa_balancing";
}

std::optional<std::string> KernelSettings::numa_balancing() const { return read_line(numa_balancing_file()); }

std::optional<std::string> KernelSettings::demotion_enabled() const {
  return read_line(roots_.sys / "kernel/mm/numa/demotion_enabled");
}

Result<> KernelSettings::seat() {
  if (seated_) return {};
  auto found = numa_balancing();
  if (found && *found != kOff) {
    File file(numa_balancing_file());
    if (file.fd() < 0)
      return fail_errno("cannot open " + numa_balancing_file().string(), errno, "run as root");
    // first who restores it, then the change: whenever tierd dies, it is undone
    if (module_)
      if (auto left = module_->leave_restore(file.fd(), *found); !left) return left;
    if (auto written = write_value(file.fd(), std::string(kOff), numa_balancing_file()); !written) {
      if (module_) (void)module_->forget();
      return written;
    }
    recorded_ = found;
  }
  seated_ = true;
  return {};
}

Result<> KernelSettings::restore() {
  if (!seated_) return {};
  if (recorded_ && numa_balancing() == kOff) {
    File file(numa_balancing_file());
    if (file.fd() < 0) return fail_errno("cannot open " + numa_balancing_file().string(), errno);
    if (auto written = write_value(file.fd(), *recorded_, numa_balancing_file()); !written) return written;
  }
  seated_ = false;
  if (std::exchange(recorded_, std::nullopt) && module_) return module_->forget();
  return {};
}

}  // namespace hypertier
