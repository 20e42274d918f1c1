// Counter-based random numbers, as in m2mkd_fast/ops/philox.py: Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "instruction_set.h"

namespace m2mkd {

// words[4 i + k] = word k of philox4x32-10 at counter first + offset[i], with the seed as key.
inline void portable_philox4x32(
    uint64_t seed, uint64_t first, const int32_t* offset, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(offset[i]);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t left = uint64_t(0xD2511F53) * c0, right = uint64_t(0xCD9E8D57) * c2;
      c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(right);
      c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(left);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

#if defined(__x86_64__) && defined(__GNUC__)

// Four counters in the 64-bit lanes of a register. Lower halves count; the multiplication does not see the upper ones.
// Compilers do not find this by themselves: they multiply 64 bits, or shuffle halves.
struct PhiloxLanes {
  __m256i c0, c1, c2, c3;

  __attribute__((target("avx2"), always_inline)) void start(__m256i first, const int32_t* offset) {
    const __m256i offsets = _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset)));
    c0 = _mm256_add_epi64(first, offsets);
    c1 = _mm256_srli_epi64(c0, 32);
    c2 = c3 = _mm256_setzero_si256();
  }

  __attribute__((target("avx2"), always_inline)) void round(__m256i key0, __m256i key1) {
    const __m256i left = _mm256_mul_epu32(c0, _mm256_set1_epi64x(0xD2511F53));
    const __m256i right = _mm256_mul_epu32(c2, _mm256_set1_epi64x(0xCD9E8D57));
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(right, 32), c1), key0);
    c1 = right;
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(left, 32), c3), key1);
    c3 = left;
  }

  __attribute__((target("avx2"), always_inline)) void store(uint32_t* words) const {
    const __m256i front = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);  // words 0 and 1 of each counter
    const __m256i back = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    const __m256i even = _mm256_unpacklo_epi64(front, back), odd = _mm256_unpackhi_epi64(front, back);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

__attribute__((target("avx2"))) inline void avx2_philox4x32(
    uint64_t seed, uint64_t first, const int32_t* offset, int64_t count, uint32_t* words) {
  const __m256i start = _mm256_set1_epi64x(static_cast<int64_t>(first));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    PhiloxLanes one, two;  // two at a time, because each waits for its products
    one.start(start, offset + i);
    two.start(start, offset + i + 4);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i keys0 = _mm256_set1_epi64x(key0), keys1 = _mm256_set1_epi64x(key1);
      one.round(keys0, keys1);
      two.round(keys0, keys1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    one.store(words + 4 * i);
    two.store(words + 4 * i + 16);
  }
  portable_philox4x32(seed, first, offset + i, count - i, words + 4 * i);
}

inline void philox4x32(uint64_t seed, uint64_t first, const int32_t* offset, int64_t count, uint32_t* words) {
  has_avx2() ? avx2_philox4x32(seed, first, offset, count, words)
             : portable_philox4x32(seed, first, offset, count, words);
}

#else

inline void philox4x32(uint64_t seed, uint64_t first, const int32_t* offset, int64_t count, uint32_t* words) {
  portable_philox4x32(seed, first, offset, count, words);
}

#endif

}  // namespace m2mkd
