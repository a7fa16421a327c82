// SPDX-License-Identifier: GPL-2.0-or-later
#include "cli/vm.hpp"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <memory>
#include <thread>

#include <hypertier/abi.h>
#include <hypertier/flex.h>

#include "tierd/protocol.hpp"
#include "tierhostd/daemon.hpp"

namespace hypertier {
namespace {

struct Arguments {
  std::string socket = kHostSocket;
  std::string name;
  uint64_t fast = 0, slow = 0;
  bool hard_cap = false;
  unsigned wait_seconds = 0;
  bool on = false, off = false, forget = false, cap_allowed = false, cap_forbidden = false;
  std::string allocator;
  uint64_t fast_capacity = 0, slow_capacity = 0;
  uint64_t guarantee[2] = {0, 0}, limit[2] = {0, 0}, weight[2] = {0, 0};
  bool has_guarantee[2] = {false, false};
  std::string output = "vm-report.svg";
  std::string directory = "/run/hypertier/vm";
  bool virtio_mem = false;
  uint64_t boot = 512ULL << 20;
};

int report_error(const Error& error, bool json) {
  if (json) puts(error_json(error).dump(2).c_str());
  fprintf(stderr, "tierctl: %s\n", error.message.c_str());
  if (!error.hint.empty()) fprintf(stderr, "HINT: %s\n", error.hint.c_str());
  return 1;
}

Result<Json> ask(const Arguments& a, Json request) {
  auto reply = ask_tierd(a.socket, std::move(request));
  if (!reply && reply.error().err == ECONNREFUSED)
    return fail("tierhostd is not running: nothing listens on " + a.socket, "Start it on the host, as root: tierhostd.");
  return reply;
}

std::string size(const Json& bytes) {
  if (!bytes.is_number()) return "-";
  const double mib = bytes.get<double>() / (1 << 20);
  char text[32];
  if (mib >= 10240) snprintf(text, sizeof text, "%.1f GiB", mib / 1024);
  else snprintf(text, sizeof text, "%.0f MiB", mib);
  return text;
}

// "[#####....|.....]": resident, up to the size, with a mark at the target.
std::string bar(const Json& tier) {
  constexpr int kWidth = 32;
  const double whole = std::max(1.0, tier["size_bytes"].get<double>());
  const int filled = static_cast<int>(tier["resident_bytes"].get<double>() / whole * kWidth + 0.5);
  std::string text(kWidth + 1, '.');
  for (int i = 0; i < filled && i < kWidth; i++) text[static_cast<size_t>(i)] = '#';
  if (tier["target_bytes"].is_number())
    text[static_cast<size_t>(std::min<double>(kWidth, tier["target_bytes"].get<double>() / whole * kWidth + 0.5))] = '|';
  return "[" + text + "]";
}

// A VM's name comes from a command line: no control characters to a terminal.
std::string clean(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = '?';
  return text;
}

void print_vm(const Json& vm) {
  printf("%s  pid %d  %s%s\n", clean(vm["name"]).c_str(), vm["pid"].get<int>(), vm["state"].get<std::string>().c_str(),
         vm["channel"].is_string() ? (", by its " + vm["channel"].get<std::string>()).c_str() : "");
  if (vm["problem"].is_string()) printf("  %s\n", clean(vm["problem"]).c_str());
  for (const auto& tier : vm["tiers"]) {
    printf("  %-4s  %s  %s of %s", tier["role"].get<std::string>().c_str(), bar(tier).c_str(), size(tier["resident_bytes"]).c_str(),
           size(tier["size_bytes"]).c_str());
    if (tier["target_bytes"].is_number()) printf(", target %s", size(tier["target_bytes"]).c_str());
    if (tier["share"].is_object())
      printf(", guarantee %s, limit %s, weight %s", size(tier["share"]["guarantee_bytes"]).c_str(),
             size(tier["share"]["limit_bytes"]).c_str(), tier["share"]["weight"].dump().c_str());
    if (tier["rung"] != "none") printf(", %s", tier["rung"].get<std::string>().c_str());
    if (tier["lie"].get<bool>()) printf(", uses more than it says");
    if (tier["swapped_bytes"].get<uint64_t>()) printf(", %s swapped", size(tier["swapped_bytes"]).c_str());
    puts("");
  }
}

int list(const Arguments& a, bool json) {
  auto reply = ask(a, {{"command", "vm_list"}});
  if (!reply) return report_error(reply.error(), json);
  if (json) return puts((*reply).dump(2).c_str()), 0;
  printf("accounting: %s; qos: %s%s\n", (*reply)["accounting"].get<std::string>().c_str(), (*reply)["qos"].get<bool>() ? "on, " : "off",
         (*reply)["qos"].get<bool>() ? (*reply)["allocator"].get<std::string>().c_str() : "");
  if ((*reply)["qos_error"].is_string()) printf("qos stands still: %s\n", (*reply)["qos_error"].get<std::string>().c_str());
  if ((*reply)["vms"].empty()) puts("no VMs: no QEMU is running");
  for (const auto& vm : (*reply)["vms"]) print_vm(vm);
  return 0;
}

const Json* find(const Json& reply, const std::string& name) {
  for (const auto& vm : reply["vms"])
    if (vm["name"] == name || std::to_string(vm["pid"].get<int>()) == name) return &vm;
  return nullptr;
}

Error no_vm(const std::string& name) { return {"there is no VM \"" + name + "\"", "tierctl vm list shows those that run.", 0}; }

int show(const Arguments& a, bool json) {
  auto reply = ask(a, {{"command", "vm_list"}});
  if (!reply) return report_error(reply.error(), json);
  const Json* vm = find(*reply, a.name);
  if (!vm) return report_error(no_vm(a.name), json);
  if (json) {
    Json out;
    out["schema"] = kSchema;
    out["vm"] = *vm;
    puts(out.dump(2).c_str());
  } else {
    print_vm(*vm);
  }
  return 0;
}

int set(const Arguments& a, bool json) {
  if (!a.fast && !a.slow) {
    fprintf(stderr, "tierctl: give --fast, --slow or both\n");
    return 2;
  }
  if (a.hard_cap)
    fprintf(stderr, "tierctl: warning: with a hard cap the VM is killed (SIGBUS) as soon as its guest touches more than that.\n");
  Json request{{"command", "vm_set"}, {"name", a.name}, {"hard_cap", a.hard_cap}};
  if (a.fast) request["fast_bytes"] = a.fast;
  if (a.slow) request["slow_bytes"] = a.slow;
  auto reply = ask(a, request);
  if (!reply) return report_error(reply.error(), json);
  Json vm = (*reply)["vm"];
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(a.wait_seconds);
  auto obeyed = [](const Json& v) {
    for (const auto& tier : v["tiers"])
      if (tier["resident_bytes"].get<uint64_t>() > tier["target_bytes"].get<uint64_t>() + HT_GRANULE_SIZE) return false;
    return true;
  };
  while (a.wait_seconds && !obeyed(vm)) {
    if (std::chrono::steady_clock::now() >= end)
      return report_error({"VM " + a.name + " still holds more than its target after " + std::to_string(a.wait_seconds) + " s",
                           "The guest may need the memory or refuse; tierctl vm show " + a.name + " goes on showing it.", 0}, json);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    auto now = ask(a, {{"command", "vm_list"}});
    if (!now) return report_error(now.error(), json);
    const Json* found = find(*now, a.name);
    if (!found) return report_error(no_vm(a.name), json);
    vm = *found;
  }
  if (json) {
    Json out;
    out["schema"] = kSchema;
    out["vm"] = vm;
    puts(out.dump(2).c_str());
  } else {
    print_vm(vm);
  }
  return 0;
}

int qos_command(const Arguments& a, bool json) {
  Json request{{"command", "vm_qos"}};
  if (a.on || a.off) request["on"] = a.on;
  if (!a.allocator.empty()) request["allocator"] = a.allocator;
  if (a.fast_capacity) request["fast_capacity_bytes"] = a.fast_capacity;
  if (a.slow_capacity) request["slow_capacity_bytes"] = a.slow_capacity;
  if (!a.name.empty()) {
    request["name"] = a.name;
    if (a.forget) request["forget"] = true;
    if (a.cap_allowed || a.cap_forbidden) request["cap_allowed"] = a.cap_allowed;
    for (int t = 0; t < HT_TIERS; t++) {
      const std::string prefix = t == HT_TIER_FAST ? "fast" : "slow";
      if (a.has_guarantee[t]) request[prefix + "_guarantee_bytes"] = a.guarantee[t];
      if (a.limit[t]) request[prefix + "_limit_bytes"] = a.limit[t];
      if (a.weight[t]) request[prefix + "_weight"] = a.weight[t];
    }
  }
  auto reply = ask(a, request);
  if (!reply) return report_error(reply.error(), json);
  if (json) return puts((*reply).dump(2).c_str()), 0;
  printf("qos: %s, allocator %s, capacity %s fast, %s slow\n", (*reply)["qos"].get<bool>() ? "on" : "off",
         (*reply)["allocator"].get<std::string>().c_str(), size((*reply)["fast_capacity_bytes"]).c_str(),
         size((*reply)["slow_capacity_bytes"]).c_str());
  for (const auto& vm : (*reply)["vms"]) print_vm(vm);
  return 0;
}

int events(const Arguments& a, bool json) {
  auto reply = ask(a, {{"command", "vm_history"}});
  if (!reply) return report_error(reply.error(), json);
  if (json) {
    Json out;
    out["schema"] = kSchema;
    out["events"] = (*reply)["events"];
    return puts(out.dump(2).c_str()), 0;
  }
  for (const auto& e : (*reply)["events"]) {
    const time_t seconds = e["time_ms"].get<int64_t>() / 1000;
    char when[16];
    strftime(when, sizeof when, "%H:%M:%S", localtime(&seconds));
    printf("%s  %-12s %-5s %-12s %s\n", when, clean(e["vm"]).c_str(), e["tier"].is_string() ? e["tier"].get<std::string>().c_str() : "",
           e["event"].get<std::string>().c_str(), clean(e["text"]).c_str());
  }
  return 0;
}

std::string escaped(const std::string& raw) {
  std::string text;
  for (char c : clean(raw)) text += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return text;
}

// One panel a VM, a row a tier: resident memory as an area, the target as a dashed
// line of steps, and what was out of the ordinary as marks.
std::string svg_of(const Json& history) {
  constexpr int kWidth = 900, kLeft = 110, kRight = 24, kRow = 56, kGap = 10, kTitle = 20, kBetween = 18, kTop = 40, kAxis = 34;
  constexpr int kPanel = kTitle + HT_TIERS * (kRow + kGap) + kBetween;
  constexpr double kPlot = kWidth - kLeft - kRight;
  constexpr const char* kColors[HT_TIERS] = {"#c8102e", "#1f5fa8"};
  const auto& vms = history["vms"];
  int64_t first = INT64_MAX, last = 0;
  for (const auto& [name, points] : vms.items())
    for (const auto& p : points) first = std::min(first, p[0].get<int64_t>()), last = std::max(last, p[0].get<int64_t>());
  const double span_s = std::max<double>(1, static_cast<double>(last - first) / 1000);
  const auto x = [&](const Json& time_ms) { return kLeft + static_cast<double>(time_ms.get<int64_t>() - first) / 1000 / span_s * kPlot; };
  std::string svg;
  const auto add = [&svg]<class... T>(const char* format, T... values) {
    char line[512];
    snprintf(line, sizeof line, format, values...);
    svg += line;
  };
  const int bottom = kTop + static_cast<int>(vms.size()) * kPanel;
  add("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"11\">\n", kWidth, bottom + kAxis);
  svg += "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  add("<rect x=\"%d\" y=\"12\" width=\"14\" height=\"10\" fill=\"#bbb\"/><text x=\"%d\" y=\"21\">measured</text>"
      "<path d=\"M%d,17h24\" stroke=\"#333\" stroke-dasharray=\"4 3\"/><text x=\"%d\" y=\"21\">target</text>"
      "<path d=\"M%d,13l4,8h-8z\" fill=\"#e08000\"/><text x=\"%d\" y=\"21\">what tierctl vm events tells</text>\n",
      kLeft, kLeft + 20, kLeft + 90, kLeft + 120, kLeft + 180, kLeft + 190);
  // About eight ticks of a round number of seconds.
  int step = 1;
  for (const int s : {1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400})
    if (step = s; span_s / s <= 9) break;
  for (int s = 0; s <= span_s; s += step) {
    const double at = kLeft + s / span_s * kPlot;
    add("<line x1=\"%.1f\" y1=\"%d\" x2=\"%.1f\" y2=\"%d\" stroke=\"#e4e4e4\"/><text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d s</text>\n", at, kTop, at,
        bottom, at, bottom + 16, s);
  }
  int top = kTop;
  for (const auto& [name, points] : vms.items()) {
    svg += "<text x=\"8\" y=\"" + std::to_string(top + 13) + "\" font-weight=\"bold\">" + escaped(name) + "</text>\n";
    for (int t = 0; t < HT_TIERS; t++) {
      const auto measured = static_cast<size_t>(1 + 2 * t), target = measured + 1;
      const int row = top + kTitle + t * (kRow + kGap), base = row + kRow;
      double most = 1;
      for (const auto& p : points)
        for (const size_t column : {measured, target})
          if (p[column].is_number()) most = std::max(most, p[column].get<double>());
      const auto y = [&](const Json& bytes) { return base - bytes.get<double>() / most * kRow; };
      const char* color = kColors[t];
      add("<text x=\"8\" y=\"%d\" fill=\"%s\">%s</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">0</text>\n",
          row + kRow / 2 + 4, color, t == HT_TIER_FAST ? "fast tier" : "slow tier", kLeft - 6, row + 9, size(most).c_str(), kLeft - 6, base);
      add("<line x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" stroke=\"#999\"/>\n", kLeft, base, kWidth - kRight, base);
      std::string area, steps;
      char line[96];
      double before = 0;
      for (const auto& p : points) {
        snprintf(line, sizeof line, "L%.1f,%.1f", x(p[0]), y(p[measured]));
        area += line;
        if (!p[target].is_number()) continue;
        if (steps.empty()) snprintf(line, sizeof line, "M%.1f,%.1f", x(p[0]), y(p[target]));
        else snprintf(line, sizeof line, "L%.1f,%.1fL%.1f,%.1f", x(p[0]), before, x(p[0]), y(p[target]));
        steps += line;
        before = y(p[target]);
      }
      if (points.empty()) continue;
      snprintf(line, sizeof line, "M%.1f,%d", x(points.front()[0]), base);
      svg += std::string("<path d=\"") + line + area;
      snprintf(line, sizeof line, "L%.1f,%dZ", x(points.back()[0]), base);
      svg += std::string(line) + "\" fill=\"" + color + "\" fill-opacity=\"0.35\" stroke=\"" + color + "\"/>\n";
      if (!steps.empty()) svg += "<path d=\"" + steps + "\" fill=\"none\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>\n";
      double label_end = 0;
      for (const auto& e : history["events"]) {
        const std::string event = e["event"];
        const bool here = e["vm"] == name && (e["tier"] == (t == HT_TIER_FAST ? "fast" : "slow") || (e["tier"].is_null() && t == HT_TIER_FAST));
        if (!here || event == "target" || event == "set" || event == "found" || event == "reachable" || e["time_ms"].get<int64_t>() < first) continue;
        const double at = std::min(x(e["time_ms"]), static_cast<double>(kWidth - kRight));
        add("<path d=\"M%.1f,%dl4,8h-8z\" fill=\"#e08000\"><title>", at, row - 9);
        // Where there is room; the mark itself always says it when it is pointed at.
        svg += escaped(event + ": " + e["text"].get<std::string>()) + "</title></path>";
        if (at > label_end && at < kWidth - 80) {
          add("<text x=\"%.1f\" y=\"%d\" font-size=\"9\">%s</text>", at + 6, row - 2, event.c_str());
          label_end = at + 14 + 5.5 * static_cast<double>(event.size());
        }
        svg += "\n";
      }
    }
    top += kPanel;
  }
  return svg + "</svg>\n";
}

int report(const Arguments& a, bool json) {
  Json request{{"command", "vm_history"}};
  if (!a.name.empty()) request["name"] = a.name;
  auto reply = ask(a, request);
  if (!reply) return report_error(reply.error(), json);
  if (json) return puts((*reply).dump(2).c_str()), 0;
  if ((*reply)["vms"].empty()) return report_error(no_vm(a.name), json);
  std::ofstream file(a.output);
  file << svg_of(*reply) << std::flush;
  if (!file) return report_error({"cannot write " + a.output, "Give another place with -o.", 0}, json);
  printf("%s\n", a.output.c_str());
  return 0;
}

int metrics(const Arguments& a, bool json) {
  auto reply = ask(a, {{"command", "vm_metrics"}});
  if (!reply) return report_error(reply.error(), json);
  fputs(json ? ((*reply).dump(2) + "\n").c_str() : (*reply)["text"].get<std::string>().c_str(), stdout);
  return 0;
}

int qemu_args(const Arguments& a, bool json) {
  // A comma in an option is written twice.
  const std::string base = a.directory + "/" + a.name;
  if (base.find_first_of(", \t\n'\"") != std::string::npos)
    return report_error({"names and directories with spaces, quotes or commas are not supported here", "Choose a plain name.", 0}, json);
  // A guest plugs whole memory blocks.
  constexpr uint64_t kBlock = 128ULL << 20;
  if (a.virtio_mem && (a.boot >= a.fast || a.boot >= a.slow || (a.fast - a.boot) % kBlock || (a.slow - a.boot) % kBlock))
    return report_error({"with --boot " + size(a.boot) + " the tiers cannot be divided: what is plugged is a multiple of 128 MiB",
                         "Give sizes that are larger than --boot by multiples of 128 MiB.", 0}, json);
  const auto mib = [](uint64_t bytes) { return std::to_string(bytes >> 20) + "M"; };
  const auto file = [&](const std::string& tier, const std::string& name, uint64_t bytes) {
    return "memory-backend-file,id=" + tier + (name == "memory" ? "" : "-" + name) + ",mem-path=" + base + "/" + tier + "/" + name + ",size=" + mib(bytes) + ",share=on,align=2M";
  };
  std::vector<std::string> arguments{
      "-name", a.name,
      "-m", a.virtio_mem ? mib(2 * a.boot) + ",maxmem=" + mib(a.fast + a.slow) : mib(a.fast + a.slow),
      "-object", file("fast", "memory", a.virtio_mem ? a.boot : a.fast),
      "-object", file("slow", "memory", a.virtio_mem ? a.boot : a.slow),
      "-numa", "node,nodeid=0,cpus=0-1,memdev=fast",
      "-numa", "node,nodeid=1,memdev=slow",
      "-numa", "dist,src=0,dst=1,val=20",
      "-smp", "2",
      "-qmp", "unix:" + base + "/qmp,server=on,wait=off"};
  std::vector<std::string> more;
  if (a.virtio_mem)
    more = {"-object", file("fast", "plug", a.fast - a.boot),
            "-object", file("slow", "plug", a.slow - a.boot),
            "-device", "virtio-mem-pci,id=vmem-fast,memdev=fast-plug,node=0,requested-size=" + mib(a.fast - a.boot),
            "-device", "virtio-mem-pci,id=vmem-slow,memdev=slow-plug,node=1,requested-size=" + mib(a.slow - a.boot)};
  else
    more = {"-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on",
            "-device", "virtio-serial-pci",
            "-chardev", "socket,id=flex,path=" + base + "/agent,server=on,wait=off",
            "-device", std::string("virtserialport,chardev=flex,name=") + HF_AGENT_PORT};
  arguments.insert(arguments.end(), more.begin(), more.end());
  const std::vector<std::string> before{
      "mkdir -p " + base + "/fast " + base + "/slow",
      "mount -t tmpfs -o size=" + mib(a.fast) + ",mpol=bind:HOST_FAST_NODE tmpfs " + base + "/fast",
      "mount -t tmpfs -o size=" + mib(a.slow) + ",mpol=bind:HOST_SLOW_NODE tmpfs " + base + "/slow"};
  // So that what is plugged can be unplugged.
  const std::string kernel = "memhp_default_state=online_movable";
  if (json) {
    Json out;
    out["schema"] = kSchema;
    out["arguments"] = arguments;
    out["guest_kernel_arguments"] = a.virtio_mem ? Json::array({kernel}) : Json::array();
    out["commands_before"] = before;
    return puts(out.dump(2).c_str()), 0;
  }
  puts("# Before the VM starts (replace HOST_*_NODE by the host's nodes; leave mpol out to try it on one node):");
  for (const auto& b : before) puts(b.c_str());
  if (a.virtio_mem) printf("# In the guest, on its kernel's command line:\n# %s\n", kernel.c_str());
  puts("# Options of QEMU:");
  for (size_t i = 0; i < arguments.size(); i += 2) printf("%s %s%s\n", arguments[i].c_str(), arguments[i + 1].c_str(), i + 2 < arguments.size() ? " \\" : "");
  return 0;
}

}  // namespace

void add_vm_commands(CLI::App& app, const bool& json, std::function<int()>& run) {
  auto a = std::make_shared<Arguments>();
  CLI::App* vm = app.add_subcommand("vm", "virtual machines of this host and their tiers (asks tierhostd)");
  vm->require_subcommand(1);
  vm->fallthrough();
  vm->add_option("--host-socket", a->socket, "where tierhostd listens")->capture_default_str();
  const auto verb = [&](const char* name, const char* text, int (*command)(const Arguments&, bool)) {
    CLI::App* sub = vm->add_subcommand(name, text);
    sub->fallthrough();
    sub->callback([a, &json, &run, command] { run = [a, &json, command] { return command(*a, json); }; });
    return sub;
  };
  const CLI::AsSizeValue bytes(false);  // 2G = 2 GiB
  verb("list", "every VM with its tiers", list);
  auto* sub = verb("show", "one VM", show);
  sub->add_option("name", a->name, "name or pid")->required();
  sub = verb("set", "what a VM is to have of each tier", set);
  sub->add_option("name", a->name, "name or pid")->required();
  sub->add_option("--fast", a->fast, "memory of the fast tier")->transform(bytes)->type_name("SIZE");
  sub->add_option("--slow", a->slow, "memory of the slow tier")->transform(bytes)->type_name("SIZE");
  sub->add_option("--wait", a->wait_seconds, "until it is measured, at most so many seconds")->type_name("SECONDS");
  sub->add_flag("--hard-cap", a->hard_cap, "shrink the tmpfs too, if no more is in use: a VM that touches more later is killed");
  sub = verb("qos", "guarantees, limits and weights; who decides", qos_command);
  sub->add_option("name", a->name, "name of a VM, running or not");
  auto* on = sub->add_flag("--on", a->on, "let the allocator set the targets");
  sub->add_flag("--off", a->off, "leave the targets as they are")->excludes(on);
  sub->add_option("--allocator", a->allocator, "max-min, drf, pool, slowdown or p-states");
  sub->add_option("--fast-capacity", a->fast_capacity, "fast memory of the host for VMs")->transform(bytes)->type_name("SIZE");
  sub->add_option("--slow-capacity", a->slow_capacity, "slow memory of the host for VMs")->transform(bytes)->type_name("SIZE");
  for (int t = 0; t < HT_TIERS; t++) {
    const std::string tier = t == HT_TIER_FAST ? "fast" : "slow";
    sub->add_option("--" + tier + "-guarantee", a->guarantee[t], "never less than this")
        ->transform(bytes)->type_name("SIZE")->each([a, t](const std::string&) { a->has_guarantee[t] = true; });
    sub->add_option("--" + tier + "-limit", a->limit[t], "never more than this")->transform(bytes)->type_name("SIZE");
    sub->add_option("--" + tier + "-weight", a->weight[t], "its part of what is left");
  }
  auto* allow = sub->add_flag("--allow-cap", a->cap_allowed, "the ladder may cap its tmpfs: a guest that touches more is killed");
  sub->add_flag("--forbid-cap", a->cap_forbidden, "it may not")->excludes(allow);
  sub->add_flag("--forget", a->forget, "drop the VM's share");
  verb("events", "what was found, ordered, refused", events);
  sub = verb("report", "timeline of every VM as SVG", report);
  sub->add_option("name", a->name, "only this VM");
  sub->add_option("-o,--output", a->output, "where to")->capture_default_str();
  verb("metrics", "Prometheus text", metrics);
  sub = verb("qemu-args", "the options of QEMU that a two-tier VM needs", qemu_args);
  sub->add_option("name", a->name, "name of the VM")->required();
  sub->add_option("--fast", a->fast, "most it may have of the fast tier")->transform(bytes)->type_name("SIZE")->required();
  sub->add_option("--slow", a->slow, "most it may have of the slow tier")->transform(bytes)->type_name("SIZE")->required();
  sub->add_flag("--virtio-mem", a->virtio_mem, "plug and unplug instead of balloons: for guests without hyperflex.ko");
  sub->add_option("--boot", a->boot, "with --virtio-mem: memory of each tier that is there from boot and stays")
      ->transform(bytes)->type_name("SIZE")->default_str("512M");
  sub->add_option("--directory", a->directory, "where its tmpfs mounts go")->capture_default_str();
}

}  // namespace hypertier
