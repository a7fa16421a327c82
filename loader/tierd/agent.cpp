// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/agent.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <sstream>

#include <hypertier/flex.h>

namespace hypertier {
namespace {

constexpr std::size_t kLineMax = 4096;
constexpr int kAbsentHostMs = 1000;
constexpr const char* kTierWords[HT_TIERS] = {"fast", "slow"};

std::string text_of(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

std::uint64_t number_of(const std::filesystem::path& path) { return std::strtoull(text_of(path).c_str(), nullptr, 10); }

// "name N" lines, as the driver's counters are.
std::uint64_t field_of(const std::string& lines, const std::string& name) {
  std::istringstream in(lines);
  std::string key;
  for (std::uint64_t value; in >> key >> value;)
    if (key == name) return value;
  return 0;
}

// "Node 0 MemFree:  123 kB"
std::uint64_t free_bytes_of(const std::string& meminfo) {
  const auto at = meminfo.find("MemFree:");
  return at == std::string::npos ? 0 : std::strtoull(meminfo.c_str() + at + 8, nullptr, 10) << 10;
}

Result<> store(const std::filesystem::path& path, const std::string& value) {
  const Fd file(open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!file || write(file.get(), value.data(), value.size()) < 0)
    return fail_errno("cannot write " + value + " to " + path.string(), errno);
  return {};
}

Fd open_port() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/virtio-ports", error))
    if (text_of(entry.path() / "name") == std::string(HF_AGENT_PORT) + "\n")
      return Fd(open(("/dev" / entry.path().filename()).c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC));
  return {};
}

void serve(int port, int stop) {
  const BalloonDriver driver;
  std::string pending;
  for (;;) {
    pollfd waits[] = {{port, POLLIN, 0}, {stop, POLLIN, 0}};
    if (poll(waits, 2, -1) < 0 && errno != EINTR) return;
    if (waits[1].revents) return;
    char chunk[kLineMax];
    const ssize_t n = read(port, chunk, sizeof(chunk));
    if (n <= 0) {
      // Nobody at the other end: such a port is always "ready".
      pending.clear();
      if (poll(waits + 1, 1, kAbsentHostMs) > 0) return;
      continue;
    }
    pending.append(chunk, static_cast<std::size_t>(n));
    for (std::size_t end; (end = pending.find('\n')) != std::string::npos; pending.erase(0, end + 1)) {
      const std::string answer = answer_line(driver, pending.substr(0, end));
      // Not taken at once: the host does not read, and asks again.
      if (write(port, answer.data(), answer.size()) < 0 && errno != EAGAIN) break;
    }
    if (pending.size() > kLineMax) pending.clear();
  }
}

}  // namespace

std::filesystem::path BalloonDriver::device() const {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(sysfs_ / "bus/virtio/drivers/hyperflex", error))
    if (std::filesystem::exists(entry.path() / "fast_bytes", error)) return entry.path();
  return {};
}

Result<std::array<Balloon, HT_TIERS>> BalloonDriver::read() const {
  const auto base = device();
  if (base.empty()) return fail("hyperflex.ko is not loaded, or drives no balloon", "Load it in the guest: insmod hyperflex.ko.");
  std::array<Balloon, HT_TIERS> balloons;
  for (std::size_t t = 0; t < HT_TIERS; ++t) {
    const auto file = [&](const char* suffix) { return base / (std::string(kTierWords[t]) + suffix); };
    const std::string counters = text_of(file("_counters"));
    Balloon& b = balloons[t];
    b.size_bytes = number_of(file("_bytes"));
    b.balloon_bytes = number_of(file("_balloon_bytes"));
    b.target_bytes = number_of(file("_balloon_target_bytes"));
    b.migrated_blocks_total = field_of(counters, "migrated_blocks_total");
    b.oom_pages_total = field_of(counters, "oom_pages_total");
    const auto node = "node" + std::to_string(field_of(counters, "node"));
    b.free_bytes = free_bytes_of(text_of(sysfs_ / "devices/system/node" / node / "meminfo"));
  }
  return balloons;
}

Result<> BalloonDriver::aim(std::array<std::uint64_t, HT_TIERS> balloon_bytes) const {
  const auto now = read();
  if (!now) return std::unexpected(now.error());
  // Checked before anything is written: an order is obeyed whole or not at all.
  for (std::size_t t = 0; t < HT_TIERS; ++t)
    if (balloon_bytes[t] > (*now)[t].size_bytes)
      return fail(std::string("a ") + kTierWords[t] + " balloon of " + std::to_string(balloon_bytes[t]) +
                  " bytes does not fit a tier of " + std::to_string((*now)[t].size_bytes));
  // What is given before what is taken, the slow tier before the fast one.
  for (const bool shrinks : {true, false})
    for (std::size_t t = HT_TIERS; t-- > 0;)
      if ((balloon_bytes[t] < (*now)[t].target_bytes) == shrinks)
        if (auto done = store(device() / (std::string(kTierWords[t]) + "_balloon_target_bytes"), std::to_string(balloon_bytes[t])); !done)
          return done;
  return {};
}

double BalloonDriver::slow_miss_share() const {
  const auto base = device();
  return base.empty() ? 0 : static_cast<double>(number_of(base / "slow_miss_share")) / 65536;
}

std::uint64_t BalloonDriver::fast_missing_bytes() const {
  const auto base = device();
  return base.empty() ? 0 : number_of(base / "fast_missing_bytes");
}

// Hints: a driver that went away meanwhile needs them no more.
void BalloonDriver::demote_first(unsigned milliseconds) const {
  if (const auto base = device(); !base.empty()) (void)store(base / "demote_first_ms", std::to_string(milliseconds));
}

void BalloonDriver::tell_slow_miss_share(double share) const {
  if (const auto base = device(); !base.empty())
    (void)store(base / "slow_miss_share", std::to_string(static_cast<unsigned>(std::clamp(share, 0.0, 1.0) * 65536)));
}

std::string answer_line(const BalloonDriver& driver, const std::string& line) {
  Json answer;
  answer["schema"] = kSchema;
  answer["id"] = nullptr;
  answer["error"] = nullptr;
  const Json request = Json::parse(line, nullptr, false);
  if (request.is_object() && request.contains("id") && request["id"].is_number_unsigned()) {
    answer["id"] = request["id"];
    if (request.contains("balloon_bytes")) {
      std::array<std::uint64_t, HT_TIERS> wanted{};
      bool good = request["balloon_bytes"].is_object();
      for (std::size_t t = 0; good && t < HT_TIERS; ++t) {
        const auto it = request["balloon_bytes"].find(kTierWords[t]);
        good = it != request["balloon_bytes"].end() && it->is_number_unsigned();
        if (good) wanted[t] = it->get<std::uint64_t>();
      }
      const Result<> done = good ? driver.aim(wanted) : fail("balloon_bytes needs the numbers fast and slow");
      if (!done) answer["error"] = done.error().message;
    }
  } else {
    answer["error"] = "a request is a JSON object with an id";
  }
  const auto balloons = driver.read();
  if (balloons) {
    answer["slow_miss_share"] = driver.slow_miss_share();
    answer["tiers"] = Json::array();
    for (std::size_t t = 0; t < HT_TIERS; ++t) {
      const Balloon& b = (*balloons)[t];
      answer["tiers"].push_back({{"role", kTierWords[t]},
                                 {"size_bytes", b.size_bytes},
                                 {"balloon_bytes", b.balloon_bytes},
                                 {"balloon_target_bytes", b.target_bytes},
                                 {"free_bytes", b.free_bytes},
                                 {"migrated_blocks_total", b.migrated_blocks_total},
                                 {"oom_pages_total", b.oom_pages_total}});
    }
  } else if (answer["error"].is_null()) {
    answer["error"] = balloons.error().message;
  }
  return answer.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

FlexAgent::FlexAgent() : port_(open_port()), stop_(eventfd(0, EFD_CLOEXEC)) {
  if (port_ && stop_) thread_ = std::thread(serve, port_.get(), stop_.get());
}

FlexAgent::~FlexAgent() {
  if (!thread_.joinable()) return;
  eventfd_write(stop_.get(), 1);
  thread_.join();
}

}  // namespace hypertier
