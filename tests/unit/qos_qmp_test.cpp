// SPDX-License-Identifier: GPL-2.0-or-later
// The QMP client against servers that are no QEMU: they end, hang, talk nonsense
// or without end; every wait ends and nothing is believed.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <thread>

#include "qmp/qmp.hpp"

using namespace hypertier;
using namespace std::chrono_literals;

namespace {

constexpr char kGreeting[] = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

// Serves one client by a function of its socket.
class Server {
 public:
  explicit Server(std::function<void(int)> talk) {
    char pattern[] = "/tmp/hypertier-qmp-XXXXXX";
    directory_ = mkdtemp(pattern);
    path = directory_ + "/qmp";
    listener_ = socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) || listen(listener_, 1)) abort();
    thread_ = std::thread([this, talk] {
      const int client = accept(listener_, nullptr, nullptr);
      talk(client);
      close(client);
    });
  }
  ~Server() {
    thread_.join();
    close(listener_);
    std::filesystem::remove_all(directory_);
  }
  std::string path;

 private:
  std::string directory_;
  int listener_;
  std::thread thread_;
};

bool say(int socket, const std::string& text) {
  return send(socket, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
}
void wait_for_a_line(int socket) {
  char c = 0;
  while (c != '\n' && read(socket, &c, 1) == 1) {
  }
}
void until_closed(int socket) {
  char chunk[4096];
  while (read(socket, chunk, sizeof chunk) > 0) {
  }
}

TEST(Qmp, BelievesNoOtherServer) {
  for (const char* text : {"", "x", "hello\n", "{\"no\": 1}\n", "[1]\n", "7\n", "\n"}) {
    Server server([&](int client) { say(client, text); });
    EXPECT_FALSE(Qmp::connect(server.path, 500ms)) << text;
  }
}

TEST(Qmp, ASilentServerIsLeftAfterTheTimeout) {
  Server server(until_closed);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_FALSE(Qmp::connect(server.path, 300ms));
  EXPECT_LT(std::chrono::steady_clock::now() - start, 20s);
}

TEST(Qmp, AnAnswerWithoutEndIsDropped) {
  size_t sent = 0;
  {
    Server server([&](int client) {
      say(client, kGreeting);
      wait_for_a_line(client);
      const std::string chunk(65536, 'a');
      while (sent < (64 << 20) && say(client, chunk)) sent += chunk.size();
    });
    EXPECT_FALSE(Qmp::connect(server.path, 20s));
  }
  EXPECT_LT(sent, size_t{16} << 20) << "the client went on reading";
}

TEST(Qmp, NonsenseInAnAnswerIsAnError) {
  for (const char* text : {"{}\n{}\nx\n", "{\"error\": \"\\ud800\"}\n", "{\"error\": {\"class\": 7}}\n", "null\n"}) {
    Server server([&](int client) {
      say(client, kGreeting);
      wait_for_a_line(client);
      say(client, "{\"return\": {}}\n");
      wait_for_a_line(client);
      say(client, text);
    });
    auto qmp = Qmp::connect(server.path, 5s);
    ASSERT_TRUE(qmp) << qmp.error().message;
    EXPECT_FALSE(qmp->command("query-status")) << text;
  }
}

}  // namespace
