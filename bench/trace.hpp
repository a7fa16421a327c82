// SPDX-License-Identifier: GPL-2.0-or-later
// A recorded run of one process, epoch by epoch: what it maps, where its pages
// were, the samples that were seen and the true misses of each page. Written by
// `./run bench --record`, read by the replayer, which feeds the engine without
// a VM and scores its placement on the truth.
//
// File: a Header, then records. A record is a RecordHead and `count` 64-bit
// words. What lies between two kEpoch records belongs to one epoch:
//   kMap      pairs (start, end | flags): everything that is mapped and managed,
//             replaces the list before; flags are TIER_RANGE_ANON ... (abi.h),
//             below 4096. Present in the first epoch and after a change.
//   kPlace    page | node: pages whose place is new since the record before, as
//             found at the END of the epoch; node kGone: not resident any more.
//             The first epoch lists every resident page. (In the first epoch
//             this is the start of the run: record before anything moves.)
//   kSamples  address | 1 if it was a store: in the order of their arrival
//   kTruth    page << 16 | misses, at most kMissesMax; a page with more comes
//             several times. page is the page number (address >> 12).
//   kEpoch    length of the epoch in ns of the guest's clock, and those of its
//             misses that went to fast memory; ends it
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "result.hpp"

namespace hypertier::trace {

constexpr char kMagic[8] = {'H', 'T', 'T', 'R', 'A', 'C', 'E', '2'};
constexpr std::uint64_t kGone = 0xfff;
constexpr std::uint64_t kMissesMax = 0xffff;

struct Header {
  char magic[8];
  std::uint64_t seed;
  std::uint64_t period;      // misses per sample
  std::uint64_t fast_pages;  // that the process can have: its fast pages after the fill
  std::uint64_t fast_tier_pages;  // size of the fast node
  std::uint32_t cpus;
  std::uint32_t pid;
  char run[48];  // WORKLOAD/SYSTEM, NUL terminated
};

enum Kind : std::uint32_t { kMap = 1, kPlace, kSamples, kTruth, kEpoch };

struct RecordHead {
  std::uint32_t kind;
  std::uint32_t count;
};

struct Mapping {
  std::uint64_t start, end;
  std::uint32_t flags;
};
struct Place {
  std::uint64_t page;  // number
  std::uint32_t node;  // kGone: not resident
};
struct Misses {
  std::uint64_t page;  // number
  std::uint64_t count;
};
struct Sample {
  std::uint64_t address;
  bool store;
};

struct Epoch {
  std::uint64_t ns = 0;
  std::uint64_t fast_misses = 0;  // of truth, where pages were then
  bool mapped = false;  // mappings are new
  std::vector<Mapping> mappings;
  std::vector<Place> placed;
  std::vector<Sample> samples;
  std::vector<Misses> truth;
};

using File = std::unique_ptr<std::FILE, decltype(&std::fclose)>;

class Writer {
 public:
  static Result<Writer> create(const std::string& path, Header header) {
    File file(std::fopen(path.c_str(), "wb"), std::fclose);
    if (!file) return fail_errno("cannot create " + path, errno);
    std::memcpy(header.magic, kMagic, sizeof kMagic);
    if (std::fwrite(&header, sizeof header, 1, file.get()) != 1) return fail_errno("cannot write " + path, errno);
    return Writer(std::move(file), path);
  }

  Result<> write(const Epoch& epoch) {
    std::vector<std::uint64_t> words;
    if (epoch.mapped) {
      for (const Mapping& m : epoch.mappings) words.insert(words.end(), {m.start, m.end | m.flags});
      put(kMap, words);
    }
    for (const Place& p : epoch.placed) words.push_back(p.page << 12 | p.node);
    put(kPlace, words);
    for (const Sample& s : epoch.samples) words.push_back((s.address & ~1ULL) | s.store);
    put(kSamples, words);
    for (Misses m : epoch.truth)
      for (; m.count; m.count -= std::min(m.count, kMissesMax)) words.push_back(m.page << 16 | std::min(m.count, kMissesMax));
    put(kTruth, words);
    words.insert(words.end(), {epoch.ns, epoch.fast_misses});
    put(kEpoch, words);
    if (std::fflush(file_.get()) || std::ferror(file_.get())) return fail_errno("cannot write " + path_, errno);
    return {};
  }

 private:
  Writer(File file, std::string path) : file_(std::move(file)), path_(std::move(path)) {}

  void put(Kind kind, std::vector<std::uint64_t>& words) {
    if (words.empty()) return;
    RecordHead head{kind, static_cast<std::uint32_t>(words.size())};
    std::fwrite(&head, sizeof head, 1, file_.get());
    std::fwrite(words.data(), sizeof words[0], words.size(), file_.get());
    words.clear();
  }

  File file_;
  std::string path_;
};

class Reader {
 public:
  static Result<Reader> open(const std::string& path) {
    File file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) return fail_errno("cannot open " + path, errno, "./run bench --record writes traces");
    Reader reader(std::move(file), path);
    if (std::fread(&reader.header, sizeof(Header), 1, reader.file_.get()) != 1 ||
        std::memcmp(reader.header.magic, kMagic, sizeof kMagic))
      return fail(path + " is no trace of this version");
    return reader;
  }

  // False at the end of the file.
  Result<bool> next(Epoch& epoch) {
    epoch = {};
    for (RecordHead head; std::fread(&head, sizeof head, 1, file_.get()) == 1;) {
      std::vector<std::uint64_t> words(head.count);
      if (std::fread(words.data(), sizeof words[0], words.size(), file_.get()) != words.size()) break;
      if (head.kind == kEpoch) {
        if (words.size() != 2) return fail(path_ + " is no trace of this version");
        epoch.ns = words[0];
        epoch.fast_misses = words[1];
        return true;
      }
      if (head.kind == kMap) {
        epoch.mapped = true;
        for (std::size_t i = 0; i + 1 < words.size(); i += 2)
          epoch.mappings.push_back({words[i], words[i + 1] & ~0xfffULL, static_cast<std::uint32_t>(words[i + 1] & 0xfff)});
      }
      for (std::uint64_t word : words) {
        if (head.kind == kPlace) epoch.placed.push_back({word >> 12, static_cast<std::uint32_t>(word & 0xfff)});
        if (head.kind == kSamples) epoch.samples.push_back({word & ~1ULL, (word & 1) != 0});
        if (head.kind == kTruth) epoch.truth.push_back({word >> 16, word & kMissesMax});
      }
    }
    return false;  // a run that was cut off ends at its last whole epoch
  }

  Header header{};

 private:
  Reader(File file, std::string path) : file_(std::move(file)), path_(std::move(path)) {}
  File file_;
  std::string path_;
};

}  // namespace hypertier::trace
