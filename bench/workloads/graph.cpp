// SPDX-License-Identifier: GPL-2.0-or-later
// PageRank and breadth-first search on a Kronecker graph (Graph500's
// probabilities, vertices relabelled at random). The edges are built first and
// only streamed over; the vertices, whose popularity is skewed, start where
// memory was left.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel.hpp"

namespace workload {
namespace {

struct Edge {
  uint32_t to, check;
};
struct Vertex {
  uint64_t first;  // of its edges
  double rank, next;
  uint64_t visit;
  uint64_t unused[4];
};
static_assert(sizeof(Vertex) == 64);

class Graph : public Kernel {
 public:
  explicit Graph(const KernelOptions& options) : Kernel(options) {
    constexpr uint64_t kEdgesEach = 16;
    scale_ = 16;
    while ((2 * kEdgesEach * sizeof(Edge) + sizeof(Vertex)) << (scale_ + 1) <= options.size) scale_++;
    vertices_count_ = 1ULL << scale_;
    const uint64_t pairs = vertices_count_ * kEdgesEach;
    edges_count_ = 2 * pairs;

    // Drawn twice from the same stream, so that no list of pairs is needed.
    std::vector<uint32_t> label(vertices_count_);
    for (uint64_t i = 0; i < vertices_count_; i++) label[i] = static_cast<uint32_t>(i);
    for (uint64_t i = vertices_count_ - 1; i > 0; i--) std::swap(label[i], label[random_.below(i + 1)]);
    std::vector<uint64_t> first(vertices_count_ + 1);
    each_pair(pairs, [&](uint64_t a, uint64_t b) { first[label[a] + 1]++, first[label[b] + 1]++; });
    for (uint64_t i = 0; i < vertices_count_; i++) first[i + 1] += first[i];
    edges_ = fresh<Edge>(edges_count_);
    std::memset(edges_, 0, edges_count_ * sizeof(Edge));
    std::vector<uint64_t> at(first.begin(), first.end() - 1);
    each_pair(pairs, [&](uint64_t a, uint64_t b) {
      edges_[at[label[a]]++] = {label[b], check(label[b])};
      edges_[at[label[b]]++] = {label[a], check(label[a])};
    });
    vertices_ = fresh<Vertex>(vertices_count_ + 1);
    for (uint64_t i = 0; i <= vertices_count_; i++) vertices_[i] = {first[i], 1.0 / static_cast<double>(vertices_count_), 0, 0, {}};
  }

  bool verify() override {
    for (uint64_t i = 0; i < edges_count_; i++) expect(edges_[i].check == check(edges_[i].to), &edges_[i]);
    return errors_ == 0;
  }

 protected:
  uint32_t check(uint32_t to) const { return static_cast<uint32_t>(mix(to ^ options_.seed)); }
  uint64_t degree(uint64_t v) const { return vertices_[v + 1].first - vertices_[v].first; }

  uint64_t scale_, vertices_count_, edges_count_;
  Edge* edges_;
  Vertex* vertices_;

 private:
  template <class F>
  void each_pair(uint64_t pairs, F&& use) const {
    Random random(options_.seed + 1);
    for (uint64_t i = 0; i < pairs; i++) {
      uint64_t a = 0, b = 0;
      for (uint64_t bit = 0; bit < scale_;) {
        // Four levels a number: 16 bits for each choice.
        uint64_t x = random.next();
        for (int part = 0; part < 4 && bit < scale_; part++, bit++, x >>= 16) {
          uint64_t p = x & 0xffff;  // 0.57, 0.19, 0.19, 0.05
          a = a << 1 | (p >= 49807);
          b = b << 1 | ((p >= 37355 && p < 49807) || p >= 62259);
        }
      }
      use(a, b);
    }
  }
};

// An operation is one edge.
class Pagerank final : public Graph {
 public:
  using Graph::Graph;

  void run(uint64_t operations) override {
    for (uint64_t done = 0; done < operations;) {
      Vertex& vertex = vertices_[at_];
      double sum = 0;
      for (uint64_t e = vertex.first; e < vertices_[at_ + 1].first; e++, done++) {
        expect(edges_[e].check == check(edges_[e].to), &edges_[e]);
        const uint64_t from = edges_[e].to;
        sum += vertices_[from].rank / static_cast<double>(degree(from));
        fill_time();
      }
      operations_ += degree(at_);
      done++;
      if (degree(at_) == 0) sum = vertex.rank;  // what nobody links to keeps its own: ranks sum up to 1
      vertex.next = degree(at_) ? 0.15 / static_cast<double>(vertices_count_) + 0.85 * sum : sum;
      if (++at_ < vertices_count_) continue;
      for (uint64_t v = 0; v < vertices_count_; v++) vertices_[v].rank = vertices_[v].next;
      at_ = 0;
    }
  }

  bool verify() override {
    double sum = 0;
    for (uint64_t v = 0; v < vertices_count_; v++) sum += vertices_[v].rank;
    return Graph::verify() && std::abs(sum - 1) < 0.01;
  }

 private:
  uint64_t at_ = 0;
};

// An operation is one edge; a new root when all that can be reached was.
class Bfs final : public Graph {
 public:
  explicit Bfs(const KernelOptions& options) : Graph(options), queue_(fresh<uint32_t>(vertices_count_)) {}

  void run(uint64_t operations) override {
    for (uint64_t done = 0; done < operations;) {
      if (head_ == tail_) {
        uint64_t root = random_.below(vertices_count_);
        search_++;
        head_ = tail_ = 0;
        queue_[tail_++] = static_cast<uint32_t>(root);
        vertices_[root].visit = search_;
      }
      uint64_t v = queue_[head_++];
      for (uint64_t e = vertices_[v].first; e < vertices_[v + 1].first; e++, done++) {
        expect(edges_[e].check == check(edges_[e].to), &edges_[e]);
        Vertex& to = vertices_[edges_[e].to];
        if (to.visit != search_) {
          to.visit = search_;
          queue_[tail_++] = edges_[e].to;
        }
        fill_time();
      }
      operations_ += degree(v);
      done++;
    }
  }

 private:
  uint32_t* queue_;
  uint64_t head_ = 0, tail_ = 0, search_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> make_pagerank(const KernelOptions& options) { return std::make_unique<Pagerank>(options); }
std::unique_ptr<Kernel> make_bfs(const KernelOptions& options) { return std::make_unique<Bfs>(options); }

}  // namespace workload
