// SPDX-License-Identifier: GPL-2.0-or-later
#include "harness.hpp"

#include <fcntl.h>
#include <numaif.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace e2e {

void die(const std::string& message, const std::string& hint) {
  std::fflush(stdout);
  std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, message.c_str());
  if (!hint.empty()) std::fprintf(stderr, "HINT: %s\n", hint.c_str());
  std::_Exit(1);
}

namespace {

std::string joined(const std::vector<std::string>& command) {
  std::string text;
  for (const auto& word : command) text += (text.empty() ? "" : " ") + word;
  return text;
}

// The child's stdin and stdout become the given descriptors.
pid_t spawn(const std::vector<std::string>& command, int in, int out) {
  pid_t pid = fork();
  if (pid < 0) die("cannot start " + command[0] + ": " + strerror(errno));
  if (pid) return pid;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  dup2(in, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  std::vector<char*> argv;
  for (const auto& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  std::fprintf(stderr, "cannot run %s: %s\n", argv[0], strerror(errno));
  _exit(127);
}

int exit_status(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

Output run(const std::vector<std::string>& command) {
  int out[2];
  if (pipe2(out, O_CLOEXEC)) die(std::string("pipe: ") + strerror(errno));
  int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  pid_t pid = spawn(command, null, out[1]);
  close(null);
  close(out[1]);
  Output output;
  char chunk[65536];
  for (ssize_t got; (got = read(out[0], chunk, sizeof chunk)) > 0 || (got < 0 && errno == EINTR);)
    if (got > 0) output.out.append(chunk, static_cast<size_t>(got));
  close(out[0]);
  output.status = exit_status(pid);
  return output;
}

json run_json(const std::vector<std::string>& command) {
  Output output = run(command);
  if (output.status != 0) die("`" + joined(command) + "` failed with exit status " + std::to_string(output.status));
  json parsed = json::parse(output.out, nullptr, false);
  if (parsed.is_discarded()) die("`" + joined(command) + "` printed no JSON: " + output.out.substr(0, 200));
  return parsed;
}

Child::Child(const std::vector<std::string>& command) : name_(command[0]) {
  int in[2], out[2];
  if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) die(std::string("pipe: ") + strerror(errno));
  pid_ = spawn(command, in[0], out[1]);
  close(in[0]);
  close(out[1]);
  in_ = in[1];
  out_ = fdopen(out[0], "r");
}

Child::~Child() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    wait();
  }
  if (out_) fclose(out_);
}

void Child::send(const std::string& command) {
  std::string line = command + "\n";
  if (write(in_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
    die(name_ + " does not take commands any more (exit status " + std::to_string(wait()) + ")");
}

json Child::expect(const std::string& word) {
  char* line = nullptr;
  size_t size = 0;
  ssize_t got = getline(&line, &size, out_);
  std::string text(line ? line : "");
  free(line);
  if (got <= 0) die(name_ + " ended with exit status " + std::to_string(wait()) + " where it should have answered \"" + word + "\"");
  if (!text.starts_with(word + " ")) die(name_ + " answered \"" + text.substr(0, text.size() - 1) + "\" instead of \"" + word + "\"");
  return json::parse(text.substr(word.size() + 1));
}

void Child::skip_until(const std::string& part) {
  char* line = nullptr;
  size_t size = 0;
  bool found = false;
  while (!found && getline(&line, &size, out_) > 0) found = std::strstr(line, part.c_str()) != nullptr;
  free(line);
  if (!found) die(name_ + " ended with exit status " + std::to_string(wait()) + " before it said \"" + part + "\"");
}

int Child::wait() {
  if (in_ >= 0) close(in_);
  in_ = -1;
  if (pid_ <= 0) return -1;
  int status = exit_status(pid_);
  pid_ = -1;
  return status;
}

void Child::signal(int number) {
  if (pid_ > 0) kill(pid_, number);
}

namespace {
const std::string kRedisSocket = "/tmp/ht-redis.sock";

std::vector<std::string> redis_command() {
  return {"redis-server", "--port", "0", "--unixsocket", kRedisSocket, "--save", "", "--appendonly", "no", "--daemonize", "no"};
}
}  // namespace

std::vector<std::string> inside(const std::string& cgroup, const std::vector<std::string>& command) {
  if (cgroup.empty()) return command;
  const std::string dir = "/sys/fs/cgroup" + cgroup;
  std::filesystem::create_directories(dir);
  std::vector<std::string> wrapped = {"sh", "-c", "echo $$ >" + dir + "/cgroup.procs && exec \"$@\"", "sh"};
  wrapped.insert(wrapped.end(), command.begin(), command.end());
  return wrapped;
}

Redis::Redis(uint64_t seed, uint64_t keys, uint64_t value_bytes, const std::string& cgroup)
    : server(inside(cgroup, redis_command())),
      load((server.skip_until("ready to accept connections"), std::vector<std::string>{
          "kvload", "--socket", kRedisSocket, "--seed", std::to_string(seed), "--keys", std::to_string(keys), "--value",
          std::to_string(value_bytes)})) {
  load.expect("ready");
}

void Redis::stop() {
  json result = load.ask("stop", "stopped");
  if (load.wait() != 0) die("kvload got " + std::to_string(result.value("errors_total", 0)) + " wrong values from redis");
  server.signal(SIGTERM);
  server.wait();
}

static json whole_truth(const std::string& option, const std::string& value) {
  json answer = run_json({"labctl", "truth", option, value, "--json"});
  // A full table of page counts would make the answer a guess.
  if (answer.at("pages_lost_accesses") != 0) die("the lab lost page counts", "a larger table is needed in tests/lab");
  return answer;
}

Truth truth(pid_t pid) {
  const json answer = whole_truth("--pid", std::to_string(pid));
  return {answer.at("fast_accesses").get<uint64_t>(), answer.at("slow_accesses").get<uint64_t>()};
}

void truth_reset() { run_json({"labctl", "truth", "--reset", "--json"}); }

double best_ratio(pid_t pid, uint64_t fast_pages) {
  return run_json({"labctl", "truth", "--pid", std::to_string(pid), "--best", std::to_string(fast_pages * 4096), "--json"})
      .at("best_fast_hit_ratio");
}

void save_page_truth(const std::string& path) { whole_truth("--pages", path); }

std::vector<PageTruth> load_page_truth(const std::string& path) {
  std::vector<PageTruth> pages;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    PageTruth page;
    unsigned long long address, fast, slow;
    if (std::sscanf(line.c_str(), "%d\t%llx\t%llu\t%llu", &page.pid, &address, &fast, &slow) != 4) continue;  // the heading
    page.address = address;
    page.fast = fast;
    page.slow = slow;
    pages.push_back(page);
  }
  return pages;
}

void load_policy(const std::string& policy, const std::vector<std::string>& settings) {
  std::vector<std::string> load = {"load", policy};
  for (const std::string& setting : settings) load.insert(load.end(), {"--set", setting});
  tierctl(load);
}

std::optional<json> root_scope() {
  const json status = tierctl({"status"});
  for (const json& scope : status.at("scopes"))
    if (scope.at("cgroup") == "/") return scope;
  return std::nullopt;
}

Counters counters() {
  const auto scope = root_scope();
  if (!scope) return {};
  const json& c = scope->at("counters");
  return {c.at("epochs_total"),         c.at("samples_total"),        c.at("promoted_pages_total"),
          c.at("demoted_pages_total"),  c.at("exchanged_pairs_total"), c.at("move_failed_pages_total")};
}

std::map<std::string, uint64_t> vmstat() {
  std::map<std::string, uint64_t> all;
  std::istringstream text(read_file("/proc/vmstat"));
  std::string name;
  for (uint64_t value; text >> name >> value;) all[name] = value;
  return all;
}

double now_s() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

Tiers tiers() {
  Tiers tiers;
  std::istringstream meminfo(read_file("/sys/devices/system/node/node" + std::to_string(tiers.fast_node) + "/meminfo"));
  for (std::string line; std::getline(meminfo, line);) {
    char key[64];
    unsigned long long kib;
    if (std::sscanf(line.c_str(), "Node %*d %63[^:]: %llu kB", key, &kib) != 2) continue;
    if (std::string_view(key) == "MemTotal") tiers.fast_capacity_bytes = kib << 10;
    if (std::string_view(key) == "MemFree") tiers.fast_free_bytes = kib << 10;
  }
  if (!tiers.fast_capacity_bytes) die("node 0 tells no MemTotal");
  return tiers;
}

Placement placement(pid_t pid) {
  Placement placement;
  std::ifstream maps("/proc/" + std::to_string(pid) + "/numa_maps");
  if (!maps) die("there is no process " + std::to_string(pid));
  for (std::string line; std::getline(maps, line);) {
    if (line.find("anon=") == std::string::npos) continue;
    std::istringstream words(line);
    uint64_t page_kib = 4, fast = 0, slow = 0;
    for (std::string word; words >> word;) {
      if (word.starts_with("N0=")) fast = std::stoull(word.substr(3));
      if (word.starts_with("N1=")) slow = std::stoull(word.substr(3));
      if (word.starts_with("kernelpagesize_kB=")) page_kib = std::stoull(word.substr(18));
    }
    placement.fast_pages += fast * page_kib / 4;
    placement.slow_pages += slow * page_kib / 4;
  }
  return placement;
}

void tighten_reserve() {
  write_file("/proc/sys/vm/min_free_kbytes", "1024");
  write_file("/proc/sys/vm/watermark_boost_factor", "0");  // or it comes and goes with fragmentation
  write_file("/proc/sys/vm/drop_caches", "1");
}

std::vector<int> nodes_of(pid_t pid, const std::vector<uint64_t>& addresses) {
  std::vector<void*> pages;
  for (uint64_t address : addresses) pages.push_back(reinterpret_cast<void*>(address));
  std::vector<int> nodes(pages.size(), -1);
  if (!pages.empty() && move_pages(pid, pages.size(), pages.data(), nullptr, nodes.data(), 0))
    die("move_pages does not tell where the pages of process " + std::to_string(pid) + " are: " + strerror(errno));
  return nodes;
}

namespace {
const std::string kTracing = "/sys/kernel/tracing/";
constexpr const char *kFlushRange = "flush_tlb_mm_range", *kFlushBatch = "arch_tlbbatch_flush";
constexpr std::array<const char*, 2> kFlushFunctions = {kFlushRange, kFlushBatch};
std::string flush_event(const char* function) { return kTracing + "events/ht_flush/" + function + "/"; }

constexpr const char* kFlushTrace = "/sys/kernel/tracing/events/tlb/tlb_flush/";
constexpr const char* kTrigger = "hist:keys=common_pid.execname";
// Sent to other CPUs, or done here for one address space; not task switches.
constexpr const char* kTraceTrigger = "hist:keys=common_pid.execname if reason == 4 || reason == 3";

// "{ common_pid: tierd           [       123] } hitcount:         17"
uint64_t hits_of(const std::string& histogram, const std::string& comm) {
  uint64_t sum = 0;
  std::istringstream text(read_file(histogram));
  for (std::string line; std::getline(text, line);) {
    char name[64];
    unsigned long long hits;
    if (std::sscanf(line.c_str(), "{ common_pid: %63s [ %*d] } hitcount: %llu", name, &hits) == 2 && comm == name) sum += hits;
  }
  return sum;
}

void append_line(const std::string& path, const std::string& line) {
  int fd = open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  std::string text = line + "\n";
  bool ok = fd >= 0 && write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (!ok) die("cannot write \"" + line + "\" to " + path + ": " + strerror(errno));
  close(fd);
}
}  // namespace

FlushCounter::FlushCounter() {
  for (const char* function : kFlushFunctions) {
    if (access(flush_event(function).c_str(), F_OK) != 0)
      append_line(kTracing + "kprobe_events", std::string("p:ht_flush/") + function + " " + function);
    append_line(flush_event(function) + "trigger", kTrigger);
  }
  append_line(std::string(kFlushTrace) + "trigger", kTraceTrigger);
}

FlushCounter::~FlushCounter() {
  for (const char* function : kFlushFunctions) append_line(flush_event(function) + "trigger", std::string("!") + kTrigger);
  append_line(std::string(kFlushTrace) + "trigger", std::string("!") + kTraceTrigger);
}

FlushCounter::Count FlushCounter::by(const std::string& comm) {
  Count count;
  count.flushes = hits_of(std::string(kFlushTrace) + "hist", comm);
  count.batches = hits_of(flush_event(kFlushBatch) + "hist", comm);
  count.calls = count.batches + hits_of(flush_event(kFlushRange) + "hist", comm);
  return count;
}

std::map<std::string, FlushCounter::Count> FlushCounter::all() {
  std::map<std::string, Count> all;
  auto add = [&](const std::string& histogram, uint64_t Count::*counter) {
    std::istringstream text(read_file(histogram));
    for (std::string line; std::getline(text, line);) {
      char name[64];
      unsigned long long hits;
      if (std::sscanf(line.c_str(), "{ common_pid: %63s [ %*d] } hitcount: %llu", name, &hits) == 2) all[name].*counter += hits;
    }
  };
  add(flush_event(kFlushRange) + "hist", &Count::calls);
  add(flush_event(kFlushBatch) + "hist", &Count::batches);
  for (auto& [name, count] : all) count.calls += count.batches;
  add(std::string(kFlushTrace) + "hist", &Count::flushes);
  return all;
}

void write_file(const std::string& path, const std::string& text) {
  int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  bool ok = fd >= 0 && write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (!ok) die("cannot write " + text + " to " + path + ": " + strerror(errno));
  close(fd);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace e2e
