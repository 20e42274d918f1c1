// Activations and their slopes, of arrays.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "normal_distribution.h"

namespace m2mkd {

enum class Phi { gelu, gelu_tanh, silu };

template <typename scalar_t>
struct ValueAndSlope {
  scalar_t value, slope;
};

template <typename scalar_t>
ValueAndSlope<scalar_t> gelu(scalar_t x) {
  constexpr scalar_t kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
  const scalar_t e = exp_of_nonpositive(scalar_t(-0.5) * x * x), cdf = normal_cdf(x, e);
  return {x * cdf, cdf + x * (kDensity * e)};
}

// The logistic function of y, and of -y.
template <typename scalar_t>
struct Logistic {
  scalar_t plus, minus;
  explicit Logistic(scalar_t y) {
    const scalar_t e = exp_of_nonpositive(-std::abs(y)), large = 1 / (1 + e), small = e * large;
    plus = y > 0 ? large : small;
    minus = y > 0 ? small : large;
  }
};

template <typename scalar_t>
ValueAndSlope<scalar_t> gelu_tanh(scalar_t x) {
  // (1 + tanh(y / 2)) / 2 is the logistic function of y.
  constexpr scalar_t kTwice = 1.5957691216057308, kCubic = 0.044715;  // 2 sqrt(2 / pi)
  const scalar_t square = x * x;
  const Logistic<scalar_t> logistic(kTwice * (x + kCubic * square * x));
  const scalar_t inner_slope = kTwice * (1 + 3 * kCubic * square);
  return {x * logistic.plus, logistic.plus + x * (logistic.plus * logistic.minus) * inner_slope};
}

template <typename scalar_t>
ValueAndSlope<scalar_t> silu(scalar_t x) {
  const Logistic<scalar_t> logistic(x);
  return {x * logistic.plus, logistic.plus + x * (logistic.plus * logistic.minus)};
}

template <typename scalar_t, typename Function>
void activate_with(
    const Function& function, const scalar_t* __restrict x, int64_t count, scalar_t* __restrict value) {
  for (int64_t i = 0; i < count; ++i) {
    value[i] = function(x[i]).value;
  }
}

template <typename scalar_t, typename Function>
void activate_with(
    const Function& function, const scalar_t* __restrict x, int64_t count, scalar_t* __restrict value,
    scalar_t* __restrict slope) {
  for (int64_t i = 0; i < count; ++i) {
    const auto found = function(x[i]);
    value[i] = found.value;
    slope[i] = found.slope;
  }
}

// value[i] = phi(x[i]), and where `out` has one pointer more, slope[i] = phi'(x[i]).
template <typename scalar_t, typename... Out>
void activate(Phi phi, const scalar_t* x, int64_t count, Out*... out) {
  switch (phi) {
    case Phi::gelu:
      return activate_with([](scalar_t one) { return gelu(one); }, x, count, out...);
    case Phi::gelu_tanh:
      return activate_with([](scalar_t one) { return gelu_tanh(one); }, x, count, out...);
    case Phi::silu:
      return activate_with([](scalar_t one) { return silu(one); }, x, count, out...);
  }
}

}  // namespace m2mkd
