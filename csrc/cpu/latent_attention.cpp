// CPU kernels of `latent_attention`; the maths is in m2mkd_fast/ops/latent_attention.py.
//
// Few edges: each row of log affinities is reduced to the list of its edges, once for all heads, and scores, messages
// and gradients are products of the rows that these lists name. Edges are taken in blocks of senders (and, for the
// gradients of senders, chunks of receivers) whose rows fit into the first cache. Many edges: products of whole tiles.
//
// A task is one head of one image. It owns what it writes, and sums over heads and images are taken afterwards in their
// order; so results do not depend on the number of threads.

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "edge_lists.h"
#include "row_products.h"
#include "softmax.h"

namespace m2mkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWaveInMemory = 64 << 20;  // bytes
constexpr int64_t kTasksPerThread = 4;       // at least, between two waits of all threads for each other

template <typename scalar_t>
scalar_t largest_lane(const Vector<scalar_t>& values) {
  scalar_t largest = values[0];
  for (int64_t i = 1; i < kLanes<scalar_t>; ++i) {
    largest = values[i] > largest ? values[i] : largest;
  }
  return largest;
}

template <typename scalar_t>
scalar_t sum_of_lanes(const Vector<scalar_t>& values) {
  scalar_t sum = values[0];
  for (int64_t i = 1; i < kLanes<scalar_t>; ++i) {
    sum += values[i];
  }
  return sum;
}

// scores *= scale, += log_weight where there is one; -inf from `count` up to `padded`, a multiple of the lanes.
template <typename scalar_t>
void shift_scores(
    scalar_t* scores, const scalar_t* log_weight, int64_t count, int64_t padded, scalar_t scale) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    if (log_weight == nullptr) {
      vector_at(scores + i) *= scale;
    } else {
      vector_at(scores + i) = vector_at(scores + i) * scale + vector_at(log_weight + i);
    }
  }
  for (; i < count; ++i) {
    scores[i] = scores[i] * scale + (log_weight == nullptr ? scalar_t(0) : log_weight[i]);
  }
  std::fill(scores + i, scores + padded, -std::numeric_limits<scalar_t>::infinity());
}

// Turns shifted scores, -inf behind them, into exp(score - largest). Returns their sum and sets the largest.
template <typename scalar_t>
scalar_t exponentiate(scalar_t* scores, int64_t padded, scalar_t& largest) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  Vector<scalar_t> best = vector_at(scores);
  for (int64_t i = lanes; i < padded; i += lanes) {
    const Vector<scalar_t> score = vector_at(scores + i);
    best = score > best ? score : best;
  }
  largest = largest_lane<scalar_t>(best);
  for (int64_t i = 0; i < padded; i += lanes) {
    vector_at(scores + i) -= largest;
  }
  exp_of_nonpositive(scores, padded);
  Vector<scalar_t> sum = {};
  for (int64_t i = 0; i < padded; i += lanes) {
    sum += vector_at(scores + i);
  }
  return sum_of_lanes<scalar_t>(sum);
}

// From shifted scores, -inf behind them, the softmax weights, and from the gradient of the weights that of the scores:
// weights * (gradient - sum of weights * gradients).
//
// Neither comes from what the forward kept. exp(score - logsumexp) has the rounding of logsumexp, which is that of the
// largest score, in all weights of a receiver; and grad_out . out is the sum here, but rounded otherwise, where a
// receiver with one sender has a gradient of exactly 0.
template <typename scalar_t>
void differentiate(scalar_t* scores, scalar_t* grad, int64_t padded) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  scalar_t largest;
  const scalar_t factor = 1 / exponentiate(scores, padded, largest);
  Vector<scalar_t> sum = {};
  for (int64_t i = 0; i < padded; i += lanes) {
    vector_at(scores + i) *= factor;
    sum += vector_at(scores + i) * vector_at(grad + i);
  }
  const scalar_t mean = sum_of_lanes<scalar_t>(sum);
  for (int64_t i = 0; i < padded; i += lanes) {
    vector_at(grad + i) = vector_at(scores + i) * (vector_at(grad + i) - mean);
  }
}

template <typename scalar_t>
void copy_scaled(const scalar_t* source, int64_t count, scalar_t factor, scalar_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = factor * source[i];
  }
}

template <typename scalar_t>
struct Forward {
  Sizes<scalar_t> sizes;
  Heads<const scalar_t> query, key, value;
  Heads<scalar_t> out;
  scalar_t* logsumexp;  // [images, heads, receivers]

  // A receiver's message from the sum of senders with weights exp(score - largest).
  void write(
      int64_t image, int64_t head, int64_t u, const scalar_t* sum_of_senders, scalar_t largest, scalar_t sum) const {
    const bool alone = largest == -std::numeric_limits<scalar_t>::infinity() && sum == 0;
    copy_scaled(sum_of_senders, sizes.head_dim, alone ? scalar_t(0) : 1 / sum, out.at(image, head, u));
    logsumexp[(image * sizes.heads + head) * sizes.receivers + u] = largest + std::log(sum);
  }

  // Receivers begin ... end of one head.
  void sparse(
      const Graph<scalar_t>& graph, int64_t image, int64_t head, int64_t begin, int64_t end,
      Workspace<scalar_t>& workspace) const {
    const int64_t blocks = sizes.sender_blocks.count, width = sizes.width, rows = sizes.chunks.size;
    scalar_t* keys = workspace.take(sizes.senders * width);
    scalar_t* values = workspace.take(sizes.senders * width);
    scalar_t* queries = workspace.take(rows * width);
    scalar_t* sums = workspace.take(rows * width);
    scalar_t* scores = workspace.take(rows * (round_up(sizes.senders, kLanes<scalar_t>) + kLanes<scalar_t>));
    copy_rows(key.at(image, head), key.row, sizes.senders, sizes.head_dim, width, keys);
    copy_rows(value.at(image, head), value.row, sizes.senders, sizes.head_dim, width, values);
    with_vectors<scalar_t>(width, [&](auto vectors) {
      for (int64_t first = begin; first < end; first += rows) {
        const int64_t some = std::min(rows, end - first);
        const int32_t* block_start = graph.block_start.data() + first * (blocks + 1);
        scalar_t* score = scores - block_start[0];  // by slot
        copy_rows(query.at(image, head, first), query.row, some, sizes.head_dim, width, queries);
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t r = 0; r < some; ++r) {
            const int32_t* start = block_start + r * (blocks + 1) + block;
            multiply_rows(
                queries + r * width, keys, graph.sender_row.data() + start[0], start[1] - start[0],
                vectors, score + start[0]);
          }
        }
        scalar_t largest[kMostRows], sum[kMostRows];
        for (int64_t r = 0; r < some; ++r) {
          const int32_t slot = block_start[r * (blocks + 1)];
          const int64_t degree = graph.degree[first + r], padded = round_up(degree, kLanes<scalar_t>);
          shift_scores(score + slot, graph.log_weight.data() + slot, degree, padded, sizes.scale);
          largest[r] = -std::numeric_limits<scalar_t>::infinity();
          sum[r] = degree == 0 ? scalar_t(0) : exponentiate(score + slot, padded, largest[r]);
        }
        std::fill_n(sums, some * width, scalar_t(0));
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t r = 0; r < some; ++r) {
            const int32_t* start = block_start + r * (blocks + 1) + block;
            const scalar_t* weight = score + start[0];
            add_rows([&](int64_t i) { return weight[i]; }, values, graph.sender_row.data() + start[0],
                     start[1] - start[0], vectors, sums + r * width);
          }
        }
        for (int64_t r = 0; r < some; ++r) {
          write(image, head, first + r, sums + r * width, largest[r], sum[r]);
        }
      }
    });
  }
  // A row has at least `lanes` elements, of which kRowsInCache bytes hold no more than this.
  static constexpr int64_t kMostRows = kRowsInCache / 32;

  void dense(
      const Graph<scalar_t>& graph, int64_t image, int64_t head, int64_t begin, int64_t end,
      Workspace<scalar_t>& workspace) const {
    const int64_t columns = sizes.columns, rows = sizes.tile_chunks.size;
    scalar_t* keys = workspace.take(columns * sizes.head_dim);
    scalar_t* values = workspace.take(sizes.senders * sizes.panels_width);
    scalar_t* queries = workspace.take(rows * sizes.width);
    scalar_t* scores = workspace.take(rows * columns);
    scalar_t* sums = workspace.take(rows * sizes.panels_width);
    copy_transposed_panels(key.at(image, head), key.row, sizes.senders, sizes.head_dim, keys);
    copy_panels(value.at(image, head), value.row, sizes.senders, sizes.head_dim, values);
    for (int64_t first = begin; first < end; first += rows) {
      const int64_t some = std::min(rows, end - first), padded_rows = round_up(some, kTileRows);
      copy_rows(query.at(image, head, first), query.row, some, sizes.head_dim, sizes.width, queries);
      std::fill(queries + some * sizes.width, queries + padded_rows * sizes.width, scalar_t(0));
      multiply_panels(
          queries, sizes.width, 1, padded_rows, keys, sizes.head_dim, columns, false, scores,
          columns);
      scalar_t largest[kMostTileRows], sum[kMostTileRows];
      for (int64_t r = 0; r < some; ++r) {
        scalar_t* score = scores + r * columns;
        largest[r] = -std::numeric_limits<scalar_t>::infinity();
        sum[r] = 0;
        if (graph.degree[first + r] > 0) {
          shift_scores(score, log_weights(graph, first + r), sizes.senders, columns, sizes.scale);
          sum[r] = exponentiate(score, columns, largest[r]);
        }
      }
      multiply_panels(
          scores, columns, 1, padded_rows, values, sizes.senders, sizes.panels_width, false, sums,
          sizes.panels_width);
      for (int64_t r = 0; r < some; ++r) {
        write(image, head, first + r, sums + r * sizes.panels_width, largest[r], sum[r]);
      }
    }
  }
  static constexpr int64_t kMostTileRows = 17 * kTileRows;

  const scalar_t* log_weights(const Graph<scalar_t>& graph, int64_t u) const {
    return graph.log_affinity == nullptr ? nullptr : graph.log_affinity + u * sizes.senders;
  }
};

template <typename scalar_t>
struct Backward {
  Sizes<scalar_t> sizes;
  Heads<const scalar_t> grad_out, query, key, value;
  Heads<scalar_t> grad_query, grad_key, grad_value;

  // grad_scores: where each slot's gradient goes.
  void sparse(
      const Graph<scalar_t>& graph, int64_t image, int64_t head, scalar_t* grad_scores,
      Workspace<scalar_t>& workspace) const {
    const int64_t blocks = sizes.sender_blocks.count, width = sizes.width, rows = sizes.chunks.size;
    scalar_t* keys = workspace.take(sizes.senders * width);
    scalar_t* values = workspace.take(sizes.senders * width);
    scalar_t* key_sums = workspace.take(sizes.senders * width);
    scalar_t* value_sums = workspace.take(sizes.senders * width);
    scalar_t* queries = workspace.take(rows * width);
    scalar_t* grads = workspace.take(rows * width);
    scalar_t* query_sums = workspace.take(rows * width);
    scalar_t* scores = workspace.take(rows * (round_up(sizes.senders, kLanes<scalar_t>) + kLanes<scalar_t>));
    copy_rows(key.at(image, head), key.row, sizes.senders, sizes.head_dim, width, keys);
    copy_rows(value.at(image, head), value.row, sizes.senders, sizes.head_dim, width, values);
    std::fill_n(key_sums, sizes.senders * width, scalar_t(0));
    std::fill_n(value_sums, sizes.senders * width, scalar_t(0));
    with_vectors<scalar_t>(width, [&](auto vectors) {
      for (int64_t chunk = 0; chunk < sizes.chunks.count; ++chunk) {
        const int64_t first = sizes.chunks.begin(chunk), some = sizes.chunks.begin(chunk + 1) - first;
        if (some == 0) {
          continue;
        }
        const int32_t* block_start = graph.block_start.data() + first * (blocks + 1);
        scalar_t *score = scores - block_start[0], *grad = grad_scores;  // by slot
        copy_rows(query.at(image, head, first), query.row, some, sizes.head_dim, width, queries);
        copy_rows(grad_out.at(image, head, first), grad_out.row, some, sizes.head_dim, width, grads);
        const auto for_each_block = [&](auto&& visit) {
          for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t r = 0; r < some; ++r) {
              const int32_t* start = block_start + r * (blocks + 1) + block;
              visit(r * width, start[0], start[1] - start[0]);
            }
          }
        };
        for_each_block([&](int64_t row, int64_t slot, int64_t count) {
          multiply_rows(
              queries + row, keys, graph.sender_row.data() + slot, count, vectors, score + slot);
        });
        for_each_block([&](int64_t row, int64_t slot, int64_t count) {
          multiply_rows(
              grads + row, values, graph.sender_row.data() + slot, count, vectors, grad + slot);
        });
        for (int64_t r = 0; r < some; ++r) {
          const int32_t slot = block_start[r * (blocks + 1)];
          const int64_t degree = graph.degree[first + r], padded = round_up(degree, kLanes<scalar_t>);
          shift_scores(score + slot, graph.log_weight.data() + slot, degree, padded, sizes.scale);
          std::fill(grad + slot + degree, grad + slot + padded, scalar_t(0));
          if (degree > 0) {
            differentiate(score + slot, grad + slot, padded);
          }
        }
        std::fill_n(query_sums, some * width, scalar_t(0));
        for_each_block([&](int64_t row, int64_t slot, int64_t count) {
          add_rows([&](int64_t i) { return grad[slot + i]; }, keys, graph.sender_row.data() + slot, count,
                   vectors, query_sums + row);
        });
        for (int64_t r = 0; r < some; ++r) {
          copy_scaled(
              query_sums + r * width, sizes.head_dim, sizes.scale, grad_query.at(image, head, first + r));
        }
        const int32_t* sender_start = graph.by_sender_start.data() + chunk * (sizes.senders + 1);
        const auto add_receivers = [&](const scalar_t* weight, scalar_t* receivers,
                                       scalar_t* sums) {
          for (int64_t v = 0; v < sizes.senders; ++v) {
            const int32_t* slot = graph.slot.data() + sender_start[v];
            add_rows([&](int64_t i) { return weight[slot[i]]; }, receivers,
                     graph.receiver_row.data() + sender_start[v], sender_start[v + 1] - sender_start[v], vectors,
                     sums + v * width);
          }
        };
        add_receivers(grad + block_start[0], queries, key_sums);
        add_receivers(score + block_start[0], grads, value_sums);
      }
    });
    write_senders(image, head, key_sums, value_sums, width);
  }

  void dense(
      const Graph<scalar_t>& graph, int64_t image, int64_t head, scalar_t* grad_scores,
      Workspace<scalar_t>& workspace) const {
    const int64_t columns = sizes.columns, rows = sizes.tile_chunks.size, width = sizes.width;
    const int64_t panels_width = sizes.panels_width, sender_rows = round_up(sizes.senders, kTileRows);
    scalar_t* transposed_keys = workspace.take(columns * sizes.head_dim);
    scalar_t* transposed_values = workspace.take(columns * sizes.head_dim);
    scalar_t* keys = workspace.take(sizes.senders * panels_width);
    scalar_t* key_sums = workspace.take(sender_rows * panels_width);
    scalar_t* value_sums = workspace.take(sender_rows * panels_width);
    scalar_t* queries = workspace.take(rows * width);
    scalar_t* grads = workspace.take(rows * width);
    scalar_t* query_sums = workspace.take(rows * panels_width);
    scalar_t* query_panels = workspace.take(rows * panels_width);
    scalar_t* grad_panels = workspace.take(rows * panels_width);
    scalar_t* scores = workspace.take(rows * columns + kSlack);
    copy_transposed_panels(key.at(image, head), key.row, sizes.senders, sizes.head_dim, transposed_keys);
    copy_transposed_panels(value.at(image, head), value.row, sizes.senders, sizes.head_dim, transposed_values);
    copy_panels(key.at(image, head), key.row, sizes.senders, sizes.head_dim, keys);
    std::fill_n(key_sums, sender_rows * panels_width, scalar_t(0));
    std::fill_n(value_sums, sender_rows * panels_width, scalar_t(0));
    for (int64_t first = 0; first < sizes.receivers; first += rows) {
      const int64_t some = std::min(rows, sizes.receivers - first), padded_rows = round_up(some, kTileRows);
      scalar_t* grad = grad_scores + first * columns;
      const auto load = [&](const auto& source, scalar_t* dense_rows, scalar_t* panels) {
        copy_rows(source.at(image, head, first), source.row, some, sizes.head_dim, width, dense_rows);
        std::fill(dense_rows + some * width, dense_rows + padded_rows * width, scalar_t(0));
        copy_panels(dense_rows, width, padded_rows, sizes.head_dim, panels);
      };
      load(query, queries, query_panels);
      load(grad_out, grads, grad_panels);
      multiply_panels(
          queries, width, 1, padded_rows, transposed_keys, sizes.head_dim, columns, false, scores,
          columns);
      multiply_panels(
          grads, width, 1, padded_rows, transposed_values, sizes.head_dim, columns, false, grad, columns);
      for (int64_t r = 0; r < padded_rows; ++r) {
        scalar_t *score = scores + r * columns, *row_grad = grad + r * columns;
        if (r >= some || graph.degree[first + r] == 0) {
          std::fill_n(score, columns, scalar_t(0));
          std::fill_n(row_grad, columns, scalar_t(0));
          continue;
        }
        const scalar_t* log_weight =
            graph.log_affinity == nullptr ? nullptr : graph.log_affinity + (first + r) * sizes.senders;
        shift_scores(score, log_weight, sizes.senders, columns, sizes.scale);
        differentiate(score, row_grad, columns);
      }
      multiply_panels(
          grad, columns, 1, padded_rows, keys, sizes.senders, panels_width, false, query_sums,
          panels_width);
      for (int64_t r = 0; r < some; ++r) {
        copy_scaled(
            query_sums + r * panels_width, sizes.head_dim, sizes.scale, grad_query.at(image, head, first + r));
      }
      // Rows behind the last sender are of the next receiver; nobody reads what comes of them.
      multiply_panels(
          grad, 1, columns, sender_rows, query_panels, padded_rows, panels_width, true, key_sums,
          panels_width);
      multiply_panels(
          scores, 1, columns, sender_rows, grad_panels, padded_rows, panels_width, true,
          value_sums, panels_width);
    }
    write_senders(image, head, key_sums, value_sums, panels_width);
  }

  void write_senders(
      int64_t image, int64_t head, scalar_t* key_sums, scalar_t* value_sums,
      int64_t width) const {
    for (int64_t v = 0; v < sizes.senders; ++v) {
      copy_scaled(key_sums + v * width, sizes.head_dim, sizes.scale, grad_key.at(image, head, v));
      copy_scaled(value_sums + v * width, sizes.head_dim, scalar_t(1), grad_value.at(image, head, v));
    }
  }
};

// Sums the gradients of the scores over heads, and over images where these share the graph.
template <typename scalar_t>
class AffinityGradient {
 public:
  AffinityGradient(const Sizes<scalar_t>& sizes, scalar_t* grad, bool shared)
      : sizes_(sizes), grad_(grad), shared_(shared) {}

  // Adds `images` images from `first` on; grad_scores is [images, heads, slots], of each image at its place.
  void add(
      const std::vector<Graph<scalar_t>>& graphs, int64_t first, int64_t images, const scalar_t* grad_scores,
      const std::vector<int64_t>& place) {
    if (shared_ && total_.data() == nullptr) {
      total_ = Buffer<scalar_t>(graphs[0].slots);
      std::fill_n(total_.data(), graphs[0].slots, scalar_t(0));
    }
    const int64_t rows = shared_ ? sizes_.receivers : images * sizes_.receivers;
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      with_best_instructions([&] {
        const Buffer<scalar_t> sums(sizes_.columns + kSlack);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t u = i % sizes_.receivers;
          if (shared_) {
            const int64_t slot = graphs[0].first_slot(sizes_, u), count = slots(graphs[0], u);
            for (int64_t image = 0; image < images; ++image) {
              sum_heads(grad_scores + place[image], graphs[0].slots, slot, count, sums.data());
              for (int64_t k = 0; k < count; ++k) {
                total_[slot + k] += sums[k];
              }
            }
          } else {
            const int64_t image = i / sizes_.receivers;
            const Graph<scalar_t>& graph = graphs[image];
            sum_heads(
                grad_scores + place[image], graph.slots, graph.first_slot(sizes_, u), slots(graph, u), sums.data());
            spread(graph, u, sums.data(), grad_ + ((first + image) * sizes_.receivers + u) * sizes_.senders);
          }
        }
      });
    });
  }

  // To be called at the end where images share the graph.
  void finish(const Graph<scalar_t>& graph) const {
    torch::stable::parallel_for(0, sizes_.receivers, 64, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        spread(graph, u, total_.data() + graph.first_slot(sizes_, u), grad_ + u * sizes_.senders);
      }
    });
  }

 private:
  int64_t slots(const Graph<scalar_t>& graph, int64_t u) const {
    return graph.dense ? sizes_.senders : graph.degree[u];
  }

  void sum_heads(const scalar_t* heads, int64_t stride, int64_t slot, int64_t count, scalar_t* sums) const {
    std::copy_n(heads + slot, count, sums);
    for (int64_t head = 1; head < sizes_.heads; ++head) {
      const scalar_t* more = heads + head * stride + slot;
      for (int64_t k = 0; k < count; ++k) {
        sums[k] += more[k];
      }
    }
  }

  // Slots of a receiver to its row of all senders.
  void spread(const Graph<scalar_t>& graph, int64_t u, const scalar_t* values, scalar_t* row) const {
    if (graph.dense) {
      std::copy_n(values, sizes_.senders, row);
      return;
    }
    std::fill_n(row, sizes_.senders, scalar_t(0));
    const int32_t* sender_row = graph.sender_row.data() + graph.first_slot(sizes_, u);
    for (int64_t k = 0; k < graph.degree[u]; ++k) {
      row[sender_row[k] / sizes_.width] = values[k];
    }
  }

  const Sizes<scalar_t>& sizes_;
  scalar_t* grad_;
  bool shared_;
  Buffer<scalar_t> total_;
};

// Images that are worked on together: enough to keep all threads busy, and more while their gradients of scores, a
// number for each edge and head, stay within kWaveInMemory.
template <typename scalar_t>
Blocks waves_of(const Sizes<scalar_t>& sizes) {
  const int64_t tasks = kTasksPerThread * torch::stable::get_num_threads();
  const int64_t image = sizes.heads * sizes.receivers * sizes.columns * int64_t(sizeof(scalar_t));
  return {sizes.images, std::max((tasks + sizes.heads - 1) / sizes.heads, kWaveInMemory / std::max<int64_t>(1, image))};
}

template <typename scalar_t>
void run_forward(const Forward<scalar_t>& forward, const scalar_t* log_affinity, bool shared) {
  const Sizes<scalar_t>& sizes = forward.sizes;
  const Blocks waves = shared ? Blocks(sizes.images, sizes.images) : waves_of(sizes);
  for (int64_t wave = 0; wave < waves.count; ++wave) {
    const int64_t first = waves.begin(wave), images = waves.begin(wave + 1) - first;
    const scalar_t* affinity = shared ? log_affinity : log_affinity + first * sizes.receivers * sizes.senders;
    const auto graphs = graphs_of(sizes, affinity, shared ? 1 : images, false);
    const int64_t heads = images * sizes.heads;
    // Few heads are shared by several threads, each with some of the receivers.
    const int64_t wanted = (2 * torch::stable::get_num_threads() + heads - 1) / heads;
    const Blocks parts(sizes.receivers, std::max<int64_t>(64, (sizes.receivers + wanted - 1) / wanted));
    torch::stable::parallel_for(0, heads * parts.count, 1, [&](int64_t begin, int64_t end) {
      with_best_instructions([&] {
        Workspace<scalar_t> workspace;
        for (int64_t i = begin; i < end; ++i) {
          workspace.restart();
          const int64_t image = i / parts.count / sizes.heads, head = i / parts.count % sizes.heads;
          const int64_t part = i % parts.count;
          const Graph<scalar_t>& graph = graphs[shared ? 0 : image];
          if (graph.dense) {
            forward.dense(graph, first + image, head, parts.begin(part), parts.begin(part + 1), workspace);
          } else {
            forward.sparse(graph, first + image, head, parts.begin(part), parts.begin(part + 1), workspace);
          }
        }
      });
    });
  }
}

template <typename scalar_t>
void run_backward(
    const Backward<scalar_t>& backward, const scalar_t* log_affinity, bool shared, scalar_t* grad_affinity) {
  const Sizes<scalar_t>& sizes = backward.sizes;
  AffinityGradient<scalar_t> gradient(sizes, grad_affinity, shared);
  std::vector<Graph<scalar_t>> graphs;
  const Blocks waves = waves_of(sizes);
  for (int64_t wave = 0; wave < waves.count; ++wave) {
    const int64_t first = waves.begin(wave), images = waves.begin(wave + 1) - first;
    if (!shared || wave == 0) {
      graphs = graphs_of(
          sizes, shared ? log_affinity : log_affinity + first * sizes.receivers * sizes.senders, shared ? 1 : images,
          true);
    }
    std::vector<int64_t> place(images + 1, 0);  // of an image's gradients
    for (int64_t image = 0; image < images; ++image) {
      place[image + 1] = place[image] + sizes.heads * graphs[shared ? 0 : image].slots;
    }
    const Buffer<scalar_t> grad_scores(place[images] + kSlack);
    torch::stable::parallel_for(0, images * sizes.heads, 1, [&](int64_t begin, int64_t end) {
      with_best_instructions([&] {
        Workspace<scalar_t> workspace;
        for (int64_t i = begin; i < end; ++i) {
          workspace.restart();
          const int64_t image = i / sizes.heads, head = i % sizes.heads;
          const Graph<scalar_t>& graph = graphs[shared ? 0 : image];
          scalar_t* mine = grad_scores.data() + place[image] + head * graph.slots;
          graph.dense ? backward.dense(graph, first + image, head, mine, workspace)
                      : backward.sparse(graph, first + image, head, mine, workspace);
        }
      });
    });
    if (grad_affinity != nullptr) {
      gradient.add(graphs, first, images, grad_scores.data(), place);
    }
  }
  if (grad_affinity != nullptr && shared) {
    gradient.finish(graphs[0]);
  }
}

// Contiguous in the last dimension at least.
Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// [B, N, H, D] in memory, seen as [B, H, N, D] like `tensor`.
Tensor heads_last(const Tensor& tensor) {
  return torch::stable::transpose(
      torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}), 1, 2);
}

void check(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& log_affinity) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "query must be float32 or float64");
  for (const Tensor* tensor : {&query, &key, &value}) {
    STD_TORCH_CHECK(tensor->dim() == 4, "query, key and value must be [images, heads, latents, head_dim]");
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, "query, key and value must have one dtype");
    STD_TORCH_CHECK(
        tensor->size(0) == query.size(0) && tensor->size(1) == query.size(1) && tensor->size(3) == query.size(3) &&
            (tensor == &query || tensor->size(2) == key.size(2)),
        "query, key and value do not fit each other");
  }
  STD_TORCH_CHECK(query.size(3) >= 1, "heads must have at least one channel");
  if (log_affinity.has_value()) {
    const int64_t dim = log_affinity->dim();
    STD_TORCH_CHECK(log_affinity->scalar_type() == dtype, "log_affinity must have the dtype of query");
    STD_TORCH_CHECK(
        (dim == 2 || (dim == 3 && log_affinity->size(0) == query.size(0))) &&
            log_affinity->size(dim - 2) == query.size(2) && log_affinity->size(dim - 1) == key.size(2),
        "log_affinity must be [receivers, senders] or [images, receivers, senders]");
  }
}

template <typename Run>
void with_type(const Tensor& tensor, const Run& run) {
  tensor.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
}

std::tuple<Tensor, Tensor> latent_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> log_affinity) {
  check(query, key, value, log_affinity);
  const Tensor out = heads_last(query);
  const Tensor logsumexp = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  if (out.numel() == 0) {
    return {out, logsumexp};
  }
  const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
  if (log_affinity.has_value()) {
    log_affinity = torch::stable::contiguous(*log_affinity);
  }
  with_type(query, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Forward<scalar_t> forward{
        Sizes<scalar_t>(query, key), heads_of<scalar_t>(q), heads_of<scalar_t>(k), heads_of<scalar_t>(v),
        mutable_heads_of<scalar_t>(out), logsumexp.mutable_data_ptr<scalar_t>()};
    run_forward(
        forward, log_affinity.has_value() ? log_affinity->const_data_ptr<scalar_t>() : nullptr,
        !log_affinity.has_value() || log_affinity->dim() == 2);
  });
  return {out, logsumexp};
}

// `out` and `logsumexp` are for kernels that see a receiver's senders piece by piece; these ones see all at once.
std::tuple<Tensor, Tensor, Tensor, Tensor> latent_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    std::optional<Tensor> log_affinity, const Tensor& /*out*/, const Tensor& /*logsumexp*/, bool need_affinity) {
  check(query, key, value, log_affinity);
  STD_TORCH_CHECK(!need_affinity || log_affinity.has_value(), "there is no log_affinity to differentiate");
  STD_TORCH_CHECK(
      grad_out.dim() == 4 && grad_out.size(0) == query.size(0) && grad_out.size(1) == query.size(1) &&
          grad_out.size(2) == query.size(2) && grad_out.size(3) == query.size(3) &&
          grad_out.scalar_type() == query.scalar_type(),
      "grad_out must be like query");
  Tensor grad_query = heads_last(query), grad_key = heads_last(key), grad_value = heads_last(value);
  Tensor grad_affinity = need_affinity ? torch::stable::new_empty(*log_affinity, log_affinity->sizes())
                                       : torch::stable::new_empty(query, {0});
  if (query.numel() == 0 || key.numel() == 0) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_affinity}) {
      torch::stable::zero_(*grad);
    }
    return {grad_query, grad_key, grad_value, grad_affinity};
  }
  const Tensor g = with_dense_rows(grad_out);
  const Tensor q = with_dense_rows(query), k = with_dense_rows(key), v = with_dense_rows(value);
  if (log_affinity.has_value()) {
    log_affinity = torch::stable::contiguous(*log_affinity);
  }
  with_type(query, [&](auto zero) {
    using scalar_t = decltype(zero);
    const Backward<scalar_t> backward{
        Sizes<scalar_t>(query, key), heads_of<scalar_t>(g), heads_of<scalar_t>(q), heads_of<scalar_t>(k),
        heads_of<scalar_t>(v),
        mutable_heads_of<scalar_t>(grad_query), mutable_heads_of<scalar_t>(grad_key),
        mutable_heads_of<scalar_t>(grad_value)};
    run_backward(
        backward, log_affinity.has_value() ? log_affinity->const_data_ptr<scalar_t>() : nullptr,
        !log_affinity.has_value() || log_affinity->dim() == 2,
        need_affinity ? grad_affinity.mutable_data_ptr<scalar_t>() : nullptr);
  });
  return {grad_query, grad_key, grad_value, grad_affinity};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_latent_attention_forward", TORCH_BOX(&m2mkd::latent_attention_forward));
  m.impl("_latent_attention_backward", TORCH_BOX(&m2mkd::latent_attention_backward));
}
