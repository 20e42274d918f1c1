// What the CPU and the CUDA kernel of `route` share: the problem's sizes, checked, and the tensors to fill.
// The maths is in m2mkd_fast/ops/route.py.
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

enum class Gate { softmax_top_k, top_k_softmax, experts_choose };

struct RouteProblem {
  int64_t groups, tokens, experts;  // tokens of one group
  int64_t top_k;                    // 0 for experts_choose
  int64_t capacity;                 // of an expert for one group; the largest integer where nothing is dropped
  int64_t rows;                     // of the assignment, dropped choices included
  Gate gate;
  bool batch_priority;
};

struct Assignment {
  Tensor token, expert, weight, offsets, place, gates;
};

inline RouteProblem route_problem(
    const Tensor& scores, int64_t top_k, const std::string& gate, std::optional<int64_t> capacity,
    bool batch_priority) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must be [groups, tokens, experts]");
  STD_TORCH_CHECK(
      scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
      "scores must be float32 or float64");
  RouteProblem problem{};
  problem.groups = scores.size(0);
  problem.tokens = scores.size(1);
  problem.experts = scores.size(2);
  problem.capacity = capacity.value_or(std::numeric_limits<int64_t>::max());
  problem.batch_priority = batch_priority;
  STD_TORCH_CHECK(problem.experts >= 1, "there must be at least one expert");
  STD_TORCH_CHECK(problem.capacity >= 1, "capacity must be at least 1");
  if (gate == "experts_choose") {
    problem.gate = Gate::experts_choose;
    STD_TORCH_CHECK(problem.capacity <= problem.tokens, "capacity must be at most the tokens of a group");
    problem.rows = problem.groups * problem.experts * problem.capacity;
  } else {
    STD_TORCH_CHECK(gate == "softmax_top_k" || gate == "top_k_softmax", "unknown gate ", gate);
    STD_TORCH_CHECK(1 <= top_k && top_k <= problem.experts, "top_k must be within 1 to the number of experts");
    problem.gate = gate == "softmax_top_k" ? Gate::softmax_top_k : Gate::top_k_softmax;
    problem.top_k = top_k;
    problem.rows = problem.groups * problem.tokens * top_k;
  }
  return problem;
}

inline Assignment empty_assignment(const Tensor& scores, const RouteProblem& problem) {
  const auto index = ScalarType::Long;
  return {
      torch::stable::new_empty(scores, {problem.rows}, index),
      torch::stable::new_empty(scores, {problem.rows}, index),
      torch::stable::new_empty(scores, {problem.rows}),
      torch::stable::new_empty(scores, {problem.experts + 1}, index),
      torch::stable::new_empty(scores, {problem.groups * problem.tokens, problem.top_k}, index),
      torch::stable::new_empty(scores, {problem.groups, problem.tokens, problem.experts}),
  };
}

inline void check_saved(const Tensor& gates, const Tensor& token, const Tensor& expert, const Tensor& offsets) {
  STD_TORCH_CHECK(
      gates.dim() == 3 && offsets.dim() == 1 && offsets.size(0) == gates.size(2) + 1, "not the forward's gates");
  STD_TORCH_CHECK(
      gates.scalar_type() == ScalarType::Float || gates.scalar_type() == ScalarType::Double,
      "gates must be float32 or float64");
  STD_TORCH_CHECK(
      gates.is_contiguous() && token.is_contiguous() && expert.is_contiguous() && offsets.is_contiguous(),
      "the forward's outputs must be passed as they were, contiguous");
}

// Gradient with respect to the gates before that of the weights is added: a fresh contiguous tensor like `gates`.
inline Tensor initial_gates_gradient(const std::optional<Tensor>& grad_gates, const Tensor& gates) {
  if (!grad_gates.has_value()) {
    return torch::stable::new_zeros(gates, gates.sizes());
  }
  Tensor grad = torch::stable::new_empty(gates, gates.sizes());
  return torch::stable::copy_(grad, *grad_gates);
}

}  // namespace m2mkd
