// SPDX-License-Identifier: GPL-2.0-or-later
#include "vm/link.hpp"

#include <algorithm>
#include <chrono>
#include <sstream>

#include <hypertier/flex.h>

namespace hypertier {
namespace {

// A number of the guest may be anything, also not a number.
uint64_t number(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end()) return 0;
  // QEMU prints an unsigned 64-bit tag as it is; -1 means "never said".
  return it->is_number_unsigned() ? it->get<uint64_t>() : it->is_number_integer() ? static_cast<uint64_t>(it->get<int64_t>()) : 0;
}

// A QEMU may be anybody: what is not a string is none.
std::string text(const nlohmann::json& object, const char* key) {
  const auto it = object.is_object() ? object.find(key) : object.end();
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

}  // namespace

GuestClaims parse_claims(const nlohmann::json& guest_stats) {
  GuestClaims claims;
  if (!guest_stats.is_object() || !guest_stats.contains("stats") || !guest_stats["stats"].is_object()) return claims;
  const auto& stats = guest_stats["stats"];
  if (guest_stats.contains("last-update") && guest_stats["last-update"].is_number_integer())
    claims.updated_s = guest_stats["last-update"].get<int64_t>();
  if (number(stats, "stat-async-scans") != HF_MAGIC) return claims;
  claims.two_tier = true;
  const uint64_t fast = number(stats, "stat-direct-scans"), slow = number(stats, "stat-async-reclaims");
  const uint64_t targets = number(stats, "stat-direct-reclaims");
  auto bytes = [](uint64_t pages) { return (pages & 0xffffffff) << HF_PAGE_SHIFT; };
  claims.size_bytes = {bytes(fast >> 32), bytes(slow >> 32)};
  claims.balloon_bytes = {bytes(fast), bytes(slow)};
  claims.balloon_target_bytes = {bytes(targets >> 32), bytes(targets)};
  claims.slow_miss_share = static_cast<double>(std::min<uint64_t>(number(stats, "stat-alloc-stalls"), 65536)) / 65536;
  return claims;
}

Result<nlohmann::json> VmLink::command(const std::string& name, nlohmann::json arguments) {
  if (!qmp_) {
    auto qmp = Qmp::connect(vm_.qmp_path);
    if (!qmp) return std::unexpected(qmp.error());
    qmp_ = std::make_unique<Qmp>(std::move(*qmp));
  }
  auto answer = qmp_->command(name, std::move(arguments));
  if (!answer) qmp_.reset();
  return answer;
}

Result<> VmLink::find_balloon() {
  if (!balloon_path_.empty()) return {};
  for (const std::string parent : {"/machine/peripheral", "/machine/peripheral-anon"}) {
    auto children = command("qom-list", {{"path", parent}});
    if (!children) return std::unexpected(children.error());
    for (const auto& child : *children)
      if (text(child, "type").starts_with("child<virtio-balloon")) {
        balloon_path_ = parent + "/" + text(child, "name");
        return {};
      }
  }
  return fail("the VM has no virtio-balloon device", "Add -device virtio-balloon-pci,id=balloon0,free-page-reporting=on.");
}

// QEMU says what is plugged; what the guest does with it, is measured. A balloon
// of a tier is what is not plugged.
Result<GuestClaims> VmLink::ask_plugs() {
  GuestClaims claims;
  for (int t = 0; t < HT_TIERS; t++) {
    const uint64_t most = vm_.plug[t].file.size_bytes;
    const auto hidden = [&](const char* property) -> Result<uint64_t> {
      auto value = command("qom-get", {{"path", vm_.plug[t].device}, {"property", property}});
      if (!value) return std::unexpected(value.error());
      if (!value->is_number_unsigned()) return fail("QEMU does not say how much of " + vm_.plug[t].device + " is plugged");
      return most - std::min(most, value->get<uint64_t>());
    };
    const auto now = hidden("size"), aim = hidden("requested-size");
    if (!now || !aim) return std::unexpected(now ? aim.error() : now.error());
    claims.size_bytes[t] = vm_.size_bytes(t);
    claims.balloon_bytes[t] = *now;
    claims.balloon_target_bytes[t] = *aim;
  }
  claims.two_tier = claims.fresh = claims.plugged = true;
  claims.updated_s = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  return claims;
}

// What is to grow before what is to shrink: pages that leave a tier need room.
Result<> VmLink::order_plugs(std::array<uint64_t, HT_TIERS> target_bytes) {
  for (const bool grows : {true, false})
    for (int t = 0; t < HT_TIERS; t++) {
      const auto now = command("qom-get", {{"path", vm_.plug[t].device}, {"property", "requested-size"}});
      if (!now) return std::unexpected(now.error());
      const auto block = command("qom-get", {{"path", vm_.plug[t].device}, {"property", "block-size"}});
      if (!block) return std::unexpected(block.error());
      if (!now->is_number_unsigned() || !block->is_number_unsigned() || block->get<uint64_t>() == 0)
        return fail("QEMU does not say how " + vm_.plug[t].device + " is divided");
      uint64_t wanted = std::min(target_bytes[t] - std::min(target_bytes[t], vm_.fixed_bytes(t)), vm_.plug[t].file.size_bytes);
      wanted -= wanted % block->get<uint64_t>();
      if ((wanted > now->get<uint64_t>()) != grows || wanted == now->get<uint64_t>()) continue;
      auto done = command("qom-set", {{"path", vm_.plug[t].device}, {"property", "requested-size"}, {"value", wanted}});
      if (!done) return std::unexpected(done.error());
    }
  return {};
}

Result<GuestClaims> VmLink::ask() {
  if (vm_.plugs()) return ask_plugs();
  const bool fresh = !qmp_;
  if (auto found = find_balloon(); !found) return std::unexpected(found.error());
  if (fresh) {
    auto polling = command("qom-set", {{"path", balloon_path_}, {"property", "guest-stats-polling-interval"}, {"value", 1}});
    if (!polling) return std::unexpected(polling.error());
    connected_s_ = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  }
  auto stats = command("qom-get", {{"path", balloon_path_}, {"property", "guest-stats"}});
  if (!stats) return std::unexpected(stats.error());
  auto claims = parse_claims(*stats);
  claims.fresh = claims.updated_s > connected_s_;  // whole seconds: the same one may be before
  return claims;
}

Result<> VmLink::order(const GuestClaims& claims, std::array<uint64_t, HT_TIERS> target_bytes) {
  if (vm_.plugs()) return order_plugs(target_bytes);
  const uint64_t memory_bytes = vm_.size_bytes(0) + vm_.size_bytes(1);
  if (!claims.two_tier)
    return fail("the guest does not run hyperflex.ko", "Load it in the guest: insmod hyperflex.ko.");
  std::array<uint64_t, HT_TIERS> size, balloon;
  for (int t = 0; t < HT_TIERS; t++) {
    size[t] = claims.size_bytes[t] >> HF_PAGE_SHIFT;
    balloon[t] = (claims.size_bytes[t] - std::min(claims.size_bytes[t], target_bytes[t])) >> HF_PAGE_SHIFT;
  }
  if (!size[0] || !size[1] || size[0] + size[1] > memory_bytes >> HF_PAGE_SHIFT)
    return fail("the guest claims tiers that its memory cannot hold", "Load hyperflex.ko with fast_bytes= and slow_bytes=.");
  const uint64_t packed = hf_pack(size[0], size[1], balloon[0], balloon[1]);
  // QMP takes what is left and hands the difference on.
  auto done = command("balloon", {{"value", memory_bytes - (packed << HF_PAGE_SHIFT)}});
  if (!done) return std::unexpected(done.error());
  return {};
}

Result<uint64_t> VmLink::address_of(const std::string& backend) {
  auto answer = command("x-query-ramblock");
  if (!answer) return std::unexpected(answer.error());
  std::istringstream lines(text(*answer, "human-readable-text"));
  // "fast  4 KiB  OFFSET USED TOTAL ADDRESS rw"; older machines say /objects/fast
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name, size, unit, offset, used, total, address;
    if (!(words >> name >> size >> unit >> offset >> used >> total >> address)) continue;
    if (name == backend || name == "/objects/" + backend) return strtoull(address.c_str(), nullptr, 16);
  }
  return fail("QEMU does not say where its memory " + backend + " lies");
}

Result<> VmLink::pause() {
  auto done = command("stop");
  if (!done) return std::unexpected(done.error());
  return {};
}

Result<> VmLink::resume() {
  auto done = command("cont");
  if (!done) return std::unexpected(done.error());
  return {};
}

}  // namespace hypertier
