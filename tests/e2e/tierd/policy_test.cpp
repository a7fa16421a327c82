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

TEST_F(StateTest, KeepsTheLastSeat) {
  const State state(directory_ / "state");
  auto nothing = state.load();
  ASSERT_TRUE(nothing);
  EXPECT_FALSE(*nothing);
  for (const char* policy : {"first", "second", "third"}) {
    ASSERT_TRUE(state.save({policy, "file", {{"key", policy}}, std::string("bytes of ") + policy}));
    auto saved = state.load();
    ASSERT_TRUE(saved && *saved);
    EXPECT_EQ((*saved)->policy, policy);
    EXPECT_EQ((*saved)->settings.at("key"), policy);
    EXPECT_EQ((*saved)->object, std::string("bytes of ") + policy);
  }
  struct stat status {};
  ASSERT_EQ(stat((directory_ / "state").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700U);
  ASSERT_TRUE(state.clear());
  EXPECT_TRUE(std::filesystem::is_empty(directory_ / "state"));
}

// A crash before the rename leaves what was written of the new seat: the old one counts.
TEST_F(StateTest, HalfWrittenSeatIsIgnored) {
  const State state(directory_);
  ASSERT_TRUE(state.save({"old", "file", {}, "old bytes"}));
  std::ofstream(directory_ / "root-1.bpf.o") << "half of the new b";
  std::ofstream(directory_ / "root.json.new") << "{\"policy\": \"ne";
  auto saved = state.load();
  ASSERT_TRUE(saved && *saved);
  EXPECT_EQ((*saved)->object, "old bytes");
}

TEST_F(StateTest, DamageIsTold) {
  const State state(directory_);
  for (const char* text : {"", "{", "[]", "{\"policy\": 1}", "{\"policy\":\"p\",\"file\":\"f\",\"settings\":{},\"object\":\"../x\"}"}) {
    std::ofstream(directory_ / "root.json", std::ios::trunc) << text;
    EXPECT_FALSE(state.load()) << text;
  }
}

}  // namespace
}  // namespace hypertier
