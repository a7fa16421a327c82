// SPDX-License-Identifier: GPL-2.0-or-later
// Which events each kind of machine gets, from fixture trees of sysfs, and
// what a probe's counts mean.
#include <gtest/gtest.h>

#include "sources/pmu.hpp"
#include "sources/probe.hpp"

namespace hypertier {
namespace {

Roots machine(const std::string& name) {
  std::filesystem::path root = std::filesystem::path(HT_FIXTURES) / "sources" / name;
  return {.sys = root / "sys", .proc = root / "proc"};
}

using Ways = std::vector<std::vector<SourceEvent>>;

Result<Ways> events(const std::string& machine_name, const std::string& source,
                    const SourceSettings& settings = {}) {
  for (auto& candidate : make_sources(machine(machine_name)))
    if (candidate->name() == source) return candidate->events(settings);
  return fail("no such source");
}

void expect_sampling(const perf_event_attr& attr) {
  EXPECT_EQ(attr.size, sizeof(attr));
  EXPECT_EQ(attr.sample_type, PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT);
  EXPECT_EQ(attr.wakeup_events, 1u) << "else the kernel may take large PEBS";
  EXPECT_EQ(attr.watermark, 0u);
  EXPECT_EQ(attr.freq, 0u);
  EXPECT_TRUE(attr.disabled);
  EXPECT_TRUE(attr.exclude_kernel);
  EXPECT_TRUE(attr.exclude_hv);
  EXPECT_FALSE(attr.exclude_user);
}

TEST(Pebs, IceLake) {
  auto ways = events("ice-lake", "pebs");
  ASSERT_TRUE(ways) << ways.error().message;
  ASSERT_EQ(ways->size(), 2u);
  ASSERT_EQ(ways->at(0).size(), 1u);
  const auto& loads = ways->at(0)[0];
  EXPECT_EQ(loads.name, "cpu/mem-loads/");
  EXPECT_EQ(loads.attr.type, 4u);
  EXPECT_EQ(loads.attr.config, 0x01cdu);
  EXPECT_EQ(loads.attr.config1, 64u) << "ldlat";
  EXPECT_EQ(loads.attr.sample_period, 4093u);
  EXPECT_GE(loads.attr.precise_ip, 2u);
  EXPECT_FALSE(loads.leader);
  EXPECT_EQ(read_list(loads.cpu_list).value(), (std::vector{0, 1, 2, 3}));
  expect_sampling(loads.attr);
  const auto& misses = ways->at(1)[0];
  EXPECT_EQ(misses.attr.config, 0x20d1u);
  EXPECT_GE(misses.attr.precise_ip, 2u);
  expect_sampling(misses.attr);
}

TEST(Pebs, SapphireRapidsNeedsALeader) {
  auto ways = events("sapphire-rapids", "pebs");
  ASSERT_TRUE(ways) << ways.error().message;
  const auto& loads = ways->at(0)[0];
  EXPECT_EQ(loads.attr.config, 0x01cdu);
  ASSERT_TRUE(loads.leader);
  EXPECT_EQ(loads.leader->config, 0x8203u);
  EXPECT_EQ(loads.leader->type, loads.attr.type);
  EXPECT_EQ(loads.leader->sample_period, 0u) << "it only counts";
  EXPECT_FALSE(ways->at(1)[0].leader) << "the L3-miss event needs none";
}

TEST(Pebs, HybridTakesThePerformanceCores) {
  auto ways = events("hybrid", "pebs");
  ASSERT_TRUE(ways) << ways.error().message;
  const auto& loads = ways->at(0)[0];
  EXPECT_EQ(loads.name, "cpu_core/mem-loads/");
  EXPECT_EQ(loads.attr.type, 4u);
  EXPECT_EQ(read_list(loads.cpu_list).value(), (std::vector{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_TRUE(loads.leader);
}

TEST(Pebs, WithoutLoadLatencyTheMissEvent) {
  auto ways = events("no-load-latency", "pebs");
  ASSERT_TRUE(ways) << ways.error().message;
  ASSERT_EQ(ways->size(), 1u);
  EXPECT_EQ(ways->at(0)[0].attr.config, 0x20d1u);
}

TEST(Pebs, StoresAndPeriodsAsAsked) {
  auto ways = events("ice-lake", "pebs", {.period = 251, .store_period = 65535});
  ASSERT_TRUE(ways) << ways.error().message;
  for (auto& way : *ways) {
    ASSERT_EQ(way.size(), 2u);
    EXPECT_EQ(way[0].attr.sample_period, 251u);
    EXPECT_EQ(way[1].attr.config, 0x82d0u);
    EXPECT_EQ(way[1].attr.sample_period, 65535u);
    expect_sampling(way[1].attr);
  }
}

TEST(Pebs, RefusedWithTheReason) {
  auto refusal = [](const std::string& machine_name) {
    auto ways = events(machine_name, "pebs");
    EXPECT_FALSE(ways) << machine_name;
    return ways ? std::string() : ways.error().message + " | " + ways.error().hint;
  };
  EXPECT_EQ(refusal("vm-without-pmu"),
            "this virtual machine has no PMU | give it one (QEMU: -cpu host,pmu=on)");
  EXPECT_EQ(refusal("vm-without-pebs"),
            "the PMU of this virtual machine has no PEBS | run HyperTier where PEBS is passed through, or on "
            "the host");
  EXPECT_EQ(refusal("amd"),
            "PEBS needs an Intel CPU, this one is AuthenticAMD | AMD has IBS instead: see ibs");
}

TEST(Pebs, AGuestOfStockKvmIsToldByTheProbe) {
  // sysfs promises everything there; only the records tell
  ASSERT_TRUE(events("kvm-guest", "pebs"));
  EXPECT_TRUE(is_guest(machine("kvm-guest")));
  EXPECT_FALSE(is_guest(machine("ice-lake")));
  auto judged = judge_probe({.records = 900, .with_address = 0, .inside = 0}, true);
  ASSERT_FALSE(judged);
  EXPECT_EQ(judged.error().message, "samples arrive (900) but carry no addresses");
  EXPECT_NE(judged.error().hint.find("KVM"), std::string::npos);
}

TEST(Ibs, Zen4SamplesOpsThatMissTheL3Cache) {
  auto ways = events("zen4", "ibs");
  ASSERT_TRUE(ways) << ways.error().message;
  ASSERT_EQ(ways->size(), 1u);
  ASSERT_EQ(ways->at(0).size(), 1u);
  const auto& ops = ways->at(0)[0];
  EXPECT_EQ(ops.name, "ibs_op/cnt_ctl=1,l3missonly=1/");
  EXPECT_EQ(ops.attr.type, 11u);
  EXPECT_EQ(ops.attr.config, 1u << 19 | 1u << 16);
  EXPECT_EQ(ops.attr.sample_period % 16, 0u) << "the PMU refuses anything else";
  EXPECT_EQ(ops.attr.sample_type, PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT);
  EXPECT_EQ(ops.attr.wakeup_events, 1u);
  EXPECT_TRUE(ops.attr.disabled);
  // PERF_PMU_CAP_NO_EXCLUDE: any of them is EINVAL
  EXPECT_FALSE(ops.attr.exclude_kernel || ops.attr.exclude_hv || ops.attr.exclude_guest || ops.attr.exclude_user);
  EXPECT_EQ(events("zen4", "ibs", {.period = 1000})->at(0)[0].attr.sample_period, 1008u);
}

TEST(Ibs, OlderPartsSampleAllOps) {
  auto ways = events("amd", "ibs");
  ASSERT_TRUE(ways) << ways.error().message;
  EXPECT_EQ(ways->at(0)[0].attr.config, 0u) << "no format, no term";
  for (auto& source : make_sources(machine("amd")))
    if (source->name() == "ibs") {
      EXPECT_NE(source->describe({}).find("cache hits included"), std::string::npos);
      EXPECT_EQ(source->probe_period() % 16, 0u);
    }
}

TEST(Ibs, RefusedWithTheReason) {
  auto guest = events("amd-vm", "ibs");
  ASSERT_FALSE(guest);
  EXPECT_EQ(guest.error().message, "this virtual machine has no IBS: hypervisors do not pass it through");
  EXPECT_NE(guest.error().hint.find("abit"), std::string::npos);
  auto intel = events("ice-lake", "ibs");
  ASSERT_FALSE(intel);
  EXPECT_EQ(intel.error().message, "IBS needs an AMD CPU, this one is GenuineIntel");
}

TEST(Abit, IsTakenWhereNothingElseWorks) {
  auto chosen = choose_source({}, {}, machine("amd-vm"));
  ASSERT_TRUE(chosen) << chosen.error().message;
  EXPECT_EQ(chosen->name, "abit");
  EXPECT_TRUE(chosen->events.empty());
  auto reports = diagnose_sources({}, machine("amd-vm"));
  EXPECT_EQ(reports.back().name, "abit");
  EXPECT_TRUE(reports.back().works);
  auto refused = choose_source({}, "abit", machine("ice-lake"));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().hint, "abit: modprobe hypertier");
}

TEST(Vpebs, OnlyInTheLab) {
  auto ways = events("lab", "vpebs", {.period = 47});
  ASSERT_TRUE(ways) << ways.error().message;
  EXPECT_EQ(ways->at(0)[0].attr.type, 24u);
  EXPECT_EQ(ways->at(0)[0].attr.sample_period, 47u);
  EXPECT_EQ(ways->at(0)[0].attr.precise_ip, 0u);
  expect_sampling(ways->at(0)[0].attr);
  EXPECT_FALSE(events("ice-lake", "vpebs"));
}

TEST(Probe, NinetyPercentInside) {
  EXPECT_TRUE(judge_probe({.records = 1000, .with_address = 1000, .inside = 1000}, false));
  EXPECT_TRUE(judge_probe({.records = 1000, .with_address = 1000, .inside = 900}, false));
  EXPECT_FALSE(judge_probe({.records = 1000, .with_address = 1000, .inside = 899}, false));
  EXPECT_FALSE(judge_probe({.records = 1000, .with_address = 20, .inside = 20}, false))
      << "most have no address";
  EXPECT_FALSE(judge_probe({.records = 3, .with_address = 3, .inside = 3}, false)) << "too few to tell";
  EXPECT_FALSE(judge_probe({}, false));
}

TEST(Choice, SaysWhyEachWasRefused) {
  auto chosen = choose_source({}, {}, machine("nothing"));
  ASSERT_FALSE(chosen);
  EXPECT_EQ(chosen.error().message,
            "no source of samples works here (pebs: PEBS needs an Intel CPU, this one is unknown; "
            "ibs: IBS needs an AMD CPU, this one is unknown; "
            "vpebs: there is no PMU vpebs, which only the lab has; "
            "abit: accessed bits are read by hypertier.ko, which is not loaded)");
  EXPECT_FALSE(chosen.error().hint.empty());
  auto unknown = choose_source({}, "nonsense", machine("amd"));
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().message, "there is no source \"nonsense\"");
  EXPECT_EQ(unknown.error().hint, "sources are: pebs, ibs, vpebs, abit, and one that samples with +abit");
}

TEST(Choice, BitsBesideSamplesNeedBoth) {
  auto pebs = choose_source({}, "pebs+abit", machine("nothing"));
  ASSERT_FALSE(pebs);
  EXPECT_EQ(pebs.error().message, "no source of samples works here (pebs: PEBS needs an Intel CPU, this one is unknown)");
  auto best = choose_source({}, "best+abit", machine("nothing"));
  ASSERT_FALSE(best);
  EXPECT_EQ(best.error().message,
            "no source of samples works here (pebs: PEBS needs an Intel CPU, this one is unknown; "
            "ibs: IBS needs an AMD CPU, this one is unknown; vpebs: there is no PMU vpebs, which only the lab has)");
  auto twice = choose_source({}, "abit+abit", machine("amd-vm"));
  ASSERT_FALSE(twice);
  EXPECT_EQ(twice.error().message, "there is no source of samples \"abit\"");
  EXPECT_EQ(twice.error().hint, "these are: pebs, ibs, vpebs, or best for the first that works");
}

TEST(Choice, OneLineASourceForDoctor) {
  auto reports = diagnose_sources({}, machine("vm-without-pmu"));
  ASSERT_EQ(reports.size(), 4u);
  EXPECT_EQ(reports[0].name, "pebs");
  EXPECT_FALSE(reports[0].works);
  EXPECT_EQ(reports[0].text, "this virtual machine has no PMU");
  EXPECT_EQ(reports[0].hint, "give it one (QEMU: -cpu host,pmu=on)");
  for (auto& report : reports) EXPECT_EQ(report.text.find('\n'), std::string::npos);
}

TEST(Pmu, PlacesTermsByTheFormat) {
  auto pmu = Pmu::find(machine("amd"), "cpu");
  ASSERT_TRUE(pmu);
  auto attr = pmu->attr("event=0x1cd,umask=0x2");
  ASSERT_TRUE(attr) << attr.error().message;
  EXPECT_EQ(attr->config, 0x1000002cdULL) << "the event's bits 8-11 go to 32-35";
  EXPECT_FALSE(pmu->attr("event=0x10000"));
  EXPECT_FALSE(pmu->attr("nonsense=1"));
  EXPECT_FALSE(pmu->attr("event=x"));
  EXPECT_FALSE(Pmu::find(machine("amd"), "cpu_core"));
}

TEST(Lists, AsTheKernelWritesThem) {
  EXPECT_EQ(parse_list("0,2-4").value(), (std::vector{0, 2, 3, 4}));
  EXPECT_EQ(parse_list("").value(), std::vector<int>{});
  for (auto* bad : {"x", "1,", ",1", "3-1", "1-", "-1", "0-99999999", "1;2"})
    EXPECT_FALSE(parse_list(bad)) << bad;
}

}  // namespace
}  // namespace hypertier
