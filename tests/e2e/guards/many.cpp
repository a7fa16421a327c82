// SPDX-License-Identifier: GPL-2.0-or-later
// many PROCESSES MAPPINGS STRIDE FILE PAUSE_MS: so many processes that have so
// many mappings each, one every STRIDE bytes of reserved address space, with
// nothing but a page between them; two pages of each are touched, again every
// PAUSE_MS (0: never again). FILE is made when all are ready. Ends when it is
// told to, with all of them.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr std::size_t kPage = 4096;

void touch(char* memory, std::size_t mappings, std::size_t stride) {
  for (std::size_t i = 0; i < mappings; ++i)
    for (std::size_t page = 0; page < 2; ++page) *reinterpret_cast<volatile char*>(memory + i * stride + page * kPage) = 1;
}

[[noreturn]] void work(std::size_t mappings, std::size_t stride, useconds_t pause_us, int ready) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // Two pages a mapping are meant, not 2 MiB.
  prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
  auto* memory = static_cast<char*>(
      mmap(nullptr, mappings * stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) _exit(2);
  for (std::size_t i = 0; i < mappings; ++i)
    if (mprotect(memory + i * stride, stride - kPage, PROT_READ | PROT_WRITE) != 0) _exit(2);
  touch(memory, mappings, stride);
  if (write(ready, "", 1) != 1) _exit(2);
  close(ready);
  if (!pause_us)
    for (;;) pause();
  for (;;) {
    usleep(pause_us);
    touch(memory, mappings, stride);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const std::size_t processes = std::strtoul(argv[1], nullptr, 10), mappings = std::strtoul(argv[2], nullptr, 10);
  const std::size_t stride = std::strtoull(argv[3], nullptr, 10);
  const auto pause_us = static_cast<useconds_t>(std::strtoul(argv[5], nullptr, 10) * 1000);
  int ready[2];
  if (!processes || !mappings || stride < 4 * kPage || pipe(ready) != 0) return 2;
  for (std::size_t i = 0; i < processes; ++i) {
    const pid_t child = fork();
    if (child < 0) return std::perror("many: fork"), 1;
    if (child == 0) work(mappings, stride, pause_us, ready[1]);
  }
  close(ready[1]);
  for (std::size_t i = 0; i < processes; ++i) {
    char byte;
    if (read(ready[0], &byte, 1) != 1) return std::fprintf(stderr, "many: a process could not get its memory\n"), 1;
  }
  if (const int file = open(argv[4], O_WRONLY | O_CREAT, 0644); file < 0) return std::perror("many: its file"), 1;
  for (;;) pause();
}
