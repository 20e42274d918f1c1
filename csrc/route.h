// What the CPU and the CUDA kernels of `route` share: the problem's sizes, checked, and the tensors to fill.
// The maths is in m2mkd_fast/ops/route.py; what the private ops take and return is said here.
//
// G groups of S tokens, T = G S, E experts, K choices of a token (0 for experts_choose), N rows. scalar is float32 or
// float64, the dtype of the logits.
//
// _route_forward
//   logits [G, S, E] scalar; noise [G, S, E] scalar, added as it is, or seed, an int64 tensor of one number: then
//   noise_std * philox_normal(seed, logits.shape, scalar) is added, or neither. Scores are the sum.
//   losses: sum of the bits in `Loss`.
// returns the seven fields of `Assignment` in m2mkd_fast/ops/route.py (losses [4, G] in the order of `Loss`, zero for
// those not asked for), and what the backward needs; a tensor that it does not need has size 0 in its first dimension:
//   choice [T, K] int32: each token's experts in falling order of their scores. Always filled.
//   threshold [T] scalar, if losses has kLoad: the score of the last choice.
//   slopes [3, G, E] scalar, if losses has kImportance, kLoad or kGshard: derivative of the group's
//     importance loss with respect to the sum over its tokens of expert e's gate without noise,
//     load loss with respect to the sum over its tokens of p[s, e],
//     gshard loss with respect to the sum over its tokens of expert e's gate with noise;
//     zero for a loss that was not asked for. Gates are here sigmoid for `sigmoid`, else softmax over all experts.
//   softmax [G, S, E] scalar, if losses has kGshard and the gate is top_k_softmax: softmax over all experts of the
//     scores, which `gates` does not hold there.
//
// _route_backward
//   grad_weight [N], grad_gates [G, S, E], grad_losses [4, G], each may be missing and may have any strides; `losses`,
//   `gate` and `noise_std` as in the forward; the rest as the forward got and returned it.
// returns
//   grad_logits [G, S, E], and, with need_noise, grad_noise [G, S, E] (else [0]).
//
// Per token, with d[e] the gradient of its gates: grad_gates, plus grad_weight of the row of each of its choices that
// has one (`place`), plus grad_losses[gshard] * slopes[gshard] except for top_k_softmax:
//   h[e]  = gates[e] (d[e] - sum_j gates[j] d[j]);             sigmoid: gates[e] (1 - gates[e]) d[e]
//   top_k_softmax with gshard, c = grad_losses * slopes of it: h[e] += softmax[e] (c[e] - sum_j softmax[j] c[j])
//   load, c[e] = grad_losses * slopes * density(z) / noise_std, z = (threshold - logits[e]) / noise_std:
//                                                              h[last choice] -= sum_e c[e]
//   grad_noise[e] = h[e]
//   grad_logits[e] = h[e] + c[e] of load
//     + clean[e] (c[e] - sum_j clean[j] c[j]) (sigmoid: clean[e] (1 - clean[e]) c[e]), clean the gates without noise,
//       c = grad_losses * slopes of importance
//     + 2 / S grad_losses[z] logsumexp(logits) softmax(logits)[e]
#pragma once

#include <limits>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace m2mkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Gate { softmax_top_k, top_k_softmax, sigmoid, experts_choose };

enum Loss : int64_t { kImportance = 1, kLoad = 2, kGshard = 4, kZ = 8 };

inline Gate gate_of(const std::string& name) {
  if (name == "softmax_top_k") {
    return Gate::softmax_top_k;
  }
  if (name == "top_k_softmax") {
    return Gate::top_k_softmax;
  }
  if (name == "sigmoid") {
    return Gate::sigmoid;
  }
  STD_TORCH_CHECK(name == "experts_choose", "unknown gate ", name);
  return Gate::experts_choose;
}

struct RouteProblem {
  int64_t groups, tokens, experts;  // tokens of one group
  int64_t top_k;                    // 0 for experts_choose
  int64_t capacity;                 // of an expert for one group; the largest integer where nothing is dropped
  int64_t rows;                     // of the assignment, dropped choices included
  int64_t losses;                   // bits of Loss
  double noise_std;
  Gate gate;
  bool batch_priority;
};

struct RouteOutputs {
  Tensor token, expert, weight, offsets, place, gates, losses, choice, threshold, slopes, softmax;
};

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must be [groups, tokens, experts]");
  STD_TORCH_CHECK(logits.size(2) >= 1, "there must be at least one expert");
  STD_TORCH_CHECK(
      logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::Double,
      "logits must be float32 or float64");
}

inline RouteProblem route_problem(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, double noise_std,
    int64_t top_k, const std::string& gate, std::optional<int64_t> capacity, bool batch_priority, int64_t losses) {
  check_logits(logits);
  RouteProblem problem{};
  problem.groups = logits.size(0);
  problem.tokens = logits.size(1);
  problem.experts = logits.size(2);
  problem.capacity = capacity.value_or(std::numeric_limits<int64_t>::max());
  problem.batch_priority = batch_priority;
  problem.losses = losses;
  problem.noise_std = noise_std;
  problem.gate = gate_of(gate);
  STD_TORCH_CHECK(problem.capacity >= 1, "capacity must be at least 1");
  STD_TORCH_CHECK(!noise.has_value() || !seed.has_value(), "noise and seed exclude each other");
  if (noise.has_value()) {
    STD_TORCH_CHECK(
        noise->dim() == 3 && noise->size(0) == problem.groups && noise->size(1) == problem.tokens &&
            noise->size(2) == problem.experts && noise->scalar_type() == logits.scalar_type(),
        "noise must have the shape and dtype of the logits");
  }
  if (seed.has_value()) {
    STD_TORCH_CHECK(
        seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one number of type int64");
  }
  STD_TORCH_CHECK(0 <= losses && losses < 16, "unknown losses");
  if (problem.gate == Gate::experts_choose) {
    STD_TORCH_CHECK(problem.capacity <= problem.tokens, "capacity must be at most the tokens of a group");
    STD_TORCH_CHECK(!(losses & kLoad), "the load loss is defined where tokens choose");
    problem.rows = problem.groups * problem.experts * problem.capacity;
  } else {
    STD_TORCH_CHECK(1 <= top_k && top_k <= problem.experts, "top_k must be within 1 to the number of experts");
    problem.top_k = top_k;
    problem.rows = problem.groups * problem.tokens * top_k;
  }
  STD_TORCH_CHECK(
      !(losses & kLoad) || (noise_std > 0 && (noise.has_value() || seed.has_value())),
      "the load loss needs noise and its standard deviation");
  return problem;
}

inline RouteOutputs empty_outputs(const Tensor& logits, const RouteProblem& p) {
  using torch::stable::new_empty;
  const auto index = ScalarType::Long;
  const int64_t all_tokens = p.groups * p.tokens;
  const bool by_experts = p.gate == Gate::experts_choose;
  return {
      new_empty(logits, {p.rows}, index),
      new_empty(logits, {p.rows}, index),
      new_empty(logits, {p.rows}),
      new_empty(logits, {p.experts + 1}, index),
      new_empty(logits, {all_tokens, by_experts ? p.experts : p.top_k}, index),
      new_empty(logits, {p.groups, p.tokens, p.experts}),
      new_empty(logits, {4, p.groups}),
      new_empty(logits, {all_tokens, p.top_k}, ScalarType::Int),
      new_empty(logits, {p.losses & kLoad ? all_tokens : 0}),
      new_empty(logits, {p.losses & (kImportance | kLoad | kGshard) ? 3 : 0, p.groups, p.experts}),
      p.losses & kGshard && p.gate == Gate::top_k_softmax ? new_empty(logits, {p.groups, p.tokens, p.experts})
                                                          : new_empty(logits, {0}),
  };
}

// Checks what the backward is given as the forward's tensors. `logits` may have any strides.
inline void check_saved(
    const Tensor& logits, const Tensor& gates, const Tensor& place, const Tensor& choice, const Tensor& threshold,
    const Tensor& slopes, const Tensor& softmax, Gate gate, int64_t losses) {
  check_logits(logits);
  const int64_t groups = logits.size(0), tokens = logits.size(1), experts = logits.size(2);
  STD_TORCH_CHECK(
      gates.dim() == 3 && gates.size(0) == groups && gates.size(1) == tokens && gates.size(2) == experts &&
          gates.scalar_type() == logits.scalar_type(),
      "gates must have the shape and dtype of the logits");
  STD_TORCH_CHECK(
      place.dim() == 2 && place.size(0) == groups * tokens && choice.dim() == 2 && choice.size(0) == groups * tokens &&
          place.size(1) == (gate == Gate::experts_choose ? experts : choice.size(1)),
      "not the forward's place and choice");
  STD_TORCH_CHECK(!(losses & kLoad) || threshold.numel() == groups * tokens, "not the forward's threshold");
  STD_TORCH_CHECK(
      !(losses & (kImportance | kLoad | kGshard)) || slopes.numel() == 3 * groups * experts,
      "not the forward's slopes");
  STD_TORCH_CHECK(
      !(losses & kGshard && gate == Gate::top_k_softmax) || softmax.numel() == gates.numel(),
      "not the forward's softmax");
  STD_TORCH_CHECK(
      gates.is_contiguous() && place.is_contiguous() && choice.is_contiguous() && threshold.is_contiguous() &&
          slopes.is_contiguous() && softmax.is_contiguous(),
      "the forward's outputs must be passed as they were, contiguous");
}

}  // namespace m2mkd
