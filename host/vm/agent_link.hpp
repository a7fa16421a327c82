// SPDX-License-Identifier: GPL-2.0-or-later
// The agent channel of one VM: a socket whose other end is tierd in the guest
// (loader/tierd/agent.hpp says what goes over it). The other end may be anybody.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include <hypertier/abi.h>

#include "result.hpp"
#include "vm/link.hpp"

namespace hypertier {

class AgentLink {
 public:
  static constexpr std::chrono::milliseconds kTimeout{2000};

  explicit AgentLink(std::string path) : path_(std::move(path)) {}
  ~AgentLink();
  AgentLink(const AgentLink&) = delete;

  // What the guest says; with balloon_bytes, after it took them for its targets.
  // Any error drops the connection; the next call makes a new one.
  [[nodiscard]] Result<GuestClaims> ask(std::optional<std::array<uint64_t, HT_TIERS>> balloon_bytes = {});

 private:
  [[nodiscard]] Result<> connect();
  [[nodiscard]] Result<std::string> exchange(uint64_t id, const std::string& line);

  std::string path_;
  int fd_ = -1;
  // Not those of a tierhostd before us, whose answers may still come.
  uint64_t last_id_ = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch() / std::chrono::milliseconds(1));
  std::string pending_;
};

// The claims in an answer; an answer that says an error is one.
[[nodiscard]] Result<GuestClaims> parse_agent(const std::string& answer, uint64_t id);

}  // namespace hypertier
