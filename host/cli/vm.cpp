// SPDX-License-Identifier: GPL-2.0-or-later
#include "cli/vm.hpp"

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

// One panel a VM: resident memory of both tiers as areas, targets as dashed lines.
std::string svg_of(const Json& history) {
  constexpr int kWidth = 900, kPanel = 170, kLeft = 90, kTop = 24, kHeight = 120;
  const auto& vms = history["vms"];
  int64_t first = INT64_MAX, last = 0;
  for (const auto& [name, points] : vms.items())
    for (const auto& p : points) first = std::min(first, p[0].get<int64_t>()), last = std::max(last, p[0].get<int64_t>());
  const double span = std::max<double>(1, static_cast<double>(last - first));
  char line[256];
  std::string svg;
  snprintf(line, sizeof line, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%zu\" font-family=\"sans-serif\" font-size=\"11\">\n",
           kWidth, vms.size() * kPanel + 30);
  svg += line;
  svg += "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  int top = kTop;
  for (const auto& [name, points] : vms.items()) {
    double most = 1;
    for (const auto& p : points)
      for (int c = 1; c < 5; c++)
        if (p[static_cast<size_t>(c)].is_number()) most = std::max(most, p[static_cast<size_t>(c)].get<double>());
    auto x = [&](const Json& p) { return kLeft + (static_cast<double>(p[0].get<int64_t>() - first)) / span * (kWidth - kLeft - 20); };
    auto y = [&](double bytes) { return top + kHeight - bytes / most * (kHeight - 10); };
    svg += "<text x=\"8\" y=\"" + std::to_string(top + 4) + "\" font-weight=\"bold\">" + escaped(name) + "</text>\n";
    snprintf(line, sizeof line, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%.0f MiB</text><text x=\"%d\" y=\"%d\" text-anchor=\"end\">0</text>\n", kLeft - 6,
             top + 20, most / (1 << 20), kLeft - 6, top + kHeight);
    svg += line;
    for (int t = 0; t < HT_TIERS; t++) {
      const char* color = t == HT_TIER_FAST ? "#c8102e" : "#1f5fa8";
      for (const bool target : {false, true}) {
        std::string path;
        for (const auto& p : points) {
          const auto& value = p[static_cast<size_t>(1 + t * 2 + target)];
          if (!value.is_number()) continue;
          snprintf(line, sizeof line, "%s%.1f,%.1f ", path.empty() ? "" : "L", x(p), y(value.get<double>()));
          path += line;
        }
        if (path.empty()) continue;
        svg += std::string("<path d=\"M") + path + "\" fill=\"none\" stroke=\"" + color + "\" stroke-width=\"" + (target ? "1\" stroke-dasharray=\"4 3" : "2") + "\"/>\n";
      }
    }
    snprintf(line, sizeof line, "<line x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" stroke=\"#999\"/>\n", kLeft, top + kHeight, kWidth - 20, top + kHeight);
    svg += line;
    top += kPanel;
  }
  snprintf(line, sizeof line, "<text x=\"%d\" y=\"%d\">red: fast tier, blue: slow tier; solid: measured, dashed: target; %.0f s</text>\n</svg>\n", kLeft, top, span / 1000);
  return svg + line;
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
