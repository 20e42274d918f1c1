// Softmax over short rows, and the choice of their largest values, without branches that depend on the data.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace m2mkd {

// exp(x) for x <= 0, in place, relative error below 2e-7; written so that compilers vectorise it, which a call of expf
// prevents.
inline void exp_of_nonpositive(float* values, int64_t count) {
  constexpr float kLowest = -87.33654f;          // exp of less is below the smallest normal number: 0
  constexpr float kRound = 12582912.0f;          // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i] < kLowest ? kLowest : values[i];  // keeps NaN
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln(2) / 2, ln(2) in two parts
    float p = 1.9875691500e-4f;                                   // Cephes' polynomial for exp
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const uint32_t power = static_cast<uint32_t>(bits + 127) << 23;  // 2^n
    float scale;
    std::memcpy(&scale, &power, sizeof(scale));
    values[i] = values[i] < kLowest ? 0.0f : p * scale;
  }
}

inline void exp_of_nonpositive(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = std::exp(values[i]);
  }
}

// Calls run with the number of columns, as a constant of the compiler for usual numbers of experts: short loops unroll.
template <typename Run>
void with_columns(int64_t columns, const Run& run) {
  switch (columns) {
    case 2:
      return run(std::integral_constant<int64_t, 2>{});
    case 4:
      return run(std::integral_constant<int64_t, 4>{});
    case 8:
      return run(std::integral_constant<int64_t, 8>{});
    case 16:
      return run(std::integral_constant<int64_t, 16>{});
    case 32:
      return run(std::integral_constant<int64_t, 32>{});
    default:
      return run(columns);
  }
}

template <typename scalar_t, typename Columns>
void softmax_of(const scalar_t* scores, int64_t rows, Columns columns, scalar_t* out) {
  const int64_t block = std::max<int64_t>(1, 2048 / columns);  // rows that stay in the first cache between the passes
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t end = std::min(rows, first + block);
    for (int64_t row = first; row < end; ++row) {
      const scalar_t* in = scores + row * columns;
      scalar_t largest = in[0];
      for (int64_t i = 1; i < columns; ++i) {
        largest = std::max(largest, in[i]);
      }
      for (int64_t i = 0; i < columns; ++i) {
        out[row * columns + i] = in[i] - largest;
      }
    }
    exp_of_nonpositive(out + first * columns, (end - first) * columns);
    for (int64_t row = first; row < end; ++row) {
      scalar_t* values = out + row * columns;
      scalar_t sum = 0;
      for (int64_t i = 0; i < columns; ++i) {
        sum += values[i];
      }
      for (int64_t i = 0; i < columns; ++i) {
        values[i] /= sum;
      }
    }
  }
}

// Softmax of each row of scores [rows, columns]; `out` may be `scores`.
template <typename scalar_t>
void softmax_rows(const scalar_t* scores, int64_t rows, int64_t columns, scalar_t* out) {
  with_columns(columns, [&](auto number) { softmax_of(scores, rows, number, out); });
}

// A score and its index as one integer that is larger for the larger score and, among equals, for the lower index. NaN
// is the largest score, as in torch.sort, and -0 equals 0.
template <typename Packed, typename Key, typename scalar_t>
Packed pack_score(scalar_t score, int64_t index) {
  score += scalar_t(0);
  Key bits;
  std::memcpy(&bits, &score, sizeof(bits));
  constexpr Key kLargest = std::numeric_limits<Key>::max();
  const Key key = std::isnan(score) ? kLargest : bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargest);
  using Index = std::make_unsigned_t<Key>;
  return Packed(key) * (Packed(1) << (8 * sizeof(Key))) + static_cast<Index>(~index);
}
inline int64_t packed(float score, int64_t index) {
  return pack_score<int64_t, int32_t>(score, index);
}
inline __int128 packed(double score, int64_t index) {
  return pack_score<__int128, int64_t>(score, index);
}
template <typename Packed>
int64_t index_of(Packed value) {
  return static_cast<int32_t>(~static_cast<uint32_t>(value));
}

// best[0] >= ... >= best[count-1]: puts the candidate in its place, and the last one out.
template <typename Packed>
void keep_best(Packed candidate, Packed* best, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const Packed larger = std::max(best[k], candidate);
    candidate = std::min(best[k], candidate);
    best[k] = larger;
  }
}

template <typename scalar_t, typename Columns>
void largest_of(const scalar_t* scores, int64_t rows, Columns columns, int64_t top_k, int64_t* choice) {
  using Packed = decltype(packed(scalar_t(0), 0));
  const Packed lowest = packed(-std::numeric_limits<scalar_t>::infinity(), columns);
  std::vector<Packed> buffer(top_k);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* score = scores + row * columns;
    Packed few[2] = {lowest, lowest};  // stays in registers
    if (top_k <= 2) {
      for (int64_t i = 0; i < columns; ++i) {
        keep_best(packed(score[i], i), few, 2);
      }
    } else {
      std::fill(buffer.begin(), buffer.end(), lowest);
      for (int64_t i = 0; i < columns; ++i) {
        const Packed candidate = packed(score[i], i);
        if (candidate > buffer.back()) {
          keep_best(candidate, buffer.data(), top_k);
        }
      }
    }
    const Packed* best = top_k <= 2 ? few : buffer.data();
    for (int64_t k = 0; k < top_k; ++k) {
      choice[row * top_k + k] = index_of(best[k]);
    }
  }
}

// choice[row, k] = index of the k-th largest of each row of scores [rows, columns], the lower index first among equals.
template <typename scalar_t>
void largest_of_rows(const scalar_t* scores, int64_t rows, int64_t columns, int64_t top_k, int64_t* choice) {
  with_columns(columns, [&](auto number) { largest_of(scores, rows, number, top_k, choice); });
}

}  // namespace m2mkd
