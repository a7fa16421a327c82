// SPDX-License-Identifier: GPL-2.0-or-later
// An OLTP engine: money goes between rows of a table by way of a hash index,
// and each transfer is logged. 90 % of the rows come from a hot eighth of the
// customers, in stretches of 64 KiB, which `shift` replaces by another one.
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernel.hpp"

namespace workload {
namespace {

constexpr uint64_t kBlockRows = (64 << 10) / 128;

struct Row {
  uint64_t id, balance, check;
  uint64_t unused[13];
};
static_assert(sizeof(Row) == 128);

class Oltp final : public Kernel {
 public:
  explicit Oltp(const KernelOptions& options)
      : Kernel(options), blocks_(options.size / 8 * 7 / (kBlockRows * sizeof(Row))), rows_count_(blocks_ * kBlockRows), log_count_(options.size / 16 / sizeof(Line)) {
    rows_ = fresh<Row>(rows_count_);
    for (uint64_t i = 0; i < rows_count_; i++) rows_[i] = {i, kStart, check(i, kStart), {}};
    index_ = fresh<uint32_t>(rows_count_);
    for (uint64_t i = 0; i < rows_count_; i++) index_[i] = static_cast<uint32_t>(i);
    log_ = fresh<Line>(log_count_);
    order_.resize(blocks_);
    std::iota(order_.begin(), order_.end(), 0);
    for (uint64_t i = blocks_ - 1; i > 0; i--) std::swap(order_[i], order_[random_.below(i + 1)]);
  }

  void run(uint64_t operations) override {
    for (uint64_t n = 0; n < operations; n++) {
      Row& from = row();
      Row& to = row();
      uint64_t amount = random_.below(from.balance / 2 + 1);
      from.balance -= amount;
      from.check = check(from.id, from.balance);
      to.balance += amount;
      to.check = check(to.id, to.balance);
      Line& entry = log_[(operations_ + n) % log_count_];
      entry = {amount, amount ^ (operations_ + n), {}};
      fill_time(5);
    }
    operations_ += operations;
  }

  void shift() override { hot_ = (hot_ + blocks_ / 8) % blocks_; }

  bool verify() override {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < rows_count_; i++) {
      expect(rows_[i].id == i && rows_[i].check == check(i, rows_[i].balance), &rows_[i]);
      sum += rows_[i].balance;
    }
    return errors_ == 0 && sum == rows_count_ * kStart;
  }

 private:
  static constexpr uint64_t kStart = 1000000;
  uint64_t check(uint64_t id, uint64_t balance) const { return mix(id ^ options_.seed) ^ balance; }

  Row& row() {
    const bool hot = random_.below(10) != 0;
    const uint64_t block = order_[hot ? (hot_ + random_.below(blocks_ / 8)) % blocks_ : random_.below(blocks_)];
    Row& found = rows_[index_[block * kBlockRows + random_.below(kBlockRows)]];
    expect(found.check == check(found.id, found.balance), &found);
    return found;
  }

  uint64_t blocks_, rows_count_, log_count_;
  Row* rows_ = nullptr;
  uint32_t* index_ = nullptr;
  Line* log_ = nullptr;
  std::vector<uint64_t> order_;
  uint64_t hot_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> make_oltp(const KernelOptions& options) { return std::make_unique<Oltp>(options); }

}  // namespace workload
