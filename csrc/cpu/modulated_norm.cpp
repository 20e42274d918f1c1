// CPU kernels of `modulated_norm`; the maths is in kernels/modulated_norm.py.
//
// A row is read from memory once: its mean, its variance and its M scaled copies are taken while it lies in the first
// cache.

#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "latent_blocks.h"

namespace m2mkd {
namespace {

// as(p) is what lies at p: the vector that begins there, or one number. Not one template for both: a vector type given
// as a template argument forgets that it may lie anywhere.
template <typename scalar_t>
struct AsVector {
  using Value = typename VectorOf<scalar_t>::type;
  Value& operator()(scalar_t* at) const {
    return *reinterpret_cast<Value*>(at);
  }
  const Value& operator()(const scalar_t* at) const {
    return *reinterpret_cast<const Value*>(at);
  }
};
template <typename scalar_t>
struct AsNumber {
  scalar_t& operator()(scalar_t* at) const {
    return *at;
  }
  const scalar_t& operator()(const scalar_t* at) const {
    return *at;
  }
};

// Calls visit(as, i) for vectors of channels, then for the channels that fill none.
template <typename scalar_t, typename Visit>
void for_each_channel(int64_t width, const Visit& visit) {
  using Vector = VectorOf<scalar_t>;
  int64_t i = 0;
  for (; i + Vector::size <= width; i += Vector::size) {
    visit(AsVector<scalar_t>{}, i);
  }
  for (; i < width; ++i) {
    visit(AsNumber<scalar_t>{}, i);
  }
}

// Calls visit(as, i, sums) to add to sums[0] .. sums[kSums - 1], and returns them in totals. Several vectors at a time,
// because an addition has to wait for the one before it.
template <int kSums, typename scalar_t, typename Visit>
void sum_channels(int64_t width, scalar_t* totals, const Visit& visit) {
  using Vector = VectorOf<scalar_t>;
  constexpr int kAtOnce = 4 / kSums;
  typename Vector::type vectors[kAtOnce][kSums] = {};
  int64_t i = 0;
  for (; i + kAtOnce * Vector::size <= width; i += kAtOnce * Vector::size) {
    for (int k = 0; k < kAtOnce; ++k) {
      visit(AsVector<scalar_t>{}, i + k * Vector::size, vectors[k]);
    }
  }
  scalar_t rest[kSums] = {};
  for (; i < width; ++i) {
    visit(AsNumber<scalar_t>{}, i, rest);
  }
  for (int s = 0; s < kSums; ++s) {
    for (int k = 1; k < kAtOnce; ++k) {
      vectors[0][s] += vectors[k][s];
    }
    totals[s] = rest[s];
    for (int lane = 0; lane < Vector::size; ++lane) {
      totals[s] += vectors[0][s][lane];
    }
  }
}

constexpr int kMostScales = 8;

// Calls run with the number of scales, as a constant of the compiler for the usual ones: queries have one scale, keys
// and values two.
template <typename Run>
void with_scales(int64_t number, const Run& run) {
  switch (number) {
    case 1:
      return run(std::integral_constant<int64_t, 1>{});
    case 2:
      return run(std::integral_constant<int64_t, 2>{});
    default:
      return run(number);
  }
}

struct Arguments {
  Tensor inputs, weight, bias;
  std::vector<Tensor> scales;
  LatentBlocks blocks;
};

std::vector<Tensor> checked(
    const std::vector<Tensor>& tensors, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType precision,
    const char* name) {
  std::vector<Tensor> dense;
  for (const Tensor& tensor : tensors) {
    check_precision(tensor, precision, name);
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " have a wrong number of dimensions");
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      STD_TORCH_CHECK(tensor.size(d) == sizes[d], name, " have a wrong shape");
    }
    dense.push_back(torch::stable::contiguous(tensor));
  }
  return dense;
}

Arguments checked_arguments(
    const Tensor& inputs, const Tensor& weight, const Tensor& bias, const std::vector<Tensor>& scales) {
  STD_TORCH_CHECK(inputs.dim() == 3 && inputs.size(2) > 0, "inputs must be [batch, latents, width]");
  STD_TORCH_CHECK(!scales.empty() && scales.size() <= kMostScales, "there must be 1 to ", kMostScales, " scales");
  STD_TORCH_CHECK(scales[0].dim() == 2, "scales must be [latents, width] or [1, width]");
  const int64_t batch = inputs.size(0), latents = inputs.size(1), width = inputs.size(2), rows = scales[0].size(0);
  STD_TORCH_CHECK(rows == latents || rows == 1, "scales must be [latents, width] or [1, width]");
  const ScalarType precision = inputs.scalar_type();
  return {
      checked({inputs}, inputs.sizes(), precision, "inputs")[0],
      checked({weight}, {width}, precision, "weights")[0],
      checked({bias}, {width}, precision, "biases")[0],
      checked(scales, {rows, width}, precision, "scales"),
      LatentBlocks(batch, latents, width, rows),
  };
}

// In these two, what the loop over channels reads is copied to local variables first: a vector may be stored anywhere,
// so anything else would be read again after every store.

template <typename scalar_t, typename Number>
void normalize_piece(
    const Arguments& arguments, scalar_t eps, const std::vector<Tensor>& outputs, const Tensor& mean,
    const Tensor& rstd, int64_t piece, Number number) {
  const int64_t width = arguments.blocks.width;
  const scalar_t* inputs = arguments.inputs.const_data_ptr<scalar_t>();
  const scalar_t* weight = arguments.weight.const_data_ptr<scalar_t>();
  const scalar_t* bias = arguments.bias.const_data_ptr<scalar_t>();
  const scalar_t* scales[kMostScales];
  scalar_t* scaled[kMostScales];
  for (int64_t m = 0; m < number; ++m) {
    scales[m] = arguments.scales[m].const_data_ptr<scalar_t>();
    scaled[m] = outputs[m].mutable_data_ptr<scalar_t>();
  }
  scalar_t* means = mean.mutable_data_ptr<scalar_t>();
  scalar_t* rstds = rstd.mutable_data_ptr<scalar_t>();
  arguments.blocks.for_each_row(piece, [&](int64_t latent, int64_t row) {
    const scalar_t *x = inputs + row * width, *gamma = weight, *beta = bias;
    const scalar_t* scale[kMostScales];
    scalar_t* out[kMostScales];
    for (int64_t m = 0; m < number; ++m) {
      scale[m] = scales[m] + latent * width;
      out[m] = scaled[m] + row * width;
    }
    scalar_t total[1];
    sum_channels<1>(width, total, [&](auto as, int64_t i, auto& sums) { sums[0] += as(x + i); });
    const scalar_t mu = total[0] / width;
    sum_channels<1>(width, total, [&](auto as, int64_t i, auto& sums) {
      const auto centered = as(x + i) - mu;
      sums[0] += centered * centered;
    });
    const scalar_t inverse = 1 / std::sqrt(total[0] / width + eps);
    for_each_channel<scalar_t>(width, [&](auto as, int64_t i) {
      const auto normalized = (as(x + i) - mu) * inverse * as(gamma + i) + as(beta + i);
      for (int64_t m = 0; m < number; ++m) {
        as(out[m] + i) = as(scale[m] + i) * normalized;
      }
    });
    means[row] = mu;
    rstds[row] = inverse;
  });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> modulated_norm_forward(
    const Tensor& inputs, const Tensor& weight, const Tensor& bias, std::vector<Tensor> scales, double eps) {
  const Arguments arguments = checked_arguments(inputs, weight, bias, scales);
  std::vector<Tensor> outputs;
  for (size_t m = 0; m < scales.size(); ++m) {
    outputs.push_back(torch::stable::new_empty(inputs, inputs.sizes()));
  }
  const Tensor mean = torch::stable::new_empty(inputs, {inputs.size(0), inputs.size(1)});
  const Tensor rstd = torch::stable::new_empty(inputs, {inputs.size(0), inputs.size(1)});
  const auto run = [&](auto zero) {
    const auto precise_eps = static_cast<decltype(zero)>(eps);
    arguments.blocks.in_parallel([&](int64_t piece, int64_t) {
      with_best_instructions([&] {
        with_scales(scales.size(), [&](auto number) {
          normalize_piece(arguments, precise_eps, outputs, mean, rstd, piece, number);
        });
      });
    });
  };
  inputs.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  return {outputs, mean, rstd};
}

struct Gradients {
  std::vector<Tensor> outputs;
  Tensor mean, rstd;
  Tensor inputs, affine;
  std::vector<Tensor> scales;
};

// Writes the gradients of the piece's inputs; what it adds to those of weight and bias, to affine_part [2, width]; and
// what it adds to those of the scales, to its rows of scale_parts, number times [chunks, latents, width].
template <typename scalar_t, typename Number>
void compute_gradients_of_piece(
    const Arguments& arguments, const Gradients& gradients, const std::vector<Tensor>& scale_parts,
    scalar_t* affine_part, int64_t piece, int64_t chunk, Number number) {
  const LatentBlocks& blocks = arguments.blocks;
  const int64_t width = blocks.width;
  const scalar_t* inputs = arguments.inputs.const_data_ptr<scalar_t>();
  const scalar_t* weight = arguments.weight.const_data_ptr<scalar_t>();
  const scalar_t* bias = arguments.bias.const_data_ptr<scalar_t>();
  const scalar_t* mean = gradients.mean.const_data_ptr<scalar_t>();
  const scalar_t* rstd = gradients.rstd.const_data_ptr<scalar_t>();
  scalar_t* grad_inputs = gradients.inputs.mutable_data_ptr<scalar_t>();
  const scalar_t* scales[kMostScales];
  const scalar_t* grad_outputs[kMostScales];
  scalar_t* scale_sums[kMostScales];
  for (int64_t m = 0; m < number; ++m) {
    scales[m] = arguments.scales[m].const_data_ptr<scalar_t>();
    grad_outputs[m] = gradients.outputs[m].const_data_ptr<scalar_t>();
    scale_sums[m] = scale_parts[m].mutable_data_ptr<scalar_t>() + chunk * blocks.latents * width;
    blocks.clear_rows(piece, scale_sums[m]);
  }
  std::fill(affine_part, affine_part + 2 * width, scalar_t(0));
  blocks.for_each_row(piece, [&](int64_t latent, int64_t row) {
    const scalar_t *x = inputs + row * width, *gamma = weight, *beta = bias;
    const scalar_t mu = mean[row], inverse = rstd[row];
    const scalar_t* scale[kMostScales];
    const scalar_t* grad_out[kMostScales];
    scalar_t* scale_sum[kMostScales];
    for (int64_t m = 0; m < number; ++m) {
      scale[m] = scales[m] + latent * width;
      grad_out[m] = grad_outputs[m] + row * width;
      scale_sum[m] = scale_sums[m] + latent * width;
    }
    scalar_t *gamma_sum = affine_part, *beta_sum = affine_part + width;
    scalar_t* grad_x = grad_inputs + row * width;  // first the gradient of the normalised row
    scalar_t total[2];
    sum_channels<2>(width, total, [&](auto as, int64_t i, auto& sums) {
      const auto normalized = (as(x + i) - mu) * inverse;
      const auto affined = normalized * as(gamma + i) + as(beta + i);
      auto grad_affined = as(grad_out[0] + i) * as(scale[0] + i);
      as(scale_sum[0] + i) += as(grad_out[0] + i) * affined;
      for (int64_t m = 1; m < number; ++m) {
        grad_affined += as(grad_out[m] + i) * as(scale[m] + i);
        as(scale_sum[m] + i) += as(grad_out[m] + i) * affined;
      }
      as(gamma_sum + i) += grad_affined * normalized;
      as(beta_sum + i) += grad_affined;
      const auto grad_normalized = grad_affined * as(gamma + i);
      as(grad_x + i) = grad_normalized;
      sums[0] += grad_normalized;
      sums[1] += grad_normalized * normalized;
    });
    const scalar_t along_mean = total[0] / width, along_x = total[1] / width;
    for_each_channel<scalar_t>(width, [&](auto as, int64_t i) {
      as(grad_x + i) = inverse * (as(grad_x + i) - along_mean - (as(x + i) - mu) * inverse * along_x);
    });
  });
}

template <typename scalar_t>
void compute_gradients(const Arguments& arguments, const Gradients& gradients) {
  const LatentBlocks& blocks = arguments.blocks;
  const std::vector<Tensor> scale_parts = blocks.parts_of(gradients.scales);
  const Tensor affine_parts = torch::stable::new_empty(gradients.affine, {blocks.pieces(), 2, blocks.width});
  scalar_t* affine_part = affine_parts.mutable_data_ptr<scalar_t>();
  blocks.in_parallel([&](int64_t piece, int64_t chunk) {
    with_best_instructions([&] {
      with_scales(scale_parts.size(), [&](auto number) {
        compute_gradients_of_piece(
            arguments, gradients, scale_parts, affine_part + piece * 2 * blocks.width, piece, chunk, number);
      });
    });
  });
  sum_parts<scalar_t>(affine_parts, gradients.affine);
  blocks.sum_parts_of<scalar_t>(scale_parts, gradients.scales);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> modulated_norm_backward(
    std::vector<Tensor> grad_outputs, const Tensor& inputs, const Tensor& weight, const Tensor& bias,
    std::vector<Tensor> scales, const Tensor& mean, const Tensor& rstd) {
  const Arguments arguments = checked_arguments(inputs, weight, bias, scales);
  const ScalarType precision = inputs.scalar_type();
  STD_TORCH_CHECK(grad_outputs.size() == scales.size(), "there must be one gradient for each scale");
  const std::vector<Tensor> statistics =
      checked({mean, rstd}, {inputs.size(0), inputs.size(1)}, precision, "statistics");
  Gradients gradients{
      checked(grad_outputs, inputs.sizes(), precision, "gradients"),
      statistics[0],
      statistics[1],
      torch::stable::new_empty(inputs, inputs.sizes()),
      torch::stable::new_empty(weight, {2, inputs.size(2)}),
      {},
  };
  for (const Tensor& scale : scales) {
    gradients.scales.push_back(torch::stable::new_empty(scale, scale.sizes()));
  }
  precision == ScalarType::Float ? compute_gradients<float>(arguments, gradients)
                                 : compute_gradients<double>(arguments, gradients);
  return {gradients.inputs, gradients.affine, gradients.scales};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_modulated_norm_forward", TORCH_BOX(&m2mkd::modulated_norm_forward));
  m.impl("_modulated_norm_backward", TORCH_BOX(&m2mkd::modulated_norm_backward));
}
