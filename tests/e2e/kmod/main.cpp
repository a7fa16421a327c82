// SPDX-License-Identifier: GPL-2.0-or-later
// kmod_test [--moves N] [--bits 1] [gtest options]: loads hypertier.ko from the build
// that this binary belongs to, runs the tests in this VM, unloads it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <iostream>

#include "bits.hpp"
#include "harness.hpp"

int main(int argc, char** argv) {
  using namespace hypertier::test;
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!std::strcmp(argv[i], "--moves")) moves_wanted = std::stoull(argv[i + 1]);
    if (!std::strcmp(argv[i], "--bits")) read_bits = std::stoull(argv[i + 1]) != 0;
  }
  build_dir = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path();
  if (int err = load_module(build_dir + "/bpf/kmod/hypertier.ko"); err) {
    std::cerr << "kmod_test: cannot load " << build_dir << "/bpf/kmod/hypertier.ko: " << std::strerror(err)
              << "\nHINT: run it inside the lab: ./run lab --no-tierd -- kmod_test\n";
    return 1;
  }
  int status = RUN_ALL_TESTS();
  drop_mover();
  // Everything that a test held is gone by now; BPF frees some of it after a grace period.
  int err = EAGAIN;
  for (int i = 0; i < 100 && err; i++) {
    err = unload_module();
    if (err) usleep(50000);
  }
  if (err) std::cerr << "kmod_test: rmmod hypertier: " << std::strerror(err) << "\n";
  return status ? status : err != 0;
}
