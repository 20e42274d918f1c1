// What the CUDA kernels of `route` share: limits, how tokens are cut into chunks, and sums over threads.
#pragma once

#include <cstdint>

namespace m2mkd {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 128;       // tokens of a block, all of one group; for placing a thread each
constexpr int kMaxExperts = 256;  // at most kThreads
constexpr int kMaxTopK = 8;       // at most the lanes that share a token
constexpr int kLossCount = 4;
constexpr unsigned kAll = 0xffffffffu;

// Kinds of sums over the tokens of a group; the z loss has no experts.
enum Sum { importance_sum, load_sum, gshard_sum, first_choice_sum, z_sum };

struct Chunks {
  int64_t groups;
  int tokens, experts, top_k, per_group;

  // counts[group, expert, k, chunk]: what a warp of `scan` reads is contiguous.
  __device__ int64_t count_index(int64_t group, int expert, int k, int chunk) const {
    return ((group * experts + expert) * top_k + k) * per_group + chunk;
  }
  // Number of a sum: of a kind, for group * experts + expert, or, for z, the group.
  __host__ __device__ int64_t sum_number(Sum kind, int64_t pair) const {
    return kind * groups * experts + pair;
  }
  // The token at a position of the filling order; without an order, in their own.
  __device__ int64_t token_at(const int32_t* order, int64_t group, int position) const {
    return group * tokens + (order == nullptr ? position : order[group * tokens + position]);
  }
};

// A strict order in which NaN is the largest value, as in torch.sort.
template <typename scalar_t>
__device__ bool precedes(scalar_t a, scalar_t b) {
  return a > b || (isnan(a) && !isnan(b));
}

// Over LANES neighbouring threads; all of them get the same bits.
template <int LANES, typename T>
__device__ T sum_of_lanes(T value) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAll, value, distance, LANES);
  }
  return value;
}

// The largest, or, where that is not finite, 0: exp(x - shift) is then right for infinite x, too.
template <int LANES, typename scalar_t, int COUNT>
__device__ scalar_t softmax_shift(const scalar_t (&values)[COUNT]) {
  scalar_t largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    largest = values[j] > largest ? values[j] : largest;
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const scalar_t other = __shfl_xor_sync(kAll, largest, distance, LANES);
    largest = other > largest ? other : largest;
  }
  return isinf(largest) ? scalar_t(0) : largest;
}

template <typename scalar_t>
__device__ scalar_t sigmoid(scalar_t x) {
  return scalar_t(1) / (scalar_t(1) + exp(-x));
}

}  // namespace m2mkd
