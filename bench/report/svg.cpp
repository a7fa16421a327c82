// SPDX-License-Identifier: GPL-2.0-or-later
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "../cases.hpp"
#include "results.hpp"

namespace bench {
namespace {

std::string text(double x, double y, const std::string& words, const char* more = "") {
  std::string safe;
  for (char c : words) safe += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return format("<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, more) + safe + "</text>\n";
}

std::string line(double x1, double y1, double x2, double y2, const char* style) {
  return format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
}

std::string box(double x, double y, double w, double h, const std::string& fill) {
  return format("<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n", x, y, w, h, fill.c_str());
}

std::string page(double width, double height, const std::string& body) {
  return format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
                "font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n",
                width, height, width, height) +
         box(0, 0, width, height, "#ffffff") + body + "</svg>\n";
}

std::vector<std::string> workloads_of(const Results& results) {
  std::vector<std::string> all;
  for (const Case& one : cases())
    if (results.any(one.name)) all.push_back(one.name);
  return all;
}

// What is compared at the density that samples have: fewer of them are a matter of time (time_svg).
bool in_bars(const std::string& system) { return system != "oracle" && !is_sparse(system); }

// A second line where the first is full.
std::string legend(const Results& results, double first, double y, double right, bool bars) {
  std::string out;
  double left = first;
  for (const std::string& system : results.systems()) {
    if (bars && !in_bars(system)) continue;
    bool used = false;
    for (const Case& one : cases()) used |= !results.of(one.name, system).empty();
    if (!used) continue;
    const double width = 40 + 8.4 * static_cast<double>(title_of(system).size());
    if (left + width > right) left = first, y += 22;
    out += box(left, y - 10, 14, 12, colour_of(system));
    out += text(left + 19, y, title_of(system));
    left += width;
  }
  return out;
}

}  // namespace

// Final hit ratio: a group of bars for each workload, in rows, a whisker from the lowest
// to the highest seed, a dashed line where the oracle is.
std::string bars_svg(const Results& results) {
  constexpr double kLeft = 70, kTop = 96, kPlot = 260, kRow = kPlot + 56, kBar = 17, kGap = 30, kWidest = 1500;
  std::string out;
  double x = kLeft + kGap / 2, top = kTop, width = 960;
  for (const std::string& workload : workloads_of(results)) {
    std::vector<std::string> systems;
    double oracle = 0;
    for (const std::string& system : results.systems()) {
      for (const Cell& cell : results.of(workload, system)) oracle = std::max(oracle, cell.oracle_ratio);
      if (in_bars(system) && !results.of(workload, system).empty()) systems.push_back(system);
    }
    // Room for the name.
    const double group = std::max(kBar * static_cast<double>(systems.size()), 7.5 * static_cast<double>(workload.size()));
    if (x + group > kWidest) x = kLeft + kGap / 2, top += kRow;
    const double from = x;
    for (const std::string& system : systems) {
      const std::vector<Cell>& cells = results.of(workload, system);
      double low = 1, high = 0, sum = 0;
      for (const Cell& cell : cells) low = std::min(low, cell.final_ratio), high = std::max(high, cell.final_ratio), sum += cell.final_ratio;
      const double mean = sum / static_cast<double>(cells.size()), upper = top + kPlot * (1 - mean);
      out += box(x, upper, kBar - 2, kPlot * mean, colour_of(system));
      if (cells.size() > 1) {
        const double middle = x + kBar / 2 - 1;
        out += line(middle, top + kPlot * (1 - low), middle, top + kPlot * (1 - high), "stroke=\"#000\" stroke-width=\"1.6\"");
      }
      const bool inside = kPlot * mean > 20;
      out += text(x + kBar / 2 - 1, inside ? upper + 12 : upper - 4, format("%.0f", 100 * mean), inside ? "text-anchor=\"middle\" font-size=\"9\" fill=\"#fff\"" : "text-anchor=\"middle\" font-size=\"9\"");
      x += kBar;
    }
    x = from + group;
    const double y = top + kPlot * (1 - oracle);
    out += line(from - 5, y, x + 3, y, "stroke=\"#111\" stroke-width=\"2\" stroke-dasharray=\"5 3\"");
    out += text((from + x) / 2, top + kPlot + 20, workload, "text-anchor=\"middle\"");
    x += kGap;
    width = std::max(width, x + 10);
  }
  std::string frame = text(kLeft, 30, "True fast-tier hit ratio at the end of a run", "font-size=\"19\" font-weight=\"bold\"") +
                      text(kLeft, 50, "of the accesses that miss the CPU cache, counted by the simulated memory [%]; dashed: best static placement (oracle)", "fill=\"#555\" font-size=\"12\"") +
                      legend(results, kLeft, 74, width, true);
  for (double row = kTop; row <= top; row += kRow)
    for (int percent = 0; percent <= 100; percent += 20) {
      const double y = row + kPlot * (1 - percent / 100.0);
      frame += line(kLeft, y, width - 10, y, "stroke=\"#ddd\"");
      frame += text(kLeft - 8, y + 4, format("%d %%", percent), "text-anchor=\"end\" fill=\"#555\"");
    }
  return page(width, top + kPlot + 40, frame + out);
}

// Hit ratio over time: a panel for each workload, a line for each system.
std::string time_svg(const Results& results) {
  const std::vector<std::string> workloads = workloads_of(results);
  constexpr double kWidth = 400, kPlot = 190, kPanel = 280, kLeft = 60, kTop = 134;
  constexpr size_t kColumns = 3;
  std::string out;
  for (size_t i = 0; i < workloads.size(); i++) {
    const double left = kLeft + static_cast<double>(i % kColumns) * (kWidth + 40), top = kTop + static_cast<double>(i / kColumns) * kPanel;
    double end = 1;
    for (const std::string& system : results.systems())
      for (const Cell& cell : results.of(workloads[i], system))
        if (system != "none") end = std::max(end, cell.points.back().seconds);
    out += text(left, top - 10, workloads[i], "font-weight=\"bold\"");
    for (int percent = 0; percent <= 100; percent += 25) {
      const double y = top + kPlot * (1 - percent / 100.0);
      out += line(left, y, left + kWidth, y, "stroke=\"#e2e2e2\"");
      out += text(left - 6, y + 4, format("%d", percent), "text-anchor=\"end\" font-size=\"11\" fill=\"#555\"");
    }
    const double step = end > 60 ? 20 : 10;
    for (double t = 0; t <= end; t += step)
      out += text(left + kWidth * t / end, top + kPlot + 16, format(t + step > end ? "%.0f s" : "%.0f", t), "text-anchor=\"middle\" font-size=\"11\" fill=\"#555\"");
    for (const std::string& system : results.systems()) {
      const std::vector<Cell>& cells = results.of(workloads[i], system);
      if (cells.empty()) continue;
      const Cell& cell = cells.front();
      std::string points;
      for (const Cell::Point& point : cell.points) points += format("%.1f,%.1f ", left + kWidth * std::min(1.0, point.seconds / end), top + kPlot * (1 - point.ratio));
      if (system == "none" && cell.points.back().seconds < end)  // nothing changes there: drawn on, thinner
        out += line(left + kWidth * cell.points.back().seconds / end, top + kPlot * (1 - cell.final_ratio), left + kWidth, top + kPlot * (1 - cell.final_ratio),
                    format("stroke=\"%s\" stroke-dasharray=\"2 3\"", colour_of(system).c_str()).c_str());
      out += format("<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"", colour_of(system).c_str()) + points + "\"/>\n";
    }
  }
  const double rows = std::ceil(static_cast<double>(workloads.size()) / kColumns);
  const double width = kLeft + static_cast<double>(std::min(workloads.size(), kColumns)) * (kWidth + 40);
  std::string frame = text(kLeft - 30, 30, "True fast-tier hit ratio over time [%]", "font-size=\"19\" font-weight=\"bold\"") +
                      text(kLeft - 30, 50, "seconds of the guest's clock since the system was started; first seed", "fill=\"#555\" font-size=\"12\"") +
                      legend(results, kLeft - 30, 76, std::max(width, 960.0), false);
  return page(std::max(width, 960.0), kTop + rows * kPanel, frame + out);
}

// Where the memory was and how hot it truly was: a panel for each system.
std::string heat_svg(const Results& results, const std::string& workload) {
  constexpr std::array<const char*, 5> kFast = {"#fdeedd", "#fdcb98", "#f79c4b", "#d9650f", "#8a3b00"};
  constexpr std::array<const char*, 5> kSlow = {"#e6eff8", "#b3d1ea", "#6ca9d8", "#2872b3", "#0a3a73"};
  constexpr double kWidth = 330, kHeight = 300, kLeft = 60, kTop = 106, kGapY = 56;
  constexpr size_t kColumns = 3;
  std::string out;
  size_t panel = 0;
  for (const std::string& system : results.systems()) {
    const std::vector<Cell>& cells = results.of(workload, system);
    if (cells.empty() || system == "none") continue;
    const Cell& cell = cells.front();
    const json& windows = cell.raw.at("windows");
    if (!windows.back().contains("map")) return {};
    // Bins that are resident at the end, in the order of their address: gaps left out.
    std::map<uint64_t, size_t> row_of;
    for (const json& w : windows)
      for (const json& bin : w.at("map"))
        if (bin[2].get<uint64_t>() >= 256) row_of[bin[0]] = 0;
    size_t rows = 0;
    for (auto& [bin, row] : row_of) row = rows++;
    std::vector<double> heats;
    for (const json& w : windows)
      for (const json& bin : w.at("map")) heats.push_back(bin[1].get<double>() / w.at("work_s").get<double>());
    std::sort(heats.begin(), heats.end());
    const double hottest = heats.empty() ? 1 : std::max(1.0, heats[heats.size() * 98 / 100]);
    const double left = kLeft + static_cast<double>(panel % kColumns) * (kWidth + 36), top = kTop + static_cast<double>(panel / kColumns) * (kHeight + kGapY);
    const double end = windows.back().at("end_s"), high = kHeight / static_cast<double>(std::max<size_t>(rows, 1));
    out += text(left, top - 8, title_of(system) + format(": %.0f %% at the end", 100 * cell.final_ratio), "font-weight=\"bold\"");
    double from = 0;
    // Neighbours in time with the same colour are one rectangle.
    std::vector<std::pair<std::string, double>> open(rows);
    auto flush = [&](size_t row, double until) {
      auto& [colour, since] = open[row];
      if (!colour.empty())
        out += box(left + kWidth * since / end, top + kHeight - high * static_cast<double>(row + 1) - 0.15, kWidth * (until - since) / end + 0.2, high + 0.3, colour);
      colour.clear();
    };
    for (const json& w : windows) {
      std::vector<std::string> now(rows);
      for (const json& bin : w.at("map")) {
        auto row = row_of.find(bin[0].get<uint64_t>());
        if (row == row_of.end() || bin[2].get<uint64_t>() == 0) continue;
        const double heat = bin[1].get<double>() / w.at("work_s").get<double>() / hottest;
        const size_t level = heat >= 0.5 ? 4 : heat >= 0.2 ? 3 : heat >= 0.05 ? 2 : heat > 0.005 ? 1 : 0;
        now[row->second] = bin[3].get<uint64_t>() * 2 >= bin[2].get<uint64_t>() ? kFast[level] : kSlow[level];
      }
      for (size_t row = 0; row < rows; row++) {
        if (open[row].first == now[row]) continue;
        flush(row, from);
        open[row] = {now[row], from};
      }
      from = w.at("end_s");
    }
    for (size_t row = 0; row < rows; row++) flush(row, end);
    out += text(left, top + kHeight + 16, "0", "font-size=\"11\" fill=\"#555\"");
    out += text(left + kWidth, top + kHeight + 16, format("%.0f s", end), "text-anchor=\"end\" font-size=\"11\" fill=\"#555\"");
    if (panel % kColumns == 0)
      out += text(left - 14, top + kHeight / 2, "address", format("text-anchor=\"middle\" fill=\"#555\" transform=\"rotate(-90 %.1f %.1f)\"", left - 14, top + kHeight / 2).c_str());
    panel++;
  }
  if (!panel) return {};
  std::string frame = text(kLeft, 30, workload + ": where its memory is, and how hot it truly is", "font-size=\"19\" font-weight=\"bold\"");
  double x = kLeft;
  auto scale = [&](const char* name, const std::array<const char*, 5>& colours) {
    frame += text(x, 62, name);
    x += 8.5 * static_cast<double>(std::string(name).size());
    for (const char* colour : colours) frame += box(x, 50, 24, 15, colour), x += 25;
    x += 24;
  };
  scale("in fast memory", kFast);
  scale("in slow memory", kSlow);
  frame += text(x, 62, "cold to hot; 2 MiB a row, time to the right", "fill=\"#555\" font-size=\"12\"");
  const double rows = std::ceil(static_cast<double>(panel) / kColumns);
  return page(kLeft + kColumns * (kWidth + 36) + 20, kTop + rows * (kHeight + kGapY), frame + out);
}

}  // namespace bench
