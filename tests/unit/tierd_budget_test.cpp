// SPDX-License-Identifier: GPL-2.0-or-later
// Which scopes seats and budgets make, and which budgets fit together.
#include "tierd/budget.hpp"

#include <gtest/gtest.h>

namespace hypertier {
namespace {

using Plan = std::map<std::string, std::string>;

Budget of(const char* fast_max, const char* fast_min = nullptr) {
  Budget budget;
  if (fast_max) budget.fast_max = *parse_amount("--fast-max", fast_max);
  if (fast_min) budget.fast_min = *parse_amount("--fast-min", fast_min);
  return budget;
}

TEST(PlanScopes, EachSeatIsAScope) {
  EXPECT_EQ(plan_scopes({{"/", 1}, {"/a", 2}}, {}), (Plan{{"/", "/"}, {"/a", "/a"}}));
  EXPECT_EQ(plan_scopes({}, {}), Plan{});
}

TEST(PlanScopes, ABudgetIsAScopeOfTheNearestSeat) {
  const Budgets budgets = {{"/a", of("1G")}, {"/a/b/c", of("1G")}, {"/d", of("1G")}};
  EXPECT_EQ(plan_scopes({{"/", 1}, {"/a/b", 2}}, budgets),
            (Plan{{"/", "/"}, {"/a", "/"}, {"/a/b", "/a/b"}, {"/a/b/c", "/a/b"}, {"/d", "/"}}));
}

TEST(PlanScopes, ABudgetWithoutASeatAboveIsNone) {
  const Budgets budgets = {{"/a", of("1G")}, {"/b", of("1G")}};
  EXPECT_EQ(plan_scopes({{"/a", 2}}, budgets), (Plan{{"/a", "/a"}}));
  EXPECT_EQ(plan_scopes({}, budgets), Plan{});
}

TEST(Budgets, MinimaMustFitTheTier) {
  constexpr std::uint64_t kTier = 1 << 30;
  EXPECT_TRUE(check_budgets({}, kTier));
  EXPECT_TRUE(check_budgets({{"/a", of(nullptr, "60%")}, {"/b", of(nullptr, "40%")}}, kTier));
  EXPECT_FALSE(check_budgets({{"/a", of(nullptr, "60%")}, {"/b", of(nullptr, "500M")}}, kTier));
  EXPECT_FALSE(check_budgets({{"/a", of(nullptr, "2G")}}, kTier));
  EXPECT_FALSE(check_budgets({{"/a", of(nullptr, "16000000T")}, {"/b", of(nullptr, "16000000T")}}, kTier));
  EXPECT_TRUE(check_budgets({{"/a", of("2G")}, {"/b", of("2G")}}, kTier));  // maxima may
  EXPECT_TRUE(check_budgets({{"/a", of("512M", "512M")}}, kTier));
  EXPECT_FALSE(check_budgets({{"/a", of("512M", "513M")}}, kTier));
}

TEST(Budgets, AmountsAreSizesOrShares) {
  EXPECT_EQ(parse_amount("--fast-max", "2G")->of(0), 2ULL << 30);
  EXPECT_EQ(parse_amount("--fast-max", "4096")->of(0), 4096u);
  EXPECT_EQ(parse_amount("--fast-max", "40%")->of(1000), 400u);
  for (const char* wrong : {"", "G", "2X", "2GB", "-1", "101%", "%", "99999999999999999999", "18000000000G"})
    EXPECT_FALSE(parse_amount("--fast-max", wrong)) << wrong;
}

}  // namespace
}  // namespace hypertier
