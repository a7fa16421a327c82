// SPDX-License-Identifier: GPL-2.0-or-later
#include "harness.hpp"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <numaif.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace hypertier::test {

std::string build_dir;
std::uint64_t moves_wanted = 100000;

namespace {
[[noreturn]] void die(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}
}  // namespace

int load_module(const std::string& path) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  int err = syscall(SYS_finit_module, fd, "", 0) ? errno : 0;
  close(fd);
  return err;
}

int unload_module() { return syscall(SYS_delete_module, "hypertier", O_NONBLOCK) ? errno : 0; }

Device::Device() : fd_(open(HT_DEVICE, O_RDWR | O_CLOEXEC)) {
  if (fd_ < 0) die(HT_DEVICE);
  ht_tiers tiers{{1 << kFastNode, 1 << kSlowNode}};
  if (ioctl(fd_, HT_IOC_TIERS, &tiers)) die("HT_IOC_TIERS");
}
Device::~Device() { close(fd_); }

ht_module_info Device::info() const {
  ht_module_info info{};
  if (ioctl(fd_, HT_IOC_INFO, &info)) die("HT_IOC_INFO");
  return info;
}

ht_seat Device::seat(std::uint64_t cgroup_id) const {
  ht_seat seat{};
  seat.cgroup_id = cgroup_id;
  if (ioctl(fd_, HT_IOC_SEAT, &seat)) die("HT_IOC_SEAT");
  return seat;
}

int Device::eject(std::uint64_t cgroup_id, std::uint64_t generation, std::uint32_t code) const {
  ht_seat seat{};
  seat.cgroup_id = cgroup_id;
  seat.generation = generation;
  seat.exit.code = code;
  std::strcpy(seat.exit.message, "a test's reason");
  return ioctl(fd_, HT_IOC_EJECT, &seat) ? errno : 0;
}

Mover::Mover() : object_(bpf_object__open_file((build_dir + "/bpf/parts/mover.bpf.o").c_str(), nullptr)) {
  if (!object_) die("mover.bpf.o");
  if (bpf_object__load(object_)) die("loading mover.bpf.o");
  bpf_map* map;
  bpf_object__for_each_map(map, object_) {
    if (!(bpf_map__map_flags(map) & BPF_F_MMAPABLE) || bpf_map__is_internal(map)) continue;
    void* value = mmap(nullptr, (bpf_map__value_size(map) + kPage - 1) & ~(kPage - 1),
                       PROT_READ | PROT_WRITE, MAP_SHARED, bpf_map__fd(map), 0);
    if (value == MAP_FAILED) die(bpf_map__name(map));
    values_[bpf_map__name(map)] = value;
  }
  LIBBPF_OPTS(bpf_map_create_opts, options, .map_flags = BPF_F_MMAPABLE);
  int fd = bpf_map_create(BPF_MAP_TYPE_ARRAY, "call", sizeof(__u32), sizeof(ht_call), 1, &options);
  __u32 number = 0;
  if (fd < 0 || bpf_map_update_elem(bpf_map__fd(bpf_object__find_map_by_name(object_, "calls")), &number, &fd, BPF_ANY))
    die("a scope's map");
  void* call = mmap(nullptr, (sizeof(ht_call) + kPage - 1) & ~(kPage - 1), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (call == MAP_FAILED) die("a scope's map");
  close(fd);
  call_ = static_cast<ht_call*>(call);
  bpf_program* program;
  bpf_object__for_each_program(program, object_) programs_[bpf_program__name(program)] = bpf_program__fd(program);
}

Mover::~Mover() {
  munmap(call_, (sizeof(ht_call) + kPage - 1) & ~(kPage - 1));
  bpf_map* map;
  bpf_object__for_each_map(map, object_) {
    auto value = values_.find(bpf_map__name(map));
    if (value != values_.end()) munmap(value->second, (bpf_map__value_size(map) + kPage - 1) & ~(kPage - 1));
  }
  bpf_object__close(object_);
}

int Mover::call(const char* program) {
  ht_call_number at{0};
  LIBBPF_OPTS(bpf_test_run_opts, options);
  if (std::string(program) == "classify" || std::string(program) == "admit" || std::string(program) == "moved") {
    options.ctx_in = &at;
    options.ctx_size_in = sizeof(at);
  }
  if (bpf_prog_test_run_opts(programs_.at(program), &options)) die(program);
  return static_cast<int>(options.retval);
}

std::uint64_t Mover::space_of(int pid) {
  auto& run = spaces();
  run.nr = 1;
  run.req[0] = {};
  run.req[0].pid = pid;
  run.req[0].seq = 0;
  if (call("spaces_run")) return 0;
  return run.req[0].error == -ESRCH ? 0 : run.req[0].space;
}

std::vector<ht_page_t> Mover::walk(int pid, const void* start, std::size_t bytes, std::uint32_t list_tier,
                                   ht_walk* result) {
  std::uint64_t space = space_of(pid);
  auto& run = walks();
  run.nr = 1;
  run.walk[0] = {};
  run.walk[0].space = space;
  run.walk[0].pid = pid;
  run.walk[0].start = reinterpret_cast<std::uint64_t>(start);
  run.walk[0].end = run.walk[0].start + bytes;
  run.walk[0].list_tier = list_tier;
  if (call("walk")) throw std::runtime_error("walk refused");
  if (result) *result = run.walk[0];
  return {pages() + run.walk[0].list_first, pages() + run.walk[0].list_first + run.walk[0].list_count};
}

ht_exchange_run Mover::move(int hot_pid, const std::vector<ht_page_t>& hot, int cold_pid,
                            const std::vector<ht_page_t>& cold, std::uint32_t flags) {
  std::uint64_t hot_space = hot.empty() ? 0 : space_of(hot_pid), cold_space = cold.empty() ? 0 : space_of(cold_pid);
  std::size_t nr = hot.empty() ? cold.size() : cold.empty() ? hot.size() : std::min(hot.size(), cold.size());
  nr = std::min<std::size_t>(nr, HT_PAIRS_MAX);
  for (std::size_t i = 0; i < nr; i++) {
    ht_pair pair{};
    if (!hot.empty()) pair = {.hot_space = hot_space, .hot_addr = HT_PAGE_ADDR(hot[i])};
    if (!cold.empty()) pair.cold_space = cold_space, pair.cold_addr = HT_PAGE_ADDR(cold[i]);
    pair.hot_pid = hot_pid;
    pair.cold_pid = cold_pid;
    pair.user = static_cast<std::uint32_t>(i);
    pairs()[i] = pair;
  }
  exchange() = {};
  exchange().nr = static_cast<std::uint32_t>(nr);
  exchange().flags = flags;
  if (int err = call("exchange_run")) throw std::runtime_error("exchange refused: " + std::to_string(err));
  return exchange();
}

namespace {
std::unique_ptr<Mover> the_mover;
}

Mover& mover() {
  if (!the_mover) the_mover = std::make_unique<Mover>();
  return *the_mover;
}
void drop_mover() { the_mover.reset(); }

void place(void* start, std::size_t bytes, int node) {
  unsigned long mask = 1ul << node;
  if (mbind(start, bytes, MPOL_BIND, &mask, 64, 0)) die("mbind");
}

Memory::Memory(std::size_t bytes, int node, bool huge, int flags) : bytes_(bytes) {
  // aligned to 2 MiB, so that huge pages fit
  char* raw = static_cast<char*>(mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0));
  if (raw == MAP_FAILED) die("mmap");
  data_ = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(raw) + kHuge - 1) & ~(kHuge - 1));
  if (data_ > raw) munmap(raw, data_ - raw);
  if (raw + kHuge > data_) munmap(data_ + bytes, raw + kHuge - data_);
  madvise(data_, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  place(data_, bytes, node);
  for (std::size_t i = 0; i < bytes; i += kPage) data_[i] = 1;
  // from now on the pages may be anywhere
  if (mbind(data_, bytes, MPOL_DEFAULT, nullptr, 0, 0)) die("mbind");
}
Memory::~Memory() { munmap(data_, bytes_); }

std::size_t Memory::pages_on(int node) const {
  std::vector<void*> addresses;
  for (std::size_t i = 0; i < bytes_; i += kPage) addresses.push_back(data_ + i);
  std::vector<int> nodes(addresses.size());
  if (move_pages(0, addresses.size(), addresses.data(), nullptr, nodes.data(), 0)) die("move_pages");
  return std::count(nodes.begin(), nodes.end(), node);
}

void write_file(const std::string& path, const std::string& value) {
  int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd < 0) die(path);
  ssize_t written = write(fd, value.data(), value.size());
  int saved = errno;
  close(fd);
  errno = saved;
  if (written != static_cast<ssize_t>(value.size())) die(path);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::uint64_t field(const std::string& text, const std::string& name) {
  std::istringstream lines(text);
  std::string key;
  std::uint64_t value;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    if (words >> key >> value && key == name) return value;
  }
  throw std::runtime_error("no field " + name);
}

std::uint64_t vmstat(const std::string& name) {
  write_file("/proc/sys/vm/stat_refresh", "1");
  return field(read_file("/proc/vmstat"), name);
}

std::uint64_t pagemap(int pid, const void* address) {
  std::string path = "/proc/" + std::to_string(pid) + "/pagemap";
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) die(path);
  std::uint64_t entry = 0;
  if (pread(fd, &entry, 8, reinterpret_cast<std::uint64_t>(address) / kPage * 8) != 8) die(path);
  close(fd);
  return entry;
}

std::uint64_t pfn(const void* address) { return pagemap(getpid(), address) & ((1ull << 55) - 1); }

}  // namespace hypertier::test
