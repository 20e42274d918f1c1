// CUDA kernels of `route`; the maths is in m2mkd_fast/ops/route.py, the plan is that of cpu/route.cpp.
//
// Results do not depend on the order in which blocks or threads run: atomics only count integers, and every row is
// placed by its rank. Nothing is read back to the host.
//
//   choose      a warp or a part of one for each token: softmax, top-k -> gates, choice, choice_weight
//   rank        (batch priority, experts_choose) how many gates of a group are larger -> order, or the rows themselves
//   count       a block for each chunk of positions: how many choices want each expert -> slot counts
//   scan_slots  a warp for each (group, expert): counts to first slots, total to kept rows
//   scan_rows   one block: kept rows of (expert, group) to first rows -> offsets
//   place       a block for each chunk: the row of every choice -> token, expert, weight, place

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../route.h"
#include "launch.h"

namespace m2mkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 256;
constexpr int kMaxTopK = 8;  // at most the lanes that share a token
constexpr unsigned kAll = 0xffffffffu;

// A strict order in which NaN is the largest value, as in torch.sort.
template <typename scalar_t>
__device__ bool precedes(scalar_t a, scalar_t b) {
  return a > b || (isnan(a) && !isnan(b));
}

// LANES neighbouring threads share a token; each holds experts lane, lane + LANES, ...
template <typename scalar_t, int LANES, int PER_LANE>
__global__ void __launch_bounds__(kThreads) choose(
    const scalar_t* __restrict__ scores, int64_t tokens, int experts, int top_k, bool softmax_first, scalar_t* gates,
    int32_t* choice, scalar_t* choice_weight) {
  const int64_t item = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / LANES;
  const bool real = item < tokens;  // the others stay, since whole warps shuffle
  const int64_t token = real ? item : tokens - 1;
  const int lane = threadIdx.x % LANES;

  scalar_t score[PER_LANE];
  unsigned taken = 0;          // bit j: the j-th of this thread's experts is among the token's choices
  scalar_t chosen_score = 0;   // of choice number `lane`
  int chosen_expert = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int expert = lane + j * LANES;
    score[j] = expert < experts ? scores[token * experts + expert] : -INFINITY;
  }

  scalar_t largest = 0, sum = 0;  // of the softmax: over the chosen scores until the loop ends
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    scalar_t best = -INFINITY;
    int best_expert = INT32_MAX;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int expert = lane + j * LANES;
      const bool free = !(taken >> j & 1) && expert < experts;
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
      taken |= unsigned(lane + j * LANES == best_expert) << j;
    }
    chosen_score = lane == k ? best : chosen_score;
    chosen_expert = lane == k ? best_expert : chosen_expert;
    largest = k == 0 ? best : largest;
    sum += exp(best - largest);
  }

  if (softmax_first) {  // over all experts; the largest score is that of the first choice
    sum = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      sum += lane + j * LANES < experts ? exp(score[j] - largest) : scalar_t(0);
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAll, sum, distance, LANES);
    }
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int expert = lane + j * LANES;
    if (real && expert < experts) {
      const bool counts = softmax_first || (taken >> j & 1);
      gates[token * experts + expert] = counts ? exp(score[j] - largest) / sum : scalar_t(0);
    }
  }
  if (real && lane < top_k && choice != nullptr) {
    choice[token * top_k + lane] = chosen_expert;
    choice_weight[token * top_k + lane] = exp(chosen_score - largest) / sum;
  }
}

// rank = how many values of the segment come before this one in a stable falling order. Comparing all pairs needs no
// workspace and no synchronisation between blocks, and the segments (tokens of a group) are short. Segment s of `inner`
// interleaved ones per group: value i is values[(s / inner * length + i) * stride + s % inner].
template <typename scalar_t, typename Emit>
__device__ void rank_values(const scalar_t* __restrict__ values, int length, int inner, int stride, Emit emit) {
  __shared__ scalar_t tile[kThreads];
  const int blocks_per_segment = (length + kThreads - 1) / kThreads;
  const int64_t segment = blockIdx.x / blocks_per_segment;
  const int mine = int(blockIdx.x % blocks_per_segment) * kThreads + int(threadIdx.x);
  const scalar_t* first = values + segment / inner * length * stride + segment % inner;
  const scalar_t value = mine < length ? first[int64_t(mine) * stride] : scalar_t(0);
  int rank = 0;
  for (int start = 0; start < length; start += kThreads) {
    __syncthreads();
    if (start + int(threadIdx.x) < length) {
      tile[threadIdx.x] = first[int64_t(start + threadIdx.x) * stride];
    }
    __syncthreads();
    const int count = min(kThreads, length - start);
    for (int i = 0; i < count; ++i) {
      rank += precedes(tile[i], value) || (!precedes(value, tile[i]) && start + i < mine);
    }
  }
  if (mine < length) {
    emit(segment, mine, rank, value);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    rank_tokens(const scalar_t* choice_weight, int tokens, int top_k, int32_t* order) {
  rank_values(choice_weight, tokens, 1, top_k, [&](int64_t group, int token, int rank, scalar_t) {
    order[group * tokens + rank] = token;
  });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) experts_take(
    const scalar_t* gates, int64_t groups, int tokens, int experts, int64_t capacity, int64_t* out_token,
    int64_t* out_expert, scalar_t* out_weight, int64_t* offsets) {
  rank_values(gates, tokens, experts, experts, [&](int64_t segment, int token, int rank, scalar_t gate) {
    const int64_t group = segment / experts, expert = segment % experts;
    if (rank < capacity) {
      const int64_t row = (expert * groups + group) * capacity + rank;
      out_token[row] = group * tokens + token;
      out_expert[row] = expert;
      out_weight[row] = gate;
    }
  });
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e <= experts; e += kThreads) {
      offsets[e] = e * groups * capacity;
    }
  }
}

struct Chunks {
  int64_t groups;
  int tokens, experts, top_k, per_group;

  // counts[group, expert, k, chunk]: what scan_slots reads is contiguous.
  __host__ __device__ int64_t count_index(int64_t group, int expert, int k, int chunk) const {
    return ((group * experts + expert) * top_k + k) * per_group + chunk;
  }
  // The token at a position of the filling order; without an order, in their own.
  __device__ int64_t token_at(const int32_t* order, int64_t group, int position) const {
    return group * tokens + (order == nullptr ? position : order[group * tokens + position]);
  }
};

__global__ void __launch_bounds__(kThreads)
    count(Chunks c, const int32_t* __restrict__ choice, const int32_t* __restrict__ order, int32_t* counts) {
  __shared__ int32_t wanted[kMaxTopK * kMaxExperts];
  const int64_t group = blockIdx.x / c.per_group;
  const int chunk = int(blockIdx.x % c.per_group);
  for (int i = threadIdx.x; i < c.top_k * c.experts; i += kThreads) {
    wanted[i] = 0;
  }
  __syncthreads();
  const int position = chunk * kThreads + int(threadIdx.x);
  if (position < c.tokens) {
    const int64_t token = c.token_at(order, group, position);
    for (int k = 0; k < c.top_k; ++k) {
      atomicAdd(&wanted[k * c.experts + choice[token * c.top_k + k]], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < c.top_k * c.experts; i += kThreads) {
    counts[c.count_index(group, i % c.experts, i / c.experts, chunk)] = wanted[i];
  }
}

// Inclusive sum over the lanes of a warp.
template <typename T>
__device__ T warp_sum_up_to(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T before = __shfl_up_sync(kAll, value, distance);
    value += lane >= distance ? before : T(0);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) scan_slots(Chunks c, int64_t capacity, int32_t* counts, int64_t* kept) {
  const int64_t pair = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;  // group * experts + expert
  if (pair >= c.groups * c.experts) {
    return;  // a whole warp at a time
  }
  const int lane = threadIdx.x % 32;
  const int length = c.top_k * c.per_group;
  int32_t* mine = counts + pair * length;
  int32_t before = 0;
  for (int start = 0; start < length; start += 32) {
    const int32_t value = start + lane < length ? mine[start + lane] : 0;
    const int32_t up_to = warp_sum_up_to(value);
    if (start + lane < length) {
      mine[start + lane] = before + up_to - value;
    }
    before += __shfl_sync(kAll, up_to, 31);
  }
  if (lane == 0) {
    kept[pair % c.experts * c.groups + pair / c.experts] = before < capacity ? before : capacity;
  }
}

// kept[expert, group] becomes the first row of the pair.
__global__ void __launch_bounds__(kThreads) scan_rows(Chunks c, int64_t* kept, int64_t* offsets) {
  __shared__ int64_t warp_total[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t length = c.groups * c.experts;
  int64_t before = 0;
  for (int64_t start = 0; start < length; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const int64_t value = i < length ? kept[i] : 0;
    const int64_t up_to = warp_sum_up_to(value);
    if (lane == 31) {
      warp_total[warp] = up_to;
    }
    __syncthreads();
    int64_t first = before + up_to - value;
    for (int w = 0; w < kWarps; ++w) {
      first += w < warp ? warp_total[w] : 0;
      before += warp_total[w];
    }
    if (i < length) {
      kept[i] = first;
      if (i % c.groups == 0) {
        offsets[i / c.groups] = first;
      }
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    offsets[c.experts] = before;
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) place_rows(
    Chunks c, int64_t capacity, const int32_t* __restrict__ choice, const scalar_t* __restrict__ choice_weight,
    const int32_t* __restrict__ order, const int32_t* __restrict__ first_slot, const int64_t* __restrict__ first_row,
    const int64_t* __restrict__ offsets, int64_t* out_token, int64_t* out_expert, scalar_t* out_weight,
    int64_t* place) {
  __shared__ int32_t in_warp[kWarps][kMaxExperts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x / c.per_group;
  const int chunk = int(blockIdx.x % c.per_group);
  const int position = chunk * kThreads + int(threadIdx.x);
  const bool real = position < c.tokens;
  const int64_t token = real ? c.token_at(order, group, position) : 0;
  const int64_t used = offsets[c.experts];

  for (int k = 0; k < c.top_k; ++k) {
    for (int i = threadIdx.x; i < kWarps * c.experts; i += kThreads) {
      in_warp[i / c.experts][i % c.experts] = 0;
    }
    __syncthreads();
    const int expert = real ? choice[token * c.top_k + k] : -1;
    const unsigned same = __match_any_sync(kAll, expert);
    int slot = __popc(same & ((1u << lane) - 1));  // wanted by earlier positions of this warp
    if (real && slot == 0) {
      in_warp[warp][expert] = __popc(same);
    }
    __syncthreads();
    if (real) {
      for (int w = 0; w < warp; ++w) {
        slot += in_warp[w][expert];
      }
      slot += first_slot[c.count_index(group, expert, k, chunk)];
      const bool kept = slot < capacity;
      const int64_t row = kept ? first_row[expert * c.groups + group] + slot : -1;
      place[token * c.top_k + k] = row;
      if (kept) {
        out_token[row] = token;
        out_expert[row] = expert;
        out_weight[row] = choice_weight[token * c.top_k + k];
      }
      // The tail beyond the rows in use: as many indices as choices, so each choice takes care of one.
      const int64_t index = (group * c.tokens + position) * c.top_k + k;
      if (index >= used) {
        out_token[index] = 0;
        out_expert[index] = c.experts - 1;
        out_weight[index] = 0;
      }
    }
    __syncthreads();
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) add_row_gradients(
    const scalar_t* __restrict__ grad_weight, const int64_t* __restrict__ token, const int64_t* __restrict__ expert,
    const int64_t* __restrict__ offsets, int experts, scalar_t* grad_gates) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < offsets[experts]) {  // no (token, expert) pair has two rows, so threads do not collide
    grad_gates[token[row] * experts + expert[row]] += grad_weight[row];
  }
}

// In place: gradient of the gates -> gradient of the scores.
template <typename scalar_t, int LANES, int PER_LANE>
__global__ void __launch_bounds__(kThreads)
    softmax_backward(const scalar_t* __restrict__ gates, int64_t tokens, int experts, scalar_t* grad) {
  const int64_t item = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / LANES;
  const bool real = item < tokens;
  const int64_t token = real ? item : tokens - 1;
  const int lane = threadIdx.x % LANES;
  scalar_t gate[PER_LANE], grad_gate[PER_LANE], mean = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int expert = lane + j * LANES;
    gate[j] = expert < experts ? gates[token * experts + expert] : scalar_t(0);
    grad_gate[j] = real && expert < experts ? grad[token * experts + expert] : scalar_t(0);
    mean += gate[j] * grad_gate[j];
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    mean += __shfl_xor_sync(kAll, mean, distance, LANES);
  }
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int expert = lane + j * LANES;
    if (real && expert < experts) {
      grad[token * experts + expert] = gate[j] * (grad_gate[j] - mean);
    }
  }
}

// Calls run(LANES, PER_LANE) as integral constants that fit the number of experts.
template <typename Run>
void with_lanes(int64_t experts, const Run& run) {
  using std::integral_constant;
  if (experts <= 8) {
    run(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  } else if (experts <= 32) {
    run(integral_constant<int, 32>{}, integral_constant<int, 1>{});
  } else {
    run(integral_constant<int, 32>{}, integral_constant<int, 8>{});
  }
}

template <typename scalar_t>
void forward(const Tensor& scores, const RouteProblem& p, const Assignment& out, cudaStream_t stream) {
  const int64_t all_tokens = p.groups * p.tokens;
  const bool tokens_choose = p.gate != Gate::experts_choose;
  if (all_tokens == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(out.offsets.mutable_data_ptr(), 0, (p.experts + 1) * sizeof(int64_t), stream));
    return;
  }
  const int tokens = int(p.tokens), experts = int(p.experts), top_k = int(p.top_k);
  const Tensor choice = torch::stable::new_empty(scores, {all_tokens, p.top_k}, ScalarType::Int);
  const Tensor choice_weight = torch::stable::new_empty(scores, {all_tokens, p.top_k});
  int32_t* chosen = choice.mutable_data_ptr<int32_t>();
  scalar_t* weight = choice_weight.mutable_data_ptr<scalar_t>();
  with_lanes(p.experts, [&](auto lanes, auto per_lane) {
    // experts_choose needs the softmax only, whose largest score one round finds.
    choose<scalar_t, lanes(), per_lane()><<<blocks_for(all_tokens * lanes(), kThreads), kThreads, 0, stream>>>(
        scores.const_data_ptr<scalar_t>(), all_tokens, experts, tokens_choose ? top_k : 1,
        p.gate != Gate::top_k_softmax,
        out.gates.mutable_data_ptr<scalar_t>(), tokens_choose ? chosen : nullptr, weight);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Chunks chunks{p.groups, tokens, experts, top_k, (tokens + kThreads - 1) / kThreads};
  if (!tokens_choose) {
    experts_take<scalar_t><<<blocks_for(p.groups * experts * chunks.per_group, 1), kThreads, 0, stream>>>(
        out.gates.const_data_ptr<scalar_t>(), p.groups, tokens, experts, p.capacity,
        out.token.mutable_data_ptr<int64_t>(), out.expert.mutable_data_ptr<int64_t>(),
        out.weight.mutable_data_ptr<scalar_t>(), out.offsets.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }

  const unsigned blocks = blocks_for(p.groups * chunks.per_group, 1);
  const Tensor order_tensor = torch::stable::new_empty(scores, {p.batch_priority ? all_tokens : 0}, ScalarType::Int);
  int32_t* order = p.batch_priority ? order_tensor.mutable_data_ptr<int32_t>() : nullptr;
  if (p.batch_priority) {
    rank_tokens<scalar_t><<<blocks, kThreads, 0, stream>>>(weight, tokens, top_k, order);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const Tensor counts_tensor =
      torch::stable::new_empty(scores, {p.groups * experts * top_k * chunks.per_group}, ScalarType::Int);
  const Tensor kept_tensor = torch::stable::new_empty(scores, {p.groups * experts}, ScalarType::Long);
  int32_t* counts = counts_tensor.mutable_data_ptr<int32_t>();
  int64_t* kept = kept_tensor.mutable_data_ptr<int64_t>();
  int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();
  count<<<blocks, kThreads, 0, stream>>>(chunks, chosen, order, counts);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scan_slots<<<blocks_for(p.groups * experts, kWarps), kThreads, 0, stream>>>(chunks, p.capacity, counts, kept);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  scan_rows<<<1, kThreads, 0, stream>>>(chunks, kept, offsets);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  place_rows<scalar_t><<<blocks, kThreads, 0, stream>>>(
      chunks, p.capacity, chosen, weight, order, counts, kept, offsets, out.token.mutable_data_ptr<int64_t>(),
      out.expert.mutable_data_ptr<int64_t>(), out.weight.mutable_data_ptr<scalar_t>(),
      out.place.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_forward(
    const Tensor& scores, int64_t top_k, std::string gate, std::optional<int64_t> capacity, bool batch_priority) {
  const RouteProblem problem = route_problem(scores, top_k, gate, capacity, batch_priority);
  STD_TORCH_CHECK(problem.experts <= kMaxExperts, "this kernel holds up to ", kMaxExperts, " experts");
  STD_TORCH_CHECK(problem.top_k <= kMaxTopK, "this kernel holds up to ", kMaxTopK, " choices of a token");
  STD_TORCH_CHECK(
      problem.tokens * kMaxTopK <= std::numeric_limits<int32_t>::max(), "a group has too many tokens for 32-bit slots");
  const LaunchContext context(scores);
  const Tensor dense = torch::stable::contiguous(scores);
  const Assignment out = empty_assignment(scores, problem);
  scores.scalar_type() == ScalarType::Float ? forward<float>(dense, problem, out, context.stream())
                                            : forward<double>(dense, problem, out, context.stream());
  return {out.token, out.expert, out.weight, out.offsets, out.place, out.gates};
}

template <typename scalar_t>
void backward(
    const std::optional<Tensor>& grad_weight, const Tensor& gates, const Tensor& token, const Tensor& expert,
    const Tensor& offsets, const Tensor& grad, cudaStream_t stream) {
  const int64_t tokens = gates.size(0) * gates.size(1), rows = token.numel();
  const int experts = int(gates.size(2));
  if (tokens == 0) {
    return;
  }
  scalar_t* gradient = grad.mutable_data_ptr<scalar_t>();
  if (grad_weight.has_value()) {
    const Tensor dense = torch::stable::contiguous(*grad_weight);
    add_row_gradients<scalar_t><<<blocks_for(rows, kThreads), kThreads, 0, stream>>>(
        dense.const_data_ptr<scalar_t>(), token.const_data_ptr<int64_t>(), expert.const_data_ptr<int64_t>(),
        offsets.const_data_ptr<int64_t>(), experts, gradient);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  with_lanes(experts, [&](auto lanes, auto per_lane) {
    softmax_backward<scalar_t, lanes(), per_lane()><<<blocks_for(tokens * lanes(), kThreads), kThreads, 0, stream>>>(
        gates.const_data_ptr<scalar_t>(), tokens, experts, gradient);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor route_backward(
    std::optional<Tensor> grad_weight, std::optional<Tensor> grad_gates, const Tensor& gates, const Tensor& token,
    const Tensor& expert, const Tensor& offsets) {
  check_saved(gates, token, expert, offsets);
  STD_TORCH_CHECK(gates.size(2) <= kMaxExperts, "this kernel holds up to ", kMaxExperts, " experts");
  const LaunchContext context(gates);
  const Tensor grad = initial_gates_gradient(grad_gates, gates);
  gates.scalar_type() == ScalarType::Float
      ? backward<float>(grad_weight, gates, token, expert, offsets, grad, context.stream())
      : backward<double>(grad_weight, gates, token, expert, offsets, grad, context.stream());
  return grad;
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CUDA, m) {
  m.impl("_route_forward", TORCH_BOX(&m2mkd::route_forward));
  m.impl("_route_backward", TORCH_BOX(&m2mkd::route_backward));
}
