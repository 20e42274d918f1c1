// CPU kernels of `route`; the maths is in m2mkd_fast/ops/route.py, what the ops take and return in ../route.h.
//
// Tokens are cut into chunks of a fixed size, so that the result does not depend on the number of threads. One pass
// over the chunks draws the noise, chooses, writes gates, and sums up what the losses need; it counts how often each
// chunk wants each expert. A scan turns counts into first rows, and a second pass gives every choice its row. The
// backward is one pass.

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../route.h"
#include "falling_order.h"
#include "instruction_set.h"
#include "normal_distribution.h"
#include "normal_numbers.h"
#include "softmax.h"
#include "token_columns.h"

namespace m2mkd {
namespace {

constexpr int64_t kChunk = 1024;  // tokens

int64_t chunks_of(int64_t tokens) {
  return (tokens + kChunk - 1) / kChunk;
}

// Calls run(number of the chunk, its group, its first token, one past its last) for every chunk of every group, in
// several threads. `cost`: elements touched for a token.
template <typename Run>
void for_chunks(int64_t groups, int64_t tokens, int64_t cost, const Run& run) {
  const int64_t chunks = chunks_of(tokens), grain = std::max<int64_t>(1, 16384 / (kChunk * cost));
  torch::stable::parallel_for(0, groups * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / chunks, first = i % chunks * kChunk;
      run(i, g, g * tokens + first, g * tokens + std::min(tokens, first + kChunk));
    }
  });
}

// Memory for some columns of `experts` each.
template <typename scalar_t>
class ColumnStore {
 public:
  ColumnStore(int64_t columns, int64_t experts)
      : experts_(experts), numbers_(columns * experts * kTokens<scalar_t>) {}
  Lanes<scalar_t>* operator[](int64_t i) {
    return reinterpret_cast<Lanes<scalar_t>*>(numbers_.data()) + i * experts_;
  }

 private:
  int64_t experts_;
  std::vector<scalar_t> numbers_;
};

// How many tokens are worked on at a time where rows are prepared: what stays in the first cache.
template <typename scalar_t>
int64_t tokens_of_block(int64_t experts) {
  constexpr int64_t lanes = kTokens<scalar_t>;
  return std::max(lanes, 1024 / experts / lanes * lanes);
}

// Vectors are handed on by reference: by value, callers of another instruction set would look for them elsewhere.

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

// sum = sum of value(e) over the experts; in parts, for the sake of rounding.
template <typename scalar_t, typename Value>
void sum_over_experts(int64_t experts, Lanes<scalar_t>& sum, const Value& value) {
  sum = Lanes<scalar_t>{};
  for (int64_t first = 0; first < experts; first += 16) {
    Lanes<scalar_t> part{};
    for (int64_t e = first; e < std::min(experts, first + 16); ++e) {
      value(e, part);
    }
    sum += part;
  }
}

// What a softmax came from: the largest score, and the sum of exp(score - largest).
template <typename scalar_t>
struct LargestAndSum {
  Lanes<scalar_t> largest, sum;
};

// Softmax over the experts; `out` may be `scores`.
template <typename scalar_t>
void softmax_columns(
    const Lanes<scalar_t>* scores, int64_t experts, Lanes<scalar_t>* out, LargestAndSum<scalar_t>& of) {
  Lanes<scalar_t> largest = scores[0], sum;
  for (int64_t e = 1; e < experts; ++e) {
    largest = scores[e] > largest ? scores[e] : largest;
  }
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = scores[e] - largest;
  }
  exp_of_nonpositive(reinterpret_cast<scalar_t*>(out), experts * kTokens<scalar_t>);
  sum_over_experts<scalar_t>(experts, sum, [&](int64_t e, Lanes<scalar_t>& part) { part += out[e]; });
  for (int64_t e = 0; e < experts; ++e) {
    out[e] /= sum;
  }
  of = {largest, sum};
}

template <typename scalar_t>
void sigmoid_columns(const Lanes<scalar_t>* scores, int64_t experts, Lanes<scalar_t>* out) {
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = scores[e] > 0 ? -scores[e] : scores[e];
  }
  exp_of_nonpositive(reinterpret_cast<scalar_t*>(out), experts * kTokens<scalar_t>);
  for (int64_t e = 0; e < experts; ++e) {
    out[e] = (scores[e] > 0 ? Lanes<scalar_t>{} + 1 : out[e]) / (1 + out[e]);
  }
}

template <typename scalar_t>
void log_sum_exp(const LargestAndSum<scalar_t>& of, Lanes<scalar_t>& out) {
  constexpr int lanes = kTokens<scalar_t>;
  scalar_t values[lanes];
  *reinterpret_cast<Lanes<scalar_t>*>(values) = of.sum;
  for (int i = 0; i < lanes; ++i) {
    values[i] = log_of_positive(values[i]);
  }
  out = of.largest + *reinterpret_cast<const Lanes<scalar_t>*>(values) + 0 * of.sum;  // keeps NaN
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

// A score as an integer in the same order, in which NaN is the largest and -0 equals 0; and back.
template <typename scalar_t>
struct OrderedLanes {
  using Integer = LaneInteger<scalar_t>;
  using Integers = IntegerLanes<scalar_t>;
  static constexpr Integer kLargest = std::numeric_limits<Integer>::max();

  static void of_score(const Lanes<scalar_t>& score, Integers& key) {
    const Lanes<scalar_t> positive_zero = score + 0;
    const Integers bits = *reinterpret_cast<const Integers*>(&positive_zero);
    key = score == score ? bits ^ ((bits >> (8 * sizeof(Integer) - 1)) & kLargest) : Integers{} + kLargest;
  }
  static void score(const Integers& key, Lanes<scalar_t>& score) {
    *reinterpret_cast<Integers*>(&score) = key ^ ((key >> (8 * sizeof(Integer) - 1)) & kLargest);
  }
};

template <typename Vector>
bool any(const Vector& mask) {
  typename VectorOf<int64_t>::type words = *reinterpret_cast<const typename VectorOf<int64_t>::type*>(&mask);
  return words[0] | words[1] | words[2] | words[3];
}

// key[k], index[k] = the k-th largest score and its expert, the lower index first among equals.
template <typename scalar_t, typename Number>
void largest_of_columns(
    const Lanes<scalar_t>* scores, int64_t experts, Number top_k, IntegerLanes<scalar_t>* key,
    IntegerLanes<scalar_t>* index) {
  constexpr int64_t few = 2;  // stay in registers
  IntegerLanes<scalar_t> best[few], best_index[few] = {};
  constexpr auto lowest = std::numeric_limits<LaneInteger<scalar_t>>::min();
  constexpr bool is_few = !std::is_same_v<Number, int64_t>;
  IntegerLanes<scalar_t>* const keys = is_few ? best : key;
  IntegerLanes<scalar_t>* const indices = is_few ? best_index : index;
  for (int64_t k = 0; k < top_k; ++k) {
    keys[k] = IntegerLanes<scalar_t>{} + lowest;
    indices[k] = IntegerLanes<scalar_t>{};
  }
  for (int64_t e = 0; e < experts; ++e) {
    IntegerLanes<scalar_t> score;
    OrderedLanes<scalar_t>::of_score(scores[e], score);
    if (!is_few && !any(score > keys[top_k - 1])) {
      continue;
    }
    IntegerLanes<scalar_t> moved = score;
    IntegerLanes<scalar_t> moved_index = IntegerLanes<scalar_t>{} + static_cast<LaneInteger<scalar_t>>(e);
    for (int64_t k = 0; k < top_k; ++k) {
      const IntegerLanes<scalar_t> above = score > keys[k];  // from here on, every choice makes room
      const IntegerLanes<scalar_t> key_out = keys[k], index_out = indices[k];
      keys[k] = above ? moved : key_out;
      indices[k] = above ? moved_index : index_out;
      moved = above ? key_out : moved;
      moved_index = above ? index_out : moved_index;
    }
  }
  if constexpr (is_few) {
    for (int64_t k = 0; k < top_k; ++k) {
      key[k] = keys[k];
      index[k] = indices[k];
    }
  }
}

// Calls run with the number of choices, as a constant of the compiler for the usual ones.
template <typename Run>
void with_top_k(int64_t top_k, const Run& run) {
  switch (top_k) {
    case 1:
      return run(std::integral_constant<int64_t, 1>{});
    case 2:
      return run(std::integral_constant<int64_t, 2>{});
    default:
      return run(top_k);
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

// What a chunk adds to its group's losses, for each expert; and z.
enum SumOf : int64_t { kGateWithoutNoise, kChance, kGateWithNoise, kSums };

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

// Where a token's row goes: of each group and expert, the first row and one past the last.
struct Rows {
  std::vector<int64_t> first, end;  // [G, E]
  std::vector<int64_t> offsets;     // [E + 1]

  // `wanted` [G, E]: how many choices.
  Rows(const RouteProblem& p, const std::vector<int64_t>& wanted)
      : first(p.groups * p.experts), end(p.groups * p.experts), offsets(p.experts + 1) {
    int64_t used = 0;
    for (int64_t e = 0; e < p.experts; ++e) {
      offsets[e] = used;
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t pair = g * p.experts + e;
        first[pair] = used;
        used += std::min(wanted[pair], p.capacity);
        end[pair] = used;
      }
    }
    offsets[p.experts] = used;
  }
};

// The rows begin .. end - 1: their experts, and all of the rows that stand for dropped choices.
template <typename scalar_t>
void fill_rows(
    const RouteProblem& p, const std::vector<int64_t>& offsets, int64_t begin, int64_t end, int64_t* out_token,
    int64_t* out_expert, scalar_t* out_weight) {
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t from = std::max(begin, offsets[e]), to = std::min(end, offsets[e + 1]);
    if (from < to) {
      std::fill(out_expert + from, out_expert + to, e);
    }
  }
  const int64_t tail = std::max(begin, offsets[p.experts]);
  if (tail < end) {
    std::fill(out_token + tail, out_token + end, 0);
    std::fill(out_expert + tail, out_expert + end, p.experts - 1);
    std::fill(out_weight + tail, out_weight + end, scalar_t(0));
  }
}

template <typename scalar_t>
void tokens_choose(
    const RouteProblem& p, std::vector<int64_t>& wanted, const scalar_t* gates, const int32_t* choice,
    const RouteOutputs& out) {
  // Choices of `wanted` [chunk, K, E] become the slot of the first of them: all first choices of a group before its
  // second ones.
  const int64_t chunks = chunks_of(p.tokens), per_chunk = p.top_k * p.experts;
  std::vector<int64_t> total(p.groups * p.experts);
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t k = 0; k < p.top_k; ++k) {
      for (int64_t chunk = g * chunks; chunk < (g + 1) * chunks; ++chunk) {
        int64_t* slot = wanted.data() + chunk * per_chunk + k * p.experts;
        for (int64_t e = 0; e < p.experts; ++e) {
          total[g * p.experts + e] += std::exchange(slot[e], total[g * p.experts + e]);
        }
      }
    }
  }
  const Rows rows(p, total);
  std::copy(rows.offsets.begin(), rows.offsets.end(), out.offsets.mutable_data_ptr<int64_t>());

  int64_t* out_token = out.token.mutable_data_ptr<int64_t>();
  int64_t* out_expert = out.expert.mutable_data_ptr<int64_t>();
  int64_t* place = out.place.mutable_data_ptr<int64_t>();
  scalar_t* out_weight = out.weight.mutable_data_ptr<scalar_t>();
  // Gives the tokens token_at(begin), ..., token_at(end - 1) their rows. next[k, e]: the next row of expert e that goes
  // to a k-th choice.
  const auto place_tokens = [&](int64_t g, const int64_t* slots, int64_t begin, int64_t end, const auto& token_at) {
    std::vector<int64_t> next(slots, slots + per_chunk);
    const int64_t* last = rows.end.data() + g * p.experts;
    for (int64_t i = 0; i < per_chunk; ++i) {
      next[i] += rows.first[g * p.experts + i % p.experts];
    }
    with_top_k(p.top_k, [&](auto top_k) {
      for (int64_t position = begin; position < end; ++position) {
        const int64_t token = token_at(position);
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t expert = choice[token * top_k + k], row = next[k * p.experts + expert]++;
          const bool kept = row < last[expert];
          place[token * top_k + k] = kept ? row : -1;
          if (kept) {
            out_token[row] = token;
            out_weight[row] = gates[token * p.experts + expert];
          }
        }
      }
    });
  };
  if (p.batch_priority) {
    torch::stable::parallel_for(0, p.tokens == 0 ? 0 : p.groups, 1, [&](int64_t group_begin, int64_t group_end) {
      FallingOrder<scalar_t> falling_order;
      for (int64_t g = group_begin; g < group_end; ++g) {
        const int64_t first = g * p.tokens;
        const auto& order = falling_order(p.tokens, p.tokens, [&](int64_t s) {
          return gates[(first + s) * p.experts + choice[(first + s) * p.top_k]];
        });
        place_tokens(g, wanted.data() + g * chunks * per_chunk, 0, p.tokens, [&](int64_t position) {
          return first + order[position];
        });
        const int64_t part = p.tokens * p.top_k;
        fill_rows(p, rows.offsets, g * part, (g + 1) * part, out_token, out_expert, out_weight);
      }
    });
    return;
  }
  for_chunks(p.groups, p.tokens, p.top_k, [&](int64_t i, int64_t g, int64_t begin, int64_t end) {
    place_tokens(g, wanted.data() + i * per_chunk, begin, end, [](int64_t position) { return position; });
    fill_rows(p, rows.offsets, begin * p.top_k, end * p.top_k, out_token, out_expert, out_weight);
  });
}

template <typename scalar_t>
void experts_choose(const RouteProblem& p, const scalar_t* gates, const RouteOutputs& out) {
  int64_t* out_token = out.token.mutable_data_ptr<int64_t>();
  int64_t* out_expert = out.expert.mutable_data_ptr<int64_t>();
  int64_t* place = out.place.mutable_data_ptr<int64_t>();
  scalar_t* out_weight = out.weight.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, p.groups, 1, [&](int64_t begin, int64_t end) {
    FallingOrder<scalar_t> falling_order;
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first_token = g * p.tokens;
      std::fill(place + first_token * p.experts, place + (first_token + p.tokens) * p.experts, -1);
      for (int64_t e = 0; e < p.experts; ++e) {
        const scalar_t* gate = gates + first_token * p.experts + e;
        const auto& best = falling_order(p.tokens, p.capacity, [&](int64_t s) { return gate[s * p.experts]; });
        const int64_t first_row = (e * p.groups + g) * p.capacity;
        for (int64_t slot = 0; slot < p.capacity; ++slot) {
          const int64_t token = first_token + best[slot], row = first_row + slot;
          out_token[row] = token;
          out_expert[row] = e;
          out_weight[row] = gates[token * p.experts + e];
          place[token * p.experts + e] = row;
        }
      }
    }
  });
  int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e <= p.experts; ++e) {
    offsets[e] = e * p.groups * p.capacity;
  }
}

template <typename scalar_t>
void forward(
    const RouteProblem& p, const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed,
    const RouteOutputs& out) {
  const ForwardInputs<scalar_t> inputs{
      logits.const_data_ptr<scalar_t>(),
      noise.has_value() ? noise->const_data_ptr<scalar_t>() : nullptr,
      seed.has_value(),
      seed.has_value() ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0,
  };
  const ForwardOutputs<scalar_t> outputs{
      out.gates.mutable_data_ptr<scalar_t>(),
      out.threshold.mutable_data_ptr<scalar_t>(),
      out.softmax.mutable_data_ptr<scalar_t>(),
      out.choice.mutable_data_ptr<int32_t>(),
  };
  const int64_t chunks = p.groups * chunks_of(p.tokens), choices = Chooser<scalar_t>::choices(p);
  const int64_t per_chunk = choices * p.experts, width = kSums * p.experts + 1;
  std::vector<int64_t> wanted(chunks * per_chunk);
  std::vector<scalar_t> sums(p.losses ? chunks * width : 0);
  for_chunks(p.groups, p.tokens, 4 * p.experts, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
    Chooser<scalar_t> chooser(p, inputs, outputs);
    with_best_instructions([&] {
      chooser(begin, end, wanted.data() + i * per_chunk, p.losses ? sums.data() + i * width : nullptr);
    });
  });
  std::vector<int64_t> first_choices(p.losses & kGshard ? p.groups * p.experts : 0);
  if (p.losses & kGshard) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t e = 0; e < p.experts; ++e) {
        first_choices[chunk / chunks_of(p.tokens) * p.experts + e] += wanted[chunk * per_chunk + e];
      }
    }
  }
  finish_losses(p, sums, first_choices, out);
  p.gate == Gate::experts_choose ? experts_choose<scalar_t>(p, outputs.gates, out)
                                 : tokens_choose<scalar_t>(p, wanted, outputs.gates, outputs.choice, out);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_forward(
    const Tensor& logits, std::optional<Tensor> noise, std::optional<Tensor> seed, double noise_std, int64_t top_k,
    std::string gate, std::optional<int64_t> capacity, bool batch_priority, int64_t losses) {
  const RouteProblem problem =
      route_problem(logits, noise, seed, noise_std, top_k, gate, capacity, batch_priority, losses);
  const RouteOutputs out = empty_outputs(logits, problem);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const std::optional<Tensor> dense_noise = dense(noise);
  logits.scalar_type() == ScalarType::Float ? forward<float>(problem, dense_logits, dense_noise, seed, out)
                                            : forward<double>(problem, dense_logits, dense_noise, seed, out);
  return {out.token,  out.expert, out.weight,    out.offsets, out.place,  out.gates,
          out.losses, out.choice, out.threshold, out.slopes,  out.softmax};
}

template <typename scalar_t>
struct BackwardInputs {
  const scalar_t *grad_weight, *grad_gates, *grad_losses;  // null where there is none
  const scalar_t *logits, *gates, *threshold, *slopes, *softmax;
  const int64_t* place;
  const int32_t* choice;
  int64_t groups, tokens, experts, top_k, losses;
  double noise_std;
  Gate gate;
};

// One chunk of tokens of one group at a time.
template <typename scalar_t>
class Differentiator {
  static constexpr int lanes = kTokens<scalar_t>;
  using Numbers = Lanes<scalar_t>;

 public:
  Differentiator(const BackwardInputs<scalar_t>& inputs, int64_t group, scalar_t* grad_logits, scalar_t* grad_noise)
      : in(inputs),
        grad_logits_(grad_logits),
        grad_noise_(grad_noise),
        rows_(tokens_of_block<scalar_t>(in.experts) * in.experts),
        columns_(5, in.experts),
        slopes_(3 * in.experts) {
    if (in.losses & (kImportance | kLoad | kGshard)) {
      for (int64_t loss = 0; loss < 3; ++loss) {
        const scalar_t grad = in.grad_losses[loss * in.groups + group];
        for (int64_t e = 0; e < in.experts; ++e) {
          slopes_[loss * in.experts + e] = grad * in.slopes[(loss * in.groups + group) * in.experts + e];
        }
      }
    }
    if (in.losses & kZ) {
      z_slope_ = 2 * in.grad_losses[3 * in.groups + group] / static_cast<scalar_t>(in.tokens);
    }
  }

  void operator()(int64_t first, int64_t end) {
    const int64_t block = tokens_of_block<scalar_t>(in.experts);
    for (int64_t token = first; token < end; token += block) {
      const int64_t count = std::min(block, end - token);
      gather_gradients(token, count);
      for (int64_t t = 0; t < count; t += lanes) {
        differentiate(rows_.data() + t * in.experts, token + t, std::min<int64_t>(lanes, count - t));
      }
    }
  }

 private:
  // rows_ = gradient of the gates.
  void gather_gradients(int64_t token, int64_t count) {
    const int64_t experts = in.experts;
    scalar_t* const grad = rows_.data();
    if (in.grad_gates != nullptr) {
      std::copy_n(in.grad_gates + token * experts, count * experts, grad);
    } else {
      std::fill_n(grad, count * experts, scalar_t(0));
    }
    if (in.losses & kGshard && in.gate != Gate::top_k_softmax) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t e = 0; e < experts; ++e) {
          grad[t * experts + e] += slopes_[2 * experts + e];
        }
      }
    }
    if (in.grad_weight == nullptr) {
      return;
    }
    if (in.gate == Gate::experts_choose) {
      const int64_t* place = in.place + token * experts;
      for (int64_t i = 0; i < count * experts; ++i) {
        grad[i] += place[i] < 0 ? scalar_t(0) : in.grad_weight[place[i]];
      }
      return;
    }
    const int64_t* place = in.place + token * in.top_k;
    const int32_t* choice = in.choice + token * in.top_k;
    with_top_k(in.top_k, [&](auto top_k) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t row = place[t * top_k + k];
          grad[t * experts + choice[t * top_k + k]] += row < 0 ? scalar_t(0) : in.grad_weight[row];
        }
      }
    });
  }

  void differentiate(const scalar_t* rows, int64_t token, int64_t count) {
    const int64_t experts = in.experts, first = token * experts;
    Numbers* const grad = columns_[0];   // of the gates, then of the scores
    Numbers* const gates = columns_[1];
    Numbers* const logits = columns_[2];
    Numbers* const clean = columns_[3];
    Numbers* const direct = columns_[4];  // gradient of the logits that the noise does not share
    columns_of_rows(rows, count, experts, grad);
    columns_of_rows(in.gates + first, count, experts, gates);
    if (in.gate == Gate::sigmoid) {
      for (int64_t e = 0; e < experts; ++e) {
        grad[e] *= gates[e] * (1 - gates[e]);
      }
    } else {
      Numbers mean;
      sum_over_experts<scalar_t>(experts, mean, [&](int64_t e, Numbers& part) { part += grad[e] * gates[e]; });
      for (int64_t e = 0; e < experts; ++e) {
        grad[e] = gates[e] * (grad[e] - mean);
      }
    }
    if (in.losses & kGshard && in.gate == Gate::top_k_softmax) {
      columns_of_rows(in.softmax + first, count, experts, gates);
      add_softmax_gradient(gates, slopes_.data() + 2 * experts, grad);
    }
    const bool has_direct = in.losses & (kImportance | kLoad | kZ);
    if (has_direct) {
      columns_of_rows(in.logits + first, count, experts, logits);
      std::fill_n(direct, experts, Numbers{});
      if (in.losses & kLoad) {
        add_load_gradient(logits, token, count, clean, direct, grad);
      }
      if (in.losses & (kImportance | kZ)) {
        add_clean_gradient(logits, clean, direct);
      }
    }
    if (grad_noise_ != nullptr) {
      rows_of_columns(grad, count, experts, grad_noise_ + first);
    }
    if (has_direct) {
      for (int64_t e = 0; e < experts; ++e) {
        grad[e] += direct[e];
      }
    }
    rows_of_columns(grad, count, experts, grad_logits_ + first);
  }

  // grad += softmax (slope - sum softmax slope)
  void add_softmax_gradient(const Numbers* softmax, const scalar_t* slope, Numbers* grad) {
    Numbers mean;
    sum_over_experts<scalar_t>(in.experts, mean, [&](int64_t e, Numbers& part) { part += softmax[e] * slope[e]; });
    for (int64_t e = 0; e < in.experts; ++e) {
      grad[e] += softmax[e] * (slope[e] - mean);
    }
  }

  void add_load_gradient(
      const Numbers* logits, int64_t token, int64_t count, Numbers* work, Numbers* direct, Numbers* grad) {
    const int64_t experts = in.experts;
    constexpr scalar_t kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)
    const scalar_t inverse = static_cast<scalar_t>(1 / in.noise_std);
    Numbers threshold{}, total{};
    for (int64_t t = 0; t < count; ++t) {
      threshold[t] = in.threshold[token + t];
    }
    for (int64_t e = 0; e < experts; ++e) {
      const Numbers z = (threshold - logits[e]) * inverse;
      work[e] = scalar_t(-0.5) * z * z;
    }
    exp_of_nonpositive(reinterpret_cast<scalar_t*>(work), experts * lanes);
    for (int64_t e = 0; e < experts; ++e) {
      const Numbers part = work[e] * (slopes_[experts + e] * kDensity * inverse);
      direct[e] += part;
      total += part;
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t last = in.choice[(token + t) * in.top_k + in.top_k - 1];
      grad[last][t] -= total[t];
    }
  }

  void add_clean_gradient(const Numbers* logits, Numbers* clean, Numbers* direct) {
    const scalar_t* slope = slopes_.data();
    const bool sigmoid = in.gate == Gate::sigmoid;
    if (!sigmoid || in.losses & kZ) {
      LargestAndSum<scalar_t> of_logits;
      softmax_columns(logits, in.experts, clean, of_logits);
      if (in.losses & kZ) {
        Numbers factor;
        log_sum_exp(of_logits, factor);
        factor *= z_slope_;
        for (int64_t e = 0; e < in.experts; ++e) {
          direct[e] += factor * clean[e];
        }
      }
      if (!sigmoid && in.losses & kImportance) {
        add_softmax_gradient(clean, slope, direct);
      }
    }
    if (sigmoid && in.losses & kImportance) {
      sigmoid_columns<scalar_t>(logits, in.experts, clean);
      for (int64_t e = 0; e < in.experts; ++e) {
        direct[e] += clean[e] * (1 - clean[e]) * slope[e];
      }
    }
  }

  const BackwardInputs<scalar_t>& in;
  scalar_t *const grad_logits_, *const grad_noise_;
  std::vector<scalar_t> rows_;
  ColumnStore<scalar_t> columns_;
  std::vector<scalar_t> slopes_;  // times the gradients of the losses
  scalar_t z_slope_ = 0;
};

std::tuple<Tensor, Tensor> route_backward(
    std::optional<Tensor> grad_weight, std::optional<Tensor> grad_gates, std::optional<Tensor> grad_losses,
    const Tensor& logits, const Tensor& gates, const Tensor& place, const Tensor& choice, const Tensor& threshold,
    const Tensor& slopes, const Tensor& softmax, double noise_std, std::string gate_name, int64_t losses,
    bool need_noise) {
  const Gate gate = gate_of(gate_name);
  losses = grad_losses.has_value() ? losses : 0;
  check_saved(logits, gates, place, choice, threshold, slopes, softmax, gate, losses);
  const std::optional<Tensor> dense_weight = dense(grad_weight), dense_gates = dense(grad_gates);
  const std::optional<Tensor> dense_losses = dense(grad_losses);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  const Tensor grad_logits = torch::stable::new_empty(gates, gates.sizes());
  const Tensor grad_noise = need_noise ? torch::stable::new_empty(gates, gates.sizes())
                                       : torch::stable::new_empty(gates, {0});
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto data = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
    };
    const BackwardInputs<scalar_t> inputs{
        data(dense_weight),
        data(dense_gates),
        data(dense_losses),
        dense_logits.const_data_ptr<scalar_t>(),
        gates.const_data_ptr<scalar_t>(),
        threshold.const_data_ptr<scalar_t>(),
        slopes.const_data_ptr<scalar_t>(),
        softmax.const_data_ptr<scalar_t>(),
        place.const_data_ptr<int64_t>(),
        choice.const_data_ptr<int32_t>(),
        gates.size(0),
        gates.size(1),
        gates.size(2),
        choice.size(1),
        losses,
        noise_std,
        gate,
    };
    scalar_t* const out = grad_logits.mutable_data_ptr<scalar_t>();
    scalar_t* const out_noise = need_noise ? grad_noise.mutable_data_ptr<scalar_t>() : nullptr;
    for_chunks(gates.size(0), gates.size(1), 4 * gates.size(2), [&](int64_t, int64_t g, int64_t begin, int64_t end) {
      Differentiator<scalar_t> differentiator(inputs, g, out, out_noise);
      with_best_instructions([&] { differentiator(begin, end); });
    });
  };
  gates.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  return {grad_logits, grad_noise};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_route_forward", TORCH_BOX(&m2mkd::route_forward));
  m.impl("_route_backward", TORCH_BOX(&m2mkd::route_backward));
}
