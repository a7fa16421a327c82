// SPDX-License-Identifier: GPL-2.0-or-later
// shortlived: keeps some children alive, each of which maps memory, touches it at
// random lines for a while and exits; every other one execs first, as a shell's do.
//
// Commands on stdin: go ("ok"), pause (no new ones, after the last has exited
// "paused" with how many there were), stop ("stopped").
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <string>

#include <CLI/CLI.hpp>

#include "../../../bench/workloads/commands.hpp"

namespace {

constexpr uint64_t kPage = 4096, kLine = 64;

struct Options {
  bool child = false;
  uint64_t size = 4 << 20;
  uint64_t ms = 300;      // a child's life: half of it to one and a half
  unsigned alive = 6;
  uint64_t filler = 1000;  // instructions between two accesses
  uint64_t seed = 1;
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "shortlived: %s: %s\n", what, strerror(errno));
  std::exit(1);
}

[[noreturn]] void live(const Options& o) {
  void* mapped = mmap(nullptr, o.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) _exit(1);
  auto* memory = static_cast<volatile char*>(mapped);
  for (uint64_t at = 0; at < o.size; at += kPage) memory[at] = 1;
  workload::Random random(o.seed);
  workload::for_ms(o.ms / 2 + random.below(o.ms), [&] {
    for (int i = 0; i < 256; ++i) {
      memory[random.below(o.size / kLine) * kLine] = 1;
      workload::burn(o.filler / 32);
    }
  });
  _exit(0);
}

void breed(const Options& o, uint64_t number) {
  const pid_t pid = fork();
  if (pid < 0) die("cannot fork");
  if (pid) return;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Options mine = o;
  mine.seed = o.seed * 100'000 + number;
  if (number % 2) live(mine);
  const std::string size = std::to_string(o.size), ms = std::to_string(o.ms), filler = std::to_string(o.filler),
                    seed = std::to_string(mine.seed);
  execl("/proc/self/exe", "shortlived", "--child", "--size", size.c_str(), "--ms", ms.c_str(), "--filler", filler.c_str(),
        "--seed", seed.c_str(), nullptr);
  _exit(127);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"processes that do not live long"};
  app.add_flag("--child", o.child, "be one of them");
  app.add_option("--size", o.size, "of each one's memory")->transform(CLI::AsSizeValue(false))->capture_default_str();
  app.add_option("--ms", o.ms)->capture_default_str();
  app.add_option("--alive", o.alive)->capture_default_str();
  app.add_option("--filler", o.filler)->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)) die("cannot switch huge pages off");
  if (o.child) live(o);

  workload::Commands commands;
  workload::answer("ready", {{"pid", getpid()}});
  bool going = false;
  uint64_t born = 0, failed = 0;
  unsigned alive = 0;
  auto reap = [&](int flags) {
    int status = 0;
    while (alive && waitpid(-1, &status, flags) > 0) {
      --alive;
      failed += status != 0;
    }
  };
  for (;;) {
    auto command = commands.next(!going);
    if (!command) {
      reap(WNOHANG);
      for (; alive < o.alive; ++alive) breed(o, ++born);
      usleep(5000);
      continue;
    }
    going = *command == "go";
    if (!going) reap(0);
    workload::answer(going ? "ok" : *command == "pause" ? "paused" : "stopped", {{"processes_total", born}, {"failed_total", failed}});
    if (*command == "stop") return failed != 0;
  }
}
