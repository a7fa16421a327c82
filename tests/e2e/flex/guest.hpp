// SPDX-License-Identifier: GPL-2.0-or-later
// A real two-tier guest in a stock QEMU, with a tmpfs file a tier, for tests.
#pragma once

#include <memory>
#include <string>

#include "qmp/qmp.hpp"
#include "result.hpp"

namespace hypertier::test {

struct GuestOptions {
  std::string name = "guest";
  std::string kernel;     // directory of the unpacked kernel package
  std::string initramfs;
  std::string append;     // more for the kernel's command line
  unsigned long long fast_bytes = 256ULL << 20;
  unsigned long long slow_bytes = 512ULL << 20;
  bool boot = true;       // false: stopped at reset, no guest
  int cpus = 2;
  bool icount = false;    // its clock counts its instructions, however slow they are
  int boot_seconds = 400;  // until its kernel must be up
  bool qtest = false;     // with a qtest socket and a legacy balloon in slot 4
  std::string directory;  // for its files; empty: a new one on tmpfs
  bool mounts = false;    // a tmpfs of its own for each tier, so that it can be capped
  bool memfd = false;     // memory without a name
  // Beside the tiers, memory of each that a virtio-mem device plugs; without balloon. 0: none.
  unsigned long long plug_bytes = 0;
};

class Guest {
 public:
  [[nodiscard]] static Result<std::unique_ptr<Guest>> start(const GuestOptions& options);
  ~Guest();
  Guest(const Guest&) = delete;

  // Runs a shell line in the guest; its output, or an error if it fails.
  [[nodiscard]] Result<std::string> run(const std::string& line, int timeout_seconds = 60);
  Qmp& qmp() { return *qmp_; }
  int pid() const { return pid_; }
  const std::string& directory() const { return directory_; }
  // A tier's backing file; memory without a name has none.
  std::string file(const std::string& tier) const { return directory_ + "/" + tier + (mounts_ ? "/memory" : ""); }
  // Memory that the host holds for a tier: st_blocks of its file.
  unsigned long long resident_bytes(const std::string& tier) const;
  std::string console() const;  // the kernel's messages so far

 private:
  Guest() = default;
  Result<std::string> read_answer(int timeout_seconds);

  int pid_ = -1;
  bool mounts_ = false;
  int control_ = -1;
  std::string directory_;
  std::string pending_;
  std::unique_ptr<Qmp> qmp_;
};

}  // namespace hypertier::test
