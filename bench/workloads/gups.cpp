// SPDX-License-Identifier: GPL-2.0-or-later
// GUPS: read-modify-write of a random line of a large table, all equally hot.
// No placement is better than another: whoever moves pages here moves in vain.
#include "kernel.hpp"

namespace workload {
namespace {

class Gups final : public Kernel {
 public:
  explicit Gups(const KernelOptions& options) : Kernel(options), count_(options.size / sizeof(Line)), lines_(fresh<Line>(count_)) {
    for (uint64_t i = 0; i < count_; i++) lines_[i] = {0, key(i), {}};
  }
  void run(uint64_t operations) override {
    for (uint64_t n = 0; n < operations; n++) {
      uint64_t i = random_.below(count_);
      Line& line = lines_[i];
      expect(line.check == (line.value ^ key(i)), &line);
      line.value++;
      line.check = line.value ^ key(i);
      fill_time();
    }
    operations_ += operations;
  }
  bool verify() override {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count_; i++) {
      expect(lines_[i].check == (lines_[i].value ^ key(i)), &lines_[i]);
      sum += lines_[i].value;
    }
    return errors_ == 0 && sum == operations_;
  }

 private:
  uint64_t key(uint64_t i) const { return mix(options_.seed ^ (i << 8)); }
  uint64_t count_;
  Line* lines_;
};

}  // namespace

std::unique_ptr<Kernel> make_gups(const KernelOptions& options) { return std::make_unique<Gups>(options); }

}  // namespace workload
