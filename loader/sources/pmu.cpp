// SPDX-License-Identifier: GPL-2.0-or-later
#include "sources/pmu.hpp"

#include <charconv>

namespace hypertier {
namespace {

namespace fs = std::filesystem;

std::optional<std::uint64_t> parse_number(std::string_view text) {
  int base = 10;
  if (text.starts_with("0x")) {
    text.remove_prefix(2);
    base = 16;
  }
  std::uint64_t value = 0;
  auto read = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (read.ec != std::errc() || read.ptr != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::optional<Pmu> Pmu::find(const Roots& roots, std::string_view name) {
  Pmu pmu;
  pmu.dir_ = roots.sys / "bus/event_source/devices" / name;
  pmu.all_cpus_ = roots.sys / "devices/system/cpu/online";
  pmu.name_ = name;
  auto type = read_line(pmu.dir_ / "type");
  auto number = type ? parse_number(*type) : std::nullopt;
  if (!number) return std::nullopt;
  pmu.type_ = static_cast<std::uint32_t>(*number);
  return pmu;
}

bool Pmu::has_event(std::string_view event) const { return fs::exists(dir_ / "events" / event); }

bool Pmu::has_format(std::string_view term) const { return fs::exists(dir_ / "format" / term); }

int Pmu::max_precise() const {
  auto line = read_line(dir_ / "caps/max_precise");
  return line ? static_cast<int>(parse_number(*line).value_or(0)) : 0;
}

fs::path Pmu::cpu_list() const {
  // only the PMUs of hybrid parts have one of their own
  fs::path own = dir_ / "cpus";
  return fs::exists(own) ? own : all_cpus_;
}

Result<std::string> Pmu::event_terms(std::string_view event) const {
  fs::path file = dir_ / "events" / event;
  auto terms = read_line(file);
  if (!terms) return fail_errno("cannot read " + file.string(), errno ? errno : ENOENT);
  return *terms;
}

Result<> Pmu::set_term(perf_event_attr& attr, std::string_view term, std::uint64_t value) const {
  // "config1:0-15" or "config:0-7,32-35": bits of the value from low to high
  fs::path file = dir_ / "format" / term;
  auto format = read_line(file);
  if (!format) return fail("PMU " + name_ + " has no format \"" + std::string(term) + "\"");
  auto colon = format->find(':');
  std::string word = format->substr(0, colon);
  auto bits = parse_list(colon == format->npos ? "" : std::string_view(*format).substr(colon + 1));
  __u64* config = nullptr;
  if (word == "config") config = &attr.config;
  if (word == "config1") config = &attr.config1;
  if (word == "config2") config = &attr.config2;
  if (word == "config3") config = &attr.config3;
  if (!config || !bits) return fail("cannot understand " + file.string() + ": \"" + *format + "\"");
  for (int bit : *bits) {
    if (bit > 63) return fail("cannot understand " + file.string() + ": \"" + *format + "\"");
    if (value & 1) *config |= 1ULL << bit;
    value >>= 1;
  }
  if (value) return fail("the value of \"" + std::string(term) + "\" is too big for PMU " + name_);
  return {};
}

Result<perf_event_attr> Pmu::attr(std::string_view terms) const {
  perf_event_attr attr{};
  attr.size = sizeof(attr);
  attr.type = type_;
  while (!terms.empty()) {
    auto comma = terms.find(',');
    std::string_view term = terms.substr(0, comma);
    terms = comma == terms.npos ? std::string_view() : terms.substr(comma + 1);
    auto equal = term.find('=');
    std::uint64_t value = 1;  // a bare term is a flag
    if (equal != term.npos) {
      auto number = parse_number(term.substr(equal + 1));
      if (!number)
        return fail("cannot understand the event term \"" + std::string(term) + "\" of PMU " + name_);
      value = *number;
    }
    if (auto set = set_term(attr, term.substr(0, equal), value); !set) return std::unexpected(set.error());
  }
  return attr;
}

void set_sampling(perf_event_attr& attr, std::uint64_t period, int precise) {
  attr.sample_period = period;
  attr.sample_type = PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT;
  attr.precise_ip = precise & 3;
  attr.disabled = 1;
  attr.exclude_kernel = 1;
  attr.exclude_hv = 1;
  attr.exclude_guest = 1;
  // With a watermark of 0 and this, the kernel takes no "large PEBS": of a
  // drained batch only the last record reaches a BPF program.
  attr.wakeup_events = 1;
}

}  // namespace hypertier
