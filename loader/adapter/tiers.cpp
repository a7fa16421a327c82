// SPDX-License-Identifier: GPL-2.0-or-later
#include "adapter/tiers.hpp"

#include <numaif.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <optional>

namespace hypertier {
namespace {

namespace fs = std::filesystem;

constexpr int kNodesMax = 64;  // bits of a mask of ht_tiers
constexpr std::string_view kNoSecondNode = "this machine has memory on one NUMA node only (node ";

std::string list_text(const std::vector<int>& nodes) {
  std::string text;
  for (int node : nodes) text += (text.empty() ? "" : ",") + std::to_string(node);
  return text;
}

bool contains(const std::vector<int>& nodes, int node) {
  return std::ranges::find(nodes, node) != nodes.end();
}

std::vector<int> without(const std::vector<int>& nodes, const std::vector<int>& gone) {
  std::vector<int> rest;
  std::ranges::copy_if(nodes, std::back_inserter(rest), [&](int node) { return !contains(gone, node); });
  return rest;
}

Result<std::vector<int>> given_nodes(const std::string& option, const std::string& text,
                                     const std::vector<int>& with_memory) {
  auto nodes = parse_list(text);
  if (!nodes) return fail(option + ": " + nodes.error().message, nodes.error().hint);
  std::ranges::sort(*nodes);
  for (int node : *nodes)
    if (!contains(with_memory, node))
      return fail(option + " " + text + ": node " + std::to_string(node) + " has no memory here",
                  "nodes with memory: " + list_text(with_memory));
  return nodes;
}

// tier number (the lower the faster) -> its nodes with memory
std::map<int, std::vector<int>> kernel_tiers(const Roots& roots, const std::vector<int>& with_memory) {
  constexpr std::string_view kPrefix = "memory_tier";
  std::map<int, std::vector<int>> tiers;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(roots.sys / "devices/virtual/memory_tiering", error)) {
    std::string name = entry.path().filename();
    if (!name.starts_with(kPrefix) || name.size() == kPrefix.size()) continue;
    int number = 0;
    auto read = std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), number);
    if (read.ec != std::errc() || read.ptr != name.data() + name.size()) continue;
    auto nodes = read_list(entry.path() / "nodelist");
    if (!nodes) continue;
    std::erase_if(*nodes, [&](int node) { return !contains(with_memory, node); });
    if (!nodes->empty()) tiers[number] = *nodes;
  }
  return tiers;
}

// Reads a line of /proc or /sys word by word. A stream for each line would cost more
// than all the rest of an idle epoch.
class Words {
 public:
  explicit Words(std::string_view line) : rest_(line) {}

  // Empty: no more.
  std::string_view next() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t"), rest_.size()));
    const std::string_view word = rest_.substr(0, rest_.find_first_of(" \t"));
    rest_.remove_prefix(word.size());
    return word;
  }

  // The next decimal number, whatever stands before it.
  std::optional<std::uint64_t> number() {
    rest_.remove_prefix(std::min(rest_.find_first_of("0123456789"), rest_.size()));
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc{}) return {};
    rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
    return value;
  }

 private:
  std::string_view rest_;
};

fs::path node_memory(int node, const Roots& roots) {
  return roots.sys / "devices/system/node" / ("node" + std::to_string(node)) / "meminfo";
}

}  // namespace

ht_tiers Tiers::masks() const {
  ht_tiers masks{};
  for (int tier = 0; tier < HT_TIERS; ++tier)
    for (int node : nodes[tier]) masks.nodes[tier] |= 1ULL << node;
  return masks;
}

Result<Tiers> discover_tiers(const TierOverrides& overrides, const Roots& roots) {
  const fs::path node_dir = roots.sys / "devices/system/node";
  auto with_memory = read_list(node_dir / "has_memory");
  if (!with_memory) return std::unexpected(with_memory.error());
  std::erase_if(*with_memory, [](int node) { return node >= kNodesMax; });
  if (with_memory->size() < 2)
    return fail(std::string(kNoSecondNode) + list_text(*with_memory) + "): there is nothing to tier",
                "the slow memory must be online as a node of its own, see numactl --hardware");

  Tiers tiers;
  auto& fast = tiers.nodes[HT_TIER_FAST];
  auto& slow = tiers.nodes[HT_TIER_SLOW];
  if (!overrides.fast_nodes.empty() || !overrides.slow_nodes.empty()) {
    tiers.origin = "settings";
    for (auto [tier, option, text] : {std::tuple(&fast, "--fast-nodes", &overrides.fast_nodes),
                                      std::tuple(&slow, "--slow-nodes", &overrides.slow_nodes)}) {
      if (text->empty()) continue;
      auto nodes = given_nodes(option, *text, *with_memory);
      if (!nodes) return std::unexpected(nodes.error());
      *tier = *nodes;
    }
    if (overrides.fast_nodes.empty()) fast = without(*with_memory, slow);
    if (overrides.slow_nodes.empty()) slow = without(*with_memory, fast);
    for (int node : fast)
      if (contains(slow, node))
        return fail("node " + std::to_string(node) + " is both in --fast-nodes and in --slow-nodes");
    if (fast.empty() || slow.empty())
      return fail(std::string("no node is left for the ") + (fast.empty() ? "fast" : "slow") + " tier",
                  "nodes with memory: " + list_text(*with_memory));
    return tiers;
  }

  if (auto kernel = kernel_tiers(roots, *with_memory); kernel.size() >= 2) {
    tiers.origin = "memory tiers";
    fast = kernel.begin()->second;
    slow = without(*with_memory, fast);
    return tiers;
  }

  auto with_cpu = read_list(node_dir / "has_cpu");
  if (!with_cpu) return std::unexpected(with_cpu.error());
  tiers.origin = "nodes without CPUs";
  for (int node : *with_memory) (contains(*with_cpu, node) ? fast : slow).push_back(node);
  if (fast.empty() || slow.empty())
    return fail("the kernel knows one memory tier only, and every node with memory has CPUs (nodes " +
                    list_text(*with_memory) + ")",
                "name the slow ones: tierd --slow-nodes");
  return tiers;
}

Result<> read_node_memory(int node, const Roots& roots, const std::function<void(std::string_view, std::uint64_t)>& line_of) {
  const fs::path file = node_memory(node, roots);
  std::ifstream in(file);
  if (!in) return fail_errno("cannot read " + file.string(), errno, "is the node still online?");
  // "Node 0 MemTotal:         262144 kB"
  for (std::string line; std::getline(in, line);) {
    Words words(line);
    words.next();
    words.next();
    const std::string_view key = words.next();
    if (const auto kib = words.number()) line_of(key, *kib);
  }
  return {};
}

Result<std::array<TierUse, HT_TIERS>> tier_use(const Tiers& tiers, const Roots& roots) {
  std::array<TierUse, HT_TIERS> use{};
  for (int tier = 0; tier < HT_TIERS; ++tier) {
    for (int node : tiers.nodes[tier]) {
      int found = 0;
      auto read = read_node_memory(node, roots, [&](std::string_view key, std::uint64_t kib) {
        if (key == "MemTotal:") use[tier].capacity_bytes += kib << 10, ++found;
        if (key == "MemFree:") use[tier].free_bytes += kib << 10, ++found;
      });
      if (!read) return std::unexpected(read.error());
      if (found != 2) return fail("cannot understand " + node_memory(node, roots).string() + ": no MemTotal or MemFree");
    }
  }
  return use;
}

void prefer_slow(const Tiers& tiers) {
  constexpr int kPreferredMany = 5;  // MPOL_PREFERRED_MANY, Linux 5.15, not known to libnuma's header
  const unsigned long nodes = tiers.masks().nodes[HT_TIER_SLOW];
  set_mempolicy(kPreferredMany, &nodes, kNodesMax + 1);  // older kernels: as before
}

FastZones zones_of_fast(const Tiers& tiers, const Roots& roots) {
  std::ifstream in(roots.proc / "zoneinfo");
  FastZones zones;
  std::uint64_t low = 0, managed = 0;
  int node = -1;
  // "Node 0, zone    DMA32"; then, among others, "  low  13", "  managed  3840", at the end
  // "  protection: (0, 235, 235)", what a zone keeps for those who cannot use higher ones,
  // and for each CPU "  count: 63".
  for (std::string line; std::getline(in, line);) {
    Words words(line);
    const std::string_view word = words.next();
    if (word == "Node") {
      node = static_cast<int>(words.number().value_or(0));
      low = managed = 0;
    } else if (word == "low") {
      low = words.number().value_or(0);
    } else if (word == "managed") {
      managed = words.number().value_or(0);
    } else if (!managed || !contains(tiers.nodes[HT_TIER_FAST], node)) {
      continue;
    } else if (word == "protection:") {
      std::uint64_t most = 0;
      while (const auto kept = words.number()) most = std::max(most, *kept);
      zones.watermark_pages += low + most;
    } else if (word == "count:") {
      zones.listed_pages += words.number().value_or(0);
    }
  }
  return zones;
}

}  // namespace hypertier
