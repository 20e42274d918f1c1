// CPU kernel of `route`; the maths is in m2mkd_fast/ops/route.py.
//
// Tokens are cut into chunks of a fixed size, so that the result does not depend on the number of threads. One pass
// counts how often each chunk wants each expert, a scan turns the counts into first slots, and a second pass gives
// every choice its row.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../route.h"
#include "falling_order.h"
#include "instruction_set.h"
#include "softmax.h"

namespace m2mkd {
namespace {

constexpr int64_t kChunk = 1024;  // tokens

// How many items of this cost (in elements touched) are worth a thread.
int64_t grain(int64_t cost) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost));
}

// Fills the gates, and each token's choices [T, K].
template <typename scalar_t>
void choose(const scalar_t* scores, const RouteProblem& p, scalar_t* gates, int64_t* choice) {
  torch::stable::parallel_for(0, p.groups * p.tokens, grain(p.experts), [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin, first = begin * p.experts;
    with_best_instructions(
        [&] { largest_of_rows(scores + first, count, p.experts, p.top_k, choice + begin * p.top_k); });
    if (p.gate == Gate::softmax_top_k) {
      with_best_instructions([&] { softmax_rows(scores + first, count, p.experts, gates + first); });
      return;
    }
    std::fill(gates + first, gates + end * p.experts, scalar_t(0));
    std::vector<scalar_t> chosen(p.top_k);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < p.top_k; ++k) {
        chosen[k] = scores[t * p.experts + choice[t * p.top_k + k]];
      }
      softmax_rows(chosen.data(), 1, p.top_k, chosen.data());
      for (int64_t k = 0; k < p.top_k; ++k) {
        gates[t * p.experts + choice[t * p.top_k + k]] = chosen[k];
      }
    }
  });
}

// order[g, position] = the token of group g that fills its slots at this position, by falling weight of its first
// choice.
template <typename scalar_t>
std::vector<int32_t> order_by_priority(const RouteProblem& p, const scalar_t* gates, const int64_t* choice) {
  std::vector<int32_t> order(p.groups * p.tokens);
  torch::stable::parallel_for(0, p.groups, grain(8 * p.tokens), [&](int64_t begin, int64_t end) {
    FallingOrder<scalar_t> falling_order;
    for (int64_t g = begin; g < end; ++g) {
      const auto& sorted = falling_order(p.tokens, [&](int64_t s) {
        const int64_t token = g * p.tokens + s;
        return gates[token * p.experts + choice[token * p.top_k]];
      });
      std::copy(sorted.begin(), sorted.end(), order.begin() + g * p.tokens);
    }
  });
  return order;
}

template <typename scalar_t>
void tokens_choose(const Tensor& scores, const RouteProblem& p, const Assignment& out) {
  const int64_t chunks = (p.tokens + kChunk - 1) / kChunk;
  scalar_t* gates = out.gates.mutable_data_ptr<scalar_t>();
  int64_t* place = out.place.mutable_data_ptr<int64_t>();  // holds each choice's expert until its row is known
  choose(scores.const_data_ptr<scalar_t>(), p, gates, place);
  const std::vector<int32_t> order =
      p.batch_priority ? order_by_priority(p, gates, place) : std::vector<int32_t>();

  // Calls visit(token, choice number, its expert) for a chunk, in filling order.
  const auto for_each_choice = [&](int64_t g, int64_t chunk, int64_t k, auto&& visit) {
    const int64_t end = std::min(p.tokens, (chunk + 1) * kChunk);
    for (int64_t position = chunk * kChunk; position < end; ++position) {
      const int64_t token = g * p.tokens + (p.batch_priority ? order[g * p.tokens + position] : position);
      visit(token, place[token * p.top_k + k]);
    }
  };

  // next_slot[g, chunk, k, e]: first how many choices want the expert, then the slot of the first of them.
  std::vector<int64_t> next_slot(p.groups * chunks * p.top_k * p.experts);
  const auto slots = [&](int64_t g, int64_t chunk, int64_t k) {
    return next_slot.data() + ((g * chunks + chunk) * p.top_k + k) * p.experts;
  };
  const int64_t chunk_grain = grain(kChunk * p.top_k);
  torch::stable::parallel_for(0, p.groups * chunks, chunk_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < p.top_k; ++k) {
        int64_t* wanted = slots(i / chunks, i % chunks, k);
        for_each_choice(i / chunks, i % chunks, k, [&](int64_t, int64_t expert) { ++wanted[expert]; });
      }
    }
  });

  std::vector<int64_t> first_row(p.groups * p.experts);  // first how many rows the expert keeps for the group
  for (int64_t g = 0; g < p.groups; ++g) {
    int64_t* total = first_row.data() + g * p.experts;
    for (int64_t k = 0; k < p.top_k; ++k) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t* slot = slots(g, chunk, k);
        for (int64_t e = 0; e < p.experts; ++e) {
          total[e] += std::exchange(slot[e], total[e]);
        }
      }
    }
    for (int64_t e = 0; e < p.experts; ++e) {
      total[e] = std::min(total[e], p.capacity);
    }
  }
  int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();
  int64_t used = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    offsets[e] = used;
    for (int64_t g = 0; g < p.groups; ++g) {
      used += std::exchange(first_row[g * p.experts + e], used);
    }
  }
  offsets[p.experts] = used;

  int64_t* out_token = out.token.mutable_data_ptr<int64_t>();
  int64_t* out_expert = out.expert.mutable_data_ptr<int64_t>();
  scalar_t* out_weight = out.weight.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, p.groups * chunks, chunk_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / chunks;
      for (int64_t k = 0; k < p.top_k; ++k) {
        int64_t* slot = slots(g, i % chunks, k);
        for_each_choice(g, i % chunks, k, [&](int64_t token, int64_t expert) {
          const int64_t mine = slot[expert]++;
          const bool kept = mine < p.capacity;
          const int64_t row = kept ? first_row[g * p.experts + expert] + mine : -1;
          place[token * p.top_k + k] = row;
          if (kept) {
            out_token[row] = token;
            out_expert[row] = expert;
            out_weight[row] = gates[token * p.experts + expert];
          }
        });
      }
    }
  });
  std::fill(out_token + used, out_token + p.rows, 0);
  std::fill(out_expert + used, out_expert + p.rows, p.experts - 1);
  std::fill(out_weight + used, out_weight + p.rows, scalar_t(0));
}

template <typename scalar_t>
void experts_choose(const Tensor& scores, const RouteProblem& p, const Assignment& out) {
  const scalar_t* score = scores.const_data_ptr<scalar_t>();
  scalar_t* gates = out.gates.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, p.groups * p.tokens, grain(p.experts), [&](int64_t begin, int64_t end) {
    softmax_rows(score + begin * p.experts, end - begin, p.experts, gates + begin * p.experts);
  });
  int64_t* out_token = out.token.mutable_data_ptr<int64_t>();
  int64_t* out_expert = out.expert.mutable_data_ptr<int64_t>();
  scalar_t* out_weight = out.weight.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, p.groups * p.experts, grain(8 * p.tokens), [&](int64_t begin, int64_t end) {
    FallingOrder<scalar_t> falling_order;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / p.experts, e = i % p.experts;
      const scalar_t* gate = gates + g * p.tokens * p.experts + e;
      const auto& best = falling_order(p.tokens, [&](int64_t s) { return gate[s * p.experts]; });
      const int64_t first_row = (e * p.groups + g) * p.capacity;
      for (int64_t slot = 0; slot < p.capacity; ++slot) {
        out_token[first_row + slot] = g * p.tokens + best[slot];
        out_expert[first_row + slot] = e;
        out_weight[first_row + slot] = gate[best[slot] * p.experts];
      }
    }
  });
  int64_t* offsets = out.offsets.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e <= p.experts; ++e) {
    offsets[e] = e * p.groups * p.capacity;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_forward(
    const Tensor& scores, int64_t top_k, std::string gate, std::optional<int64_t> capacity, bool batch_priority) {
  const RouteProblem problem = route_problem(scores, top_k, gate, capacity, batch_priority);
  const Tensor dense = torch::stable::contiguous(scores);
  const Assignment out = empty_assignment(scores, problem);
  const auto run = [&](auto zero) {
    using scalar_t = decltype(zero);
    problem.gate == Gate::experts_choose ? experts_choose<scalar_t>(dense, problem, out)
                                         : tokens_choose<scalar_t>(dense, problem, out);
  };
  scores.scalar_type() == ScalarType::Float ? run(0.0f) : run(0.0);
  return {out.token, out.expert, out.weight, out.offsets, out.place, out.gates};
}

template <typename scalar_t>
void add_backward(
    const std::optional<Tensor>& grad_weight, const Tensor& gates, const Tensor& token, const Tensor& expert,
    const Tensor& offsets, const Tensor& grad) {
  const int64_t experts = gates.size(2), tokens = gates.size(0) * gates.size(1);
  const scalar_t* gate = gates.const_data_ptr<scalar_t>();
  scalar_t* grad_score = grad.mutable_data_ptr<scalar_t>();
  if (grad_weight.has_value()) {
    const Tensor dense = torch::stable::contiguous(*grad_weight);
    const scalar_t* grad_row = dense.const_data_ptr<scalar_t>();
    const int64_t* row_token = token.const_data_ptr<int64_t>();
    const int64_t* row_expert = expert.const_data_ptr<int64_t>();
    // No (token, expert) pair has two rows, so threads do not collide.
    const int64_t used = offsets.const_data_ptr<int64_t>()[experts];
    torch::stable::parallel_for(0, used, grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        grad_score[row_token[row] * experts + row_expert[row]] += grad_row[row];
      }
    });
  }
  torch::stable::parallel_for(0, tokens, grain(experts), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      scalar_t mean = 0;
      for (int64_t i = t * experts; i < (t + 1) * experts; ++i) {
        mean += gate[i] * grad_score[i];
      }
      for (int64_t i = t * experts; i < (t + 1) * experts; ++i) {
        grad_score[i] = gate[i] * (grad_score[i] - mean);
      }
    }
  });
}

Tensor route_backward(
    std::optional<Tensor> grad_weight, std::optional<Tensor> grad_gates, const Tensor& gates, const Tensor& token,
    const Tensor& expert, const Tensor& offsets) {
  check_saved(gates, token, expert, offsets);
  const Tensor grad = initial_gates_gradient(grad_gates, gates);
  gates.scalar_type() == ScalarType::Float
      ? add_backward<float>(grad_weight, gates, token, expert, offsets, grad)
      : add_backward<double>(grad_weight, gates, token, expert, offsets, grad);
  return grad;
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_route_forward", TORCH_BOX(&m2mkd::route_forward));
  m.impl("_route_backward", TORCH_BOX(&m2mkd::route_backward));
}
