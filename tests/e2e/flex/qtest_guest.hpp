// SPDX-License-Identifier: GPL-2.0-or-later
// A QEMU whose guest is the test: it writes guest memory and plays the balloon
// driver over legacy virtio-pci by the qtest protocol. No kernel boots, and the
// driver may be as hostile as it likes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "guest.hpp"

namespace hypertier::test {

class QtestGuest {
 public:
  // Started, with the balloon's queues set up.
  [[nodiscard]] static Result<std::unique_ptr<QtestGuest>> start(GuestOptions options);
  ~QtestGuest();

  void touch(uint64_t address, uint64_t bytes, uint8_t value = 1);  // writes guest memory
  uint8_t peek(uint64_t address);
  void inflate(const std::vector<uint32_t>& pfns);                  // 4 KiB pages
  void report(const std::vector<std::pair<uint64_t, uint32_t>>& ranges);  // address, bytes
  void claim_actual(uint32_t pages);
  // Answers the stats queue with these (tag, value) pairs; the answer before
  // must have been taken (stats_taken), or this waits for it.
  void claim_stats(const std::vector<std::pair<uint16_t, uint64_t>>& stats);
  bool stats_taken();
  uint32_t num_pages();  // what the host asks for
  Guest& vm() { return *vm_; }
  const std::string& failure() const { return failure_; }  // the first thing that went wrong

 private:
  struct Queue {
    uint64_t ring = 0;
    uint16_t size = 0, available = 0, used = 0;
  };
  QtestGuest() = default;
  std::string ask(const std::string& line);
  uint32_t in(char width, uint16_t port);
  void out(char width, uint16_t port, uint32_t value);
  void write(uint64_t address, const void* data, size_t size);
  uint16_t read16(uint64_t address);
  void set_up(unsigned index);
  struct Buffer {
    uint64_t address;
    uint32_t bytes;
    bool device_writes;
  };
  // Puts a chain on the queue; waits until the device has used it unless told not to.
  void submit(unsigned index, const std::vector<Buffer>& buffers, bool wait);

  std::unique_ptr<Guest> vm_;
  int socket_ = -1;
  std::string pending_, failure_;
  uint16_t io_ = 0xc000;
  Queue queues_[4];
  bool stats_sent_ = false;
};

}  // namespace hypertier::test
