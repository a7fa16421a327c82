// SPDX-License-Identifier: GPL-2.0-or-later
// kvload: drives a redis-server or a memcached through pipelines of SET and GET and checks
// every value that comes back.
//
// Keys are chosen as YCSB does: "latest" (workload D: the youngest keys are the
// hottest, 5 % of the operations insert a new one, so the hot set slides) or
// "zipf" (workload B: the same skew, but over keys scattered by a hash, 5 % of
// the operations overwrite). Skew 0.99.
//
// Commands on stdin, one answer each on stdout (a word and a JSON object):
//   dist latest|zipf   choose the keys ("ok")
//   run N              N operations, then "done"; for N: as many as N milliseconds hold
//                      ("done" tells how long a batch took, in the guest's clock)
//   go / pause         run until told otherwise ("ok")
//   stats              counters ("stats")
//   stop               answer "stopped" and exit; exit status 1 if a value was wrong
#include <hiredis/hiredis.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>
#include <memory>
#include <vector>

#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "zipf.hpp"

using nlohmann::json;
using workload::Random;
using workload::Zipf;

namespace {

struct Options {
  std::string socket = "/tmp/redis.sock";
  bool memcached = false;
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

// A server that answers in the order of what was asked.
class Server {
 public:
  virtual ~Server() = default;
  virtual void set(uint64_t key, std::string_view value) = 0;
  virtual void get(uint64_t key) = 0;
  // False: a SET that failed, a GET that found nothing. The value is valid
  // until the next call.
  virtual bool reply(bool read, std::string_view& value) = 0;
};

class RedisServer final : public Server {
 public:
  explicit RedisServer(const std::string& socket) : redis_(redisConnectUnix(socket.c_str()), redisFree) {
    if (!redis_ || redis_->err) die("no redis-server answers at " + socket + (redis_ ? std::string(": ") + redis_->errstr : ""));
  }
  void set(uint64_t key, std::string_view value) override {
    if (redisAppendCommand(redis_.get(), "SET key%llu %b", static_cast<unsigned long long>(key), value.data(), value.size()) != REDIS_OK)
      die("cannot queue a SET: " + std::string(redis_->errstr));
  }
  void get(uint64_t key) override {
    if (redisAppendCommand(redis_.get(), "GET key%llu", static_cast<unsigned long long>(key)) != REDIS_OK)
      die("cannot queue a GET: " + std::string(redis_->errstr));
  }
  bool reply(bool read, std::string_view& value) override {
    void* raw = nullptr;
    if (redisGetReply(redis_.get(), &raw) != REDIS_OK) die("redis-server went away: " + std::string(redis_->errstr));
    reply_.reset(static_cast<redisReply*>(raw));
    if (!read) return reply_->type == REDIS_REPLY_STATUS;
    value = {reply_->str, reply_->len};
    return reply_->type == REDIS_REPLY_STRING;
  }

 private:
  std::unique_ptr<redisContext, decltype(&redisFree)> redis_;
  std::unique_ptr<redisReply, decltype(&freeReplyObject)> reply_{nullptr, freeReplyObject};
};

// memcached's text protocol.
class Memcached final : public Server {
 public:
  explicit Memcached(const std::string& path) : fd_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    if (fd_ < 0 || connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address)) die("no memcached answers at " + path);
  }
  ~Memcached() override { close(fd_); }
  void set(uint64_t key, std::string_view value) override {
    char line[64];
    out_.append(line, static_cast<size_t>(std::snprintf(line, sizeof line, "set key%llu 0 0 %zu\r\n", static_cast<unsigned long long>(key), value.size())));
    out_.append(value).append("\r\n");
  }
  void get(uint64_t key) override {
    char line[64];
    out_.append(line, static_cast<size_t>(std::snprintf(line, sizeof line, "get key%llu\r\n", static_cast<unsigned long long>(key))));
  }
  bool reply(bool read, std::string_view& value) override {
    flush();
    const std::string_view line = take_line();
    if (!read) return line == "STORED";
    if (!line.starts_with("VALUE ")) return false;
    const size_t bytes = std::strtoull(line.data() + line.rfind(' '), nullptr, 10);
    value = take(bytes + 2).substr(0, bytes);
    // END\r\n would move the buffer if it were not there yet.
    if (at_ + 5 > in_.size()) {
      value_.assign(value);
      value = value_;
    }
    return take(5) == "END\r\n";
  }

 private:
  void flush() {
    for (std::string_view rest = out_; !rest.empty();) {
      ssize_t sent = write(fd_, rest.data(), rest.size());
      if (sent <= 0) die("memcached went away");
      rest.remove_prefix(static_cast<size_t>(sent));
    }
    out_.clear();
  }
  void more() {
    in_.erase(0, at_);
    at_ = 0;
    char chunk[65536];
    ssize_t got = read(fd_, chunk, sizeof chunk);
    if (got <= 0) die("memcached went away");
    in_.append(chunk, static_cast<size_t>(got));
  }
  std::string_view take(size_t bytes) {
    while (in_.size() - at_ < bytes) more();
    at_ += bytes;
    return std::string_view(in_).substr(at_ - bytes, bytes);
  }
  std::string_view take_line() {
    size_t end;
    while ((end = in_.find("\r\n", at_)) == std::string::npos) more();
    std::string_view line = take(end - at_ + 2);
    return line.substr(0, line.size() - 2);
  }

  int fd_;
  std::string out_, in_, value_;
  size_t at_ = 0;
};

class Load {
 public:
  explicit Load(const Options& options)
      : options_(options), random_(options.seed), zipf_(options.keys) {
    if (options.memcached)
      server_ = std::make_unique<Memcached>(options.socket);
    else
      server_ = std::make_unique<RedisServer>(options.socket);
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
    batch_ns_.clear();
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

  json stats() {
    json batch;
    if (!batch_ns_.empty()) {
      std::sort(batch_ns_.begin(), batch_ns_.end());
      auto at = [&](size_t percent) { return batch_ns_[std::min(batch_ns_.size() - 1, batch_ns_.size() * percent / 100)]; };
      batch = {{"operations", options_.pipeline}, {"p50_ns", at(50)}, {"p99_ns", at(99)}};
    }
    batch_ns_.clear();
    return {{"operations_total", operations_}, {"reads_total", reads_}, {"inserts_total", inserts_},
            {"updates_total", updates_}, {"keys", keys_}, {"errors_total", errors_}, {"batch", batch}};
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
    server_->set(key, {reinterpret_cast<const char*>(value_.data()), words_ * sizeof(uint64_t)});
    expected_.push_back({key, version, false});
  }

  void append_get(uint64_t key) {
    reads_++;
    server_->get(key);
    expected_.push_back({key, versions_[key], true});
  }

  void drain() {
    const uint64_t start = workload::now_ns();
    for (const Expected& expected : expected_) {
      std::string_view value;
      bool ok = server_->reply(expected.read, value);
      if (expected.read)
        check_value(expected, ok, value);
      else if (!ok)
        die("a SET failed");
    }
    batch_ns_.push_back(static_cast<uint32_t>(workload::now_ns() - start));
    expected_.clear();
  }

  void check_value(const Expected& expected, bool ok, std::string_view value) {
    make_value(expected.key, expected.version);
    if (ok && value.size() == words_ * sizeof(uint64_t) &&
        std::memcmp(value.data(), value_.data(), value.size()) == 0)
      return;
    if (errors_++ < 5)
      std::fprintf(stderr, "kvload: key%llu came back wrong (%s, %zu bytes)\n",
                   static_cast<unsigned long long>(expected.key), ok ? "found" : "not found", value.size());
  }

  Options options_;
  Random random_;
  Zipf zipf_;
  std::unique_ptr<Server> server_;
  std::vector<uint32_t> batch_ns_;  // since the last answer
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
  CLI::App app{"kvload: YCSB-like keys against redis-server or memcached, driven by commands on stdin"};
  app.add_option("--socket", o.socket, "unix socket of the server")->capture_default_str();
  app.add_flag("--memcached", o.memcached, "the server is a memcached");
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
    } else if (auto ms = workload::argument(*command, "for")) {
      workload::for_ms(*ms, [&] { load.run(o.pipeline); });
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
