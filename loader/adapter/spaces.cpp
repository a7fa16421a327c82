// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/spaces.hpp"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "guest.skel.h"

namespace hypertier {

Result<std::unique_ptr<SpaceWatcher>> SpaceWatcher::open(Programs programs) {
  std::unique_ptr<SpaceWatcher> watcher(new SpaceWatcher(std::move(programs)));
  auto receive = [](void* context, void* data, std::size_t) {
    auto* self = static_cast<SpaceWatcher*>(context);
    if (self->handler_) (*self->handler_)(*static_cast<const ht_space_event*>(data));
    return 0;
  };
  watcher->ring_ = ring_buffer__new(bpf_map__fd(watcher->programs_->maps.ht_space_events), receive,
                                    watcher.get(), nullptr);
  if (!watcher->ring_) return fail_errno("cannot map the ring of process events", errno);
  return watcher;
}

SpaceWatcher::~SpaceWatcher() {
  if (!ring_) return;
  stop();
  ring_buffer__free(ring_);
}

Result<> SpaceWatcher::pin(const std::filesystem::path& dir) {
  return hypertier::pin(bpf_map__fd(programs_->maps.bss), dir / "ht_events_lost");
}

Result<> SpaceWatcher::start() {
  LibbpfMessages messages;
  auto& links = programs_->links;
  auto& programs = programs_->progs;
  for (auto [link, program] :
       {std::pair(&links.ht_fork, programs.ht_fork), std::pair(&links.ht_exec, programs.ht_exec),
        std::pair(&links.ht_exit, programs.ht_exit), std::pair(&links.ht_attach, programs.ht_attach),
        std::pair(&links.ht_cgroup_gone, programs.ht_cgroup_gone)}) {
    *link = bpf_program__attach(program);
    if (!*link) {
      int err = errno;
      stop();
      return messages.fail(std::string("cannot attach ") + bpf_program__name(program), err);
    }
  }
  lost_seen_ = lost();
  scan_due_ = true;
  return {};
}

void SpaceWatcher::stop() {
  auto& links = programs_->links;
  for (auto* link : {&links.ht_fork, &links.ht_exec, &links.ht_exit, &links.ht_attach, &links.ht_cgroup_gone}) {
    bpf_link__destroy(*link);
    *link = nullptr;
  }
  handler_ = nullptr;
  ring_buffer__consume(ring_);  // nobody wants them any more
}

int SpaceWatcher::fd() const { return ring_buffer__epoll_fd(ring_); }

std::uint64_t SpaceWatcher::lost() const {
  return std::atomic_ref(programs_->bss->ht_space_events_lost).load(std::memory_order_relaxed);
}

Result<> SpaceWatcher::consume(const Handler& handler) {
  handler_ = &handler;
  int err = ring_buffer__consume(ring_);
  handler_ = nullptr;
  if (err < 0) return fail_errno("cannot read process events", -err);
  return {};
}

Result<> SpaceWatcher::events(const Handler& handler, const std::function<void()>& on_rescan) {
  // At the start the tracepoints are attached before the scan, so the ring
  // holds what happens meanwhile, and what it repeats does no harm. After a
  // loss the ring is emptied first: an event in it may be about a process
  // whose exit was lost.
  for (;;) {
    if (scan_due_) {
      scan_due_ = false;
      if (auto scanned = scan(handler); !scanned) return scanned;
    }
    std::uint64_t lost_now = lost();
    if (auto consumed = consume(handler); !consumed) return consumed;
    if (lost_now == lost_seen_) return {};
    lost_seen_ = lost_now;
    scan_due_ = true;
    on_rescan();
  }
}

Result<> SpaceWatcher::scan(const Handler& handler) {
  bpf_link* link = bpf_program__attach_iter(programs_->progs.ht_tasks, nullptr);
  if (!link) return fail_errno("cannot attach the task iterator", errno);
  Fd iterator(bpf_iter_create(bpf_link__fd(link)));
  int err = errno;
  bpf_link__destroy(link);
  if (!iterator) return fail_errno("cannot open the task iterator", err);

  std::vector<char> bytes;  // reads may end inside an event
  char buffer[64 * sizeof(ht_space_event)];
  for (;;) {
    ssize_t got = read(iterator.get(), buffer, sizeof(buffer));
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (got < 0) return fail_errno("cannot read the task iterator", errno);
    if (got == 0) break;
    bytes.insert(bytes.end(), buffer, buffer + got);
  }
  for (std::size_t at = 0; at + sizeof(ht_space_event) <= bytes.size(); at += sizeof(ht_space_event)) {
    ht_space_event event;
    std::memcpy(&event, &bytes[at], sizeof(event));
    handler(event);
  }
  return {};
}

}  // namespace hypertier
