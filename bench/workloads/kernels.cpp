// SPDX-License-Identifier: GPL-2.0-or-later
// kernels NAME: one of the small computing kernels, driven by commands on
// stdin, one answer each on stdout (a word and a JSON object):
//   run N    N operations, then "done"; for N: as many as N milliseconds hold
//   shift    another hot set, where the kernel has one ("shifted")
//   stats    counters ("stats")
//   stop     verify, answer "stopped" and exit; exit status 1 if memory was wrong
#include <CLI/CLI.hpp>

#include "kernel.hpp"

using nlohmann::json;
using namespace workload;

int main(int argc, char** argv) {
  const std::map<std::string, std::unique_ptr<Kernel> (*)(const KernelOptions&)> kernels = {
      {"gups", make_gups}, {"btree", make_btree}, {"stencil", make_stencil}, {"xsbench", make_xsbench},
      {"bfs", make_bfs},   {"pagerank", make_pagerank}, {"oltp", make_oltp}, {"sqlite", make_sqlite}};
  KernelOptions options;
  std::string name;
  CLI::App app{"kernels: small computing kernels with a checksum, driven by commands on stdin"};
  app.add_option("name", name, "which")->required()->check(CLI::IsMember(kernels));
  app.add_option("--size", options.size, "footprint, about")->transform(CLI::AsSizeValue(false))->check(CLI::Range(16.0 * (1 << 20), 1e12))->capture_default_str();
  app.add_option("--seed", options.seed)->capture_default_str();
  app.add_option("--filler", options.filler, "instructions for each access that will miss, about")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }

  auto kernel = kernels.at(name)(options);
  auto stats = [&] { return json{{"accesses_total", kernel->operations()}, {"errors_total", kernel->errors()}}; };
  answer("ready", {{"pid", getpid()}});
  constexpr uint64_t kSlice = 256;
  Commands commands;
  for (;;) {
    const std::string command = *commands.next(true);
    if (auto count = argument(command, "run")) {
      kernel->run(*count);
      answer("done", stats());
    } else if (auto ms = argument(command, "for")) {
      for_ms(*ms, [&] { kernel->run(kSlice); });
      answer("done", stats());
    } else if (command == "shift") {
      kernel->shift();
      answer("shifted", stats());
    } else if (command == "stats") {
      answer("stats", stats());
    } else if (command == "stop") {
      const bool ok = kernel->verify();
      json result = stats();
      result["ok"] = ok;
      answer("stopped", result);
      return ok ? 0 : 1;
    } else {
      answer("error", {{"message", "unknown command: " + command}});
    }
  }
}
