// What a call of `expert_mlp` is about: its tensors, checked, and its dropout.
//
// Apart from the kernels, which rely on these checks and make none: everything that a caller can get wrong is refused
// here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "activation.h"
#include "philox.h"
#include "row_products.h"

namespace m2mkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What dropout leaves of row n's unit j: element (n, j) of philox_keep in m2mkd_fast/ops/philox.py.
struct Dropout {
  double probability = 0;
  uint64_t seed = 0, first = 0;
  int64_t width = 0;

  bool active() const {
    return probability > 0;
  }

  // factor[j - first_unit][lane] = 1 / (1 - probability) for what row first_row + lane keeps of units first_unit
  // (a multiple of 4) to first_unit + count, 0 for what it drops.
  template <typename scalar_t>
  void factors(int64_t first_row, int64_t first_unit, int64_t count, scalar_t* factor) const {
    constexpr int64_t panel = kPanel<scalar_t>;
    const uint64_t per_row = (width + 3) / 4;
    const auto least = static_cast<uint64_t>(std::nearbyint(probability * 4294967296.0));
    const auto kept = static_cast<scalar_t>(1.0 / (1.0 - probability));
    int32_t offset[panel];
    uint32_t words[4 * panel];
    for (int64_t lane = 0; lane < panel; ++lane) {
      offset[lane] = static_cast<int32_t>(lane * per_row);
    }
    for (int64_t unit = 0; unit < count; unit += 4) {
      philox4x32(seed, first + first_row * per_row + (first_unit + unit) / 4, offset, panel, words);
      for (int64_t k = 0; k < std::min<int64_t>(4, count - unit); ++k) {
        for (int64_t lane = 0; lane < panel; ++lane) {
          factor[(unit + k) * panel + lane] = words[4 * lane + k] >= least ? kept : scalar_t(0);
        }
      }
    }
  }
};

// values *= factors, where a factor is not zero; zero where it is, even of NaN.
template <typename scalar_t>
void drop(const scalar_t* __restrict factors, int64_t count, scalar_t* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = factors[i] != 0 ? values[i] * factors[i] : scalar_t(0);
  }
}

struct Problem {
  Tensor x, token, weight, offsets, place, up_weight, down_weight;
  std::optional<Tensor> up_bias, down_bias;
  int64_t tokens, rows, experts, width, made, hidden, out, places;
  bool gated;
  Phi phi;
  Dropout hidden_dropout, output_dropout;

  template <typename stored_t>
  static const stored_t* of(const Tensor& tensor) {
    return static_cast<const stored_t*>(tensor.const_data_ptr());
  }
  template <typename stored_t>
  static const stored_t* of(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? of<stored_t>(*tensor) : nullptr;
  }
};

// The weights of all rows in use.
template <typename scalar_t>
std::vector<scalar_t> weights_of(const Problem& problem) {
  const int64_t used = Problem::of<int64_t>(problem.offsets)[problem.experts];
  const auto converted = [&](const auto* weight) { return std::vector<scalar_t>(weight, weight + used); };
  return problem.weight.scalar_type() == ScalarType::Double ? converted(Problem::of<double>(problem.weight))
                                                            : converted(Problem::of<float>(problem.weight));
}

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == dtype;
  for (int64_t d = 0; same && d < tensor.dim(); ++d) {
    same = tensor.size(d) == sizes.begin()[d];
  }
  STD_TORCH_CHECK(same, name, " has a wrong shape or dtype");
}

Problem checked_problem(
    const Tensor& x, const Tensor& token, const Tensor& weight, const Tensor& offsets, const Tensor& place,
    const Tensor& up_weight, const std::optional<Tensor>& up_bias, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, const std::string& activation, double hidden_dropout, double output_dropout,
    const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      x.dim() == 2 && up_weight.dim() == 3 && down_weight.dim() == 3 && place.dim() == 2,
      "x and place must be matrices, and there must be a matrix for each expert");
  Problem problem;
  problem.gated = activation == "geglu" || activation == "swiglu";
  STD_TORCH_CHECK(
      problem.gated || activation == "gelu" || activation == "gelu_tanh", "there is no activation ", activation);
  problem.phi = activation == "gelu_tanh" ? Phi::gelu_tanh : activation == "swiglu" ? Phi::silu : Phi::gelu;
  problem.tokens = x.size(0), problem.width = x.size(1), problem.rows = token.numel();
  problem.experts = up_weight.size(0), problem.made = up_weight.size(1), problem.places = place.size(1);
  problem.out = down_weight.size(1), problem.hidden = down_weight.size(2);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "x must be float32, float64, bfloat16 or float16");
  check_shape(
      up_weight, {problem.experts, problem.hidden * (1 + problem.gated), problem.width}, dtype, "up_weight");
  check_shape(down_weight, {problem.experts, problem.out, problem.hidden}, dtype, "down_weight");
  if (up_bias.has_value()) {
    check_shape(*up_bias, {problem.experts, problem.made}, dtype, "up_bias");
    problem.up_bias = torch::stable::contiguous(*up_bias);
  }
  if (down_bias.has_value()) {
    check_shape(*down_bias, {problem.experts, problem.out}, dtype, "down_bias");
    problem.down_bias = torch::stable::contiguous(*down_bias);
  }
  check_shape(token, {problem.rows}, ScalarType::Long, "token");
  check_shape(
      weight, {problem.rows}, weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
      "weight");
  check_shape(offsets, {problem.experts + 1}, ScalarType::Long, "offsets");
  check_shape(place, {problem.tokens, problem.places}, ScalarType::Long, "place");
  problem.x = torch::stable::contiguous(x), problem.token = torch::stable::contiguous(token);
  problem.weight = torch::stable::contiguous(weight), problem.offsets = torch::stable::contiguous(offsets);
  problem.place = torch::stable::contiguous(place), problem.up_weight = torch::stable::contiguous(up_weight);
  problem.down_weight = torch::stable::contiguous(down_weight);

  // An assignment that somebody made by hand must not read or write elsewhere.
  const int64_t *tokens = Problem::of<int64_t>(problem.token), *places = Problem::of<int64_t>(problem.place);
  const int64_t* offset = Problem::of<int64_t>(problem.offsets);
  const int64_t used = offset[problem.experts];
  STD_TORCH_CHECK(
      offset[0] == 0 && std::is_sorted(offset, offset + problem.experts + 1) && used <= problem.rows,
      "offsets must rise from 0 to at most the number of rows");
  STD_TORCH_CHECK(
      std::all_of(tokens, tokens + used, [&](int64_t t) { return t >= 0 && t < problem.tokens; }),
      "token must be below the number of tokens");
  STD_TORCH_CHECK(
      std::all_of(places, places + place.numel(), [&](int64_t row) { return row < used; }),
      "place must be below the last offset");

  const bool drops = hidden_dropout > 0 || output_dropout > 0;
  STD_TORCH_CHECK(
      hidden_dropout >= 0 && hidden_dropout < 1 && output_dropout >= 0 && output_dropout < 1,
      "dropout must be at least 0 and below 1");
  STD_TORCH_CHECK(!drops || seed.has_value(), "dropout needs a seed");
  if (drops) {
    STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one int64 number");
    const auto key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    problem.hidden_dropout = {hidden_dropout, key, 0, problem.hidden};
    const auto after = static_cast<uint64_t>(problem.rows * ((problem.hidden + 3) / 4));
    problem.output_dropout = {output_dropout, key, after, problem.out};
  }
  return problem;
}

}  // namespace
}  // namespace m2mkd
