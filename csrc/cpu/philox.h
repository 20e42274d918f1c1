// Counter-based random numbers, as in m2mkd_fast/ops/latent_affinity.py: Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, SC 2011.
#pragma once

#include <cstdint>

namespace m2mkd {

// words[k][i] = word k of philox4x32-10 at counter first + offset[i]. Compilers vectorise over i.
inline void philox4x32(uint64_t seed, uint64_t first, const int32_t* offset, int64_t count, uint32_t* const words[4]) {
  uint32_t* const w0 = words[0];
  uint32_t* const w1 = words[1];
  uint32_t* const w2 = words[2];
  uint32_t* const w3 = words[3];
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(offset[i]);
    w0[i] = static_cast<uint32_t>(counter);
    w1[i] = static_cast<uint32_t>(counter >> 32);
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    uint32_t c0 = w0[i], c1 = w1[i], c2 = 0, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint32_t left = 0xD2511F53u, right = 0xCD9E8D57u;
      const uint32_t left_high = static_cast<uint32_t>((static_cast<uint64_t>(left) * c0) >> 32);
      const uint32_t right_high = static_cast<uint32_t>((static_cast<uint64_t>(right) * c2) >> 32);
      const uint32_t left_low = left * c0, right_low = right * c2;
      c0 = right_high ^ c1 ^ key0;
      c1 = right_low;
      c2 = left_high ^ c3 ^ key1;
      c3 = left_low;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    w0[i] = c0;
    w1[i] = c1;
    w2[i] = c2;
    w3[i] = c3;
  }
}

}  // namespace m2mkd
