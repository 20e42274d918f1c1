// Products of dense rows, picked by index or all of them, written so that their sums stay in registers.
//
// Rows are padded with zeros to whole vectors (`padded_width`) and start at cache lines; then no product has a rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "instruction_set.h"

namespace m2mkd {

template <typename scalar_t>
using Vector = typename VectorOf<scalar_t>::type;

template <typename scalar_t>
constexpr int64_t kLanes = VectorOf<scalar_t>::size;

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// Memory that starts at a cache line and is not set to anything.
template <typename Item>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : items_(static_cast<Item*>(::operator new(size * sizeof(Item), kLine))) {}
  Item* data() const {
    return items_.get();
  }
  Item& operator[](int64_t i) const {
    return items_.get()[i];
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(Item* items) const {
      ::operator delete(items, kLine);
    }
  };
  std::unique_ptr<Item, Free> items_;
};

// Buffers that a thread uses again for each of its tasks.
template <typename scalar_t>
class Workspace {
 public:
  // Gives the buffers from the first one on again.
  void restart() {
    next_ = 0;
  }
  // The next one, grown where it is smaller than `size`; what it holds means nothing.
  scalar_t* take(int64_t size) {
    if (next_ == buffers_.size()) {
      buffers_.emplace_back();
      sizes_.push_back(-1);
    }
    if (sizes_[next_] < size) {
      buffers_[next_] = Buffer<scalar_t>(size);
      sizes_[next_] = size;
    }
    return buffers_[next_++].data();
  }

 private:
  std::vector<Buffer<scalar_t>> buffers_;
  std::vector<int64_t> sizes_;
  size_t next_ = 0;
};

template <typename scalar_t>
const Vector<scalar_t>& vector_at(const scalar_t* place) {
  return *reinterpret_cast<const Vector<scalar_t>*>(place);
}
template <typename scalar_t>
Vector<scalar_t>& vector_at(scalar_t* place) {
  return *reinterpret_cast<Vector<scalar_t>*>(place);
}

// Calls run with the number of vectors in a row of this padded width, as a constant of the compiler for heads of 64.
template <typename scalar_t, typename Run>
void with_vectors(int64_t width, const Run& run) {
  constexpr int64_t usual = 64 / kLanes<scalar_t>;
  width == 64 ? run(std::integral_constant<int64_t, usual>{}) : run(width / kLanes<scalar_t>);
}

// out[i] = sum of the lanes of sums[i].
inline void store_lane_sums(const Vector<float> (&v)[8], float* out) {
#define M2MKD_PAIR(a, b) \
  (__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15))
#define M2MKD_FOUR(a, b) \
  (__builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
  const Vector<float> low = M2MKD_FOUR(M2MKD_PAIR(v[0], v[1]), M2MKD_PAIR(v[2], v[3]));
  const Vector<float> high = M2MKD_FOUR(M2MKD_PAIR(v[4], v[5]), M2MKD_PAIR(v[6], v[7]));
  vector_at(out) = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
                   __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
#undef M2MKD_PAIR
#undef M2MKD_FOUR
}
inline void store_lane_sums(const Vector<double> (&v)[4], double* out) {
  const Vector<double> low = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6) +
      __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
  const Vector<double> high = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6) +
      __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
  vector_at(out) = __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7);
}

// out[i] = query . rows[offset[i]], for i < count and on to the next multiple of the lanes: offsets there have to be
// valid, and what is written there means nothing.
template <typename scalar_t, typename Vectors>
void multiply_rows(
    const scalar_t* query, const scalar_t* rows, const int32_t* offset, int64_t count, Vectors vectors, scalar_t* out) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  for (int64_t first = 0; first < count; first += lanes) {
    const scalar_t* row[lanes];
    Vector<scalar_t> sum[lanes] = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < lanes; ++i) {
      row[i] = rows + offset[first + i];
    }
    for (int64_t j = 0; j < vectors * lanes; j += lanes) {
      const Vector<scalar_t> part = vector_at(query + j);
#pragma GCC unroll 8
      for (int64_t i = 0; i < lanes; ++i) {
        sum[i] += part * vector_at(row[i] + j);
      }
    }
    store_lane_sums(sum, out + first);
  }
}

// out += sum_i weight(i) rows[offset[i]], for `number` vectors of the rows.
template <int64_t number, typename scalar_t, typename Weight>
void add_part_of_rows(
    const Weight& weight, const scalar_t* rows, const int32_t* offset, int64_t count, scalar_t* out) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  Vector<scalar_t> sum[number];
#pragma GCC unroll 8
  for (int64_t j = 0; j < number; ++j) {
    sum[j] = vector_at(out + j * lanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t* row = rows + offset[i];
    const scalar_t factor = weight(i);
#pragma GCC unroll 8
    for (int64_t j = 0; j < number; ++j) {
      sum[j] += factor * vector_at(row + j * lanes);
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < number; ++j) {
    vector_at(out + j * lanes) = sum[j];
  }
}

// out += sum_i weight(i) rows[offset[i]], for whole rows.
template <typename scalar_t, typename Weight, typename Vectors>
void add_rows(
    const Weight& weight, const scalar_t* rows, const int32_t* offset, int64_t count, Vectors vectors, scalar_t* out) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  if (count == 0) {
    return;
  }
  int64_t j = 0;
  for (; j + 8 <= vectors; j += 8) {
    add_part_of_rows<8>(weight, rows + j * lanes, offset, count, out + j * lanes);
  }
  if (vectors & 4) {
    add_part_of_rows<4>(weight, rows + j * lanes, offset, count, out + j * lanes);
    j += 4;
  }
  if (vectors & 2) {
    add_part_of_rows<2>(weight, rows + j * lanes, offset, count, out + j * lanes);
    j += 2;
  }
  if (vectors & 1) {
    add_part_of_rows<1>(weight, rows + j * lanes, offset, count, out + j * lanes);
  }
}

// Rows of one head lie far apart, so that the processor does not see by itself which memory comes next.
constexpr int64_t kRowsAhead = 6;
template <typename scalar_t>
void prefetch_row(const scalar_t* row, int64_t columns) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t c = 0; c < columns; c += line) {
    __builtin_prefetch(row + c);
  }
}

// out[r] = source[r], with zeros behind up to `width`, a multiple of the lanes.
template <typename scalar_t>
void copy_rows(const scalar_t* source, int64_t stride, int64_t rows, int64_t columns, int64_t width, scalar_t* out) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  for (int64_t r = 0; r < rows; ++r, source += stride, out += width) {
    prefetch_row(source + std::min(kRowsAhead, rows - 1 - r) * stride, columns);
    int64_t c = 0;
    for (; c + 2 * lanes <= columns; c += 2 * lanes) {
      const Vector<scalar_t> first = vector_at(source + c), second = vector_at(source + c + lanes);
      vector_at(out + c) = first;
      vector_at(out + c + lanes) = second;
    }
    for (; c < columns; ++c) {
      out[c] = source[c];
    }
    for (; c < width; ++c) {
      out[c] = 0;
    }
  }
}

// A product of matrices works on tiles of kTileRows rows and a panel of kPanel columns.
constexpr int64_t kTileRows = 6;
template <typename scalar_t>
constexpr int64_t kPanel = 2 * kLanes<scalar_t>;

// The matrix [rows, columns] cut into panels [rows, kPanel], one after the other; zeros where columns end within one.
template <typename scalar_t>
void copy_panels(const scalar_t* source, int64_t stride, int64_t rows, int64_t columns, scalar_t* out) {
  for (int64_t first = 0; first < columns; first += kPanel<scalar_t>) {
    const int64_t some = std::min(kPanel<scalar_t>, columns - first);
    copy_rows(source + first, stride, rows, some, kPanel<scalar_t>, out);
    out += rows * kPanel<scalar_t>;
  }
}

// The same of the transposed matrix: panels [columns, kPanel], as many as hold all rows.
template <typename scalar_t>
void copy_transposed_panels(const scalar_t* source, int64_t stride, int64_t rows, int64_t columns, scalar_t* out) {
  constexpr int64_t panel = kPanel<scalar_t>;
  for (int64_t first = 0; first < rows; first += panel, out += columns * panel) {
    const int64_t some = std::min(panel, rows - first);
    for (int64_t r = 0; r < panel; ++r) {
      const scalar_t* row = source + (first + r) * stride;
      for (int64_t c = 0; c < columns; ++c) {
        out[c * panel + r] = r < some ? row[c] : scalar_t(0);
      }
    }
  }
}

template <typename scalar_t>
void multiply_tile(
    const scalar_t* left, int64_t row_step, int64_t inner_step, const scalar_t* panel, int64_t inner, bool add,
    scalar_t* out, int64_t out_stride) {
  constexpr int64_t lanes = kLanes<scalar_t>;
  Vector<scalar_t> sum[kTileRows][2] = {};
  for (int64_t k = 0; k < inner; ++k, panel += 2 * lanes, left += inner_step) {
    const Vector<scalar_t> first = vector_at(panel), second = vector_at(panel + lanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kTileRows; ++r) {
      const scalar_t factor = left[r * row_step];
      sum[r][0] += factor * first;
      sum[r][1] += factor * second;
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kTileRows; ++r, out += out_stride) {
    vector_at(out) = add ? vector_at(out) + sum[r][0] : sum[r][0];
    vector_at(out + lanes) = add ? vector_at(out + lanes) + sum[r][1] : sum[r][1];
  }
}

// Longer sums are taken in parts of this length: their roundings add up to less.
constexpr int64_t kSumAtOnce = 128;

// out [rows, columns] = left [rows, inner] . panels, or is increased by it. `rows` is a multiple of kTileRows, and
// `columns` of kPanel. The element (r, k) of `left` is at r * row_step + k * inner_step.
template <typename scalar_t>
void multiply_panels(
    const scalar_t* left, int64_t row_step, int64_t inner_step, int64_t rows, const scalar_t* panels, int64_t inner,
    int64_t columns, bool add, scalar_t* out, int64_t out_stride) {
  for (int64_t c = 0; c < columns; c += kPanel<scalar_t>, panels += inner * kPanel<scalar_t>) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      int64_t k = 0;
      do {
        multiply_tile(
            left + r * row_step + k * inner_step, row_step, inner_step, panels + k * kPanel<scalar_t>,
            std::min(kSumAtOnce, inner - k), add || k > 0, out + r * out_stride + c, out_stride);
        k += kSumAtOnce;
      } while (k < inner);
    }
  }
}

}  // namespace m2mkd
