// SPDX-License-Identifier: GPL-2.0-or-later
// What is known of a policy object without the kernel, and what tierd keeps of
// it over a restart.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "policy/policy.hpp"
#include "tierd/protocol.hpp"
#include "tierd/state.hpp"

namespace hypertier {
namespace {

std::string bytes_of(const std::string& name) {
  const std::string path = std::string(TEST_POLICIES) + "/" + name + ".bpf.o";
  Fd file(open(path.c_str(), O_RDONLY));
  auto bytes = read_policy_file(file.get(), path);
  EXPECT_TRUE(bytes) << (bytes ? "" : bytes.error().message);
  return bytes ? *bytes : std::string();
}

PolicyObject settings_policy() {
  auto policy = PolicyObject::open(bytes_of("settings"), "settings.bpf.o");
  EXPECT_TRUE(policy) << (policy ? "" : policy.error().message);
  return std::move(*policy);
}

std::string value_of(const PolicyObject& policy, const std::string& key) {
  for (const auto& setting : policy.info().settings)
    if (setting.key == key) return setting.value;
  return "none";
}

TEST(PolicyObject, TellsWhatItIs) {
  const auto policy = settings_policy();
  EXPECT_EQ(policy.info().name, "settings");
  EXPECT_EQ(policy.info().epoch_ms, 50U);
  EXPECT_EQ(policy.info().callbacks, std::vector<std::string>{"classify"});
  EXPECT_EQ(policy.info().settings.size(), 4U);
  EXPECT_EQ(value_of(policy, "small"), "7");
  EXPECT_EQ(value_of(policy, "signed_one"), "-5");
  EXPECT_EQ(value_of(policy, "large"), "1099511627776");
  EXPECT_EQ(value_of(policy, "flag"), "true");
}

TEST(PolicyObject, TakesSettingsWithinTheirRange) {
  auto policy = settings_policy();
  const struct {
    const char *key, *value, *becomes;
  } good[] = {{"small", "0", "0"},         {"small", "0xff", "255"},
              {"signed_one", "-2147483648", "-2147483648"}, {"signed_one", "2147483647", "2147483647"},
              {"large", "18446744073709551615", "18446744073709551615"}, {"large", "2G", "2147483648"},
              {"flag", "off", "false"},    {"flag", "1", "true"}};
  for (const auto& [key, value, becomes] : good) {
    EXPECT_TRUE(policy.set(key, value)) << key << "=" << value;
    EXPECT_EQ(value_of(policy, key), becomes);
  }
  const struct {
    const char *key, *value;
  } bad[] = {{"small", "256"},  {"small", "-1"},     {"small", ""},       {"small", "1 "},   {"small", "0x"},
             {"small", "12Q"},  {"small", "1KK"},    {"small", "1e2"},    {"flag", "2"},     {"flag", "TRUE!"},
             {"signed_one", "2147483648"}, {"signed_one", "-2147483649"}, {"large", "18446744073709551616"},
             {"large", "-1"},   {"large", "99999999999999999999999999999999999999999"}, {"large", "17179869184G"},
             {"unknown", "1"},  {"", "1"}};
  for (const auto& [key, value] : bad) {
    const auto before = value_of(policy, key);
    EXPECT_FALSE(policy.set(key, value)) << key << "=" << value;
    EXPECT_EQ(value_of(policy, key), before);
  }
}

TEST(PolicyObject, RefusesWhatIsNoPolicy) {
  EXPECT_FALSE(PolicyObject::open("", "empty"));
  EXPECT_FALSE(PolicyObject::open("not an object", "text"));
  EXPECT_FALSE(PolicyObject::open(bytes_of("intruder"), "intruder"));
  const auto newer = PolicyObject::open(bytes_of("newer_abi"), "newer_abi");
  ASSERT_FALSE(newer);
  EXPECT_NE(newer.error().message.find("policy ABI 2.0"), std::string::npos);
}

// Cut off or damaged anywhere: refused or read, but never a crash.
TEST(PolicyObject, SurvivesDamage) {
  const std::string good = bytes_of("settings");
  for (std::size_t length = 0; length < good.size(); length += 97) (void)PolicyObject::open(good.substr(0, length), "cut");
  unsigned random = 1;
  for (int round = 0; round < 500; ++round) {
    std::string damaged = good;
    for (int i = 0; i < 4; ++i) {
      random = random * 1103515245U + 12345U;
      damaged[(random >> 8) % damaged.size()] = static_cast<char>(random >> 3);
    }
    if (auto policy = PolicyObject::open(damaged, "damaged")) (void)policy->set("small", "1");
  }
}

class StateTest : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/hypertier-state.XXXXXX";
    directory_ = mkdtemp(name);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::filesystem::path directory_;
};

TEST_F(StateTest, KeepsTheLastSeatOfEachCgroup) {
  const State state(directory_ / "state");
  EXPECT_TRUE(state.load().empty());
  for (const char* policy : {"first", "second", "third"})
    for (const char* cgroup : {"/", "/a", "/a/b"})
      ASSERT_TRUE(state.save({cgroup, policy, "file", {{"key", policy}}, std::string(policy) + " bytes of " + cgroup}));
  const auto saved = state.load();
  ASSERT_EQ(saved.size(), 3U);
  const char* order[] = {"/", "/a", "/a/b"};
  for (std::size_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(saved[i].seat);
    EXPECT_EQ(saved[i].cgroup, order[i]);
    EXPECT_EQ(saved[i].seat->policy, "third");
    EXPECT_EQ(saved[i].seat->settings.at("key"), "third");
    EXPECT_EQ(saved[i].seat->object, std::string("third bytes of ") + order[i]);
  }
  struct stat status {};
  ASSERT_EQ(stat((directory_ / "state").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700U);
  ASSERT_TRUE(state.clear("/a"));
  EXPECT_EQ(state.load().size(), 2U);
  ASSERT_TRUE(state.clear("/"));
  ASSERT_TRUE(state.clear("/a/b"));
  EXPECT_TRUE(std::filesystem::is_empty(directory_ / "state"));
}

// A crash before the rename leaves what was written of the new seat: the old one counts.
TEST_F(StateTest, HalfWrittenSeatIsIgnored) {
  const State state(directory_);
  ASSERT_TRUE(state.save({"/", "old", "file", {}, "old bytes"}));
  std::ofstream(directory_ / "root-1.bpf.o") << "half of the new b";
  std::ofstream(directory_ / "root.json.new") << "{\"policy\": \"ne";
  const auto saved = state.load();
  ASSERT_EQ(saved.size(), 1U);
  ASSERT_TRUE(saved[0].seat);
  EXPECT_EQ(saved[0].seat->object, "old bytes");
}

TEST_F(StateTest, DamageIsTold) {
  const State state(directory_);
  for (const char* text : {"", "{", "[]", "{\"policy\": 1}", "{\"policy\":\"p\",\"file\":\"f\",\"settings\":{},\"object\":\"../x\"}",
                           "{\"cgroup\":\"/other\",\"policy\":\"p\",\"file\":\"f\",\"settings\":{},\"object\":\"root-0.bpf.o\"}"}) {
    std::ofstream(directory_ / "root.json", std::ios::trunc) << text;
    const auto saved = state.load();
    ASSERT_EQ(saved.size(), 1U) << text;
    EXPECT_FALSE(saved[0].seat) << text;
  }
}

TEST_F(StateTest, KeepsBudgets) {
  const State state(directory_);
  EXPECT_TRUE(state.load_budgets()->empty());
  Budgets budgets;
  budgets["/a"].fast_max = *parse_amount("", "2G");
  budgets["/a"].fast_min = *parse_amount("", "12.5%");
  budgets["/b c\xff"].fast_min = *parse_amount("", "4K");
  ASSERT_TRUE(state.save(budgets));
  const auto loaded = state.load_budgets();
  ASSERT_TRUE(loaded);
  ASSERT_EQ(loaded->size(), 2U);
  EXPECT_EQ(loaded->at("/a").fast_max->bytes, 2ULL << 30);
  EXPECT_EQ(loaded->at("/a").fast_min->percent, 12.5);
  std::ofstream(directory_ / "budgets.json", std::ios::trunc) << "{";
  EXPECT_FALSE(state.load_budgets());
}

TEST(BudgetTest, Amounts) {
  EXPECT_EQ(parse_amount("", "512M")->of(0), 512ULL << 20);
  EXPECT_EQ(parse_amount("", "4096")->of(0), 4096U);
  EXPECT_EQ(parse_amount("", "40%")->of(1000), 400U);
  EXPECT_EQ(parse_amount("", "0")->of(1000), 0U);
  for (const char* bad : {"", "%", "-1", "-1%", "101%", "1X", "1GB", "G", "99999999999999T", "nan%", "1e2", " 1", "0x10"})
    EXPECT_FALSE(parse_amount("--fast-max", bad)) << bad;
}

TEST(BudgetTest, Rates) {
  EXPECT_EQ(parse_rate("200MB/s").value(), kDefaultRate);
  EXPECT_EQ(parse_rate("200M").value(), kDefaultRate);
  EXPECT_EQ(parse_rate("1GB").value(), 1ULL << 30);
  EXPECT_EQ(parse_rate("512K/s").value(), 512ULL << 10);
  EXPECT_EQ(parse_rate("0").value(), 0U);
  for (const char* bad : {"", "fast", "40%", "-1", "1MB/h", "1MM", "MB/s", "99999999999999999999", "20000000T", "1.5G"})
    EXPECT_FALSE(parse_rate(bad)) << bad;
  for (std::uint64_t rate : {0ULL, 1ULL, 4096ULL, 512ULL << 10, 200ULL << 20, 3ULL << 40, ~0ULL >> 4})
    EXPECT_EQ(parse_rate(rate_text(rate)).value(), rate) << rate_text(rate);
}

TEST_F(StateTest, KeepsHowASeatMayMove) {
  const State state(directory_);
  ASSERT_TRUE(state.save({"/", "p", "f", {}, "bytes", {50ULL << 20, true}}));
  Budgets budgets;
  budgets["/a"].rate_bytes_per_s = 3;
  budgets["/b"].dry_run = false;
  ASSERT_TRUE(state.save(budgets));
  const auto all = state.load();
  ASSERT_EQ(all.size(), 1U);
  ASSERT_TRUE(all[0].seat);
  EXPECT_EQ(all[0].seat->moves.rate_bytes_per_s, 50ULL << 20);
  EXPECT_TRUE(all[0].seat->moves.dry_run);
  const auto loaded = state.load_budgets();
  ASSERT_TRUE(loaded);
  EXPECT_EQ(loaded->at("/a").rate_bytes_per_s, 3U);
  EXPECT_FALSE(loaded->at("/a").dry_run.has_value());
  EXPECT_EQ(loaded->at("/b").dry_run, false);
}

TEST(BudgetTest, MinimaMustFitTheTier) {
  constexpr std::uint64_t kTier = 1 << 30;
  Budgets budgets;
  budgets["/a"].fast_min = *parse_amount("", "50%");
  budgets["/b"].fast_min = *parse_amount("", "512M");
  EXPECT_TRUE(check_budgets(budgets, kTier));
  budgets["/c"].fast_min = *parse_amount("", "4K");
  const auto refused = check_budgets(budgets, kTier);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message.find("cannot hold all minima"), std::string::npos);
  budgets.erase("/c");
  budgets["/b"].fast_max = *parse_amount("", "256M");
  EXPECT_FALSE(check_budgets(budgets, kTier));
}

}  // namespace
}  // namespace hypertier
