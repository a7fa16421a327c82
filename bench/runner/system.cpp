// SPDX-License-Identifier: GPL-2.0-or-later
#include "system.hpp"

#include <fcntl.h>
#include <numaif.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstring>
#include <fstream>
#include <utility>

#include "../cases.hpp"

using e2e::die;
using e2e::json;
using e2e::write_file;

namespace bench {
namespace {

const std::string kNuma = "/proc/sys/kernel/numa_balancing";
const std::string kDemotion = "/sys/kernel/mm/numa/demotion_enabled";

class None final : public System {
 public:
  void prepare() override { write_file(kNuma, "0"); }
  json configuration() override { return {{"numa_balancing", 0}}; }
};

class Kernel final : public System {
 public:
  explicit Kernel(bool tuned) {
    if (tuned) knobs_ = {{"scan_delay_ms", "100"}, {"scan_period_min_ms", "100"}, {"scan_period_max_ms", "1000"}, {"hot_threshold_ms", "100"}};
  }
  void prepare() override {
    write_file(kNuma, "0");
    write_file(kDemotion, "1");
    for (auto& [knob, value] : knobs_) write_file("/sys/kernel/debug/sched/numa_balancing/" + knob, value);
  }
  void start(Memory&, pid_t) override { write_file(kNuma, "2"); }
  json configuration() override {
    json all = {{"numa_balancing", 2}, {"demotion_enabled", 1}};
    for (auto& [knob, value] : knobs_) all[knob] = std::stoi(value);
    return all;
  }
  void stop() override { write_file(kNuma, "0"); }

 private:
  std::vector<std::pair<std::string, std::string>> knobs_;
};

// Two kdamonds over physical addresses, one a node. 6.12 knows neither goals
// for used memory nor allowing filters, so pages are told apart by filters that
// reject: young ones are not demoted, others are not promoted.
class Damon final : public System {
 public:
  explicit Damon(std::string cgroup) : cgroup_(std::move(cgroup)) {}
  void prepare() override { write_file(kNuma, "0"); }
  void start(Memory& memory, pid_t) override {
    set("kdamonds/nr_kdamonds", "2");
    for (unsigned node = 0; node < 2; node++) {
      const std::string kdamond = "kdamonds/" + std::to_string(node) + "/", context = kdamond + "contexts/0/";
      set(kdamond + "contexts/nr_contexts", "1");
      set(context + "operations", "paddr");
      set(context + "monitoring_attrs/intervals/sample_us", "5000");
      set(context + "monitoring_attrs/intervals/aggr_us", "100000");
      set(context + "monitoring_attrs/intervals/update_us", "1000000");
      set(context + "monitoring_attrs/nr_regions/min", "10");
      set(context + "monitoring_attrs/nr_regions/max", "1000");
      set(context + "targets/nr_targets", "1");
      set(context + "targets/0/regions/nr_regions", "1");
      auto [start, end] = memory.span(node);
      set(context + "targets/0/regions/0/start", std::to_string(start));
      set(context + "targets/0/regions/0/end", std::to_string(end));
      set(context + "schemes/nr_schemes", "1");
      const std::string scheme = context + "schemes/0/";
      const bool hot = node == 1;
      set(scheme + "action", hot ? "migrate_hot" : "migrate_cold");
      set(scheme + "target_nid", hot ? "0" : "1");
      set(scheme + "access_pattern/sz/min", "4096");
      set(scheme + "access_pattern/sz/max", "18446744073709551615");
      set(scheme + "access_pattern/nr_accesses/min", hot ? "1" : "0");
      set(scheme + "access_pattern/nr_accesses/max", hot ? "20" : "0");
      set(scheme + "access_pattern/age/min", "0");
      set(scheme + "access_pattern/age/max", "4294967295");
      set(scheme + "quotas/bytes", "209715200");
      set(scheme + "quotas/reset_interval_ms", "1000");
      set(scheme + "filters/nr_filters", cgroup_ == "/" ? "1" : "2");
      set(scheme + "filters/0/type", "young");
      set(scheme + "filters/0/matching", hot ? "N" : "Y");
      if (cgroup_ != "/") {  // others' pages are rejected
        set(scheme + "filters/1/type", "memcg");
        set(scheme + "filters/1/memcg_path", cgroup_);
        set(scheme + "filters/1/matching", "N");
      }
    }
    for (const char* kdamond : {"0", "1"}) set(std::string("kdamonds/") + kdamond + "/state", "on");
    for (const char* kdamond : {"0", "1"})
      if (!e2e::read_file(kRoot + "kdamonds/" + kdamond + "/state").starts_with("on")) die("DAMON does not start");
  }
  json configuration() override {
    return {{"kdamonds", "paddr, one a node"}, {"sample_aggr_update_ms", {5, 100, 1000}}, {"regions", {10, 1000}},
            {"quota_bytes_per_s", 209715200}, {"migrate_cold", "nr_accesses 0, young ones rejected"},
            {"migrate_hot", "nr_accesses 1-20, others than young rejected"}, {"memcg", cgroup_ == "/" ? "all" : "others rejected"}};
  }
  void stop() override {
    for (const char* kdamond : {"0", "1"}) set(std::string("kdamonds/") + kdamond + "/state", "off");
  }

 private:
  std::string cgroup_;
  static inline const std::string kRoot = "/sys/kernel/mm/damon/admin/";
  static void set(const std::string& path, const std::string& value) { write_file(kRoot + path, value); }
};

// The best placement, from the truth of a few windows: the most missed pages
// into fast memory, as many others out. Again after a shift.
class Oracle final : public System {
 public:
  void prepare() override { write_file(kNuma, "0"); }
  void start(Memory& memory, pid_t) override { begin(memory); }
  void shifted() override { windows_ = -1; }
  void window(Memory& memory, pid_t pid) override {
    if (windows_ < 0) begin(memory);
    else if (++windows_ == kWindows) place(memory, pid);
  }
  json counters() override { return {{"promoted_pages_total", promoted_}, {"demoted_pages_total", demoted_}}; }
  json configuration() override { return {{"placed_by", "true misses of each page"}, {"after_windows", kWindows}}; }

 private:
  static constexpr int kWindows = 4;  // the rest of the run shows what the placement is worth

  void begin(Memory& memory) {
    windows_ = 0;
    first_ = memory.misses();
  }

  void place(Memory& memory, pid_t pid) {
    std::vector<PagePlace> places = memory.places();
    std::vector<PageMisses> now = memory.misses();
    struct Page {
      uint64_t page, misses;
      uint8_t node;
    };
    std::vector<Page> pages;
    size_t at = 0, before = 0, fast = 0;
    for (const PagePlace& place : places) {
      while (at < now.size() && now[at].page < place.page) at++;
      while (before < first_.size() && first_[before].page < place.page) before++;
      uint64_t misses = at < now.size() && now[at].page == place.page ? now[at].total() : 0;
      if (before < first_.size() && first_[before].page == place.page) misses -= first_[before].total();
      pages.push_back({place.page, misses, place.node});
      fast += place.node == 0;
    }
    std::stable_sort(pages.begin(), pages.end(), [](const Page& a, const Page& b) { return a.misses > b.misses; });
    std::vector<uint64_t> in, out;
    for (size_t i = 0; i < pages.size(); i++) {
      if (i < fast && pages[i].node == 1) in.push_back(pages[i].page);
      if (i >= fast && pages[i].node == 0) out.push_back(pages[i].page);
    }
    demoted_ += move(pid, out, 1);
    promoted_ += move(pid, in, 0);
  }

  static uint64_t move(pid_t pid, const std::vector<uint64_t>& list, int node) {
    if (list.empty()) return 0;
    std::vector<void*> pages;
    for (uint64_t page : list) pages.push_back(reinterpret_cast<void*>(page << 12));
    std::vector<int> nodes(pages.size(), node), status(pages.size(), -1);
    if (move_pages(pid, pages.size(), pages.data(), nodes.data(), status.data(), MPOL_MF_MOVE) < 0) die("move_pages failed");
    return static_cast<uint64_t>(std::count(status.begin(), status.end(), node));
  }

  int windows_ = 0;
  std::vector<PageMisses> first_;
  uint64_t promoted_ = 0, demoted_ = 0;
};

class HyperTier final : public System {
 public:
  explicit HyperTier(const SystemOptions& options) : options_(options) {
    policy_ = options.name.substr(0, options.name.find('@'));
    source_ = source_of(options.name);
    // What slow memory costs more is 170 ns beside 2e9 instructions a second in the
    // model of the report. The lab's clock, by which swaps are measured, counts 2 ns an
    // instruction, 4 times as much, and counts those of the other CPU as well: so in
    // its time slow memory costs 8 times as much.
    auto& settings = options_.settings;
    if (policy_ == "heattree" && std::none_of(settings.begin(), settings.end(), [](const std::string& s) { return s.starts_with("slow_extra_ns="); }))
      settings.push_back("slow_extra_ns=1360");
  }
  ~HyperTier() override { stop(); }

  void prepare() override {
    write_file(kNuma, "0");
    const std::string module = options_.build + "/bpf/kmod/hypertier.ko";
    if (e2e::run({"insmod", module}).status != 0) die("cannot load " + module, "build first: ./run build");
    start_tierd();
  }

  void sample_each(uint64_t period) override {
    stop();
    options_.period = period;
    start_tierd();
  }

  void start(Memory&, pid_t) override {
    std::vector<std::string> load = {"load", policy_, "--cgroup", options_.cgroup};
    for (const std::string& setting : options_.settings) load.insert(load.end(), {"--set", setting});
    e2e::tierctl(load);
  }

  json counters() override {
    json status = e2e::tierctl({"status", "--cgroup", options_.cgroup});
    json all = status.at("scopes").at(0).at("counters");
    all["s_of_fast_tier"] = status.value("s", json());
    all["dropped"] = status.value("dropped", json());
    all["move_failures"] = status.value("move_failures", json());
    all["mover_pages"] = status.value("mover_pages", json());
    all["ranges"] = status.at("scopes").at(0).value("ranges", json());
    all["source"] = status.value("source", json());
    all["sampling"] = status.value("sampling", json());
    return all;
  }

  json configuration() override {
    return {{"policy", policy_}, {"source", source_.empty() ? "chosen by tierd" : source_}, {"period", options_.period}, {"bursts", options_.bursts}, {"settings", options_.settings}};
  }

  void stop() override {
    if (pid_ <= 0) return;
    // What was decided in each epoch, and why: for who looks into a cell.
    const json said = e2e::tierctl({"events"});
    std::ofstream decided(options_.log + ".epochs");
    for (const json& event : said.at("events")) decided << "epoch " << event.at("epoch") << ": " << event.at("text").get<std::string>() << '\n';
    kill(pid_, SIGTERM);
    waitpid(std::exchange(pid_, -1), nullptr, 0);
  }

 private:
  void start_tierd() {
    std::vector<std::string> command = {"tierd", "--fresh", "--period", std::to_string(options_.period)};
    if (!source_.empty()) command.insert(command.end(), {"--source", source_});
    if (!options_.bursts) command.insert(command.end(), {"--burst", "1"});
    pid_ = fork();
    if (pid_ == 0) {
      set_mempolicy(MPOL_DEFAULT, nullptr, 0);  // not what the measuring keeps to
      cpu_set_t all;
      std::memset(&all, 0xff, sizeof all);
      sched_setaffinity(0, sizeof all, &all);
      int log = open(options_.log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
      dup2(log, STDOUT_FILENO);
      dup2(log, STDERR_FILENO);
      std::vector<char*> argv;
      for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
      argv.push_back(nullptr);
      execvp(argv[0], argv.data());
      _exit(127);
    }
    for (int i = 0; access("/run/hypertier/tierd.sock", F_OK) != 0; i++) {
      if (i == 200 || waitpid(pid_, nullptr, WNOHANG) > 0) die("tierd does not start: " + e2e::read_file(options_.log));
      usleep(50000);
    }
  }

  SystemOptions options_;
  std::string policy_, source_;
  pid_t pid_ = -1;
};

}  // namespace

std::unique_ptr<System> make_system(const SystemOptions& options) {
  if (options.name == "none") return std::make_unique<None>();
  if (options.name == "kernel") return std::make_unique<Kernel>(false);
  if (options.name == "kernel-tuned") return std::make_unique<Kernel>(true);
  if (options.name == "damon") return std::make_unique<Damon>(options.cgroup);
  if (options.name == "oracle") return std::make_unique<Oracle>();
  return std::make_unique<HyperTier>(options);
}

}  // namespace bench
