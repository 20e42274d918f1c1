// The backward kernel of `route`; the maths is in ../route.h. Every token gathers from the rows of its choices.
#pragma once

#include "../route.h"
#include "route_common.h"

namespace m2mkd {

template <typename scalar_t>
struct Backward {
  Chunks chunks;
  Gate gate;
  int losses;  // bits, none without a gradient of the losses
  scalar_t noise_std;
  const scalar_t* grad_weight;  // these three or null
  const scalar_t* grad_gates;
  const scalar_t* grad_losses;
  const scalar_t* logits;
  const scalar_t* gates;
  const int64_t* place;
  const int32_t* choice;
  const scalar_t* threshold;
  const scalar_t* slopes;
  const scalar_t* softmax;
  scalar_t* grad_logits;
  scalar_t* grad_noise;  // or null
};

// added[e] += p[e] (g[e] - sum_j p[j] g[j])
template <int LANES, typename scalar_t, int PER_LANE>
__device__ void add_softmax_backward(
    const scalar_t (&probability)[PER_LANE], const scalar_t (&gradient)[PER_LANE], scalar_t (&added)[PER_LANE]) {
  scalar_t mean = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    mean += probability[j] * gradient[j];
  }
  mean = sum_of_lanes<LANES>(mean);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    added[j] += probability[j] * (gradient[j] - mean);
  }
}

// Of the weights of a token's rows, added to that of its gates.
template <typename scalar_t, int LANES, int PER_LANE>
__device__ void add_row_gradients(const Backward<scalar_t>& b, int64_t token, int lane, scalar_t (&added)[PER_LANE]) {
  const int experts = b.chunks.experts, top_k = b.chunks.top_k;
  if (b.gate == Gate::experts_choose) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int expert = lane + j * LANES;
      const int64_t row = expert < experts ? b.place[token * experts + expert] : -1;
      added[j] += row >= 0 ? b.grad_weight[row] : scalar_t(0);
    }
    return;
  }
  const int64_t row = lane < top_k ? b.place[token * top_k + lane] : -1;
  const scalar_t mine = row >= 0 ? b.grad_weight[row] : scalar_t(0);
  const int my_expert = row >= 0 ? b.choice[token * top_k + lane] : -1;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const scalar_t gradient = __shfl_sync(kAll, mine, k, LANES);
    const int expert = __shfl_sync(kAll, my_expert, k, LANES);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      added[j] += lane + j * LANES == expert ? gradient : scalar_t(0);
    }
  }
}

template <typename scalar_t, int LANES, int PER_LANE>
__global__ void __launch_bounds__(kThreads) differentiate(Backward<scalar_t> b) {
  // Gradient of the losses with respect to what they sum over tokens, by expert.
  __shared__ scalar_t importance[kMaxExperts], load[kMaxExperts], gshard[kMaxExperts];
  const int experts = b.chunks.experts, top_k = b.chunks.top_k;
  const int64_t group = blockIdx.x / b.chunks.per_group;
  const int chunk = int(blockIdx.x % b.chunks.per_group);
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    const auto slope = [&](int number) {
      return b.grad_losses[number * b.chunks.groups + group] *
          b.slopes[(number * b.chunks.groups + group) * experts + e];
    };
    importance[e] = b.losses & kImportance ? slope(0) : scalar_t(0);
    load[e] = b.losses & kLoad ? slope(1) : scalar_t(0);
    gshard[e] = b.losses & kGshard ? slope(2) : scalar_t(0);
  }
  __syncthreads();
  const scalar_t z_factor =
      b.losses & kZ ? 2 * b.grad_losses[3 * b.chunks.groups + group] / b.chunks.tokens : scalar_t(0);

  const int lane = threadIdx.x % LANES;
#pragma unroll 1
  for (int start = 0; start < kChunk; start += kThreads / LANES) {
    const int position = chunk * kChunk + start + int(threadIdx.x) / LANES;
    const bool real = position < b.chunks.tokens;  // the others stay, since whole warps shuffle
    const int64_t token = group * b.chunks.tokens + (real ? position : b.chunks.tokens - 1);
    const auto each = [&](auto&& visit) {
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        const int expert = lane + j * LANES;
        if (expert < experts) {
          visit(j, expert, token * experts + expert);
        }
      }
    };

    scalar_t probability[PER_LANE] = {}, gradient[PER_LANE] = {}, of_score[PER_LANE] = {};
    each([&](int j, int expert, int64_t i) {
      probability[j] = b.gates[i];
      gradient[j] = b.grad_gates != nullptr ? b.grad_gates[i] : scalar_t(0);
      gradient[j] += b.gate != Gate::top_k_softmax ? gshard[expert] : scalar_t(0);
    });
    if (b.grad_weight != nullptr) {
      add_row_gradients<scalar_t, LANES>(b, token, lane, gradient);
    }
    if (b.gate == Gate::sigmoid) {
      each([&](int j, int, int64_t) { of_score[j] = probability[j] * (1 - probability[j]) * gradient[j]; });
    } else {
      add_softmax_backward<LANES>(probability, gradient, of_score);
    }
    if (b.losses & kGshard && b.gate == Gate::top_k_softmax) {
      each([&](int j, int expert, int64_t i) {
        probability[j] = b.softmax[i];
        gradient[j] = gshard[expert];
      });
      add_softmax_backward<LANES>(probability, gradient, of_score);
    }

    scalar_t of_logit[PER_LANE] = {};  // beside what comes through the score
    if (b.losses & kLoad) {
      const scalar_t threshold = b.threshold[token];
      scalar_t through_threshold = 0;
      each([&](int j, int expert, int64_t i) {
        const scalar_t z = (threshold - b.logits[i]) / b.noise_std;
        of_logit[j] = load[expert] * scalar_t(0.3989422804014327) * exp(scalar_t(-0.5) * z * z) / b.noise_std;
        through_threshold += of_logit[j];
      });
      through_threshold = sum_of_lanes<LANES>(through_threshold);
      const int last_choice = b.choice[token * top_k + top_k - 1];
      each([&](int j, int expert, int64_t) {
        of_score[j] -= expert == last_choice ? through_threshold : scalar_t(0);
      });
    }
    if (b.losses & (kImportance | kZ)) {
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        gradient[j] = -INFINITY;
      }
      each([&](int j, int, int64_t i) { gradient[j] = b.logits[i]; });
      const scalar_t shift = softmax_shift<LANES>(gradient);
      scalar_t sum = 0;
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        probability[j] = exp(gradient[j] - shift);
        sum += probability[j];
      }
      sum = sum_of_lanes<LANES>(sum);
      const scalar_t z_gradient = z_factor * (shift + log(sum));
      each([&](int j, int, int64_t) {
        probability[j] /= sum;
        of_logit[j] += b.losses & kZ ? z_gradient * probability[j] : scalar_t(0);
      });
      if (b.losses & kImportance && b.gate == Gate::sigmoid) {
        each([&](int j, int expert, int64_t) {
          const scalar_t gate = sigmoid(gradient[j]);
          of_logit[j] += gate * (1 - gate) * importance[expert];
        });
      } else if (b.losses & kImportance) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
          const int expert = lane + j * LANES;
          gradient[j] = expert < experts ? importance[expert] : scalar_t(0);
        }
        add_softmax_backward<LANES>(probability, gradient, of_logit);
      }
    }

    if (real) {
      each([&](int j, int, int64_t i) {
        b.grad_logits[i] = of_score[j] + of_logit[j];
        if (b.grad_noise != nullptr) {
          b.grad_noise[i] = of_score[j];
        }
      });
    }
  }
}

}  // namespace m2mkd
