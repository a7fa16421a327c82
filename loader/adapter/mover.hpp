// SPDX-License-Identifier: GPL-2.0-or-later
// Machine and PolicyCaller over bpf/mover.bpf.c: the maps are mapped once, a
// call is one run of a SYSCALL program.
#pragma once

#include <sys/types.h>

#include <array>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <set>

#include "adapter/maps.hpp"
#include "adapter/programs.hpp"
#include "machine.hpp"

namespace hypertier {

class Mover : public Machine {
 public:
  // programs: loaded with moves. syscall_nodes: see AdapterOptions.
  static Result<std::unique_ptr<Mover>> open(Programs programs, const std::optional<std::array<int, HT_TIERS>>& syscall_nodes = {});

  // For all to look at, and every caller's map made later on.
  [[nodiscard]] Result<> pin(const std::filesystem::path& dir);

  // The mover must outlive it.
  Result<std::unique_ptr<PolicyCaller>> caller(__u64 cgroup_id);

  ht_spaces_run& spaces() override { return *spaces_.as<ht_spaces_run>(); }
  std::span<const ht_mapping> mappings() override { return {mappings_.as<ht_mapping>(), HT_MAPPINGS_MAX}; }
  ht_walks_run& walks() override { return *walks_.as<ht_walks_run>(); }
  std::span<const ht_page_t> pages() override { return {pages_.as<ht_page_t>(), HT_PAGES_MAX}; }
  std::span<ht_pair> pairs() override { return {pairs_.as<ht_pair>(), HT_PAIRS_MAX}; }

  [[nodiscard]] Result<> run_spaces() override;
  [[nodiscard]] Result<> run_walks() override;
  [[nodiscard]] Result<> run_exchange(ht_exchange_run& run) override;

 private:
  friend class Caller;
  explicit Mover(Programs programs) : programs_(std::move(programs)) {}

  Programs programs_;
  std::optional<std::array<int, HT_TIERS>> syscall_nodes_;
  MappedMap spaces_, mappings_, walks_, pages_, pairs_, exchange_;
  std::filesystem::path pins_;
  std::mutex callers_lock_;
  std::array<bool, HT_CALLS_MAX> numbers_{};  // of ht_call maps, in use
  std::set<pid_t> calling_;  // threads that a policy may keep on their CPU now
};

}  // namespace hypertier
