// SPDX-License-Identifier: GPL-2.0-or-later
// Small owners around libbpf: a mapped map, a closed descriptor, libbpf's own
// messages as part of an error.
#pragma once

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#include <cstddef>
#include <filesystem>
#include <string>
#include <utility>

#include "result.hpp"

namespace hypertier {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

// All entries of an mmapable ARRAY map, shared with the kernel.
class MappedMap {
 public:
  MappedMap() = default;
  static Result<MappedMap> map(const bpf_map* map);
  ~MappedMap();
  MappedMap(MappedMap&& other) noexcept;
  MappedMap& operator=(MappedMap&& other) noexcept;
  MappedMap(const MappedMap&) = delete;
  MappedMap& operator=(const MappedMap&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Makes a map visible as a file of the BPF file system.
Result<> pin(int map_fd, const std::filesystem::path& file);

// While it lives, libbpf's messages are collected instead of printed.
class LibbpfMessages {
 public:
  LibbpfMessages();
  ~LibbpfMessages();
  LibbpfMessages(const LibbpfMessages&) = delete;
  LibbpfMessages& operator=(const LibbpfMessages&) = delete;

  // "cannot load the sampler: Invalid argument (errno 22): <libbpf's last words>"
  std::unexpected<Error> fail(const std::string& what, int err, std::string hint = {}) const;

 private:
  libbpf_print_fn_t previous_;
};

}  // namespace hypertier
