// SPDX-License-Identifier: GPL-2.0-or-later
// tierd's end of the socket. A slow or silent client never holds up an epoch:
// everything is non-blocking, and serve() does only what is ready.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "tierd/protocol.hpp"

namespace hypertier {

class Server {
 public:
  using Handler = std::function<Json(const Json& request, Fd file)>;

  static Result<std::unique_ptr<Server>> listen(const std::filesystem::path& path, Handler handler);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  int fd() const { return epoll_.get(); }  // poll it for POLLIN, then serve()
  void serve();

 private:
  struct Connection {
    Fd socket;
    Fd file;
    std::string in, out;
    std::uint64_t order = 0;  // of arrival
    bool closing = false;     // once out is sent
  };

  explicit Server(Handler handler) : handler_(std::move(handler)) {}
  void accept_all();
  void receive(Connection& connection);
  void answer(Connection& connection);
  void queue(Connection& connection, const Json& reply);
  bool send(Connection& connection);  // false: the connection is over

  Handler handler_;
  std::filesystem::path path_;
  Fd listener_, epoll_;
  std::map<int, Connection> connections_;
  std::uint64_t arrivals_ = 0;
};

}  // namespace hypertier
