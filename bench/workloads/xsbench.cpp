// SPDX-License-Identifier: GPL-2.0-or-later
// XSBench-like lookups: a search in a sorted energy grid, then one row of an
// index (cold, large) and an entry of each nuclide's table. The tables are
// built last: the hot part starts where memory was left.
#include "kernel.hpp"

namespace workload {
namespace {

constexpr uint64_t kNuclides = 12;

struct Point {
  uint64_t energy;
  uint32_t index[kNuclides + 2];
};
static_assert(sizeof(Point) == 64);

struct Section {
  uint64_t value[7];
  uint64_t check;
};

class Xsbench final : public Kernel {
 public:
  explicit Xsbench(const KernelOptions& options)
      : Kernel(options), points_count_(options.size / 8 * 7 / sizeof(Point)), sections_count_(options.size / 8 / sizeof(Section) / kNuclides) {
    points_ = fresh<Point>(points_count_);
    const uint64_t step = ~0ULL / points_count_;
    for (uint64_t i = 0; i < points_count_; i++) {
      points_[i].energy = i * step;
      for (uint64_t n = 0; n < kNuclides; n++) points_[i].index[n] = static_cast<uint32_t>(place(i, n));
    }
    sections_ = fresh<Section>(kNuclides * sections_count_);
    for (uint64_t i = 0; i < kNuclides * sections_count_; i++) {
      for (uint64_t& value : sections_[i].value) value = mix(i);
      sections_[i].check = mix(i ^ options.seed);
    }
  }

  void run(uint64_t operations) override {
    for (uint64_t n = 0; n < operations; n++) lookup(random_.next());
    operations_ += operations;
  }

  bool verify() override {
    for (uint64_t i = 0; i < points_count_; i++)
      for (uint64_t n = 0; n < kNuclides; n++) expect(points_[i].index[n] == place(i, n), &points_[i]);
    for (uint64_t i = 0; i < kNuclides * sections_count_; i++) expect(sections_[i].check == mix(i ^ options_.seed), &sections_[i]);
    return errors_ == 0;
  }

 private:
  uint64_t place(uint64_t point, uint64_t nuclide) const { return mix(point * kNuclides + nuclide) % sections_count_; }

  void lookup(uint64_t energy) {
    uint64_t low = 0, high = points_count_;
    while (high - low > 1) {
      uint64_t middle = (low + high) / 2;
      (points_[middle].energy <= energy ? low : high) = middle;
    }
    for (uint64_t n = 0; n < kNuclides; n++) {
      uint64_t at = n * sections_count_ + points_[low].index[n];
      expect(sections_[at].check == mix(at ^ options_.seed), &sections_[at]);
      fill_time(2);
    }
  }

  uint64_t points_count_, sections_count_;
  Point* points_ = nullptr;
  Section* sections_ = nullptr;
};

}  // namespace

std::unique_ptr<Kernel> make_xsbench(const KernelOptions& options) { return std::make_unique<Xsbench>(options); }

}  // namespace workload
