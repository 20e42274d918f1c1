// The backward of `route`, in one pass: for a chunk of tokens, from the gradients of weights, gates and losses to those
// of logits and noise; the maths is in ../route.h. Apart from the forward, with which it shares only route_common.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../route.h"
#include "route_common.h"
#include "softmax.h"
#include "token_columns.h"

namespace m2mkd {
namespace {

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

}  // namespace
}  // namespace m2mkd
