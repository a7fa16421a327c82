// SPDX-License-Identifier: GPL-2.0-or-later
// scopework: small workloads for the tests of scopes, without huge pages, so that
// a page touched for the first time is one fault.
//
//   steady   touches lines of one region, a quarter of it hot, with a pause between
//            bursts
//   map      the same, and each burst maps, touches and unmaps memory
//   fork     the same, and each burst starts a child that writes to some of the
//            region (copies) and to memory of its own, and ends a few bursts later
//   stream   goes through memory from end to end without a pause, each piece of it
//            unmapped and mapped anew after the last piece
//   compute  touches no memory
//
// Commands on stdin: go / pause ("ok"), stop ("stopped"). map and fork are steady
// while paused, stream and compute rest.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "../../../bench/workloads/commands.hpp"

namespace {

constexpr uint64_t kPage = 4096, kLine = 64;
constexpr uint64_t kPiece = 8 << 20;     // of stream
constexpr uint64_t kKeptMappings = 4;    // of map
constexpr unsigned kBurstMs = 200;
constexpr uint64_t kBurstAccesses = 1000;

struct Options {
  std::string kind;
  uint64_t size = 6 << 20;
  uint64_t more = 512 << 10;  // that map maps, and a child of fork touches, at a time
  uint64_t seed = 1;
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "scopework: %s: %s\n", what, strerror(errno));
  std::exit(1);
}

char* map(uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("cannot map memory");
  return static_cast<char*>(memory);
}

void touch(char* memory, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += kPage) memory[at] = 1;
}

class Work {
 public:
  explicit Work(const Options& options) : options_(options), random_(options.seed) {
    if (options.kind == "stream") {
      pieces_.resize(options.size / kPiece);
      return;
    }
    if (options.kind == "compute") return;
    region_ = map(options.size);
    touch(region_, options.size);
  }

  void step(bool going) {
    if (options_.kind == "stream") return stream();
    if (options_.kind == "compute") return workload::burn(100'000);
    burst();
    if (going && options_.kind == "map") remap();
    if (going && options_.kind == "fork") breed();
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    usleep(kBurstMs * 1000);
  }

 private:
  void burst() {
    for (uint64_t i = 0; i < kBurstAccesses; ++i) {
      const uint64_t within = random_.below(8) ? options_.size / 4 : options_.size;
      auto* word = reinterpret_cast<volatile uint64_t*>(region_ + random_.below(within / kLine) * kLine);
      *word = *word + 1;
    }
  }

  void remap() {
    mapped_.push_back(map(options_.more));
    touch(mapped_.back(), options_.more);
    if (mapped_.size() <= kKeptMappings) return;
    munmap(mapped_.front(), options_.more);
    mapped_.pop_front();
  }

  void breed() {
    if (++bursts_ % 2) return;
    if (fork()) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    touch(region_, options_.size / 8);
    touch(map(options_.more), options_.more);
    usleep(3 * kBurstMs * 1000);
    _exit(0);
  }

  void stream() {
    char*& piece = pieces_[next_++ % pieces_.size()];
    if (piece) munmap(piece, kPiece);
    piece = map(kPiece);
    for (uint64_t at = 0; at < kPiece; at += kLine) {
      *reinterpret_cast<volatile uint64_t*>(piece + at) = at;
      workload::burn(2);
    }
  }

  Options options_;
  workload::Random random_;
  char* region_ = nullptr;
  std::deque<char*> mapped_;
  std::vector<char*> pieces_;
  uint64_t next_ = 0, bursts_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"small workloads for the tests of scopes"};
  app.add_option("kind", options.kind)->required()->check(CLI::IsMember({"steady", "map", "fork", "stream", "compute"}));
  app.add_option("--size", options.size)->transform(CLI::AsSizeValue(false));
  app.add_option("--more", options.more)->transform(CLI::AsSizeValue(false));
  app.add_option("--seed", options.seed);
  CLI11_PARSE(app, argc, argv);
  if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)) die("cannot switch huge pages off");

  Work work(options);
  workload::Commands commands;
  workload::answer("ready", {{"pid", getpid()}});
  bool going = false;
  for (;;) {
    auto command = commands.next((options.kind == "stream" || options.kind == "compute") && !going);
    if (!command) {
      work.step(going);
      continue;
    }
    going = *command == "go";
    const bool stop = *command == "stop";
    workload::answer(stop ? "stopped" : "ok", {{"pid", getpid()}});
    if (stop) return 0;
  }
}
