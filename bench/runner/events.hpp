// SPDX-License-Identifier: GPL-2.0-or-later
// The virtual PEBS opened by ourselves, beside tierd: all events of one period
// get the same samples.
#pragma once

#include <bpf/bpf.h>
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "../../tests/e2e/pipeline/harness.hpp"

namespace bench {

// The virtual PEBS on each CPU.
class Events {
 public:
  Events(uint64_t period, bool ring) {
    perf_event_attr attr{};
    attr.size = sizeof attr;
    attr.type = static_cast<uint32_t>(std::stoul(e2e::read_file("/sys/bus/event_source/devices/vpebs/type")));
    attr.sample_period = period;
    attr.sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT;
    attr.exclude_kernel = 1;
    attr.disabled = 1;
    if (ring) {
      attr.watermark = 1;  // wakes up its reader when half full, as a thrifty collector does
      attr.wakeup_watermark = kRing / 2;
    } else {
      attr.wakeup_events = 1;
    }
    for (int cpu = 0; cpu < static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); cpu++) {
      int fd = static_cast<int>(syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC));
      if (fd < 0) e2e::die("cannot open the virtual PEBS");
      fds_.push_back(fd);
      if (ring) {
        void* map = mmap(nullptr, kRing + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED) e2e::die("cannot map the perf ring buffer");
        rings_.push_back(static_cast<perf_event_mmap_page*>(map));
      }
    }
  }
  ~Events() {
    for (auto* ring : rings_) munmap(ring, kRing + 4096);
    for (int fd : fds_) close(fd);
  }
  // A program that looks at nothing and says that the sample is dealt with.
  void attach_empty() {
    const bpf_insn code[] = {{BPF_ALU64 | BPF_MOV | BPF_K, BPF_REG_0, 0, 0, 0}, {BPF_JMP | BPF_EXIT, 0, 0, 0, 0}};
    program_ = bpf_prog_load(BPF_PROG_TYPE_PERF_EVENT, "empty", "GPL", code, 2, nullptr);
    if (program_ < 0) e2e::die("cannot load an empty BPF program");
    for (int fd : fds_)
      if (ioctl(fd, PERF_EVENT_IOC_SET_BPF, program_)) e2e::die("cannot attach a BPF program to the virtual PEBS");
    close(program_);
  }
  void enable(bool on) {
    for (int fd : fds_) ioctl(fd, on ? PERF_EVENT_IOC_ENABLE : PERF_EVENT_IOC_DISABLE, 0);
  }
  const std::vector<int>& fds() const { return fds_; }

  struct Record {
    perf_event_header header;
    uint32_t pid, tid;
    uint64_t address, weight, source;
  };
  template <class F>
  uint64_t drain(F&& use) {
    uint64_t count = 0;
    for (auto* ring : rings_) {
      const char* data = reinterpret_cast<const char*>(ring) + 4096;
      uint64_t tail = ring->data_tail;
      const uint64_t head = __atomic_load_n(&ring->data_head, __ATOMIC_ACQUIRE);
      while (tail < head) {
        Record record;
        const uint64_t at = tail % kRing, first = std::min<uint64_t>(sizeof record, kRing - at);
        std::memcpy(&record, data + at, first);
        if (first < sizeof record) std::memcpy(reinterpret_cast<char*>(&record) + first, data, sizeof record - first);
        if (record.header.type == PERF_RECORD_SAMPLE) use(record), count++;
        tail += record.header.size;
      }
      __atomic_store_n(&ring->data_tail, tail, __ATOMIC_RELEASE);
    }
    return count;
  }

 private:
  static constexpr uint64_t kRing = 1 << 20;
  std::vector<int> fds_;
  std::vector<perf_event_mmap_page*> rings_;
  int program_ = -1;
};

}  // namespace bench
