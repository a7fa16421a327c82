// SPDX-License-Identifier: GPL-2.0-or-later
// A PMU as sysfs describes it: event terms ("event=0xcd,umask=0x1,ldlat=3")
// placed into a perf_event_attr by the PMU's own format files.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "sources/source.hpp"

namespace hypertier {

class Pmu {
 public:
  // nullopt: no such PMU.
  static std::optional<Pmu> find(const Roots& roots, std::string_view name);

  const std::string& name() const { return name_; }
  bool has_event(std::string_view event) const;
  bool has_format(std::string_view term) const;
  // caps/max_precise; 0: no PEBS.
  int max_precise() const;
  // File with the online CPUs that have it.
  std::filesystem::path cpu_list() const;

  // The terms of events/EVENT.
  Result<std::string> event_terms(std::string_view event) const;
  // Sets type and config words.
  Result<perf_event_attr> attr(std::string_view terms) const;

 private:
  Result<> set_term(perf_event_attr& attr, std::string_view term, std::uint64_t value) const;

  std::filesystem::path dir_;
  std::filesystem::path all_cpus_;
  std::string name_;
  std::uint32_t type_ = 0;
};

// What every sampling event of HyperTier has: user addresses with data source
// and weight, delivered one by one.
void set_sampling(perf_event_attr& attr, std::uint64_t period, int precise);

}  // namespace hypertier
