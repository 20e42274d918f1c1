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
  bool sampled, leaky;
  double temperature;
  double truncation;  // of all kept distances the largest; infinity where none is cut
  std::optional<double> threshold;
  std::optional<uint64_t> seed;
};

// What probabilities and noise are clamped to.
template <typename scalar_t>
struct Limits {
  static constexpr scalar_t eps = std::numeric_limits<scalar_t>::epsilon();
  static constexpr scalar_t infinity = std::numeric_limits<scalar_t>::infinity();
  scalar_t nearest = -std::log1p(-eps), farthest = -std::log(eps);  // scaled distances
  scalar_t lowest = std::log(std::numeric_limits<scalar_t>::min()), highest = std::log1p(-eps);  // log weights
};

template <typename scalar_t>
scalar_t clamped(scalar_t x, scalar_t low, scalar_t high) {  // keeps NaN
  return x < low ? low : x > high ? high : x;
}

// log w and 1 - w for T = 1/2, T = 1 and any T.
template <typename scalar_t>
struct HalfTemperature {
  explicit HalfTemperature(double) {}
  scalar_t log_weight(scalar_t odds, scalar_t u) const {
    const scalar_t r = odds * (1 - u) / u;
    return -log1p_of_nonnegative(r * r);
  }
  scalar_t complement(scalar_t odds, scalar_t u) const {
    const scalar_t a = odds * (1 - u);
    return a * a / (a * a + u * u);
  }
};

template <typename scalar_t>
struct TemperatureOne {
  explicit TemperatureOne(double) {}
  scalar_t log_weight(scalar_t odds, scalar_t u) const {
    return -log1p_of_nonnegative(odds * (1 - u) / u);
  }
  scalar_t complement(scalar_t odds, scalar_t u) const {
    const scalar_t a = odds * (1 - u);
    return a / (a + u);
  }
};

template <typename scalar_t>
struct AnyTemperature {
  scalar_t inverse;
  scalar_t largest = -Limits<scalar_t>().lowest;  // beyond it log w is clamped
  explicit AnyTemperature(double temperature) : inverse(static_cast<scalar_t>(1 / temperature)) {}
  scalar_t exponent(scalar_t odds, scalar_t u) const {
    return log_of_positive(odds * (1 - u) / u) * inverse + (odds - odds);  // keeps NaN
  }
  scalar_t log_weight(scalar_t odds, scalar_t u) const {
    const scalar_t x = exponent(odds, u), size = x < 0 ? -x : x;
    return -((x < 0 ? 0 : x) + log1p_of_nonnegative(exp_of_nonpositive(-size)));
  }
  scalar_t complement(scalar_t odds, scalar_t u) const {
    const scalar_t x = exponent(odds, u), size = x < 0 ? -x : x;
    const scalar_t small = exp_of_nonpositive(-size);
    const scalar_t value = (x < 0 ? small : 1) / (1 + small);
    return x > largest ? 0 : value;
  }
};

// Loops that compilers vectorise: every pointer is to memory of its own, and every other number a copy.

template <typename scalar_t>
void scale(
    const scalar_t* __restrict distance, int64_t count, scalar_t truncation, scalar_t bandwidth,
    scalar_t* __restrict scaled) {
  for (int64_t i = 0; i < count; ++i) {
    scaled[i] = distance[i] > truncation ? Limits<scalar_t>::infinity : distance[i] / bandwidth;
  }
}

template <typename scalar_t>
void odds_of(const scalar_t* __restrict scaled, int64_t count, Limits<scalar_t> limits, scalar_t* __restrict odds) {
  for (int64_t i = 0; i < count; ++i) {
    odds[i] = expm1_of_small(clamped(scaled[i], limits.nearest, limits.farthest));
  }
}

template <typename scalar_t>
void uniform_of(const uint32_t* __restrict words, int64_t count, scalar_t* __restrict noise) {
  for (int64_t i = 0; i < count; ++i) {
    noise[i] = static_cast<scalar_t>(static_cast<int32_t>(words[i] >> 8)) * scalar_t(0x1p-24) + scalar_t(0x1p-25);
  }
}

template <typename value_t>
void gather(
    const value_t* __restrict from, const int32_t* __restrict place, int64_t count, value_t* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[place[i]];
  }
}

// A row with values in some places, and one other value elsewhere.
template <typename scalar_t>
void scatter(
    const scalar_t* __restrict from, const int32_t* __restrict place, int64_t count, scalar_t elsewhere,
    int64_t senders, scalar_t* __restrict to) {
  for (int64_t i = 0; i < senders; ++i) {
    to[i] = elsewhere;
  }
  for (int64_t i = 0; i < count; ++i) {
    to[place[i]] = from[i];
  }
}

template <typename scalar_t, typename Temperature>
void log_weights(
    const scalar_t* __restrict odds, const scalar_t* __restrict noise, int64_t count, Temperature temperature,
    Limits<scalar_t> limits, scalar_t* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t u = clamped(noise[i], limits.eps, 1 - limits.eps);
    values[i] = clamped(temperature.log_weight(odds[i], u), limits.lowest, limits.highest);
  }
}

// sums += gradient (1 - w), where log w was not clamped.
template <typename scalar_t, typename Temperature>
void add_complements(
    const scalar_t* __restrict odds, const scalar_t* __restrict noise, const scalar_t* __restrict grad, int64_t count,
    Temperature temperature, Limits<scalar_t> limits, scalar_t* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) {
    const scalar_t u = clamped(noise[i], limits.eps, 1 - limits.eps);
    const scalar_t complement = temperature.complement(odds[i], u);
    sums[i] += complement < limits.eps ? scalar_t(0) : grad[i] * complement;
  }
}

// From sums to gradients of the scaled distance, up to the sign: zero where p was clamped, otherwise 1 / (T (1-p)) of
// the sum, with 1 / (1-p) = 1 + p/(1-p).
template <typename scalar_t>
void finish_sums(
    const scalar_t* __restrict scaled, const scalar_t* __restrict odds, int64_t count, scalar_t inverse_temperature,
    Limits<scalar_t> limits, scalar_t* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) {
    const bool outside = scaled[i] < limits.nearest || scaled[i] > limits.farthest;
    sums[i] = outside ? scalar_t(0) : sums[i] * (1 + 1 / odds[i]) * inverse_temperature;
  }
}

// The senders that one receiver keeps, and their noise.
template <typename scalar_t>
class Row {
 public:
  Row(const AffinityProblem& problem, scalar_t bandwidth)
      : problem_(problem),
        bandwidth_(bandwidth),
        truncation_(static_cast<scalar_t>(problem.truncation)),
        sender_(problem.senders),
        place_(problem.senders),
        group_(problem.senders / 4 + 2),
        kept_(problem.senders),
        scaled_(problem.senders),
        odds_(problem.senders),
        noise_(problem.senders),
        chosen_(problem.senders),
        words_(4 * group_.size()) {}

  int64_t size() const { return size_; }
  bool is_full() const { return size_ == problem_.senders; }
  const int32_t* sender() const { return sender_.data(); }
  // d / bandwidth of each kept sender; infinity where it is kept though it is cut.
  const scalar_t* scaled() const { return scaled_.data(); }
  // (1-p)/p of each kept sender, p clamped; after make_odds().
  const scalar_t* odds() const { return odds_.data(); }

  // Lists what is kept of a row of distances.
  void keep(const scalar_t* distance, bool leaky) {
    int32_t* const sender = sender_.data();
    scalar_t* const kept = kept_.data();
    const scalar_t truncation = truncation_;
    const int64_t senders = problem_.senders;
    int64_t size = 0;
    for (int64_t v = 0; v < senders; ++v) {
      sender[size] = static_cast<int32_t>(v);
      kept[size] = distance[v];
      size += leaky || !(distance[v] > truncation);
    }
    scale(kept, size, truncation, bandwidth_, scaled_.data());
    size_ = size;
    phase_ = -1;
  }

  void make_odds() { odds_of(scaled_.data(), size_, Limits<scalar_t>(), odds_.data()); }

  // What a row [senders] holds for the kept ones, contiguous.
  const scalar_t* of_kept(const scalar_t* row) {
    if (is_full()) {
      return row;
    }
    gather(row, sender_.data(), size_, kept_.data());
    return kept_.data();
  }

  // Noise of the kept senders; `edge` is the number of the row's first edge, `uniform` the caller's noise or null.
  const scalar_t* noise(const scalar_t* uniform, int64_t edge) {
    if (uniform == nullptr) {
      const int64_t phase = edge % 4;
      find_groups(phase);
      philox4x32(*problem_.seed, edge / 4, group_.data(), groups_, words_.data());
      const uint32_t* words = words_.data() + phase;
      if (!is_full()) {
        gather(words_.data(), place_.data(), size_, chosen_.data());
        words = chosen_.data();
      }
      uniform_of(words, size_, noise_.data());
      return noise_.data();
    }
    if (is_full()) {
      return uniform + edge;
    }
    gather(uniform + edge, sender_.data(), size_, noise_.data());
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
    int32_t* const group = group_.data();
    int32_t* const place = place_.data();
    const int32_t* const sender = sender_.data();
    int32_t last = -1;
    for (int64_t j = 0; j < size_; ++j) {
      const int32_t edge = sender[j] + static_cast<int32_t>(phase);
      last += last < 0 || edge / 4 != group[last];
      group[last] = edge / 4;
      place[j] = 4 * last + edge % 4;
    }
    groups_ = last + 1;
  }

  const AffinityProblem& problem_;
  const scalar_t bandwidth_, truncation_;
  int64_t size_ = 0, groups_ = 0, phase_ = -1;
  std::vector<int32_t> sender_, place_, group_;
  std::vector<scalar_t> kept_, scaled_, odds_, noise_;
  std::vector<uint32_t> chosen_, words_;
};

// Calls run(begin, end) for parts of the receivers, in several threads.
template <typename Run>
void for_receivers(const AffinityProblem& p, const Run& run) {
  const int64_t cost = p.senders * (1 + 8 * p.samples);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, p.receivers, grain, run);
}

template <typename scalar_t>
void log_probabilities(
    const scalar_t* __restrict distance, int64_t count, scalar_t truncation, scalar_t bandwidth,
    scalar_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = distance[i] > truncation ? -Limits<scalar_t>::infinity : -distance[i] / bandwidth;
  }
}

template <typename scalar_t>
void binary_edges(int64_t count, scalar_t lowest, scalar_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = out[i] < lowest ? -Limits<scalar_t>::infinity : 0 * out[i];  // keeps NaN
  }
}

template <typename scalar_t>
void plain_forward(const AffinityProblem& p, const scalar_t* distance, scalar_t bandwidth, scalar_t* out) {
  for_receivers(p, [&](int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * p.senders;
        log_probabilities(
            distance + first, p.senders, static_cast<scalar_t>(p.truncation), bandwidth, out + first);
        if (p.threshold.has_value()) {
          binary_edges(p.senders, static_cast<scalar_t>(std::log(*p.threshold)), out + first);
        }
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
        row.make_odds();
        for (int64_t b = 0; b < p.samples; ++b) {
          const int64_t edge = (b * p.receivers + u) * p.senders;
          scalar_t* const to = out + edge;
          scalar_t* const values = row.is_full() ? to : buffer.data();
          log_weights(row.odds(), row.noise(uniform, edge), row.size(), temperature, limits, values);
          if (!row.is_full()) {
            scatter(values, row.sender(), row.size(), -limits.infinity, p.senders, to);
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
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * p.senders;
        row.keep(distance + first, false);
        const scalar_t* sums = row.of_kept(grad_out + first);
        along_distance[u] = finish_row(row, sums, distance + first, bandwidth, p.senders, grad + first);
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
    std::vector<scalar_t> sums(p.senders);
    with_best_instructions([&] {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * p.senders;
        row.keep(distance + first, false);  // a cut edge has no gradient, leaky or not
        row.make_odds();
        std::fill(sums.begin(), sums.end(), scalar_t(0));
        for (int64_t b = 0; b < p.samples; ++b) {
          const int64_t edge = b * p.receivers * p.senders + first;
          const scalar_t* const noise = row.noise(uniform, edge);
          add_complements(
              row.odds(), noise, row.of_kept(grad_out + edge), row.size(), temperature, limits, sums.data());
        }
        finish_sums(row.scaled(), row.odds(), row.size(), inverse_temperature, limits, sums.data());
        along_distance[u] = finish_row(row, sums.data(), distance + first, bandwidth, p.senders, grad + first);
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

// The number that no kept distance is above: the one before the truncation where that is cut, too.
double largest_kept(const Tensor& distance, std::optional<double> truncation, bool masked) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (!truncation.has_value() || !masked) {
    return truncation.value_or(infinity);
  }
  return distance.scalar_type() == ScalarType::Float
      ? std::nextafter(static_cast<float>(*truncation), -std::numeric_limits<float>::infinity())
      : std::nextafter(*truncation, -infinity);
}

AffinityProblem affinity_problem(
    const Tensor& distance, const Tensor& bandwidth, std::optional<double> truncation, bool masked,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& uniform, double temperature) {
  STD_TORCH_CHECK(distance.dim() == 2, "distance must be [receivers, senders]");
  STD_TORCH_CHECK(
      distance.scalar_type() == ScalarType::Float || distance.scalar_type() == ScalarType::Double,
      "distance must be float32 or float64");
  STD_TORCH_CHECK(
      bandwidth.numel() == 1 && bandwidth.scalar_type() == distance.scalar_type(),
      "bandwidth must be one number of the dtype of distance");
  STD_TORCH_CHECK(!(seed.has_value() && uniform.has_value()), "noise must come from seed or uniform, not from both");
  AffinityProblem problem{};
  problem.temperature = temperature;
  problem.truncation = largest_kept(distance, truncation, masked);
  problem.receivers = distance.size(0);
  problem.senders = distance.size(1);
  STD_TORCH_CHECK(problem.senders < (int64_t(1) << 28), "too many senders");
  problem.sampled = seed.has_value() || uniform.has_value();
  if (seed.has_value()) {
    STD_TORCH_CHECK(
        seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one int64 number");
    problem.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
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
  AffinityProblem problem = affinity_problem(distance, bandwidth, truncation, masked, seed, uniform, temperature);
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
  // Distance and bandwidth come in as their ratio, so that one gradient follows from the other.
  *grad_bandwidth.mutable_data_ptr<scalar_t>() =
      static_cast<scalar_t>(-std::accumulate(along_distance.begin(), along_distance.end(), 0.0) / width);
}

std::tuple<Tensor, Tensor> latent_affinity_backward(
    const Tensor& grad_out, const Tensor& distance, const Tensor& bandwidth, std::optional<double> truncation,
    bool masked, std::optional<Tensor> seed, std::optional<Tensor> uniform, double temperature) {
  AffinityProblem problem = affinity_problem(distance, bandwidth, truncation, masked, seed, uniform, temperature);
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
