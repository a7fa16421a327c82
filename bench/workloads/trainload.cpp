// SPDX-License-Identifier: GPL-2.0-or-later
// trainload: liblinear-train on sparse data that it generates, with its model as
// the checksum: the same data give the same model, whoever moves its pages.
//
// Answers "ready" with the trainer's pid when training is under way. Commands on
// stdin, one answer each on stdout (a word and a JSON object):
//   for N    let N milliseconds of it pass, then "done" (finished: it has ended);
//            it counts no operations
//   stop     wait for its end, answer "stopped" with the model's checksum
#include <fcntl.h>
#include <numaif.h>
#include <sys/wait.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <vector>

#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "zipf.hpp"

using nlohmann::json;
using namespace workload;

namespace {

const std::string kData = "/tmp/ht-train.data", kModel = "/tmp/ht-train.model";

struct Options {
  uint64_t seed = 1;
  uint64_t rows = 120000;
  uint64_t features = 4 << 20;
  unsigned per_row = 50;
  std::string epsilon = "0.000001";
};

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "trainload: %s\n", message.c_str());
  std::exit(1);
}

// Rows of words by zipf, scattered by a hash; a row's label follows the hidden
// weights of its words, but for some noise.
void generate(const Options& options) {
  std::ofstream out(kData);
  Random random(options.seed);
  Zipf zipf(options.features);
  std::vector<uint64_t> words;
  std::string line;
  for (uint64_t row = 0; row < options.rows; row++) {
    words.clear();
    int64_t sum = 0;
    for (unsigned i = 0; i < options.per_row; i++) {
      const uint64_t word = mix(zipf.rank(random) ^ (options.seed << 40)) % options.features + 1;
      words.push_back(word);
      sum += static_cast<int64_t>(mix(word) % 2001) - 1000;
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    const bool noise = random.below(10) == 0;
    line = (sum > 0) != noise ? "+1" : "-1";
    for (uint64_t word : words) line += " " + std::to_string(word) + ":1";
    line += "\n";
    out << line;
  }
  if (!out.flush()) die("cannot write " + kData);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"trainload: liblinear-train on generated data, driven by commands on stdin"};
  app.add_option("--seed", options.seed)->capture_default_str();
  app.add_option("--rows", options.rows)->check(CLI::Range(100, 100000000))->capture_default_str();
  app.add_option("--features", options.features)->check(CLI::Range(100, 1000000000))->capture_default_str();
  app.add_option("--per-row", options.per_row, "features of a row, at most")->check(CLI::Range(1, 10000))->capture_default_str();
  app.add_option("--epsilon", options.epsilon, "at which liblinear-train stops")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }
  // The data are in slow memory, and gone when they are read.
  unsigned long slow = 2;
  set_mempolicy(MPOL_PREFERRED, &slow, 64);
  generate(options);
  int progress[2];
  if (pipe2(progress, O_CLOEXEC)) die("no pipe");
  const pid_t pid = fork();
  if (pid == 0) {
    set_mempolicy(MPOL_DEFAULT, nullptr, 0);
    dup2(progress[1], STDOUT_FILENO);
    execlp("liblinear-train", "liblinear-train", "-s", "3", "-e", options.epsilon.c_str(), kData.c_str(), kModel.c_str(), nullptr);
    _exit(127);
  }
  close(progress[1]);
  // It says nothing before its tenth iteration. Afterwards nobody need read it: a pipe holds 64 KiB.
  char dot;
  if (read(progress[0], &dot, 1) != 1) die("liblinear-train does not start; apt-get install liblinear-tools");
  unlink(kData.c_str());
  answer("ready", {{"pid", pid}, {"rows", options.rows}, {"features", options.features}});

  auto finished = [&] {
    siginfo_t info{};
    return waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid;
  };
  Commands commands;
  for (;;) {
    const std::string command = *commands.next(true);
    if (auto ms = argument(command, "for")) {
      for_ms(*ms, [] { usleep(1000); });
      answer("done", {{"finished", finished()}});
    } else if (command == "stop") {
      int status = -1;
      waitpid(pid, &status, 0);
      std::ifstream file(kModel, std::ios::binary);
      uint64_t checksum = 0xcbf29ce484222325, bytes = 0;
      for (std::istreambuf_iterator<char> at(file), end; at != end; ++at, bytes++) checksum = (checksum ^ static_cast<unsigned char>(*at)) * 0x100000001b3;
      char text[24];
      std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(checksum));
      const bool ok = status == 0 && bytes > options.features;  // a weight a line
      answer("stopped", {{"ok", ok}, {"checksum", text}, {"model_bytes", bytes}});
      return ok ? 0 : 1;
    } else {
      answer("error", {{"message", "unknown command: " + command}});
    }
  }
}
