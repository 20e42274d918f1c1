// CPU kernels of `modulated_geglu`; the maths is in kernels/modulated_geglu.py.

#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "latent_blocks.h"
#include "normal_distribution.h"
#include "softmax.h"

namespace m2mkd {
namespace {

// e[i] = exp(-gates[i]^2 / 2)
template <typename scalar_t>
void exponentials(const scalar_t* __restrict gates, int64_t width, scalar_t* __restrict e) {
  for (int64_t i = 0; i < width; ++i) {
    e[i] = scalar_t(-0.5) * gates[i] * gates[i];
  }
  exp_of_nonpositive(e, width);
}

template <typename scalar_t>
void geglu_row(
    const scalar_t* __restrict values, const scalar_t* __restrict gates, const scalar_t* __restrict scale,
    const scalar_t* __restrict e, int64_t width, scalar_t* __restrict out) {
  for (int64_t i = 0; i < width; ++i) {
    out[i] = values[i] * (gates[i] * normal_cdf(gates[i], e[i])) * scale[i];
  }
}

template <typename scalar_t>
void geglu_row_backward(
    const scalar_t* __restrict grad_out, const scalar_t* __restrict values, const scalar_t* __restrict gates,
    const scalar_t* __restrict scale, const scalar_t* __restrict e, int64_t width, scalar_t* __restrict grad_values,
    scalar_t* __restrict grad_gates, scalar_t* __restrict scale_sum) {
  constexpr scalar_t kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
  for (int64_t i = 0; i < width; ++i) {
    const scalar_t cdf = normal_cdf(gates[i], e[i]);
    const scalar_t gelu = gates[i] * cdf, slope = cdf + gates[i] * (kDensity * e[i]);
    const scalar_t grad = grad_out[i] * scale[i];
    grad_values[i] = grad * gelu;
    grad_gates[i] = grad * values[i] * slope;
    scale_sum[i] += grad_out[i] * (values[i] * gelu);
  }
}

LatentBlocks checked_blocks(const Tensor& hidden, const Tensor& scale) {
  STD_TORCH_CHECK(
      hidden.dim() == 3 && hidden.size(2) > 0 && hidden.size(2) % 2 == 0,
      "hidden must be [batch, latents, 2 * width]");
  const int64_t width = hidden.size(2) / 2;
  STD_TORCH_CHECK(
      scale.dim() == 2 && scale.size(1) == width && (scale.size(0) == hidden.size(1) || scale.size(0) == 1),
      "scale must be [latents, width] or [1, width]");
  check_precision(scale, hidden.scalar_type(), "scale");
  return LatentBlocks(hidden.size(0), hidden.size(1), width, scale.size(0));
}

template <typename scalar_t>
void forward(const LatentBlocks& blocks, const Tensor& hidden, const Tensor& scale, const Tensor& outputs) {
  const int64_t width = blocks.width;
  const scalar_t* values = hidden.const_data_ptr<scalar_t>();
  const scalar_t* scales = scale.const_data_ptr<scalar_t>();
  scalar_t* out = outputs.mutable_data_ptr<scalar_t>();
  blocks.in_parallel([&](int64_t piece, int64_t) {
    std::vector<scalar_t> e(width);
    with_best_instructions([&] {
      blocks.for_each_row(piece, [&](int64_t latent, int64_t row) {
        const scalar_t* value = values + 2 * row * width;
        exponentials(value + width, width, e.data());
        geglu_row(value, value + width, scales + latent * width, e.data(), width, out + row * width);
      });
    });
  });
}

template <typename scalar_t>
void backward(
    const LatentBlocks& blocks, const Tensor& grad_outputs, const Tensor& hidden, const Tensor& scale,
    const Tensor& grad_hidden, const Tensor& grad_scale) {
  const int64_t width = blocks.width;
  const scalar_t* grads = grad_outputs.const_data_ptr<scalar_t>();
  const scalar_t* values = hidden.const_data_ptr<scalar_t>();
  const scalar_t* scales = scale.const_data_ptr<scalar_t>();
  scalar_t* grad_values = grad_hidden.mutable_data_ptr<scalar_t>();
  const std::vector<Tensor> parts = blocks.parts_of({grad_scale});
  scalar_t* part = parts[0].mutable_data_ptr<scalar_t>();
  blocks.in_parallel([&](int64_t piece, int64_t chunk) {
    std::vector<scalar_t> e(width);
    scalar_t* scale_sum = part + chunk * blocks.latents * width;
    with_best_instructions([&] {
      blocks.clear_rows(piece, scale_sum);
      blocks.for_each_row(piece, [&](int64_t latent, int64_t row) {
        const scalar_t* value = values + 2 * row * width;
        scalar_t* grad_value = grad_values + 2 * row * width;
        exponentials(value + width, width, e.data());
        geglu_row_backward(
            grads + row * width, value, value + width, scales + latent * width, e.data(), width, grad_value,
            grad_value + width, scale_sum + latent * width);
      });
    });
  });
  blocks.sum_parts_of<scalar_t>(parts, {grad_scale});
}

Tensor modulated_geglu_forward(const Tensor& hidden, const Tensor& scale) {
  const LatentBlocks blocks = checked_blocks(hidden, scale);
  const Tensor outputs = torch::stable::new_empty(hidden, {hidden.size(0), hidden.size(1), blocks.width});
  const Tensor dense = torch::stable::contiguous(hidden), dense_scale = torch::stable::contiguous(scale);
  hidden.scalar_type() == ScalarType::Float ? forward<float>(blocks, dense, dense_scale, outputs)
                                            : forward<double>(blocks, dense, dense_scale, outputs);
  return outputs;
}

std::tuple<Tensor, Tensor> modulated_geglu_backward(
    const Tensor& grad_outputs, const Tensor& hidden, const Tensor& scale) {
  const LatentBlocks blocks = checked_blocks(hidden, scale);
  check_precision(grad_outputs, hidden.scalar_type(), "grad_outputs");
  STD_TORCH_CHECK(
      grad_outputs.dim() == 3 && grad_outputs.size(0) == hidden.size(0) && grad_outputs.size(1) == hidden.size(1) &&
          grad_outputs.size(2) == blocks.width,
      "grad_outputs must be [batch, latents, width]");
  const Tensor grad_hidden = torch::stable::new_empty(hidden, hidden.sizes());
  const Tensor grad_scale = torch::stable::new_empty(scale, scale.sizes());
  const Tensor grads = torch::stable::contiguous(grad_outputs), dense = torch::stable::contiguous(hidden);
  const Tensor dense_scale = torch::stable::contiguous(scale);
  hidden.scalar_type() == ScalarType::Float
      ? backward<float>(blocks, grads, dense, dense_scale, grad_hidden, grad_scale)
      : backward<double>(blocks, grads, dense, dense_scale, grad_hidden, grad_scale);
  return {grad_hidden, grad_scale};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_modulated_geglu_forward", TORCH_BOX(&m2mkd::modulated_geglu_forward));
  m.impl("_modulated_geglu_backward", TORCH_BOX(&m2mkd::modulated_geglu_backward));
}
