// The losses of a group from sums over its tokens, and their slopes; the maths is in m2mkd_fast/ops/routing_losses.py.
#pragma once

#include "../route.h"
#include "route_common.h"

namespace m2mkd {

template <typename scalar_t>
struct Losses {
  int wanted;              // bits
  const scalar_t* totals;  // by Chunks::sum_number
  scalar_t* loss;          // [4, G]
  scalar_t* slopes;        // [3, G, E]
};

// Squared coefficient of variation of scale * total[e], and its derivative by total[e]; for a whole warp.
template <typename scalar_t>
__device__ scalar_t squared_variation(const scalar_t* totals, scalar_t scale, int experts, scalar_t* slopes) {
  const int lane = threadIdx.x % 32;
  scalar_t mean = 0, variance = 0;
  for (int e = lane; e < experts; e += 32) {
    mean += scale * __ldcg(totals + e);
  }
  mean = sum_of_lanes<32>(mean) / experts;
  for (int e = lane; e < experts; e += 32) {
    const scalar_t difference = scale * __ldcg(totals + e) - mean;
    variance += difference * difference;
  }
  variance = sum_of_lanes<32>(variance) / experts;
  const scalar_t square = mean * mean;
  const bool divides = square > 0;
  const scalar_t factor = 2 * scale / (divides ? experts * square : scalar_t(experts));
  for (int e = lane; e < experts; e += 32) {
    const scalar_t difference = scale * __ldcg(totals + e) - mean;
    slopes[e] = factor * (divides ? difference - variance / mean : difference);
  }
  return divides ? variance / square : variance;
}

// E times the sum of share[e] * total[e] / tokens, and its derivative by total[e]; for a whole warp.
template <typename scalar_t>
__device__ scalar_t gshard(
    const scalar_t* totals, const scalar_t* first_choices, int tokens, int experts, scalar_t* slopes) {
  scalar_t sum = 0;
  for (int e = threadIdx.x % 32; e < experts; e += 32) {
    const scalar_t share = float(__ldcg(first_choices + e)) * float(1.0 / tokens);  // single precision, as published
    sum += share * __ldcg(totals + e) / tokens;
    slopes[e] = share * experts / tokens;
  }
  return sum_of_lanes<32>(sum) * experts;
}

// For a whole warp.
template <typename scalar_t>
__device__ void losses_of_group(const Chunks& c, const Losses<scalar_t>& losses, int64_t group) {
  const int64_t pair = group * c.experts;
  const auto totals = [&](Sum kind) { return losses.totals + c.sum_number(kind, pair); };
  const auto slopes = [&](int number) { return losses.slopes + number * c.groups * c.experts + pair; };
  const auto put = [&](int number, scalar_t loss) {
    if (threadIdx.x % 32 == 0) {
      losses.loss[number * c.groups + group] = loss;
    }
  };
  const auto no_slope = [&](int number) {
    for (int e = threadIdx.x % 32; e < c.experts && losses.wanted & (kImportance | kLoad | kGshard); e += 32) {
      slopes(number)[e] = 0;
    }
  };
  if (losses.wanted & kImportance) {
    put(0, squared_variation(totals(importance_sum), scalar_t(1), c.experts, slopes(0)));
  } else {
    no_slope(0);
  }
  if (losses.wanted & kLoad) {
    put(1, squared_variation(totals(load_sum), scalar_t(1) / c.tokens, c.experts, slopes(1)));
  } else {
    no_slope(1);
  }
  if (losses.wanted & kGshard) {
    put(2, gshard(totals(gshard_sum), totals(first_choice_sum), c.tokens, c.experts, slopes(2)));
  } else {
    no_slope(2);
  }
  if (losses.wanted & kZ) {
    put(3, __ldcg(losses.totals + c.sum_number(z_sum, group)) / c.tokens);
  }
}

}  // namespace m2mkd
