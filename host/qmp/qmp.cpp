// SPDX-License-Identifier: GPL-2.0-or-later
#include "qmp/qmp.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>

namespace hypertier {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxMessageBytes = 4 << 20;

// Until fd is ready: 1 ready, 0 too late, -1 error.
int wait_for(int fd, short events, Clock::time_point deadline) {
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd p{fd, events, 0};
    const int n = poll(&p, 1, static_cast<int>(std::max<long long>(left, 0)));
    if (n < 0 && errno == EINTR) continue;
    return n;
  }
}

}  // namespace

Qmp::Qmp(Qmp&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      path_(std::move(other.path_)),
      timeout_(other.timeout_),
      buffer_(std::move(other.buffer_)) {}

Qmp& Qmp::operator=(Qmp&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  std::swap(timeout_, other.timeout_);
  std::swap(buffer_, other.buffer_);
  return *this;
}

Qmp::~Qmp() {
  if (fd_ >= 0) close(fd_);
}

Result<Qmp> Qmp::connect(const std::string& path, std::chrono::milliseconds timeout) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return fail("the path of the QMP socket " + path + " is too long");
  path.copy(address.sun_path, path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return fail_errno("cannot make a socket", errno);
  Qmp qmp(fd, path, timeout);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0)
    return fail_errno("cannot connect to the QMP socket " + path, errno,
                      errno == EAGAIN ? "Another client holds it; give the VM a second -qmp socket."
                                      : "Is the VM running, with -qmp unix:" + path + ",server=on,wait=off ?");
  // QEMU greets at once, unless it hangs or serves another client.
  auto greeting = qmp.read_message(Clock::now() + timeout);
  if (!greeting) return std::unexpected(greeting.error());
  if (!greeting->contains("QMP")) return fail(path + " is no QMP socket: it sent no greeting");
  if (auto done = qmp.command("qmp_capabilities"); !done) return std::unexpected(done.error());
  return qmp;
}

Result<nlohmann::json> Qmp::read_message(Clock::time_point deadline) {
  for (;;) {
    if (const auto end = buffer_.find('\n'); end != std::string::npos) {
      auto message = nlohmann::json::parse(buffer_.substr(0, end), nullptr, false);
      buffer_.erase(0, end + 1);
      if (message.is_discarded() || !message.is_object()) return fail(path_ + " sent something that is not JSON");
      return message;
    }
    if (buffer_.size() > kMaxMessageBytes) return fail(path_ + " sent a message above 4 MiB");
    const int ready = wait_for(fd_, POLLIN, deadline);
    if (ready == 0)
      return fail("QEMU does not answer on " + path_ + " within " + std::to_string(timeout_.count()) + " ms",
                  "It hangs, or another client holds the socket; give the VM a second -qmp socket.");
    char chunk[65536];
    const ssize_t n = ready < 0 ? -1 : recv(fd_, chunk, sizeof chunk, 0);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) return fail_errno("cannot read from " + path_, errno);
    if (n == 0) return fail("QEMU closed " + path_, "The VM has ended.");
    buffer_.append(chunk, static_cast<size_t>(n));
  }
}

Result<nlohmann::json> Qmp::command(const std::string& name, nlohmann::json arguments) {
  nlohmann::json request{{"execute", name}};
  if (!arguments.empty()) request["arguments"] = std::move(arguments);
  const std::string text = request.dump() + "\n";
  const auto deadline = Clock::now() + timeout_;
  for (size_t sent = 0; sent < text.size();) {
    const ssize_t n = send(fd_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (n >= 0) {
      sent += static_cast<size_t>(n);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return fail_errno("cannot write to " + path_, errno, "The VM has ended.");
    if (wait_for(fd_, POLLOUT, deadline) <= 0)
      return fail("QEMU does not read from " + path_ + " within " + std::to_string(timeout_.count()) + " ms");
  }
  for (;;) {
    auto message = read_message(deadline);
    if (!message) return message;
    if (message->contains("return")) return (*message)["return"];
    if (message->contains("error"))
      return fail("QEMU refuses " + name + ": " + (*message)["error"].dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
  }
}

}  // namespace hypertier
