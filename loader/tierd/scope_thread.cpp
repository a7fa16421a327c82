// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/scope_thread.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>

namespace hypertier {
namespace {

constexpr std::size_t kDensityEpochs = 20;

}  // namespace

ScopeThread::ScopeThread(Scope& scope, std::shared_ptr<PolicySeat> seat, Epoch epoch)
    : scope_(scope), epoch_(std::move(epoch)), seat_(std::move(seat)), thread_([this] { work(); }) {}

ScopeThread::~ScopeThread() {
  {
    std::lock_guard held(lock_);
    stopping_ = true;
  }
  woken_.notify_all();
  thread_.join();
}

std::shared_ptr<PolicySeat> ScopeThread::seat() const {
  std::lock_guard held(lock_);
  return seat_;
}

void ScopeThread::reseat(std::shared_ptr<PolicySeat> seat) {
  std::lock_guard held(lock_);
  seat_ = std::move(seat);
  hurried_ = true;
  woken_.notify_all();
}

void ScopeThread::hurry() {
  std::lock_guard held(lock_);
  hurried_ = true;
  woken_.notify_all();
}

ScopeThread::Shown ScopeThread::shown() const {
  std::lock_guard held(lock_);
  return shown_;
}

void ScopeThread::work() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock held(lock_);
  auto last = Clock::now();
  auto next = last;
  const auto length = [&] { return std::chrono::milliseconds(seat_->terms().epoch_ms); };
  next += length();
  while (!stopping_) {
    if (woken_.wait_until(held, next, [&] { return stopping_ || hurried_; })) {
      // From the start of the last epoch, not from now: swaps in quick
      // succession would put the next epoch off again and again.
      hurried_ = false;
      next = last + length();
      continue;
    }
    const auto now = Clock::now();
    const std::uint64_t epoch_ns =
        static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count());
    last = now;
    auto seat = seat_;
    held.unlock();
    Outcome outcome = epoch_(scope_, *seat, epoch_ns);
    seat->prepare_default();
    held.lock();
    shown_.error = outcome.error;
    shown_.epoch_errors_total += outcome.error.has_value();
    shown_.empty_epochs_total += outcome.ejected && outcome.ejected->code == "empty_seat";
    if (!outcome.error) {
      densities_.push_back(outcome.density);
      if (densities_.size() > kDensityEpochs) densities_.pop_front();
      shown_.density = std::accumulate(densities_.begin(), densities_.end(), 0.0) / static_cast<double>(densities_.size());
    }
    // An epoch that took longer than its length is not made up for.
    next = std::max(next + length(), Clock::now());
    // Nobody answers any more: the main thread ends this scope, or seats another.
    if (!outcome.seated) woken_.wait(held, [&] { return stopping_ || hurried_; });
  }
}

}  // namespace hypertier
