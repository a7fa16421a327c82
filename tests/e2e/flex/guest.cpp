// SPDX-License-Identifier: GPL-2.0-or-later
#include "guest.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

namespace hypertier::test {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

std::string text_of(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

}  // namespace

Result<std::unique_ptr<Guest>> Guest::start(const GuestOptions& o) {
  std::unique_ptr<Guest> guest(new Guest);
  char pattern[] = "/dev/shm/hypertier-flex-XXXXXX";  // a tmpfs
  if (o.directory.empty() && !mkdtemp(pattern)) return fail_errno("cannot make a directory below /dev/shm", errno);
  const std::string dir = guest->directory_ = o.directory.empty() ? pattern : o.directory;
  guest->mounts_ = o.mounts;
  if (o.mounts)
    for (const auto& [tier, bytes] : {std::pair<std::string, unsigned long long>{"fast", o.fast_bytes}, {"slow", o.slow_bytes}}) {
      const std::string size = "size=" + std::to_string(bytes);
      if (mkdir((dir + "/" + tier).c_str(), 0700) || mount("tmpfs", (dir + "/" + tier).c_str(), "tmpfs", 0, size.c_str()))
        return fail_errno("cannot mount a tmpfs", errno);
    }
  const auto mib = [](unsigned long long bytes) { return std::to_string(bytes >> 20) + "M"; };
  auto backend = [&](const std::string& tier, unsigned long long bytes) {
    if (o.memfd) return "memory-backend-memfd,id=" + tier + ",size=" + mib(bytes) + ",share=on";
    return "memory-backend-file,id=" + tier + ",mem-path=" + guest->file(tier) + ",size=" + mib(bytes) + ",share=on,align=2M";
  };
  std::vector<std::string> arguments{
      "qemu-system-x86_64", "-name", o.name, "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35",
      "-accel", o.icount ? "tcg,thread=single" : "tcg,thread=multi", "-cpu", "max", "-smp", std::to_string(o.cpus),
      "-m", mib(o.fast_bytes + o.slow_bytes) + (o.plug_bytes ? ",maxmem=" + mib(o.fast_bytes + o.slow_bytes + 2 * o.plug_bytes) : ""),
      "-object", backend("fast", o.fast_bytes), "-object", backend("slow", o.slow_bytes),
      "-numa", "node,nodeid=0,cpus=0-" + std::to_string(o.cpus - 1) + ",memdev=fast", "-numa", "node,nodeid=1,memdev=slow",
      "-numa", "dist,src=0,dst=1,val=20",
      // one client each: ours first, then the one that tierhostd finds
      "-qmp", "unix:" + dir + "/test-qmp,server=on,wait=off", "-qmp", "unix:" + dir + "/qmp,server=on,wait=off",
      "-device", "virtio-serial-pci", "-chardev", "socket,id=flex,path=" + dir + "/agent,server=on,wait=off",
      "-device", "virtserialport,chardev=flex,name=org.hypertier.flex.0",
      "-serial", "file:" + dir + "/console",
      "-chardev", "socket,id=control,path=" + dir + "/control,server=on,wait=off", "-serial", "chardev:control"};
  if (o.icount)
    for (const char* a : {"-icount", "shift=1,sleep=off"}) arguments.push_back(a);
  if (o.plug_bytes)
    for (const auto& [tier, node] : {std::pair<std::string, std::string>{"fast", "0"}, {"slow", "1"}})
      for (const std::string& a : {std::string("-object"), "memory-backend-file,id=" + tier + "-plug,mem-path=" + dir + "/" + tier + "-plug,size=" + mib(o.plug_bytes) + ",share=on,align=2M",
                                   std::string("-device"), "virtio-mem-pci,id=vmem-" + tier + ",memdev=" + tier + "-plug,node=" + node})
        arguments.push_back(a);
  else
    for (const std::string& a : {std::string("-device"), "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on" +
                                 std::string(o.qtest ? ",addr=4,disable-legacy=off,disable-modern=on,ioeventfd=off" : "")})
      arguments.push_back(a);
  if (o.boot) {
    std::string kernel;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(o.kernel + "/boot", error))
      if (entry.path().filename().string().starts_with("vmlinuz")) kernel = entry.path();
    if (kernel.empty()) return fail("no kernel in " + o.kernel + "/boot", "Run ./run lab -- true once: it unpacks one.");
    for (const std::string& a : {std::string("-kernel"), kernel, std::string("-initrd"), o.initramfs, std::string("-append"),
                                 "console=ttyS0 loglevel=5 panic=-1 mitigations=off " + o.append})
      arguments.push_back(a);
  } else {
    if (!o.qtest) {
      arguments.push_back("-S");
    } else {
      // Runs, so that its clock does, but only from the reset vector into a halt.
      std::string rom(65536, '\0');
      rom.replace(0xfff0, 4, "\xfa\xf4\xeb\xfd");
      std::ofstream(dir + "/halt.bin") << rom;
      for (const std::string& a : {std::string("-bios"), dir + "/halt.bin", std::string("-qtest"), "unix:" + dir + "/qtest,server=on,wait=off", std::string("-qtest-log"), std::string("none")})
        arguments.push_back(a);
    }
  }
  std::vector<char*> argv;
  for (auto& a : arguments) argv.push_back(a.data());
  argv.push_back(nullptr);
  const int pid = guest->pid_ = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (const int log = open((dir + "/qemu.log").c_str(), O_CREAT | O_WRONLY, 0600); log >= 0) dup2(log, 2), dup2(log, 1);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  for (const auto end = Clock::now() + 180s; !guest->qmp_;) {
    if (auto qmp = Qmp::connect(dir + "/test-qmp", 30s)) guest->qmp_ = std::make_unique<Qmp>(std::move(*qmp));
    else if (Clock::now() > end || waitpid(pid, nullptr, WNOHANG) == pid)
      return fail("QEMU did not start: " + text_of(dir + "/qemu.log") + qmp.error().message);
    else std::this_thread::sleep_for(50ms);
  }
  if (!o.boot) return guest;
  guest->control_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
  (dir + "/control").copy(address.sun_path, sizeof address.sun_path - 1);
  if (connect(guest->control_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0)
    return fail_errno("cannot reach the guest's serial port", errno);
  if (auto ready = guest->read_answer(o.boot_seconds); !ready) return std::unexpected(ready.error());
  return guest;
}

Guest::~Guest() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (control_ >= 0) close(control_);
  if (mounts_)
    for (const char* tier : {"fast", "slow"}) umount2((directory_ + "/" + tier).c_str(), MNT_DETACH);
  std::error_code ignored;
  if (!directory_.empty()) std::filesystem::remove_all(directory_, ignored);
}

std::string Guest::console() const { return text_of(directory_ + "/console"); }

unsigned long long Guest::resident_bytes(const std::string& tier) const {
  struct stat st{};
  stat(file(tier).c_str(), &st);
  return st.st_blocks * 512ULL;
}

Result<std::string> Guest::read_answer(int timeout_seconds) {
  const auto end = Clock::now() + std::chrono::seconds(timeout_seconds);
  for (;;) {
    // The answer ends with "@@STATUS" on a line of its own.
    if (const auto mark = pending_.find("@@"); mark != std::string::npos) {
      if (const auto line = pending_.find('\n', mark); line != std::string::npos) {
        std::string output = pending_.substr(0, mark);
        const int status = atoi(pending_.c_str() + mark + 2);
        pending_.erase(0, line + 1);
        std::erase(output, '\r');
        if (status) return fail("status " + std::to_string(status) + " in the guest: " + output);
        return output;
      }
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    pollfd p{control_, POLLIN, 0};
    if (left <= 0 || poll(&p, 1, static_cast<int>(left)) <= 0)
      return fail("the guest did not answer within " + std::to_string(timeout_seconds) + " s, it said \"" + pending_ +
                  "\"; its console: " + console());
    char chunk[4096];
    const ssize_t n = read(control_, chunk, sizeof chunk);
    if (n <= 0) return fail("the guest is gone: " + console());
    pending_.append(chunk, static_cast<size_t>(n));
  }
}

Result<std::string> Guest::run(const std::string& line, int timeout_seconds) {
  const std::string text = line + "\n";
  if (send(control_, text.data(), text.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(text.size()))
    return fail("cannot write to the guest, it said: " + text_of(directory_ + "/qemu.log") + console());
  return read_answer(timeout_seconds);
}

}  // namespace hypertier::test
