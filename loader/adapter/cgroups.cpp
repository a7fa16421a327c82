// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/cgroups.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <cstring>

#include "adapter/maps.hpp"

namespace hypertier {
namespace {

constexpr std::uint64_t kRootId = 1;
constexpr int kHandleTypeKernfs = 0xfe;  // FILEID_KERNFS: the handle is the 64-bit id

}  // namespace

Result<std::string> Cgroups::normalize(const std::string& given) const {
  const auto refuse = [&](const std::string& why) {
    return fail("\"" + given.substr(0, 200) + "\" is no path of a cgroup: " + why,
                "give it as seen below " + root_.string() + ", for example /system.slice/redis.service");
  };
  std::string text = given;
  if (text.starts_with(root_.string() + "/") || text == root_.string()) text.erase(0, root_.string().size());
  if (text.size() >= PATH_MAX) return refuse("it is too long");
  std::string path;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = std::min(text.find('/', at), text.size());
    const std::string name = text.substr(at, end - at);
    at = end + 1;
    if (name.empty()) continue;
    if (name == "." || name == "..") return refuse("it has \"" + name + "\" in it");
    for (char c : name)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return refuse("it has a control character in it");
    path += "/" + name;
  }
  return path.empty() ? "/" : path;
}

Result<std::uint64_t> Cgroups::id_of(const std::string& path) const {
  if (path == "/") return kRootId;
  const std::string directory = root_.string() + path;
  struct stat status {};
  if (stat(directory.c_str(), &status) != 0 || !S_ISDIR(status.st_mode) ||
      access((directory + "/cgroup.procs").c_str(), F_OK) != 0)
    return fail("there is no cgroup " + path + " (" + directory + ")",
                "cgroups are directories below " + root_.string() + "; mkdir makes one");
  return status.st_ino;
}

std::optional<std::string> Cgroups::path_of(std::uint64_t id) const {
  if (id == kRootId) return "/";
  Fd mount(open(root_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!mount) return std::nullopt;
  alignas(file_handle) std::array<char, sizeof(file_handle) + sizeof(id)> bytes{};
  auto* handle = reinterpret_cast<file_handle*>(bytes.data());
  handle->handle_bytes = sizeof(id);
  handle->handle_type = kHandleTypeKernfs;
  std::memcpy(handle->f_handle, &id, sizeof(id));
  Fd directory(open_by_handle_at(mount.get(), handle, O_RDONLY | O_CLOEXEC));
  if (!directory) return std::nullopt;
  std::array<char, PATH_MAX> target{};
  const ssize_t length =
      readlink(("/proc/self/fd/" + std::to_string(directory.get())).c_str(), target.data(), target.size() - 1);
  if (length <= 0) return std::nullopt;
  std::string path(target.data(), static_cast<std::size_t>(length));
  if (!path.starts_with(root_.string()) || path.ends_with(" (deleted)")) return std::nullopt;
  path.erase(0, root_.string().size());
  return path.empty() ? "/" : path;
}

}  // namespace hypertier
