// CPU kernels of `latent_affinity`; the maths is in m2mkd_fast/ops/latent_affinity.py.
//
// A thread takes whole receivers. It makes a list of the senders that a receiver keeps, once for all images, and works
// through that list alone: with probability p and noise u,
//
//     r = (1-p)/p (1-u)/u,   log w = -log(1 + r^(1/T)),   1 - w = r^(1/T) / (1 + r^(1/T)).
//
// (1-p)/p = exp(d / bandwidth) - 1 is the same for all images. Sums over images are in order, whatever the number of
// threads.

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "elementary.h"
#include "instruction_set.h"
#include "philox.h"

namespace m2mkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct AffinityProblem {
  int64_t receivers, senders;
  int64_t samples;  // 0 samples are possible, too
  bool sampled;
  bool leaky;
  double temperature;
  std::optional<double> truncation, threshold;
  bool masked;  // an edge at the truncation is cut as well
  std::optional<int64_t> seed;
};

// What probabilities and noise are clamped to.
template <typename scalar_t>
struct Limits {
  static constexpr scalar_t eps = std::numeric_limits<scalar_t>::epsilon();
  const scalar_t nearest = -std::log1p(-eps), farthest = -std::log(eps);  // scaled distances
  const scalar_t lowest = std::log(std::numeric_limits<scalar_t>::min()), highest = std::log1p(-eps);
};

// The two functions of r^(1/T), for T = 1/2, T = 1 and any T.
template <typename scalar_t>
struct HalfTemperature {
  explicit HalfTemperature(double) {}
  static scalar_t log_weight(scalar_t odds, scalar_t u) {
    const scalar_t r = odds * (1 - u) / u;
    return -log1p_of_nonnegative(r * r);
  }
  static scalar_t complement(scalar_t odds, scalar_t u) {
    const scalar_t a = odds * (1 - u);
    return a * a / (a * a + u * u);
  }
};

template <typename scalar_t>
struct TemperatureOne {
  explicit TemperatureOne(double) {}
  static scalar_t log_weight(scalar_t odds, scalar_t u) {
    return -log1p_of_nonnegative(odds * (1 - u) / u);
  }
  static scalar_t complement(scalar_t odds, scalar_t u) {
    const scalar_t a = odds * (1 - u);
    return a / (a + u);
  }
};

template <typename scalar_t>
struct AnyTemperature {
  const scalar_t inverse;
  const scalar_t largest = -Limits<scalar_t>().lowest;  // beyond it log w is clamped
  explicit AnyTemperature(double temperature) : inverse(static_cast<scalar_t>(1 / temperature)) {}
  scalar_t exponent(scalar_t odds, scalar_t u) const {
    return log_of_positive(odds * (1 - u) / u) * inverse;
  }
  scalar_t log_weight(scalar_t odds, scalar_t u) const {
    const scalar_t x = exponent(odds, u), size = x < 0 ? -x : x;
    return -((x > 0 ? x : 0) + log1p_of_nonnegative(exp_of_nonpositive(-size))) + (odds - odds);  // keeps NaN
  }
  scalar_t complement(scalar_t odds, scalar_t u) const {
    const scalar_t x = exponent(odds, u), size = x < 0 ? -x : x;
    const scalar_t small = exp_of_nonpositive(-size);
    const scalar_t value = (x > 0 ? 1 : small) / (1 + small);
    return x > largest ? 0 : value + (odds - odds);
  }
};

// The senders that one receiver keeps, and their noise.
template <typename scalar_t>
class Row {
 public:
  Row(const AffinityProblem& problem, scalar_t bandwidth)
      : problem_(problem),
        bandwidth_(bandwidth),
        sender_(problem.senders),
        place_(problem.senders),
        group_(problem.senders + 1),
        scaled_(problem.senders),
        odds_(problem.senders),
        noise_(problem.senders),
        words_(4 * (problem.senders + 1)) {}

  int64_t size() const { return size_; }
  bool is_full() const { return size_ == problem_.senders; }
  const int32_t* sender() const { return sender_.data(); }
  // (1-p)/p of each kept sender, p clamped.
  const scalar_t* odds() const { return odds_.data(); }
  // d / bandwidth of each kept sender, not clamped.
  const scalar_t* scaled() const { return scaled_.data(); }

  // Lists what is kept of a row of distances.
  void keep(const scalar_t* distance, bool leaky) {
    const scalar_t infinity = std::numeric_limits<scalar_t>::infinity();
    size_ = 0;
    for (int64_t v = 0; v < problem_.senders; ++v) {
      const bool cut = is_cut(distance[v]);
      sender_[size_] = static_cast<int32_t>(v);
      scaled_[size_] = cut ? infinity : distance[v] / bandwidth_;
      size_ += leaky || !cut;
    }
    for (int64_t j = 0; j < size_; ++j) {
      const scalar_t x = scaled_[j];
      odds_[j] = expm1_of_small(x < limits_.nearest ? limits_.nearest : x > limits_.farthest ? limits_.farthest : x);
    }
    phase_ = -1;
  }

  bool is_cut(scalar_t distance) const {
    if (!problem_.truncation.has_value()) {
      return false;
    }
    const scalar_t truncation = static_cast<scalar_t>(*problem_.truncation);
    return problem_.masked ? distance >= truncation : distance > truncation;
  }

  // Noise of the kept senders, where `edge` is the number of the row's first edge. Given noise is a row of its own.
  const scalar_t* noise(const scalar_t* given, int64_t edge) {
    const scalar_t eps = Limits<scalar_t>::eps;
    if (given != nullptr) {
      for (int64_t j = 0; j < size_; ++j) {
        noise_[j] = given[sender_[j]];
      }
    } else {
      find_groups(edge % 4);
      const int64_t stride = group_.size();
      uint32_t* const words[4] = {&words_[0], &words_[stride], &words_[2 * stride], &words_[3 * stride]};
      philox4x32(static_cast<uint64_t>(*problem_.seed), edge / 4, group_.data(), groups_, words);
      for (int64_t j = 0; j < size_; ++j) {
        const int32_t bits = static_cast<int32_t>(words_[place_[j]] >> 8);
        noise_[j] = static_cast<scalar_t>(bits) * scalar_t(0x1p-24) + scalar_t(0x1p-25);
      }
    }
    for (int64_t j = 0; j < size_; ++j) {
      const scalar_t u = noise_[j];
      noise_[j] = u < eps ? eps : u > 1 - eps ? 1 - eps : u;
    }
    return noise_.data();
  }

 private:
  // Four edges in a row share a counter: lists the counters that have a kept edge, and where each edge finds its word.
  // It depends on the first edge's place among its four, which is mostly the same for all images.
  void find_groups(int64_t phase) {
    if (phase == phase_) {
      return;
    }
    phase_ = phase;
    const int32_t stride = static_cast<int32_t>(group_.size());
    int32_t last = -1;
    groups_ = 0;
    for (int64_t j = 0; j < size_; ++j) {
      const int32_t edge = sender_[j] + static_cast<int32_t>(phase), group = edge / 4;
      group_[groups_] = group;
      groups_ += group != last;
      last = group;
      place_[j] = edge % 4 * stride + static_cast<int32_t>(groups_) - 1;
    }
  }

  const AffinityProblem& problem_;
  const scalar_t bandwidth_;
  const Limits<scalar_t> limits_;
  int64_t size_ = 0, groups_ = 0, phase_ = -1;
  std::vector<int32_t> sender_, place_, group_;
  std::vector<scalar_t> scaled_, odds_, noise_;
  std::vector<uint32_t> words_;
};

// Calls run(begin, end) for parts of the receivers in several threads, compiled for the best instructions at hand.
template <typename Run>
void for_receivers(const AffinityProblem& p, const Run& run) {
  const int64_t cost = p.senders * (1 + 8 * p.samples);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, p.receivers, grain, run);
}

template <typename scalar_t>
void plain_forward(const AffinityProblem& p, const scalar_t* distance, scalar_t bandwidth, scalar_t* out) {
  const scalar_t infinity = std::numeric_limits<scalar_t>::infinity();
  const scalar_t truncation = static_cast<scalar_t>(p.truncation.value_or(infinity));
  const bool cuts = p.truncation.has_value(), binary = p.threshold.has_value();
  const scalar_t lowest = binary ? static_cast<scalar_t>(std::log(*p.threshold)) : scalar_t(0);
  for_receivers(p, [&](int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t i = begin * p.senders; i < end * p.senders; ++i) {
        const scalar_t d = distance[i], k = -d / bandwidth;
        const bool cut = cuts && (p.masked ? d >= truncation : d > truncation);
        out[i] = cut || (binary && k < lowest) ? -infinity : binary ? 0 * k : k;
      }
    });
  });
}

template <typename scalar_t, typename Temperature>
void sampled_forward(
    const AffinityProblem& p, const scalar_t* distance, scalar_t bandwidth, const scalar_t* uniform, scalar_t* out) {
  const Temperature temperature(p.temperature);
  const Limits<scalar_t> limits;
  for_receivers(p, [&](int64_t begin, int64_t end) {
    Row<scalar_t> row(p, bandwidth);
    std::vector<scalar_t> buffer(p.senders);
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        row.keep(distance + u * p.senders, p.leaky);
        const int32_t* sender = row.sender();
        const scalar_t* odds = row.odds();
        for (int64_t b = 0; b < p.samples; ++b) {
          const int64_t edge = (b * p.receivers + u) * p.senders;
          const scalar_t* noise = row.noise(uniform == nullptr ? nullptr : uniform + edge, edge);
          scalar_t* values = row.is_full() ? out + edge : buffer.data();
          for (int64_t j = 0; j < row.size(); ++j) {
            const scalar_t value = temperature.log_weight(odds[j], noise[j]);
            values[j] = value < limits.lowest ? limits.lowest : value > limits.highest ? limits.highest : value;
          }
          if (!row.is_full()) {
            std::fill(out + edge, out + edge + p.senders, -std::numeric_limits<scalar_t>::infinity());
            for (int64_t j = 0; j < row.size(); ++j) {
              out[edge + sender[j]] = values[j];
            }
          }
        }
      }
    });
  });
}

// Fills the gradient of a row of distances; returns the sum of gradient times distance, of which the gradient of the
// bandwidth is made. `sums` are the kept edges' gradients with respect to d / bandwidth, up to the sign.
template <typename scalar_t>
double finish_row(
    const Row<scalar_t>& row, const scalar_t* sums, const scalar_t* distance, scalar_t bandwidth, int64_t senders,
    scalar_t* grad) {
  std::fill(grad, grad + senders, scalar_t(0));
  double along_distance = 0;
  for (int64_t j = 0; j < row.size(); ++j) {
    const int32_t v = row.sender()[j];
    grad[v] = -sums[j] / bandwidth;
    along_distance += static_cast<double>(grad[v]) * distance[v];
  }
  return along_distance;
}

template <typename scalar_t>
void plain_backward(
    const AffinityProblem& p, const scalar_t* distance, scalar_t bandwidth, const scalar_t* grad_out, scalar_t* grad,
    double* along_distance) {
  for_receivers(p, [&](int64_t begin, int64_t end) {
    Row<scalar_t> row(p, bandwidth);
    std::vector<scalar_t> sums(p.senders);
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        row.keep(distance + u * p.senders, false);
        for (int64_t j = 0; j < row.size(); ++j) {
          sums[j] = grad_out[u * p.senders + row.sender()[j]];
        }
        along_distance[u] =
            finish_row(row, sums.data(), distance + u * p.senders, bandwidth, p.senders, grad + u * p.senders);
      }
    });
  });
}

template <typename scalar_t, typename Temperature>
void sampled_backward(
    const AffinityProblem& p, const scalar_t* distance, scalar_t bandwidth, const scalar_t* uniform,
    const scalar_t* grad_out, scalar_t* grad, double* along_distance) {
  const Temperature temperature(p.temperature);
  const Limits<scalar_t> limits;
  const scalar_t inverse_temperature = static_cast<scalar_t>(1 / p.temperature);
  for_receivers(p, [&](int64_t begin, int64_t end) {
    Row<scalar_t> row(p, bandwidth);
    std::vector<scalar_t> sums(p.senders), gathered(p.senders);
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        row.keep(distance + u * p.senders, false);  // a cut edge has no gradient, leaky or not
        const int32_t* sender = row.sender();
        const scalar_t* odds = row.odds();
        std::fill(sums.begin(), sums.begin() + row.size(), scalar_t(0));
        for (int64_t b = 0; b < p.samples; ++b) {
          const int64_t edge = (b * p.receivers + u) * p.senders;
          const scalar_t* noise = row.noise(uniform == nullptr ? nullptr : uniform + edge, edge);
          for (int64_t j = 0; j < row.size(); ++j) {
            gathered[j] = grad_out[edge + sender[j]];
          }
          for (int64_t j = 0; j < row.size(); ++j) {
            const scalar_t complement = temperature.complement(odds[j], noise[j]);
            sums[j] += complement < limits.eps ? scalar_t(0) : gathered[j] * complement;  // log w was clamped
          }
        }
        for (int64_t j = 0; j < row.size(); ++j) {
          const scalar_t x = row.scaled()[j];
          const bool clamped = x < limits.nearest || x > limits.farthest;
          // 1 / (1-p) = 1 + p/(1-p)
          sums[j] = clamped ? scalar_t(0) : sums[j] * (1 + 1 / odds[j]) * inverse_temperature;
        }
        along_distance[u] =
            finish_row(row, sums.data(), distance + u * p.senders, bandwidth, p.senders, grad + u * p.senders);
      }
    });
  });
}

// Calls run with a null pointer of the temperature's type.
template <typename scalar_t, typename Run>
void with_temperature(double temperature, const Run& run) {
  if (temperature == 0.5) {
    run(static_cast<HalfTemperature<scalar_t>*>(nullptr));
  } else if (temperature == 1) {
    run(static_cast<TemperatureOne<scalar_t>*>(nullptr));
  } else {
    run(static_cast<AnyTemperature<scalar_t>*>(nullptr));
  }
}

AffinityProblem affinity_problem(
    const Tensor& distance, const Tensor& bandwidth, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& uniform) {
  STD_TORCH_CHECK(distance.dim() == 2, "distance must be [receivers, senders]");
  STD_TORCH_CHECK(
      distance.scalar_type() == ScalarType::Float || distance.scalar_type() == ScalarType::Double,
      "distance must be float32 or float64");
  STD_TORCH_CHECK(
      bandwidth.numel() == 1 && bandwidth.scalar_type() == distance.scalar_type(),
      "bandwidth must be one number of the dtype of distance");
  STD_TORCH_CHECK(!(seed.has_value() && uniform.has_value()), "noise must come from seed or uniform, not from both");
  AffinityProblem problem{};
  problem.receivers = distance.size(0);
  problem.senders = distance.size(1);
  STD_TORCH_CHECK(problem.senders < (int64_t(1) << 28), "too many senders");
  problem.sampled = seed.has_value() || uniform.has_value();
  if (seed.has_value()) {
    STD_TORCH_CHECK(
        seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one int64 number");
    problem.seed = *seed->const_data_ptr<int64_t>();
  }
  if (uniform.has_value()) {
    STD_TORCH_CHECK(
        uniform->dim() == 3 && uniform->size(1) == problem.receivers && uniform->size(2) == problem.senders &&
            uniform->scalar_type() == distance.scalar_type(),
        "uniform must be [samples, receivers, senders], of the dtype of distance");
    problem.samples = uniform->size(0);
  }
  return problem;
}

template <typename scalar_t>
scalar_t checked_bandwidth(const Tensor& bandwidth) {
  const scalar_t value = *bandwidth.const_data_ptr<scalar_t>();
  STD_TORCH_CHECK(value > 0, "bandwidth is ", value, "; it must be above zero");
  return value;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename scalar_t>
const scalar_t* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

template <typename scalar_t>
void run_forward(
    const AffinityProblem& problem, const Tensor& distance, const Tensor& bandwidth,
    const std::optional<Tensor>& uniform, const Tensor& out) {
  const scalar_t* from = distance.const_data_ptr<scalar_t>();
  const scalar_t width = checked_bandwidth<scalar_t>(bandwidth);
  scalar_t* to = out.mutable_data_ptr<scalar_t>();
  if (!problem.sampled) {
    return plain_forward(problem, from, width, to);
  }
  with_temperature<scalar_t>(problem.temperature, [&](auto* type) {
    using Temperature = std::remove_pointer_t<decltype(type)>;
    sampled_forward<scalar_t, Temperature>(problem, from, width, pointer<scalar_t>(uniform), to);
  });
}

Tensor latent_affinity_forward(
    const Tensor& distance, const Tensor& bandwidth, std::optional<double> truncation, bool masked,
    std::optional<int64_t> samples, std::optional<Tensor> seed, std::optional<Tensor> uniform, double temperature,
    std::optional<double> threshold, bool leaky) {
  AffinityProblem problem = affinity_problem(distance, bandwidth, seed, uniform);
  problem.truncation = truncation;
  problem.masked = masked;
  problem.temperature = temperature;
  problem.threshold = threshold;
  problem.leaky = leaky;
  if (seed.has_value()) {
    STD_TORCH_CHECK(samples.has_value() && *samples >= 0, "samples must say how many to draw with the seed");
    problem.samples = *samples;
  }
  const Tensor out = problem.sampled
      ? torch::stable::new_empty(distance, {problem.samples, problem.receivers, problem.senders})
      : torch::stable::new_empty(distance, {problem.receivers, problem.senders});
  const Tensor dense = torch::stable::contiguous(distance);
  const std::optional<Tensor> noise = contiguous(uniform);
  distance.scalar_type() == ScalarType::Float ? run_forward<float>(problem, dense, bandwidth, noise, out)
                                              : run_forward<double>(problem, dense, bandwidth, noise, out);
  return out;
}

template <typename scalar_t>
void run_backward(
    const AffinityProblem& problem, const Tensor& grad_out, const Tensor& distance, const Tensor& bandwidth,
    const std::optional<Tensor>& uniform, const Tensor& grad, const Tensor& grad_bandwidth) {
  const scalar_t* from = distance.const_data_ptr<scalar_t>();
  const scalar_t width = checked_bandwidth<scalar_t>(bandwidth);
  const scalar_t* out = grad_out.const_data_ptr<scalar_t>();
  scalar_t* to = grad.mutable_data_ptr<scalar_t>();
  std::vector<double> along_distance(problem.receivers);
  if (!problem.sampled) {
    plain_backward(problem, from, width, out, to, along_distance.data());
  } else {
    with_temperature<scalar_t>(problem.temperature, [&](auto* type) {
      using Temperature = std::remove_pointer_t<decltype(type)>;
      sampled_backward<scalar_t, Temperature>(
          problem, from, width, pointer<scalar_t>(uniform), out, to, along_distance.data());
    });
  }
  // Distance and bandwidth come in as their ratio.
  *grad_bandwidth.mutable_data_ptr<scalar_t>() =
      static_cast<scalar_t>(-std::accumulate(along_distance.begin(), along_distance.end(), 0.0) / width);
}

std::tuple<Tensor, Tensor> latent_affinity_backward(
    const Tensor& grad_out, const Tensor& distance, const Tensor& bandwidth, std::optional<double> truncation,
    bool masked, std::optional<Tensor> seed, std::optional<Tensor> uniform, double temperature) {
  AffinityProblem problem = affinity_problem(distance, bandwidth, seed, uniform);
  problem.truncation = truncation;
  problem.masked = masked;
  problem.temperature = temperature;
  const int64_t dimensions = problem.sampled ? 3 : 2;
  STD_TORCH_CHECK(
      grad_out.dim() == dimensions && grad_out.size(dimensions - 2) == problem.receivers &&
          grad_out.size(dimensions - 1) == problem.senders && grad_out.scalar_type() == distance.scalar_type(),
      "the gradient must be like the forward's result");
  if (problem.sampled) {
    STD_TORCH_CHECK(
        !uniform.has_value() || grad_out.size(0) == problem.samples, "the gradient must be like the forward's result");
    problem.samples = grad_out.size(0);
  }
  const Tensor grad = torch::stable::new_empty(distance, distance.sizes());
  const Tensor grad_bandwidth = torch::stable::new_empty(bandwidth, bandwidth.sizes());
  const Tensor dense_out = torch::stable::contiguous(grad_out), dense = torch::stable::contiguous(distance);
  const std::optional<Tensor> noise = contiguous(uniform);
  distance.scalar_type() == ScalarType::Float
      ? run_backward<float>(problem, dense_out, dense, bandwidth, noise, grad, grad_bandwidth)
      : run_backward<double>(problem, dense_out, dense, bandwidth, noise, grad, grad_bandwidth);
  return {grad, grad_bandwidth};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_latent_affinity_forward", TORCH_BOX(&m2mkd::latent_affinity_forward));
  m.impl("_latent_affinity_backward", TORCH_BOX(&m2mkd::latent_affinity_backward));
}
