// SPDX-License-Identifier: GPL-2.0-or-later
// Finding VMs in trees of /proc that the tests write themselves, and reading
// what a guest says about itself, which may be anything.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include <hypertier/flex.h>

#include "tierd/agent.hpp"
#include "vm/agent_link.hpp"
#include "vm/discovery.hpp"
#include "vm/link.hpp"

using namespace hypertier;

namespace {

class Tree {
 public:
  Tree() {
    char pattern[] = "/tmp/hypertier-proc-XXXXXX";
    root = mkdtemp(pattern);
  }
  ~Tree() { std::filesystem::remove_all(root); }
  void process(int pid, const std::vector<std::string>& arguments, uint64_t start = 77) {
    const auto dir = root / "proc" / std::to_string(pid);
    std::filesystem::create_directories(dir);
    std::ofstream line(dir / "cmdline");
    for (const auto& a : arguments) line << a << '\0';
    std::ofstream(dir / "stat") << pid << " (qemu (x) 1) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 " << start << " 20 21\n";
  }
  std::filesystem::path root;
};

std::vector<std::string> plain(const std::string& name) {
  return {"/usr/bin/qemu-system-x86_64", "-name", name, "-m", "8G",
          "-object", "memory-backend-file,id=fast,mem-path=/run/vm/" + name + "/fast/memory,size=2G,share=on,align=2M",
          "-object", "memory-backend-file,id=slow,mem-path=/run/vm/" + name + "/slow/memory,size=6144M,share=on",
          "-numa", "node,nodeid=0,cpus=0-1,memdev=fast", "-numa", "node,nodeid=1,memdev=slow",
          "-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on",
          "-qmp", "unix:/run/vm/" + name + "/qmp,server=on,wait=off"};
}

TEST(Discovery, APlainCommandLine) {
  Tree tree;
  tree.process(100, plain("web"));
  tree.process(200, {"/bin/bash", "-c", "qemu-system-x86_64"});
  std::filesystem::create_directories(tree.root / "proc" / "self");
  const auto vms = find_qemus(tree.root);
  ASSERT_EQ(vms.size(), 1u);
  const auto& vm = vms[0];
  EXPECT_EQ(vm.problem, "");
  EXPECT_EQ(vm.name, "web");
  EXPECT_EQ(vm.start_time, 77u);
  EXPECT_EQ(vm.qmp_path, "/run/vm/web/qmp");
  EXPECT_EQ(vm.balloon_path, "/machine/peripheral/balloon0");
  EXPECT_TRUE(vm.reporting);
  EXPECT_EQ(vm.tier[HT_TIER_FAST].path, "/run/vm/web/fast/memory");
  EXPECT_EQ(vm.tier[HT_TIER_FAST].size_bytes, 2ULL << 30);
  EXPECT_EQ(vm.tier[HT_TIER_SLOW].size_bytes, 6ULL << 30);
  EXPECT_EQ(vm.tier[HT_TIER_SLOW].node, 1);
}

TEST(Discovery, ALibvirtCommandLine) {
  Tree tree;
  std::vector<std::string> line{
      "/usr/bin/qemu-system-x86_64", "-name", "guest=db,debug-threads=on", "-S", "-object",
      R"({"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-3-db/master-key.aes"})",
      "-m", "size=8388608k",
      "-object", R"({"qom-type":"memory-backend-file","id":"ram-node0","mem-path":"/run/vm/db/fast/memory","share":true,"size":2147483648,"host-nodes":[0],"policy":"bind"})",
      "-numa", "node,nodeid=0,cpus=0-3,memdev=ram-node0",
      "-object", R"({"qom-type":"memory-backend-file","id":"ram-node1","mem-path":"/run/vm/db/slow/memory","share":true,"size":6442450944})",
      "-numa", "node,nodeid=1,memdev=ram-node1",
      "-chardev", "socket,id=charmonitor,fd=31,server=on,wait=off", "-mon", "chardev=charmonitor,id=monitor,mode=control",
      "-device", R"({"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.5","addr":"0x0","free-page-reporting":true})"};
  tree.process(300, line);
  auto vms = find_qemus(tree.root);
  ASSERT_EQ(vms.size(), 1u);
  EXPECT_EQ(vms[0].name, "db");
  EXPECT_NE(vms[0].problem.find("libvirt"), std::string::npos) << vms[0].problem;
  EXPECT_FALSE(vms[0].hint.empty());
  EXPECT_EQ(vms[0].tier[HT_TIER_FAST].path, "/run/vm/db/fast/memory");
  EXPECT_TRUE(vms[0].reporting);

  // with <qemu:commandline>, which libvirt puts at the end
  line.insert(line.end(), {"-qmp", "unix:/run/vm/db/qmp,server=on,wait=off"});
  tree.process(300, line);
  vms = find_qemus(tree.root);
  EXPECT_EQ(vms[0].problem, "");
  EXPECT_EQ(vms[0].qmp_path, "/run/vm/db/qmp");
  EXPECT_EQ(vms[0].tier[HT_TIER_SLOW].size_bytes, 6442450944u);
}

TEST(Discovery, VirtioMemOfBothTiersOrOfNone) {
  auto line = plain("web");
  std::erase_if(line, [](const std::string& a) { return a.starts_with("virtio-balloon"); });
  line.erase(std::find(line.begin(), line.end(), "-device"));
  const auto with = [&](std::vector<std::string> more) {
    auto all = line;
    all.insert(all.end(), more.begin(), more.end());
    return parse_qemu(all);
  };
  const std::string fast = "memory-backend-file,id=fp,mem-path=/run/vm/web/fast/plug,size=1G,share=on";
  const std::string slow = "memory-backend-file,id=sp,mem-path=/run/vm/web/slow/plug,size=2G,share=on";
  const auto vm = with({"-object", fast, "-object", slow, "-device", "virtio-mem-pci,id=a,memdev=fp,node=0",
                        "-device", R"({"driver":"virtio-mem-pci","id":"b","memdev":"sp","node":1})"});
  EXPECT_EQ(vm.problem, "");
  ASSERT_TRUE(vm.plugs());
  EXPECT_EQ(vm.plug[HT_TIER_SLOW].device, "/machine/peripheral/b");
  EXPECT_EQ(vm.size_bytes(HT_TIER_FAST), 3ULL << 30);
  EXPECT_EQ(vm.fixed_bytes(HT_TIER_FAST), 2ULL << 30);
  EXPECT_EQ(vm.moving(HT_TIER_SLOW).path, "/run/vm/web/slow/plug");
  EXPECT_NE(with({"-object", fast, "-device", "virtio-mem-pci,id=a,memdev=fp,node=0"}).problem.find("one tier only"), std::string::npos);
  EXPECT_NE(with({"-object", fast, "-object", slow, "-device", "virtio-mem-pci,memdev=fp,node=0", "-device", "virtio-mem-pci,id=b,memdev=sp,node=1"}).problem.find("without an id"), std::string::npos);
  EXPECT_NE(with({"-object", fast, "-object", "memory-backend-ram,id=sp,size=2G", "-device", "virtio-mem-pci,id=a,memdev=fp,node=0", "-device", "virtio-mem-pci,id=b,memdev=sp,node=1"}).problem.find("named files"), std::string::npos);
  EXPECT_NE(with({}).problem.find("virtio-balloon"), std::string::npos);
}

TEST(Discovery, SaysWhatIsMissing) {
  auto without = [](std::vector<std::string> line, const std::string& flag, const std::string& part) {
    for (size_t i = 0; i + 1 < line.size(); i++)
      if (line[i] == flag && line[i + 1].find(part) != std::string::npos) line.erase(line.begin() + static_cast<long>(i), line.begin() + static_cast<long>(i) + 2);
    return parse_qemu(line).problem;
  };
  EXPECT_NE(without(plain("a"), "-numa", "nodeid=1").find("no slow tier"), std::string::npos);
  EXPECT_NE(without(plain("a"), "-device", "balloon").find("virtio-balloon"), std::string::npos);
  EXPECT_NE(without(plain("a"), "-qmp", "unix").find("QMP"), std::string::npos);
  auto memfd = plain("a");
  memfd[6] = "memory-backend-memfd,id=fast,size=2G,share=on";
  EXPECT_EQ(parse_qemu(memfd).problem, "");
  EXPECT_TRUE(parse_qemu(memfd).tier[HT_TIER_FAST].memfd);
  auto anonymous = plain("a");
  anonymous[6] = "memory-backend-ram,id=fast,size=2G,share=on";
  EXPECT_NE(parse_qemu(anonymous).problem.find("named file"), std::string::npos);
  auto agent = plain("a");
  EXPECT_EQ(parse_qemu(agent).agent_path, "");
  for (const char* word : {"-chardev", "socket,id=flex,path=/run/vm/a/agent,server=on", "-device", "virtserialport,chardev=flex,name=org.hypertier.flex.0"})
    agent.push_back(word);
  EXPECT_EQ(parse_qemu(agent).agent_path, "/run/vm/a/agent");
  agent.back() = "virtserialport,chardev=flex,name=org.qemu.guest_agent.0";
  EXPECT_EQ(parse_qemu(agent).agent_path, "");
  EXPECT_EQ(parse_qemu({"qemu-system-x86_64"}).problem.empty(), false);
  EXPECT_EQ(parse_qemu({"qemu-system-x86_64", "-object"}).problem.empty(), false);
  EXPECT_EQ(parse_qemu({"qemu-system-x86_64", "-object", "{broken", "-numa", ",,,=,"}).problem.empty(), false);
}

TEST(Discovery, CommasAreDoubledInOptions) {
  auto line = plain("a");
  line[6] = "memory-backend-file,id=fast,mem-path=/run/a,,b/memory,size=2G,share=on";
  EXPECT_EQ(parse_qemu(line).tier[HT_TIER_FAST].path, "/run/a,b/memory");
}

TEST(Discovery, OneNameIsOneVm) {
  Tree tree;
  tree.process(100, plain("web"));
  tree.process(101, plain("web"));
  const auto vms = find_qemus(tree.root);
  ASSERT_EQ(vms.size(), 2u);
  EXPECT_EQ(vms[0].name, "web");
  EXPECT_EQ(vms[1].name, "web-101");
}

TEST(Discovery, OnlyThoseBelowADirectory) {
  Tree tree;
  tree.process(100, plain("web"));
  tree.process(101, plain("db"));
  EXPECT_EQ(find_qemus(tree.root, {"/run/vm"}).size(), 2u);
  const auto one = find_qemus(tree.root, {"/run/vm/db", "/run/other"});
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].pid, 101);
  EXPECT_TRUE(find_qemus(tree.root, {"/run/vm/d"}).empty()) << "the beginning of a name is no directory";
  EXPECT_EQ(find_qemus(tree.root, {"/run/vm/db/../web"}).size(), 1u);
}

TEST(Packing, EveryPairOfSizesHasItsNumber) {
  for (const auto& [fast_mib, slow_mib] : {std::pair<uint64_t, uint64_t>{256, 512}, {2048, 6144}, {1024, 1024}, {64, 16384}, {65536, 262144}}) {
    const uint64_t fast = fast_mib << 8, slow = slow_mib << 8;
    const unsigned shift = hf_unit_shift(fast, slow);
    for (uint64_t f = 0; f <= fast; f += std::max<uint64_t>(fast / 37 >> shift << shift, 1ULL << shift))
      for (uint64_t s = 0; s <= slow; s += std::max<uint64_t>(slow / 41 >> shift << shift, 1ULL << shift)) {
        const auto packed = hf_pack(fast, slow, f, s);
        ASSERT_LT(packed, fast + slow) << "more than the device takes";
        __u64 f2, s2;
        hf_unpack(fast, slow, packed, &f2, &s2);
        ASSERT_EQ(f2, f);
        ASSERT_EQ(s2, s);
      }
    EXPECT_EQ(hf_pack(fast, slow, 0, 0), 0u);
  }
  // up to 4 GiB the unit is at most the 2 MiB of the reporting queue
  EXPECT_LE(hf_unit_shift(1 << 18, 3 << 18), 9u);
}

TEST(Claims, AnythingAGuestCanSay) {
  EXPECT_FALSE(parse_claims(nullptr).two_tier);
  EXPECT_FALSE(parse_claims({{"stats", 7}}).two_tier);
  nlohmann::json stats{{"stats", {{"stat-async-scans", HF_MAGIC}, {"stat-direct-scans", "text"}, {"stat-async-reclaims", -1},
                                  {"stat-direct-reclaims", 1.5}, {"stat-alloc-stalls", ~0ULL}}}, {"last-update", "never"}};
  const auto claims = parse_claims(stats);
  EXPECT_TRUE(claims.two_tier);
  EXPECT_EQ(claims.size_bytes[HT_TIER_FAST], 0u);
  EXPECT_LE(claims.slow_miss_share, 1.0);
  stats["stats"]["stat-direct-scans"] = (uint64_t{65536} << 32) | 512;
  EXPECT_EQ(parse_claims(stats).size_bytes[HT_TIER_FAST], 256ULL << 20);
  EXPECT_EQ(parse_claims(stats).balloon_bytes[HT_TIER_FAST], 2ULL << 20);
}

TEST(Agent, AnythingAGuestCanAnswer) {
  for (const char* text : {"", "7", "[]", "{}", "{\"id\":1}", "{\"id\":2,\"tiers\":[]}", "{\"id\":1,\"tiers\":[1,2]}",
                           "{\"id\":1,\"tiers\":{\"a\":1,\"b\":2}}", "{\"id\":1,\"error\":\"no\"}", "{\"id\":-1,\"tiers\":[{},{}]}"})
    EXPECT_FALSE(parse_agent(text, 1)) << text;
  auto claims = parse_agent(R"({"id":1,"error":null,"slow_miss_share":1e300,"tiers":[{"size_bytes":-5,"balloon_bytes":"x"},{"size_bytes":18446744073709551615}]})", 1);
  ASSERT_TRUE(claims) << claims.error().message;
  EXPECT_EQ(claims->slow_miss_share, 0);
  EXPECT_EQ(claims->size_bytes[HT_TIER_FAST], 0u);
  EXPECT_EQ(claims->balloon_bytes[HT_TIER_FAST], 0u);
}

// The guest's end, on a tree of sysfs that the test writes itself.
TEST(Agent, ObeysWholeOrdersOnly) {
  Tree tree;
  const auto device = tree.root / "bus/virtio/drivers/hyperflex/virtio0";
  const BalloonDriver driver(tree.root);
  const auto answer = [&](const std::string& line) { return nlohmann::json::parse(answer_line(driver, line)); };
  EXPECT_NE(answer(R"({"id":1})")["error"].get<std::string>().find("not loaded"), std::string::npos);
  EXPECT_EQ(driver.fast_missing_bytes(), 0u);
  std::filesystem::create_directories(device);
  const auto file = [&](const std::string& name, const std::string& text) { std::ofstream(device / name) << text; };
  for (const std::string tier : {"fast", "slow"}) {
    file(tier + "_bytes", "1000000\n");
    file(tier + "_balloon_bytes", "4096\n");
    file(tier + "_balloon_target_bytes", "8192\n");
    file(tier + "_counters", "node 0\nblocks 1\nmigrated_blocks_total 3\n");
  }
  file("fast_missing_bytes", "12288\n");
  EXPECT_EQ(driver.fast_missing_bytes(), 12288u);
  const auto target = [&](const std::string& tier) {
    std::ifstream in(device / (tier + "_balloon_target_bytes"));
    uint64_t value = 0;
    in >> value;
    return value;
  };
  for (const char* line : {"", "x", "{}", R"({"id":"1"})", R"({"id":2,"balloon_bytes":1})", R"({"id":2,"balloon_bytes":{"fast":1}})",
                           R"({"id":2,"balloon_bytes":{"fast":4096,"slow":-1}})", R"({"id":2,"balloon_bytes":{"fast":4096,"slow":1000001}})"}) {
    EXPECT_TRUE(answer(line)["error"].is_string()) << line;
    EXPECT_EQ(target("fast"), 8192u) << line;
  }
  const auto done = answer(R"({"id":9,"balloon_bytes":{"fast":16384,"slow":4096}})");
  EXPECT_TRUE(done["error"].is_null()) << done;
  EXPECT_EQ(done["id"], 9);
  EXPECT_EQ(target("fast"), 16384u);
  EXPECT_EQ(target("slow"), 4096u);
  EXPECT_EQ(done["tiers"][0]["migrated_blocks_total"], 3);
}

}  // namespace
