// SPDX-License-Identifier: GPL-2.0-or-later
// SQLite with a database in memory: transactions that take money from one
// account to another and log it, accounts chosen by zipf, scattered. Its page
// cache is the database.
#include <sqlite3.h>

#include <string>

#include "kernel.hpp"
#include "zipf.hpp"

namespace workload {
namespace {

class Statement {
 public:
  Statement(sqlite3* db, const char* sql) : db_(db) {
    if (sqlite3_prepare_v2(db, sql, -1, &statement_, nullptr) != SQLITE_OK) fail();
  }
  ~Statement() { sqlite3_finalize(statement_); }
  Statement(const Statement&) = delete;
  Statement& operator=(const Statement&) = delete;

  // Runs it with these values; true if there is a row.
  bool run(auto... values) {
    sqlite3_reset(statement_);
    int at = 0;
    ((sqlite3_bind_int64(statement_, ++at, static_cast<sqlite3_int64>(values))), ...);
    return next();
  }
  bool next() {
    const int status = sqlite3_step(statement_);
    if (status != SQLITE_ROW && status != SQLITE_DONE) fail();
    return status == SQLITE_ROW;
  }
  uint64_t number(int column) const { return static_cast<uint64_t>(sqlite3_column_int64(statement_, column)); }
  std::string text(int column) const { return reinterpret_cast<const char*>(sqlite3_column_text(statement_, column)); }
  void reset() { sqlite3_reset(statement_); }

 private:
  [[noreturn]] void fail() const {
    std::fprintf(stderr, "kernels: sqlite: %s\n", sqlite3_errmsg(db_));
    std::exit(1);
  }
  sqlite3* db_;
  sqlite3_stmt* statement_ = nullptr;
};

class Sqlite final : public Kernel {
 public:
  // Three accounts fill a page of 4 KiB.
  explicit Sqlite(const KernelOptions& options) : Kernel(options), accounts_(options.size / 4096 * 3), log_(accounts_ / 8), zipf_(accounts_) {
    if (sqlite3_open(":memory:", &db_) != SQLITE_OK) {
      std::fprintf(stderr, "kernels: sqlite: no database in memory\n");
      std::exit(1);
    }
    Statement(db_, "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, proof INTEGER, details BLOB)").run();
    Statement(db_, "CREATE TABLE log (id INTEGER PRIMARY KEY, source INTEGER, target INTEGER, amount INTEGER)").run();
    Statement(db_, "BEGIN").run();
    Statement insert(db_, "INSERT INTO account VALUES (?, ?, ?, zeroblob(1200))");
    for (uint64_t id = 0; id < accounts_; id++) insert.run(id, kStart, proof(id, kStart));
    insert.reset();
    Statement(db_, "COMMIT").run();
  }

  void run(uint64_t operations) override {
    Statement begin(db_, "BEGIN"), commit(db_, "COMMIT");
    Statement read(db_, "SELECT balance, proof FROM account WHERE id = ?");
    Statement write(db_, "UPDATE account SET balance = ?, proof = ? WHERE id = ?");
    Statement log(db_, "INSERT OR REPLACE INTO log VALUES (?, ?, ?, ?)");
    auto balance_of = [&](uint64_t id) {
      const bool found = read.run(id);
      const uint64_t balance = found ? read.number(0) : 0;
      expect(found && read.number(1) == proof(id, balance), db_);
      read.reset();
      return balance;
    };
    for (uint64_t n = 0; n < operations; n++, operations_++) {
      const uint64_t source = account(), target = account();
      if (source == target) continue;
      begin.run();
      const uint64_t from = balance_of(source), to = balance_of(target), amount = random_.below(from / 2 + 1);
      write.run(from - amount, proof(source, from - amount), source);
      write.run(to + amount, proof(target, to + amount), target);
      log.run(operations_ % log_, source, target, amount);
      commit.run();
    }
  }

  bool verify() override {
    Statement all(db_, "SELECT id, balance, proof FROM account ORDER BY id");
    uint64_t count = 0, sum = 0;
    for (bool row = all.run(); row; row = all.next(), count++) {
      expect(all.number(0) == count && all.number(2) == proof(count, all.number(1)), db_);
      sum += all.number(1);
    }
    Statement integrity(db_, "PRAGMA integrity_check");
    return integrity.run() && integrity.text(0) == "ok" && errors_ == 0 && count == accounts_ && sum == accounts_ * kStart;
  }

 private:
  static constexpr uint64_t kStart = 1000000;
  uint64_t proof(uint64_t id, uint64_t balance) const { return mix(id ^ options_.seed) ^ balance; }
  uint64_t account() { return mix(zipf_.rank(random_) ^ (options_.seed << 32)) % accounts_; }

  uint64_t accounts_, log_;
  Zipf zipf_;
  sqlite3* db_ = nullptr;
};

}  // namespace

std::unique_ptr<Kernel> make_sqlite(const KernelOptions& options) { return std::make_unique<Sqlite>(options); }

}  // namespace workload
