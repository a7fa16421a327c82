// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/module.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstring>
#include <utility>

namespace hypertier {

Result<Module> Module::open(const std::filesystem::path& device) {
  int fd = ::open(device.c_str(), O_RDWR | O_CLOEXEC);
  if (fd >= 0) return Module(fd);
  int err = errno;
  std::string what = "cannot open " + device.string();
  switch (err) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
      return fail_errno("the kernel module hypertier is not loaded: " + what, err, "modprobe hypertier");
    case EBUSY:
      return fail_errno(what + ", another tierd holds it", err, "tierctl status shows the one that runs");
    case EACCES:
    case EPERM:
      return fail_errno(what, err, "run as root");
    default:
      return fail_errno(what, err);
  }
}

Module::~Module() {
  if (fd_ >= 0) close(fd_);
}

Module::Module(Module&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Module& Module::operator=(Module&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Result<ht_module_info> Module::info() const {
  ht_module_info info{};
  if (ioctl(fd_, HT_IOC_INFO, &info) < 0)
    return fail_errno("cannot ask the module hypertier for its version", errno);
  if (info.abi >> 16 != HT_ABI_MAJOR)
    return fail("the module hypertier speaks ABI " + std::to_string(info.abi >> 16) + "." +
                    std::to_string(info.abi & 0xffff) + ", this tierd " + std::to_string(HT_ABI_MAJOR) + "." +
                    std::to_string(HT_ABI_MINOR),
                "install module and tierd of the same version");
  return info;
}

Result<> Module::set_tiers(const ht_tiers& tiers) const {
  if (ioctl(fd_, HT_IOC_TIERS, &tiers) < 0)
    return fail_errno("the module hypertier refuses the tiers", errno);
  return {};
}

Result<> Module::settle() const {
  if (ioctl(fd_, HT_IOC_SETTLE) < 0) return fail_errno("the module hypertier cannot wait for the samplers", errno);
  return {};
}

void Module::eject(__u64 cgroup_id, __u64 generation, const tier_exit_info& exit) const {
  ht_seat seat{};
  seat.cgroup_id = cgroup_id;
  seat.generation = generation;
  seat.exit = exit;
  (void)ioctl(fd_, HT_IOC_EJECT, &seat);
}

Result<> Module::leave_restore(int fd, std::string_view value) const {
  ht_restore restore{};
  if (value.size() > sizeof(restore.value))
    return fail("the value \"" + std::string(value) + "\" is too long to be restored by the module");
  restore.fd = fd;
  restore.length = static_cast<__u32>(value.size());
  std::memcpy(restore.value, value.data(), value.size());
  if (ioctl(fd_, HT_IOC_RESTORE, &restore) < 0)
    return fail_errno("the module hypertier refuses to restore a setting", errno);
  return {};
}

Result<> Module::forget() const {
  if (ioctl(fd_, HT_IOC_FORGET) < 0)
    return fail_errno("the module hypertier refuses to forget its restores", errno);
  return {};
}

}  // namespace hypertier
