// SPDX-License-Identifier: GPL-2.0-or-later
// One VM's two balloons, or its two virtio-mem devices, through its QMP socket.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <hypertier/abi.h>

#include "qmp/qmp.hpp"
#include "vm/discovery.hpp"

namespace hypertier {

// What the guest says about itself. Claims: nothing is paid for by them.
struct GuestClaims {
  bool two_tier = false;  // hyperflex.ko answers, or QEMU for the virtio-mem devices
  // Answered since we are connected. QEMU keeps the last answer, which may be
  // older than the last order of a tierhostd that is gone.
  bool fresh = false;
  std::array<uint64_t, HT_TIERS> size_bytes{};
  std::array<uint64_t, HT_TIERS> balloon_bytes{};
  std::array<uint64_t, HT_TIERS> balloon_target_bytes{};
  std::array<uint64_t, HT_TIERS> free_bytes{};  // of the node; only an agent tells
  bool agent = false;  // said by the agent, else by the balloon's statistics
  bool plugged = false;  // by virtio-mem
  double slow_miss_share = 0;
  int64_t updated_s = 0;  // Unix time of the guest's last answer
};

class VmLink {
 public:
  explicit VmLink(const Vm& vm) : vm_(vm), balloon_path_(vm.balloon_path) {}

  // Blocks for at most a few QMP timeouts. Any error drops the connection; the
  // next call makes a new one.
  [[nodiscard]] Result<GuestClaims> ask();

  // Memory that is to be left of each tier. For balloons it needs the guest's tier
  // sizes, which are the radix of the packed number; sizes far from those of the
  // files are refused before.
  [[nodiscard]] Result<> order(const GuestClaims& claims, std::array<uint64_t, HT_TIERS> target_bytes);
  // Where a memory backend lies in the QEMU process.
  [[nodiscard]] Result<uint64_t> address_of(const std::string& backend);
  [[nodiscard]] Result<> pause();
  [[nodiscard]] Result<> resume();

 private:
  [[nodiscard]] Result<nlohmann::json> command(const std::string& name, nlohmann::json arguments = nlohmann::json::object());
  [[nodiscard]] Result<> find_balloon();

  [[nodiscard]] Result<GuestClaims> ask_plugs();
  [[nodiscard]] Result<> order_plugs(std::array<uint64_t, HT_TIERS> target_bytes);

  const Vm vm_;
  std::string balloon_path_;
  std::unique_ptr<Qmp> qmp_;
  int64_t connected_s_ = 0;  // Unix time
};

// The claims in a balloon's "guest-stats" property.
[[nodiscard]] GuestClaims parse_claims(const nlohmann::json& guest_stats);

}  // namespace hypertier
