// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/syscall_mover.hpp"

#include <fcntl.h>
#include <numaif.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <string>
#include <vector>

#include "adapter/maps.hpp"

namespace hypertier {
namespace {

// move_pages takes the mmap lock and isolates all pages of a call at once.
constexpr std::size_t kChunk = 512;

enum Side { kHot, kCold };

struct Page {
  ht_pair* pair;
  std::uint64_t address;
};

ht_move_result result_of(int status, int node) {
  if (status == node) return HT_MOVE_DONE;
  switch (status) {
    case -ENOENT:
    case -ESRCH: return HT_MOVE_GONE;
    case -EBUSY: return HT_MOVE_BUSY;
    case -ENOMEM: return HT_MOVE_NO_MEMORY;
    case -EFAULT: return HT_MOVE_SPECIAL;
    default: return HT_MOVE_OTHER;
  }
}

// Only a page that a huge one may start at is looked up: /proc/kpageflags.
std::uint64_t pages_at(int pagemap, int flags, std::uint64_t address) {
  constexpr std::uint64_t kPfn = (1ULL << 55) - 1, kHuge = 1ULL << 22;  // KPF_THP
  if (address % HT_GRANULE_SIZE != 0) return 1;
  std::uint64_t entry = 0, bits = 0;
  if (pread(pagemap, &entry, sizeof entry, static_cast<off_t>(address / HT_PAGE_SIZE * sizeof entry)) != sizeof entry) return 1;
  if (pread(flags, &bits, sizeof bits, static_cast<off_t>((entry & kPfn) * sizeof bits)) != sizeof bits) return 1;
  return bits & kHuge ? HT_GRANULE_PAGES : 1;
}

void move_side(std::span<const Page> pages, std::uint32_t pid, Side side, int node, ht_exchange_run& run) {
  const Fd pagemap(open(("/proc/" + std::to_string(pid) + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  const Fd flags(open("/proc/kpageflags", O_RDONLY | O_CLOEXEC));
  for (std::size_t first = 0; first < pages.size(); first += kChunk) {
    const auto chunk = pages.subspan(first, std::min(kChunk, pages.size() - first));
    std::vector<void*> addresses;
    for (const Page& page : chunk) addresses.push_back(reinterpret_cast<void*>(page.address));
    const std::vector<int> nodes(chunk.size(), node);
    std::vector<int> status(chunk.size(), -EAGAIN);
    ++run.batches;
    const long moved = move_pages(static_cast<int>(pid), chunk.size(), addresses.data(), nodes.data(), status.data(), MPOL_MF_MOVE);
    // A call that stopped half-way leaves the rest without a status: ask.
    if (moved != 0) {
      const int error = moved < 0 ? errno : EBUSY;
      std::vector<int> where(chunk.size(), -error);
      if (move_pages(static_cast<int>(pid), chunk.size(), addresses.data(), nullptr, where.data(), 0) == 0)
        for (std::size_t i = 0; i < chunk.size(); ++i)
          status[i] = where[i] == node || where[i] == -ENOENT ? where[i] : status[i] < 0 && status[i] != -EAGAIN ? status[i] : -error;
      else
        status.assign(chunk.size(), -error);
    }
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      const ht_move_result result = result_of(status[i], node);
      const std::uint64_t count = pages_at(pagemap.get(), flags.get(), chunk[i].address);
      (side == kHot ? chunk[i].pair->hot_result : chunk[i].pair->cold_result) = static_cast<__u8>(result);
      if (result != HT_MOVE_DONE) {
        run.failed_pages[result] += count;
        continue;
      }
      chunk[i].pair->mover = HT_MOVER_SYSCALL;
      (side == kHot ? run.promoted_pages : run.demoted_pages) += count;
      run.mover_pages[HT_MOVER_SYSCALL] += count;
    }
  }
}

}  // namespace

void move_by_syscall(std::span<ht_pair> pairs, const std::array<int, HT_TIERS>& nodes, ht_exchange_run& run) {
  const __u32 nr = run.nr, flags = run.flags;
  run = {};
  run.nr = nr;
  run.flags = flags;
  if (flags & HT_EXCHANGE_SPLIT) {  // there is no call for it
    for (ht_pair& pair : pairs) {
      pair.hot_result = HT_MOVE_OTHER;
      ++run.failed_pages[HT_MOVE_OTHER];
    }
    return;
  }
  // A few pairs at a time, cold before hot: the room that leaves is the room
  // that is filled, and nobody else comes in between.
  for (std::size_t first = 0; first < pairs.size(); first += kChunk) {
    const auto part = pairs.subspan(first, std::min(kChunk, pairs.size() - first));
    std::map<std::uint32_t, std::vector<Page>> hot, cold;
    for (ht_pair& pair : part) {
      pair.hot_result = pair.cold_result = HT_MOVE_NONE;
      pair.mover = HT_MOVER_NONE;
      if (pair.hot_addr) hot[pair.hot_pid].push_back({&pair, pair.hot_addr});
      if (pair.cold_addr) cold[pair.cold_pid].push_back({&pair, pair.cold_addr});
    }
    for (const auto& [pid, pages] : cold) move_side(pages, pid, kCold, nodes[HT_TIER_SLOW], run);
    for (const auto& [pid, pages] : hot) move_side(pages, pid, kHot, nodes[HT_TIER_FAST], run);
  }
}

}  // namespace hypertier
