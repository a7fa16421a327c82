// SPDX-License-Identifier: GPL-2.0-or-later
// tierhostd and "tierctl vm" against real QEMUs: a real guest, and QEMUs that
// are stopped at reset where a process with its socket and files is enough.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <fstream>
#include <map>
#include <memory>
#include <thread>

#include <hypertier/abi.h>
#include <hypertier/flex.h>

#include "guest.hpp"
#include "qtest_guest.hpp"
#include "vm/discovery.hpp"

using namespace hypertier;
using namespace hypertier::test;
using namespace std::chrono_literals;
using Json = nlohmann::json;

namespace {

constexpr unsigned long long kMiB = 1 << 20;

struct Output {
  int status;
  std::string out, err;
};

// The host's daemon with its own socket and state.
class Host : public ::testing::Test {
 protected:
  std::string dir, vms_dir;  // vms_dir: what the daemon is to see of this machine
  int daemon = -1, guests_made = 0;

  void SetUp() override {
    char pattern[] = "/tmp/hypertier-host-XXXXXX";
    dir = mkdtemp(pattern);
    char on_tmpfs[] = "/dev/shm/hypertier-vms-XXXXXX";
    vms_dir = mkdtemp(on_tmpfs);
    start();
  }
  void TearDown() override {
    stop(SIGTERM);
    std::filesystem::remove_all(dir);
    std::filesystem::remove_all(vms_dir);
  }
  static std::string bin(const std::string& name) { return std::string(getenv("FLEX_BIN")) + "/" + name; }
  void start() {
    daemon = fork();
    if (daemon == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const auto socket = "--socket=" + dir + "/sock", state = "--state-dir=" + dir, metrics = "--metrics-file=" + dir + "/metrics", below = "--qmp-below=" + vms_dir;
      const auto program = bin("tierhostd");
      execl(program.c_str(), "tierhostd", socket.c_str(), state.c_str(), metrics.c_str(), below.c_str(), "--tick-ms=200", "--no-bpf", nullptr);
      _exit(127);
    }
    for (int i = 0; i < 100 && access((dir + "/sock").c_str(), F_OK); i++) std::this_thread::sleep_for(50ms);
    for (int i = 0; i < 100 && tierctl("list").status; i++) std::this_thread::sleep_for(50ms);
  }
  int stop(int signal) {
    if (daemon <= 0) return -1;
    kill(daemon, signal);
    int status = 0;
    waitpid(std::exchange(daemon, -1), &status, 0);
    return status;
  }
  Output tierctl(const std::string& arguments) {
    const std::string err = dir + "/err";
    const std::string line = bin("tierctl") + " -j vm --host-socket " + dir + "/sock " + arguments + " 2>" + err;
    Output o{};
    FILE* pipe = popen(line.c_str(), "r");
    char chunk[4096];
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, pipe)) > 0;) o.out.append(chunk, n);
    o.status = WEXITSTATUS(pclose(pipe));
    std::ifstream text(err);
    o.err.assign(std::istreambuf_iterator<char>(text), {});
    return o;
  }
  Json vm(const std::string& name) {
    const auto o = tierctl("show " + name);
    const auto json = Json::parse(o.out, nullptr, false);
    return o.status == 0 && json.contains("vm") ? json["vm"] : Json();
  }
  // Until the VM is in a state; its JSON.
  Json wait_for(const std::string& name, const std::string& state, int seconds = 200) {
    Json last;
    for (const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds); std::chrono::steady_clock::now() < end;) {
      last = vm(name);
      if (last.is_object() && last["state"] == state) return last;
      std::this_thread::sleep_for(200ms);
    }
    ADD_FAILURE() << name << " is not " << state << ": " << last.dump();
    return last;
  }
  GuestOptions options(const std::string& name, bool boot, unsigned long long fast, unsigned long long slow) {
    GuestOptions o;
    o.name = name;
    o.boot = boot;
    o.kernel = getenv("FLEX_KERNEL");
    o.initramfs = getenv("FLEX_INITRAMFS");
    o.fast_bytes = fast;
    o.slow_bytes = slow;
    o.append = "init_on_free=1";
    o.directory = vms_dir + "/" + std::to_string(guests_made++);
    mkdir(o.directory.c_str(), 0700);
    return o;
  }
  bool has_event(const std::string& name, const std::string& event) {
    const auto json = Json::parse(tierctl("events").out, nullptr, false);
    for (const auto& e : json["events"])
      if (e["vm"] == name && e["event"] == event) return true;
    return false;
  }
};

class Tierhostd : public Host {};
class TwoGuests : public Host {};

TEST_F(Tierhostd, MovesARealGuestAndSurvivesWhatQemusDo) {
  // Bad input first: one sentence, a hint, nothing changed.
  for (const auto& [arguments, status] : {std::pair<std::string, int>{"show nobody", 1}, {"set nobody --fast 1G", 1},
                                         {"set nobody", 2}, {"set", 2}, {"qos --on", 1}, {"qos x --fast-guarantee 2G --fast-limit 1G", 1},
                                         {"qos --allocator best", 1}, {"set nobody --fast much", 2}}) {
    const auto o = tierctl(arguments);
    EXPECT_EQ(o.status, status) << arguments << o.err;
    if (status == 1) {
      EXPECT_NE(o.err.find("HINT: "), std::string::npos) << arguments << ": " << o.err;
    }
  }
  EXPECT_EQ(std::filesystem::exists(dir + "/host.json"), false) << "a refused command changed the state";

  auto started = Guest::start(options("real", true, 192 * kMiB, 192 * kMiB));
  ASSERT_TRUE(started) << started.error().message;
  auto& guest = **started;
  auto stub = Guest::start(options("stub", false, 64 * kMiB, 64 * kMiB));
  ASSERT_TRUE(stub) << stub.error().message;
  ASSERT_TRUE(guest.run("insmod /modules/hyperflex.ko"));

  auto json = wait_for("real", "managed");
  EXPECT_EQ(json["pid"], guest.pid());
  EXPECT_EQ(json["tiers"][0]["resident_bytes"], guest.resident_bytes("fast"));
  EXPECT_EQ(json["tiers"][0]["target_bytes"], 192 * kMiB);
  EXPECT_EQ(wait_for("stub", "one_balloon")["tiers"][1]["resident_bytes"], (*stub)->resident_bytes("slow"));
  EXPECT_EQ(tierctl("set stub --fast 32M").status, 1) << "no driver answers there";
  EXPECT_EQ(tierctl("set real --fast 10G").status, 1);

  // One tier moves, the other does not.
  const auto slow_before = guest.resident_bytes("slow");
  auto o = tierctl("set real --fast 128M --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_LE(guest.resident_bytes("fast"), 130 * kMiB);
  EXPECT_EQ(guest.resident_bytes("slow"), slow_before);
  o = tierctl("set real --slow 96M --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_LE(guest.resident_bytes("slow"), 98 * kMiB);
  EXPECT_LE(guest.resident_bytes("fast"), 130 * kMiB);

  // A QEMU that hangs: the other is still served.
  kill((*stub)->pid(), SIGSTOP);
  wait_for("stub", "unreachable");
  o = tierctl("set real --fast 144M --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_TRUE(has_event("stub", "unreachable"));
  kill((*stub)->pid(), SIGCONT);
  wait_for("stub", "one_balloon");

  // It dies and comes back under its name, as another process.
  const int old_pid = (*stub)->pid();
  stub->reset();
  stub = Guest::start(options("stub", false, 64 * kMiB, 64 * kMiB));
  ASSERT_TRUE(stub) << stub.error().message;
  // Until the next tick the old one is still listed as it was.
  for (int i = 0; i < 100; i++) {
    json = wait_for("stub", "one_balloon");
    if (json["pid"] != old_pid) break;
    std::this_thread::sleep_for(200ms);
  }
  EXPECT_NE(json["pid"], old_pid);
  EXPECT_TRUE(has_event("stub", "gone"));

  // Killed while it works: the VM runs on, no balloon moves, a new one goes on from there.
  o = tierctl("set real --fast 112M");
  EXPECT_EQ(o.status, 0) << o.err;
  stop(SIGKILL);
  for (int i = 0; i < 100 && guest.resident_bytes("fast") > 114 * kMiB && i < 50; i++) std::this_thread::sleep_for(200ms);
  const auto ordered = guest.run("cat $B/virtio*/fast_balloon_target_bytes $B/virtio*/slow_balloon_target_bytes");
  start();
  json = wait_for("real", "managed");
  const auto still = guest.run("cat $B/virtio*/fast_balloon_target_bytes $B/virtio*/slow_balloon_target_bytes");
  ASSERT_TRUE(ordered && still);
  EXPECT_EQ(*ordered, *still);
  const auto balloon_target = std::strtoull(still->c_str(), nullptr, 10);
  EXPECT_EQ(json["tiers"][0]["target_bytes"], 192 * kMiB - balloon_target);
  EXPECT_EQ(json["tiers"][1]["target_bytes"], 96 * kMiB);

  std::ifstream metrics(dir + "/metrics");
  const std::string text((std::istreambuf_iterator<char>(metrics)), {});
  EXPECT_NE(text.find("hypertier_vm_resident_bytes{vm=\"real\",tier=\"fast\"} "), std::string::npos) << text;
  o = tierctl("report -o " + dir + "/r.svg");
  EXPECT_EQ(o.status, 0);
  EXPECT_EQ(guest.console().find("Call Trace"), std::string::npos) << guest.console();
}

// The agent takes single pages, says more, and may die: the balloon's own number
// is always there.
TEST_F(Tierhostd, TheAgentsChannelAndWithoutIt) {
  auto started = Guest::start(options("agent", true, 192 * kMiB, 192 * kMiB));
  ASSERT_TRUE(started) << started.error().message;
  auto& guest = **started;
  ASSERT_TRUE(guest.run("insmod /modules/hyperflex.ko"));
  const auto by = [&](const std::string& channel) {
    Json json;
    for (int i = 0; i < 300; i++) {
      json = vm("agent");
      if (json.is_object() && json["state"] == "managed" && json["channel"] == channel) break;
      std::this_thread::sleep_for(200ms);
    }
    EXPECT_EQ(json["channel"], channel) << json.dump();
    return json;
  };
  by("balloon");
  ASSERT_TRUE(guest.run("tierd --fresh >/tmp/tierd.log 2>&1 & echo $! >/tmp/tierd.pid; sleep 1"));
  auto json = by("agent");
  EXPECT_GT(json["tiers"][0]["claimed_free_bytes"], 0u);

  // No unit of the packed number: only the agent can say it.
  const unsigned long long odd = 131076ULL << 10;
  auto o = tierctl("set agent --fast 131076K --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_LE(guest.resident_bytes("fast"), odd + 2 * kMiB);
  auto target = guest.run("cat $B/virtio*/fast_balloon_target_bytes");
  ASSERT_TRUE(target);
  EXPECT_EQ(std::strtoull(target->c_str(), nullptr, 10), 192 * kMiB - odd);

  // Taken up by the next tierhostd as it is, to the page.
  stop(SIGKILL);
  start();
  json = by("agent");
  EXPECT_EQ(json["tiers"][0]["target_bytes"], odd);

  ASSERT_TRUE(guest.run("kill -9 $(cat /tmp/tierd.pid)"));
  by("balloon");
  o = tierctl("set agent --fast 160M --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  for (int i = 0; i < 100; i++) {
    target = guest.run("cat $B/virtio*/fast_balloon_target_bytes");
    if (target && std::strtoull(target->c_str(), nullptr, 10) == 32 * kMiB) break;
    std::this_thread::sleep_for(200ms);
  }
  EXPECT_EQ(*target, std::to_string(32 * kMiB) + "\n");
  EXPECT_EQ(guest.console().find("Call Trace"), std::string::npos) << guest.console();
}

TEST_F(Tierhostd, CapsATierAndFindsMemoryWithoutAName) {
  auto settings = options("capped", true, 192 * kMiB, 192 * kMiB);
  settings.mounts = true;
  auto started = Guest::start(settings);
  ASSERT_TRUE(started) << started.error().message;
  auto& guest = **started;
  ASSERT_TRUE(guest.run("insmod /modules/hyperflex.ko"));
  settings = options("memfd", false, 64 * kMiB, 64 * kMiB);
  settings.memfd = true;
  auto nameless = Guest::start(settings);
  ASSERT_TRUE(nameless) << nameless.error().message;
  const auto size_of_tmpfs = [&] {
    struct statfs fs{};
    statfs((guest.directory() + "/fast").c_str(), &fs);
    return fs.f_blocks * static_cast<unsigned long long>(fs.f_bsize);
  };
  wait_for("capped", "managed");
  // What the guest has not given back cannot be capped, and nothing changes.
  auto o = tierctl("set capped --fast 96M --hard-cap");
  EXPECT_EQ(o.status, 1);
  EXPECT_NE(o.err.find("refuses"), std::string::npos) << o.err;
  EXPECT_EQ(vm("capped")["tiers"][0]["target_bytes"], 192 * kMiB);
  EXPECT_EQ(size_of_tmpfs(), 192 * kMiB);
  EXPECT_EQ(tierctl("set capped --fast 128M --wait 200").status, 0);
  o = tierctl("set capped --fast 130M --hard-cap");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_NE(o.err.find("killed"), std::string::npos) << "the warning: " << o.err;
  EXPECT_EQ(size_of_tmpfs(), 130 * kMiB);
  // More again: the cap goes before the guest touches it.
  o = tierctl("set capped --fast 192M");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_EQ(size_of_tmpfs(), 192 * kMiB);
  const auto alive = guest.run("flexwork hold 0 33554432 more & while ! [ -e /tmp/more.in ]; do sleep 0.2; done; echo verify >/tmp/more.in; cat /tmp/more.out");
  ASSERT_TRUE(alive) << alive.error().message;
  EXPECT_EQ(*alive, "ok 8192\n");

  // Found through QEMU and /proc, measured, but not to be capped.
  const auto json = wait_for("memfd", "one_balloon");
  EXPECT_NE(json["tiers"][0]["file"].get<std::string>().find("/fd/"), std::string::npos) << json.dump();
  EXPECT_EQ(json["tiers"][0]["size_bytes"], 64 * kMiB);
  struct stat fast{}, slow{};
  ASSERT_EQ(stat(json["tiers"][0]["file"].get<std::string>().c_str(), &fast), 0);
  ASSERT_EQ(stat(json["tiers"][1]["file"].get<std::string>().c_str(), &slow), 0);
  EXPECT_NE(fast.st_ino, slow.st_ino);
  EXPECT_EQ(fast.st_size, static_cast<off_t>(64 * kMiB));
  EXPECT_EQ(json["tiers"][0]["resident_bytes"], fast.st_blocks * 512ULL);
}

// A guest with the stock kernel's virtio_mem and nothing of ours.
TEST_F(Tierhostd, PlugsAndUnplugsWithoutTheDriver) {
  auto settings = options("plug", true, 192 * kMiB, 128 * kMiB);
  settings.plug_bytes = 256 * kMiB;
  settings.append += " memhp_default_state=online_movable";
  auto started = Guest::start(settings);
  ASSERT_TRUE(started) << started.error().message;
  auto& guest = **started;
  const auto resident = [&](const std::string& tier) { return guest.resident_bytes(tier) + guest.resident_bytes(tier + "-plug"); };
  const auto guest_kib = [&](int node, const std::string& field) {
    auto text = guest.run("grep -o '" + field + ": *[0-9]*' /sys/devices/system/node/node" + std::to_string(node) + "/meminfo | grep -o '[0-9]*$'");
    return text ? std::strtoll(text->c_str(), nullptr, 10) : -1;
  };
  // The guest takes its time after QEMU counts it as plugged.
  const auto becomes = [&](const std::function<long long()>& value, long long wanted) {
    for (int i = 0; i < 100 && value() != wanted; i++) std::this_thread::sleep_for(200ms);
    return value();
  };
  const auto plugged = [&](int t, unsigned long long bytes) {
    for (int i = 0; i < 300; i++) {
      const auto json = vm("plug");
      if (json.is_object() && json["state"] == "managed" && json["tiers"][static_cast<size_t>(t)]["claimed_balloon_bytes"] == 256 * kMiB - bytes) return true;
      std::this_thread::sleep_for(200ms);
    }
    return false;
  };
  ASSERT_TRUE(guest.run("insmod /modules/virtio_mem.ko"));
  auto json = wait_for("plug", "managed");
  EXPECT_EQ(json["channel"], "virtio-mem");
  EXPECT_EQ(json["tiers"][0]["size_bytes"], 448 * kMiB);
  EXPECT_EQ(json["tiers"][1]["fixed_bytes"], 128 * kMiB);
  EXPECT_EQ(json["tiers"][0]["target_bytes"], 192 * kMiB);
  const auto fast_before = guest_kib(0, "MemTotal"), slow_before = guest_kib(1, "MemTotal");

  // More of each tier, for that node and no other.
  auto o = tierctl("set plug --fast 320M");
  EXPECT_EQ(o.status, 0) << o.err;
  ASSERT_TRUE(plugged(0, 128 * kMiB)) << vm("plug").dump();
  EXPECT_EQ(becomes([&] { return guest_kib(0, "MemTotal"); }, fast_before + (128 << 10)), fast_before + (128 << 10));
  EXPECT_EQ(guest_kib(1, "MemTotal"), slow_before);
  o = tierctl("set plug --slow 384M");
  ASSERT_TRUE(plugged(1, 256 * kMiB)) << vm("plug").dump();
  EXPECT_EQ(becomes([&] { return guest_kib(1, "MemTotal"); }, slow_before + (256 << 10)), slow_before + (256 << 10));
  EXPECT_EQ(becomes([&] { return vm("plug")["tiers"][1]["resident_bytes"].get<long long>() - static_cast<long long>(resident("slow")); }, 0), 0);

  // Memory in use is taken: its pages move within the guest, data intact.
  ASSERT_TRUE(guest.run("flexwork hold 1 " + std::to_string(160 * kMiB) + " app & while ! [ -e /tmp/app.in ]; do sleep 0.2; done"));
  ASSERT_GE(resident("slow"), 160 * kMiB);
  o = tierctl("set plug --slow 224M --wait 200");
  EXPECT_EQ(o.status, 0) << o.err;
  EXPECT_TRUE(plugged(1, 96 * kMiB)) << vm("plug").dump();
  EXPECT_LE(resident("slow"), 226 * kMiB);
  EXPECT_LE(guest.resident_bytes("slow-plug"), 96 * kMiB);
  EXPECT_EQ(guest_kib(0, "MemTotal") - fast_before, 128 << 10);
  const auto data = guest.run("echo verify >/tmp/app.in; cat /tmp/app.out");
  ASSERT_TRUE(data) << data.error().message;
  EXPECT_EQ(*data, "ok 40960\n");

  // What is there from boot stays, and a new daemon finds the targets in QEMU.
  o = tierctl("set plug --fast 128M");
  EXPECT_EQ(o.status, 1);
  EXPECT_NE(o.err.find("cannot be unplugged"), std::string::npos) << o.err;
  stop(SIGKILL);
  start();
  json = wait_for("plug", "managed");
  EXPECT_EQ(json["tiers"][0]["target_bytes"], 320 * kMiB);
  EXPECT_EQ(json["tiers"][1]["target_bytes"], 224 * kMiB);
  EXPECT_EQ(guest.console().find("Call Trace"), std::string::npos) << guest.console();
  // The allocator moves it as it moves a balloon.
  ASSERT_EQ(tierctl("qos plug --fast-weight 1").status, 0);
  ASSERT_EQ(tierctl("qos --on --fast-capacity 256M --slow-capacity 192M").status, 0);
  EXPECT_TRUE(plugged(0, 64 * kMiB)) << vm("plug").dump();
  EXPECT_TRUE(plugged(1, 64 * kMiB)) << vm("plug").dump();
  EXPECT_EQ(vm("plug")["tiers"][1]["target_bytes"], 192 * kMiB);
  EXPECT_LE(resident("fast"), 258 * kMiB);
  EXPECT_LE(resident("slow"), 194 * kMiB);
  const auto again = guest.run("echo verify >/tmp/app.in; cat /tmp/app.out");
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(*again, "ok 40960\n");
  EXPECT_EQ(guest.console().find("Call Trace"), std::string::npos) << guest.console();
  printf("virtio-mem: slow tier %llu MiB resident at a target of 192 MiB\n", resident("slow") / kMiB);

  // The printed options are those of a VM that is found.
  o = tierctl("qemu-args web --fast 2G --slow 6G --virtio-mem");
  EXPECT_EQ(o.status, 0) << o.err;
  std::vector<std::string> line{"qemu-system-x86_64"};
  const auto printed = Json::parse(o.out);
  for (const auto& a : printed["arguments"]) line.push_back(a);
  const Vm web = parse_qemu(line);
  EXPECT_EQ(web.problem, "");
  EXPECT_EQ(web.size_bytes(0), 2048 * kMiB);
  EXPECT_EQ(web.size_bytes(1), 6144 * kMiB);
  EXPECT_EQ(tierctl("qemu-args web --fast 2G --slow 700M --virtio-mem").status, 1);
}

// A name is whatever somebody wrote on a command line; the saved state may be damaged.
TEST_F(Tierhostd, NamesAndStateAreNotTrusted) {
  const std::string name = "a\x1b[31m\"b\\<c>&";
  auto stub = Guest::start(options(name, false, 64 * kMiB, 64 * kMiB));
  ASSERT_TRUE(stub) << stub.error().message;
  wait_for(std::to_string((*stub)->pid()), "one_balloon");
  const auto text_of = [&](const std::string& arguments) {
    const std::string out = dir + "/out";
    EXPECT_EQ(system((bin("tierctl") + " vm --host-socket " + dir + "/sock " + arguments + " >" + out + " 2>&1").c_str()), 0) << arguments;
    std::ifstream file(out);
    return std::string((std::istreambuf_iterator<char>(file)), {});
  };
  for (const char* command : {"list", "events"}) {
    const auto text = text_of(command);
    EXPECT_NE(text.find("a?[31m"), std::string::npos) << text;
    EXPECT_EQ(text.find('\x1b'), std::string::npos) << command;
  }
  const auto metrics = text_of("metrics");
  EXPECT_NE(metrics.find("vm=\"a?[31m\\\"b\\\\<c>&\""), std::string::npos) << metrics;
  text_of("report -o " + dir + "/names.svg");
  std::ifstream svg(dir + "/names.svg");
  const std::string picture((std::istreambuf_iterator<char>(svg)), {});
  EXPECT_NE(picture.find("&lt;c&gt;&amp;"), std::string::npos) << picture;
  EXPECT_EQ(picture.find('\x1b'), std::string::npos);

  // Whole or not at all: no half-written state, and a damaged one is not guessed at.
  ASSERT_EQ(tierctl("qos kept --fast-guarantee 32M").status, 0);
  EXPECT_FALSE(std::filesystem::exists(dir + "/host.json.new"));
  struct stat state{};
  ASSERT_EQ(stat((dir + "/host.json").c_str(), &state), 0);
  EXPECT_EQ(state.st_mode & 022, 0u) << "others may write it";
  ASSERT_EQ(stat((dir + "/sock").c_str(), &state), 0);
  EXPECT_EQ(state.st_mode & 0777, 0600u) << "others may talk to it";
  stop(SIGKILL);
  std::ofstream(dir + "/host.json") << "{\"qos\": tr";
  const std::string line = bin("tierhostd") + " --no-bpf --socket " + dir + "/sock2 --state-dir " + dir + " 2>" + dir + "/damaged";
  EXPECT_NE(system(line.c_str()), 0);
  std::ifstream complaint(dir + "/damaged");
  const std::string said((std::istreambuf_iterator<char>(complaint)), {});
  EXPECT_NE(said.find("damaged"), std::string::npos) << said;
  EXPECT_NE(said.find("HINT: "), std::string::npos) << said;
}

constexpr unsigned long long kTier = 64 * kMiB;

// A guest without a kernel that obeys (or does not): each balloon takes its
// tier from the top down.
class StubDriver {
 public:
  explicit StubDriver(std::unique_ptr<QtestGuest> g) : guest(std::move(g)) {
    // All of it is in use, but for the rings and what firmware lies over.
    for (int t = 0; t < HT_TIERS; t++) guest->touch(base(t) + 4 * kMiB, kTier - 4 * kMiB);
  }
  static uint64_t base(int t) { return t * kTier; }
  static const char* word(int t) { return t == HT_TIER_FAST ? "fast" : "slow"; }

  void step() {
    if (obeys) {
      __u64 want[HT_TIERS];
      hf_unpack(kTier >> 12, kTier >> 12, guest->num_pages(), &want[0], &want[1]);
      for (int t = 0; t < HT_TIERS; t++) {
        const uint64_t end = base(t) + kTier;
        std::vector<std::pair<uint64_t, uint32_t>> blocks;
        while (balloon_pages[t] + 512 <= want[t] && balloon_pages[t] + 512 <= (kTier - 8 * kMiB) >> 12) {
          balloon_pages[t] += 512;
          blocks.push_back({end - (balloon_pages[t] << 12), 2 * kMiB});
          if (blocks.size() == 16) guest->report(std::exchange(blocks, {}));
        }
        if (!blocks.empty()) guest->report(blocks);
        if (balloon_pages[t] > want[t]) {
          guest->touch(end - (balloon_pages[t] << 12), (balloon_pages[t] - want[t]) << 12);
          balloon_pages[t] = want[t];
        }
      }
    }
    if (guest->stats_taken()) {
      auto tier = [&](int t) { return (size_pages << 32) | (claims_all_given[t] ? (kTier >> 12) - 1024 : balloon_pages[t]); };
      guest->claim_stats({{HF_TAG_MAGIC, HF_MAGIC}, {HF_TAG_FAST, tier(0)}, {HF_TAG_SLOW, tier(1)},
                          {HF_TAG_TARGETS, balloon_pages[0] << 32 | balloon_pages[1]}, {HF_TAG_SLOW_MISS, 0}});
      answers++;
    }
  }
  unsigned long long resident(int t) { return guest->vm().resident_bytes(word(t)); }

  std::unique_ptr<QtestGuest> guest;
  bool obeys = true;
  bool claims_all_given[HT_TIERS] = {};
  uint64_t size_pages = kTier >> 12;
  uint64_t balloon_pages[HT_TIERS] = {};
  int answers = 0;  // to the host's questions
};

class Stubs : public Host {
 protected:
  std::map<std::string, std::unique_ptr<StubDriver>> vms;

  void add(const std::string& name) {
    auto started = QtestGuest::start(options(name, false, kTier, kTier));
    ASSERT_TRUE(started) << started.error().message;
    vms[name] = std::make_unique<StubDriver>(std::move(*started));
  }
  // All drivers, until the condition holds.
  bool run_until(const std::function<bool()>& condition, int seconds = 60) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    while (std::chrono::steady_clock::now() < end) {
      for (auto& [name, driver] : vms) {
        driver->step();
        EXPECT_EQ(driver->guest->failure(), "") << name;
        if (!driver->guest->failure().empty()) return false;
      }
      if (condition()) return true;
      std::this_thread::sleep_for(50ms);
    }
    return false;
  }
  bool managed() {
    for (auto& [name, driver] : vms)
      if (const auto json = vm(name); !json.is_object() || json["state"] != "managed") return false;
    return true;
  }
  bool settled(const std::map<std::string, unsigned long long>& parts) {
    for (const auto& [name, bytes] : parts)
      for (int t = 0; t < HT_TIERS; t++)
        if (vm(name)["tiers"][t]["target_bytes"] != bytes || vms[name]->resident(t) > bytes + 2 * kMiB) return false;
    return true;
  }
  std::string dump() { return tierctl("list").out + tierctl("events").out; }
};

TEST_F(Stubs, FourVmsByWeightAndGuaranteeAndAHostileOne) {
  for (const char* name : {"a", "b", "c", "d"}) add(name);
  ASSERT_FALSE(HasFatalFailure());
  ASSERT_TRUE(run_until([&] { return managed(); })) << dump();

  // 136 MiB for four VMs of 64 MiB: d is guaranteed 52; 84 over 1:2:4 is 12, 24, 48.
  for (const auto& [name, weight] : {std::pair<std::string, int>{"a", 1}, {"b", 2}, {"c", 4}, {"d", 1}}) {
    std::string line = "qos " + name;
    for (const std::string tier : {"fast", "slow"})
      line += " --" + tier + "-weight " + std::to_string(weight) + " --" + tier + "-guarantee " + (name == "d" ? "52M" : "8M");
    const auto o = tierctl(line);
    ASSERT_EQ(o.status, 0) << o.err;
  }
  const auto too_much = tierctl("qos --on --fast-capacity 40M --slow-capacity 136M");
  EXPECT_EQ(too_much.status, 1);
  EXPECT_NE(too_much.err.find("guarantees add up"), std::string::npos) << too_much.err;
  ASSERT_EQ(tierctl("qos --on --fast-capacity 136M --slow-capacity 136M").status, 0);
  const std::map<std::string, unsigned long long> parts{{"a", 12 * kMiB}, {"b", 24 * kMiB}, {"c", 48 * kMiB}, {"d", 52 * kMiB}};
  ASSERT_TRUE(run_until([&] { return settled(parts); })) << dump();

  // It stays: no order in the next ticks.
  const auto orders = [&] {
    int n = 0;
    const auto json = Json::parse(tierctl("events").out, nullptr, false);
    for (const auto& e : json["events"]) n += e["event"] == "target";
    return n;
  };
  const int before = orders();
  auto ticks = [&] { return Json::parse(tierctl("list").out, nullptr, false)["ticks_total"].get<int>(); };
  const int first_tick = ticks();
  ASSERT_TRUE(run_until([&] { return ticks() >= first_tick + 20; }));
  EXPECT_EQ(orders(), before);
  EXPECT_TRUE(settled(parts)) << dump();

  std::map<std::string, std::array<unsigned long long, HT_TIERS>> held;
  for (const char* name : {"a", "b", "d"}) held[name] = {vms[name]->resident(0), vms[name]->resident(1)};

  // c says that it gave everything back, and uses all: seen as a lie, from the
  // measurement, and the others have what they had.
  auto& evil = *vms["c"];
  evil.obeys = false;
  evil.claims_all_given[0] = true;
  evil.guest->touch(StubDriver::base(0) + 4 * kMiB, kTier - 4 * kMiB);
  ASSERT_TRUE(run_until([&] { return has_event("c", "lie"); })) << dump();
  EXPECT_EQ(vm("c")["tiers"][0]["lie"], true);
  // PFNs of the other tier, of nothing, twice the same, a false actual, refaults.
  const auto good = [&] {
    for (const auto& [name, bytes] : held)
      for (int t = 0; t < HT_TIERS; t++)
        if (vms[name]->resident(t) < bytes[static_cast<size_t>(t)]) return false;
    return true;
  };
  for (int round = 0; round < 10; round++) {
    evil.guest->inflate({0xffffffff, 0x12345, static_cast<uint32_t>((StubDriver::base(1) + 8 * kMiB) >> 12), 0xfee00});
    const auto page = static_cast<uint32_t>((StubDriver::base(0) + 8 * kMiB) >> 12);
    evil.guest->inflate({page, page, page});
    evil.guest->claim_actual(0xffffffff);
    evil.guest->touch(StubDriver::base(0) + 4 * kMiB, kTier - 4 * kMiB);
    EXPECT_TRUE(good()) << dump();
    for (auto& [name, driver] : vms) driver->step();
  }
  // It refuses to obey: up the ladder, each step an event; the others stay.
  ASSERT_TRUE(run_until([&] { return has_event("c", "lose_bonus"); })) << dump();
  EXPECT_TRUE(has_event("c", "retry"));
  EXPECT_TRUE(good()) << dump();
  for (const char* name : {"a", "b", "d"})
    for (int t = 0; t < HT_TIERS; t++)
      EXPECT_GE(vm(name)["tiers"][t]["target_bytes"].get<unsigned long long>(), vm(name)["tiers"][t]["share"]["guarantee_bytes"].get<unsigned long long>());
  EXPECT_FALSE(has_event("c", "pause")) << "nobody waits for a guarantee";
  // It claims impossible tiers: refused with a sentence, nothing crashes.
  evil.size_pages = 0xffffffff;
  EXPECT_TRUE(run_until([&, said = evil.answers] { return evil.answers > said; }, 30)) << dump();
  EXPECT_EQ(tierctl("qos --off").status, 0);
  EXPECT_TRUE(run_until([&] {
    (void)tierctl("set c --fast 32M");
    return has_event("c", "order_failed");
  })) << dump();
  const std::string report = "flex-report.svg";  // stays in the build directory, to be looked at
  EXPECT_EQ(system((bin("tierctl") + " vm --host-socket " + dir + "/sock report -o " + report + " >/dev/null").c_str()), 0);
  std::ifstream svg(report);
  const std::string text((std::istreambuf_iterator<char>(svg)), {});
  EXPECT_NE(text.find("<svg"), std::string::npos);
  EXPECT_NE(text.find(">d</text>"), std::string::npos);
}

TEST_F(TwoGuests, ShareTheHostByWeight) {
  std::map<std::string, std::unique_ptr<Guest>> guests;
  for (const char* name : {"one", "three"}) {
    auto started = Guest::start(options(name, true, 192 * kMiB, 192 * kMiB));
    ASSERT_TRUE(started) << started.error().message;
    guests[name] = std::move(*started);
    ASSERT_TRUE(guests[name]->run("insmod /modules/hyperflex.ko"));
    wait_for(name, "managed", 120);
  }
  // 272 MiB of each tier: 104 are guaranteed; 272 over 1:3 would be 68 and 204.
  ASSERT_EQ(tierctl("qos one --fast-weight 1 --slow-weight 1 --fast-guarantee 104M --slow-guarantee 104M").status, 0);
  ASSERT_EQ(tierctl("qos three --fast-weight 3 --slow-weight 3 --fast-guarantee 104M --slow-guarantee 104M").status, 0);
  ASSERT_EQ(tierctl("qos --on --fast-capacity 272M --slow-capacity 272M").status, 0);
  const auto reaches = [&](unsigned long long one_fast) {
    for (int i = 0; i < 300; i++) {
      bool reached = true;
      for (const auto& [name, fast] : {std::pair<std::string, unsigned long long>{"one", one_fast}, {"three", 272 * kMiB - one_fast}}) {
        const unsigned long long slow = (name == "one" ? 104 : 168) * kMiB;
        const auto json = vm(name);
        reached &= json.is_object() && json["tiers"][0]["target_bytes"] == fast && json["tiers"][1]["target_bytes"] == slow;
        reached &= guests[name]->resident_bytes("fast") <= fast + 2 * kMiB && guests[name]->resident_bytes("slow") <= slow + 2 * kMiB;
      }
      if (reached) return true;
      std::this_thread::sleep_for(500ms);
    }
    return false;
  };
  EXPECT_TRUE(reaches(104 * kMiB)) << tierctl("list").out << tierctl("events").out;

  // Who says that he suffers gets more fast memory, up to his limit; said by the
  // agent of the one, and by the statistics of the other.
  ASSERT_TRUE(guests["one"]->run("tierd --fresh >/tmp/tierd.log 2>&1 &"));
  for (int i = 0; i < 150 && vm("one")["channel"] != "agent"; i++) std::this_thread::sleep_for(200ms);
  ASSERT_TRUE(guests["one"]->run("echo 65536 >$(echo $B/virtio*)/slow_miss_share"));
  ASSERT_TRUE(guests["three"]->run("echo 0 >$(echo $B/virtio*)/slow_miss_share"));
  ASSERT_EQ(tierctl("qos one --fast-limit 160M").status, 0);
  ASSERT_EQ(tierctl("qos --allocator slowdown").status, 0);
  EXPECT_TRUE(reaches(160 * kMiB)) << tierctl("list").out << tierctl("events").out;
  EXPECT_EQ(vm("one")["slow_miss_share"], 1.0);
  EXPECT_EQ(vm("one")["channel"], "agent");
  EXPECT_EQ(vm("three")["channel"], "balloon");
  ASSERT_TRUE(guests["one"]->run("echo 0 >$(echo $B/virtio*)/slow_miss_share"));
  EXPECT_TRUE(reaches(104 * kMiB)) << tierctl("list").out << tierctl("events").out;
  for (auto& [name, guest] : guests) EXPECT_EQ(guest->console().find("Call Trace"), std::string::npos) << guest->console();
}

}  // namespace
