// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/server.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace hypertier {
namespace {

constexpr std::size_t kConnectionsMax = 32;

}  // namespace

Result<std::unique_ptr<Server>> Server::listen(const std::filesystem::path& path, Handler handler) {
  if (auto checked = checked_socket_path(path); !checked) return std::unexpected(checked.error());
  std::unique_ptr<Server> server(new Server(std::move(handler)));
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  server->listener_ = Fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  server->epoll_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  if (!server->listener_ || !server->epoll_) return fail_errno("cannot make a socket", errno);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path.c_str());
  // The lock says that no other tierd lives: what is there is stale.
  unlink(path.c_str());
  const mode_t before = umask(0177);
  const int bound = bind(server->listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address));
  const int bind_error = errno;
  umask(before);
  if (bound != 0) return fail_errno("cannot make the socket " + path.string(), bind_error);
  server->path_ = path;
  if (::listen(server->listener_.get(), kConnectionsMax) != 0)
    return fail_errno("cannot listen on " + path.string(), errno);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = server->listener_.get();
  if (epoll_ctl(server->epoll_.get(), EPOLL_CTL_ADD, server->listener_.get(), &event) != 0)
    return fail_errno("cannot wait for " + path.string(), errno);
  return server;
}

Server::~Server() {
  if (!path_.empty()) unlink(path_.c_str());
}

void Server::serve() {
  std::array<epoll_event, 16> ready;
  const int count = epoll_wait(epoll_.get(), ready.data(), ready.size(), 0);
  for (int i = 0; i < count; ++i) {
    const epoll_event& event = ready[static_cast<std::size_t>(i)];
    if (event.data.fd == listener_.get()) {
      accept_all();
      continue;
    }
    const auto found = connections_.find(event.data.fd);
    if (found == connections_.end()) continue;
    if ((event.events & EPOLLIN) != 0) receive(found->second);
    else if ((event.events & (EPOLLHUP | EPOLLERR)) != 0) {
      connections_.erase(found);
      continue;
    }
    if (!send(found->second)) connections_.erase(found);
  }
}

void Server::accept_all() {
  for (;;) {
    Fd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) return;
    if (connections_.size() >= kConnectionsMax)
      connections_.erase(std::min_element(connections_.begin(), connections_.end(), [](const auto& a, const auto& b) {
        return a.second.order < b.second.order;
      }));
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = socket.get();
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket.get(), &event) != 0) continue;
    Connection connection;
    const int fd = socket.get();
    connection.socket = std::move(socket);
    connection.order = ++arrivals_;
    ucred peer{};
    socklen_t size = sizeof(peer);
    const bool root = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == 0;
    auto& kept = connections_[fd] = std::move(connection);
    if (!root) {
      queue(kept, error_json({"only root may talk to tierd", "run it again as root, for example with sudo", 0}));
      kept.closing = true;
      if (!send(kept)) connections_.erase(fd);
    }
  }
}

void Server::receive(Connection& connection) {
  std::array<char, 65536> buffer;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control;
  while (!connection.closing) {
    iovec part{buffer.data(), buffer.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = recvmsg(connection.socket.get(), &message, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    // Every descriptor that arrives is ours to close; a request has one at most.
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); got >= 0 && header != nullptr; header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
      const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (std::size_t i = 0; i < count; ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof(fd));
        connection.file = Fd(fd);
      }
    }
    if (got <= 0) {
      connection.closing = true;
      return;
    }
    connection.in.append(buffer.data(), static_cast<std::size_t>(got));
    answer(connection);
  }
}

void Server::answer(Connection& connection) {
  std::uint32_t length = 0;
  while (!connection.closing && connection.in.size() >= sizeof(length)) {
    std::memcpy(&length, connection.in.data(), sizeof(length));
    if (length > kMessageMaxBytes) {
      queue(connection, error_json({"a message of " + std::to_string(length) + " bytes is larger than 1 MiB",
                                    "the other end may not be tierctl", 0}));
      connection.closing = true;
      return;
    }
    if (connection.in.size() < sizeof(length) + length) return;
    const Json request = Json::parse(connection.in.begin() + sizeof(length),
                                     connection.in.begin() + sizeof(length) + length, nullptr, false);
    connection.in.erase(0, sizeof(length) + length);
    Fd file = std::move(connection.file);
    if (!request.is_object()) {
      queue(connection, error_json({"a message is not a JSON object", "the other end may not be tierctl", 0}));
      connection.closing = true;
      return;
    }
    queue(connection, handler_(request, std::move(file)));
  }
}

void Server::queue(Connection& connection, const Json& reply) {
  std::string text = reply.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMessageMaxBytes)
    text = error_json({"tierd's answer would be larger than 1 MiB", "ask for less", 0}).dump();
  const auto length = static_cast<std::uint32_t>(text.size());
  connection.out.append(reinterpret_cast<const char*>(&length), sizeof(length));
  connection.out += text;
}

bool Server::send(Connection& connection) {
  while (!connection.out.empty()) {
    const ssize_t sent = ::send(connection.socket.get(), connection.out.data(), connection.out.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (sent < 0) return false;
    connection.out.erase(0, static_cast<std::size_t>(sent));
  }
  if (connection.out.empty() && connection.closing) return false;
  epoll_event event{};
  event.events = (connection.closing ? 0U : EPOLLIN) | (connection.out.empty() ? 0U : EPOLLOUT);
  event.data.fd = connection.socket.get();
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, connection.socket.get(), &event);
  return true;
}

}  // namespace hypertier
