// SPDX-License-Identifier: GPL-2.0-or-later
// busy MIB FILE PAUSE_MS: works on MIB of anonymous memory until it is ended, a
// fifth of it hot, with a pause after each pass. Each page holds its own number; a wrong one ends it with 3. FILE
// holds a u64 that counts the passes, for others to see it go on.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  constexpr std::size_t kPage = 4096;
  const std::size_t pages = std::strtoul(argv[1], nullptr, 10) * (1 << 20) / kPage;
  const auto pause_us = static_cast<useconds_t>(std::strtoul(argv[3], nullptr, 10) * 1000);
  const int fd = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0644);
  if (fd < 0 || ftruncate(fd, kPage) != 0) return 2;
  auto* shared = static_cast<std::atomic<std::uint64_t>*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  auto* memory = static_cast<std::uint64_t*>(mmap(nullptr, pages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (shared == MAP_FAILED || memory == MAP_FAILED) return 2;
  const std::size_t words = kPage / sizeof(std::uint64_t);
  for (std::size_t page = 0; page < pages; ++page) memory[page * words] = page;
  for (std::uint64_t pass = 0;; ++pass) {
    const std::size_t span = pass % 4 == 0 ? pages : pages / 5;
    for (std::size_t page = 0; page < span; ++page) {
      if (memory[page * words] != page) {
        std::fprintf(stderr, "busy: page %zu holds %llu\n", page, static_cast<unsigned long long>(memory[page * words]));
        return 3;
      }
      memory[page * words + 1 + pass % (words - 1)] = pass;
    }
    shared->fetch_add(1);
    usleep(pause_us);
  }
}
