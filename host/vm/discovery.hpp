// SPDX-License-Identifier: GPL-2.0-or-later
// Finds running QEMUs and what backs their tiers. Reads below a root directory,
// so that fixture trees test it; nothing of it asks the VM.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <hypertier/abi.h>

#include "result.hpp"

namespace hypertier {

// The memory behind one tier of a VM.
struct TierFile {
  std::string id;    // of the memory-backend object
  std::string path;  // of the file; empty: none is named
  bool memfd = false;  // without a name, but found in the process (descriptor_of)
  uint64_t size_bytes = 0;
  int node = -1;  // of the guest
  bool shared = false;
};

// A virtio-mem device: memory of a tier that can be plugged and unplugged.
struct Pluggable {
  std::string device;  // QOM path; empty: the tier has none
  TierFile file;
};

struct Vm {
  int pid = 0;
  uint64_t start_time = 0;  // of the process, in clock ticks: a pid alone is reused
  std::string name;
  std::string qmp_path;      // empty: none that we could open
  std::string balloon_path;  // QOM path of the balloon; empty: look for it by QMP
  std::string agent_path;    // socket of the agent channel; empty: none
  bool has_balloon = false;
  bool reporting = false;  // free-page-reporting=on
  std::array<TierFile, HT_TIERS> tier;  // there from boot
  std::array<Pluggable, HT_TIERS> plug;  // of both tiers, or of none
  bool plugs() const { return !plug[0].device.empty(); }
  // The most that the VM may have of a tier, and what cannot be taken from it.
  uint64_t size_bytes(size_t t) const { return tier[t].size_bytes + plug[t].file.size_bytes; }
  uint64_t fixed_bytes(size_t t) const { return plugs() ? tier[t].size_bytes : 0; }
  // The file that grows and shrinks.
  const TierFile& moving(size_t t) const { return plugs() ? plug[t].file : tier[t]; }
  std::string problem;  // why its tiers cannot be managed; empty: they can
  std::string hint;
};

// The arguments of a QEMU, as /proc/PID/cmdline has them. Knows QEMU's own
// key=value form, its JSON form, and what libvirt writes.
[[nodiscard]] Vm parse_qemu(const std::vector<std::string>& arguments);

// The process's descriptor (/proc/PID/fd/N) of the file that is mapped at an
// address: the way to a memfd, whose address QEMU tells.
[[nodiscard]] Result<std::string> descriptor_of(int pid, uint64_t address);

// Which ones: an empty list of directories means all, else those whose QMP socket
// lies below one of them. Processes that end meanwhile are left out.
std::vector<Vm> find_qemus(const std::filesystem::path& root = "/", const std::vector<std::filesystem::path>& qmp_below = {});

}  // namespace hypertier
