// SPDX-License-Identifier: GPL-2.0-or-later
// Cgroups (v2) by path and by id.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "result.hpp"

namespace hypertier {

class Cgroups {
 public:
  explicit Cgroups(std::filesystem::path root = "/sys/fs/cgroup") : root_(std::move(root)) {}

  // What a user may write ("/a/b", "a/b/", "/sys/fs/cgroup/a/b") as the path
  // below the v2 root: "/a/b"; "/" for the root.
  Result<std::string> normalize(const std::string& given) const;
  // Its id, which is the inode of its directory.
  Result<std::uint64_t> id_of(const std::string& path) const;
  // nullopt: there is none of that id any more.
  std::optional<std::string> path_of(std::uint64_t id) const;

 private:
  std::filesystem::path root_;
};

}  // namespace hypertier
