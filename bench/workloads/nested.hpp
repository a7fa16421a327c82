// SPDX-License-Identifier: GPL-2.0-or-later
// A virtual machine inside the lab: KVM, one CPU, no kernel. It runs one function on
// memory of this process, which a tiering system on this side may move under it.
//
// What the guest has is where it has it here: guest-virtual addresses are those of
// this process. And its page table root has the number of this process's own. So the
// simulated memory, which knows pages by root and virtual address, counts what the guest
// misses for the page that it is here.
#pragma once

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../tests/lab/vpebs_shared.h"

namespace workload {

class Nested {
 public:
  static constexpr uint64_t kHuge = 2 << 20;  // what the guest maps at once

  // Both must be multiples of kHuge.
  Nested(void* memory, uint64_t bytes) {
    const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) fail("cannot open /dev/kvm", "in the lab: modprobe kvm_amd");
    vm_ = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm_ < 0) fail("cannot make a virtual machine");
    const uint64_t start = reinterpret_cast<uint64_t>(memory);
    give(0, kMemory, memory, bytes);
    tables_ = static_cast<uint64_t*>(mmap(nullptr, kTables * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (tables_ == MAP_FAILED) fail("cannot map page tables");
    root_ = own_root();
    give(1, root_, tables_, kTables * kPage);
    for (uint64_t offset = 0; offset < bytes; offset += kHuge) map(start + offset, kMemory + offset);

    cpu_ = ioctl(vm_, KVM_CREATE_VCPU, 0);
    const int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (cpu_ < 0 || size < 0) fail("cannot make a virtual CPU");
    void* shared = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED, cpu_, 0);
    if (shared == MAP_FAILED) fail("cannot map the virtual CPU");
    run_ = static_cast<kvm_run*>(shared);
    know_all(kvm);
    close(kvm);
    long_mode();
  }
  Nested(const Nested&) = delete;
  Nested& operator=(const Nested&) = delete;

  // The next run() begins there; all of it in the guest's memory.
  void set(const void* code, const void* argument, const void* stack_end) {
    kvm_regs registers{};
    registers.rip = reinterpret_cast<uint64_t>(code);
    registers.rdi = reinterpret_cast<uint64_t>(argument);
    registers.rsp = reinterpret_cast<uint64_t>(stack_end) - 8;  // as after a call
    registers.rflags = 2;
    if (ioctl(cpu_, KVM_SET_REGS, &registers)) fail("cannot set the virtual CPU's registers");
  }

  // Until the guest halts; the next one goes on behind it.
  void run() {
    while (ioctl(cpu_, KVM_RUN, 0))
      if (errno != EINTR) fail("cannot run the nested guest");
    if (run_->exit_reason == KVM_EXIT_HLT) return;
    errno = 0;
    fail("the nested guest stopped with KVM's exit reason " + std::to_string(run_->exit_reason), "linux/kvm.h: 8 is a fault that it cannot handle, 17 one of KVM's own");
  }

 private:
  static constexpr uint64_t kPage = 4096;
  static constexpr uint64_t kTables = 8;           // one of each level, and where the memory crosses a border
  static constexpr uint64_t kMemory = 32ULL << 30;  // guest-physical: above any root of this process
  static constexpr uint64_t kPresent = 1, kWritable = 2, kLarge = 0x80;

  [[noreturn]] static void fail(const std::string& what, const char* hint = nullptr) {
    std::fprintf(stderr, "hotset: %s%s\n", what.c_str(), errno ? (std::string(": ") + strerror(errno)).c_str() : "");
    if (hint) std::fprintf(stderr, "HINT: %s\n", hint);
    std::exit(1);
  }

  // Without the virtual PEBS nobody asks whose misses they are: any number will do.
  static uint64_t own_root() {
    vpebs_space space{static_cast<__u32>(getpid()), 0, 0};
    const int fd = open(VPEBS_DEVICE, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno = 0, kPage;
    if (ioctl(fd, VPEBS_IOC_SPACE, &space)) fail("vpebs.ko does not tell this process's page table");
    close(fd);
    return space.cr3;
  }

  void give(uint32_t slot, uint64_t where, void* memory, uint64_t bytes) {
    kvm_userspace_memory_region region{slot, 0, where, bytes, reinterpret_cast<uint64_t>(memory)};
    if (ioctl(vm_, KVM_SET_USER_MEMORY_REGION, &region)) fail("cannot give memory to the nested guest");
  }

  void map(uint64_t address, uint64_t physical) {
    uint64_t* table = tables_;
    for (int shift = 39; shift > 21; shift -= 9) {
      uint64_t& entry = table[(address >> shift) % 512];
      if (!entry && used_ == kTables) fail("the nested guest's memory needs too many page tables");
      if (!entry) entry = (root_ + used_++ * kPage) | kPresent | kWritable;
      table = tables_ + ((entry & ~(kPage - 1)) - root_) / sizeof *table;
    }
    table[(address >> 21) % 512] = physical | kPresent | kWritable | kLarge;
  }

  // A CPU that was told nothing has no long mode.
  void know_all(int kvm) {
    constexpr uint32_t kMost = 256;
    struct {
      kvm_cpuid2 head;
      kvm_cpuid_entry2 entries[kMost];
    } all{};
    all.head.nent = kMost;
    if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &all) || ioctl(cpu_, KVM_SET_CPUID2, &all)) fail("cannot tell the virtual CPU what it can");
  }

  void long_mode() {
    constexpr uint64_t kProtected = 1 | 2 | 1 << 4 | 1 << 5 | 1 << 16 | 1ULL << 31;  // PE MP ET NE WP PG
    constexpr uint64_t kExtensions = 1 << 5 | 1 << 9 | 1 << 10;                      // PAE, SSE
    constexpr uint64_t kLong = 1 << 8 | 1 << 10;                                     // LME LMA
    kvm_sregs registers;
    if (ioctl(cpu_, KVM_GET_SREGS, &registers)) fail("cannot read the virtual CPU's registers");
    kvm_segment segment{};
    segment.limit = ~0U;
    segment.present = segment.s = segment.g = 1;
    segment.selector = 16;
    segment.type = 3;
    segment.db = 1;
    registers.ds = registers.es = registers.fs = registers.gs = registers.ss = segment;
    segment.selector = 8;
    segment.type = 11;
    segment.db = 0;
    segment.l = 1;
    registers.cs = segment;
    registers.cr0 = kProtected;
    registers.cr3 = root_;
    registers.cr4 = kExtensions;
    registers.efer = kLong;
    if (ioctl(cpu_, KVM_SET_SREGS, &registers)) fail("cannot put the virtual CPU into long mode");
  }

  int vm_ = -1, cpu_ = -1;
  kvm_run* run_ = nullptr;
  uint64_t* tables_ = nullptr;
  uint64_t root_ = 0, used_ = 1;
};

}  // namespace workload
