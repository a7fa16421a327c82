// SPDX-License-Identifier: GPL-2.0-or-later
// Runs inside the test guest.
//   flexwork hold NODE BYTES NAME   fill memory (of NODE as far as there is; -1: anywhere), then obey
//                                   /tmp/NAME.in: "verify" -> "ok PAGES" or "bad PAGES" in /tmp/NAME.out;
//                                   "nodes" -> pages per node
//   flexwork storm NODE BYTES       touch and drop memory of NODE for ever
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

namespace {

constexpr size_t kPage = 4096;

uint64_t word(uint64_t page, uint64_t i) {
  uint64_t x = page * 0x9e3779b97f4a7c15ULL + i;
  x ^= x >> 29;
  return x * 0xbf58476d1ce4e5b9ULL;
}

bool policy(int node) {
  unsigned long mask = node < 0 ? 0 : 1UL << node;
  return syscall(SYS_set_mempolicy, node < 0 ? MPOL_DEFAULT : MPOL_PREFERRED, node < 0 ? nullptr : &mask, 8 * sizeof mask) == 0;
}

// Every 64th word: enough to see a page that came back zeroed or as another's.
size_t bad_pages(const uint64_t* memory, size_t pages) {
  size_t bad = 0;
  for (size_t p = 0; p < pages; p++) {
    bool good = true;
    for (size_t i = 0; i < kPage / 8; i += 64) good &= memory[p * kPage / 8 + i] == word(p, i);
    bad += !good;
  }
  return bad;
}

int hold(int node, size_t bytes, const std::string& name) {
  const size_t pages = bytes / kPage;
  if (!policy(node)) return perror("set_mempolicy"), 1;
  auto* memory = static_cast<uint64_t*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return perror("mmap"), 1;
  for (size_t p = 0; p < pages; p++)
    for (size_t i = 0; i < kPage / 8; i += 64) memory[p * kPage / 8 + i] = word(p, i);
  policy(-1);
  const std::string in = "/tmp/" + name + ".in", out = "/tmp/" + name + ".out";
  mkfifo(out.c_str(), 0600);
  mkfifo(in.c_str(), 0600);
  for (;;) {
    std::ifstream commands(in);
    for (std::string line; std::getline(commands, line);) {
      std::ofstream answer(out);
      if (line == "verify") {
        const size_t bad = bad_pages(memory, pages);
        answer << (bad ? "bad " + std::to_string(bad) : "ok " + std::to_string(pages)) << std::endl;
      } else if (line == "nodes") {
        std::vector<void*> addresses(pages);
        std::vector<int> status(pages, -1);
        for (size_t p = 0; p < pages; p++) addresses[p] = memory + p * kPage / 8;
        syscall(SYS_move_pages, 0, pages, addresses.data(), nullptr, status.data(), 0);
        size_t on[2] = {};
        for (int s : status)
          if (s == 0 || s == 1) on[s]++;
        answer << on[0] << " " << on[1] << std::endl;
      } else {
        return 0;
      }
    }
  }
}

int storm(int node, size_t bytes) {
  if (!policy(node)) return perror("set_mempolicy"), 1;
  for (;;) {
    auto* memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) continue;
    for (size_t i = 0; i < bytes; i += kPage) memory[i] = 1;
    munmap(memory, bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 5 && !strcmp(argv[1], "hold")) return hold(atoi(argv[2]), strtoull(argv[3], nullptr, 0), argv[4]);
  if (argc == 4 && !strcmp(argv[1], "storm")) return storm(atoi(argv[2]), strtoull(argv[3], nullptr, 0));
  fprintf(stderr, "usage: flexwork hold NODE BYTES NAME | storm NODE BYTES\n");
  return 2;
}
