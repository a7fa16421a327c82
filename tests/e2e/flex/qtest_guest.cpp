// SPDX-License-Identifier: GPL-2.0-or-later
#include "qtest_guest.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

namespace hypertier::test {
namespace {

// Legacy virtio-pci, without MSI-X.
constexpr uint16_t kGuestFeatures = 4, kQueuePfn = 8, kQueueSize = 12, kQueueSelect = 14, kQueueNotify = 16, kStatus = 18, kConfig = 20;
constexpr unsigned kInflate = 0, kStats = 2, kReporting = 3;
constexpr uint32_t kFeatures = 1 << 1 | 1 << 5;  // stats, reporting
constexpr uint32_t kSlot = 4;
constexpr uint64_t kRings = 1 << 20, kRingBytes = 64 << 10, kBuffers = 2 << 20;  // in the fast tier

}  // namespace

Result<std::unique_ptr<QtestGuest>> QtestGuest::start(GuestOptions options) {
  options.boot = false;
  options.qtest = true;
  auto vm = Guest::start(options);
  if (!vm) return std::unexpected(vm.error());
  std::unique_ptr<QtestGuest> guest(new QtestGuest);
  guest->vm_ = std::move(*vm);
  guest->socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  timeval limit{60, 0};
  setsockopt(guest->socket_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
  (guest->vm_->directory() + "/qtest").copy(address.sun_path, sizeof address.sun_path - 1);
  if (connect(guest->socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0)
    return fail_errno("cannot reach QEMU's qtest socket", errno);
  // Find the device, give it an I/O window, let it read and write memory.
  const uint32_t config = 0x80000000u | kSlot << 11;
  guest->out('l', 0xcf8, config);
  if ((guest->in('l', 0xcfc) & 0xffff) != 0x1af4) return fail("there is no virtio device in the slot" + guest->failure_);
  guest->out('l', 0xcf8, config | 0x10);
  guest->out('l', 0xcfc, guest->io_);
  guest->out('l', 0xcf8, config | 0x04);
  guest->out('w', 0xcfc, 7);
  guest->out('b', guest->io_ + kStatus, 0);
  guest->out('b', guest->io_ + kStatus, 3);
  guest->out('l', guest->io_ + kGuestFeatures, kFeatures);
  guest->touch(kRings, kBuffers + (64 << 10) - kRings, 0);  // what the driver itself uses is in use from the start
  for (unsigned q : {0u, 1u, kStats, kReporting}) guest->set_up(q);
  guest->out('b', guest->io_ + kStatus, 7);
  if (!guest->failure_.empty()) return fail(guest->failure_);
  return guest;
}

QtestGuest::~QtestGuest() {
  if (socket_ >= 0) close(socket_);
}

std::string QtestGuest::ask(const std::string& line) {
  const std::string text = line + "\n";
  if (send(socket_, text.data(), text.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(text.size())) {
    if (failure_.empty()) failure_ = "cannot write to qtest: " + line.substr(0, 60);
    return "";
  }
  for (;;) {
    if (const auto end = pending_.find('\n'); end != std::string::npos) {
      const std::string answer = pending_.substr(0, end);
      pending_.erase(0, end + 1);
      if (answer.starts_with("IRQ ")) continue;
      if (!answer.starts_with("OK") && failure_.empty()) failure_ = line.substr(0, 60) + ": " + answer;
      return answer.size() > 3 ? answer.substr(3) : "";
    }
    char chunk[4096];
    const ssize_t n = recv(socket_, chunk, sizeof chunk, 0);
    if (n <= 0) {
      if (failure_.empty()) failure_ = "no answer from qtest to " + line.substr(0, 60);
      return "";
    }
    pending_.append(chunk, static_cast<size_t>(n));
  }
}

uint32_t QtestGuest::in(char width, uint16_t port) {
  char line[64];
  snprintf(line, sizeof line, "in%c 0x%x", width, port);
  return static_cast<uint32_t>(strtoul(ask(line).c_str(), nullptr, 0));
}

void QtestGuest::out(char width, uint16_t port, uint32_t value) {
  char line[64];
  snprintf(line, sizeof line, "out%c 0x%x 0x%x", width, port, value);
  ask(line);
}

void QtestGuest::write(uint64_t address, const void* data, size_t size) {
  std::string line(64, '\0');
  line.resize(static_cast<size_t>(snprintf(line.data(), line.size(), "write 0x%llx 0x%zx 0x", static_cast<unsigned long long>(address), size)));
  char hex[3];
  for (size_t i = 0; i < size; i++) {
    snprintf(hex, sizeof hex, "%02x", static_cast<const uint8_t*>(data)[i]);
    line += hex;
  }
  ask(line);
}

uint16_t QtestGuest::read16(uint64_t address) {
  char line[64];
  snprintf(line, sizeof line, "readw 0x%llx", static_cast<unsigned long long>(address));
  return static_cast<uint16_t>(strtoul(ask(line).c_str(), nullptr, 0));
}

void QtestGuest::touch(uint64_t address, uint64_t bytes, uint8_t value) {
  char line[96];
  snprintf(line, sizeof line, "memset 0x%llx 0x%llx 0x%x", static_cast<unsigned long long>(address), static_cast<unsigned long long>(bytes), value);
  ask(line);
}

uint8_t QtestGuest::peek(uint64_t address) {
  char line[64];
  snprintf(line, sizeof line, "readb 0x%llx", static_cast<unsigned long long>(address));
  return static_cast<uint8_t>(strtoul(ask(line).c_str(), nullptr, 0));
}

void QtestGuest::set_up(unsigned index) {
  auto& queue = queues_[index];
  out('w', io_ + kQueueSelect, index);
  queue.size = static_cast<uint16_t>(in('w', io_ + kQueueSize));
  queue.ring = kRings + index * kRingBytes;
  if (queue.size == 0 && failure_.empty()) failure_ = "queue " + std::to_string(index) + " is missing";
  out('l', io_ + kQueuePfn, static_cast<uint32_t>(queue.ring >> 12));
}

void QtestGuest::submit(unsigned index, const std::vector<Buffer>& buffers, bool wait) {
  auto& queue = queues_[index];
  const uint64_t available = queue.ring + 16ULL * queue.size;
  const uint64_t used = (available + 6 + 2ULL * queue.size + 4095) & ~4095ULL;
  for (size_t i = 0; i < buffers.size(); i++) {
    struct {
      uint64_t address;
      uint32_t bytes;
      uint16_t flags, next;
    } descriptor{buffers[i].address, buffers[i].bytes,
                 static_cast<uint16_t>((i + 1 < buffers.size() ? 1 : 0) | (buffers[i].device_writes ? 2 : 0)), static_cast<uint16_t>(i + 1)};
    write(queue.ring + 16 * i, &descriptor, sizeof descriptor);
  }
  const uint16_t head = 0, next = static_cast<uint16_t>(queue.available + 1);
  write(available + 4 + 2ULL * (queue.available % queue.size), &head, 2);
  write(available + 2, &next, 2);
  queue.available = next;
  out('w', io_ + kQueueNotify, index);
  if (!wait) return;
  for (int i = 0; i < 2000; i++) {
    if (read16(used + 2) == queue.available) {
      queue.used = queue.available;
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (failure_.empty()) failure_ = "the device did not use a buffer of queue " + std::to_string(index);
}

void QtestGuest::inflate(const std::vector<uint32_t>& pfns) {
  for (size_t i = 0; i < pfns.size(); i += 256) {
    const size_t n = std::min<size_t>(256, pfns.size() - i);
    write(kBuffers, pfns.data() + i, n * 4);
    submit(kInflate, {{kBuffers, static_cast<uint32_t>(n * 4), false}}, true);
  }
}

void QtestGuest::report(const std::vector<std::pair<uint64_t, uint32_t>>& ranges) {
  std::vector<Buffer> buffers;
  for (const auto& [address, bytes] : ranges) buffers.push_back({address, bytes, true});
  submit(kReporting, buffers, true);
}

void QtestGuest::claim_actual(uint32_t pages) { out('l', io_ + kConfig + 4, pages); }

uint32_t QtestGuest::num_pages() { return in('l', io_ + kConfig); }

bool QtestGuest::stats_taken() {
  // The device keeps the buffer and hands it back when the host asks again.
  auto& queue = queues_[kStats];
  const uint64_t available = queue.ring + 16ULL * queue.size;
  const uint64_t used = (available + 6 + 2ULL * queue.size + 4095) & ~4095ULL;
  return !stats_sent_ || read16(used + 2) == queue.available;
}

void QtestGuest::claim_stats(const std::vector<std::pair<uint16_t, uint64_t>>& stats) {
  for (int i = 0; !stats_taken(); i++) {
    if (i == 1000) {
      if (failure_.empty()) failure_ = "the host does not ask for statistics";
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::string bytes;
  for (const auto& [tag, value] : stats) {
    bytes.append(reinterpret_cast<const char*>(&tag), 2);
    bytes.append(reinterpret_cast<const char*>(&value), 8);
  }
  write(kBuffers + 4096, bytes.data(), bytes.size());
  submit(kStats, {{kBuffers + 4096, static_cast<uint32_t>(bytes.size()), false}}, false);
  stats_sent_ = true;
}

}  // namespace hypertier::test
