// SPDX-License-Identifier: GPL-2.0-or-later
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>

#include "../cases.hpp"
#include "results.hpp"

namespace bench {
namespace {

struct Spread {
  double mean = 0, low = 0, high = 0;
  size_t count = 0;
};

template <class F>
Spread over(const std::vector<Cell>& cells, F&& value) {
  Spread spread{0, 1e300, -1e300, 0};
  for (const Cell& cell : cells) {
    const std::optional<double> v = value(cell);
    if (!v) continue;
    spread.mean += *v;
    spread.low = std::min(spread.low, *v);
    spread.high = std::max(spread.high, *v);
    spread.count++;
  }
  spread.mean /= static_cast<double>(std::max<size_t>(spread.count, 1));
  return spread;
}

std::string show(const Spread& spread, const char* pattern, double scale = 1) {
  if (!spread.count) return "-";
  std::string text = format(pattern, spread.mean * scale);
  if (spread.count > 1) text += " (" + format(pattern, spread.low * scale) + " to " + format(pattern, spread.high * scale) + ")";
  return text;
}

std::optional<double> ratio(double a, double b) { return b > 0 ? std::optional(a / b) : std::nullopt; }

std::string reached_text(const std::vector<Cell>& cells, double share, bool own_final) {
  if (cells.empty()) return "-";
  const Cell& cell = cells.front();
  std::string text;
  for (size_t phase = 0; phase < cell.phase_end_s.size(); phase++) {
    const double oracle = cell.raw.at("phases").at(phase).at("oracle_hit_ratio");
    const auto at = cell.reached(share * (own_final ? cell.final_ratio : oracle), phase);
    text += (phase ? ", " : "") + (at ? format("%.0f s", *at) : std::string("never"));
  }
  return text;
}

struct Row {
  std::vector<std::string> columns;
};

const std::vector<std::string> kHead = {"system", "seeds", "final true hit ratio", "share of the oracle's gain", "90 % of the oracle after", "pages moved", "moved in vain", "moved an epoch at the end",
                                        "flush calls / moved page", "flush calls / hot page gained", "flush calls", "carried out / moved page", "work lost", "CPU of its threads", "modelled time", "s"};

Row row_of(const Results& results, const std::string& workload, const std::string& system) {
  const std::vector<Cell>& cells = results.of(workload, system);
  const bool still = system == "none";
  auto flushes = [&](const Cell& cell) { return results.own_flush_calls(cell); };
  return {{title_of(system), std::to_string(cells.size()),
           show(over(cells, [](const Cell& c) { return std::optional(c.final_ratio); }), "%.3f"),
           still ? "0" : show(over(cells, [&](const Cell& c) { return results.gain(c); }), "%.2f"),
           still ? "-" : reached_text(cells, 0.9, false),
           show(over(cells, [](const Cell& c) { return std::optional(static_cast<double>(c.moved_pages)); }), "%.0f"),
           still ? "-" : show(over(cells, [](const Cell& c) { return std::optional(c.vain_share); }), "%.0f %%", 100),
           still ? "-" : show(over(cells, [](const Cell& c) { return c.last_moves; }), "%.2f %%", 100),
           show(over(cells, [&](const Cell& c) { return ratio(flushes(c), static_cast<double>(c.moved_pages)); }), "%.4f"),
           show(over(cells, [&](const Cell& c) { return ratio(flushes(c), static_cast<double>(c.hot_gained)); }), "%.3f"),
           show(over(cells, [&](const Cell& c) { return std::optional(flushes(c)); }), "%.0f"),
           show(over(cells, [](const Cell& c) { return c.flushes_carried_out ? ratio(*c.flushes_carried_out, static_cast<double>(c.moved_pages)) : std::nullopt; }), "%.4f"),
           still ? "0" : show(over(cells, [&](const Cell& c) { return results.lost_time(c); }), "%.1f %%", 100),
           show(over(cells, [](const Cell& c) { return std::optional(c.cpu_share); }), "%.1f %%", 100),
           show(over(cells, [&](const Cell& c) {
                  const Cell* base = results.none(workload, c.seed);
                  return base ? ratio(c.modelled_ns, base->modelled_ns) : std::nullopt;
                }), "%.2f"),
           cells.empty() || cells.front().s == 0 ? "-" : show(over(cells, [](const Cell& c) { return std::optional(c.s); }), "%.2g")}};
}

std::string command_of(const std::string& workload, const std::string& system, uint64_t seed, unsigned seconds) {
  return format("./run bench %s/%s/%llu --seconds %u", workload.c_str(), system.c_str(), static_cast<unsigned long long>(seed), seconds);
}

}  // namespace

std::string table_text(const Results& results) {
  std::string out;
  for (const Case& one : cases()) {
    if (!results.any(one.name)) continue;
    out += "\n" + one.name + ": " + one.what + "\n";
    out += format("  %-22s %-22s %-10s %-18s %9s %8s %10s %10s %8s\n", "system", "true hit ratio", "of oracle", "90 % of it after", "moved", "in vain", "fl/page", "fl/gained", "lost");
    for (const std::string& system : results.systems()) {
      if (results.of(one.name, system).empty()) continue;
      const Row r = row_of(results, one.name, system);
      out += format("  %-22s %-22s %-10s %-18s %9s %8s %10s %10s %8s\n", r.columns[0].c_str(), r.columns[2].c_str(), r.columns[3].c_str(), r.columns[4].c_str(),
                    r.columns[5].c_str(), r.columns[6].c_str(), r.columns[8].c_str(), r.columns[9].c_str(), r.columns[12].c_str());
    }
  }
  return out;
}

json summary(const Results& results) {
  json all = json::array();
  for (const Case& one : cases())
    for (const std::string& system : results.systems())
      for (const Cell& cell : results.of(one.name, system)) {
        json entry = {{"workload", cell.workload}, {"system", cell.system}, {"seed", cell.seed}, {"commit", cell.commit}, {"seconds", cell.raw.at("seconds")},
                      {"final_fast_hit_ratio", cell.final_ratio}, {"oracle_fast_hit_ratio", cell.oracle_ratio}, {"moved_pages_total", cell.moved_pages},
                      {"share_in_vain", cell.vain_share}, {"hot_pages_gained", cell.hot_gained}, {"flush_calls_total", cell.flush_calls},
                      {"flush_calls_beyond_none", results.own_flush_calls(cell)}, {"operations_per_s", cell.operations_per_s}, {"s", cell.s},
                      {"modelled_ns_per_operation", cell.modelled_ns}, {"threads_cpu_share", cell.cpu_share}, {"configuration", cell.raw.at("configuration")}};
        if (auto gain = results.gain(cell)) entry["share_of_oracles_gain"] = *gain;
        if (auto lost = results.lost_time(cell)) entry["work_lost_share"] = *lost;
        const json& last = cell.raw.at("windows").back();
        if (last.contains("batch")) entry["batch"] = last["batch"];
        all.push_back(entry);
      }
  return {{"schema", 1}, {"cells", all}};
}

namespace {

// A table of all workloads and systems; bold: the best, and what cannot be told from it.
std::string glance_table(const Results& results, const char* pattern, double close, bool less, const std::function<std::optional<double>(const Cell&)>& value) {
  const std::vector<std::string> systems = {"none", "kernel", "kernel-tuned", "damon", "hyperplace", "heattree", "oracle"};
  std::string out = "| workload |";
  for (const std::string& system : systems) out += " " + title_of(system) + " |";
  out += "\n|---|";
  for (size_t i = 0; i < systems.size(); i++) out += "---|";
  out += "\n";
  for (const Case& one : cases()) {
    if (!results.any(one.name)) continue;
    std::map<std::string, double> means;
    for (const std::string& system : systems)
      if (const Spread spread = over(results.of(one.name, system), value); spread.count) means[system] = spread.mean;
    std::optional<double> best;  // the oracle is no system
    for (auto& [system, mean] : means)
      if (system != "oracle" && (!best || (less ? mean < *best : mean > *best))) best = mean;
    out += "| " + one.name + " |";
    for (const std::string& system : systems) {
      const auto mean = means.find(system);
      if (mean == means.end()) {
        out += " - |";
        continue;
      }
      const std::string text = format(pattern, mean->second);
      const bool good = system != "oracle" && std::abs(mean->second - *best) <= close;
      out += good ? " **" + text + "** |" : " " + text + " |";
    }
    out += "\n";
  }
  return out + "\n";
}

std::string at_a_glance(const Results& results) {
  return "## At a glance\n\nFinal true hit ratio, means of the seeds; bold: the best, and what is within 0.015 of it.\n\n" +
         glance_table(results, "%.3f", 0.015, false, [](const Cell& c) { return std::optional(c.final_ratio); }) +
         "Time an operation takes in the end, modelled (below), beside first touch; bold: the least, and what is within 0.02 of it.\n\n" +
         glance_table(results, "%.2f", 0.02, true, [&](const Cell& c) {
           const Cell* base = results.none(c.workload, c.seed);
           return base ? ratio(c.modelled_ns, base->modelled_ns) : std::nullopt;
         });
}

// By how many times heattree makes fewer flush calls than a peer: a page moved, and a hot page gained.
std::string flush_goals(const Results& results) {
  struct Share {
    double calls = 0, moved = 0, gained = 0;
  };
  const auto of = [&](const std::string& workload, const std::string& system) {
    Share share;
    for (const Cell& cell : results.of(workload, system)) {
      share.calls += results.own_flush_calls(cell);
      share.moved += static_cast<double>(cell.moved_pages);
      share.gained += static_cast<double>(cell.hot_gained);
    }
    return share;
  };
  std::string out =
      "How many times fewer calls heattree makes than each peer, over all seeds (in brackets the goal):\n\n"
      "| workload | its calls | a page moved: kernel, defaults (5) | kernel, tuned (5) | DAMON (30) | a hot page gained: kernel, defaults (30) | kernel, tuned (30) | all hold |\n|---|---|---|---|---|---|---|---|\n";
  for (const Case& one : cases()) {
    const Share own = of(one.name, "heattree");
    if (own.moved <= 0) continue;
    std::string row = "| " + one.name + format(" | %.0f", own.calls);
    bool holds = true;
    const auto column = [&](const char* system, double goal, double Share::*by) {
      const Share peer = of(one.name, system);
      if (peer.moved <= 0) {
        row += " | not run";
        return;
      }
      if (peer.*by <= 0 || own.*by <= 0) {
        row += peer.*by <= 0 ? " | it gained none" : " | none gained";
        return;
      }
      const double times = peer.calls / peer.*by / std::max(1e-12, own.calls / own.*by);
      holds &= times >= goal;
      row += times >= goal ? format(" | %.0f", times) : format(" | **%.1f**", times);
    };
    column("kernel", 5, &Share::moved);
    column("kernel-tuned", 5, &Share::moved);
    column("damon", 30, &Share::moved);
    column("kernel", 30, &Share::gained);
    column("kernel-tuned", 30, &Share::gained);
    out += row + (holds ? " | yes |\n" : " | **no** |\n");
  }
  return out;
}

// What a host can do from outside, beside what the guest does itself.
std::string nested_markdown(const Results& results) {
  const std::string nested = "hotset-2m-nested", own = "hotset-2m";
  std::string out = "## Host-managed tiering: a nested guest\n\n";
  if (!results.any(nested)) return out + "Not run. `./run bench " + nested + "`\n\n";
  out +=
      "*Outside*: the accesses of hotset-2m are made by a virtual machine inside the lab (KVM on the SVM that QEMU emulates, nested paging, one CPU,\n"
      "no kernel in it). Its memory is a process's on the lab's kernel, which is the host and tiers it. *Inside*: hotset-2m as it is above,\n"
      "the lab being the guest that tiers its own memory.\n\n"
      "| tiered from | system | final true hit ratio | share of the oracle's gain | 90 % of the oracle after | pages moved | flush calls | / moved page | nested flushes asked for | "
      "/ moved page | reached the guest | faults of nested paging | work lost |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const std::string& workload : {nested, own})
    for (const std::string& system : results.systems()) {
      const std::vector<Cell>& cells = results.of(workload, system);
      if (cells.empty() || system.find('@') != std::string::npos) continue;
      const bool still = system == "none";
      auto counted = [](const Cell& cell, const char* name) {
        return cell.raw.contains("nested") ? std::optional(cell.raw["nested"].value(name, 0.0)) : std::nullopt;
      };
      auto count = [&](const char* name) { return show(over(cells, [&](const Cell& c) { return counted(c, name); }), "%.0f"); };
      auto a_page = [&](auto&& value) {
        return show(over(cells, [&](const Cell& c) {
                      const std::optional<double> v = value(c);
                      return v ? ratio(*v, static_cast<double>(c.moved_pages)) : std::nullopt;
                    }), "%.3f");
      };
      auto flushes = [&](const Cell& c) { return std::optional(results.own_flush_calls(c)); };
      out += std::string(workload == nested ? "| outside | " : "| inside | ") + title_of(system) + " | " +
             show(over(cells, [](const Cell& c) { return std::optional(c.final_ratio); }), "%.3f") + " | " +
             (still ? "0" : show(over(cells, [&](const Cell& c) { return results.gain(c); }), "%.2f")) + " | " + (still ? "-" : reached_text(cells, 0.9, false)) + " | " +
             show(over(cells, [](const Cell& c) { return std::optional(static_cast<double>(c.moved_pages)); }), "%.0f") + " | " + show(over(cells, flushes), "%.0f") + " | " + a_page(flushes) + " | " +
             count("remote_tlb_flush_requests") + " | " + a_page([&](const Cell& c) { return counted(c, "remote_tlb_flush_requests"); }) + " | " + count("remote_tlb_flush") + " | " + count("pf_taken") + " | " +
             (still ? "0" : show(over(cells, [&](const Cell& c) { return results.lost_time(c); }), "%.1f %%", 100)) + " |\n";
    }
  return out +
         "\n- *nested flushes*: KVM's own counters of the VM over the measured time: `remote_tlb_flush_requests`, and of these\n"
         "  `remote_tlb_flush`, which found its CPU in the guest and took it out: fewer than on hardware, since here the CPUs run in turn.\n"
         "  *Faults of nested paging*: `pf_taken`, exits since a page was not in the nested page table, which it leaves when it moves and\n"
         "  when a hint fault is laid for it.\n"
         "- TCG shows how many there are, not what they cost: neither a nested page walk nor a flush takes any of the guest's time. *Work lost*\n"
         "  holds the instructions of the host's kernel for exits, faults and moves.\n"
         "- PML, by which a host sees what its guests write, cannot be run here: TCG does not emulate it.\n"
         "- HyperTier's policies are inside only: they sample where the workload runs.\n\n";
}

}  // namespace

std::string results_markdown(const Results& results, const std::string& pictures, const Extras& extras) {
  std::string out =
      "# Results\n\nWritten by `./run bench --docs` from the cells in `results/data` and those under `build/bench`; do not edit.\n\n"
      "Everything ran in the lab (docs/lab.md): a stock Debian 6.12 kernel in QEMU without hardware\n"
      "virtualisation, time counted in instructions (`--icount`, 2 ns each), 2 CPUs, fast node 256 MiB of which\n"
      "huge pages hold down what a workload is not to have, slow node 640 MiB, a simulated 4 MiB cache. Hit ratios\n"
      "are of the accesses that miss that cache, counted by the simulated memory itself.\n\n"
      "![final hit ratios](" + pictures + "/bench-bars.svg)\n\n![hit ratio over time](" + pictures + "/bench-time.svg)\n\n";

  out += at_a_glance(results);
  out += "## By workload\n\n"
         "- *share of the oracle's gain*: (final - first touch) / (oracle - first touch); the oracle is the best static\n"
         "  placement of the same number of fast pages, known afterwards from each page's true misses (of the last\n"
         "  phase where the hot set moves). `-`: less than 0.02 to gain.\n"
         "- *90 % of the oracle after*: virtual seconds since the start, for each phase, held for two looks. An epoch is 0.5 s.\n"
         "- *moved in vain*: moves whose page was back within 5 s (10 epochs), from looks at all pages every 2 s.\n"
         "- *moved an epoch at the end*: pages moved in the last quarter of the time, from the same looks, per 0.5 s, of the\n"
         "  fast pages that the workload may have.\n"
         "- *flush calls*: calls of `flush_tlb_mm_range` and `arch_tlbbatch_flush` by anybody but the measuring, minus the\n"
         "  rate that the workload has with nothing loaded; *hot page gained*: pages of the oracle's choice with more than\n"
         "  twice the mean of misses that came to be fast; *carried out*: those of tierd, kswapd, kdamond and of the workload that\n"
         "  reached a CPU (tracepoint `tlb_flush`): a call for an address space that is on no CPU does nothing.\n"
         "- *work lost*: operations per virtual second beside first touch. Under icount all CPUs share one clock: it holds\n"
         "  everything that the system does on any CPU, the policy's and the sampler's too, and hint faults.\n"
         "- *modelled time*: instructions at 2e9/s + 80 ns or 250 ns for each miss, per operation, beside first touch.\n"
         "- *s*: samples per usable fast page and epoch. `@sparse`: a sampling period that makes it about 0.0075, what a guest\n"
         "  of 64 GiB, a fifth of it fast, has at 50,000 samples/s; watched for 100 s.\n"
         "  `@abit`: accessed bits in place of samples, `@vpebs+abit`: beside them.\n\n";
  for (const Case& one : cases()) {
    out += "### " + one.name + "\n\n" + one.what + ".\n\n";
    if (!results.any(one.name)) {
      out += "Not run. `./run bench " + one.name + "`\n\n";
      continue;
    }
    double oracle = 0;
    for (const std::string& system : results.systems())
      for (const Cell& cell : results.of(one.name, system)) oracle = std::max(oracle, cell.oracle_ratio);
    out += format("Oracle, computed: %.3f.\n\n|", oracle);
    for (const std::string& head : kHead) out += " " + head + " |";
    out += "\n|";
    for (size_t i = 0; i < kHead.size(); i++) out += "---|";
    out += "\n";
    std::string missing, again;
    for (const std::string& system : results.systems()) {
      const std::vector<Cell>& cells = results.of(one.name, system);
      if (cells.empty()) {
        if (const auto why = unfit(one, system)) {
          missing += "- " + title_of(system) + ": not for this: " + *why + ".\n";
          continue;
        }
        const auto why = results.failure(one.name, system);
        missing += "- " + title_of(system) + (why ? " failed: " + *why : ": not run") + ". `./run bench " + one.name + "/" + system + "`\n";
        continue;
      }
      const Row row = row_of(results, one.name, system);
      out += "|";
      for (const std::string& column : row.columns) out += " " + column + " |";
      out += "\n";
      for (const Cell& cell : cells) again += "- `" + command_of(one.name, system, cell.seed, cell.raw.at("seconds")) + "` (commit " + cell.commit + ")\n";
    }
    for (const std::string& system : results.systems())
      for (const Cell& cell : results.of(one.name, system)) {
        const json& batch = cell.raw.at("windows").back().value("batch", json());
        if (batch.is_null() || cell.seed != results.of(one.name, system).front().seed) continue;
        out += format("\n%s: a batch of %d requests took %.0f us (p50) and %.0f us (p99) of virtual time in the last 2 s.\n", title_of(system).c_str(),
                      batch.at("operations").get<int>(), batch.at("p50_ns").get<double>() / 1000, batch.at("p99_ns").get<double>() / 1000);
      }
    std::map<uint64_t, std::set<std::string>> checksums;
    size_t checked = 0;
    for (const std::string& system : results.systems())
      for (const Cell& cell : results.of(one.name, system))
        if (cell.raw.contains("checksum")) checksums[cell.seed].insert(cell.raw["checksum"].get<std::string>()), checked++;
    for (auto& [seed, sums] : checksums)
      out += format("\nResult of seed %llu in %zu runs: %s\n", (unsigned long long)seed, checked, sums.size() == 1 ? ("checksum " + *sums.begin() + " with every system.").c_str() : "**checksums differ**: memory was lost or corrupted.");
    out += "\n![](" + pictures + "/bench-heat-" + one.name + ".svg)\n\n";
    if (!missing.empty()) out += "Cells that are missing:\n\n" + missing + "\n";
    out += "<details><summary>rerun a cell</summary>\n\n" + again + "\n</details>\n\n";
  }

  out += nested_markdown(results);
  out += "## Flush table\n\nAll flush calls by task, in runs of hotset-2m:\n\n| system | seconds | kernel's own tiering and reclaim | tierd | DAMON | the workload | others |\n|---|---|---|---|---|---|---|\n";
  for (const std::string& system : results.systems())
    for (const Cell& cell : results.of("hotset-2m", system)) {
      uint64_t by[5] = {};
      for (auto& [name, calls] : cell.raw.at("flush_calls").items()) {
        if (name.starts_with("ht-bench") || name == "tierctl") continue;
        const int kind = name.starts_with("kswapd") || name.starts_with("kcompactd") || name.starts_with("khugepaged") ? 0 : name.starts_with("tierd") ? 1 : name.starts_with("kdamond") ? 2 : name == "hotset" ? 3 : 4;
        by[kind] += calls.get<uint64_t>();
      }
      out += format("| %s | %.0f | %llu | %llu | %llu | %llu | %llu |\n", title_of(system).c_str(), cell.raw.at("elapsed_s").get<double>(), (unsigned long long)by[0],
                    (unsigned long long)by[1], (unsigned long long)by[2], (unsigned long long)by[3], (unsigned long long)by[4]);
      break;
    }

  out += "\n" + flush_goals(results) + "\n## Two runs of one seed\n\n";
  if (extras.agreements.empty()) {
    out += "Not run. `./run bench --agree hotset-2m/heattree/1`\n";
  } else {
    out += "| cell | first run | second run | difference of the final hit ratio | largest of a window | within 0.02 |\n|---|---|---|---|---|---|\n";
    for (const Agreement& a : extras.agreements)
      out += format("| %s/%s/%llu | %.4f | %.4f | %.4f | %.4f | %s |\n", a.first.workload.c_str(), a.first.system.c_str(), (unsigned long long)a.first.seed, a.first.final_ratio,
                    a.second.final_ratio, a.final_difference(), a.window_difference(), a.final_difference() <= Agreement::kMost ? "yes" : "**no**");
    out += "\nA window is 2 s. Again: `./run bench --agree WORKLOAD/SYSTEM/SEED`.\n";
  }

  out += "\n## Replay beside live\n\n";
  if (extras.replays.empty()) {
    out += "Not run. `./run bench --record hotset-64k/heattree/1`\n";
  } else {
    out += "The same engine library and the same rules on the recorded samples and mappings, without a VM, scored on the recorded\n"
           "true misses: nothing of the live placement is used but where the run began; what came later is fast where there was room.\n\n"
           "| run | policy | seconds | final hit ratio, live | replayed | difference | whole run, live | replayed | largest of a window of 2 s |\n|---|---|---|---|---|---|---|---|---|\n";
    for (const json& one : extras.replays) {
      double most = 0;
      for (const json& window : one.at("windows")) most = std::max(most, std::abs(window.at("live_hit_ratio").get<double>() - window.at("replayed_hit_ratio").get<double>()));
      const double live = one.at("live_final_hit_ratio"), replayed = one.at("replayed_final_hit_ratio");
      out += format("| %s/%d | %s | %.0f | %.3f | %.3f | %+.3f | %.3f | %.3f | %.3f |\n", one.at("run").get<std::string>().c_str(), one.at("seed").get<int>(), one.at("policy").get<std::string>().c_str(),
                    one.at("seconds").get<double>(), live, replayed, replayed - live, one.at("live_mean_hit_ratio").get<double>(), one.at("replayed_mean_hit_ratio").get<double>(), most);
    }
    out += "\nAgain: `./run bench --record WORKLOAD/SYSTEM/SEED`, then `build/bin/replay --trace build/bench/traces/NAME.trace`.\n";
  }

  out += "\n## Micro figures\n\n";
  const json& micro = extras.micro;
  if (!micro.empty()) {
    out += "| what | figure | goal | holds |\n|---|---|---|---|\n";
    for (const json& entry : micro)
      out += "| " + entry.at("what").get<std::string>() + " | " + entry.at("figure").get<std::string>() + " | " + entry.value("goal", std::string("-")) + " | " +
             (entry.contains("holds") ? entry["holds"].get<bool>() ? "yes" : "**no**" : "-") + " |\n";
    out += "\nAgain: `./run bench micro`.\n";
  } else {
    out += "Not run. `./run bench micro`\n";
  }

  out += "\n## What an epoch costs the engine\n\n";
  if (extras.engine.empty()) {
    out += "Not run. `./run bench engine`\n";
  } else {
    static const std::vector<std::pair<std::string, std::string>> kFamilies = {{"epoch_by_ranges", "ranges, nothing sampled (16 to 16,384)"},
                                                                              {"epoch_by_granules", "2 MiB granules with samples, in 2048 ranges"},
                                                                              {"epoch_by_processes", "processes of 8 mappings each"},
                                                                              {"epoch_by_footprint", "granules mapped, 256 of them with samples"}};
    out += "CPU time of the engine library on the machine that built it (no lab, no policy's own work, no moves):\n\n| by | cost |\n|---|---|\n";
    for (auto& [family, what] : kFamilies) {
      std::string costs;
      for (const json& one : extras.engine) {
        const std::string name = one.value("name", "");
        if (!name.starts_with(family + "/") || one.value("run_type", "") != "iteration") continue;
        costs += (costs.empty() ? "" : ", ") + name.substr(family.size() + 1) + ": " + format("%.0f %s", one.at("cpu_time").get<double>(), one.at("time_unit").get<std::string>().c_str());
      }
      if (!costs.empty()) out += "| " + what + " | " + costs + " |\n";
    }
    for (const json& one : extras.engine)
      if (one.value("name", "").starts_with("estimate_epoch/") && one.contains("estimate_ms")) {
        const std::string name = one["name"];
        const double pages = std::strtod(name.c_str() + name.find('/') + 1, nullptr);
        out += format("| estimated ranges, %.1f GiB, 25,000 samples an epoch | estimate %.1f ms, ranges %.1f ms, folding %.1f ms |\n", pages / 262144, one["estimate_ms"].get<double>(),
                      one["ranges_ms"].get<double>(), one["fold_ms"].get<double>());
      }
    out += "\nAgain: `./run bench engine`.\n";
  }

  out += "\n## Lines of each policy\n\n| file | lines that are neither empty nor comment |\n|---|---|\n";
  for (auto& [file, lines] : extras.policy_lines) out += format("| %s | %zu |\n", file.c_str(), lines);

  if (!extras.notes.empty()) out += "\n" + extras.notes;
  out += "\n## Configuration of the systems\n\n";
  for (const std::string& system : results.systems())
    for (const Case& one : cases())
      if (const auto& cells = results.of(one.name, system); !cells.empty()) {
        out += "- " + title_of(system) + ": `" + cells.front().raw.at("configuration").dump() + "`\n";
        break;
      }
  out += "\nDAMON's `intervals_goal`, `node_mem_used_bp` and allowing filters need a later kernel than 6.12.\n"
         "\n## What the lab can and cannot show\n\n"
         "- No wall time: TCG interprets, so times are virtual (instructions) or modelled, and everything is a ratio of runs\n"
         "  in the same lab. Bandwidth limits, memory-level parallelism and TLB-miss costs are not modelled.\n"
         "- One virtual clock for all CPUs: kernel threads seem 2 to 5 times as expensive as they are beside a second CPU,\n"
         "  for every system alike.\n"
         "- Footprints are below 1 GiB. What decides on larger ones is s (docs/lab.md).\n"
         "- Not bit-exact: the same command drifts by up to 0.01 in the hit ratio; seeds differ by 0.01 to 0.05.\n"
         "- Not run here: real PEBS, CXL memory, PML.\n";
  return out;
}

}  // namespace bench
