// SPDX-License-Identifier: GPL-2.0-or-later
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "tierd/server.hpp"
#include "tierhostd/daemon.hpp"

namespace {

using namespace hypertier;

Result<> run(const HostOptions& options) {
  if (geteuid() != 0) return fail("tierhostd needs root", "Run it as root, for example with sudo.");
  std::error_code ignored;
  std::filesystem::create_directories(options.socket.parent_path(), ignored);
  const auto lock_path = options.socket.string() + ".lock";
  Fd lock(open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) return fail_errno("cannot open " + lock_path, errno);
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0)
    return fail("tierhostd is already running on " + options.socket.string(), "Talk to it with tierctl vm, or stop it first.");

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigprocmask(SIG_BLOCK, &signals, nullptr);  // before any thread: they inherit it
  Fd ends(signalfd(-1, &signals, SFD_CLOEXEC));

  HostDaemon daemon(options);
  if (auto loaded = daemon.load_state(); !loaded) return loaded;
  auto server = Server::listen(options.socket, [&](const Json& request, Fd) { return daemon.answer(request); });
  if (!server) return std::unexpected(server.error());

  Fd timer(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  const timespec tick{options.tick_ms / 1000, options.tick_ms % 1000 * 1000000L};
  const itimerspec every{tick, {0, 1}};
  timerfd_settime(timer.get(), 0, &every, nullptr);
  fprintf(stderr, "tierhostd: listening on %s; accounting: %s\n", options.socket.c_str(), daemon.accounting_note().c_str());
  for (;;) {
    pollfd fds[] = {{timer.get(), POLLIN, 0}, {(*server)->fd(), POLLIN, 0}, {ends.get(), POLLIN, 0}};
    if (poll(fds, 3, -1) < 0 && errno != EINTR) return fail_errno("poll", errno);
    if (fds[2].revents) return {};
    uint64_t expirations;
    if (read(timer.get(), &expirations, sizeof expirations) > 0) daemon.tick();
    if (fds[1].revents) (*server)->serve();
  }
}

}  // namespace

int main(int argc, char** argv) {
  HostOptions options;
  bool no_bpf = false;
  CLI::App app{"tierhostd " HT_VERSION " - gives VMs their parts of fast and slow memory.\n"
               "Finds running QEMUs by itself; it moves no balloon before it is told to (tierctl vm)."};
  app.name("tierhostd");
  app.set_version_flag("--version", std::string("tierhostd " HT_VERSION));
  app.add_option("--socket", options.socket, "where it listens")->capture_default_str();
  app.add_option("--state-dir", options.state_directory, "where shares are saved")->capture_default_str();
  app.add_option("--metrics-file", options.metrics_file, "Prometheus text, for node_exporter's textfile collector");
  app.add_option("--qmp-below", options.qmp_below, "manage only VMs whose QMP socket lies below DIR; repeat")
      ->type_name("DIR")->check(CLI::ExistingDirectory)->expected(1)->take_all();
  app.add_option("--tick-ms", options.tick_ms, "how often it measures and decides")->check(CLI::Range(50, 60000))->capture_default_str();
  app.add_flag("--no-bpf", no_bpf, "measure by st_blocks, load no BPF");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  options.bpf = !no_bpf;
  auto done = run(options);
  if (!done) {
    fprintf(stderr, "tierhostd: %s\n", done.error().message.c_str());
    if (!done.error().hint.empty()) fprintf(stderr, "HINT: %s\n", done.error().hint.c_str());
  }
  fflush(nullptr);
  // VM threads may wait for a QEMU that hangs; nobody waits for them.
  _exit(done ? 0 : 1);
}
