// CPU kernels of `route`; the maths is in m2mkd_fast/ops/route.py, what the ops take and return in ../route.h.
//
// Tokens are cut into chunks of a fixed size, so that the result does not depend on the number of threads
// (route_common.h). One pass over the chunks draws the noise, chooses, writes gates, and sums up what the losses need
// (route_choose.h, route_top_k.h); it counts how often each chunk wants each expert. The chunks' sums give the losses
// (route_losses.h). A scan turns counts into first rows, and a second pass gives every choice its row (route_place.h).
// The backward is one pass (route_backward.h).

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../route.h"
#include "instruction_set.h"
#include "route_backward.h"
#include "route_choose.h"
#include "route_common.h"
#include "route_losses.h"
#include "route_place.h"

namespace m2mkd {
namespace {

template <typename scalar_t>
void forward(
    const RouteProblem& p, const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed,
    const RouteOutputs& out) {
  const ForwardInputs<scalar_t> inputs{
      logits.const_data_ptr<scalar_t>(),
      noise.has_value() ? noise->const_data_ptr<scalar_t>() : nullptr,
      seed.has_value(),
      seed.has_value() ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0,
  };
  const ForwardOutputs<scalar_t> outputs{
      out.gates.mutable_data_ptr<scalar_t>(),
      out.threshold.mutable_data_ptr<scalar_t>(),
      out.softmax.mutable_data_ptr<scalar_t>(),
      out.choice.mutable_data_ptr<int32_t>(),
  };
  const int64_t chunks = p.groups * chunks_of(p.tokens), choices = Chooser<scalar_t>::choices(p);
  const int64_t per_chunk = choices * p.experts, width = kSums * p.experts + 1;
  std::vector<int64_t> wanted(chunks * per_chunk);
  std::vector<scalar_t> sums(p.losses ? chunks * width : 0);
  for_chunks(p.groups, p.tokens, 4 * p.experts, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
    Chooser<scalar_t> chooser(p, inputs, outputs);
    with_best_instructions([&] {
      chooser(begin, end, wanted.data() + i * per_chunk, p.losses ? sums.data() + i * width : nullptr);
    });
  });
  std::vector<int64_t> first_choices(p.losses & kGshard ? p.groups * p.experts : 0);
  if (p.losses & kGshard) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t e = 0; e < p.experts; ++e) {
        first_choices[chunk / chunks_of(p.tokens) * p.experts + e] += wanted[chunk * per_chunk + e];
      }
    }
  }
  finish_losses(p, sums, first_choices, out);
  p.gate == Gate::experts_choose ? experts_choose<scalar_t>(p, outputs.gates, out)
                                 : tokens_choose<scalar_t>(p, wanted, outputs.gates, outputs.choice, out);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_forward(
    const Tensor& logits, std::optional<Tensor> noise, std::optional<Tensor> seed, double noise_std, int64_t top_k,
    std::string gate, std::optional<int64_t> capacity, bool batch_priority, int64_t losses) {
  const RouteProblem problem =
      route_problem(logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, losses);
  const RouteOutputs out = empty_outputs(logits, problem);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const std::optional<Tensor> dense_noise = dense(noise);
  logits.scalar_type() == ScalarType::Float ? forward<float>(problem, dense_logits, dense_noise, seed, out)
                                            : forward<double>(problem, dense_logits, dense_noise, seed, out);
  return {out.token,  out.expert, out.weight,    out.offsets, out.place,  out.gates,
          out.losses, out.choice, out.threshold, out.slopes,  out.softmax};
}

std::tuple<Tensor, Tensor> route_backward(
    std::optional<Tensor> grad_weight, std::optional<Tensor> grad_gates, std::optional<Tensor> grad_losses,
    const Tensor& logits, const Tensor& gates, const Tensor& place, const Tensor& choice, const Tensor& threshold,
    const Tensor& slopes, const Tensor& softmax, double noise_std, std::string gate_name, int64_t losses,
    bool need_noise) {
  const Gate gate = gate_of(gate_name);
  losses = grad_losses.has_value() ? losses : 0;
  check_saved(logits, gates, place, choice, threshold, slopes, softmax, gate, losses);
  const std::optional<Tensor> dense_weight = dense(grad_weight), dense_gates = dense(grad_gates);
  const std::optional<Tensor> dense_losses = dense(grad_losses);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const Tensor grad_logits = torch::stable::new_empty(gates, gates.sizes());
  const Tensor grad_noise = need_noise ? torch::stable::new_empty(gates, gates.sizes())
                                       : torch::stable::new_empty(gates, {0});
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto data = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    const BackwardInputs<scalar_t> inputs{
        data(dense_weight),
        data(dense_gates),
        data(dense_losses),
        dense_logits.const_data_ptr<scalar_t>(),
        gates.const_data_ptr<scalar_t>(),
        threshold.const_data_ptr<scalar_t>(),
        slopes.const_data_ptr<scalar_t>(),
        softmax.const_data_ptr<scalar_t>(),
        place.const_data_ptr<int64_t>(),
        choice.const_data_ptr<int32_t>(),
        gates.size(0),
        gates.size(1),
        gates.size(2),
        choice.size(1),
        losses,
        noise_std,
        gate,
    };
    scalar_t* const out = grad_logits.mutable_data_ptr<scalar_t>();
    scalar_t* const out_noise = need_noise ? grad_noise.mutable_data_ptr<scalar_t>() : nullptr;
    for_chunks(gates.size(0), gates.size(1), 4 * gates.size(2), [&](int64_t, int64_t g, int64_t begin, int64_t end) {
      Differentiator<scalar_t> differentiator(inputs, g, out, out_noise);
      with_best_instructions([&] { differentiator(begin, end); });
    });
  };
  gates.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  return {grad_logits, grad_noise};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_route_forward", TORCH_BOX(&m2mkd::route_forward));
  m.impl("_route_backward", TORCH_BOX(&m2mkd::route_backward));
}
