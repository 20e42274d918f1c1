// Elementary functions of one number, without branches: loops over them are vectorised, which a call of the C library
// prevents. Those of doubles are the C library's. NaN gives NaN, but for log_of_positive.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace m2mkd {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// x = n ln(2) + r with |r| <= ln(2) / 2, for |x| < 2^20: returns e^r - 1, and 2^n where that is a normal number.
inline float reduced_expm1(float x, float& power) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  power = as_float((as_bits(shifted) + 127u) << 23);
  float p = 1.0f / 5040;  // Taylor's series
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * (r * r) + r;
}

// e^x for x <= 0; 0 where that is not a normal number.
inline float exp_of_nonpositive(float x) {
  constexpr float kLowest = -87.33654f;
  float power;
  const float value = reduced_expm1(x < kLowest ? kLowest : x, power);
  return x < kLowest ? 0.0f : value * power + power;
}

// e^x - 1 for |x| <= 80.
inline float expm1_of_small(float x) {
  float power;
  const float value = reduced_expm1(x, power);
  return value * power + (power - 1.0f);
}

// ln(1 + f) = 2 artanh(f / (2 + f)) for 1 + f within sqrt(1/2) to sqrt(2).
inline float log_near_one(float f) {
  const float s = f / (2.0f + f), z = s * s;  // z < 0.0295
  float p = 1.0f / 9;  // Taylor's series
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  return 2.0f * (p * z * s + s);
}

// y = 2^n m, m within sqrt(1/2) to sqrt(2), for a normal number y > 0: returns m, and n.
inline float reduced_log(float y, float& n) {
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;
  const uint32_t bits = as_bits(y) - kRootOfHalf + (127u << 23);  // so that the exponent is never negative
  n = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  return as_float((bits & 0x7fffffu) + kRootOfHalf);
}

inline float log_of_positive(float y) {
  float n;
  const float m = reduced_log(y, n);
  return n * 0.693359375f + (log_near_one(m - 1.0f) - n * 2.12194440e-4f);
}

// ln(1 + s) for 0 <= s < 2^126; what 1 + s rounds away matters only where it is s itself that counts.
inline float log1p_of_nonnegative(float s) {
  float n;
  const float m = reduced_log(1.0f + s, n);
  const float value = n * 0.693359375f + (log_near_one(n == 0.0f ? s : m - 1.0f) - n * 2.12194440e-4f);
  return s != s ? s : value;
}

inline double exp_of_nonpositive(double x) {
  return std::exp(x);
}
inline double expm1_of_small(double x) {
  return std::expm1(x);
}
inline double log_of_positive(double y) {
  return std::log(y);
}
inline double log1p_of_nonnegative(double s) {
  return std::log1p(s);
}

}  // namespace m2mkd
