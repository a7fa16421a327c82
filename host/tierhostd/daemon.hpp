// SPDX-License-Identifier: GPL-2.0-or-later
// tierhostd: finds VMs, measures their tiers, moves their balloons.
//
// The main thread owns everything but QMP. Every VM has a thread that talks to
// its QEMU and to nobody else: one that hangs is waited for by its own thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "accounting/accounting.hpp"
#include "qos/qos.hpp"
#include "tierd/protocol.hpp"
#include "vm/agent_link.hpp"
#include "vm/discovery.hpp"
#include "vm/link.hpp"

namespace hypertier {

inline constexpr char kHostSocket[] = "/run/hypertier/tierhostd.sock";

struct HostOptions {
  std::filesystem::path socket = kHostSocket;
  std::filesystem::path state_directory = kStateDirectory;
  std::filesystem::path metrics_file;  // Prometheus text, rewritten every tick; empty: none
  std::vector<std::filesystem::path> qmp_below;  // manage only VMs whose QMP socket is below one of these; empty: all
  int tick_ms = 1000;
  bool bpf = true;
};

// Shared by the main thread and the VM's own.
struct VmWorker {
  explicit VmWorker(Vm v) : vm(std::move(v)), path{vm.moving(0).path, vm.moving(1).path} {}
  const Vm vm;

  std::mutex mutex;
  std::condition_variable wake;
  bool ended = false;
  bool answered = false;  // at least once
  std::string error = "not asked yet";
  GuestClaims claims;
  std::optional<std::array<uint64_t, HT_TIERS>> order;  // to be sent
  std::string order_error;
  std::array<std::string, HT_TIERS> path;  // of the backing files that move; found later for a memfd
  bool paused = false, pause_wanted = false;
};

class HostDaemon {
 public:
  explicit HostDaemon(HostOptions options);
  ~HostDaemon();
  [[nodiscard]] Result<> load_state();
  void tick();
  Json answer(const Json& request);
  std::string accounting_note() const { return accounting_note_; }

 private:
  struct Managed {
    std::shared_ptr<VmWorker> worker;
    qos::PerTier<uint64_t> target_bytes{HT_UNKNOWN64, HT_UNKNOWN64};  // last order, or what was found
    qos::PerTier<TierUsage> usage;
    bool reachable = false;
    std::string error, order_error;
    std::array<std::string, HT_TIERS> path;
    GuestClaims claims;
  };
  struct Rule {  // what root configured for a name
    std::optional<qos::PerTier<qos::Share>> share;
    bool cap_allowed = false;
  };
  struct Sample {
    int64_t time_ms;
    qos::PerTier<uint64_t> resident, target;
  };

  void discover();
  void measure();
  void run_qos();
  void event(const std::string& vm, const char* step, const std::string& tier, const std::string& text);
  [[nodiscard]] Result<> save_state();
  [[nodiscard]] Result<Managed*> find(const Json& request);
  void aim(Managed& vm, int tier, uint64_t bytes);
  Result<Json> command_list();
  Result<Json> command_set(const Json& request);
  Result<Json> command_qos(const Json& request);
  Result<Json> command_history(const Json& request);
  Json vm_json(const std::string& name, const Managed& vm);
  std::string metrics();
  [[nodiscard]] Result<> hard_cap(const Managed& vm, int tier, uint64_t bytes);
  [[nodiscard]] Result<> lift_cap(const Managed& vm, int tier, uint64_t bytes);

  HostOptions options_;
  std::unique_ptr<Accounting> accounting_;
  std::string accounting_note_;
  std::map<std::string, Managed> vms_;
  std::map<std::string, Rule> rules_;
  bool qos_on_ = false;
  std::string allocator_name_ = "max-min";
  std::unique_ptr<qos::Allocator> allocator_;
  qos::PerTier<uint64_t> capacity_bytes_{};
  qos::Controller controller_;
  std::string qos_error_;
  std::deque<Json> events_;
  std::map<std::string, std::deque<Sample>> history_;
  uint64_t ticks_ = 0;
};

}  // namespace hypertier
