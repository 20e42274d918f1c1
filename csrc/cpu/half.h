// Half precisions as they are stored. Arithmetic is in float; conversions have no branches, so that loops over them are
// vectorised.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace m2mkd {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which numbers stored as `stored_t` are computed with.
template <typename stored_t>
struct ComputeType {
  using type = stored_t;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};
template <typename stored_t>
using Compute = typename ComputeType<stored_t>::type;

inline float widened(float value) {
  return value;
}
inline double widened(double value) {
  return value;
}
inline float widened(BFloat16 value) {
  return as_float(static_cast<uint32_t>(value.bits) << 16);
}
inline float widened(Float16 value) {
  constexpr float kScale = 5.192296858534828e33f;  // 2^112, between the two exponents' biases
  const uint32_t number = static_cast<uint32_t>(value.bits & 0x7fffu), sign = (value.bits & 0x8000u) << 16;
  const float finite = as_float(number << 13) * kScale;  // exact, below the smallest normal number as well
  return as_float((number >= 0x7c00u ? (number << 13) | 0x7f800000u : as_bits(finite)) | sign);
}

// value = the nearest stored number, to even in the middle; NaN stays NaN.
inline void round_to(float value, float& stored) {
  stored = value;
}
inline void round_to(double value, double& stored) {
  stored = value;
}
inline void round_to(float value, BFloat16& stored) {
  const uint32_t bits = as_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  stored.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void round_to(float value, Float16& stored) {
  const uint32_t all = as_bits(value), bits = all & 0x7fffffffu, sign = (all >> 16) & 0x8000u;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // The unit in the last place of a half is that of a float at 1/2: adding 1/2 rounds.
  const uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
  uint32_t number = bits < 0x38800000u ? small : normal;
  number = bits >= 0x477ff000u ? 0x7c00u : number;  // from 65520 on infinity is nearest
  number = bits > 0x7f800000u ? 0x7e00u : number;
  stored.bits = static_cast<uint16_t>(number | sign);
}

}  // namespace m2mkd
