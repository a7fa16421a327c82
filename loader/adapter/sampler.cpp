// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/sampler.hpp"

#include <linux/membarrier.h>
#include <linux/netlink.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstring>

#include "guest.skel.h"

namespace hypertier {
namespace {

template <class T>
T load(T& shared) {
  return std::atomic_ref(shared).load(std::memory_order_acquire);
}

template <class T>
void store(T& shared, T value) {
  std::atomic_ref(shared).store(value, std::memory_order_release);
}

// Waits until every sampler that may have started before has ended, where the
// module is not there to do it. GLOBAL is
// synchronize_rcu(): perf runs its BPF programs under rcu_read_lock(), and from
// NMI, interrupt or with preemption off besides, all of which a grace period
// waits for. With one CPU the kernel skips the wait, rightly: whoever runs this
// line has interrupted no sampler. Its full barrier orders our store of
// `active` before every later sampler's load.
Result<> grace_period() {
  if (syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) < 0)
    return fail_errno("cannot wait for the samplers of the last epoch", errno);
  return {};
}

// HT_HINT() of bpf/sampler.h.
__u32 hint_of(const ht_granule_key& key) {
  return static_cast<__u32>(key.granule) + static_cast<__u32>(key.space) * 0x9e3779b1U;
}

}  // namespace

Result<std::unique_ptr<Sampler>> Sampler::open(Programs programs, std::function<Result<>()> settle) {
  long commands = settle ? 0 : syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
  if (!settle && (commands < 0 || !(commands & MEMBARRIER_CMD_GLOBAL)))
    return fail("this kernel has no membarrier(MEMBARRIER_CMD_GLOBAL)", "boot without nohz_full");

  auto& maps = programs->maps;
  const std::uint32_t capacity = bpf_map__max_entries(maps.ht_index);
  std::unique_ptr<Sampler> sampler(new Sampler(programs, capacity, settle ? std::move(settle) : grace_period));
  for (auto [mapped, map] :
       {std::pair(&sampler->granules_, maps.ht_granules), std::pair(&sampler->changed_, maps.ht_changed),
        std::pair(&sampler->free_, maps.ht_free)}) {
    auto result = MappedMap::map(map);
    if (!result) return std::unexpected(result.error());
    *mapped = std::move(*result);
  }
  auto* control = &sampler->control();
  control->capacity = capacity;
  // slot 0 stays out: it is what a hint says that knows of none
  for (std::uint32_t slot = 1; slot < capacity; ++slot) sampler->free_.as<__u64>()[slot - 1] = slot;
  store<__u64>(control->free_tail, capacity - 1);
  auto* entries = sampler->granules_.as<ht_granule>();
  for (std::uint32_t entry = 0; entry < 2 * capacity; ++entry) entries[entry].entry = entry;
  // and holds a key that no sample has
  for (int set : {0, 1}) entries[set].granule = ~0ULL;
  return sampler;
}

ht_control& Sampler::control() const { return programs_->data_control->ht_control; }

Result<Sampler::Attached> Sampler::attach(const SourceEvent& event, int cpu) {
  SourceEvent scaled_event = event;
  scaled_event.attr.sample_period = scaled(event.attr.sample_period);
  auto open = open_event(scaled_event, -1, cpu);
  if (!open) return std::unexpected(open.error());
  Attached attached;
  attached.leader = Fd(open->leader_fd);
  attached.fd = open->fd;
  attached.period = event.attr.sample_period;
  LibbpfMessages messages;
  // enables the event as well, and owns its descriptor from here on
  attached.link = bpf_program__attach_perf_event(programs_->progs.ht_sample, open->fd);
  if (!attached.link) {
    int err = errno;
    close(open->fd);
    return messages.fail(
        "cannot attach the sampler to the event " + event.name + " on CPU " + std::to_string(cpu), err);
  }
  if (attached.leader && ioctl(attached.leader.get(), PERF_EVENT_IOC_ENABLE, 0) < 0)
    return fail_errno(
        "cannot enable the leader of the event " + event.name + " on CPU " + std::to_string(cpu), errno);
  return attached;
}

// Events on the CPUs that have none yet. all_or_error: the first failure ends
// it; else such a CPU is left out, and tried again when CPUs change.
Result<> Sampler::attach_new_cpus(bool all_or_error) {
  std::map<int, std::vector<const SourceEvent*>> wanted;
  for (const auto& event : events_) {
    auto cpus = read_list(event.cpu_list);
    if (!cpus) return std::unexpected(cpus.error());
    for (int cpu : *cpus) wanted[cpu].push_back(&event);
  }
  for (const auto& [cpu, events] : wanted) {
    if (cpus_.contains(cpu)) continue;
    std::vector<Attached> attached;
    for (const auto* event : events) {
      auto result = attach(*event, cpu);
      if (!result && all_or_error) return std::unexpected(result.error());
      if (!result) break;
      attached.push_back(std::move(*result));
    }
    if (attached.size() == events.size()) cpus_.emplace(cpu, std::move(attached));
  }
  return {};
}

Result<> Sampler::start(const ChosenSource& source) {
  if (running_) return fail("the sampler runs already");
  // Before the CPUs are listed, so that no change is missed. Without the news
  // (a network namespace) a CPU that comes later is not sampled.
  uevents_ = Fd(socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT));
  sockaddr_nl kernel{};
  kernel.nl_family = AF_NETLINK;
  kernel.nl_groups = 1;
  if (uevents_ && bind(uevents_.get(), reinterpret_cast<sockaddr*>(&kernel), sizeof(kernel)) < 0)
    uevents_.reset();

  events_ = source.events;
  own_period_ = period_ = std::max<std::uint64_t>(1, source.period);
  if (auto attached = attach_new_cpus(true); !attached) {
    cpus_.clear();
    return attached;
  }
  run_time_ = Fd(bpf_enable_stats(BPF_STATS_RUN_TIME));
  store<__u32>(control().enabled, 1);
  running_ = true;
  return {};
}

Result<> Sampler::set_period(std::uint64_t period) {
  period_ = std::max<std::uint64_t>(1, period);
  for (const auto& [cpu, events] : cpus_)
    for (const auto& attached : events) {
      std::uint64_t wanted = scaled(attached.period);
      if (ioctl(attached.fd, PERF_EVENT_IOC_PERIOD, &wanted) < 0)
        return fail_errno("cannot change the sampling period on CPU " + std::to_string(cpu), errno);
    }
  return {};
}

void Sampler::stop() {
  if (!running_) return;
  running_ = false;
  store<__u32>(control().enabled, 0);
  cpus_.clear();
  uevents_.reset();
  run_time_.reset();
  // the first drain finds the last granules, the others carry a slot back to the
  // ring; nothing is left for the next start
  for (int drains = 0; drains < 5; ++drains) {
    slots_.forget_all();
    (void)drain([](const ht_granule&) {});
  }
}

// An event dies with its CPU and does not come back with it.
void Sampler::follow_hotplug() {
  if (!uevents_) return;
  constexpr std::string_view kOnline = "online@", kOffline = "offline@", kCpu = "/devices/system/cpu/cpu";
  bool changed = false;
  char message[4096];
  for (;;) {
    ssize_t length = recv(uevents_.get(), message, sizeof(message) - 1, 0);
    if (length < 0 && errno == ENOBUFS) {
      changed = true;
      continue;
    }
    if (length <= 0) break;
    message[length] = 0;
    std::string_view text(message);  // up to the first NUL: "offline@/devices/system/cpu/cpu1"
    bool offline = text.starts_with(kOffline);
    if (!offline && !text.starts_with(kOnline)) continue;
    text.remove_prefix(offline ? kOffline.size() : kOnline.size());
    if (!text.starts_with(kCpu)) continue;
    text.remove_prefix(kCpu.size());
    int cpu = -1;
    if (std::from_chars(text.data(), text.data() + text.size(), cpu).ec != std::errc()) continue;
    if (offline) cpus_.erase(cpu);
    changed = true;
  }
  if (changed) (void)attach_new_cpus(false);
}

Result<> Sampler::delete_keys(const std::vector<Slots::Leaving>& leaving) {
  std::vector<ht_granule_key> keys;
  for (const auto& gone : leaving) keys.push_back(gone.key);
  int index = bpf_map__fd(programs_->maps.ht_index);
  // a batch stops at a key that is not there; that one is gone as wanted
  for (std::size_t at = 0; at < keys.size();) {
    __u32 count = static_cast<__u32>(keys.size() - at);
    int err = bpf_map_delete_batch(index, &keys[at], &count, nullptr);
    if (err < 0 && err != -ENOENT) return fail_errno("cannot delete granules from ht_index", -err);
    at += count + (err < 0 ? 1 : 0);
  }
  return {};
}

void Sampler::clear_hints(const std::vector<Slots::Leaving>& leaving) {
  auto* hints = programs_->data_hints->ht_hints;
  for (const auto& gone : leaving) {
    __u32& hint = hints[hint_of(gone.key) & programs_->rodata->ht_hint_mask];
    __u32 expected = gone.slot;
    std::atomic_ref(hint).compare_exchange_strong(expected, 0);
  }
}

Result<> Sampler::drain(const std::function<void(const ht_granule&)>& fold) {
  follow_hotplug();
  auto leaving = slots_.begin_drain();
  if (auto deleted = delete_keys(leaving); !deleted) return deleted;
  clear_hints(leaving);

  auto* control = &this->control();
  __u32 set = load(control->active);
  store(control->active, set ^ 1);
  if (auto settled = settle_(); !settled) {
    store(control->active, set);
    return settled;
  }
  clear_hints(leaving);

  auto* granules = granules_.as<ht_granule>();
  const auto* changed = changed_.as<__u64>();
  __u32 count = std::min(load(control->changed[set]), control->capacity);
  for (__u32 i = 0; i < count; ++i) {
    auto slot = static_cast<__u32>(changed[2 * i + set] & (control->capacity - 1));
    ht_granule& granule = granules[2 * slot + set];
    slots_.seen(slot, granule.space, granule.granule);
    fold(granule);
    counted_total_ += granule.samples;
    granule.samples = 0;
    granule.stores = 0;
    std::memset(granule.pages, 0, sizeof(granule.pages));
  }
  store<__u32>(control->changed[set], 0);

  __u64 tail = control->free_tail;
  for (__u32 slot : slots_.end_drain()) free_.as<__u64>()[tail++ & (control->capacity - 1)] = slot;
  store(control->free_tail, tail);
  return {};
}

ht_sampler_stats Sampler::stats() {
  ht_sampler_stats sum{};
  std::vector<std::array<__u64, HT_DROPS>> cpus(libbpf_num_possible_cpus());
  __u32 key = 0;
  if (bpf_map_lookup_elem(bpf_map__fd(programs_->maps.ht_drops), &key, cpus.data()) < 0) return sum;
  sum.samples_total = counted_total_;
  for (const auto& dropped : cpus) {
    for (int reason = 0; reason < HT_DROPS; ++reason) {
      sum.dropped_total[reason] += dropped[reason];
      sum.samples_total += dropped[reason];
    }
  }
  return sum;
}

SamplerCost Sampler::cost() const {
  bpf_prog_info info{};
  __u32 length = sizeof(info);
  if (bpf_prog_get_info_by_fd(bpf_program__fd(programs_->progs.ht_sample), &info, &length) < 0) return {};
  return {info.run_time_ns, info.run_cnt};
}

GranuleUse Sampler::granules() const {
  auto* control = &this->control();
  __u32 slots = control->capacity - 1;  // slot 0 is none
  return {static_cast<std::uint32_t>(slots - (load(control->free_tail) - load(control->free_head))), slots};
}

Result<> Sampler::pin(const std::filesystem::path& dir) {
  auto& maps = programs_->maps;
  for (auto [name, map] : {std::pair("ht_control", maps.data_control), std::pair("ht_hints", maps.data_hints),
                           std::pair("ht_index", maps.ht_index), std::pair("ht_granules", maps.ht_granules),
                           std::pair("ht_changed", maps.ht_changed), std::pair("ht_free", maps.ht_free),
                           std::pair("ht_drops", maps.ht_drops)}) {
    if (auto pinned = hypertier::pin(bpf_map__fd(map), dir / name); !pinned) return pinned;
  }
  return {};
}

}  // namespace hypertier
