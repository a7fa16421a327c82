// SPDX-License-Identifier: GPL-2.0-or-later
#include <charconv>
#include <fstream>

#include "sources/source.hpp"

namespace hypertier {

std::optional<std::string> read_line(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::string line;
  if (!in || !std::getline(in, line)) return std::nullopt;
  while (!line.empty() && (line.back() == ' ' || line.back() == '\n' || line.back() == '\t')) line.pop_back();
  return line;
}

Result<std::vector<int>> parse_list(std::string_view text) {
  constexpr int kMax = 4096;  // more than any kernel's CPUs or nodes on x86 after which a list is a typo
  std::vector<int> numbers;
  auto bad = [&] {
    return fail("\"" + std::string(text) + "\" is not a list of numbers",
                "write it as the kernel does: 0,2-3");
  };
  std::string_view rest = text;
  while (!rest.empty()) {
    auto comma = rest.find(',');
    std::string_view part = rest.substr(0, comma);
    rest = comma == rest.npos ? std::string_view() : rest.substr(comma + 1);
    if (comma != part.npos && rest.empty() && text.back() == ',') return bad();
    int first = 0, last = 0;
    const char* end = part.data() + part.size();
    auto read = std::from_chars(part.data(), end, first);
    if (read.ec != std::errc() || first < 0 || first >= kMax) return bad();
    last = first;
    if (read.ptr != end) {
      if (*read.ptr != '-') return bad();
      read = std::from_chars(read.ptr + 1, end, last);
      if (read.ec != std::errc() || read.ptr != end || last < first || last >= kMax) return bad();
    }
    for (int number = first; number <= last; ++number) numbers.push_back(number);
  }
  return numbers;
}

Result<std::vector<int>> read_list(const std::filesystem::path& file) {
  std::ifstream in(file);
  if (!in) return fail_errno("cannot read " + file.string(), errno);
  std::string line;
  std::getline(in, line);  // an empty file is an empty list
  while (!line.empty() && line.back() == ' ') line.pop_back();
  auto list = parse_list(line);
  if (!list) return fail("cannot understand " + file.string() + ": " + list.error().message);
  return list;
}

}  // namespace hypertier
