// SPDX-License-Identifier: GPL-2.0-or-later
// What tierd and tierctl say to each other: a message is a u32 length (host
// order, both ends are one machine) and that many bytes of JSON. A policy goes
// with its request as a file descriptor, so that tierd opens no path for
// anybody.
//
//   request  {"protocol": 1, "command": "load", ...}
//   reply    {"schema": 1, ...} or {"schema": 1, "error": {"message", "hint"}}
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <nlohmann/json.hpp>

#include "result.hpp"

namespace hypertier {

using Json = nlohmann::ordered_json;

inline constexpr std::uint32_t kMessageMaxBytes = 1U << 20;
inline constexpr int kProtocol = 1;
inline constexpr int kSchema = 1;
inline constexpr char kSocket[] = "/run/hypertier/tierd.sock";
inline constexpr char kStateDirectory[] = "/var/lib/hypertier";
inline constexpr char kLockFile[] = "/run/hypertier/tierd.lock";
inline constexpr char kDefaultPolicy[] = "heattree";

// A descriptor that closes itself.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd();
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_ = -1;
};

Json error_json(const Error& error);
Result<std::filesystem::path> checked_socket_path(const std::filesystem::path& path);

// One request, one reply. fd is sent along if it is not -1. A reply that is an
// error comes back as the Error.
Result<Json> ask_tierd(const std::filesystem::path& socket, Json request, int fd = -1);

// True while a tierd holds the lock; its pid if it is known, else 0.
Result<Fd> take_lock();
int lock_owner();

}  // namespace hypertier
