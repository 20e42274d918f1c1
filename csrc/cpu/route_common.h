// What the forward and the backward pass of `route` share: how tokens are cut into chunks and blocks, and the maths of
// columns, in which the lanes of a register are tokens.
//
// The files route_*.h are parts of route.cpp alone. Their namespace has no name, as if they stood there: what they
// define is inlined as freely, and is not mixed up with what other kernels call the same (Rows in packed_product.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "elementary.h"
#include "softmax.h"
#include "token_columns.h"

namespace m2mkd {
namespace {

constexpr int64_t kChunk = 1024;  // tokens

int64_t chunks_of(int64_t tokens) {
  return (tokens + kChunk - 1) / kChunk;
}

// Calls run(number of the chunk, its group, its first token, one past its last) for every chunk of every group, in
// several threads. `cost`: elements touched for a token.
template <typename Run>
void for_chunks(int64_t groups, int64_t tokens, int64_t cost, const Run& run) {
  const int64_t chunks = chunks_of(tokens), grain = std::max<int64_t>(1, 16384 / (kChunk * cost));
  torch::stable::parallel_for(0, groups * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / chunks, first = i % chunks * kChunk;
      run(i, g, g * tokens + first, g * tokens + std::min(tokens, first + kChunk));
    }
  });
}

// Calls run with the number of choices, as a constant of the compiler for the usual ones.
template <typename Run>
void with_top_k(int64_t top_k, const Run& run) {
  switch (top_k) {
    case 1:
      return run(std::integral_constant<int64_t, 1>{});
    case 2:
      return run(std::integral_constant<int64_t, 2>{});
    default:
      return run(top_k);
  }
}

// Memory for some columns of `experts` each.
template <typename scalar_t>
class ColumnStore {
 public:
  ColumnStore(int64_t columns, int64_t experts)
      : experts_(experts), numbers_(columns * experts * kTokens<scalar_t>) {}
  Lanes<scalar_t>* operator[](int64_t i) {
    return reinterpret_cast<Lanes<scalar_t>*>(numbers_.data()) + i * experts_;
  }

 private:
  int64_t experts_;
  std::vector<scalar_t> numbers_;
};

// How many tokens are worked on at a time where rows are prepared: what stays in the first cache.
template <typename scalar_t>
int64_t tokens_of_block(int64_t experts) {
  constexpr int64_t lanes = kTokens<scalar_t>;
  return std::max(lanes, 1024 / experts / lanes * lanes);
}

// Vectors are handed on by reference: by value, callers of another instruction set would look for them elsewhere.

// sum = sum of value(e) over the experts; in parts, for the sake of rounding.
template <typename scalar_t, typename Value>
void sum_over_experts(int64_t experts, Lanes<scalar_t>& sum, const Value& value) {
  sum = Lanes<scalar_t>{};
  for (int64_t first = 0; first < experts; first += 16) {
    Lanes<scalar_t> part{};
    for (int64_t e = first; e < std::min(experts, first + 16); ++e) {
      value(e, part);
    }
    sum += part;
  }
}

// What a softmax came from: the largest score, and the sum of exp(score - largest).
template <typename scalar_t>
struct LargestAndSum {
  Lanes<scalar_t> largest, sum;
};

// Softmax over the experts; `out` may be `scores`.
template <typename scalar_t>
void softmax_columns(
    const Lanes<scalar_t>* scores, int64_t experts, Lanes<scalar_t>* out, LargestAndSum<scalar_t>& of) {
  Lanes<scalar_t> largest = scores[0], sum;
  for (int64_t e = 1; e < experts; ++e) {
    largest = scores[e] > largest ? scores[e] : largest;
  }
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = scores[e] - largest;
  }
  exp_of_nonpositive(reinterpret_cast<scalar_t*>(out), experts * kTokens<scalar_t>);
  sum_over_experts<scalar_t>(experts, sum, [&](int64_t e, Lanes<scalar_t>& part) { part += out[e]; });
  for (int64_t e = 0; e < experts; ++e) {
    out[e] /= sum;
  }
  of = {largest, sum};
}

template <typename scalar_t>
void sigmoid_columns(const Lanes<scalar_t>* scores, int64_t experts, Lanes<scalar_t>* out) {
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = scores[e] > 0 ? -scores[e] : scores[e];
  }
  exp_of_nonpositive(reinterpret_cast<scalar_t*>(out), experts * kTokens<scalar_t>);
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = (scores[e] > 0 ? Lanes<scalar_t>{} + 1 : out[e]) / (1 + out[e]);
  }
}

template <typename scalar_t>
void log_sum_exp(const LargestAndSum<scalar_t>& of, Lanes<scalar_t>& out) {
  constexpr int lanes = kTokens<scalar_t>;
  scalar_t values[lanes];
  *reinterpret_cast<Lanes<scalar_t>*>(values) = of.sum;
  for (int i = 0; i < lanes; ++i) {
    values[i] = log_of_positive(values[i]);
  }
  out = of.largest + *reinterpret_cast<const Lanes<scalar_t>*>(values) + 0 * of.sum;  // keeps NaN
}

}  // namespace
}  // namespace m2mkd
