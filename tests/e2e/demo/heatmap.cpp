// SPDX-License-Identifier: GPL-2.0-or-later
#include "heatmap.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <map>

namespace demo {
namespace {

constexpr int kLevels = 5;
// Orange and blue stay apart for colour-blind eyes and in print.
constexpr std::array<const char*, kLevels> kFast = {"#fdeedd", "#fdcb98", "#f79c4b", "#d9650f", "#8a3b00"};
constexpr std::array<const char*, kLevels> kSlow = {"#e6eff8", "#b3d1ea", "#6ca9d8", "#2872b3", "#0a3a73"};
constexpr std::array<double, kLevels - 2> kSteps = {1.0 / 64, 1.0 / 16, 1.0 / 4};  // of the hottest rate

constexpr double kWidth = 1240, kLeft = 150, kRight = 220, kTop = 108, kChart = 170, kStrip = 22, kMap = 460;
constexpr double kPlot = kWidth - kLeft - kRight;
constexpr double kMapTop = kTop + kChart + 26 + kStrip + 12;
constexpr double kHeight = kMapTop + kMap + 76;
constexpr double kBreak = 10;  // pixels for a collapsed gap
constexpr uint64_t kMiB = 1 << 20, kGapCollapsed = 4 * kMiB, kBinMin = 2 * kMiB, kBinsMax = 230;

struct Segment {
  uint64_t start, end;
  double bottom = 0, height = 0;
};

std::string format(const char* pattern, auto... values) {
  char text[512];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '&') out += "&amp;";
    else out += c;
  }
  return out;
}

std::string label(double x, double y, const std::string& text, const char* more = "") {
  return format("<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, more) + escaped(text) + "</text>\n";
}

std::string line(double x1, double y1, double x2, double y2, const char* style) {
  return format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
}

std::string box(double x, double y, double w, double h, const char* fill) {
  return format("<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n", x, y, w, h, fill);
}

// What is mapped at any time, with the gaps between left out.
std::vector<Segment> segments_of(const std::vector<Frame>& frames) {
  std::vector<Segment> all, merged;
  for (const Frame& frame : frames)
    for (const Cell& cell : frame.cells) all.push_back({cell.start, cell.end});
  std::sort(all.begin(), all.end(), [](const Segment& a, const Segment& b) { return a.start < b.start; });
  for (const Segment& segment : all) {
    if (!merged.empty() && segment.start <= merged.back().end + kGapCollapsed)
      merged.back().end = std::max(merged.back().end, segment.end);
    else
      merged.push_back(segment);
  }
  return merged;
}

void lay_out(std::vector<Segment>& segments) {
  double bytes = 0;
  for (const Segment& segment : segments) bytes += static_cast<double>(segment.end - segment.start);
  double room = kMap - kBreak * static_cast<double>(segments.size() - 1), bottom = kMapTop + kMap;
  for (Segment& segment : segments) {
    segment.height = room * static_cast<double>(segment.end - segment.start) / bytes;
    segment.bottom = bottom;
    bottom -= segment.height + kBreak;
  }
}

// A round step that gives about `wanted` ticks.
double tick_step(double span, int wanted) {
  double raw = span / wanted, power = std::pow(10, std::floor(std::log10(raw)));
  for (double step : {1.0, 2.0, 5.0, 10.0})
    if (step * power >= raw) return step * power;
  return 10 * power;
}

class Drawing {
 public:
  explicit Drawing(const Picture& picture) : picture_(picture), frames_(picture.frames), segments_(segments_of(frames_)) {
    lay_out(segments_);
    if (frames_.size() > 1) first_ = frames_[0].seconds - (frames_[1].seconds - frames_[0].seconds);
    last_ = frames_.back().seconds;
    // The 99th percentile, so that one odd cell does not wash out the rest.
    std::vector<double> rates;
    for (const Frame& frame : frames_)
      for (const Cell& cell : frame.cells)
        if (cell.rate > 0) rates.push_back(cell.rate);
    std::sort(rates.begin(), rates.end());
    if (!rates.empty()) hottest_ = rates[rates.size() * 99 / 100];
  }

  std::string svg() {
    out_ = format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
        "font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n",
        kWidth, kHeight, kWidth, kHeight);
    out_ += box(0, 0, kWidth, kHeight, "#ffffff");
    out_ += label(kLeft, 34, picture_.title, "font-size=\"20\" font-weight=\"bold\"");
    out_ += label(kLeft, 56, picture_.subtitle, "fill=\"#555\"");
    chart();
    policies();
    map();
    events();
    legend();
    return out_ + "</svg>\n";
  }

 private:
  double x(double seconds) const { return kLeft + kPlot * (seconds - first_) / (last_ - first_); }
  double begin(size_t frame) const { return frame ? frames_[frame - 1].seconds : first_; }

  void chart() {
    for (int percent = 0; percent <= 100; percent += 25) {
      double y = kTop + kChart * (1 - percent / 100.0);
      out_ += line(kLeft, y, kLeft + kPlot, y, "stroke=\"#ddd\"");
      out_ += label(kLeft - 10, y + 4, format("%d %%", percent), "text-anchor=\"end\" fill=\"#555\"");
    }
    out_ += label(kLeft - 66, kTop + kChart / 2, "true fast-tier hit ratio",
                  format("text-anchor=\"middle\" transform=\"rotate(-90 %.1f %.1f)\"", kLeft - 66, kTop + kChart / 2).c_str());
    std::string points;
    for (size_t i = 0; i < frames_.size(); i++) {
      double y = kTop + kChart * (1 - frames_[i].fast_hit_ratio);
      points += format("%.1f,%.1f %.1f,%.1f ", x(begin(i)), y, x(frames_[i].seconds), y);
    }
    out_ += "<polyline fill=\"none\" stroke=\"#111\" stroke-width=\"2\" points=\"" + points + "\"/>\n";
  }

  void policies() {
    double y = kTop + kChart + 26;
    out_ += label(kLeft - 10, y + 15, "policy", "text-anchor=\"end\"");
    for (size_t i = 0; i < frames_.size();) {
      size_t end = i;
      while (end < frames_.size() && frames_[end].policy == frames_[i].policy) end++;
      double from = x(begin(i)), to = x(frames_[end - 1].seconds);
      out_ += box(from, y, to - from - 1, kStrip, frames_[i].policy == "static" ? "#dcdcdc" : "#bfe3c6");
      if (to - from > 8.0 * static_cast<double>(frames_[i].policy.size()))
        out_ += label((from + to) / 2, y + 15, frames_[i].policy, "text-anchor=\"middle\"");
      i = end;
    }
  }

  int level(double rate) const {
    if (rate <= 0) return 0;
    int level = 1;
    for (double step : kSteps) level += rate >= step * hottest_;
    return level;
  }

  // Bins of a segment's address space x frames; equal neighbours in time
  // become one rectangle.
  void map() {
    uint64_t bytes = 0;
    for (const Segment& segment : segments_) bytes += segment.end - segment.start;
    uint64_t bin = std::max(kBinMin, (bytes / kBinsMax + kBinMin - 1) / kBinMin * kBinMin);
    bool first = true;
    for (const Segment& segment : segments_) {
      uint64_t size = segment.end - segment.start;
      size_t bins = static_cast<size_t>((size + bin - 1) / bin);
      std::vector<std::vector<const char*>> colour(frames_.size(), std::vector<const char*>(bins, nullptr));
      for (size_t f = 0; f < frames_.size(); f++) paint(segment, bin, frames_[f].cells, colour[f]);
      double per_byte = segment.height / static_cast<double>(size);
      for (size_t b = 0; b < bins; b++) {
        double height = per_byte * static_cast<double>(std::min(bin, size - b * bin));
        double y = segment.bottom - per_byte * static_cast<double>(b * bin) - height;
        for (size_t f = 0; f < frames_.size();) {
          size_t end = f;
          while (end < frames_.size() && colour[end][b] == colour[f][b]) end++;
          // A hair of overlap hides the seams of anti-aliasing.
          if (colour[f][b]) out_ += box(x(begin(f)), y - 0.2, x(frames_[end - 1].seconds) - x(begin(f)) + 0.2, height + 0.4, colour[f][b]);
          f = end;
        }
      }
      if (segment.height >= 12) {
        std::string name = format("%llx", static_cast<unsigned long long>(segment.start));
        out_ += label(kLeft - 10, segment.bottom, name, "text-anchor=\"end\" font-size=\"11\" fill=\"#555\"");
        out_ += line(kLeft - 6, segment.bottom, kLeft, segment.bottom, "stroke=\"#555\"");
        if (segment.height >= 40)
          out_ += label(kLeft - 10, segment.bottom - segment.height / 2, format("%llu MiB", static_cast<unsigned long long>(size / kMiB)),
                        "text-anchor=\"end\" font-size=\"12\"");
      }
      if (!first)
        out_ += line(kLeft - 6, segment.bottom + kBreak / 2, kLeft + kPlot, segment.bottom + kBreak / 2, "stroke=\"#999\" stroke-dasharray=\"2 3\"");
      first = false;
    }
    out_ += label(20, kMapTop + kMap / 2, "virtual address (gaps between mappings left out)",
                  format("text-anchor=\"middle\" transform=\"rotate(-90 20 %.1f)\"", kMapTop + kMap / 2).c_str());
    double step = tick_step(last_ - first_, 10), axis = kMapTop + kMap;
    out_ += line(kLeft, axis, kLeft + kPlot, axis, "stroke=\"#555\"");
    for (double t = 0; t <= last_ - first_ + step / 100; t += step) {
      out_ += line(x(first_ + t), axis, x(first_ + t), axis + 6, "stroke=\"#555\"");
      out_ += label(x(first_ + t), axis + 22, format("%g", t), "text-anchor=\"middle\"");
    }
    out_ += label(kLeft + kPlot / 2, axis + 46, "time [s of the guest's clock]", "text-anchor=\"middle\"");
  }

  // The bin shows the mean rate of what overlaps it, in the tier of most of it.
  void paint(const Segment& segment, uint64_t bin, const std::vector<Cell>& cells, std::vector<const char*>& colour) const {
    struct Sum {
      double bytes = 0, rate = 0, fast = 0, resident = 0;
    };
    std::vector<Sum> sums(colour.size());
    for (const Cell& cell : cells) {
      if (cell.end <= segment.start || cell.start >= segment.end) continue;
      for (uint64_t b = (cell.start - segment.start) / bin; b < colour.size() && segment.start + b * bin < cell.end; b++) {
        uint64_t from = std::max(cell.start, segment.start + b * bin), to = std::min(cell.end, segment.start + (b + 1) * bin);
        auto overlap = static_cast<double>(to - from);
        sums[b].bytes += overlap;
        sums[b].rate += overlap * cell.rate;
        if (cell.fast_share >= 0) {
          sums[b].resident += overlap;
          sums[b].fast += overlap * cell.fast_share;
        }
      }
    }
    for (size_t b = 0; b < colour.size(); b++)
      if (sums[b].resident > 0)
        colour[b] = (sums[b].fast * 2 >= sums[b].resident ? kFast : kSlow)[static_cast<size_t>(level(sums[b].rate / sums[b].bytes))];
  }

  void events() {
    std::string labels;  // over all lines: no line crosses a word
    double right_of[3] = {};  // rows of labels, so that neighbours do not run into each other
    for (size_t i = 0; i < frames_.size(); i++) {
      const std::string& event = frames_[i].event;
      if (event.empty()) continue;
      double at = x(begin(i));
      int row = 0;
      while (row < 2 && at < right_of[row]) row++;
      double y = kTop - 8 - 13 * row;
      out_ += line(at, y + 2, at, kMapTop + kMap, "stroke=\"#b3003c\" stroke-width=\"1.3\" stroke-dasharray=\"5 3\"");
      labels += label(at + 3, y, event, "font-size=\"11\" fill=\"#b3003c\" paint-order=\"stroke\" stroke=\"#fff\" stroke-width=\"4\"");
      right_of[row] = at + 3 + 6.6 * static_cast<double>(event.size()) + 8;
    }
    out_ += labels;
  }

  void legend() {
    double left = kLeft + kPlot + 26, y = kMapTop + 6;
    out_ += label(left, y, "where it is, how hot", "font-weight=\"bold\"");
    out_ += label(left, y + 18, "samples per epoch, MiB", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, y + 42, "fast", "font-size=\"12\"");
    out_ += label(left + 42, y + 42, "slow", "font-size=\"12\"");
    for (int level = kLevels - 1; level >= 0; level--) {
      double top = y + 50 + 24 * (kLevels - 1 - level);
      out_ += box(left, top, 34, 20, kFast[static_cast<size_t>(level)]);
      out_ += box(left + 42, top, 34, 20, kSlow[static_cast<size_t>(level)]);
      std::string text = level == 0   ? "none"
                         : level == 1 ? format("< %.2g", kSteps[0] * hottest_)
                                      : format("\u2265 %.2g", kSteps[static_cast<size_t>(level - 2)] * hottest_);
      out_ += label(left + 86, top + 15, text, "font-size=\"12\"");
    }
    double top = y + 50 + 24 * kLevels + 22;
    out_ += label(left, top, "white: not resident", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, top + 17, "colour: tier of most pages", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, top + 34, "heat: what HyperTier saw", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, kTop + 12, "of the memory accesses", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, kTop + 27, "that miss the cache;", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, kTop + 42, "counted by the simulated", "font-size=\"11\" fill=\"#555\"");
    out_ += label(left, kTop + 57, "memory, not by sampling", "font-size=\"11\" fill=\"#555\"");
  }

  const Picture& picture_;
  const std::vector<Frame>& frames_;
  std::vector<Segment> segments_;
  double first_ = 0, last_ = 1, hottest_ = 1;
  std::string out_;
};

}  // namespace

std::string heat_map_svg(const Picture& picture) {
  if (picture.frames.size() < 2) return {};
  return Drawing(picture).svg();
}

}  // namespace demo
