// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/protocol.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

namespace hypertier {
namespace {

// A load may wait for the verifier and for an epoch on a slow machine.
constexpr timeval kReplyTimeout{120, 0};

Result<> send_all(int socket, const char* data, std::size_t size, int fd) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  while (size > 0) {
    iovec part{const_cast<char*>(data), size};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (fd >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
    }
    const ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return fail_errno("cannot send to tierd", errno);
    fd = -1;
    data += sent;
    size -= static_cast<std::size_t>(sent);
  }
  return {};
}

Result<> receive_all(int socket, char* data, std::size_t size) {
  while (size > 0) {
    const ssize_t got = recv(socket, data, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
      return fail("tierd did not answer within " + std::to_string(kReplyTimeout.tv_sec) + " s",
                  "it may be busy or stopped: see its log");
    if (got < 0) return fail_errno("cannot hear from tierd", errno);
    if (got == 0) return fail("tierd hung up before it answered", "it may have ended: see its log, or start it again");
    data += got;
    size -= static_cast<std::size_t>(got);
  }
  return {};
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

Json error_json(const Error& error) {
  Json reply;
  reply["schema"] = kSchema;
  reply["error"]["message"] = error.message;
  reply["error"]["hint"] = error.hint;
  return reply;
}

Result<std::filesystem::path> checked_socket_path(const std::filesystem::path& path) {
  if (path.native().size() >= sizeof(sockaddr_un::sun_path))
    return fail("socket path " + path.string() + " is longer than " + std::to_string(sizeof(sockaddr_un::sun_path) - 1) +
                " bytes");
  return path;
}

Result<Json> ask_tierd(const std::filesystem::path& path, Json request, int fd) {
  if (auto checked = checked_socket_path(path); !checked) return std::unexpected(checked.error());
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return fail_errno("cannot make a socket", errno);
  setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &kReplyTimeout, sizeof(kReplyTimeout));
  setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &kReplyTimeout, sizeof(kReplyTimeout));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path.c_str());
  if (connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    if (error == EACCES || error == EPERM)
      return fail("only root may talk to tierd", "run it again as root, for example with sudo");
    if (error == ENOENT || error == ECONNREFUSED) {
      auto refused = fail("tierd is not running: nothing listens on " + path.string(),
                          "start it as root: tierd --help tells how");
      refused.error().err = ECONNREFUSED;
      return refused;
    }
    return fail_errno("cannot connect to " + path.string(), error);
  }
  request["protocol"] = kProtocol;
  const std::string text = request.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMessageMaxBytes)
    return fail("the request has " + std::to_string(text.size()) + " bytes, more than 1 MiB", "give fewer settings");
  const auto length = static_cast<std::uint32_t>(text.size());
  std::string message(reinterpret_cast<const char*>(&length), sizeof(length));
  message += text;
  if (auto sent = send_all(socket.get(), message.data(), message.size(), fd); !sent) return std::unexpected(sent.error());

  std::uint32_t reply_length = 0;
  if (auto got = receive_all(socket.get(), reinterpret_cast<char*>(&reply_length), sizeof(reply_length)); !got)
    return std::unexpected(got.error());
  if (reply_length > kMessageMaxBytes) return fail("tierd's answer is larger than 1 MiB", "tierctl version");
  std::string reply_text(reply_length, '\0');
  if (auto got = receive_all(socket.get(), reply_text.data(), reply_text.size()); !got)
    return std::unexpected(got.error());
  Json reply = Json::parse(reply_text, nullptr, false);
  if (!reply.is_object()) return fail("tierd's answer is not JSON", "tierctl version");
  if (reply.contains("error"))
    return fail(reply["error"].value("message", "tierd failed"), reply["error"].value("hint", ""));
  return reply;
}

Result<Fd> take_lock() {
  const std::filesystem::path path = kLockFile;
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  Fd lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!lock) return fail_errno("cannot open " + path.string(), errno, "tierd needs root");
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return fail_errno("cannot lock " + path.string(), errno);
    const int owner = lock_owner();
    return fail("tierd is already running" + (owner > 0 ? " (pid " + std::to_string(owner) + ")" : std::string()),
                "talk to it with tierctl, or stop it first");
  }
  const std::string pid = std::to_string(getpid()) + "\n";
  if (ftruncate(lock.get(), 0) != 0 || pwrite(lock.get(), pid.data(), pid.size(), 0) < 0)
    return fail_errno("cannot write " + path.string(), errno);
  return lock;
}

int lock_owner() {
  std::ifstream file(kLockFile);
  int pid = 0;
  file >> pid;
  return pid;
}

}  // namespace hypertier
