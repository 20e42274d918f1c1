// CPU kernels of `expert_mlp`; the maths is in m2mkd_fast/ops/expert_mlp.py.
//
// Tokens are the columns of every product, weights the left matrix: gathering tokens into panels is all the packing that
// the large operand needs, an expert's bias is one number a row, and what the first product makes is the panel of the
// second. Work goes in rounds of a few hundred rows of the assignment, so that hidden units stay in the cache that
// processors share; in each, threads divide the rows of the weights, not the tokens, so that it does not matter how
// unevenly tokens are spread over experts.
//
// Here are the host functions; what they call, from the bottom up, is in
//   expert_mlp_problem.h   checked arguments, dropout
//   expert_mlp_rounds.h    the plan of the work: rounds, and what threads share in them
//   expert_mlp_panels.h    the steps of both directions: gather, multiply, store, add up
//   expert_mlp_forward.h   two products, the activation between them
//   expert_mlp_backward.h  the same back, and sums over tokens for gradients of weights
// These headers are for this file alone and lie in its unnamed namespace: compilers inline what is called once as if it
// stood here, and no name meets one of another op.

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "expert_mlp_backward.h"
#include "expert_mlp_forward.h"
#include "expert_mlp_problem.h"
#include "half.h"
#include "row_products.h"

namespace m2mkd {
namespace {

// Calls run with a number of the type that a tensor's are stored in.
template <typename Run>
void with_stored_type(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(BFloat16());
    default:
      return run(Float16());
  }
}

std::tuple<Tensor, Tensor> expert_mlp_forward(
    const Tensor& x, const Tensor& token, const Tensor&, const Tensor& weight, const Tensor& offsets,
    const Tensor& place, const Tensor& up_weight, std::optional<Tensor> up_bias, const Tensor& down_weight,
    std::optional<Tensor> down_bias, std::string activation, double hidden_dropout, double output_dropout,
    std::optional<Tensor> seed, bool keep_preactivation) {
  const Problem problem = checked_problem(
      x, token, weight, offsets, place, up_weight, up_bias, down_weight, down_bias, activation, hidden_dropout,
      output_dropout, seed);
  const Tensor out = torch::stable::new_empty(x, {problem.tokens, problem.out});
  std::optional<Tensor> preactivation;
  with_stored_type(x, [&](auto zero) {
    using stored_t = decltype(zero);
    constexpr int64_t panel = kPanel<Compute<stored_t>>;
    preactivation = keep_preactivation
        ? torch::stable::new_empty(x, {problem.rows / panel + problem.experts, problem.made, panel})
        : torch::stable::new_empty(x, {0});
    forward<stored_t>(
        problem, static_cast<stored_t*>(out.mutable_data_ptr()),
        keep_preactivation ? static_cast<stored_t*>(preactivation->mutable_data_ptr()) : nullptr);
  });
  return {out, *preactivation};
}

// A gradient like a tensor, zero for experts without rows; without elements where it is not needed.
template <typename stored_t>
Tensor empty_gradient(const Problem& problem, const std::optional<Tensor>& tensor, bool needed, stored_t*& numbers) {
  if (!needed || !tensor.has_value()) {
    numbers = nullptr;
    return torch::stable::new_empty(problem.x, {0});
  }
  const Tensor gradient = torch::stable::new_empty(problem.x, tensor->sizes());
  numbers = static_cast<stored_t*>(gradient.mutable_data_ptr());
  const int64_t* offsets = Problem::of<int64_t>(problem.offsets);
  const int64_t size = gradient.numel() / std::max<int64_t>(1, problem.experts);
  for (int64_t e = 0; e < problem.experts; ++e) {
    if (offsets[e] == offsets[e + 1]) {
      std::memset(static_cast<void*>(numbers + e * size), 0, size * sizeof(stored_t));
    }
  }
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad_out, const Tensor& preactivation, const Tensor& x, const Tensor& token, const Tensor&,
    const Tensor& weight, const Tensor& offsets, const Tensor& place, const Tensor& up_weight,
    std::optional<Tensor> up_bias, const Tensor& down_weight, std::optional<Tensor> down_bias, std::string activation,
    double hidden_dropout, double output_dropout, std::optional<Tensor> seed, bool need_x, bool need_parameters) {
  const Problem problem = checked_problem(
      x, token, weight, offsets, place, up_weight, up_bias, down_weight, down_bias, activation, hidden_dropout,
      output_dropout, seed);
  check_shape(grad_out, {problem.tokens, problem.out}, x.scalar_type(), "grad_out");
  const Tensor grads = torch::stable::contiguous(grad_out), kept = torch::stable::contiguous(preactivation);
  const Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  std::vector<Tensor> found;
  with_stored_type(x, [&](auto zero) {
    using stored_t = decltype(zero);
    constexpr int64_t panel = kPanel<Compute<stored_t>>;
    check_shape(
        preactivation, {problem.rows / panel + problem.experts, problem.made, panel}, x.scalar_type(), "preactivation");
    Gradients<stored_t> gradients{nullptr, nullptr, nullptr, nullptr, nullptr, grad_weight, need_parameters};
    const Tensor grad_x = torch::stable::new_empty(x, need_x ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef{0});
    gradients.x = need_x ? static_cast<stored_t*>(grad_x.mutable_data_ptr()) : nullptr;
    found = {
        grad_x,
        empty_gradient(problem, problem.up_weight, need_parameters, gradients.up_weight),
        empty_gradient(problem, problem.up_bias, need_parameters, gradients.up_bias),
        empty_gradient(problem, problem.down_weight, need_parameters, gradients.down_weight),
        empty_gradient(problem, problem.down_bias, need_parameters, gradients.down_bias),
    };
    backward(
        problem, static_cast<const stored_t*>(grads.const_data_ptr()),
        static_cast<const stored_t*>(kept.const_data_ptr()), gradients);
  });
  return {found[0], grad_weight, found[1], found[2], found[3], found[4]};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_expert_mlp_forward", TORCH_BOX(&m2mkd::expert_mlp_forward));
  m.impl("_expert_mlp_backward", TORCH_BOX(&m2mkd::expert_mlp_backward));
}
