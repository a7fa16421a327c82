// SPDX-License-Identifier: GPL-2.0-or-later
#include "vm/agent_link.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>

#include <hypertier/flex.h>

namespace hypertier {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kAnswerMax = 64 << 10;

uint64_t number(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number_unsigned() ? it->get<uint64_t>() : 0;
}

}  // namespace

Result<GuestClaims> parse_agent(const std::string& answer, uint64_t id) {
  const auto json = nlohmann::json::parse(answer, nullptr, false);
  if (!json.is_object() || number(json, "id") != id) return fail("the guest's agent answered something else than was asked");
  if (json.contains("error") && json["error"].is_string())
    return fail("the guest's agent says: " + json["error"].get<std::string>().substr(0, 200));
  GuestClaims claims;
  const auto tiers = json.find("tiers");
  if (tiers == json.end() || !tiers->is_array() || tiers->size() != HT_TIERS) return fail("the guest's agent left its tiers out");
  for (size_t t = 0; t < HT_TIERS; t++) {
    const auto& tier = (*tiers)[t];
    if (!tier.is_object()) return fail("the guest's agent left its tiers out");
    claims.size_bytes[t] = number(tier, "size_bytes");
    claims.balloon_bytes[t] = number(tier, "balloon_bytes");
    claims.balloon_target_bytes[t] = number(tier, "balloon_target_bytes");
    claims.free_bytes[t] = number(tier, "free_bytes");
  }
  if (json.contains("slow_miss_share") && json["slow_miss_share"].is_number()) {
    const double share = json["slow_miss_share"].get<double>();
    claims.slow_miss_share = share >= 0 && share <= 1 ? share : 0;
  }
  claims.two_tier = claims.fresh = claims.agent = true;
  claims.updated_s = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  return claims;
}

AgentLink::~AgentLink() {
  if (fd_ >= 0) close(fd_);
}

Result<> AgentLink::connect() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path_.size() >= sizeof address.sun_path) return fail("the path of the agent channel " + path_ + " is too long");
  path_.copy(address.sun_path, path_.size());
  fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd_ < 0) return fail_errno("cannot make a socket", errno);
  if (::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0)
    return fail_errno("cannot connect to the agent channel " + path_, errno);
  pending_.clear();
  return {};
}

Result<std::string> AgentLink::exchange(uint64_t id, const std::string& line) {
  // A guest that does not read may block this; what does not go at once, fails.
  if (send(fd_, line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size()))
    return fail("the agent channel " + path_ + " takes nothing");
  const std::string mark = "\"id\":" + std::to_string(id) + ",";
  for (const auto end = Clock::now() + kTimeout;;) {
    for (size_t newline; (newline = pending_.find('\n')) != std::string::npos;) {
      const std::string answer = pending_.substr(0, newline);
      pending_.erase(0, newline + 1);
      // Older ones are answers that came too late.
      if (answer.find(mark) != std::string::npos) return answer;
    }
    if (pending_.size() > kAnswerMax) return fail("the guest's agent answers without end");
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    pollfd p{fd_, POLLIN, 0};
    if (left <= 0 || poll(&p, 1, static_cast<int>(left)) <= 0) return fail("no agent answers on " + path_);
    char chunk[4096];
    const ssize_t n = recv(fd_, chunk, sizeof chunk, 0);
    if (n <= 0) return fail("QEMU closed the agent channel " + path_);
    pending_.append(chunk, static_cast<size_t>(n));
  }
}

Result<GuestClaims> AgentLink::ask(std::optional<std::array<uint64_t, HT_TIERS>> balloon_bytes) {
  const auto failed = [&](Error error) -> Result<GuestClaims> {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
    return std::unexpected(std::move(error));
  };
  if (fd_ < 0)
    if (auto done = connect(); !done) return failed(done.error());
  const uint64_t id = ++last_id_;
  nlohmann::json request{{"id", id}};
  if (balloon_bytes) request["balloon_bytes"] = {{"fast", (*balloon_bytes)[HT_TIER_FAST]}, {"slow", (*balloon_bytes)[HT_TIER_SLOW]}};
  auto answer = exchange(id, request.dump() + "\n");
  if (!answer) return failed(answer.error());
  auto claims = parse_agent(*answer, id);
  if (!claims) return failed(claims.error());
  return claims;
}

}  // namespace hypertier
