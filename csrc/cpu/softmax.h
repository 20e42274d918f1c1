// Exponentials of arrays, for softmax, without branches that depend on the data.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace m2mkd {

// exp(x) for x <= 0, in place, relative error below 2e-7; written so that compilers vectorise it, which a call of expf
// prevents.
inline void exp_of_nonpositive(float* values, int64_t count) {
  constexpr float kLowest = -87.33654f;          // exp of less is below the smallest normal number: 0
  constexpr float kRound = 12582912.0f;          // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i] < kLowest ? kLowest : values[i];  // keeps NaN
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln(2) / 2, ln(2) in two parts
    float p = 1.9875691500e-4f;                                   // Cephes' polynomial for exp
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    const uint32_t power = static_cast<uint32_t>(bits + 127) << 23;  // 2^n
    float scale;
    std::memcpy(&scale, &power, sizeof(scale));
    values[i] = values[i] < kLowest ? 0.0f : p * scale;
  }
}

inline void exp_of_nonpositive(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = std::exp(values[i]);
  }
}

}  // namespace m2mkd
