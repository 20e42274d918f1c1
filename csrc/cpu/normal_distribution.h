// The standard normal distribution.
//
// With t = |x| and e = exp(-t^2 / 2), the tail below -t is e / (t + 3) times a factor between 0.4 and 1.5, which a
// polynomial gives: one exponential serves the distribution and its density.
#pragma once

#include <cmath>

namespace m2mkd {

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

// The probability that a standard normal variable is below x, with e = exp(-x^2 / 2).
template <typename scalar_t>
scalar_t normal_cdf(scalar_t x, scalar_t e) {
  const scalar_t tail = normal_tail(std::abs(x), e);
  return x > 0 ? 1 - tail : tail;
}

}  // namespace m2mkd
