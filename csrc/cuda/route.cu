// CUDA kernels of `route`. The maths is in m2mkd_fast/ops/route.py; what the ops take and return, in ../route.h.
//
// Results do not depend on the order in which blocks or threads run: atomics only count integers, every row is placed
// by its rank, and sums over tokens are added chunk by chunk in a fixed order. Nothing is read back to the host, and
// all memory comes from PyTorch's allocator, so that a CUDA graph can hold a call.
//
// Launches, forward, where tokens choose: 3, or 5 with batch priority
//   choose         a block for each chunk of tokens: noise, gates, choices, sums of the losses, counts
//   sort_in_block  (batch priority) a block for each group -> order
//   count_choices  (batch priority) a block for each chunk of positions: how many choices want each expert
//   scan           a warp for each (group, expert): counts to first slots; the last block: offsets, losses, slopes
//   place_rows     a block for each chunk of positions: the row of every choice -> token, expert, weight, place
// where experts choose: 3, or 4 with losses
//   choose, sort_in_block (a block for each group and expert), take_rows, scan (losses)
// For groups of more than 4,096 tokens make_sort_keys and the kernels of CUB's device-wide sort replace sort_in_block.
// Backward: 1, and a copy of each gradient that is not contiguous
//   differentiate  a block for each chunk of tokens

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../route.h"
#include "falling_order.h"
#include "launch.h"
#include "route_backward.h"
#include "route_choose.h"
#include "route_place.h"
#include "workspace.h"

namespace m2mkd {
namespace {

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

Chunks chunks_of(int64_t groups, int64_t tokens, int64_t experts, int64_t top_k) {
  STD_TORCH_CHECK(experts <= kMaxExperts, "this kernel holds up to ", kMaxExperts, " experts, not ", experts);
  STD_TORCH_CHECK(top_k <= kMaxTopK, "this kernel holds up to ", kMaxTopK, " choices of a token, not ", top_k);
  STD_TORCH_CHECK(
      tokens <= std::numeric_limits<int32_t>::max() / kMaxTopK, "a group has too many tokens for 32-bit slots: ",
      tokens);
  return {groups, int(tokens), int(experts), int(top_k), int((tokens + kChunk - 1) / kChunk)};
}

template <typename scalar_t>
const scalar_t* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename scalar_t>
void forward(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, const RouteProblem& p,
    const RouteOutputs& out, cudaStream_t stream) {
  const auto clear = [&](const Tensor& tensor, int64_t bytes) {
    STD_CUDA_CHECK(cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, stream));
  };
  const bool experts_choose = p.gate == Gate::experts_choose;
  // The first choice of a token is that of its largest score: the softmax and the GShard loss need it as well.
  const Chunks chunks = chunks_of(p.groups, p.tokens, p.experts, experts_choose ? 1 : p.top_k);
  const int64_t all_tokens = p.groups * p.tokens, pairs = p.groups * p.experts;
  if (all_tokens == 0) {
    clear(out.offsets, (p.experts + 1) * sizeof(int64_t));
    if (p.groups > 0) {
      clear(out.losses, kLossCount * p.groups * sizeof(scalar_t));
      clear(out.slopes, out.slopes.numel() * sizeof(scalar_t));
    }
    return;
  }

  const bool gshard = p.losses & kGshard, has_sums = p.losses != 0;
  const int64_t sums_count = has_sums ? chunks.sum_number(z_sum, p.groups) : 0;
  Workspace space;
  const auto counts = space.reserve<int32_t>(experts_choose ? 0 : pairs * chunks.top_k * chunks.per_group);
  const auto kept = space.reserve<int64_t>(experts_choose ? 0 : pairs);
  const auto sums = space.reserve<scalar_t>(sums_count * chunks.per_group);
  const auto totals = space.reserve<scalar_t>(sums_count);
  const auto priority = space.reserve<scalar_t>(p.batch_priority ? all_tokens : 0);
  const int64_t sorted = experts_choose ? p.experts * all_tokens : p.batch_priority ? all_tokens : 0;
  const auto order = space.reserve<int32_t>(sorted);
  const auto blocks_done = space.reserve<int32_t>(1);
  space.allocate(logits);

  int32_t* choice = experts_choose ? nullptr : out.choice.mutable_data_ptr<int32_t>();
  scalar_t* gates = out.gates.mutable_data_ptr<scalar_t>();
  scalar_t* losses = out.losses.mutable_data_ptr<scalar_t>();
  int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();
  const Rows<scalar_t> rows{
      out.token.mutable_data_ptr<int64_t>(), out.expert.mutable_data_ptr<int64_t>(),
      out.weight.mutable_data_ptr<scalar_t>(), out.place.mutable_data_ptr<int64_t>()};
  const unsigned blocks = blocks_for(p.groups * chunks.per_group, 1);

  Choosing<scalar_t> choosing{};
  choosing.chunks = chunks;
  choosing.gate = p.gate;
  choosing.losses = int(p.losses);
  choosing.logits = logits.const_data_ptr<scalar_t>();
  choosing.noise = data_or_null<scalar_t>(noise);
  choosing.seed = data_or_null<int64_t>(seed);
  choosing.noise_std = scalar_t(p.noise_std);
  choosing.gates = gates;
  choosing.softmax = gshard && p.gate == Gate::top_k_softmax ? out.softmax.mutable_data_ptr<scalar_t>() : nullptr;
  choosing.choice = choice;
  choosing.priority = p.batch_priority ? space[priority] : nullptr;
  choosing.threshold = p.losses & kLoad ? out.threshold.mutable_data_ptr<scalar_t>() : nullptr;
  choosing.counts = experts_choose || p.batch_priority ? nullptr : space[counts];
  choosing.sums = space[sums];
  choosing.loss = losses;
  choosing.blocks_done = space[blocks_done];
  with_lanes(p.experts, [&](auto lanes, auto per_lane) {
    choose<scalar_t, lanes(), per_lane()><<<blocks, kThreads, 0, stream>>>(choosing);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  if (experts_choose) {
    const Segments segments{pairs, chunks.tokens, chunks.experts, chunks.experts};
    falling_order<scalar_t>(segments, gates, space[order], logits, stream);
    const int64_t items = std::max(p.experts * all_tokens, p.experts + 1);
    take_rows<scalar_t><<<blocks_for(items, kThreads), kThreads, 0, stream>>>(
        chunks, p.capacity, gates, space[order], offsets, rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (p.batch_priority) {
    falling_order<scalar_t>({p.groups, chunks.tokens, 1, 1}, space[priority], space[order], logits, stream);
    count_choices<<<blocks, kChunk, 0, stream>>>(chunks, choice, space[order], space[counts]);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!experts_choose || has_sums) {
    Scanning<scalar_t> scanning{};
    scanning.chunks = chunks;
    scanning.capacity = p.capacity;
    scanning.counts = experts_choose ? nullptr : space[counts];
    scanning.kept = space[kept];
    scanning.offsets = offsets;
    scanning.sums = space[sums];
    scanning.totals = space[totals];
    scanning.losses = {int(p.losses), space[totals], losses, out.slopes.mutable_data_ptr<scalar_t>()};
    scanning.blocks_done = space[blocks_done];
    scan<scalar_t><<<blocks_for(pairs, kWarps), kThreads, 0, stream>>>(scanning);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!experts_choose) {
    place_rows<scalar_t><<<blocks, kChunk, 0, stream>>>(
        chunks, p.capacity, choice, gates, p.batch_priority ? space[order] : nullptr, space[counts], space[kept],
        offsets, rows);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_forward(
    const Tensor& logits, std::optional<Tensor> noise, std::optional<Tensor> seed, double noise_std, int64_t top_k,
    std::string gate, std::optional<int64_t> capacity, bool batch_priority, int64_t losses) {
  const RouteProblem problem =
      route_problem(logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, losses);
  const LaunchContext context(logits);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const std::optional<Tensor> dense_noise = contiguous(noise);
  const RouteOutputs out = empty_outputs(logits, problem);
  logits.scalar_type() == ScalarType::Float
      ? forward<float>(dense_logits, dense_noise, seed, problem, out, context.stream())
      : forward<double>(dense_logits, dense_noise, seed, problem, out, context.stream());
  return {out.token,  out.expert, out.weight,    out.offsets, out.place,  out.gates,
          out.losses, out.choice, out.threshold, out.slopes,  out.softmax};
}

std::tuple<Tensor, Tensor> route_backward(
    std::optional<Tensor> grad_weight, std::optional<Tensor> grad_gates, std::optional<Tensor> grad_losses,
    const Tensor& logits, const Tensor& gates, const Tensor& place, const Tensor& choice, const Tensor& threshold,
    const Tensor& slopes, const Tensor& softmax, double noise_std, std::string gate, int64_t losses,
    bool need_noise) {
  const Gate kind = gate_of(gate);
  check_saved(logits, gates, place, choice, threshold, slopes, softmax, kind, losses);
  const Chunks chunks = chunks_of(logits.size(0), logits.size(1), logits.size(2), choice.size(1));
  const LaunchContext context(logits);
  const Tensor grad_logits = torch::stable::new_empty(logits, gates.sizes());
  const Tensor grad_noise =
      need_noise ? torch::stable::new_empty(logits, gates.sizes()) : torch::stable::new_empty(logits, {0});
  if (chunks.groups * chunks.tokens == 0) {
    return {grad_logits, grad_noise};
  }
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const std::optional<Tensor> dense_weight = contiguous(grad_weight), dense_gates = contiguous(grad_gates),
                              dense_losses = contiguous(grad_losses);
  cudaStream_t stream = context.stream();
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    Backward<scalar_t> b{};
    b.chunks = chunks;
    b.gate = kind;
    b.losses = grad_losses.has_value() ? int(losses) : 0;
    b.noise_std = scalar_t(noise_std);
    b.grad_weight = data_or_null<scalar_t>(dense_weight);
    b.grad_gates = data_or_null<scalar_t>(dense_gates);
    b.grad_losses = data_or_null<scalar_t>(dense_losses);
    b.logits = dense_logits.const_data_ptr<scalar_t>();
    b.gates = gates.const_data_ptr<scalar_t>();
    b.place = place.const_data_ptr<int64_t>();
    b.choice = choice.const_data_ptr<int32_t>();
    b.threshold = threshold.const_data_ptr<scalar_t>();
    b.slopes = slopes.const_data_ptr<scalar_t>();
    b.softmax = softmax.const_data_ptr<scalar_t>();
    b.grad_logits = grad_logits.mutable_data_ptr<scalar_t>();
    b.grad_noise = need_noise ? grad_noise.mutable_data_ptr<scalar_t>() : nullptr;
    with_lanes(chunks.experts, [&](auto lanes, auto per_lane) {
      differentiate<scalar_t, lanes(), per_lane()>
          <<<blocks_for(chunks.groups * chunks.per_group, 1), kThreads, 0, stream>>>(b);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  logits.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  return {grad_logits, grad_noise};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CUDA, m) {
  m.impl("_route_forward", TORCH_BOX(&m2mkd::route_forward));
  m.impl("_route_backward", TORCH_BOX(&m2mkd::route_backward));
}
