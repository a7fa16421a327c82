// SPDX-License-Identifier: GPL-2.0-or-later
#include "sources/probe.hpp"

#include <emmintrin.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace hypertier {
namespace {

constexpr std::size_t kBufferBytes = 32UL << 20;
constexpr std::size_t kTouches = 400'000;
constexpr std::uint64_t kProbeSamplesMin = 50;
constexpr double kInsideShareMin = 0.90;
constexpr std::size_t kRingPages = 64;  // a power of two

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

class Mapping {
 public:
  Mapping(std::size_t bytes, int flags, int fd)
      : bytes_(bytes), data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0)) {}
  ~Mapping() {
    if (ok()) munmap(data_, bytes_);
  }
  Mapping(Mapping&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, MAP_FAILED)) {}
  Mapping(const Mapping&) = delete;
  bool ok() const { return data_ != MAP_FAILED; }
  char* data() const { return static_cast<char*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  void* data_;
};

// A sample interrupts for about a microsecond; what is measured far from that is
// noise of the machine.
constexpr std::uint64_t kSampleNsMin = 200, kSampleNsMax = 20'000;

std::uint64_t thread_cpu_ns() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000ULL + static_cast<std::uint64_t>(now.tv_nsec);
}

// Loads (and a store each, for store events) over the buffer in an order that
// no prefetcher follows. The flush makes each one a miss on real hardware.
void touch(char* buffer) {
  std::uint64_t state = 1;
  for (std::size_t i = 0; i < kTouches; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    volatile char* byte = buffer + (state >> 33) % kBufferBytes;
    _mm_clflush(const_cast<const char*>(byte));
    *byte = *byte + 1;
  }
}

void read_ring(const Mapping& ring, const char* buffer, ProbeCounts& counts) {
  auto* page = reinterpret_cast<perf_event_mmap_page*>(ring.data());
  const char* data = ring.data() + page->data_offset;
  std::uint64_t head = std::atomic_ref(page->data_head).load(std::memory_order_acquire);
  // our sample_type puts the address right behind the header; records are 8-byte
  // aligned, so that none of the words below wraps
  auto word = [&](std::uint64_t at) {
    std::uint64_t value;
    std::memcpy(&value, data + at % page->data_size, sizeof(value));
    return value;
  };
  for (std::uint64_t at = page->data_tail; at < head;) {
    std::uint64_t header_word = word(at);
    perf_event_header header;
    std::memcpy(&header, &header_word, sizeof(header));
    if (header.type == PERF_RECORD_SAMPLE) {
      std::uint64_t address = word(at + sizeof(header));
      auto start = reinterpret_cast<std::uintptr_t>(buffer);
      counts.records++;
      counts.with_address += address != 0;
      counts.inside += address >= start && address < start + kBufferBytes;
    }
    at += header.size;
  }
}

// Keeps the thread on one CPU that has the PMU, then lets it go again.
class Pin {
 public:
  explicit Pin(int cpu) {
    saved_ok_ = sched_getaffinity(0, sizeof(saved_), &saved_) == 0;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pinned_ = sched_setaffinity(0, sizeof(one), &one) == 0;
  }
  ~Pin() {
    if (saved_ok_ && pinned_) sched_setaffinity(0, sizeof(saved_), &saved_);
  }
  Pin(const Pin&) = delete;

 private:
  cpu_set_t saved_;
  bool saved_ok_ = false;
  bool pinned_ = false;
};

}  // namespace

void warm_events(const Roots& roots) {
  const auto cpus = read_list(roots.sys / "devices/system/cpu/online");
  if (!cpus) return;
  perf_event_attr attr{};
  attr.size = sizeof(attr);
  attr.type = PERF_TYPE_SOFTWARE;
  attr.config = PERF_COUNT_SW_DUMMY;
  attr.disabled = 1;
  for (const int cpu : *cpus) {
    const Pin pin(cpu);
    const Descriptor event(static_cast<int>(syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC)));
  }
}

Result<OpenEvent> open_event(const SourceEvent& event, int pid, int cpu) {
  auto open_attr = [&](perf_event_attr attr, int group) {
    return static_cast<int>(syscall(SYS_perf_event_open, &attr, pid, cpu, group, PERF_FLAG_FD_CLOEXEC));
  };
  auto refused = [&](int err) {
    std::string what =
        "cannot open the event " + event.name + (cpu >= 0 ? " on CPU " + std::to_string(cpu) : "");
    switch (err) {
      case EACCES:
      case EPERM:
        return fail_errno(what, err, "run as root, and see kernel.perf_event_paranoid and lockdown");
      case EBUSY:
        return fail_errno(what, err, "another user holds the PMU: stop it, or set kernel.nmi_watchdog=0");
      case ENOENT:
      case EOPNOTSUPP:
        return fail_errno(what, err, "the CPU or its hypervisor does not provide it");
      case EMFILE:
        return fail_errno(what, err, "raise the limit of open files (ulimit -n)");
      default:
        return fail_errno(what, err);
    }
  };
  OpenEvent open;
  if (event.leader) {
    open.leader_fd = open_attr(*event.leader, -1);
    if (open.leader_fd < 0) return refused(errno);
  }
  open.fd = open_attr(event.attr, open.leader_fd);
  if (open.fd < 0) {
    int err = errno;
    if (open.leader_fd >= 0) close(open.leader_fd);
    return refused(err);
  }
  return open;
}

Result<ProbeCounts> take_probe(const std::vector<SourceEvent>& events) {
  auto cpus = read_list(events.front().cpu_list);
  if (!cpus) return std::unexpected(cpus.error());
  if (cpus->empty()) return fail("no online CPU has the event " + events.front().name);

  Mapping buffer(kBufferBytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  if (!buffer.ok()) return fail_errno("cannot map a probe buffer of 32 MiB", errno);
  std::memset(buffer.data(), 1, kBufferBytes);

  Pin pin(cpus->front());
  std::vector<Descriptor> descriptors;
  std::vector<Mapping> rings;
  std::size_t ring_bytes = (1 + kRingPages) * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const auto& event : events) {
    auto open = open_event(event, 0, -1);
    if (!open) return std::unexpected(open.error());
    if (open->leader_fd >= 0) descriptors.emplace_back(open->leader_fd);
    descriptors.emplace_back(open->fd);
    rings.emplace_back(ring_bytes, MAP_SHARED, open->fd);
    if (!rings.back().ok())
      return fail_errno("cannot map the ring of the event " + event.name, errno,
                        "see kernel.perf_event_mlock_kb");
  }
  const std::uint64_t begin = thread_cpu_ns();
  touch(buffer.data());
  const std::uint64_t unsampled_ns = thread_cpu_ns() - begin;
  for (const auto& descriptor : descriptors)
    if (ioctl(descriptor.get(), PERF_EVENT_IOC_ENABLE, 0) < 0)
      return fail_errno("cannot enable the event " + events.front().name, errno);
  const std::uint64_t enabled = thread_cpu_ns();
  touch(buffer.data());
  const std::uint64_t sampled_ns = thread_cpu_ns() - enabled;
  for (const auto& descriptor : descriptors) ioctl(descriptor.get(), PERF_EVENT_IOC_DISABLE, 0);

  ProbeCounts counts;
  for (const auto& ring : rings) read_ring(ring, buffer.data(), counts);
  if (counts.records)
    counts.sample_ns = std::clamp(sampled_ns > unsampled_ns ? (sampled_ns - unsampled_ns) / counts.records : 0,
                                  kSampleNsMin, kSampleNsMax);
  return counts;
}

Result<ProbeResult> judge_probe(const ProbeCounts& counts, bool guest) {
  std::string records = std::to_string(counts.records);
  if (counts.records < kProbeSamplesMin)
    return fail(
        "the event opens but delivers almost nothing (" + records + " samples, " +
            std::to_string(kProbeSamplesMin) + " expected)",
        guest ? "the hypervisor does not count this event for its guests" : "see dmesg for throttling");
  if (counts.with_address * 10 < counts.records)
    return fail("samples arrive (" + records + ") but carry no addresses",
                guest ? "the host's KVM hides what PEBS needs for them (baseline, load-latency MSR): "
                        "run on bare metal, or on a host that exposes both; abit works without"
                      : "the event does not record data addresses on this CPU");
  if (counts.inside < kInsideShareMin * counts.with_address)
    return fail("only " + std::to_string(counts.inside) + " of " + std::to_string(counts.with_address) +
                    " addresses fall inside the buffer that was touched (90 % must)",
                "the addresses of this PMU cannot be trusted");
  return ProbeResult{counts.with_address, counts.inside, counts.sample_ns};
}

namespace {

// The real settings, except that a probe wants its samples at once.
SourceSettings probe_settings(SourceSettings settings, std::uint64_t period) {
  settings.period = period;
  if (settings.store_period) settings.store_period = period;
  return settings;
}

}  // namespace

Result<ChosenSource> probe_source(const Source& source, const SourceSettings& settings, const Roots& roots) {
  bool guest = is_guest(roots);
  auto tried = source.events(probe_settings(settings, source.probe_period()));
  if (!tried) return std::unexpected(tried.error());
  if (!source.samples())
    return ChosenSource{.name = std::string(source.name()),
                        .description = source.describe(settings),
                        .period = source.period(settings),
                        .own_period = source.period({}),
                        .holds_budget = source.holds_budget(),
                        .bits = true,
                        .events = {},
                        .probe = {}};
  auto real = source.events(settings);
  if (!real) return std::unexpected(real.error());
  Error reason;
  for (std::size_t way = 0; way < tried->size(); ++way) {
    auto counts = take_probe((*tried)[way]);
    auto result = counts ? judge_probe(*counts, guest) : std::unexpected(counts.error());
    if (!result) {
      // the first way is the best one: why it fails is what the user wants to know
      if (way == 0) reason = result.error();
      continue;
    }
    std::string names;
    for (const auto& event : (*real)[way]) names += (names.empty() ? "" : " + ") + event.name;
    return ChosenSource{.name = std::string(source.name()),
                        .description = source.describe(settings) + " (" + names + ")",
                        .period = source.period(settings),
                        .own_period = source.period({}),
                        .holds_budget = source.holds_budget(),
                        .bits = false,
                        .events = (*real)[way],
                        .probe = *result};
  }
  return std::unexpected(reason);
}

namespace {

// The first that works, or that one; sampling: which delivers samples.
Result<ChosenSource> first_source(const SourceSettings& settings, std::string_view only, bool sampling, const Roots& roots) {
  std::string refused, names, hint;
  for (const auto& source : make_sources(roots)) {
    if (sampling && !source->samples()) continue;
    names += (names.empty() ? "" : ", ") + std::string(source->name());
    if (!only.empty() && source->name() != only) continue;
    auto chosen = probe_source(*source, settings, roots);
    if (chosen) return chosen;
    refused += (refused.empty() ? "" : "; ") + std::string(source->name()) + ": " + chosen.error().message;
    if (!chosen.error().hint.empty())
      hint += (hint.empty() ? "" : "; ") + std::string(source->name()) + ": " + chosen.error().hint;
  }
  if (refused.empty() && sampling)
    return fail("there is no source of samples \"" + std::string(only) + "\"", "these are: " + names + ", or best for the first that works");
  if (refused.empty())
    return fail("there is no source \"" + std::string(only) + "\"", "sources are: " + names + ", and one that samples with +abit");
  return fail("no source of samples works here (" + refused + ")", hint);
}

}  // namespace

Result<ChosenSource> choose_source(const SourceSettings& settings, std::string_view only,
                                   const Roots& roots) {
  constexpr std::string_view kBeside = "+abit";
  if (!only.ends_with(kBeside)) return first_source(settings, only, false, roots);
  only.remove_suffix(kBeside.size());
  auto chosen = first_source(settings, only == "best" ? "" : only, true, roots);
  if (!chosen) return chosen;
  auto bits = first_source(settings, "abit", false, roots);
  if (!bits) return bits;
  chosen->name += kBeside;
  chosen->description += ", and " + bits->description;
  chosen->bits = true;
  return chosen;
}

std::vector<SourceReport> diagnose_sources(const SourceSettings& settings, const Roots& roots) {
  std::vector<SourceReport> reports;
  for (const auto& source : make_sources(roots)) {
    auto chosen = probe_source(*source, settings, roots);
    SourceReport report{
        .name = std::string(source->name()), .works = chosen.has_value(), .text = {}, .hint = {}};
    if (chosen) {
      report.text = chosen->description;
      if (source->samples())
        report.text += ": " + std::to_string(chosen->probe.inside) + " of " + std::to_string(chosen->probe.samples) +
                       " probed addresses right";
    } else {
      report.text = chosen.error().message;
      report.hint = chosen.error().hint;
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

}  // namespace hypertier
