// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierhostd/daemon.hpp"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <sstream>
#include <thread>

namespace hypertier {
namespace {

constexpr size_t kEventsMax = 1000;
constexpr size_t kHistoryMax = 3600;
// An agent that did not answer costs its timeout: not every tick.
constexpr std::chrono::seconds kAgentRetry{10};
constexpr long kTmpfsMagic = 0x01021994;

const char* tier_word(int tier) { return tier == HT_TIER_FAST ? "fast" : "slow"; }

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string mib(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

struct OwnTmpfs {
  std::filesystem::path directory;
  uint64_t size_bytes;
  bool holds_fixed;
};

// The tmpfs that holds a tier's file and nothing else; with virtio-mem perhaps
// also the memory that is there from boot.
Result<OwnTmpfs> own_tmpfs(const std::filesystem::path& file, const std::filesystem::path& fixed) {
  const auto directory = std::filesystem::weakly_canonical(file).parent_path();
  struct statfs fs{};
  if (statfs(directory.c_str(), &fs) != 0) return fail_errno("cannot look at " + directory.string(), errno);
  if (fs.f_type != kTmpfsMagic) return fail(directory.string() + " is no tmpfs, so it cannot be capped");
  struct stat inside{}, above{}, backing{};
  if (stat(directory.c_str(), &inside) || stat(directory.parent_path().c_str(), &above) || stat(file.c_str(), &backing))
    return fail_errno("cannot look at " + file.string(), errno);
  if (inside.st_dev == above.st_dev)
    return fail(directory.string() + " is not a mount of its own", "Give every tier of a VM its own tmpfs mount.");
  const uint64_t used = (fs.f_blocks - fs.f_bfree) * static_cast<uint64_t>(fs.f_bsize);
  struct stat other{};
  const bool holds_fixed = fixed != file && stat(fixed.c_str(), &other) == 0 && other.st_dev == backing.st_dev;
  const auto blocks = static_cast<uint64_t>(backing.st_blocks) + (holds_fixed ? static_cast<uint64_t>(other.st_blocks) : 0);
  if (used > blocks * 512 + (1 << 20))
    return fail(directory.string() + " holds more than the memory of this VM", "Give every tier of a VM its own tmpfs mount.");
  return OwnTmpfs{directory, fs.f_blocks * static_cast<uint64_t>(fs.f_bsize), holds_fixed};
}

// A VM's thread: ask, send what is to be sent, sleep. It ends with the VM. The
// agent is preferred where it answers: it takes pages, not units of the packed
// number, and says more.
void serve_vm(std::shared_ptr<VmWorker> worker, int tick_ms) {
  using Clock = std::chrono::steady_clock;
  const Vm& vm = worker->vm;
  VmLink link(vm);
  std::optional<AgentLink> agent;
  if (!vm.agent_path.empty() && !vm.plugs()) agent.emplace(vm.agent_path);
  Clock::time_point ask_agent_at{};
  auto path = worker->path;
  std::unique_lock lock(worker->mutex);
  while (!worker->ended) {
    const auto order = std::exchange(worker->order, std::nullopt);
    const bool pause = worker->pause_wanted, paused = worker->paused;
    lock.unlock();
    auto claims = link.ask();
    for (size_t t = 0; claims && t < HT_TIERS; t++) {
      if (!vm.moving(t).memfd || !path[t].empty()) continue;
      auto address = link.address_of(vm.moving(t).id);
      auto found = address ? descriptor_of(vm.pid, *address) : std::unexpected(address.error());
      if (found) path[t] = *found;
      else claims = std::unexpected(found.error());
    }
    Result<> sent, stopped;
    bool told = false;
    if (claims && agent && Clock::now() >= ask_agent_at) {
      std::optional<std::array<uint64_t, HT_TIERS>> balloons;
      if (order) balloons = {vm.tier[0].size_bytes - (*order)[0], vm.tier[1].size_bytes - (*order)[1]};
      if (auto said = agent->ask(balloons)) {
        claims = *said;
        told = true;
      } else {
        ask_agent_at = Clock::now() + kAgentRetry;
      }
    }
    if (claims && order && !told) sent = link.order(*claims, *order);
    if (claims && pause != paused) stopped = pause ? link.pause() : link.resume();
    lock.lock();
    worker->error = claims ? "" : claims.error().message;
    worker->path = path;
    if (claims) {
      worker->claims = *claims;
      worker->answered = true;
      if (order) worker->order_error = sent ? "" : sent.error().message;
      if (stopped) worker->paused = pause;
    }
    // Not delivered: it is tried again, unless there is a newer one by now.
    const bool again = order && (!claims || !sent);
    if (again && !worker->order) worker->order = order;
    if (!worker->ended && (again || !worker->order)) worker->wake.wait_for(lock, std::chrono::milliseconds(tick_ms));
  }
}

Json share_json(const qos::Share& share) {
  Json json;
  json["guarantee_bytes"] = share.guarantee_bytes;
  json["limit_bytes"] = share.limit_bytes == qos::kNoLimit ? Json(nullptr) : Json(share.limit_bytes);
  json["weight"] = share.weight;
  return json;
}

uint64_t bytes_or(const Json& json, const char* key, uint64_t otherwise) {
  const auto it = json.find(key);
  return it != json.end() && it->is_number_unsigned() ? it->get<uint64_t>() : otherwise;
}

bool flag_or(const Json& json, const char* key, bool otherwise) {
  const auto it = json.find(key);
  return it != json.end() && it->is_boolean() ? it->get<bool>() : otherwise;
}

std::string text_or(const Json& json, const char* key, const std::string& otherwise) {
  const auto it = json.find(key);
  return it != json.end() && it->is_string() ? it->get<std::string>() : otherwise;
}

}  // namespace

HostDaemon::HostDaemon(HostOptions options) : options_(std::move(options)) {
  accounting_ = open_accounting(options_.bpf ? AccountingMode::kBpf : AccountingMode::kBlocks, accounting_note_);
  allocator_ = std::move(*qos::make_allocator(allocator_name_));
}

HostDaemon::~HostDaemon() {
  for (auto& [name, vm] : vms_) {
    std::lock_guard lock(vm.worker->mutex);
    vm.worker->ended = true;
    vm.worker->wake.notify_all();
  }
}

void HostDaemon::event(const std::string& vm, const char* step, const std::string& tier, const std::string& text) {
  Json e;
  e["time_ms"] = now_ms();
  e["vm"] = vm;
  e["event"] = step;
  e["tier"] = tier.empty() ? Json(nullptr) : Json(tier);
  e["text"] = text;
  events_.push_back(std::move(e));
  if (events_.size() > kEventsMax) events_.pop_front();
}

// ------------------------------------------------------------------- state

Result<> HostDaemon::load_state() {
  const auto path = options_.state_directory / "host.json";
  std::ifstream file(path);
  if (!file) return {};
  const Json state = Json::parse(file, nullptr, false);
  if (!state.is_object())
    return fail("the saved state " + path.string() + " is damaged", "Remove it to start without guarantees and limits.");
  const auto name = text_or(state, "allocator", "max-min");
  auto allocator = qos::make_allocator(name);
  if (!allocator) return std::unexpected(allocator.error());
  allocator_ = std::move(*allocator);
  allocator_name_ = name;
  qos_on_ = flag_or(state, "qos", false);
  for (int t = 0; t < HT_TIERS; t++)
    capacity_bytes_[t] = bytes_or(state, (std::string(tier_word(t)) + "_capacity_bytes").c_str(), 0);
  if (state.contains("vms") && state["vms"].is_object())
    for (const auto& [vm, entry] : state["vms"].items()) {
      Rule rule;
      if (!entry.is_object()) continue;
      rule.cap_allowed = flag_or(entry, "cap_allowed", false);
      if (entry.contains("fast") && entry.contains("slow")) {
        rule.share.emplace();
        for (int t = 0; t < HT_TIERS; t++) {
          const auto& s = entry[tier_word(t)];
          (*rule.share)[t] = {bytes_or(s, "guarantee_bytes", 0), bytes_or(s, "limit_bytes", qos::kNoLimit),
                              std::max<uint64_t>(bytes_or(s, "weight", 100), 1)};
        }
      }
      rules_[vm] = rule;
    }
  return {};
}

// Written whole and renamed: a crash leaves the old one or the new one.
Result<> HostDaemon::save_state() {
  Json state;
  state["schema"] = kSchema;
  state["qos"] = qos_on_;
  state["allocator"] = allocator_name_;
  for (int t = 0; t < HT_TIERS; t++) state[std::string(tier_word(t)) + "_capacity_bytes"] = capacity_bytes_[t];
  state["vms"] = Json::object();
  for (const auto& [name, rule] : rules_) {
    auto& entry = state["vms"][name];
    entry["cap_allowed"] = rule.cap_allowed;
    if (rule.share)
      for (int t = 0; t < HT_TIERS; t++) entry[tier_word(t)] = share_json((*rule.share)[t]);
  }
  std::error_code error;
  std::filesystem::create_directories(options_.state_directory, error);
  const auto path = options_.state_directory / "host.json", temporary = options_.state_directory / "host.json.new";
  std::ofstream file(temporary);
  file << state.dump(2) << std::flush;
  if (!file) return fail_errno("cannot write " + temporary.string(), errno);
  file.close();
  std::filesystem::rename(temporary, path, error);
  if (error) return fail("cannot write " + path.string() + ": " + error.message());
  return {};
}

// -------------------------------------------------------------------- tick

void HostDaemon::discover() {
  const auto found = find_qemus("/", options_.qmp_below);
  for (auto it = vms_.begin(); it != vms_.end();) {
    const auto& vm = it->second.worker->vm;
    const bool there = std::any_of(found.begin(), found.end(), [&](const Vm& v) {
      return v.pid == vm.pid && v.start_time == vm.start_time && v.name == it->first;
    });
    if (there) {
      ++it;
      continue;
    }
    {
      std::lock_guard lock(it->second.worker->mutex);
      it->second.worker->ended = true;
      it->second.worker->wake.notify_all();
    }
    event(it->first, "gone", "", "QEMU " + std::to_string(vm.pid) + " has ended");
    for (const auto& path : it->second.path) accounting_->forget(path);
    for (const auto& file : vm.tier) accounting_->forget(file.path);
    it = vms_.erase(it);
  }
  for (const auto& vm : found) {
    if (vms_.contains(vm.name)) continue;
    Managed managed;
    managed.worker = std::make_shared<VmWorker>(vm);
    event(vm.name, "found", "", "QEMU " + std::to_string(vm.pid) + (vm.problem.empty() ? "" : ", but it " + vm.problem));
    if (vm.problem.empty()) std::thread(serve_vm, managed.worker, options_.tick_ms).detach();
    vms_.emplace(vm.name, std::move(managed));
  }
}

void HostDaemon::measure() {
  for (auto& [name, vm] : vms_) {
    {
      std::lock_guard lock(vm.worker->mutex);
      const bool reachable = vm.worker->answered && vm.worker->error.empty();
      if (reachable != vm.reachable && vm.worker->vm.problem.empty())
        event(name, reachable ? "reachable" : "unreachable", "", reachable ? "its QMP answers" : vm.worker->error);
      vm.reachable = reachable;
      vm.error = vm.worker->error;
      vm.claims = vm.worker->claims;
      vm.path = vm.worker->path;
      // It is tried again every tick, and told once.
      if (vm.worker->order_error != vm.order_error && !vm.worker->order_error.empty())
        event(name, "order_failed", "", vm.worker->order_error);
      vm.order_error = vm.worker->order_error;
    }
    for (int t = 0; t < HT_TIERS; t++) {
      const auto& info = vm.worker->vm;
      if (vm.path[t].empty()) continue;
      if (auto usage = accounting_->read(vm.path[t])) {
        vm.usage[t] = *usage;
        if (info.plugs())
          if (auto fixed = accounting_->read(info.tier[t].path)) vm.usage[t] += *fixed;
      }
      // What it has is what it was told last, by whomever.
      if (vm.target_bytes[t] == HT_UNKNOWN64 && vm.reachable && vm.claims.two_tier && vm.claims.fresh) {
        aim(vm, t, info.size_bytes(t) - std::min(info.size_bytes(t), vm.claims.balloon_target_bytes[t]));
      }
    }
    auto& samples = history_[name];
    samples.push_back({now_ms(), {vm.usage[0].resident_bytes, vm.usage[1].resident_bytes}, vm.target_bytes});
    if (samples.size() > kHistoryMax) samples.pop_front();
  }
}

void HostDaemon::aim(Managed& vm, int tier, uint64_t bytes) {
  vm.target_bytes[tier] = bytes;
  accounting_->set_target(vm.path[tier], bytes - std::min(bytes, vm.worker->vm.fixed_bytes(tier)));
}

void HostDaemon::run_qos() {
  std::vector<qos::Observation> seen;
  for (auto& [name, vm] : vms_) {
    const auto rule = rules_.find(name);
    // Without two balloons there is nothing to move; without a rule nobody asked.
    if (rule == rules_.end() || !rule->second.share || vm.target_bytes[0] == HT_UNKNOWN64) continue;
    qos::Observation o;
    o.request.name = name;
    o.request.share = *rule->second.share;
    o.request.slow_miss_share = vm.claims.slow_miss_share;
    o.reachable = vm.reachable;
    o.cap_allowed = rule->second.cap_allowed;
    for (int t = 0; t < HT_TIERS; t++) {
      const auto& info = vm.worker->vm;
      const uint64_t size = info.size_bytes(t);
      // Nobody gets more than he has address space for.
      o.request.share[t].limit_bytes = std::min(o.request.share[t].limit_bytes, size);
      o.request.share[t].guarantee_bytes = std::min(o.request.share[t].guarantee_bytes, size);
      // What cannot be unplugged, it has.
      o.request.share[t].guarantee_bytes = std::max(o.request.share[t].guarantee_bytes, info.fixed_bytes(t));
      o.request.share[t].limit_bytes = std::max(o.request.share[t].limit_bytes, info.fixed_bytes(t));
      o.measured_bytes[t] = vm.usage[t].resident_bytes;
      o.found_target_bytes[t] = vm.target_bytes[t];
      // What it uses and an eighth more: growth is seen before it is hindered.
      o.request.demand_bytes[t] = vm.usage[t].resident_bytes + vm.usage[t].resident_bytes / 8 + (16 << 20);
      o.claimed_bytes[t] = vm.claims.two_tier ? size - std::min(size, vm.claims.balloon_bytes[t]) : qos::kNoLimit;
    }
    seen.push_back(std::move(o));
  }
  auto actions = controller_.tick(capacity_bytes_, seen, *allocator_);
  const std::string error = actions ? "" : actions.error().message;
  if (error != qos_error_ && !error.empty()) event("", "qos_failed", "", error);
  qos_error_ = error;
  if (!actions) return;
  std::map<std::string, bool> told;
  for (const auto& action : *actions) {
    auto& vm = vms_.at(action.vm);
    switch (action.step) {
      case qos::Step::kTarget:
        if (auto lifted = lift_cap(vm, action.tier, action.bytes); !lifted)
          event(action.vm, "cap_stays", tier_word(action.tier), lifted.error().message);
        aim(vm, action.tier, action.bytes);
        told[action.vm] = true;
        break;
      case qos::Step::kRetry:
        told[action.vm] = true;
        break;
      case qos::Step::kCap:
        if (auto done = hard_cap(vm, action.tier, action.bytes); !done)
          event(action.vm, "cap_refused", tier_word(action.tier), done.error().message);
        break;
      case qos::Step::kPause:
      case qos::Step::kForgive: {
        std::lock_guard lock(vm.worker->mutex);
        vm.worker->pause_wanted = action.step == qos::Step::kPause;
        vm.worker->wake.notify_all();
        break;
      }
      case qos::Step::kLoseBonus:
      case qos::Step::kLie:
        break;
    }
    event(action.vm, qos::step_name(action.step), tier_word(action.tier), action.reason);
  }
  for (const auto& [name, _] : told) {
    auto& vm = vms_.at(name);
    std::lock_guard lock(vm.worker->mutex);
    vm.worker->order = vm.target_bytes;
    vm.worker->wake.notify_all();
  }
}

void HostDaemon::tick() {
  discover();
  measure();
  if (qos_on_) run_qos();
  ticks_++;
  if (options_.metrics_file.empty()) return;
  const auto temporary = options_.metrics_file.string() + ".new";
  std::ofstream(temporary) << metrics();
  std::error_code ignored;
  std::filesystem::rename(temporary, options_.metrics_file, ignored);
}

// The file system is the cap: a tmpfs below its use refuses to shrink, so a
// success proves that the guest keeps to it. A write beyond it later ends the
// VM (SIGBUS).
Result<> HostDaemon::hard_cap(const Managed& vm, int tier, uint64_t bytes) {
  if (vm.worker->vm.moving(tier).memfd) return fail("a memfd cannot be capped", "Keep the tier in a file on a tmpfs mount of its own.");
  auto own = own_tmpfs(vm.path[tier], vm.worker->vm.tier[tier].path);
  if (!own) return std::unexpected(own.error());
  if (!own->holds_fixed) bytes -= std::min(bytes, vm.worker->vm.fixed_bytes(tier));
  const auto& directory = own->directory;
  const std::string size = "size=" + std::to_string(bytes);
  if (mount(nullptr, directory.c_str(), nullptr, MS_REMOUNT, size.c_str()) != 0)
    return fail_errno("the tmpfs " + directory.string() + " refuses " + mib(bytes), errno,
                      "More than that is in use: the guest has not given it back.");
  return {};
}

// A cap of earlier must not kill a VM that may have more again.
Result<> HostDaemon::lift_cap(const Managed& vm, int tier, uint64_t bytes) {
  if (vm.worker->vm.moving(tier).memfd) return {};
  const auto own = own_tmpfs(vm.path[tier], vm.worker->vm.tier[tier].path);
  if (own && !own->holds_fixed) bytes -= std::min(bytes, vm.worker->vm.fixed_bytes(tier));
  if (!own || own->size_bytes >= bytes) return {};  // what is no cap of ours, is left alone
  const auto& directory = own->directory;
  const std::string size = "size=" + std::to_string(bytes);
  if (mount(nullptr, directory.c_str(), nullptr, MS_REMOUNT, size.c_str()) != 0)
    return fail_errno("the cap of " + directory.string() + " cannot be raised to " + mib(bytes), errno);
  return {};
}

// ---------------------------------------------------------------- commands

Json HostDaemon::vm_json(const std::string& name, const Managed& vm) {
  const auto& info = vm.worker->vm;
  Json json;
  json["name"] = name;
  json["pid"] = info.pid;
  const bool stale = vm.claims.two_tier && vm.claims.updated_s && now_ms() / 1000 - vm.claims.updated_s > 10;
  json["state"] = !info.problem.empty() ? "unmanageable"
                  : !vm.reachable       ? "unreachable"
                  : !vm.claims.two_tier ? "one_balloon"
                  : stale               ? "silent"
                  : vm.target_bytes[0] == HT_UNKNOWN64 ? "asking"
                                        : "managed";
  json["problem"] = !info.problem.empty() ? Json(info.problem)
                    : !vm.reachable       ? Json(vm.error)
                    : !vm.claims.two_tier ? Json("the guest does not run hyperflex.ko")
                                          : Json(nullptr);
  json["channel"] = !vm.claims.two_tier ? Json(nullptr) : vm.claims.plugged ? Json("virtio-mem") : vm.claims.agent ? Json("agent") : Json("balloon");
  json["slow_miss_share"] = vm.claims.two_tier ? Json(vm.claims.slow_miss_share) : Json(nullptr);
  json["tiers"] = Json::array();
  for (int t = 0; t < HT_TIERS; t++) {
    const uint64_t size = info.size_bytes(t);
    Json tier;
    tier["role"] = tier_word(t);
    tier["node"] = info.tier[t].node;
    tier["file"] = vm.path[t];
    tier["size_bytes"] = size;
    tier["fixed_bytes"] = info.fixed_bytes(t);
    tier["resident_bytes"] = vm.usage[t].resident_bytes;
    tier["swapped_bytes"] = vm.usage[t].swapped_bytes;
    tier["in_pages_total"] = vm.usage[t].in_pages_total;
    tier["out_pages_total"] = vm.usage[t].out_pages_total;
    tier["refault_pages_total"] = vm.usage[t].refault_pages_total;
    tier["target_bytes"] = vm.target_bytes[t] == HT_UNKNOWN64 ? Json(nullptr) : Json(vm.target_bytes[t]);
    tier["claimed_balloon_bytes"] = vm.claims.two_tier ? Json(vm.claims.balloon_bytes[t]) : Json(nullptr);
    tier["claimed_free_bytes"] = vm.claims.agent ? Json(vm.claims.free_bytes[t]) : Json(nullptr);
    const uint64_t claimed = size - std::min(size, vm.claims.balloon_bytes[t]);
    tier["lie"] = vm.claims.two_tier && vm.target_bytes[t] != HT_UNKNOWN64 &&
                  vm.usage[t].resident_bytes > std::max(claimed, vm.target_bytes[t]) + HT_GRANULE_SIZE;
    tier["rung"] = controller_.rung(name, static_cast<ht_tier>(t));
    const auto rule = rules_.find(name);
    tier["share"] = rule != rules_.end() && rule->second.share ? share_json((*rule->second.share)[t]) : Json(nullptr);
    json["tiers"].push_back(std::move(tier));
  }
  return json;
}

Result<HostDaemon::Managed*> HostDaemon::find(const Json& request) {
  const auto name = text_or(request, "name", "");
  for (auto& [key, vm] : vms_)
    if (key == name || std::to_string(vm.worker->vm.pid) == name) return &vm;
  std::string known;
  for (const auto& [key, vm] : vms_) known += (known.empty() ? "" : ", ") + key;
  return fail("there is no VM \"" + name + "\"", known.empty() ? "No QEMU is running." : "Running: " + known + ".");
}

Result<Json> HostDaemon::command_list() {
  Json reply;
  reply["schema"] = kSchema;
  reply["accounting"] = accounting_->name();
  reply["accounting_note"] = accounting_note_;
  reply["qos"] = qos_on_;
  reply["qos_error"] = qos_error_.empty() ? Json(nullptr) : Json(qos_error_);
  reply["allocator"] = allocator_name_;
  reply["fast_capacity_bytes"] = capacity_bytes_[0];
  reply["slow_capacity_bytes"] = capacity_bytes_[1];
  reply["ticks_total"] = ticks_;
  reply["vms"] = Json::array();
  for (const auto& [name, vm] : vms_) reply["vms"].push_back(vm_json(name, vm));
  return reply;
}

Result<Json> HostDaemon::command_set(const Json& request) {
  auto vm = find(request);
  if (!vm) return std::unexpected(vm.error());
  const auto& info = (*vm)->worker->vm;
  const auto rule = rules_.find(info.name);
  if (!info.problem.empty()) return fail("VM " + info.name + " " + info.problem, info.hint);
  if (!(*vm)->reachable) return fail("VM " + info.name + " cannot be reached: " + (*vm)->error);
  if (!(*vm)->claims.two_tier)
    return fail("the guest of " + info.name + " does not run hyperflex.ko", "Load it in the guest: insmod hyperflex.ko.");
  // Half an order would move the other tier too.
  if ((*vm)->target_bytes[0] == HT_UNKNOWN64)
    return fail("the guest of " + info.name + " has not said yet what it aims at", "It answers once a second; try again.");
  if (qos_on_ && rule != rules_.end() && rule->second.share)
    return fail("QoS decides the memory of " + info.name, "Change its share with tierctl vm qos, or turn QoS off: tierctl vm qos --off.");
  auto target = (*vm)->target_bytes;
  for (int t = 0; t < HT_TIERS; t++) {
    const auto key = std::string(tier_word(t)) + "_bytes";
    if (!request.contains(key)) continue;
    const uint64_t bytes = bytes_or(request, key.c_str(), 0);
    if (bytes == 0 || bytes > info.size_bytes(t))
      return fail("the " + std::string(tier_word(t)) + " tier of " + info.name + " has " + mib(info.size_bytes(t)) + ", so it cannot be set to " + mib(bytes),
                  "Give a size from 2M to " + mib(info.size_bytes(t)) + ".");
    if (bytes < info.fixed_bytes(t))
      return fail(mib(info.fixed_bytes(t)) + " of the " + std::string(tier_word(t)) + " tier of " + info.name + " are there from boot and cannot be unplugged",
                  "Give a size from there to " + mib(info.size_bytes(t)) + ".");
    target[t] = bytes;
  }
  if (flag_or(request, "hard_cap", false))
    for (int t = 0; t < HT_TIERS; t++)
      if (request.contains(std::string(tier_word(t)) + "_bytes"))
        if (auto capped = hard_cap(**vm, t, target[t]); !capped) return std::unexpected(capped.error());
  for (int t = 0; t < HT_TIERS; t++)
    if (auto lifted = lift_cap(**vm, t, target[t]); !lifted) return std::unexpected(lifted.error());
  for (int t = 0; t < HT_TIERS; t++) {
    if (target[t] != (*vm)->target_bytes[t])
      event(info.name, "set", tier_word(t), mib((*vm)->target_bytes[t]) + " -> " + mib(target[t]));
    aim(**vm, t, target[t]);
  }
  {
    std::lock_guard lock((*vm)->worker->mutex);
    (*vm)->worker->order = target;
    (*vm)->worker->wake.notify_all();
  }
  Json reply;
  reply["schema"] = kSchema;
  reply["vm"] = vm_json(info.name, **vm);
  return reply;
}

Result<Json> HostDaemon::command_qos(const Json& request) {
  // Checked as a whole before anything changes.
  auto rules = rules_;
  auto capacity = capacity_bytes_;
  auto name = allocator_name_;
  auto on = flag_or(request, "on", qos_on_);
  for (int t = 0; t < HT_TIERS; t++)
    capacity[t] = bytes_or(request, (std::string(tier_word(t)) + "_capacity_bytes").c_str(), capacity[t]);
  name = text_or(request, "allocator", name);
  auto allocator = qos::make_allocator(name);
  if (!allocator) return std::unexpected(allocator.error());
  if (const auto vm = text_or(request, "name", ""); !vm.empty()) {
    auto& rule = rules[vm];
    if (!rule.share) rule.share.emplace();
    rule.cap_allowed = flag_or(request, "cap_allowed", rule.cap_allowed);
    for (int t = 0; t < HT_TIERS; t++) {
      auto& share = (*rule.share)[t];
      const std::string prefix = tier_word(t);
      share.guarantee_bytes = bytes_or(request, (prefix + "_guarantee_bytes").c_str(), share.guarantee_bytes);
      share.limit_bytes = bytes_or(request, (prefix + "_limit_bytes").c_str(), share.limit_bytes);
      share.weight = bytes_or(request, (prefix + "_weight").c_str(), share.weight);
      if (share.guarantee_bytes > share.limit_bytes)
        return fail("the guarantee of " + vm + " (" + prefix + " tier) exceeds its limit", "Raise the limit or lower the guarantee.");
      if (share.weight == 0 || share.weight > 1000000) return fail("a weight is a number from 1 to 1000000");
    }
    if (flag_or(request, "forget", false)) rules.erase(vm);
  }
  if (on && (capacity[0] == 0 || capacity[1] == 0))
    return fail("the capacity of the host's tiers is not known", "Tell it: tierctl vm qos --on --fast-capacity SIZE --slow-capacity SIZE.");
  std::vector<qos::Request> requests;
  for (const auto& [vm, rule] : rules) {
    if (!rule.share) continue;
    qos::Request r;
    r.name = vm;
    r.share = *rule.share;
    requests.push_back(std::move(r));
  }
  if (on)
    if (auto fits = (*allocator)->divide(capacity, requests); !fits) return std::unexpected(fits.error());
  rules_ = std::move(rules);
  capacity_bytes_ = capacity;
  if (name != allocator_name_) allocator_ = std::move(*allocator);
  allocator_name_ = name;
  if (on != qos_on_) event("", on ? "qos_on" : "qos_off", "", "allocator " + name);
  qos_on_ = on;
  if (auto saved = save_state(); !saved) return std::unexpected(saved.error());
  return command_list();
}

Result<Json> HostDaemon::command_history(const Json& request) {
  Json reply;
  reply["schema"] = kSchema;
  reply["vms"] = Json::object();
  const auto only = text_or(request, "name", "");
  for (const auto& [name, samples] : history_) {
    if (!only.empty() && name != only) continue;
    // At most 240 points a VM: a message has its limit.
    const size_t stride = samples.size() / 240 + 1;
    auto& points = reply["vms"][name] = Json::array();
    for (size_t i = samples.size() % stride ? samples.size() % stride - 1 : 0; i < samples.size(); i += stride) {
      const auto& s = samples[i];
      auto target = [&](int t) { return s.target[t] == HT_UNKNOWN64 ? Json(nullptr) : Json(s.target[t]); };
      points.push_back(Json::array({s.time_ms, s.resident[0], target(0), s.resident[1], target(1)}));
    }
  }
  reply["columns"] = {"time_ms", "fast_resident_bytes", "fast_target_bytes", "slow_resident_bytes", "slow_target_bytes"};
  reply["events"] = events_;
  return reply;
}

std::string HostDaemon::metrics() {
  std::ostringstream text;
  auto label = [](const std::string& raw) {
    std::string escaped;
    for (char c : raw) {
      if (c == '\\' || c == '"') escaped += '\\';
      escaped += static_cast<unsigned char>(c) < 32 || c == 127 ? '?' : c;
    }
    return escaped;
  };
  auto family = [&](const char* name, const char* type, const char* help, auto value) {
    text << "# HELP " << name << ' ' << help << "\n# TYPE " << name << ' ' << type << '\n';
    for (const auto& [vm, managed] : vms_)
      for (int t = 0; t < HT_TIERS; t++)
        if (const std::optional<uint64_t> v = value(managed, t))
          text << name << "{vm=\"" << label(vm) << "\",tier=\"" << tier_word(t) << "\"} " << *v << '\n';
  };
  using Value = std::optional<uint64_t>;
  family("hypertier_vm_resident_bytes", "gauge", "Memory that the host holds for the tier, measured.",
         [](const Managed& m, int t) -> Value { return m.usage[t].resident_bytes; });
  family("hypertier_vm_target_bytes", "gauge", "Memory that the VM is to have of the tier.",
         [](const Managed& m, int t) -> Value { return m.target_bytes[t] == HT_UNKNOWN64 ? Value{} : m.target_bytes[t]; });
  family("hypertier_vm_size_bytes", "gauge", "Size of the tier's backing file.",
         [](const Managed& m, int t) -> Value { return m.worker->vm.size_bytes(t); });
  family("hypertier_vm_claimed_balloon_bytes", "gauge", "Memory that the guest says it gave back.",
         [](const Managed& m, int t) -> Value { return m.claims.two_tier ? Value{m.claims.balloon_bytes[t]} : Value{}; });
  family("hypertier_vm_swapped_bytes", "gauge", "Memory of the tier that is swapped out.",
         [](const Managed& m, int t) -> Value { return m.usage[t].swapped_bytes; });
  family("hypertier_vm_in_pages_total", "counter", "Pages that entered the tier.",
         [](const Managed& m, int t) -> Value { return m.usage[t].in_pages_total; });
  family("hypertier_vm_out_pages_total", "counter", "Pages that left the tier.",
         [](const Managed& m, int t) -> Value { return m.usage[t].out_pages_total; });
  family("hypertier_vm_refault_pages_total", "counter", "Pages that entered above the target.",
         [](const Managed& m, int t) -> Value { return m.usage[t].refault_pages_total; });
  text << "# HELP hypertier_vm_reachable Whether the VM's QMP answers.\n# TYPE hypertier_vm_reachable gauge\n";
  for (const auto& [vm, managed] : vms_)
    text << "hypertier_vm_reachable{vm=\"" << label(vm) << "\"} " << managed.reachable << '\n';
  return text.str();
}

Json HostDaemon::answer(const Json& request) {
  const auto command = text_or(request, "command", "");
  auto reply = [&]() -> Result<Json> {
    if (command == "vm_list") return command_list();
    if (command == "vm_set") return command_set(request);
    if (command == "vm_qos") return command_qos(request);
    if (command == "vm_history") return command_history(request);
    if (command == "vm_metrics") {
      Json json;
      json["schema"] = kSchema;
      json["text"] = metrics();
      return json;
    }
    return fail("tierhostd does not know the command \"" + command + "\"", "tierctl and tierhostd may be of different versions.");
  }();
  return reply ? *reply : error_json(reply.error());
}

}  // namespace hypertier
