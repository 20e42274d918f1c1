// Orders the nodes of a graph so that few tiles of its adjacency matrix hold an edge.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr double kLeastGain = 1e-9;

// The matrix in tiles: node order[i] is in block i / tile. Everything below is kept up to date swap by swap.
class Packing {
 public:
  Packing(const bool* edges, std::vector<int64_t> order, int64_t tile)
      : edges_(edges),
        order_(std::move(order)),
        size_(static_cast<int64_t>(order_.size())),
        tile_(tile),
        blocks_((size_ + tile - 1) / tile),
        degree_(size_ * blocks_, 0),
        count_(blocks_ * blocks_, 0),
        cost_(tile * tile + 1) {
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t node = order_[i];
      for (int64_t j = 0; j < size_; ++j) {
        degree_[node * blocks_ + j / tile_] += edge(node, order_[j]);
      }
      for (int64_t block = 0; block < blocks_; ++block) {
        count_[(i / tile_) * blocks_ + block] += degree_[node * blocks_ + block];
      }
    }
    for (size_t edges_in_tile = 0; edges_in_tile < cost_.size(); ++edges_in_tile) {
      cost_[edges_in_tile] = std::log1p(static_cast<double>(edges_in_tile));
    }
  }

  // Swaps every pair of places in two blocks where that lowers the cost; false when there was none.
  bool pass() {
    bool any = false;
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t j = (i / tile_ + 1) * tile_; j < size_; ++j) {
        if (swap_where_better(i, j)) {
          any = true;
        }
      }
    }
    return any;
  }

  const std::vector<int64_t>& order() const { return order_; }

 private:
  int64_t edge(int64_t a, int64_t b) const { return edges_[a * size_ + b]; }

  double change(int64_t count, int64_t difference) const { return cost_[count + difference] - cost_[count]; }

  bool swap_where_better(int64_t i, int64_t j) {
    const int64_t a = order_[i], b = order_[j], first = i / tile_, second = j / tile_;
    const int32_t* of_a = &degree_[a * blocks_];
    const int32_t* of_b = &degree_[b * blocks_];
    int32_t* in_first = &count_[first * blocks_];
    int32_t* in_second = &count_[second * blocks_];
    double gain = 0.0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t difference = of_b[block] - of_a[block];
      if (difference != 0 && block != first && block != second) {
        gain -= 2.0 * (change(in_first[block], difference) + change(in_second[block], -difference));
      }
    }
    // Within the two blocks an edge counts in both directions, a loop once; the sum over their four tiles stays.
    const int64_t loop_a = edge(a, a), loop_b = edge(b, b), between = edge(a, b);
    const int64_t within_first = 2 * (of_b[first] - between - of_a[first]) + loop_a + loop_b;
    const int64_t within_second = 2 * (of_a[second] - between - of_b[second]) + loop_a + loop_b;
    const int64_t across = -(within_first + within_second) / 2;
    gain -= change(in_first[first], within_first) + change(in_second[second], within_second) +
            2.0 * change(in_first[second], across);
    if (!(gain > kLeastGain)) {
      return false;
    }
    for (int64_t block = 0; block < blocks_; ++block) {
      if (block != first && block != second) {
        const int32_t difference = of_b[block] - of_a[block];
        in_first[block] += difference;
        count_[block * blocks_ + first] += difference;
        in_second[block] -= difference;
        count_[block * blocks_ + second] -= difference;
      }
    }
    in_first[first] += within_first;
    in_second[second] += within_second;
    in_first[second] += across;
    in_second[first] += across;
    for (int64_t node = 0; node < size_; ++node) {
      const int32_t difference = edge(node, b) - edge(node, a);
      degree_[node * blocks_ + first] += difference;
      degree_[node * blocks_ + second] -= difference;
    }
    std::swap(order_[i], order_[j]);
    return true;
  }

  const bool* edges_;
  std::vector<int64_t> order_;
  const int64_t size_, tile_, blocks_;
  std::vector<int32_t> degree_;  // [node, block]: edges of a node to a block
  std::vector<int32_t> count_;   // [block, block]: edges in a tile
  std::vector<double> cost_;     // by number of edges in a tile
};

std::vector<int64_t> checked_order(const py::array_t<int64_t>& order, int64_t size) {
  if (order.ndim() != 1 || order.shape(0) != size) {
    throw std::invalid_argument("order should name each of the " + std::to_string(size) + " nodes once");
  }
  std::vector<int64_t> nodes(size);
  std::vector<bool> seen(size, false);
  for (int64_t i = 0; i < size; ++i) {
    nodes[i] = order.at(i);
    if (nodes[i] < 0 || nodes[i] >= size || seen[nodes[i]]) {
      throw std::invalid_argument("order should name each of the " + std::to_string(size) +
                                  " nodes once; it has node " + std::to_string(nodes[i]) + " at place " +
                                  std::to_string(i));
    }
    seen[nodes[i]] = true;
  }
  return nodes;
}

py::array_t<int64_t> pack_tiles(const py::array_t<bool, py::array::c_style | py::array::forcecast>& edges,
                                const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& order,
                                int64_t tile, int64_t passes) {
  if (edges.ndim() != 2 || edges.shape(0) != edges.shape(1)) {
    throw std::invalid_argument("edges should be a square matrix");
  }
  if (tile < 1 || tile > 1024) {
    throw std::invalid_argument("tile should be between 1 and 1024, got " + std::to_string(tile));
  }
  const int64_t size = edges.shape(0);
  for (int64_t a = 0; a < size; ++a) {
    for (int64_t b = 0; b < a; ++b) {
      if (edges.at(a, b) != edges.at(b, a)) {
        throw std::invalid_argument("edges should be symmetric; " + std::to_string(a) + " and " + std::to_string(b) +
                                    " are linked in one direction alone");
      }
    }
  }
  Packing packing(edges.data(), checked_order(order, size), tile);
  {
    py::gil_scoped_release release;
    for (int64_t done = 0; done < passes && packing.pass(); ++done) {
    }
  }
  py::array_t<int64_t> packed(size);
  std::copy(packing.order().begin(), packing.order().end(), packed.mutable_data());
  return packed;
}

}  // namespace

void define_pack_tiles(py::module_& m) {
  m.def("pack_tiles", &pack_tiles, py::arg("edges"), py::arg("order"), py::arg("tile"), py::arg("passes") = 20,
        R"(An order of a graph's nodes in which few tiles of its adjacency matrix hold an edge, from another order.

Local search: nodes in two blocks of `tile` places change places wherever that lowers the sum over tiles of
log(1 + edges in it), which is lowest where few tiles hold all edges; pass after pass, until none helps or there were
`passes`. A pass tries O(n^2) swaps, each in O(n / tile), and a swap that is made costs O(n). Deterministic.

edges: bool [n, n], symmetric. order: int64 [n], a permutation. Returns int64 [n]. Raises ValueError otherwise.)");
}
