// SPDX-License-Identifier: GPL-2.0-or-later
#include "memory.hpp"

#include <fcntl.h>
#include <glob.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <fstream>

#include "../../tests/e2e/pipeline/harness.hpp"
#include "../../tests/lab/vpebs_shared.h"

using e2e::die;

namespace bench {
namespace {

template <class T>
T load(const T& x) {
  return __atomic_load_n(&x, __ATOMIC_ACQUIRE);
}

vpebs_shared* map_shared() {
  glob_t found{};
  glob("/sys/bus/pci/devices/*/resource2", 0, nullptr, &found);
  for (size_t i = 0; i < found.gl_pathc; i++) {
    const std::string path = found.gl_pathv[i], device = path.substr(0, path.rfind('/'));
    if (std::stoul("0" + e2e::read_file(device + "/vendor").substr(1), nullptr, 16) != VPEBS_PCI_VENDOR ||
        std::stoul("0" + e2e::read_file(device + "/device").substr(1), nullptr, 16) != VPEBS_PCI_DEVICE)
      continue;
    int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) continue;
    void* map = mmap(nullptr, static_cast<size_t>(st.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    auto* shared = static_cast<vpebs_shared*>(map);
    if (map != MAP_FAILED && shared->magic == VPEBS_MAGIC) return shared;
  }
  die("there is no simulated memory here", "this runs inside the lab only: ./run bench");
}

uint64_t cr3_of(pid_t pid) {
  vpebs_space space{static_cast<__u32>(pid), 0, 0};
  int fd = open(VPEBS_DEVICE, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || ioctl(fd, VPEBS_IOC_SPACE, &space)) die("vpebs.ko does not tell the page table of process " + std::to_string(pid));
  close(fd);
  return space.cr3;
}

}  // namespace

Memory::Memory(pid_t pid) : pid_(pid), cr3_(cr3_of(pid)), shared_(map_shared()) {}

void Memory::reset() {
  // The plugin clears at the next miss; walking through fresh memory makes one.
  const uint64_t request = load(shared_->pages_request) + 1;
  __atomic_store_n(&shared_->pages_request, request, __ATOMIC_RELEASE);
  for (size_t bytes = 1 << 20; load(shared_->pages_generation) != request; bytes *= 2) {
    std::vector<char> fresh(bytes);
    for (size_t i = 0; i < bytes && load(shared_->pages_generation) != request; i += 64) static_cast<volatile char*>(fresh.data())[i] = 1;
  }
}

std::vector<PageMisses> Memory::misses() const {
  if (load(shared_->pages_lost)) die("the lab lost page counts", "a larger table is needed in tests/lab");
  auto* pages = reinterpret_cast<const vpebs_page*>(reinterpret_cast<const char*>(shared_) + shared_->pages_offset);
  std::vector<PageMisses> found;
  for (uint64_t i = 0; i < shared_->pages_entries; i++) {
    const uint64_t key = load(pages[i].key);
    if (key && VPEBS_PAGE_CR3(key) == cr3_) found.push_back({VPEBS_PAGE_VADDR(key) >> 12, {load(pages[i].misses[0]), load(pages[i].misses[1])}});
  }
  std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.page < b.page; });
  return found;
}

std::vector<PagePlace> Memory::places() const {
  const std::string proc = "/proc/" + std::to_string(pid_);
  std::ifstream maps(proc + "/maps");
  int pagemap = open((proc + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC);
  if (!maps || pagemap < 0) die("process " + std::to_string(pid_) + " is gone");
  std::vector<PagePlace> places;
  std::vector<uint64_t> entries(65536);
  for (std::string line; std::getline(maps, line);) {
    uint64_t start, end;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64, &start, &end) != 2 || start >> 47) continue;
    for (start >>= 12, end >>= 12; start < end;) {
      ssize_t got = pread(pagemap, entries.data(), std::min<uint64_t>(end - start, entries.size()) * 8, static_cast<off_t>(start * 8));
      if (got <= 0) break;
      for (ssize_t i = 0; i < got / 8; i++, start++) {
        constexpr uint64_t kPresent = 1ULL << 63, kFile = 1ULL << 61, kFrame = (1ULL << 55) - 1;
        const uint64_t entry = entries[static_cast<size_t>(i)], address = (entry & kFrame) << 12;
        if (!(entry & kPresent) || (entry & kFile)) continue;
        for (const vpebs_span& span : shared_->span)
          if (address >= span.start && address < span.end) places.push_back({start, static_cast<uint8_t>(span.node)});
      }
    }
  }
  close(pagemap);
  return places;
}

std::array<uint64_t, 2> Memory::span(unsigned node) const {
  std::array<uint64_t, 2> all{~0ULL, 0};
  for (const vpebs_span& span : shared_->span)
    if (span.end && span.node == node) all = {std::min<uint64_t>(all[0], span.start), std::max<uint64_t>(all[1], span.end)};
  return all;
}

}  // namespace bench
