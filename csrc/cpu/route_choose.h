// The first pass of `route`'s forward: for a chunk of tokens, from logits to noise, choices and gates, and to sums for
// the losses. These stay together in one class, since they share the scores while these are in the first cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../route.h"
#include "normal_distribution.h"
#include "normal_numbers.h"
#include "route_common.h"
#include "route_losses.h"
#include "route_top_k.h"
#include "softmax.h"
#include "token_columns.h"

namespace m2mkd {
namespace {

// Sets all bits of the first `count` lanes, and none of the others.
template <typename scalar_t>
void set_first_lanes(int64_t count, IntegerLanes<scalar_t>& mask) {
  for (int i = 0; i < kTokens<scalar_t>; ++i) {
    mask[i] = i < count ? -1 : 0;
  }
}

template <typename scalar_t>
scalar_t sum_of_lanes(const Lanes<scalar_t>& lanes) {
  scalar_t sum = 0;
  for (int i = 0; i < kTokens<scalar_t>; ++i) {
    sum += lanes[i];
  }
  return sum;
}

// e[i] = exp(-z[i]^2 / 2)
template <typename scalar_t>
void normal_exponentials(const scalar_t* __restrict z, int64_t count, scalar_t* __restrict e) {
  for (int64_t i = 0; i < count; ++i) {
    e[i] = scalar_t(-0.5) * z[i] * z[i];
  }
  exp_of_nonpositive(e, count);
}

// 1 - Phi(z) in place of z.
template <typename scalar_t>
void chances_above(const scalar_t* __restrict e, int64_t count, scalar_t* __restrict z) {
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t tail = normal_tail(std::abs(z[i]), e[i]);
    z[i] = z[i] > 0 ? tail : 1 - tail;
  }
}

template <typename scalar_t>
struct ForwardInputs {
  const scalar_t* logits;
  const scalar_t* noise;  // null where there is none, or where it is drawn
  bool drawn;
  uint64_t seed;
};

template <typename scalar_t>
struct ForwardOutputs {
  scalar_t *gates, *threshold, *softmax;
  int32_t* choice;
};

// The first pass: one chunk of tokens at a time.
template <typename scalar_t>
class Chooser {
  static constexpr int lanes = kTokens<scalar_t>;
  using Numbers = Lanes<scalar_t>;
  using Integers = IntegerLanes<scalar_t>;

 public:
  // Where experts choose, tokens choose too if the GShard loss has to know their first choice.
  static int64_t choices(const RouteProblem& p) {
    return p.gate == Gate::experts_choose ? (p.losses & kGshard ? 1 : 0) : p.top_k;
  }

  Chooser(const RouteProblem& problem, const ForwardInputs<scalar_t>& inputs, const ForwardOutputs<scalar_t>& outputs)
      : p(problem),
        in(inputs),
        out(outputs),
        choices_(choices(problem)),
        noisy_(inputs.noise != nullptr || inputs.drawn),
        rows_(noisy_ ? tokens_of_block<scalar_t>(p.experts) * p.experts : 0),
        columns_(4, p.experts),
        sums_(kSums, p.experts),
        keys_(2 * lanes * choices_) {}

  // Adds to `wanted` [choices, experts] how often the tokens first .. end - 1 want each expert, and writes `sums`
  // [kSums, experts] and, behind them, that of z.
  void operator()(int64_t first, int64_t end, int64_t* wanted, scalar_t* sums) {
    std::fill_n(sums_[0], kSums * p.experts, Numbers{});
    z_sum_ = Numbers{};
    const int64_t block = tokens_of_block<scalar_t>(p.experts);
    for (int64_t token = first; token < end; token += block) {
      const int64_t count = std::min(block, end - token);
      const scalar_t* clean = in.logits + token * p.experts;
      const scalar_t* rows = noisy_ ? add_noise(clean, token * p.experts, count * p.experts) : clean;
      for (int64_t t = 0; t < count; t += lanes) {
        choose(rows + t * p.experts, clean + t * p.experts, token + t, std::min<int64_t>(lanes, count - t), wanted);
      }
    }
    if (p.losses) {
      for (int64_t i = 0; i < kSums * p.experts; ++i) {
        sums[i] = sum_of_lanes<scalar_t>(sums_[0][i]);
      }
      sums[kSums * p.experts] = sum_of_lanes<scalar_t>(z_sum_);
    }
  }

 private:
  const scalar_t* add_noise(const scalar_t* logits, int64_t first, int64_t count) {
    if (in.drawn) {
      add_scaled(logits, normal_(in.seed, first, count), static_cast<scalar_t>(p.noise_std), count, rows_.data());
    } else {
      add_scaled(logits, in.noise + first, scalar_t(1), count, rows_.data());
    }
    return rows_.data();
  }

  static void add_scaled(
      const scalar_t* __restrict a, const scalar_t* __restrict b, scalar_t scale, int64_t count,
      scalar_t* __restrict sum) {
    for (int64_t i = 0; i < count; ++i) {
      sum[i] = a[i] + scale * b[i];
    }
  }

  // `count` tokens from `token` on, whose scores and logits are in `rows` and `clean_rows`.
  void choose(const scalar_t* rows, const scalar_t* clean_rows, int64_t token, int64_t count, int64_t* wanted) {
    Numbers* const scores = columns_[0];
    Numbers* const gates = columns_[1];
    Numbers* const clean = columns_[2];
    Numbers* const work = columns_[3];
    Integers valid;
    set_first_lanes<scalar_t>(count, valid);
    Integers* const key = reinterpret_cast<Integers*>(keys_.data());
    Integers* const index = key + choices_;
    columns_of_rows(rows, count, p.experts, scores);
    if (choices_ > 0) {
      with_top_k(choices_, [&](auto number) {
        largest_of_columns<scalar_t>(scores, p.experts, number, key, index);
        write_choices(reinterpret_cast<const LaneInteger<scalar_t>*>(index), token, count, number, wanted);
      });
    }

    const bool full = p.gate != Gate::top_k_softmax;  // gates are those of all experts
    if (full || p.losses & kGshard) {
      dense_gates(scores, gates);
      rows_of_columns(gates, count, p.experts, (full ? out.gates : out.softmax) + token * p.experts);
    }
    if (p.losses & kGshard) {
      add_up(gates, valid, kGateWithNoise);
    }
    if (!full) {
      write_chosen_gates(key, index, token, count);
    }
    if (p.losses & (kImportance | kLoad | kZ)) {
      const Numbers* logits = scores;
      if (noisy_) {
        columns_of_rows(clean_rows, count, p.experts, clean);
        logits = clean;
      }
      if (p.losses & kLoad) {
        Numbers threshold;
        OrderedLanes<scalar_t>::score(key[choices_ - 1], threshold);
        for (int64_t t = 0; t < count; ++t) {
          out.threshold[token + t] = threshold[t];
        }
        const scalar_t inverse = static_cast<scalar_t>(1 / p.noise_std);
        for (int64_t e = 0; e < p.experts; ++e) {
          work[e] = (threshold - logits[e]) * inverse;
        }
        scalar_t* const z = reinterpret_cast<scalar_t*>(work);
        scalar_t* const exponentials = reinterpret_cast<scalar_t*>(gates);
        normal_exponentials(z, p.experts * lanes, exponentials);
        chances_above(exponentials, p.experts * lanes, z);
        add_up(work, valid, kChance);
      }
      if (p.losses & (kImportance | kZ)) {
        add_clean(logits, work, valid);
      }
    }
  }

  void add_clean(const Numbers* logits, Numbers* work, const Integers& valid) {
    const bool sigmoid = p.gate == Gate::sigmoid;
    if (!sigmoid || p.losses & kZ) {
      LargestAndSum<scalar_t> of_logits;
      softmax_columns(logits, p.experts, work, of_logits);
      if (p.losses & kZ) {
        Numbers value;
        log_sum_exp(of_logits, value);
        z_sum_ += valid ? value * value : Numbers{};
      }
    }
    if (p.losses & kImportance) {
      if (sigmoid) {
        sigmoid_columns<scalar_t>(logits, p.experts, work);
      }
      add_up(work, valid, kGateWithoutNoise);
    }
  }

  void dense_gates(const Numbers* scores, Numbers* gates) {
    if (p.gate == Gate::sigmoid) {
      sigmoid_columns<scalar_t>(scores, p.experts, gates);
    } else {
      LargestAndSum<scalar_t> unused;
      softmax_columns(scores, p.experts, gates, unused);
    }
  }

  void add_up(const Numbers* values, const Integers& valid, SumOf which) {
    Numbers* const sum = sums_[which];
    for (int64_t e = 0; e < p.experts; ++e) {
      sum[e] += valid ? values[e] : Numbers{};
    }
  }

  template <typename Number>
  void write_choices(
      const LaneInteger<scalar_t>* index, int64_t token, int64_t count, Number number, int64_t* wanted) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < number; ++k) {
        const auto expert = index[k * lanes + t];
        ++wanted[k * p.experts + expert];
        if (p.top_k > 0) {
          out.choice[(token + t) * number + k] = static_cast<int32_t>(expert);
        }
      }
    }
  }

  // Softmax over the chosen scores; zero elsewhere.
  void write_chosen_gates(const Integers* key, const Integers* index, int64_t token, int64_t count) {
    Numbers* const weight = columns_[3];
    for (int64_t k = 0; k < choices_; ++k) {
      OrderedLanes<scalar_t>::score(key[k], weight[k]);
    }
    LargestAndSum<scalar_t> unused;
    softmax_columns(weight, choices_, weight, unused);
    scalar_t* const gates = out.gates + token * p.experts;
    std::fill(gates, gates + count * p.experts, scalar_t(0));
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < choices_; ++k) {
        gates[t * p.experts + index[k][t]] = weight[k][t];
      }
    }
  }

  const RouteProblem& p;
  const ForwardInputs<scalar_t>& in;
  const ForwardOutputs<scalar_t>& out;
  const int64_t choices_;
  const bool noisy_;
  std::vector<scalar_t> rows_;
  ColumnStore<scalar_t> columns_, sums_;
  std::vector<LaneInteger<scalar_t>> keys_;
  Numbers z_sum_;
  NormalNumbers<scalar_t> normal_;
};

}  // namespace
}  // namespace m2mkd
