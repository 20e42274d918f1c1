// Products of a large matrix with panels of a few columns, and of two sets of panels, at the speed of the registers.
//
// A panel holds kPanel columns, row by row: two vectors a row. What the rows of the left matrix multiply it with are
// single numbers, so a stored matrix needs no transposition; blocks of it are copied, and converted where it is stored
// in half precision, into memory that stays in the second cache while all panels pass.
//
// An element's sum is taken in one order, whatever the number of rows, of panels and of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"
#include "row_products.h"

namespace m2mkd {

constexpr int64_t kInnerAtOnce = 256;  // a panel's part of this length stays in the first cache

// sum[r] += sum_k left(r, k) panel[k], the element (r, k) at r * row_step + k * inner_step.
template <int64_t row_step, int64_t inner_step, typename scalar_t>
void add_tile(
    const scalar_t* left, const scalar_t* panel, int64_t inner, Vector<scalar_t> (&sum)[kTileRows][2]) {
  constexpr int64_t lanes = kLanes<scalar_t>;
#pragma GCC unroll 4
  for (int64_t k = 0; k < inner; ++k) {
    const Vector<scalar_t> first = vector_at(panel + 2 * lanes * k), second = vector_at(panel + 2 * lanes * k + lanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; ++r) {
      const scalar_t factor = left[r * row_step + k * inner_step];
      sum[r][0] += factor * first;
      sum[r][1] += factor * second;
    }
  }
}

// The left matrix as it is stored: element (r, k) at source[r * stride + k].
struct Rows {
  static constexpr int64_t kRowStep = kInnerAtOnce + 8, kInnerStep = 1, kTileStep = kTileRows * kRowStep;

  static int64_t offset(int64_t stride, int64_t row, int64_t k) {
    return row * stride + k;
  }

  template <typename stored_t, typename scalar_t>
  static void pack(const stored_t* source, int64_t stride, int64_t rows, int64_t inner, scalar_t* out) {
    for (int64_t r = 0; r < rows; ++r) {
      const stored_t* __restrict from = source + r * stride;
      scalar_t* __restrict to = out + r * kRowStep;
      for (int64_t k = 0; k < inner; ++k) {
        to[k] = widened(from[k]);
      }
    }
    for (int64_t r = rows; r < round_up(rows, kTileRows); ++r) {
      std::fill(out + r * kRowStep, out + r * kRowStep + inner, scalar_t(0));
    }
  }
};

// The transpose of what is stored: element (r, k) at source[k * stride + r].
struct Columns {
  static constexpr int64_t kRowStep = 1, kInnerStep = kTileRows, kTileStep = kTileRows * kInnerAtOnce + 8;

  static int64_t offset(int64_t stride, int64_t row, int64_t k) {
    return k * stride + row;
  }

  template <typename stored_t, typename scalar_t>
  static void pack(const stored_t* source, int64_t stride, int64_t rows, int64_t inner, scalar_t* out) {
    constexpr int64_t kAtOnce = 8;  // numbers: whole vectors, of which the last ones are overwritten by the next k
    for (int64_t k = 0; k < inner; ++k, source += stride, out += kTileRows) {
      scalar_t* to = out;
      int64_t r = 0;
      for (; r + kAtOnce <= rows; r += kTileRows, to += kTileStep) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kAtOnce; ++i) {
          to[i] = widened(source[r + i]);
        }
      }
      for (; r < rows; r += kTileRows, to += kTileStep) {
        for (int64_t i = 0; i < kTileRows; ++i) {
          to[i] = r + i < rows ? widened(source[r + i]) : scalar_t(0);
        }
      }
    }
  }
};

// out [kTileRows][kPanel] = a packed tile . panel, or is increased by it.
template <typename Left, typename scalar_t>
void multiply_packed_tile(const scalar_t* left, const scalar_t* panel, int64_t inner, bool add, scalar_t* out) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  Vector<scalar_t> sum[kTileRows][2] = {};
  add_tile<Left::kRowStep, Left::kInnerStep>(left, panel, inner, sum);
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r, out += 2 * lanes) {
    vector_at(out) = add ? vector_at(out) + sum[r][0] : sum[r][0];
    vector_at(out + lanes) = add ? vector_at(out + lanes) + sum[r][1] : sum[r][1];
  }
}

// For each of `count` panels: tiles + p * parts * padded rows * kPanel = left . panel(p), padded rows being `rows`
// rounded up to whole tiles; then finish(p, tile). The left matrix has `parts` times so many rows, `part_step` elements
// apart. `packed` and `tiles` are memory to work in.
template <typename Left, typename stored_t, typename scalar_t, typename Panel, typename Finish>
void multiply_panels_by(
    const stored_t* left, int64_t stride, int64_t parts, int64_t part_step, int64_t rows, int64_t inner, int64_t count,
    const Panel& panel, scalar_t* packed, scalar_t* tiles, const Finish& finish) {
  constexpr int64_t width = kPanel<scalar_t>;
  const int64_t tiles_of_part = (rows + kTileRows - 1) / kTileRows, number = parts * tiles_of_part;
  int64_t first = 0;
  do {
    const int64_t some = std::min(kInnerAtOnce, inner - first);
    for (int64_t part = 0; part < parts; ++part) {
      Left::pack(
          left + part * part_step + Left::offset(stride, 0, first), stride, rows, some,
          packed + part * tiles_of_part * Left::kTileStep);
    }
    for (int64_t p = 0; p < count; ++p) {
      const scalar_t* right = panel(p) + first * width;
      scalar_t* out = tiles + p * number * kTileRows * width;
      for (int64_t tile = 0; tile < number; ++tile) {
        // A function of its own: among other code compilers run out of registers and keep sums in memory.
        with_best_instructions([&] {
          multiply_packed_tile<Left>(
              packed + tile * Left::kTileStep, right, some, first > 0, out + tile * kTileRows * width);
        });
      }
      if (first + some == inner) {
        finish(p, out);
      }
    }
    first += some;
  } while (first < inner);
}

// sum[r] = sum over panels p and their columns n of left[p](r, n) right[p][n]: the left panels `left_step` apart, the
// right ones, each kPanel rows of two vectors, side by side.
template <typename scalar_t>
void multiply_panels_of_tokens(
    const scalar_t* left, int64_t left_step, const scalar_t* right, int64_t panels,
    Vector<scalar_t> (&sum)[kTileRows][2]) {
  constexpr int64_t width = kPanel<scalar_t>;
  with_best_instructions([&] {
    const scalar_t *from = left, *with = right;
    Vector<scalar_t> total[kTileRows][2] = {};
    for (int64_t p = 0, number = panels, step = left_step; p < number; ++p, from += step, with += width * width) {
      add_tile<width, 1>(from, with, width, total);
    }
    std::copy(&total[0][0], &total[0][0] + 2 * kTileRows, &sum[0][0]);
  });
}

}  // namespace m2mkd
