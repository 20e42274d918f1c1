// The second pass of `route`'s forward: from gates, choices and their counts to the rows of the assignment, both where
// tokens choose and where experts do. Apart from the first pass, since no choice can have its row before all are
// counted; it only moves numbers, a choice at a time, and has no use for vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "../route.h"
#include "falling_order.h"
#include "route_common.h"

namespace m2mkd {
namespace {

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

}  // namespace
}  // namespace m2mkd
