// CPU kernels of `modulated_geglu`; the maths is in kernels/modulated_geglu.py.
//
// With t = |gate| and e = exp(-t^2 / 2), the normal distribution's tail below -t is e / (t + 3) times a factor between
// 0.4 and 1.5, which a polynomial gives: one exponential serves the distribution and its density.

#include <cmath>
#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "latent_blocks.h"
#include "softmax.h"

namespace m2mkd {
namespace {

// The probability that a standard normal variable is below -t, for t >= 0 and e = exp(-t^2 / 2). The polynomial is a
// least-squares fit, weighted towards the largest relative error, which is 8e-9 for t <= 9; its argument runs from -1 (t
// = 0) to 1, so that terms fall fast and rounding stays at one unit in the last place.
inline float normal_tail(float t, float e) {
  const float inverse = 1.0f / (t + 3.0f);
  const float w = 1.0f - 6.0f * inverse;
  float factor = -3.082184935e-4f;
  factor = factor * w - 9.736378311e-4f;
  factor = factor * w + 1.071683814e-3f;
  factor = factor * w + 6.961703534e-3f;
  factor = factor * w - 1.047172084e-2f;
  factor = factor * w - 4.726237353e-2f;
  factor = factor * w + 2.300182744e-1f;
  factor = factor * w - 5.093319989e-1f;
  factor = factor * w + 7.290836849e-1f;
  return e * (inverse * factor);
}

inline double normal_tail(double t, double) {
  return 0.5 * std::erfc(t * M_SQRT1_2);
}

template <typename scalar_t>
scalar_t normal_cdf(scalar_t x, scalar_t e) {
  const scalar_t tail = normal_tail(std::abs(x), e);
  return x > 0 ? 1 - tail : tail;
}

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
