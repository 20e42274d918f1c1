// Numbers of the standard normal distribution, drawn by counter, as in m2mkd_fast/ops/philox.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "elementary.h"
#include "philox.h"

namespace m2mkd {

// Box and Muller: two numbers of two words. Angles are reduced to an eighth of a turn before they become radians, which
// is exact.
inline void normal_pairs(const uint32_t* __restrict words, int64_t pairs, float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float first = static_cast<float>(static_cast<int32_t>(words[2 * i] >> 8)) * 0x1p-24f + 0x1p-25f;
    const float turn = static_cast<float>(static_cast<int32_t>(words[2 * i + 1] >> 8)) * 0x1p-24f + 0x1p-25f;
    const float radius = std::sqrt(-2.0f * log_of_positive(first));
    const int32_t quarter = static_cast<int32_t>(4.0f * turn + 0.5f);
    const float x = (turn - 0.25f * static_cast<float>(quarter)) * 6.28318531f, square = x * x;
    float sine = 1.0f / 362880;  // Taylor's series, |x| <= pi / 4
    sine = sine * square - 1.0f / 5040;
    sine = sine * square + 1.0f / 120;
    sine = sine * square - 1.0f / 6;
    sine = sine * square * x + x;
    float cosine = -1.0f / 3628800;
    cosine = cosine * square + 1.0f / 40320;
    cosine = cosine * square - 1.0f / 720;
    cosine = cosine * square + 1.0f / 24;
    cosine = cosine * square - 0.5f;
    cosine = cosine * square + 1.0f;
    const bool odd = quarter & 1;
    const float along = odd ? sine : cosine, across = odd ? cosine : sine;
    out[2 * i] = radius * ((quarter + 1) & 2 ? -along : along);
    out[2 * i + 1] = radius * (quarter & 2 ? -across : across);
  }
}

inline void normal_pairs(const uint32_t* words, int64_t pairs, double* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const double first = static_cast<double>(words[2 * i] >> 8) * 0x1p-24 + 0x1p-25;
    const double turn = static_cast<double>(words[2 * i + 1] >> 8) * 0x1p-24 + 0x1p-25;
    const double radius = std::sqrt(-2.0 * std::log(first));
    out[2 * i] = radius * std::cos(2.0 * M_PI * turn);
    out[2 * i + 1] = radius * std::sin(2.0 * M_PI * turn);
  }
}

// Normal numbers of consecutive elements.
template <typename scalar_t>
class NormalNumbers {
 public:
  // Of the elements first .. first + count - 1; valid until the next call.
  const scalar_t* operator()(uint64_t seed, int64_t first, int64_t count) {
    const int64_t counter = first / 4, counters = (first + count + 3) / 4 - counter;
    if (static_cast<int64_t>(offsets_.size()) < counters) {
      offsets_.resize(counters);
      std::iota(offsets_.begin(), offsets_.end(), 0);
      words_.resize(4 * counters);
      numbers_.resize(4 * counters);
    }
    philox4x32(seed, static_cast<uint64_t>(counter), offsets_.data(), counters, words_.data());
    normal_pairs(words_.data(), 2 * counters, numbers_.data());
    return numbers_.data() + first % 4;
  }

 private:
  std::vector<int32_t> offsets_;
  std::vector<uint32_t> words_;
  std::vector<scalar_t> numbers_;
};

}  // namespace m2mkd
