// The backward pass of `expert_mlp`: in a round, two products with transposed weights, between them hidden units again
// from the pre-activation, and two sums over tokens, the gradients of the weights.
//
// Apart from the forward pass, which needs neither these sums nor the turned panels that they read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "activation.h"
#include "expert_mlp_panels.h"
#include "expert_mlp_problem.h"
#include "expert_mlp_rounds.h"
#include "half.h"
#include "instruction_set.h"
#include "packed_product.h"
#include "row_products.h"

namespace m2mkd {
namespace {

template <typename stored_t>
struct Gradients {
  stored_t *x, *up_weight, *up_bias, *down_weight, *down_bias;  // null where not needed
  Tensor weight;
  bool parameters;  // whether theirs are; without elements they have no place in memory either
};

// A weight's gradient, sums over the tokens of a segment: gradient[e][r][c] = sum_n left[r][n] right[n][c], and of the
// bias sum_n left[r][n] scale[n], where `scales` gives the panel's [kPanel]. `partial` holds the sums so far of an expert
// in several rounds.
template <typename stored_t, typename scalar_t, typename Scales>
void multiply_tokens(
    const Round& round, const Panels<scalar_t>& left, const TurnedPanels<scalar_t>& right, int64_t rows, int64_t columns,
    const Scales& scales, scalar_t* partial, scalar_t* partial_bias, stored_t* gradient, stored_t* bias) {
  constexpr int64_t lanes = kLanes<scalar_t>, width = kPanel<scalar_t>;
  const Blocks blocks(rows, kRowsOfBlock);
  const auto segments = static_cast<int64_t>(round.segments.size());
  const double work = static_cast<double>(rows) * columns * round.panels * width;
  divide(blocks.count * segments, work, [&](int64_t, int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t unit = begin; unit < end; ++unit) {
        const Segment& segment = round.segments[unit % segments];
        const int64_t first = unit / segments * blocks.size, stop = std::min(rows, first + blocks.size);
        stored_t* out = gradient + segment.expert * rows * columns;
        for (int64_t c = 0; c < columns; c += width) {
          for (int64_t r = first; r < stop; r += kTileRows) {
            Vector<scalar_t> sum[kTileRows][2];
            multiply_panels_of_tokens(
                left.of(segment.panel) + r * width, left.step, right.of(c, segment.panel), segment.panels, sum);
            const auto store = [&](auto number) {
#pragma GCC unroll 8
              for (int64_t i = 0; i < kTileRows; ++i) {
                if (r + i >= stop) {
                  break;
                }
                scalar_t numbers[width];
                vector_at(numbers) = sum[i][0];
                vector_at(numbers + lanes) = sum[i][1];
                scalar_t* so_far = partial + (r + i) * columns + c;
                for (int64_t k = 0; !segment.first && k < number; ++k) {
                  numbers[k] += so_far[k];
                }
                if (!segment.last) {
                  std::copy(numbers, numbers + number, so_far);
                  continue;
                }
                for (int64_t k = 0; k < number; ++k) {
                  round_to(numbers[k], out[(r + i) * columns + c + k]);
                }
              }
            };
            columns - c >= width ? store(std::integral_constant<int64_t, width>{}) : store(columns - c);
          }
        }
        for (int64_t r = first; bias != nullptr && r < stop; ++r) {
          scalar_t sums[width] = {};
          for (int64_t p = 0; p < segment.panels; ++p) {
            const scalar_t* row = left.of(segment.panel + p) + r * width;
            const scalar_t* scale = scales(segment.panel + p);
            for (int64_t lane = 0; lane < width; ++lane) {
              sums[lane] += row[lane] * scale[lane];
            }
          }
          scalar_t total = segment.first ? scalar_t(0) : partial_bias[r];
          for (int64_t lane = 0; lane < width; ++lane) {
            total += sums[lane];
          }
          if (segment.last) {
            round_to(total, bias[segment.expert * rows + r]);
          } else {
            partial_bias[r] = total;
          }
        }
      }
    });
  });
}

template <typename stored_t>
void backward(
    const Problem& problem, const stored_t* grad_out, const stored_t* preactivation,
    const Gradients<stored_t>& gradients) {
  using scalar_t = Compute<stored_t>;
  constexpr int64_t lanes = kPanel<scalar_t>;
  const std::vector<Round> rounds = rounds_of(problem, lanes);
  const int64_t panels = most_panels(rounds), hidden = problem.hidden, made = problem.made;
  const bool parameters = gradients.parameters;
  const bool spread =
      std::any_of(rounds.begin(), rounds.end(), [](const Round& round) { return !round.segments.front().last; });
  const int64_t row_groups = (hidden + kGroup - 1) / kGroup;
  // Gradients of outputs before the weights, of what the first layer made, and of gathered inputs.
  const Panels<scalar_t> grad_outputs(panels, problem.out), grad_made(panels, made);
  const Buffer<scalar_t> grad_rows(gradients.x == nullptr ? 1 : std::max<int64_t>(1, problem.rows * problem.width));
  const TurnedPanels<scalar_t> inputs(parameters ? panels : 0, problem.width), hiddens(parameters ? panels : 0, hidden);
  const Buffer<scalar_t> partial(spread && parameters ? problem.out * hidden : 1);
  const Buffer<scalar_t> up_partial(spread && parameters ? made * problem.width : 1);
  const Buffer<scalar_t> bias_partial(std::max<int64_t>(1, problem.out)), up_bias_partial(std::max<int64_t>(1, made));
  // What each group of hidden units adds to the gradient of the weight, and last what the bias adds: one row each.
  const Buffer<scalar_t> weight_parts(std::max<int64_t>(1, (row_groups + 1) * problem.rows));
  const std::vector<scalar_t> weights = weights_of<scalar_t>(problem);
  const Buffer<scalar_t> panel_weights(std::max<int64_t>(1, panels * lanes));  // zero where panels have no row
  const Desks<scalar_t> desks(panels);
  const stored_t* x = Problem::of<stored_t>(problem.x);
  const int64_t* token = Problem::of<int64_t>(problem.token);
  const stored_t* down_bias = Problem::of<stored_t>(problem.down_bias);
  const std::vector<scalar_t> ones(lanes, scalar_t(1));

  for (const Round& round : rounds) {
    const double work = 16.0 * round.panels * lanes * (problem.width + problem.out);
    for_each_panel(round, work, [&](const Segment& segment, int64_t p, int64_t i) {
      const int64_t row = segment.row + p * lanes, some = segment.template rows_of<scalar_t>(p);
      scalar_t* grads = grad_outputs.of(i);
      gather_panel(grad_out, token + row, some, problem.out, grads);
      drop_outputs(problem, row, 0, problem.out, grads);
      scalar_t sums[lanes] = {};
      for (int64_t o = 0; down_bias != nullptr && o < problem.out; ++o) {
        const scalar_t number = widened(down_bias[segment.expert * problem.out + o]);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          sums[lane] += number * grads[o * lanes + lane];
        }
      }
      std::copy(sums, sums + some, weight_parts.data() + row_groups * problem.rows + row);
      scalar_t* weight = panel_weights.data() + i * lanes;
      std::fill(std::copy_n(weights.data() + row, some, weight), weight + lanes, scalar_t(0));
      if (parameters) {
        gather_turned(x, token + row, some, problem.width, inputs, i);
      }
    });

    const auto differentiate = [&](const Segment& segment, int64_t p, int64_t first, int64_t some, scalar_t* tile) {
      const int64_t panel = segment.panel + p, row = segment.row + p * lanes;
      const scalar_t* weight = panel_weights.data() + panel * lanes;
      scalar_t values[kGroup * lanes], gates[kGroup * lanes], slopes[kGroup * lanes];
      scalar_t made_gates[kGroup * lanes], units[kGroup * lanes], factors[kGroup * lanes];
      for (int64_t group = 0; group < some; group += kGroup) {
        const int64_t unit = first + group, number = std::min(kGroup, some - group), count = number * lanes;
        scalar_t* __restrict grad = tile + group * lanes;  // of hidden units, before the weights
        const stored_t* __restrict kept = preactivation + ((segment.kept + p) * made + unit) * lanes;
        const stored_t* __restrict kept_gates = kept + problem.gated * hidden * lanes;
        scalar_t* __restrict grad_values = grad_made.of(panel) + unit * lanes;
        scalar_t* __restrict grad_gates = grad_values + problem.gated * hidden * lanes;
        for (int64_t i = 0; i < count; ++i) {
          values[i] = widened(kept[i]);
          made_gates[i] = widened(kept_gates[i]);
        }
        activate(problem.phi, made_gates, count, gates, slopes);
        for (int64_t i = 0; i < count; ++i) {
          units[i] = problem.gated ? values[i] * gates[i] : gates[i];
        }
        if (problem.hidden_dropout.active()) {
          problem.hidden_dropout.factors(row, unit, number, factors);
          drop(factors, count, units);
        }
        scalar_t sums[lanes] = {};
        for (int64_t r = 0; r < number; ++r) {
          for (int64_t lane = 0; lane < lanes; ++lane) {
            sums[lane] += grad[r * lanes + lane] * units[r * lanes + lane];
          }
        }
        const int64_t rows = segment.template rows_of<scalar_t>(p);
        std::copy(sums, sums + rows, weight_parts.data() + unit / kGroup * problem.rows + row);
        if (problem.hidden_dropout.active()) {
          drop(factors, count, grad);
        }
        for (int64_t r = 0; r < number; ++r) {
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t i = r * lanes + lane;
            const scalar_t weighted = weight[lane] * grad[i];
            grad_gates[i] = (problem.gated ? weighted * values[i] : weighted) * slopes[i];
            units[i] *= weight[lane];
          }
        }
        for (int64_t i = 0; problem.gated && i < count; ++i) {
          grad_values[i] = weight[i % lanes] * grad[i] * gates[i];
        }
        if (!parameters) {
          continue;
        }
        for (int64_t part = 0; part < number; part += lanes) {
          scalar_t* __restrict turned = hiddens.of(unit + part, panel);
          for (int64_t r = 0; r < std::min(lanes, number - part); ++r) {
            for (int64_t lane = 0; lane < lanes; ++lane) {
              turned[lane * lanes + r] = units[(part + r) * lanes + lane];
            }
          }
        }
      }
    };
    multiply_experts<Columns>(
        round, Problem::of<stored_t>(problem.down_weight), problem.out * hidden, hidden, 1, hidden, problem.out,
        grad_outputs, desks, differentiate);

    if (gradients.x != nullptr) {
      multiply_experts<Columns>(
          round, Problem::of<stored_t>(problem.up_weight), made * problem.width, problem.width, 1, problem.width, made,
          grad_made, desks, [&](const Segment& segment, int64_t p, int64_t first, int64_t some, scalar_t* tile) {
            store_rows(
                tile, segment.row + p * lanes, segment.template rows_of<scalar_t>(p), first, some, problem.width,
                grad_rows.data(), ones.data());
          });
    }
    if (parameters) {
      multiply_tokens(
          round, grad_outputs, hiddens, problem.out, hidden, [&](int64_t i) { return panel_weights.data() + i * lanes; },
          partial.data(), bias_partial.data(), gradients.down_weight, gradients.down_bias);
      multiply_tokens(
          round, grad_made, inputs, made, problem.width, [&](int64_t) { return ones.data(); }, up_partial.data(),
          up_bias_partial.data(), gradients.up_weight, gradients.up_bias);
    }
  }
  if (gradients.x != nullptr) {
    combine(problem, grad_rows.data(), problem.width, gradients.x);
  }
  std::vector<scalar_t> sums(weights.size());
  for (int64_t group = 0; group <= row_groups; ++group) {
    for (size_t row = 0; row < sums.size(); ++row) {
      sums[row] += weight_parts[group * problem.rows + row];
    }
  }
  const auto store = [&](auto* grad_weight) {
    std::fill(std::copy(sums.begin(), sums.end(), grad_weight), grad_weight + problem.rows, 0);
  };
  gradients.weight.scalar_type() == ScalarType::Double ? store(gradients.weight.template mutable_data_ptr<double>())
                                                       : store(gradients.weight.template mutable_data_ptr<float>());
}

}  // namespace
}  // namespace m2mkd
