// A few tokens side by side: rows [token, expert] turned into columns, so that the lanes of a register are tokens.
//
// Loops over experts then need no sum across lanes, whatever the number of experts.
#pragma once

#include <cstdint>
#include <type_traits>

#include "instruction_set.h"

namespace m2mkd {

template <typename scalar_t>
using Lanes = typename VectorOf<scalar_t>::type;  // a number for each of so many tokens
template <typename scalar_t>
constexpr int kTokens = VectorOf<scalar_t>::size;
template <typename scalar_t>
using LaneInteger = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;
template <typename scalar_t>
using IntegerLanes = typename VectorOf<LaneInteger<scalar_t>>::type;

inline void transpose(Lanes<float> (&v)[8]) {
  Lanes<float> pair[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = __builtin_shufflevector(pair[i + j], pair[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      four[i + 2 * j + 1] = __builtin_shufflevector(pair[i + j], pair[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shufflevector(four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// out[e] = expert e of `count` <= kTokens rows; zero in the lanes beyond.
template <typename scalar_t>
void columns_of_rows(const scalar_t* rows, int64_t count, int64_t experts, Lanes<scalar_t>* out) {
  constexpr int lanes = kTokens<scalar_t>;
  if constexpr (sizeof(scalar_t) == 4) {
    if (count == lanes && experts % lanes == 0) {
      for (int64_t first = 0; first < experts; first += lanes) {
        Lanes<scalar_t> block[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes; ++i) {
          block[i] = *reinterpret_cast<const Lanes<scalar_t>*>(rows + i * experts + first);
        }
        transpose(block);
#pragma GCC unroll 8
        for (int i = 0; i < lanes; ++i) {
          out[first + i] = block[i];
        }
      }
      return;
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    Lanes<scalar_t> column{};
    for (int64_t t = 0; t < count; ++t) {
      column[t] = rows[t * experts + e];
    }
    out[e] = column;
  }
}

// The inverse of columns_of_rows.
template <typename scalar_t>
void rows_of_columns(const Lanes<scalar_t>* columns, int64_t count, int64_t experts, scalar_t* rows) {
  constexpr int lanes = kTokens<scalar_t>;
  if constexpr (sizeof(scalar_t) == 4) {
    if (count == lanes && experts % lanes == 0) {
      for (int64_t first = 0; first < experts; first += lanes) {
        Lanes<scalar_t> block[lanes];
#pragma GCC unroll 8
        for (int i = 0; i < lanes; ++i) {
          block[i] = columns[first + i];
        }
        transpose(block);
#pragma GCC unroll 8
        for (int i = 0; i < lanes; ++i) {
          *reinterpret_cast<Lanes<scalar_t>*>(rows + i * experts + first) = block[i];
        }
      }
      return;
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    const Lanes<scalar_t> column = columns[e];
    for (int64_t t = 0; t < count; ++t) {
      rows[t * experts + e] = column[t];
    }
  }
}

}  // namespace m2mkd
