// SPDX-License-Identifier: GPL-2.0-or-later
#include "spaces.hpp"

#include <algorithm>
#include <cerrno>

namespace hypertier {

void Spaces::event(const ht_space_event& event) {
  if (event.kind == HT_SPACE_EXIT) {
    auto process = processes_.find(event.pid);
    if (process == processes_.end()) return;
    leave(event.pid, process->second.space);
    processes_.erase(process);
    return;
  }
  Process& process = processes_[event.pid];
  process.cgroup_id = event.cgroup_id;
  process.comm.assign(event.comm, strnlen(event.comm, sizeof(event.comm)));
  if (event.space)
    bind(event.pid, event.space);
  else
    unplaced_.push_back(event.pid);
}

void Spaces::bind(__u32 pid, __u64 space) {
  Process& process = processes_[pid];
  if (process.space == space) return;
  if (process.space) leave(pid, process.space);
  process.space = space;
  auto [found, fresh] = spaces_.try_emplace(space);
  if (fresh) found->second.born_epoch = epoch_;
  found->second.pids.push_back(pid);
  urgent(space);
}

void Spaces::leave(__u32 pid, __u64 space) {
  auto found = spaces_.find(space);
  if (found == spaces_.end()) return;
  std::erase(found->second.pids, pid);
  if (!found->second.pids.empty()) return;
  spaces_.erase(found);
  gone_.push_back(space);
}

void Spaces::urgent(__u64 space) {
  auto found = spaces_.find(space);
  if (found == spaces_.end() || found->second.urgent_epoch == epoch_ + 1) return;
  found->second.urgent_epoch = epoch_ + 1;
  urgent_.push_back(space);
}

bool Spaces::managed(const ht_mapping& mapping) const {
  __u64 bytes = mapping.end - mapping.start;
  if (mapping.flags & TIER_RANGE_ANON) return true;
  return bytes >= (mapping.flags & TIER_RANGE_SHMEM ? settings_.min_shmem_bytes : settings_.min_file_bytes);
}

std::vector<ht_mapping> Spaces::managed(const Space& space) const {
  std::vector<ht_mapping> list;
  std::copy_if(space.mappings.begin(), space.mappings.end(), std::back_inserter(list),
               [this](const ht_mapping& mapping) { return managed(mapping); });
  return list;
}

Stray Spaces::stray(__u64 space, __u64 address) const {
  auto found = spaces_.find(space);
  if (found == spaces_.end()) return Stray::kUnknownSpace;
  const auto& mappings = found->second.mappings;
  auto m = std::upper_bound(mappings.begin(), mappings.end(), address,
                            [](__u64 a, const ht_mapping& mapping) { return a < mapping.end; });
  if (m == mappings.end() || m->start > address) return Stray::kUnmapped;
  return Stray::kNotManaged;
}

__u32 Spaces::pid_of(__u64 space) const {
  auto found = spaces_.find(space);
  return found == spaces_.end() ? 0 : found->second.pids.front();
}

Result<Spaces::Polled> Spaces::poll(__u64 epoch, bool all, Machine& machine, Watcher& watcher) {
  Polled polled;
  for (__u64 space : gone_)
    if (!spaces_.contains(space)) watcher.gone(space);
  gone_.clear();

  std::vector<ht_space_req> wanted;
  auto want = [&](__u64 id, Space& space) {
    if (space.polled_epoch == epoch) return;
    space.polled_epoch = epoch;
    wanted.push_back({.space = id, .seq = space.seq, .tier_rss_pages = 0, .pid = space.pids.front(), .error = 0,
                      .first = 0, .count = 0});
  };
  for (__u64 id : std::exchange(urgent_, {}))
    if (auto found = spaces_.find(id); found != spaces_.end()) want(id, found->second);
  const __u32 in_epochs = all ? 1 : std::max(1u, settings_.poll_epochs);
  std::size_t share = (spaces_.size() + in_epochs - 1) / in_epochs;
  for (auto next = spaces_.upper_bound(rotation_); share && !spaces_.empty(); --share, ++next) {
    if (next == spaces_.end()) next = spaces_.begin();
    want(next->first, next->second);
    rotation_ = next->first;
  }
  for (__u32 pid : std::exchange(unplaced_, {}))
    if (processes_.contains(pid))
      wanted.push_back({.space = 0, .seq = 0, .tier_rss_pages = 0, .pid = pid, .error = 0, .first = 0, .count = 0});
  epoch_ = epoch;

  while (!wanted.empty()) {
    std::size_t before = wanted.size();
    if (auto asked = ask(wanted, machine, watcher, polled); !asked) return std::unexpected(asked.error());
    // A space whose list alone does not fit is left to the next rotation.
    if (wanted.size() == before) wanted.pop_back();
  }
  for (__u64 space : std::exchange(gone_, {}))
    if (!spaces_.contains(space)) watcher.gone(space);
  return polled;
}

// One run over as many as fit; what is left in wanted did not fit.
Result<> Spaces::ask(std::vector<ht_space_req>& wanted, Machine& machine, Watcher& watcher, Polled& polled) {
  std::lock_guard hold(machine.lock);
  ht_spaces_run& run = machine.spaces();
  std::size_t first = wanted.size() - std::min<std::size_t>(wanted.size(), HT_SPACES_MAX);
  run.nr = static_cast<__u32>(wanted.size() - first);
  run.used = 0;
  std::copy(wanted.begin() + first, wanted.end(), run.req);
  if (auto done = machine.run_spaces(); !done) return done;
  std::vector<ht_space_req> left;
  for (__u32 i = 0; i < run.nr; ++i) {
    if (run.req[i].error == -ENOSPC)
      left.push_back(wanted[first + i]);
    else
      answer(wanted[first + i], run.req[i], machine, watcher, polled);
  }
  wanted.resize(first);
  wanted.insert(wanted.end(), left.begin(), left.end());
  return {};
}

void Spaces::answer(const ht_space_req& asked, const ht_space_req& got, Machine& machine, Watcher& watcher,
                    Polled& polled) {
  ++polled.spaces;
  if (got.error) {
    // Gone, or an exec that was not reported: ask the process what it has now.
    auto process = processes_.find(asked.pid);
    if (process == processes_.end()) return;
    if (!asked.space || got.error != -ESRCH) {
      if (!asked.space) {
        processes_.erase(process);
        watcher.found(asked.pid, 0);
      }
      return;
    }
    leave(asked.pid, asked.space);
    process->second.space = 0;
    unplaced_.push_back(asked.pid);
    urgent(asked.space);
    return;
  }
  if (!asked.space) {
    bind(asked.pid, got.space);
    watcher.found(asked.pid, got.space);
  }
  auto found = spaces_.find(got.space);
  if (found == spaces_.end()) return;
  Space& space = found->second;
  if (space.rss_pages != got.tier_rss_pages || got.seq != asked.seq) space.changed_epoch = epoch_;
  space.grown_pages = 0;
  if (space.rss_pages != HT_UNKNOWN64 && got.tier_rss_pages > space.rss_pages)
    space.grown_pages = (got.tier_rss_pages - space.rss_pages) / std::max<__u64>(1, epoch_ - space.rss_epoch);
  space.rss_pages = got.tier_rss_pages;
  space.rss_epoch = epoch_;
  if (got.seq == asked.seq && asked.seq != 0) return;
  space.seq = got.seq;

  std::vector<ht_mapping> now;
  for (const ht_mapping& mapping : machine.mappings().subspan(got.first, got.count)) {
    // A mapping that mprotect or a name cut into pieces is one to us.
    if (!now.empty() && now.back().end == mapping.start && now.back().flags == mapping.flags)
      now.back().end = mapping.end;
    else
      now.push_back(mapping);
  }
  polled.mappings += got.count;

  // What was mapped and is not any more: both lists are sorted and disjoint.
  auto n = now.begin();
  for (const ht_mapping& old : space.mappings) {
    __u64 at = old.start;
    while (n != now.end() && n->end <= at) ++n;
    for (auto next = n; at < old.end; ++next) {
      __u64 until = next == now.end() ? old.end : std::min(old.end, next->start);
      if (until > at) watcher.unmapped(got.space, at, until);
      if (next == now.end()) break;
      at = std::max(at, next->end);
    }
  }
  space.mappings = std::move(now);
  watcher.mapped(got.space, managed(space));
}

}  // namespace hypertier
