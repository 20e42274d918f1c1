// The K largest scores of each token, for as many tokens at a time as a register has lanes. Apart from the pass that
// calls it, since it knows nothing of gates or losses, and compares scores as integers, which nothing else does.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "token_columns.h"

namespace m2mkd {
namespace {

// A score as an integer in the same order, in which NaN is the largest and -0 equals 0; and back.
template <typename scalar_t>
struct OrderedLanes {
  using Integer = LaneInteger<scalar_t>;
  using Integers = IntegerLanes<scalar_t>;
  static constexpr Integer kLargest = std::numeric_limits<Integer>::max();

  static void of_score(const Lanes<scalar_t>& score, Integers& key) {
    const Lanes<scalar_t> positive_zero = score + 0;
    const Integers bits = *reinterpret_cast<const Integers*>(&positive_zero);
    key = score == score ? bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & kLargest) : Integers{} + kLargest;
  }
  static void score(const Integers& key, Lanes<scalar_t>& score) {
    *reinterpret_cast<Integers*>(&score) = key ^ ((key >> (8 * sizeof(Integer) - 1)) & kLargest);
  }
};

template <typename Vector>
bool any(const Vector& mask) {
  typename VectorOf<int64_t>::type words = *reinterpret_cast<const typename VectorOf<int64_t>::type*>(&mask);
  return words[0] | words[1] | words[2] | words[3];
}

// key[k], index[k] = the k-th largest score and its expert, the lower index first among equals.
template <typename scalar_t, typename Number>
void largest_of_columns(
    const Lanes<scalar_t>* scores, int64_t experts, Number top_k, IntegerLanes<scalar_t>* key,
    IntegerLanes<scalar_t>* index) {
  constexpr int64_t few = 2;  // the constants of with_top_k: stay in registers
  IntegerLanes<scalar_t> best[few], best_index[few] = {};
  constexpr auto lowest = std::numeric_limits<LaneInteger<scalar_t>>::min();
  constexpr bool is_few = !std::is_same_v<Number, int64_t>;
  IntegerLanes<scalar_t>* const keys = is_few ? best : key;
  IntegerLanes<scalar_t>* const indices = is_few ? best_index : index;
  for (int64_t k = 0; k < top_k; ++k) {
    keys[k] = IntegerLanes<scalar_t>{} + lowest;
    indices[k] = IntegerLanes<scalar_t>{};
  }
  for (int64_t e = 0; e < experts; ++e) {
    IntegerLanes<scalar_t> score;
    OrderedLanes<scalar_t>::of_score(scores[e], score);
    if (!is_few && !any(score > keys[top_k - 1])) {
      continue;
    }
    IntegerLanes<scalar_t> moved = score;
    IntegerLanes<scalar_t> moved_index = IntegerLanes<scalar_t>{} + static_cast<LaneInteger<scalar_t>>(e);
    for (int64_t k = 0; k < top_k; ++k) {
      const IntegerLanes<scalar_t> above = score > keys[k];  // from here on, every choice makes room
      const IntegerLanes<scalar_t> key_out = keys[k], index_out = indices[k];
      keys[k] = above ? moved : key_out;
      indices[k] = above ? moved_index : index_out;
      moved = above ? key_out : moved;
      moved_index = above ? index_out : moved_index;
    }
  }
  if constexpr (is_few) {
    for (int64_t k = 0; k < top_k; ++k) {
      key[k] = keys[k];
      index[k] = indices[k];
    }
  }
}

}  // namespace
}  // namespace m2mkd
