// The losses of each group, and their slopes, from the sums that the first pass leaves of each chunk. Apart from the
// passes over tokens, since it sees no token, runs once at the end, and computes in double precision.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../route.h"
#include "route_common.h"

namespace m2mkd {
namespace {

// What a chunk adds to its group's losses, for each expert; and z.
enum SumOf : int64_t { kGateWithoutNoise, kChance, kGateWithNoise, kSums };

// Loss, and its derivative with respect to each of `sum`: squared coefficient of variation of sum / scale.
template <typename scalar_t>
scalar_t squared_variation(const std::vector<double>& sum, double scale, scalar_t* slope) {
  const double experts = static_cast<double>(sum.size());
  double mean = 0, variance = 0;
  for (const double value : sum) {
    mean += value / scale;
  }
  mean /= experts;
  for (const double value : sum) {
    variance += (value / scale - mean) * (value / scale - mean);
  }
  variance /= experts;
  const double square = mean * mean, divisor = square > 0 ? square : 1;
  for (size_t e = 0; e < sum.size(); ++e) {
    const double by_variance = 2 * (sum[e] / scale - mean) / divisor;
    const double by_mean = square > 0 ? 2 * variance / (square * mean) : 0;
    slope[e] = static_cast<scalar_t>((by_variance - by_mean) / (experts * scale));
  }
  return static_cast<scalar_t>(variance / divisor);
}

// From the sums of the chunks, added in their order, to losses and slopes. `first_choices` [G, E].
template <typename scalar_t>
void finish_losses(
    const RouteProblem& p, const std::vector<scalar_t>& sums, const std::vector<int64_t>& first_choices,
    const RouteOutputs& out) {
  scalar_t* loss = out.losses.mutable_data_ptr<scalar_t>();
  std::fill(loss, loss + 4 * p.groups, scalar_t(0));
  if (p.losses == 0) {
    return;
  }
  const bool sloped = p.losses & (kImportance | kLoad | kGshard);
  scalar_t* slopes = sloped ? out.slopes.mutable_data_ptr<scalar_t>() : nullptr;
  if (sloped) {
    std::fill(slopes, slopes + 3 * p.groups * p.experts, scalar_t(0));
  }
  const int64_t chunks = chunks_of(p.tokens), width = kSums * p.experts + 1;
  const double tokens = static_cast<double>(std::max<int64_t>(1, p.tokens));
  const double experts = static_cast<double>(p.experts);
  std::vector<double> total(p.experts);
  for (int64_t g = 0; g < p.groups; ++g) {
    const auto total_of = [&](int64_t first, int64_t count) {
      std::fill(total.begin(), total.end(), 0);
      for (int64_t chunk = g * chunks; chunk < (g + 1) * chunks; ++chunk) {
        for (int64_t i = 0; i < count; ++i) {
          total[i] += sums[chunk * width + first + i];
        }
      }
    };
    const auto slope = [&](int64_t number) { return slopes + (number * p.groups + g) * p.experts; };
    if (p.losses & kImportance) {
      total_of(kGateWithoutNoise * p.experts, p.experts);
      loss[g] = squared_variation(total, 1, slope(0));
    }
    if (p.losses & kLoad) {
      total_of(kChance * p.experts, p.experts);
      loss[p.groups + g] = squared_variation(total, tokens, slope(1));
    }
    if (p.losses & kGshard) {
      total_of(kGateWithNoise * p.experts, p.experts);
      double value = 0;
      for (int64_t e = 0; e < p.experts; ++e) {
        // The share in single precision, as in gshard_loss.
        const float share = static_cast<float>(first_choices[g * p.experts + e]) * static_cast<float>(1 / tokens);
        value += share * total[e] / tokens;
        slope(2)[e] = static_cast<scalar_t>(share / tokens * experts);
      }
      loss[2 * p.groups + g] = static_cast<scalar_t>(value * experts);
    }
    if (p.losses & kZ) {
      total_of(kSums * p.experts, 1);
      loss[3 * p.groups + g] = static_cast<scalar_t>(total[0] / tokens);
    }
  }
}

}  // namespace
}  // namespace m2mkd
