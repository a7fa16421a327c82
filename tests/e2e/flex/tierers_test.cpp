// SPDX-License-Identifier: GPL-2.0-or-later
// The host's side of tierers_guest: boots the lab with a balloon and a QMP socket
// and gives the orders that the guest asks for.
//   flex_tierers_test LAB BUILD GUEST HYPERFLEX_KO SYSTEM
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "qmp/qmp.hpp"

using namespace hypertier;

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  constexpr unsigned long long kMemory = 896ULL << 20;
  char pattern[] = "/tmp/hypertier-tierers-XXXXXX";
  const std::string dir = mkdtemp(pattern), socket = dir + "/qmp";
  const std::string lab = std::string(argv[1]) + " --build " + argv[2] + " --name flex_tierers_" + argv[5] +
                          " --icount --no-tierd --fail-on-warn --timeout 1500 --qemu -device --qemu virtio-balloon-pci,free-page-reporting=on"
                          " --qemu -qmp --qemu unix:" + socket + ",server=on,wait=off -- " + argv[3] + " " + argv[4] + " " + argv[5];
  FILE* out = popen(lab.c_str(), "r");
  if (!out) return perror("popen"), 1;
  std::unique_ptr<Qmp> qmp;
  char line[512];
  bool failed = false;
  while (fgets(line, sizeof line, out)) {
    if (strncmp(line, "order ", 6) != 0) {
      fputs(line, stdout);
      fflush(stdout);
      continue;
    }
    if (!qmp) {
      auto connected = Qmp::connect(socket, std::chrono::seconds(60));
      if (connected) qmp = std::make_unique<Qmp>(std::move(*connected));
      else printf("%s\n", connected.error().message.c_str()), failed = true;
    }
    const unsigned long long left = kMemory - (strtoull(line + 6, nullptr, 10) << 12);
    auto done = qmp ? qmp->command("balloon", {{"value", left}}) : fail("no QMP");
    if (!done) printf("the order failed: %s\n", done.error().message.c_str()), failed = true;
  }
  const int status = pclose(out);
  unlink(socket.c_str());
  rmdir(dir.c_str());
  return failed || !WIFEXITED(status) || WEXITSTATUS(status) ? 1 : 0;
}
