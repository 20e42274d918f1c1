// The edges of a graph of latents as lists, in the order in which the kernels of `latent_attention` visit them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "row_products.h"

namespace m2mkd {

using torch::stable::Tensor;

// A graph with this part of all edges or more is computed as if it had all of them.
constexpr double kDense = 0.6;
constexpr int64_t kRowsInCache = 40 << 10;   // bytes of the rows that a block of edges names
constexpr int64_t kTileInCache = 96 << 10;   // bytes of the scores that a dense chunk of receivers has at a time

// `number` things cut into equal blocks of at most `most`.
struct Blocks {
  Blocks(int64_t number, int64_t most)
      : number(number), count(std::max<int64_t>(1, (number + most - 1) / most)), size((number + count - 1) / count) {}
  int64_t begin(int64_t block) const {
    return std::min(number, block * size);
  }
  int64_t number, count, size;
};

template <typename scalar_t>
struct Sizes {
  Sizes(const Tensor& query, const Tensor& key)
      : images(query.size(0)),
        heads(query.size(1)),
        receivers(query.size(2)),
        senders(key.size(2)),
        head_dim(query.size(3)),
        width(round_up(head_dim, kLanes<scalar_t>)),
        panels_width(round_up(head_dim, kPanel<scalar_t>)),
        columns(round_up(senders, kPanel<scalar_t>)),
        sender_blocks(senders, rows_in_cache(width)),
        chunks(receivers, rows_in_cache(width)),
        tile_chunks(receivers, tile_rows(columns)),
        scale(static_cast<scalar_t>(1 / std::sqrt(static_cast<double>(head_dim)))) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(
        (receivers + kTileRows) * (columns + 32) < most && (senders + receivers) * width < most,
        "one image has too many pairs of receivers and senders");
    tile_chunks.size = round_up(tile_chunks.size, kTileRows);
  }
  static int64_t rows_in_cache(int64_t width) {
    return std::max<int64_t>(16, kRowsInCache / (width * int64_t(sizeof(scalar_t))));
  }
  static int64_t tile_rows(int64_t columns) {
    const int64_t rows = kTileInCache / (std::max<int64_t>(1, columns) * int64_t(sizeof(scalar_t)));
    return std::clamp<int64_t>(rows / kTileRows * kTileRows, 2 * kTileRows, 16 * kTileRows);
  }

  int64_t images, heads, receivers, senders, head_dim;
  int64_t width;         // of a row padded to whole vectors
  int64_t panels_width;  // and to whole panels
  int64_t columns;       // senders, padded to whole panels
  Blocks sender_blocks, chunks, tile_chunks;
  scalar_t scale;
};

// One head at a time of a tensor [images, heads, rows, head_dim] whose last dimension is contiguous.
template <typename Item>
struct Heads {
  Heads(Item* data, const Tensor& tensor)
      : data(data), image(tensor.stride(0)), head(tensor.stride(1)), row(tensor.stride(2)) {}
  Item* at(int64_t i, int64_t h, int64_t r = 0) const {
    return data + i * image + h * head + r * row;
  }
  Item* data;
  int64_t image, head, row;
};
template <typename scalar_t>
Heads<const scalar_t> heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<scalar_t>(), tensor};
}
template <typename scalar_t>
Heads<scalar_t> mutable_heads_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<scalar_t>(), tensor};
}

// The edges of one image, or of all where they share them. In a dense graph slot u * columns + v is of the edge (u, v);
// otherwise each receiver has a row of slots, its edges in order of their senders and at least `lanes` empty ones.
template <typename scalar_t>
struct Graph {
  const scalar_t* log_affinity = nullptr;  // [receivers, senders]; none: 0
  bool dense = true;
  int64_t slots = 0;
  Buffer<int32_t> degree;           // [receivers]
  Buffer<int32_t> block_start;      // [receivers, sender blocks + 1], first slot of each block's senders, and the end
  Buffer<int32_t> sender_row;       // [slots], where the sender's padded row starts
  Buffer<scalar_t> log_weight;      // [slots], -inf where empty
  Buffer<int32_t> by_sender_start;  // [chunks, senders + 1], places in the two that follow
  Buffer<int32_t> receiver_row;     // [slots], where the receiver's padded row starts in its chunk
  Buffer<int32_t> slot;             // [slots], counted from the first one of the chunk

  int64_t first_slot(const Sizes<scalar_t>& sizes, int64_t receiver) const {
    if (receiver == sizes.receivers) {
      return slots;
    }
    return dense ? receiver * sizes.columns : block_start[receiver * (sizes.sender_blocks.count + 1)];
  }
};

constexpr int64_t kSlack = 64;  // readable elements behind the last slot

template <typename scalar_t>
void count_edges(const Sizes<scalar_t>& sizes, Graph<scalar_t>& graph) {
  for (int64_t u = 0; u < sizes.receivers; ++u) {
    const scalar_t* row = graph.log_affinity + u * sizes.senders;
    int32_t present = 0;
    for (int64_t v = 0; v < sizes.senders; ++v) {
      present += row[v] != -std::numeric_limits<scalar_t>::infinity();
    }
    graph.degree[u] = present;
  }
}

// Decides how the graph is computed, and gives each receiver its slots.
template <typename scalar_t>
void lay_out(const Sizes<scalar_t>& sizes, bool by_sender, Graph<scalar_t>& graph) {
  int64_t edges = 0;
  for (int64_t u = 0; u < sizes.receivers; ++u) {
    edges += graph.degree[u];
  }
  graph.dense = edges >= kDense * static_cast<double>(sizes.receivers * sizes.senders);
  if (graph.dense) {
    graph.slots = round_up(sizes.receivers, kTileRows) * sizes.columns;
    return;
  }
  const int64_t blocks = sizes.sender_blocks.count;
  graph.block_start = Buffer<int32_t>(sizes.receivers * (blocks + 1));
  for (int64_t u = 0; u < sizes.receivers; ++u) {
    graph.block_start[u * (blocks + 1)] = static_cast<int32_t>(graph.slots);
    graph.slots += round_up(graph.degree[u], kLanes<scalar_t>) + kLanes<scalar_t>;
  }
  graph.sender_row = Buffer<int32_t>(graph.slots);
  graph.log_weight = Buffer<scalar_t>(graph.slots);
  if (by_sender) {
    graph.by_sender_start = Buffer<int32_t>(sizes.chunks.count * (sizes.senders + 1));
    graph.receiver_row = Buffer<int32_t>(graph.slots);
    graph.slot = Buffer<int32_t>(graph.slots);
  }
}

template <typename scalar_t>
void list_edges(const Sizes<scalar_t>& sizes, Graph<scalar_t>& graph, int64_t chunk) {
  constexpr scalar_t absent = -std::numeric_limits<scalar_t>::infinity();
  const int64_t blocks = sizes.sender_blocks.count;
  for (int64_t u = sizes.chunks.begin(chunk); u < sizes.chunks.begin(chunk + 1); ++u) {
    const scalar_t* row = graph.log_affinity + u * sizes.senders;
    int32_t* start = graph.block_start.data() + u * (blocks + 1);
    int32_t next = start[0];
    for (int64_t block = 0; block < blocks; ++block) {
      start[block] = next;
      for (int64_t v = sizes.sender_blocks.begin(block); v < sizes.sender_blocks.begin(block + 1); ++v) {
        graph.sender_row[next] = static_cast<int32_t>(v * sizes.width);  // overwritten by the next edge if absent
        graph.log_weight[next] = row[v];
        next += row[v] != absent;
      }
    }
    start[blocks] = next;
    for (int64_t slot = next; slot < graph.first_slot(sizes, u + 1); ++slot) {
      graph.sender_row[slot] = 0;
      graph.log_weight[slot] = absent;
    }
  }
}

template <typename scalar_t>
void sort_edges_by_sender(const Sizes<scalar_t>& sizes, Graph<scalar_t>& graph, int64_t chunk) {
  const int64_t begin = sizes.chunks.begin(chunk), end = sizes.chunks.begin(chunk + 1);
  const int64_t blocks = sizes.sender_blocks.count, first = graph.first_slot(sizes, begin);
  int32_t* start = graph.by_sender_start.data() + chunk * (sizes.senders + 1);
  const int32_t width = static_cast<int32_t>(sizes.width);
  const auto for_each_edge = [&](auto&& visit) {
    for (int64_t u = begin; u < end; ++u) {
      const int32_t* blocks_start = graph.block_start.data() + u * (blocks + 1);
      for (int64_t slot = blocks_start[0]; slot < blocks_start[blocks]; ++slot) {
        visit(u, slot, graph.sender_row[slot] / width);
      }
    }
  };
  // Counts one place behind, so that the scan leaves in start[v + 1] where sender v begins, and filling moves that to
  // where it ends, which is where v + 1 begins.
  std::fill(start, start + sizes.senders + 1, 0);
  for_each_edge([&](int64_t, int64_t, int32_t sender) { ++start[sender + 1]; });
  int32_t next = static_cast<int32_t>(first);
  start[0] = next;
  for (int64_t v = 0; v < sizes.senders; ++v) {
    const int32_t degree = start[v + 1];
    start[v + 1] = next;
    next += degree;
  }
  for_each_edge([&](int64_t receiver, int64_t slot, int32_t sender) {
    const int32_t place = start[sender + 1]++;
    graph.receiver_row[place] = static_cast<int32_t>((receiver - begin) * width);
    graph.slot[place] = static_cast<int32_t>(slot - first);
  });
}

// The graphs of `number` images, or the one that all share.
template <typename scalar_t>
std::vector<Graph<scalar_t>> graphs_of(
    const Sizes<scalar_t>& sizes, const scalar_t* log_affinity, int64_t number, bool by_sender) {
  std::vector<Graph<scalar_t>> graphs(number);
  if (log_affinity == nullptr) {
    graphs[0].slots = round_up(sizes.receivers, kTileRows) * sizes.columns;
    graphs[0].degree = Buffer<int32_t>(sizes.receivers);
    std::fill_n(graphs[0].degree.data(), sizes.receivers, static_cast<int32_t>(sizes.senders));
    return graphs;
  }
  for (int64_t g = 0; g < number; ++g) {
    graphs[g].log_affinity = log_affinity + g * sizes.receivers * sizes.senders;
    graphs[g].degree = Buffer<int32_t>(sizes.receivers);
  }
  const auto lay_out_graph = [&](int64_t g) {
    count_edges(sizes, graphs[g]);
    lay_out(sizes, by_sender, graphs[g]);
  };
  const auto list_chunk = [&](int64_t g, int64_t chunk) {
    if (!graphs[g].dense) {
      list_edges(sizes, graphs[g], chunk);
      if (by_sender) {
        sort_edges_by_sender(sizes, graphs[g], chunk);
      }
    }
  };
  const int64_t chunks = sizes.chunks.count;
  if (number >= torch::stable::get_num_threads()) {
    torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
      with_best_instructions([&] {
        for (int64_t g = begin; g < end; ++g) {
          lay_out_graph(g);
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            list_chunk(g, chunk);
          }
        }
      });
    });
    return graphs;
  }
  with_best_instructions([&] {
    for (int64_t g = 0; g < number; ++g) {
      lay_out_graph(g);
    }
  });
  torch::stable::parallel_for(0, number * chunks, 1, [&](int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t i = begin; i < end; ++i) {
        list_chunk(i / chunks, i % chunks);
      }
    });
  });
  return graphs;
}

}  // namespace m2mkd
