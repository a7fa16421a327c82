// SPDX-License-Identifier: GPL-2.0-or-later
// The sampler on the kernel's page-fault event: a PMU of software with real
// addresses, one sample a fault, so that counts are exact.
#pragma once

#include <linux/perf_event.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "adapter/adapter.hpp"
#include "adapter/sampler.hpp"
#include "sources/pmu.hpp"

namespace hypertier {

inline ChosenSource page_faults() {
  SourceEvent event{
      .name = "page-faults", .attr = {}, .leader = {}, .cpu_list = "/sys/devices/system/cpu/online"};
  event.attr.size = sizeof(event.attr);
  event.attr.type = PERF_TYPE_SOFTWARE;
  event.attr.config = PERF_COUNT_SW_PAGE_FAULTS;
  set_sampling(event.attr, 1, 0);
  return {.name = "page-faults", .description = "", .period = 1, .events = {event}, .probe = {}};
}

// Counts of one drain, by page: (space, page number) -> samples.
struct Drained {
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> pages;
  std::map<std::uint64_t, std::uint64_t> spaces;  // samples by space
  std::uint64_t samples = 0, stores = 0, granules = 0;
  std::uint64_t page_sum = 0;

  void add(const ht_granule& granule) {
    samples += granule.samples;
    stores += granule.stores;
    granules++;
    spaces[granule.space] += granule.samples;
    for (int page = 0; page < HT_GRANULE_PAGES; ++page) {
      std::uint32_t count = granule.pages[page / 2] >> (page % 2 * 16) & 0xffff;
      if (count) pages[{granule.space, granule.granule * HT_GRANULE_PAGES + page}] += count;
      page_sum += count;
    }
  }
};

inline Drained drain(SampleSource& source) {
  Drained drained;
  auto done = source.drain([&](const ht_granule& granule) { drained.add(granule); });
  if (!done) drained.samples = ~0ULL;
  return drained;
}

// Runs in a child of its own; true if it returned 0.
inline bool in_child(const std::function<int()>& body) {
  pid_t pid = fork();
  if (pid == 0) _exit(body());
  int status = -1;
  waitpid(pid, &status, 0);
  return pid > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Anonymous memory in single pages, at the start of a granule.
inline char* map_pages(std::size_t bytes) {
  char* area = static_cast<char*>(mmap(nullptr, bytes + HT_GRANULE_SIZE, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (area == MAP_FAILED) return nullptr;
  auto start = (reinterpret_cast<std::uintptr_t>(area) + HT_GRANULE_SIZE - 1) & ~(HT_GRANULE_SIZE - 1);
  madvise(reinterpret_cast<void*>(start), bytes, MADV_NOHUGEPAGE);
  return reinterpret_cast<char*>(start);
}

}  // namespace hypertier
