// Counter-based random numbers on the GPU, as in m2mkd_fast/ops/philox.py: Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

namespace m2mkd {

// The pair of words 0 and 1 (pair 0) or 2 and 3 (pair 1) of philox4x32-10 at a counter, with the seed as key.
struct PhiloxPair {
  uint32_t first, second;

  __device__ PhiloxPair(uint64_t seed, uint64_t counter, int pair) {
    uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t left = uint64_t(0xD2511F53) * c0, right = uint64_t(0xCD9E8D57) * c2;
      c0 = uint32_t(right >> 32) ^ c1 ^ key0;
      c1 = uint32_t(right);
      c2 = uint32_t(left >> 32) ^ c3 ^ key1;
      c3 = uint32_t(left);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    first = pair == 0 ? c0 : c2;
    second = pair == 0 ? c1 : c3;
  }
};

// Above 0 and at most 1.
template <typename scalar_t>
__device__ scalar_t uniform_of(uint32_t word) {
  return scalar_t(word >> 8) * scalar_t(1.0 / (1 << 24)) + scalar_t(1.0 / (1 << 25));
}

// Standard normal number of an element, by Box and Muller: pairs of words make pairs of elements.
template <typename scalar_t>
__device__ scalar_t philox_normal(uint64_t seed, int64_t element) {
  const PhiloxPair words(seed, uint64_t(element) / 4, int(element / 2 % 2));
  const scalar_t radius = sqrt(scalar_t(-2) * log(uniform_of<scalar_t>(words.first)));
  const scalar_t turns = scalar_t(2) * uniform_of<scalar_t>(words.second);
  return radius * (element % 2 == 0 ? cospi(turns) : sinpi(turns));
}

}  // namespace m2mkd
