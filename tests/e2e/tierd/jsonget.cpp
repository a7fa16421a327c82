// SPDX-License-Identifier: GPL-2.0-or-later
// jsonget POINTER <json: the value there as plain text; exit 1 if there is
// none. "/list#" is the length of a list, "/object+" the sum of its numbers.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::string pointer = argv[1];
  const auto json = nlohmann::json::parse(std::cin, nullptr, false);
  if (json.is_discarded()) {
    std::cerr << "jsonget: stdin is not JSON\n";
    return 1;
  }
  char what = 0;
  if (pointer.ends_with('#') || pointer.ends_with('+')) {
    what = pointer.back();
    pointer.pop_back();
  }
  const nlohmann::json::json_pointer at(pointer);
  if (!json.contains(at)) {
    std::cerr << "jsonget: no " << pointer << "\n";
    return 1;
  }
  const auto& value = json[at];
  if (what == '#') {
    std::cout << value.size() << "\n";
  } else if (what == '+') {
    std::uint64_t sum = 0;
    for (const auto& item : value) sum += item.get<std::uint64_t>();
    std::cout << sum << "\n";
  } else {
    std::cout << (value.is_string() ? value.get<std::string>() : value.dump()) << "\n";
  }
}
