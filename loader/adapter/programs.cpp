// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/programs.hpp"

#include <hypertier/abi.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <string>

#include "adapter/maps.hpp"
#include "guest.skel.h"

namespace hypertier {
namespace {

constexpr std::uint32_t kHintsMin = 8192;  // as many as the BPF object declares

void leave_out(std::initializer_list<bpf_program*> programs, std::initializer_list<bpf_map*> maps) {
  for (bpf_program* program : programs) bpf_program__set_autoload(program, false);
  for (bpf_map* map : maps) bpf_map__set_autocreate(map, false);
}

Result<> size_sampler(guest_bpf& guest, std::uint32_t granules, const LibbpfMessages& messages) {
  // Up to 2^22 = 8 TiB of tracked memory; the cursors wrap by mask.
  if (granules < 2 || granules > 1U << 22)
    return fail("cannot track " + std::to_string(granules) + " granules", "tierd --granules takes 2 to 4194304");
  const std::uint32_t capacity = std::bit_ceil(granules);
  // Twice as many hints as granules: several address spaces seldom meet.
  const std::uint32_t hints = std::max(2 * capacity, kHintsMin);
  auto& maps = guest.maps;
  if (int err = bpf_map__set_value_size(maps.data_hints, hints * sizeof(__u32)); err < 0)
    return messages.fail("cannot size the sampler's hints", -err);
  guest.rodata->ht_hint_mask = hints - 1;
  bpf_map__set_max_entries(maps.ht_index, capacity);
  bpf_map__set_max_entries(maps.ht_granules, 2 * capacity);
  bpf_map__set_max_entries(maps.ht_changed, 2 * capacity);
  bpf_map__set_max_entries(maps.ht_free, capacity);
  return {};
}

}  // namespace

Result<Programs> load_programs(const ProgramsWanted& wanted) {
  LibbpfMessages messages;
  Programs guest(guest_bpf__open(), guest_bpf__destroy);
  if (!guest) return messages.fail("cannot open the guest's BPF object", errno);
  auto& programs = guest->progs;
  auto& maps = guest->maps;
  if (!wanted.moves)
    leave_out({programs.classify, programs.admit, programs.moved, programs.spaces_run, programs.walk, programs.exchange_run},
              {maps.calls, maps.spaces, maps.mappings, maps.walks, maps.pages, maps.pairs, maps.exchange});
  if (!wanted.bits) leave_out({programs.bits}, {maps.checks});
  if (!wanted.granules)
    leave_out({programs.ht_sample}, {maps.ht_index, maps.ht_granules, maps.ht_changed, maps.ht_free});
  else if (auto sized = size_sampler(*guest, wanted.granules, messages); !sized)
    return std::unexpected(sized.error());
  if (!wanted.ring_bytes)
    leave_out({programs.ht_fork, programs.ht_exec, programs.ht_exit, programs.ht_attach, programs.ht_cgroup_gone, programs.ht_tasks}, {maps.ht_space_events});
  else
    bpf_map__set_max_entries(maps.ht_space_events, wanted.ring_bytes);
  if (guest_bpf__load(guest.get()))
    return messages.fail("cannot load the guest's BPF programs", errno,
                         errno == ENOMEM ? "fewer granules need less memory: tierd --granules"
                                         : "the module hypertier must be loaded, in the version of this tierd (tierctl version)");
  return guest;
}

}  // namespace hypertier
