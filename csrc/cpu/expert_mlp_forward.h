// The forward pass of `expert_mlp`: two products a round, with the activation between them.
//
// Apart from the backward pass, with which it shares the steps in expert_mlp_panels.h and the layout of the
// pre-activation that it keeps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activation.h"
#include "expert_mlp_panels.h"
#include "expert_mlp_problem.h"
#include "expert_mlp_rounds.h"
#include "half.h"
#include "packed_product.h"
#include "row_products.h"

namespace m2mkd {
namespace {

template <typename stored_t, typename scalar_t>
void add_bias(const stored_t* bias, int64_t rows, scalar_t* tile) {
  for (int64_t r = 0; bias != nullptr && r < rows; ++r) {
    const scalar_t number = widened(bias[r]);
    for (int64_t lane = 0; lane < kPanel<scalar_t>; ++lane) {
      tile[r * kPanel<scalar_t> + lane] += number;
    }
  }
}

template <typename stored_t>
void forward(const Problem& problem, stored_t* out, stored_t* preactivation) {
  using scalar_t = Compute<stored_t>;
  constexpr int64_t lanes = kPanel<scalar_t>;
  const std::vector<Round> rounds = rounds_of(problem, lanes);
  const int64_t panels = most_panels(rounds), hidden = problem.hidden, made = problem.made;
  const Panels<scalar_t> inputs(panels, problem.width), hiddens(panels, hidden);
  const Buffer<scalar_t> rows(std::max<int64_t>(1, problem.rows * problem.out));
  const Desks<scalar_t> desks(panels);
  const std::vector<scalar_t> weights = weights_of<scalar_t>(problem);
  const stored_t* x = Problem::of<stored_t>(problem.x);
  const int64_t* token = Problem::of<int64_t>(problem.token);
  const stored_t *up_bias = Problem::of<stored_t>(problem.up_bias), *down_bias = Problem::of<stored_t>(problem.down_bias);

  for (const Round& round : rounds) {
    for_each_panel(round, 16.0 * round.panels * lanes * problem.width, [&](const Segment& segment, int64_t p, int64_t i) {
      gather_panel(
          x, token + segment.row + p * lanes, segment.template rows_of<scalar_t>(p), problem.width, inputs.of(i));
    });

    const auto finish = [&](const Segment& segment, int64_t p, int64_t first, int64_t some, scalar_t* tile) {
      for (int64_t part = 0; part < 1 + problem.gated; ++part) {
        scalar_t* values = tile + part * round_up(some, kTileRows) * lanes;
        add_bias(up_bias == nullptr ? nullptr : up_bias + segment.expert * made + part * hidden + first, some, values);
        if (preactivation != nullptr) {
          stored_t* __restrict kept = preactivation + ((segment.kept + p) * made + part * hidden + first) * lanes;
          for (int64_t i = 0; i < some * lanes; ++i) {
            round_to(values[i], kept[i]);
          }
        }
      }
      scalar_t* __restrict to = hiddens.of(segment.panel + p) + first * lanes;
      const scalar_t* __restrict values = tile;
      const scalar_t* __restrict gates = tile + problem.gated * round_up(some, kTileRows) * lanes;
      activate(problem.phi, gates, some * lanes, to);
      for (int64_t i = 0; problem.gated && i < some * lanes; ++i) {
        to[i] *= values[i];
      }
      if (problem.hidden_dropout.active()) {
        problem.hidden_dropout.factors(segment.row + p * lanes, first, some, tile);
        drop(tile, some * lanes, to);
      }
    };
    multiply_experts<Rows>(
        round, Problem::of<stored_t>(problem.up_weight), made * problem.width, problem.width, 1 + problem.gated, hidden,
        problem.width, inputs, desks, finish);

    const auto weigh = [&](const Segment& segment, int64_t p, int64_t first, int64_t some, scalar_t* tile) {
      add_bias(down_bias == nullptr ? nullptr : down_bias + segment.expert * problem.out + first, some, tile);
      const int64_t row = segment.row + p * lanes, number = segment.template rows_of<scalar_t>(p);
      drop_outputs(problem, row, first, some, tile);
      store_rows(tile, row, number, first, some, problem.out, rows.data(), weights.data() + row);
    };
    multiply_experts<Rows>(
        round, Problem::of<stored_t>(problem.down_weight), problem.out * hidden, hidden, 1, problem.out, hidden, hiddens,
        desks, weigh);
  }
  combine(problem, rows.data(), problem.out, out);
  if (preactivation != nullptr) {  // what nobody reads has fixed contents all the same
    const int64_t used = rounds.empty() ? 0 : rounds.back().segments.back().kept + rounds.back().segments.back().panels;
    std::fill(
        preactivation + used * made * lanes, preactivation + (problem.rows / lanes + problem.experts) * made * lanes,
        stored_t());
  }
}

}  // namespace
}  // namespace m2mkd
