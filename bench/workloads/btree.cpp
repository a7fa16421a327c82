// SPDX-License-Identifier: GPL-2.0-or-later
// B+tree lookups, zipf over keys scattered by a hash: hot are the inner nodes
// and single leaves all over the key space. Leaves are built first, so that
// the inner nodes start where memory was left. 5 % of the lookups update.
#include <vector>

#include "kernel.hpp"
#include "zipf.hpp"

namespace workload {
namespace {

constexpr uint64_t kLeafEntries = 42, kFanout = 63;

struct Entry {
  uint64_t key, version, check;
};
struct Leaf {
  Entry entries[kLeafEntries];
  uint64_t unused[2];
};
struct Inner {
  uint64_t keys[kFanout];  // first key below each child
  uint64_t count;
  void* children[kFanout];
  uint64_t unused;
};
static_assert(sizeof(Leaf) == 1024 && sizeof(Inner) == 1024);

class Btree final : public Kernel {
 public:
  explicit Btree(const KernelOptions& options)
      : Kernel(options), leaves_count_(options.size / (sizeof(Leaf) + sizeof(Inner) / kFanout + 1)), keys_(leaves_count_ * kLeafEntries), zipf_(keys_) {
    leaves_ = fresh<Leaf>(leaves_count_);
    for (uint64_t key = 0; key < keys_; key++) leaves_[key / kLeafEntries].entries[key % kLeafEntries] = {key, 0, check(key, 0)};
    std::vector<std::pair<uint64_t, void*>> level;
    for (uint64_t i = 0; i < leaves_count_; i++) level.emplace_back(i * kLeafEntries, &leaves_[i]);
    for (; level.size() > 1; depth_++) {
      std::vector<std::pair<uint64_t, void*>> above;
      auto* nodes = fresh<Inner>(level.size() / kFanout + 1);
      for (uint64_t i = 0; i < level.size(); i++) {
        Inner& node = nodes[i / kFanout];
        if (i % kFanout == 0) above.emplace_back(level[i].first, &node);
        node.keys[node.count] = level[i].first;
        node.children[node.count++] = level[i].second;
      }
      level = std::move(above);
    }
    root_ = level[0].second;
  }

  void run(uint64_t operations) override {
    for (uint64_t n = 0; n < operations; n++) {
      uint64_t key = mix(zipf_.rank(random_) ^ (options_.seed << 40)) % keys_;
      Entry* entry = find(key);
      expect(entry && entry->check == check(key, entry->version), entry);
      if (entry && random_.below(20) == 0) {
        entry->version++;
        entry->check = check(key, entry->version);
        updates_++;
      }
      fill_time(2);
    }
    operations_ += operations;
  }

  bool verify() override {
    uint64_t sum = 0;
    for (uint64_t key = 0; key < keys_; key++) {
      Entry* entry = find(key);
      expect(entry && entry->check == check(key, entry->version), entry);
      if (entry) sum += entry->version;
    }
    return errors_ == 0 && sum == updates_;
  }

 private:
  uint64_t check(uint64_t key, uint64_t version) const { return mix(key ^ options_.seed) ^ version; }

  Entry* find(uint64_t key) {
    void* node = root_;
    for (int level = 0; level < depth_; level++) {
      auto* inner = static_cast<Inner*>(node);
      uint64_t low = 0, high = inner->count;
      while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        (inner->keys[middle] <= key ? low : high) = middle;
      }
      node = inner->children[low];
    }
    auto* leaf = static_cast<Leaf*>(node);
    uint64_t low = 0, high = kLeafEntries;
    while (high - low > 1) {
      uint64_t middle = (low + high) / 2;
      (leaf->entries[middle].key <= key ? low : high) = middle;
    }
    return leaf->entries[low].key == key ? &leaf->entries[low] : nullptr;
  }

  uint64_t leaves_count_, keys_;
  Zipf zipf_;
  Leaf* leaves_ = nullptr;
  void* root_ = nullptr;
  int depth_ = 0;
  uint64_t updates_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> make_btree(const KernelOptions& options) { return std::make_unique<Btree>(options); }

}  // namespace workload
