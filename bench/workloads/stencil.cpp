// SPDX-License-Identifier: GPL-2.0-or-later
// A 7-point stencil that sweeps over two grids in turn: each page is touched
// once a sweep, and the last one touched is the last one needed again.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.hpp"

namespace workload {
namespace {

class Stencil final : public Kernel {
 public:
  explicit Stencil(const KernelOptions& options)
      : Kernel(options), edge_(static_cast<uint64_t>(std::cbrt(static_cast<double>(options.size / 2 / sizeof(uint64_t))))), sums_(edge_) {
    for (auto& grid : grids_) grid = fresh<uint64_t>(edge_ * edge_ * edge_);
    for (uint64_t z = 0; z < edge_; z++)
      for (uint64_t i = 0; i < edge_ * edge_; i++) sums_[z] += grids_[0][z * edge_ * edge_ + i] = mix(options.seed + z * edge_ * edge_ + i) >> 8;
    std::fill_n(grids_[1], edge_ * edge_ * edge_, 0);
  }

  // An operation is one row of the grid.
  void run(uint64_t operations) override {
    for (uint64_t n = 0; n < operations; n++) {
      row();
      fill_time(edge_ / 8 * 2);
    }
    operations_ += operations;
  }

  // The grid that was written last, as far as the sweep got, against the sums
  // that were taken while it was written.
  bool verify() override {
    for (uint64_t z = 0; z < z_; z++) {
      uint64_t sum = 0;
      for (uint64_t i = 0; i < edge_ * edge_; i++) sum += grids_[1 - from_][z * edge_ * edge_ + i];
      expect(sum == written_[z], &grids_[1 - from_][z * edge_ * edge_]);
    }
    return errors_ == 0;
  }

 private:
  uint64_t at(uint64_t z, uint64_t y, uint64_t x) const { return (z * edge_ + y) * edge_ + x; }

  void row() {
    const uint64_t* in = grids_[from_];
    uint64_t* out = grids_[1 - from_];
    if (written_.empty()) written_.assign(edge_, 0);
    const uint64_t up = z_ + 1 < edge_ ? z_ + 1 : z_, down = z_ ? z_ - 1 : z_;
    const uint64_t south = y_ + 1 < edge_ ? y_ + 1 : y_, north = y_ ? y_ - 1 : y_;
    uint64_t read = 0, wrote = 0;
    for (uint64_t x = 0; x < edge_; x++) {
      uint64_t here = in[at(z_, y_, x)];
      uint64_t east = in[at(z_, y_, x + 1 < edge_ ? x + 1 : x)], west = in[at(z_, y_, x ? x - 1 : x)];
      uint64_t next = (2 * here + east + west + in[at(up, y_, x)] + in[at(down, y_, x)] + in[at(z_, south, x)] + in[at(z_, north, x)]) / 8;
      out[at(z_, y_, x)] = next;
      read += here;
      wrote += next;
    }
    read_ += read;
    written_[z_] += wrote;
    if (++y_ < edge_) return;
    expect(read_ == sums_[z_], &in[at(z_, 0, 0)]);  // the plane is as it was written a sweep ago
    y_ = read_ = 0;
    if (++z_ < edge_) return;
    z_ = 0;
    from_ = 1 - from_;
    sums_ = written_;
    std::fill(written_.begin(), written_.end(), 0);
  }

  uint64_t edge_;
  std::vector<uint64_t> sums_, written_;
  uint64_t* grids_[2];
  int from_ = 0;
  uint64_t y_ = 0, z_ = 0, read_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> make_stencil(const KernelOptions& options) { return std::make_unique<Stencil>(options); }

}  // namespace workload
