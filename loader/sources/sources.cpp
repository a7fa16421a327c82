// SPDX-License-Identifier: GPL-2.0-or-later
// The sources of this build, best first.
#include <fstream>

#include "sources/pmu.hpp"
#include "sources/source.hpp"

namespace hypertier {
namespace {

constexpr std::uint64_t kPebsPeriod = 4093;  // the reference's, prime
// Micro-ops, a multiple of 16: some thousand samples a second on a busy core.
constexpr std::uint64_t kIbsPeriod = 262144;
constexpr std::uint64_t kIbsProbePeriod = 4096;
// Loads slower than this many cycles: not served by a cache near the core,
// whatever the memory behind it is.
constexpr std::uint64_t kLoadLatencyCycles = 64;
constexpr int kPrecise = 2;  // PEBS; 3 is not to be had for every event
// MEM_LOAD_RETIRED.L3_MISS, the same since Skylake; sysfs has no name for it.
constexpr std::string_view kL3MissTerms = "event=0xd1,umask=0x20";

struct Cpu {
  std::string vendor;
  bool guest = false;
};

Cpu read_cpu(const Roots& roots) {
  Cpu cpu;
  std::ifstream in(roots.proc / "cpuinfo");
  std::string line;
  while (std::getline(in, line) && !line.empty()) {  // the first CPU stands for all
    if (line.starts_with("vendor_id")) cpu.vendor = line.substr(line.find(':') + 2);
    if (line.starts_with("flags")) cpu.guest = line.find(" hypervisor") != line.npos;
  }
  return cpu;
}

std::string one_in(std::uint64_t period) { return "one sample in " + std::to_string(period); }

// Intel's precise events that record the data address.
class Pebs : public Source {
 public:
  explicit Pebs(Roots roots) : roots_(std::move(roots)) {}

  std::string_view name() const override { return "pebs"; }

  std::uint64_t period(const SourceSettings& settings) const override {
    return settings.period ? settings.period : kPebsPeriod;
  }

  std::string describe(const SourceSettings& settings) const override {
    return "Intel PEBS, " + one_in(period(settings)) + " misses";
  }

  Result<std::vector<std::vector<SourceEvent>>> events(const SourceSettings& settings) const override {
    Cpu cpu = read_cpu(roots_);
    if (cpu.vendor != "GenuineIntel")
      return fail("PEBS needs an Intel CPU, this one is " + (cpu.vendor.empty() ? "unknown" : cpu.vendor),
                  cpu.vendor == "AuthenticAMD" ? "AMD has IBS instead: see ibs" : "");
    // hybrid parts: the performance cores have load latency as servers do
    auto pmu = Pmu::find(roots_, "cpu_core");
    if (!pmu) pmu = Pmu::find(roots_, "cpu");
    if (!pmu)
      return cpu.guest ? fail("this virtual machine has no PMU", "give it one (QEMU: -cpu host,pmu=on)")
                       : fail("the kernel has no CPU PMU here", "see dmesg for \"Performance Events\"");
    if (pmu->max_precise() < 1)
      return cpu.guest ? fail("the PMU of this virtual machine has no PEBS",
                              "run HyperTier where PEBS is passed through, or on the host")
                       : fail("the CPU PMU has no PEBS (caps/max_precise is 0)", "see dmesg for \"PEBS\"");

    std::vector<std::vector<SourceEvent>> ways;
    if (pmu->has_event("mem-loads") && pmu->has_format("ldlat")) {
      auto loads = load_latency(*pmu, settings);
      if (!loads) return std::unexpected(loads.error());
      ways.push_back({std::move(*loads)});
    }
    auto misses = plain_event(*pmu, "mem_load_retired.l3_miss", std::string(kL3MissTerms), period(settings));
    if (!misses) return std::unexpected(misses.error());
    ways.push_back({std::move(*misses)});

    if (settings.store_period) {
      auto terms = pmu->event_terms("mem-stores");
      if (!terms) return std::unexpected(terms.error());
      auto stores = plain_event(*pmu, "mem-stores", *terms, settings.store_period);
      if (!stores) return std::unexpected(stores.error());
      for (auto& way : ways) way.push_back(*stores);
    }
    return ways;
  }

 private:
  Result<SourceEvent> plain_event(const Pmu& pmu, std::string name, const std::string& terms,
                                  std::uint64_t period) const {
    auto attr = pmu.attr(terms);
    if (!attr) return std::unexpected(attr.error());
    SourceEvent event{
        .name = pmu.name() + "/" + name + "/", .attr = *attr, .leader = {}, .cpu_list = pmu.cpu_list()};
    set_sampling(event.attr, period, std::min(kPrecise, pmu.max_precise()));
    return event;
  }

  Result<SourceEvent> load_latency(const Pmu& pmu, const SourceSettings& settings) const {
    auto terms = pmu.event_terms("mem-loads");
    if (!terms) return std::unexpected(terms.error());
    // sysfs names the least threshold; ours replaces it
    if (auto ldlat = terms->find(",ldlat="); ldlat != terms->npos)
      terms->erase(ldlat, terms->find(',', ldlat + 1) - ldlat);
    auto event = plain_event(pmu, "mem-loads", *terms + ",ldlat=" + std::to_string(kLoadLatencyCycles),
                             period(settings));
    if (!event) return event;
    if (pmu.has_event("mem-loads-aux")) {
      // from Sapphire Rapids on the event counts only behind this leader
      auto aux = pmu.event_terms("mem-loads-aux");
      if (!aux) return std::unexpected(aux.error());
      auto leader = pmu.attr(*aux);
      if (!leader) return std::unexpected(leader.error());
      leader->disabled = 1;
      leader->exclude_kernel = 1;
      leader->exclude_hv = 1;
      leader->exclude_guest = 1;
      event->leader = *leader;
    }
    return event;
  }

  Roots roots_;
};

// AMD's instruction-based sampling: tags one op in so many, and says what memory
// it touched.
class Ibs : public Source {
 public:
  explicit Ibs(Roots roots) : roots_(std::move(roots)) {}

  std::string_view name() const override { return "ibs"; }

  // The hardware counts in steps of 16.
  std::uint64_t period(const SourceSettings& settings) const override {
    return settings.period ? (settings.period + 15) / 16 * 16 : kIbsPeriod;
  }
  std::uint64_t probe_period() const override { return kIbsProbePeriod; }

  std::string describe(const SourceSettings& settings) const override {
    auto pmu = Pmu::find(roots_, "ibs_op");
    return "AMD IBS, " + one_in(period(settings)) + " micro-ops" +
           (pmu && pmu->has_format("l3missonly") ? " that missed the L3 cache" : ", cache hits included");
  }

  Result<std::vector<std::vector<SourceEvent>>> events(const SourceSettings& settings) const override {
    Cpu cpu = read_cpu(roots_);
    if (cpu.vendor != "AuthenticAMD" && cpu.vendor != "HygonGenuine")
      return fail("IBS needs an AMD CPU, this one is " + (cpu.vendor.empty() ? "unknown" : cpu.vendor));
    auto pmu = Pmu::find(roots_, "ibs_op");
    if (!pmu)
      return cpu.guest ? fail("this virtual machine has no IBS: hypervisors do not pass it through",
                              "use abit here, or run HyperTier on the host")
                       : fail("the kernel has no PMU ibs_op here", "see dmesg for IBS, and the firmware's settings");
    // Ops rather than cycles: a stalled core would be sampled for waiting. With
    // Zen 4 and later, ops that missed the L3 cache only.
    std::string terms;
    for (const char* term : {"cnt_ctl", "l3missonly"})
      if (pmu->has_format(term)) terms += (terms.empty() ? "" : ",") + std::string(term) + "=1";
    auto attr = pmu->attr(terms);
    if (!attr) return std::unexpected(attr.error());
    SourceEvent event{.name = "ibs_op/" + terms + "/", .attr = *attr, .leader = {}, .cpu_list = pmu->cpu_list()};
    set_sampling(event.attr, period(settings), 0);
    // The PMU refuses every exclude; the sampler drops kernel addresses.
    event.attr.exclude_kernel = event.attr.exclude_hv = event.attr.exclude_guest = 0;
    return std::vector<std::vector<SourceEvent>>{{std::move(event)}};
  }

 private:
  Roots roots_;
};

// The lab's virtual PEBS: a PMU of its own that the simulated memory feeds.
class Vpebs : public Source {
 public:
  explicit Vpebs(Roots roots) : roots_(std::move(roots)) {}

  std::string_view name() const override { return "vpebs"; }
  bool holds_budget() const override { return false; }

  std::uint64_t period(const SourceSettings& settings) const override {
    if (settings.period) return settings.period;
    auto line = read_line(roots_.sys / "bus/event_source/devices/vpebs/default_period");
    std::uint64_t period = line ? std::strtoull(line->c_str(), nullptr, 0) : 0;
    return period ? period : kPebsPeriod;
  }

  std::string describe(const SourceSettings& settings) const override {
    return "the lab's virtual PEBS, " + one_in(period(settings)) + " simulated misses";
  }

  Result<std::vector<std::vector<SourceEvent>>> events(const SourceSettings& settings) const override {
    auto pmu = Pmu::find(roots_, "vpebs");
    if (!pmu) return fail("there is no PMU vpebs, which only the lab has", "try it there: ./run lab");
    auto attr = pmu->attr("");
    if (!attr) return std::unexpected(attr.error());
    SourceEvent event{.name = "vpebs", .attr = *attr, .leader = {}, .cpu_list = pmu->cpu_list()};
    set_sampling(event.attr, period(settings), 0);
    return std::vector<std::vector<SourceEvent>>{{std::move(event)}};
  }

 private:
  Roots roots_;
};

// Accessed bits of the page tables, read by the module: no PMU at all.
class AccessedBits : public Source {
 public:
  explicit AccessedBits(Roots roots) : roots_(std::move(roots)) {}

  std::string_view name() const override { return "abit"; }
  bool samples() const override { return false; }
  std::uint64_t period(const SourceSettings&) const override { return 1; }

  std::string describe(const SourceSettings&) const override {
    return "accessed bits of the page tables, cleared and tested in pairs, with one TLB flush of the process each time";
  }

  Result<std::vector<std::vector<SourceEvent>>> events(const SourceSettings&) const override {
    if (!std::filesystem::exists(roots_.sys / "module/hypertier"))
      return fail("accessed bits are read by hypertier.ko, which is not loaded", "modprobe hypertier");
    return std::vector<std::vector<SourceEvent>>{};
  }

 private:
  Roots roots_;
};

}  // namespace

std::vector<std::unique_ptr<Source>> make_sources(const Roots& roots) {
  std::vector<std::unique_ptr<Source>> sources;
  sources.push_back(std::make_unique<Pebs>(roots));
  sources.push_back(std::make_unique<Ibs>(roots));
  sources.push_back(std::make_unique<Vpebs>(roots));
  sources.push_back(std::make_unique<AccessedBits>(roots));
  return sources;
}

bool is_guest(const Roots& roots) { return read_cpu(roots).guest; }

}  // namespace hypertier
