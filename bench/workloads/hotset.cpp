// SPDX-License-Identifier: GPL-2.0-or-later
// hotset: touches a region of exact size in which pieces of exact size and
// place are hot, and checks every byte group it reads.
//
// Every 64-byte line holds a value and the value combined with a key of the
// line's own, so that a page that shows up in the wrong place is seen at the
// next access, and the values' sum is the number of increments, so that a lost
// write is seen by `verify`.
//
// Commands on stdin, one answer each on stdout (a word and a JSON object):
//   run N    make N accesses, then "done"; for N: as many as N milliseconds hold
//   go       run until told otherwise ("ok"); pause: stop doing so ("ok")
//   shift    another hot set, disjoint from the present one ("shifted")
//   place best   hot pieces to the fast node, as many cold pages out of it ("placed");
//   place worst  the other way round: where slow-hot starts
//   fill N   cold pages to the fast node until N bytes of it are free ("filled")
//   allow    huge pages from now on, where --thp never kept them away ("allowed")
//   stats    counters ("stats"); verify: read every line ("verified")
//   stop     verify, answer "stopped" and exit; exit status 1 if memory was wrong
//
// With --file the region is a mapping of a file: page cache, or shared memory if
// the file is on a tmpfs. With --nested it is the memory of a virtual machine, and what
// runs in there makes the accesses.
#include <fcntl.h>
#include <numa.h>
#include <numaif.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <numeric>
#include <span>
#include <vector>

#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "nested.hpp"

using nlohmann::json;
using workload::burn;
using workload::Random;

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kLine = 64;
constexpr size_t kMoveChunk = 512;    // pages per move_pages call
constexpr uint64_t kAlign = 2 << 20;  // pieces start where granules and huge pages do

struct Line {
  uint64_t value;
  uint64_t check;
  uint64_t unused[6];
};
static_assert(sizeof(Line) == kLine);

struct Options {
  uint64_t size = 384 << 20;
  uint64_t hot = 64 << 20;
  uint64_t piece = 2 << 20;
  double hot_share = 0.9;
  double rmw = 0.2;
  uint64_t seed = 1;
  uint64_t filler = 340;
  std::string thp = "never";
  std::string place = "default";
  std::string file;        // empty: anonymous memory
  std::string map = "shared";
  bool nested = false;
  int fast_node = 0;
  int slow_node = 1;
};

[[noreturn]] void die(const std::string& what, const std::string& hint = {}) {
  std::fprintf(stderr, "hotset: %s%s\n", what.c_str(), errno ? (std::string(": ") + strerror(errno)).c_str() : "");
  if (!hint.empty()) std::fprintf(stderr, "HINT: %s\n", hint.c_str());
  std::exit(1);
}

// Accesses to make and what came of them: all that a nested guest is told.
struct Work {
  Line* lines;
  const uint64_t* order;  // of the pieces, the hot ones first
  uint64_t pieces, hot_pieces, lines_per_piece, hot_below, write_below, filler, seed;
  Random random{0};
  uint64_t accesses;
  uint64_t hot_accesses = 0, writes = 0, errors = 0;
  const Line* wrong = nullptr;  // the last that was

  static uint64_t key(uint64_t seed, uint64_t index) { return workload::mix(seed ^ (index << 8)); }

  void check(const Line& line, uint64_t index) {
    if (line.check != (line.value ^ key(seed, index))) errors++, wrong = &line;
  }

  // One line of each page.
  void look() {
    for (uint64_t index = 0; index < pieces * lines_per_piece; index += kPage / kLine) check(lines[index], index);
  }

  void run() {
    const uint64_t cold_pieces = pieces - hot_pieces;
    for (uint64_t n = 0; n < accesses; n++) {
      bool hot = cold_pieces == 0 || random.next() < hot_below;
      uint64_t piece = order[hot ? random.below(hot_pieces) : hot_pieces + random.below(cold_pieces)];
      uint64_t index = piece * lines_per_piece + random.below(lines_per_piece);
      Line& line = lines[index];
      uint64_t value = line.value;
      check(line, index);
      if (random.next() < write_below) {
        line.value = value + 1;
        line.check = (value + 1) ^ key(seed, index);
        writes++;
      }
      hot_accesses += hot;
      burn(filler);
    }
  }
};

// What the nested guest executes, from a copy: so it calls nothing, and is one piece, which
// a function with a section of its own is.
extern "C" const char __start_nested_guest[], __stop_nested_guest[];
[[noreturn, gnu::section("nested_guest"), gnu::used, gnu::flatten, gnu::noinline, gnu::no_stack_protector]] void in_guest(Work* work) {
  for (;;) {
    work->accesses ? work->run() : work->look();
    asm volatile("hlt" ::: "memory");
  }
}

uint64_t node_free_bytes(int node) {
  long long free_bytes = 0;
  numa_node_size64(node, &free_bytes);
  return static_cast<uint64_t>(free_bytes);
}

class Hotset {
 public:
  explicit Hotset(const Options& options) : options_(options), random_(options.seed) {
    pieces_ = options.size / options.piece;
    hot_pieces_ = options.hot / options.piece;
    lines_per_piece_ = options.piece / kLine;
    map();
    choose({});
    fill();
  }

  json where() const {
    json hot = json::array();
    for (uint64_t i = 0; i < hot_pieces_; i++) hot.push_back(reinterpret_cast<uint64_t>(base_) + order_[i] * options_.piece);
    return {{"pid", getpid()},
            {"start", reinterpret_cast<uint64_t>(base_)},
            {"size_bytes", options_.size},
            {"piece_bytes", options_.piece},
            {"hot", hot}};
  }

  json stats() const {
    return {{"accesses_total", accesses_}, {"hot_accesses_total", hot_accesses_}, {"writes_total", writes_}, {"errors_total", errors_}};
  }

  void run(uint64_t accesses) {
    Work& work = room_ ? room_->work : own_;
    work = {lines_, room_ ? room_->order : order_.data(), pieces_, hot_pieces_, lines_per_piece_, threshold(options_.hot_share),
            threshold(options_.rmw), options_.filler / 32, options_.seed, random_, accesses};
    if (nested_)
      nested_->run();
    else
      work.run();
    random_ = work.random;
    hot_accesses_ += work.hot_accesses;
    writes_ += work.writes;
    if (work.errors) complain(*work.wrong, work.errors);
    accesses_ += accesses;
  }

  void shift() {
    std::vector<bool> was(pieces_);
    for (uint64_t i = 0; i < hot_pieces_; i++) was[order_[i]] = true;
    choose(was);
  }

  json verify() {
    uint64_t sum = 0;
    for (uint64_t index = 0; index < pieces_ * lines_per_piece_; index++) {
      check(lines_[index], index);
      sum += lines_[index].value;
    }
    bool lost = sum != writes_;
    if (lost && errors_ == 0) std::fprintf(stderr, "hotset: %llu increments made, %llu found\n", (unsigned long long)writes_, (unsigned long long)sum);
    return {{"errors_total", errors_}, {"writes_total", writes_}, {"writes_found", sum}, {"ok", errors_ == 0 && !lost}};
  }

  // As many pages come as go, a few at a time: the capacity in use stays what it was.
  json place(bool best) {
    std::vector<void*> hot = pages_of(0, hot_pieces_), cold = pages_of(hot_pieces_, pieces_);
    std::vector<void*> in = on_node(best ? hot : cold, options_.slow_node);
    std::vector<void*> out = on_node(best ? cold : hot, options_.fast_node);
    const size_t count = std::min(in.size(), out.size());
    size_t moved = 0;
    for (size_t first = 0; first < count; first += kMoveChunk) {
      const size_t chunk = std::min(kMoveChunk, count - first);
      moved += move(std::span(out).subspan(first, chunk), options_.slow_node);
      moved += move(std::span(in).subspan(first, chunk), options_.fast_node);
    }
    return {{"asked_pages", 2 * count}, {"moved_pages", moved}};
  }

  // What first touch left free below its watermark, and what was freed since.
  json fill_fast(uint64_t leave_bytes) {
    std::vector<void*> cold = pages_of(hot_pieces_, pieces_);
    std::vector<void*> in = on_node(cold, options_.slow_node);
    size_t moved = 0, first = 0;
    while (first < in.size() && node_free_bytes(options_.fast_node) > leave_bytes) {
      const size_t wanted = (node_free_bytes(options_.fast_node) - leave_bytes) / kPage + 1;
      const size_t chunk = std::min({kMoveChunk, wanted, in.size() - first});
      const size_t came = move(std::span(in).subspan(first, chunk), options_.fast_node);
      if (came == 0) break;  // the kernel gives no more
      moved += came;
      first += chunk;
    }
    return {{"moved_pages", moved}, {"free_bytes", node_free_bytes(options_.fast_node)}};
  }

  void allow() {
    if (madvise(base_, options_.size, MADV_HUGEPAGE)) die("cannot allow huge pages");
  }

 private:
  // What the guest has besides the region, behind it.
  struct Room {
    static constexpr uint64_t kBytes = workload::Nested::kHuge;
    alignas(kPage) char code[kPage];
    Work work;
    uint64_t order[(kBytes - 4 * kPage) / sizeof(uint64_t)];
    alignas(kPage) char stack[2 * kPage];
  };
  static_assert(sizeof(Room) == Room::kBytes);

  static uint64_t threshold(double share) { return static_cast<uint64_t>(share * 0x1p63) * 2; }

  uint64_t key(uint64_t index) const { return Work::key(options_.seed, index); }

  void check(const Line& line, uint64_t index) {
    if (line.check != (line.value ^ key(index))) complain(line, 1);
  }

  void complain(const Line& line, uint64_t errors) {
    errors_ += errors;
    if (errors_ - errors < 5)
      std::fprintf(stderr, "hotset: wrong memory at %p: value %llx check %llx\n", (const void*)&line,
                   (unsigned long long)line.value, (unsigned long long)line.check);
  }

  void map() {
    const uint64_t bytes = options_.size + (options_.nested ? Room::kBytes : 0);
    char* raw = static_cast<char*>(
        mmap(nullptr, bytes + kAlign, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (raw == MAP_FAILED) die("cannot map the region");
    auto start = (reinterpret_cast<uint64_t>(raw) + kAlign - 1) & ~(kAlign - 1);
    base_ = reinterpret_cast<char*>(start);
    lines_ = reinterpret_cast<Line*>(base_);
    munmap(raw, static_cast<size_t>(base_ - raw));
    munmap(base_ + bytes, static_cast<size_t>(raw + kAlign - base_));
    if (!options_.file.empty()) return map_file();
    int advice = options_.thp == "never" ? MADV_NOHUGEPAGE : options_.thp == "always" ? MADV_HUGEPAGE : 0;
    if (advice && madvise(base_, bytes, advice)) die("cannot set the huge page advice");
    if (options_.nested) nest();
  }

  void nest() {
    room_ = new (base_ + options_.size) Room;
    const auto code_bytes = static_cast<size_t>(__stop_nested_guest - __start_nested_guest);
    if (code_bytes > sizeof room_->code || pieces_ > std::size(room_->order)) die("the nested guest does not fit its room", "larger pieces are fewer");
    std::memcpy(room_->code, __start_nested_guest, code_bytes);
    nested_.emplace(base_, options_.size + Room::kBytes);
    nested_->set(room_->code, &room_->work, room_->stack + sizeof room_->stack);
  }

  void map_file() {
    fd_ = open(options_.file.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd_ < 0 || ftruncate(fd_, static_cast<off_t>(options_.size))) die("cannot make " + options_.file);
    const int flags = MAP_FIXED | (options_.map == "shared" ? MAP_SHARED : MAP_PRIVATE);
    if (mmap(base_, options_.size, PROT_READ | PROT_WRITE, flags, fd_, 0) == MAP_FAILED) die("cannot map " + options_.file);
  }

  // order_ lists the pieces, the hot ones first; those of `avoid` stay cold.
  void choose(const std::vector<bool>& avoid) {
    order_.resize(pieces_);
    std::iota(order_.begin(), order_.end(), 0);
    for (uint64_t i = pieces_ - 1; i > 0; i--) std::swap(order_[i], order_[random_.below(i + 1)]);
    if (!avoid.empty())
      std::stable_partition(order_.begin(), order_.end(), [&](uint64_t piece) { return !avoid[piece]; });
    if (room_) std::copy(order_.begin(), order_.end(), room_->order);
  }

  void fill_piece(uint64_t piece) {
    uint64_t first = piece * lines_per_piece_;
    if (fd_ >= 0) return write_piece(piece);
    for (uint64_t index = first; index < first + lines_per_piece_; index++) lines_[index] = {0, key(index), {}};
  }

  // By write(): through the mapping, a private one would get copies of its own.
  void write_piece(uint64_t piece) {
    std::vector<Line> lines(lines_per_piece_);
    for (uint64_t i = 0; i < lines_per_piece_; i++) lines[i] = {0, key(piece * lines_per_piece_ + i), {}};
    const auto written = pwrite(fd_, lines.data(), options_.piece, static_cast<off_t>(piece * options_.piece));
    if (written != static_cast<ssize_t>(options_.piece)) die("cannot write " + options_.file);
  }

  void policy(int mode, int node, uint64_t piece, uint64_t count) {
    unsigned long mask = node < 0 ? 0 : 1UL << node;
    // A mapping's policy says nothing about page cache, the task's does.
    if (fd_ >= 0) {
      if (set_mempolicy(mode, node < 0 ? nullptr : &mask, node < 0 ? 0 : 64)) die("cannot allocate from node " + std::to_string(node));
      return;
    }
    if (mbind(base_ + piece * options_.piece, count * options_.piece, mode, node < 0 ? nullptr : &mask, node < 0 ? 0 : 64, 0))
      die("cannot bind memory to node " + std::to_string(node));
  }

  // slow-hot: all hot pieces on the slow node, cold ones fill the fast node
  // until it overflows. MPOL_PREFERRED spills over at the low watermark,
  // where MPOL_BIND would reclaim and in the end kill.
  void fill() {
    bool placed = options_.place == "slow-hot";
    // With a page faulted in before they are bound, all pieces share one anon_vma
    // and are one mapping again at the end; else each would stay a mapping.
    if (fd_ < 0) *static_cast<volatile char*>(static_cast<void*>(base_)) = 0;
    if (fd_ < 0 && madvise(base_, std::max<uint64_t>(options_.piece, 2 << 20), MADV_DONTNEED)) die("cannot give back the first page");
    for (uint64_t i = 0; i < pieces_; i++) {
      uint64_t piece = order_[i];
      if (placed && i < hot_pieces_)
        policy(MPOL_BIND, options_.slow_node, piece, 1);
      else if (placed)
        policy(MPOL_PREFERRED, options_.fast_node, piece, 1);
      else if (options_.place == "slow" || options_.place == "fast")
        policy(MPOL_PREFERRED, options_.place == "slow" ? options_.slow_node : options_.fast_node, piece, 1);
      fill_piece(piece);
    }
    if (options_.place != "default") policy(MPOL_DEFAULT, -1, 0, pieces_);
    if (nested_) run(0);  // it has all of its memory before anything is measured
    if (fd_ < 0) return;
    if (fsync(fd_)) die("cannot write " + options_.file);
    for (uint64_t at = 0; at < options_.size; at += kPage) (void)*static_cast<volatile char*>(base_ + at);
  }

  std::vector<void*> pages_of(uint64_t from, uint64_t to) const {
    std::vector<void*> pages;
    for (uint64_t i = from; i < to; i++)
      for (uint64_t offset = 0; offset < options_.piece; offset += kPage) pages.push_back(base_ + order_[i] * options_.piece + offset);
    return pages;
  }

  static std::vector<void*> on_node(std::span<void*> pages, int node) {
    std::vector<int> status(pages.size());
    if (!pages.empty() && move_pages(0, pages.size(), pages.data(), nullptr, status.data(), 0)) die("move_pages cannot tell the nodes");
    std::vector<void*> found;
    for (size_t i = 0; i < pages.size(); i++)
      if (status[i] == node) found.push_back(pages[i]);
    return found;
  }

  // How many of them are there now: a page that is held by somebody stays, and
  // so does one that the node has no room for at the moment.
  static size_t move(std::span<void*> pages, int node) {
    std::vector<int> nodes(pages.size(), node), status(pages.size());
    if (!pages.empty() && move_pages(0, pages.size(), pages.data(), nodes.data(), status.data(), MPOL_MF_MOVE) < 0 && errno != ENOMEM)
      die("move_pages failed");
    return on_node(pages, node).size();
  }

  Options options_;
  Random random_;
  Work own_{};
  Room* room_ = nullptr;
  std::optional<workload::Nested> nested_;
  int fd_ = -1;
  char* base_ = nullptr;
  Line* lines_ = nullptr;
  uint64_t pieces_ = 0, hot_pieces_ = 0, lines_per_piece_ = 0;
  std::vector<uint64_t> order_;
  uint64_t accesses_ = 0, hot_accesses_ = 0, writes_ = 0, errors_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"hotset: exact hot pieces in an exact region, driven by commands on stdin"};
  app.add_option("--size", o.size, "region")->transform(CLI::AsSizeValue(false))->capture_default_str();
  app.add_option("--hot", o.hot, "hot part of it")->transform(CLI::AsSizeValue(false))->capture_default_str();
  app.add_option("--piece", o.piece, "size of a hot piece")->transform(CLI::AsSizeValue(false))->capture_default_str();
  app.add_option("--hot-share", o.hot_share, "share of accesses that go to hot pieces")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  app.add_option("--rmw", o.rmw, "share of accesses that also write")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--filler", o.filler, "instructions between two accesses")->capture_default_str();
  app.add_option("--thp", o.thp, "never, always or default")->check(CLI::IsMember({"never", "always", "default"}))->capture_default_str();
  app.add_option("--place", o.place, "where memory starts: slow-hot (hot pieces slow, cold ones fill the fast node), slow, fast, default")
      ->check(CLI::IsMember({"slow-hot", "slow", "fast", "default"}))
      ->capture_default_str();
  app.add_option("--file", o.file, "the region is a mapping of this file, which is made anew");
  app.add_option("--map", o.map, "how it is mapped: shared, private")->check(CLI::IsMember({"shared", "private"}))->capture_default_str();
  app.add_flag("--nested", o.nested, "the accesses are made by a virtual machine (KVM) that has the region as its memory")->excludes("--file");
  app.add_option("--fast-node", o.fast_node)->capture_default_str();
  app.add_option("--slow-node", o.slow_node)->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }
  errno = 0;
  if (o.nested && o.size % workload::Nested::kHuge) die("--nested wants --size in multiples of 2M");
  if (o.piece < kPage || o.piece % kPage) die("--piece must be a multiple of 4096 bytes");
  if (o.size % o.piece || o.hot % o.piece || o.hot == 0 || o.hot > o.size)
    die("--size and --hot must be multiples of --piece, and 0 < hot <= size");
  if (numa_available() < 0 || std::max(o.fast_node, o.slow_node) > numa_max_node())
    die("node " + std::to_string(std::max(o.fast_node, o.slow_node)) + " does not exist", "run it inside the lab: ./run lab -- hotset ...");

  Hotset hotset(o);
  workload::Commands commands;
  json ready = hotset.where();
  ready["fast_free_bytes"] = node_free_bytes(o.fast_node);
  workload::answer("ready", ready);

  // Short enough that a command is answered within a few milliseconds.
  constexpr uint64_t kSlice = 4096;
  bool going = false;
  for (;;) {
    auto command = commands.next(!going);
    if (!command) {
      hotset.run(kSlice);
      continue;
    }
    if (auto accesses = workload::argument(*command, "run")) {
      hotset.run(*accesses);
      workload::answer("done", hotset.stats());
    } else if (auto ms = workload::argument(*command, "for")) {
      workload::for_ms(*ms, [&] { hotset.run(kSlice); });
      workload::answer("done", hotset.stats());
    } else if (*command == "go" || *command == "pause") {
      going = *command == "go";
      workload::answer("ok", hotset.stats());
    } else if (*command == "shift") {
      hotset.shift();
      workload::answer("shifted", hotset.where());
    } else if (*command == "place best" || *command == "place worst") {
      workload::answer("placed", hotset.place(*command == "place best"));
    } else if (auto leave_bytes = workload::argument(*command, "fill")) {
      workload::answer("filled", hotset.fill_fast(*leave_bytes));
    } else if (*command == "allow") {
      hotset.allow();
      workload::answer("allowed", json::object());
    } else if (*command == "stats") {
      workload::answer("stats", hotset.stats());
    } else if (*command == "verify") {
      workload::answer("verified", hotset.verify());
    } else if (*command == "stop") {
      json result = hotset.verify();
      workload::answer("stopped", result);
      return result["ok"].get<bool>() ? 0 : 1;
    } else {
      workload::answer("error", {{"message", "unknown command: " + *command}});
    }
  }
}
