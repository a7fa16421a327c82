// SPDX-License-Identifier: GPL-2.0-or-later
// send_raw SOCKET LENGTH TEXT: a message whose header says LENGTH, whatever
// TEXT is; prints the answer. For what tierctl would never send.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) return 1;
  const auto length = static_cast<std::uint32_t>(std::strtoul(argv[2], nullptr, 10));
  std::string message(reinterpret_cast<const char*>(&length), sizeof(length));
  message += argv[3];
  if (send(fd, message.data(), message.size(), MSG_NOSIGNAL) < 0) return 1;
  std::uint32_t reply = 0;
  if (recv(fd, &reply, sizeof(reply), MSG_WAITALL) != sizeof(reply) || reply > (1U << 20)) return 1;
  std::string text(reply, '\0');
  if (recv(fd, text.data(), text.size(), MSG_WAITALL) != static_cast<ssize_t>(text.size())) return 1;
  std::puts(text.c_str());
}
