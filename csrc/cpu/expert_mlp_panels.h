// The operands of a round of `expert_mlp` and what both directions do with them: rows are gathered from tokens into
// panels, multiplied with the experts' weights, stored, and added up to tokens.
//
// Apart from forward and backward, which differ in what they do between these steps.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "expert_mlp_problem.h"
#include "expert_mlp_rounds.h"
#include "half.h"
#include "instruction_set.h"
#include "packed_product.h"
#include "row_products.h"

namespace m2mkd {
namespace {

// Memory for each thread to multiply in.
template <typename scalar_t>
class Desks {
 public:
  explicit Desks(int64_t panels)
      : size_(kPacked + panels * kRowsOfBlock * kPanel<scalar_t>),
        memory_(std::max<int64_t>(1, torch::stable::get_num_threads()) * size_) {}
  scalar_t* packed(int64_t slot) const {
    return memory_.data() + slot * size_;
  }
  scalar_t* tiles(int64_t slot) const {
    return packed(slot) + kPacked;
  }

 private:
  static constexpr int64_t kPacked = kRowsOfBlock / kTileRows * std::max(Rows::kTileStep, Columns::kTileStep);
  int64_t size_;
  Buffer<scalar_t> memory_;
};

// Panels of a round, `width` rows each.
template <typename scalar_t>
struct Panels {
  int64_t step;  // from one panel to the next
  Buffer<scalar_t> memory;

  // An odd number of tiles from panel to panel: neighbours then share no set of the first cache.
  Panels(int64_t panels, int64_t width)
      : step((round_up(width, 64) + kTileRows) * kPanel<scalar_t>), memory(std::max<int64_t>(1, panels * step)) {}
  scalar_t* of(int64_t panel) const {
    return memory.data() + panel * step;
  }
};

// The same numbers with rows and columns exchanged, to be the right side of a sum over tokens: [width / kPanel] times
// [panels of the round] times [tokens][kPanel units].
template <typename scalar_t>
struct TurnedPanels {
  static constexpr int64_t kWidth = kPanel<scalar_t>;
  int64_t panels;
  Buffer<scalar_t> memory;

  TurnedPanels(int64_t number, int64_t width)
      : panels(number), memory(std::max<int64_t>(1, number * round_up(width, kWidth) * kWidth)) {}
  scalar_t* of(int64_t first_unit, int64_t panel) const {
    return memory.data() + (first_unit / kWidth * panels + panel) * kWidth * kWidth;
  }
};

// Dropout of outputs first (whole groups from the first one) to first + some of the panel that starts at this row.
template <typename scalar_t>
void drop_outputs(const Problem& problem, int64_t row, int64_t first, int64_t some, scalar_t* values) {
  if (!problem.output_dropout.active()) {
    return;
  }
  constexpr int64_t lanes = kPanel<scalar_t>;
  scalar_t factors[kGroup * lanes];
  for (int64_t group = 0; group < some; group += kGroup) {
    const int64_t count = std::min(kGroup, some - group);
    problem.output_dropout.factors(row, first + group, count, factors);
    drop(factors, count * lanes, values + group * lanes);
  }
}

// panel[c][lane] = row lane's number c; zeros in the lanes of missing rows.
template <typename stored_t, typename scalar_t>
void gather_panel(
    const stored_t* source, const int64_t* token, int64_t rows, int64_t width, scalar_t* __restrict panel) {
  constexpr int64_t lanes = kPanel<scalar_t>, kAtOnce = 64;
  for (int64_t first = 0; first < width; first += kAtOnce) {
    const int64_t end = std::min(width, first + kAtOnce);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (lane < rows) {
        const stored_t* row = source + token[lane] * width;
        for (int64_t c = first; c < end; ++c) {
          panel[c * lanes + lane] = widened(row[c]);
        }
      } else {
        for (int64_t c = first; c < end; ++c) {
          panel[c * lanes + lane] = 0;
        }
      }
    }
  }
}

// The same, turned.
template <typename stored_t, typename scalar_t>
void gather_turned(
    const stored_t* source, const int64_t* token, int64_t rows, int64_t width, const TurnedPanels<scalar_t>& turned,
    int64_t panel) {
  constexpr int64_t lanes = kPanel<scalar_t>;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const stored_t* row = source + (lane < rows ? token[lane] * width : 0);
    for (int64_t first = 0; first < width; first += lanes) {
      scalar_t* __restrict out = turned.of(first, panel) + lane * lanes;
      for (int64_t c = 0; c < std::min(lanes, width - first); ++c) {
        out[c] = lane < rows ? widened(row[first + c]) : scalar_t(0);
      }
    }
  }
}

// For every segment of a round and every block of rows of the experts' matrices (as `Left` reads them, `parts` of
// `rows` rows, `inner` long, `matrix` elements from expert to expert): the product with the panels, and
// finish(segment, p, first row of the block, number of rows, tile), a tile being `parts` times [rows rounded up to whole
// tiles][kPanel].
template <typename Left, typename stored_t, typename scalar_t, typename Finish>
void multiply_experts(
    const Round& round, const stored_t* matrices, int64_t matrix, int64_t stride, int64_t parts, int64_t rows,
    int64_t inner, const Panels<scalar_t>& panels, const Desks<scalar_t>& desks, const Finish& finish) {
  const Blocks blocks(rows, kRowsOfBlock / parts);
  const auto segments = static_cast<int64_t>(round.segments.size());
  const double work = static_cast<double>(parts * rows) * inner * round.panels * kPanel<scalar_t>;
  divide(blocks.count * segments, work, [&](int64_t slot, int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t unit = begin; unit < end; ++unit) {
        const Segment& segment = round.segments[unit % segments];
        const int64_t first = unit / segments * blocks.size, some = std::min(blocks.size, rows - first);
        multiply_panels_by<Left>(
            matrices + segment.expert * matrix + Left::offset(stride, first, 0), stride, parts,
            Left::offset(stride, rows, 0), some, inner, segment.panels,
            [&](int64_t p) { return panels.of(segment.panel + p); }, desks.packed(slot), desks.tiles(slot),
            [&](int64_t p, scalar_t* tile) { finish(segment, p, first, some, tile); });
      }
    });
  });
}

// rows[row + lane][first + i] = weight[lane] tile[i][lane]
template <typename scalar_t>
void store_rows(
    const scalar_t* tile, int64_t row, int64_t rows, int64_t first, int64_t some, int64_t width,
    scalar_t* __restrict out, const scalar_t* weight) {
  for (int64_t lane = 0; lane < rows; ++lane) {
    const scalar_t factor = weight[lane];
    scalar_t* __restrict to = out + (row + lane) * width + first;
    for (int64_t i = 0; i < some; ++i) {
      to[i] = factor * tile[i * kPanel<scalar_t> + lane];
    }
  }
}

// out[token] = sum of its rows, in the order of its places.
template <typename stored_t, typename scalar_t>
void combine(const Problem& problem, const scalar_t* rows, int64_t width, stored_t* out) {
  const int64_t* place = Problem::of<int64_t>(problem.place);
  const double work = static_cast<double>(problem.tokens) * (problem.places + width) * 16;
  divide(problem.tokens, work, [&](int64_t, int64_t begin, int64_t end) {
    Buffer<scalar_t> memory(width);
    scalar_t* __restrict sum = memory.data();
    with_best_instructions([&] {
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum, sum + width, scalar_t(0));
        for (int64_t k = 0; k < problem.places; ++k) {
          const int64_t row = place[t * problem.places + k];
          if (row < 0) {
            continue;
          }
          const scalar_t* __restrict term = rows + row * width;
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += term[i];
          }
        }
        stored_t* __restrict to = out + t * width;
        for (int64_t i = 0; i < width; ++i) {
          round_to(sum[i], to[i]);
        }
      }
    });
  });
}

}  // namespace
}  // namespace m2mkd
