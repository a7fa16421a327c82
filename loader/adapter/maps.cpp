// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/maps.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>

namespace hypertier {
namespace {

// libbpf's print function has no context; it is called in the loading thread.
thread_local std::string last_warning;

int collect(libbpf_print_level level, const char* format, va_list args) {
  if (level != LIBBPF_WARN) return 0;
  char line[512];
  std::vsnprintf(line, sizeof(line), format, args);
  std::string text(line);
  // one sentence of it: the verifier's log and "failed to load object" are not news
  if (text.find("-- BEGIN PROG LOAD LOG --") != text.npos ||
      text.find("failed to load object") != text.npos ||
      text.find("failed to load BPF skeleton") != text.npos)
    return 0;
  while (!text.empty() && text.back() == '\n') text.pop_back();
  if (text.starts_with("libbpf: ")) text.erase(0, 8);
  last_warning = text.substr(0, text.find('\n'));
  return 0;
}

}  // namespace

void Fd::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Result<MappedMap> MappedMap::map(const bpf_map* map) {
  // the kernel rounds each value to 8 bytes and the whole to pages
  std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t bytes = (bpf_map__value_size(map) + 7UL) / 8 * 8 * bpf_map__max_entries(map);
  MappedMap mapped;
  mapped.bytes_ = (bytes + page - 1) / page * page;
  void* data = mmap(nullptr, mapped.bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, bpf_map__fd(map), 0);
  if (data == MAP_FAILED) return fail_errno(std::string("cannot mmap the map ") + bpf_map__name(map), errno);
  mapped.data_ = data;
  return mapped;
}

MappedMap::~MappedMap() {
  if (data_) munmap(data_, bytes_);
}

MappedMap::MappedMap(MappedMap&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}

MappedMap& MappedMap::operator=(MappedMap&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Result<> pin(int map_fd, const std::filesystem::path& file) {
  if (int err = bpf_obj_pin(map_fd, file.c_str()); err < 0)
    return fail_errno("cannot pin " + file.string(), -err, "is the BPF file system mounted at /sys/fs/bpf?");
  return {};
}

LibbpfMessages::LibbpfMessages() {
  last_warning.clear();
  previous_ = libbpf_set_print(collect);
}

LibbpfMessages::~LibbpfMessages() { libbpf_set_print(previous_); }

std::unexpected<Error> LibbpfMessages::fail(const std::string& what, int err, std::string hint) const {
  auto error = fail_errno(what, err, std::move(hint));
  if (!last_warning.empty()) error.error().message += ": " + last_warning;
  return error;
}

}  // namespace hypertier
