// SPDX-License-Identifier: GPL-2.0-or-later
// kvload: drives a redis-server through pipelines of SET and GET and checks
// every value that comes back.
//
// Keys are chosen as YCSB does: "latest" (workload D: the youngest keys are the
// hottest, 5 % of the operations insert a new one, so the hot set slides) or
// "zipf" (workload B: the same skew, but over keys scattered by a hash, 5 % of
// the operations overwrite). Skew 0.99.
//
// Commands on stdin, one answer each on stdout (a word and a JSON object):
//   dist latest|zipf   choose the keys ("ok")
//   run N              N operations, then "done"
//   go / pause         run until told otherwise ("ok")
//   stats              counters ("stats")
//   stop               answer "stopped" and exit; exit status 1 if a value was wrong
#include <hiredis/hiredis.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <CLI/CLI.hpp>

#include "commands.hpp"

using nlohmann::json;
using workload::Random;

namespace {

struct Options {
  std::string socket = "/tmp/redis.sock";
  uint64_t keys = 250000;
  uint64_t value = 1000;
  uint64_t seed = 1;
  uint64_t pipeline = 32;
  double writes = 0.05;
};

[[noreturn]] void die(const std::string& message) {
  std::fprintf(stderr, "kvload: %s\n", message.c_str());
  std::exit(1);
}

// Ranks 0.. with probability ~ 1/(rank+1)^0.99 (Gray et al., as in YCSB); the
// number of items may grow.
class Zipf {
 public:
  explicit Zipf(uint64_t items) { grow(items); zeta2_ = 1 + std::pow(2, -kTheta); }

  void grow(uint64_t items) {
    for (; items_ < items; items_++) zeta_ += std::pow(static_cast<double>(items_ + 1), -kTheta);
  }

  uint64_t rank(Random& random) const {
    double u = random.unit(), uz = u * zeta_;
    if (uz < 1) return 0;
    if (uz < zeta2_) return 1;
    auto n = static_cast<double>(items_);
    double eta = (1 - std::pow(2 / n, 1 - kTheta)) / (1 - zeta2_ / zeta_);
    auto rank = static_cast<uint64_t>(n * std::pow(eta * u - eta + 1, 1 / (1 - kTheta)));
    return rank < items_ ? rank : items_ - 1;
  }

 private:
  static constexpr double kTheta = 0.99;
  uint64_t items_ = 0;
  double zeta_ = 0, zeta2_ = 0;
};

class Load {
 public:
  explicit Load(const Options& options)
      : options_(options), random_(options.seed), zipf_(options.keys), redis_(redisConnectUnix(options.socket.c_str()), redisFree) {
    if (!redis_ || redis_->err)
      die("no redis-server answers at " + options.socket + (redis_ ? std::string(": ") + redis_->errstr : ""));
    words_ = options.value / sizeof(uint64_t);
    value_.resize(words_);
    fill();
  }

  // Oldest key first: memory fills in the order of the keys' age.
  void fill() {
    for (; keys_ < options_.keys; keys_++) {
      append_set(keys_, 0);
      if (expected_.size() >= options_.pipeline) drain();
    }
    drain();
    versions_.assign(keys_, 0);
  }

  void run(uint64_t operations) {
    while (operations) {
      uint64_t batch = std::min(operations, options_.pipeline);
      for (uint64_t i = 0; i < batch; i++) next_operation();
      drain();
      operations -= batch;
    }
  }

  void distribution(bool latest) { latest_ = latest; }

  json stats() const {
    return {{"operations_total", operations_}, {"reads_total", reads_}, {"inserts_total", inserts_},
            {"updates_total", updates_}, {"keys", keys_}, {"errors_total", errors_}};
  }
  uint64_t errors() const { return errors_; }

 private:
  struct Expected {
    uint64_t key;
    uint32_t version;
    bool read;
  };

  void next_operation() {
    operations_++;
    bool write = random_.unit() < options_.writes;
    if (latest_) {
      if (write) {
        versions_.push_back(0);
        inserts_++;
        append_set(keys_++, 0);
        zipf_.grow(keys_);
        return;
      }
      // The youngest key may still be in the pipeline before us: it is answered first.
      append_get(keys_ - 1 - zipf_.rank(random_));
      return;
    }
    uint64_t key = workload::mix(zipf_.rank(random_) ^ (options_.seed << 32)) % keys_;
    if (!write) return append_get(key);
    updates_++;
    append_set(key, ++versions_[key]);
  }

  void make_value(uint64_t key, uint32_t version) {
    uint64_t x = workload::mix(key ^ (uint64_t{version} << 40) ^ (options_.seed << 56));
    value_[0] = key;
    for (uint64_t i = 1; i < words_; i++) value_[i] = x += 0x9e3779b97f4a7c15ULL;
  }

  void append_set(uint64_t key, uint32_t version) {
    make_value(key, version);
    if (redisAppendCommand(redis_.get(), "SET key%llu %b", static_cast<unsigned long long>(key), value_.data(),
                           words_ * sizeof(uint64_t)) != REDIS_OK)
      die("cannot queue a SET: " + std::string(redis_->errstr));
    expected_.push_back({key, version, false});
  }

  void append_get(uint64_t key) {
    reads_++;
    if (redisAppendCommand(redis_.get(), "GET key%llu", static_cast<unsigned long long>(key)) != REDIS_OK)
      die("cannot queue a GET: " + std::string(redis_->errstr));
    expected_.push_back({key, versions_[key], true});
  }

  void drain() {
    for (const Expected& expected : expected_) {
      void* raw = nullptr;
      if (redisGetReply(redis_.get(), &raw) != REDIS_OK) die("redis-server went away: " + std::string(redis_->errstr));
      std::unique_ptr<redisReply, decltype(&freeReplyObject)> reply(static_cast<redisReply*>(raw), freeReplyObject);
      if (expected.read)
        check_value(expected, *reply);
      else if (reply->type != REDIS_REPLY_STATUS)
        die("SET failed: " + std::string(reply->str ? reply->str : "no text"));
    }
    expected_.clear();
  }

  void check_value(const Expected& expected, const redisReply& reply) {
    make_value(expected.key, expected.version);
    if (reply.type == REDIS_REPLY_STRING && reply.len == words_ * sizeof(uint64_t) &&
        std::memcmp(reply.str, value_.data(), reply.len) == 0)
      return;
    if (errors_++ < 5)
      std::fprintf(stderr, "kvload: key%llu came back wrong (reply type %d, %zu bytes)\n",
                   static_cast<unsigned long long>(expected.key), reply.type, reply.len);
  }

  Options options_;
  Random random_;
  Zipf zipf_;
  std::unique_ptr<redisContext, decltype(&redisFree)> redis_;
  uint64_t words_ = 0, keys_ = 0;
  std::vector<uint64_t> value_;
  std::vector<uint32_t> versions_;  // by key: which SET it saw last
  std::vector<Expected> expected_;  // replies still to come, in order
  bool latest_ = true;
  uint64_t operations_ = 0, reads_ = 0, inserts_ = 0, updates_ = 0, errors_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"kvload: YCSB-like keys against redis-server, driven by commands on stdin"};
  app.add_option("--socket", o.socket, "unix socket of redis-server")->capture_default_str();
  app.add_option("--keys", o.keys, "keys to fill in at start")->check(CLI::Range(1000, 100000000))->capture_default_str();
  app.add_option("--value", o.value, "bytes of a value")->check(CLI::Range(16, 1 << 20))->capture_default_str();
  app.add_option("--seed", o.seed)->capture_default_str();
  app.add_option("--pipeline", o.pipeline, "operations in flight")->check(CLI::Range(1, 4096))->capture_default_str();
  app.add_option("--writes", o.writes, "share of operations that write")->check(CLI::Range(0.0, 1.0))->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) ? 2 : 0;
  }

  Load load(o);
  workload::Commands commands;
  workload::answer("ready", {{"pid", getpid()}, {"keys", o.keys}, {"value_bytes", o.value}});
  bool going = false;
  for (;;) {
    auto command = commands.next(!going);
    if (!command) {
      load.run(o.pipeline);
      continue;
    }
    if (auto operations = workload::argument(*command, "run")) {
      load.run(*operations);
      workload::answer("done", load.stats());
    } else if (*command == "go" || *command == "pause") {
      going = *command == "go";
      workload::answer("ok", load.stats());
    } else if (*command == "dist latest" || *command == "dist zipf") {
      load.distribution(*command == "dist latest");
      workload::answer("ok", load.stats());
    } else if (*command == "stats") {
      workload::answer("stats", load.stats());
    } else if (*command == "stop") {
      workload::answer("stopped", load.stats());
      return load.errors() ? 1 : 0;
    } else {
      workload::answer("error", {{"message", "unknown command: " + *command}});
    }
  }
}
