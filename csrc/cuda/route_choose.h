// The first kernel of `route`: noise, gates, every token's choices, and what the losses sum over a chunk of tokens.
#pragma once

#include "../route.h"
#include "philox.h"
#include "route_common.h"

namespace m2mkd {

template <typename scalar_t>
struct Choosing {
  Chunks chunks;
  Gate gate;
  int losses;  // bits
  const scalar_t* logits;
  const scalar_t* noise;  // added as it is, or null
  const int64_t* seed;    // of noise that is drawn here, or null
  scalar_t noise_std;
  scalar_t* gates;
  scalar_t* softmax;     // of all scores, where gates are not: or null
  int32_t* choice;       // [T, K], null where experts choose
  scalar_t* priority;    // [T], weight of the first choice: or null
  scalar_t* threshold;   // [T], score of the last choice: or null
  int32_t* counts;       // how many choices of the chunk want each expert: or null
  scalar_t* sums;        // [sum, chunk], of the losses asked for
  scalar_t* loss;        // [4, G], set to zero
  int32_t* blocks_done;  // of the scan, set to zero
};

// LANES neighbouring threads share a token; each holds experts lane, lane + LANES, ...
template <typename scalar_t, int LANES, int PER_LANE>
__device__ void load_scores(
    const Choosing<scalar_t>& c, int64_t token, int lane, scalar_t (&score)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int expert = lane + j * LANES;
    const int64_t i = token * c.chunks.experts + expert;
    score[j] = -INFINITY;
    if (expert < c.chunks.experts) {
      score[j] = c.logits[i];
      if (c.noise != nullptr) {
        score[j] += c.noise[i];
      } else if (c.seed != nullptr) {
        score[j] += c.noise_std * philox_normal<scalar_t>(uint64_t(*c.seed), i);
      }
    }
  }
}

// The scores and experts of a token's choices, those of choice k in lane k, and a bit for each expert that is taken.
template <typename scalar_t>
struct TopK {
  scalar_t score = 0, largest = 0;
  int expert = 0;
  unsigned taken = 0;  // bit j: expert lane + j * LANES
};

template <int LANES, typename scalar_t, int PER_LANE>
__device__ TopK<scalar_t> take_largest(const scalar_t (&score)[PER_LANE], int experts, int top_k, int lane) {
  TopK<scalar_t> found;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    scalar_t best = -INFINITY;
    int best_expert = INT32_MAX;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int expert = lane + j * LANES;
      const bool free = !(found.taken >> j & 1) && expert < experts;
      if (free && (best_expert == INT32_MAX || precedes(score[j], best))) {
        best = score[j];
        best_expert = expert;
      }
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      const scalar_t other = __shfl_xor_sync(kAll, best, distance, LANES);
      const int other_expert = __shfl_xor_sync(kAll, best_expert, distance, LANES);
      const bool equal = !precedes(other, best) && !precedes(best, other);
      const bool take = best_expert == INT32_MAX ||
          (other_expert != INT32_MAX && (precedes(other, best) || (equal && other_expert < best_expert)));
      best = take ? other : best;
      best_expert = take ? other_expert : best_expert;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      found.taken |= unsigned(lane + j * LANES == best_expert) << j;
    }
    found.score = lane == k ? best : found.score;
    found.expert = lane == k ? best_expert : found.expert;
    found.largest = k == 0 ? best : found.largest;
  }
  return found;
}

// values[i] += values[i + half] until values[0 ... remaining - 1] hold the sums of what is that far apart.
template <typename scalar_t>
__device__ void add_halves(scalar_t (&values)[kThreads], int remaining) {
  for (int half = kThreads / 2; half >= remaining; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      values[threadIdx.x] += values[threadIdx.x + half];
    }
  }
  __syncthreads();
}

// What the losses need to know of each token of a chunk.
template <typename scalar_t>
struct TokenStatistics {
  scalar_t shift[kChunk], sum[kChunk];  // softmax of the logits without noise: exp(logit - shift) / sum
  scalar_t threshold[kChunk];
  scalar_t square[kChunk];  // of the log-sum-exp of the logits
};

// A thread adds up some tokens of one expert; threads of the same expert are then added in a fixed order.
template <typename scalar_t>
__device__ void sum_over_tokens(
    const Choosing<scalar_t>& c, int64_t group, int chunk, const TokenStatistics<scalar_t>& statistics) {
  __shared__ scalar_t added[kThreads];
  const int experts = c.chunks.experts, first = chunk * kChunk, count = min(kChunk, c.chunks.tokens - first);
  int columns = 1;
  while (columns < experts) {
    columns *= 2;
  }
  const int expert = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;
  const int64_t first_index = (group * c.chunks.tokens + first) * experts + expert;
  const auto put = [&](Sum kind, int64_t pair, scalar_t value) {
    c.sums[c.chunks.sum_number(kind, pair) * c.chunks.per_group + chunk] = value;
  };
  const auto sum = [&](Sum kind, auto&& value_of) {
    scalar_t mine = 0;
    for (int t = row; t < count && expert < experts; t += kThreads / columns) {
      mine += value_of(t, first_index + int64_t(t) * experts);
    }
    added[threadIdx.x] = mine;
    add_halves(added, columns);
    if (row == 0 && expert < experts) {
      put(kind, group * experts + expert, added[threadIdx.x]);
    }
    __syncthreads();
  };
  if (c.losses & kImportance) {
    sum(importance_sum, [&](int t, int64_t i) {
      const scalar_t logit = c.logits[i];
      return c.gate == Gate::sigmoid ? sigmoid(logit) : exp(logit - statistics.shift[t]) / statistics.sum[t];
    });
  }
  if (c.losses & kLoad) {
    const scalar_t scale = scalar_t(M_SQRT1_2) / c.noise_std;
    sum(load_sum, [&](int t, int64_t i) {
      return scalar_t(0.5) * erfc((statistics.threshold[t] - c.logits[i]) * scale);
    });
  }
  if (c.losses & kGshard) {
    const scalar_t* gates = c.softmax != nullptr ? c.softmax : c.gates;
    sum(gshard_sum, [&](int, int64_t i) { return gates[i]; });
  }
  if (c.losses & kZ) {
    added[threadIdx.x] = int(threadIdx.x) < count ? statistics.square[threadIdx.x] : scalar_t(0);
    add_halves(added, 1);
    if (threadIdx.x == 0) {
      put(z_sum, group, added[0]);
    }
  }
}

template <typename scalar_t, int LANES, int PER_LANE>
__global__ void __launch_bounds__(kThreads, 2) choose(Choosing<scalar_t> c) {
  __shared__ int32_t wanted[kMaxTopK * kMaxExperts];
  __shared__ int32_t first_choices[kMaxExperts];
  __shared__ TokenStatistics<scalar_t> statistics;
  const int experts = c.chunks.experts;
  const int64_t group = blockIdx.x / c.chunks.per_group;
  const int chunk = int(blockIdx.x % c.chunks.per_group);
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < kLossCount * c.chunks.groups; i += kThreads) {
      c.loss[i] = 0;
    }
    if (threadIdx.x == 0) {
      *c.blocks_done = 0;
    }
  }
  for (int i = threadIdx.x; i < c.chunks.top_k * experts; i += kThreads) {
    wanted[i] = 0;
  }
  for (int i = threadIdx.x; i < experts; i += kThreads) {
    first_choices[i] = 0;
  }
  __syncthreads();

  const int lane = threadIdx.x % LANES;
  for (int start = 0; start < kChunk; start += kThreads / LANES) {
    const int number = start + int(threadIdx.x) / LANES;  // within the chunk
    const bool real = chunk * kChunk + number < c.chunks.tokens;  // the others stay, since whole warps shuffle
    const int64_t token = group * c.chunks.tokens + (real ? chunk * kChunk + number : c.chunks.tokens - 1);
    scalar_t score[PER_LANE];
    load_scores<scalar_t, LANES>(c, token, lane, score);
    const TopK<scalar_t> found = take_largest<LANES>(score, experts, c.chunks.top_k, lane);
    const bool chosen = lane < c.chunks.top_k;

    scalar_t sum = 0;  // of the softmax over all experts; the largest score is that of the first choice
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      sum += lane + j * LANES < experts ? exp(score[j] - found.largest) : scalar_t(0);
    }
    sum = sum_of_lanes<LANES>(sum);
    const scalar_t chosen_sum = sum_of_lanes<LANES>(chosen ? exp(found.score - found.largest) : scalar_t(0));
    const auto as_gate = [&](scalar_t value, bool taken) {
      if (c.gate == Gate::sigmoid) {
        return sigmoid(value);
      }
      if (c.gate == Gate::top_k_softmax) {
        return taken ? exp(value - found.largest) / chosen_sum : scalar_t(0);
      }
      return exp(value - found.largest) / sum;
    };
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int expert = lane + j * LANES;
      if (real && expert < experts) {
        c.gates[token * experts + expert] = as_gate(score[j], found.taken >> j & 1);
        if (c.softmax != nullptr) {
          c.softmax[token * experts + expert] = exp(score[j] - found.largest) / sum;
        }
      }
    }
    if (real && chosen) {
      if (c.choice != nullptr) {
        c.choice[token * c.chunks.top_k + lane] = found.expert;
      }
      if (c.counts != nullptr) {
        atomicAdd(&wanted[lane * experts + found.expert], 1);
      }
      if (lane == 0) {
        atomicAdd(&first_choices[found.expert], 1);
        if (c.priority != nullptr) {
          c.priority[token] = as_gate(found.score, true);
        }
      }
      if (lane == c.chunks.top_k - 1 && c.threshold != nullptr) {
        c.threshold[token] = found.score;
        statistics.threshold[number] = found.score;
      }
    }

    if (c.losses & (kImportance | kZ)) {
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        const int expert = lane + j * LANES;
        score[j] = expert < experts ? c.logits[token * experts + expert] : -INFINITY;
      }
      const scalar_t shift = softmax_shift<LANES>(score);
      scalar_t clean_sum = 0;
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        clean_sum += exp(score[j] - shift);
      }
      clean_sum = sum_of_lanes<LANES>(clean_sum);
      if (lane == 0 && real) {
        const scalar_t logsumexp = shift + log(clean_sum);
        statistics.shift[number] = shift;
        statistics.sum[number] = clean_sum;
        statistics.square[number] = logsumexp * logsumexp;
      }
    }
  }

  __syncthreads();
  if (c.counts != nullptr) {
    for (int i = threadIdx.x; i < c.chunks.top_k * experts; i += kThreads) {
      c.counts[c.chunks.count_index(group, i % experts, i / experts, chunk)] = wanted[i];
    }
  }
  if (c.losses & kGshard) {
    for (int i = threadIdx.x; i < experts; i += kThreads) {
      c.sums[c.chunks.sum_number(first_choice_sum, group * experts + i) * c.chunks.per_group + chunk] =
          scalar_t(first_choices[i]);
    }
  }
  if (c.losses != 0) {
    sum_over_tokens(c, group, chunk, statistics);
  }
}

}  // namespace m2mkd
