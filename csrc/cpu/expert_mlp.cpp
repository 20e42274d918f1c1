// CPU kernels of `expert_mlp`; the maths is in m2mkd_fast/ops/expert_mlp.py.
//
// Tokens are the columns of every product, weights the left matrix: gathering tokens into panels is all the packing that
// the large operand needs, an expert's bias is one number a row, and what the first product makes is the panel of the
// second. Work goes in rounds of a few hundred rows of the assignment, so that hidden units stay in the cache that
// processors share; in each, threads divide the rows of the weights, not the tokens, so that it does not matter how
// unevenly tokens are spread over experts.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "activation.h"
#include "instruction_set.h"
#include "packed_product.h"
#include "philox.h"

namespace m2mkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGroup = 48;         // rows of a weight that are not divided between threads; whole tiles, and whole
                                       // counters of dropout
constexpr int64_t kRowsOfBlock = 192;  // of a weight, whose packed part fills half of a second cache
constexpr int64_t kPanelsOfRound = 32;
constexpr double kWorthAThread = 1e6;  // multiplications

// What dropout leaves of row n's unit j: element (n, j) of philox_keep in m2mkd_fast/ops/philox.py.
struct Dropout {
  double probability = 0;
  uint64_t seed = 0, first = 0;
  int64_t width = 0;

  bool active() const {
    return probability > 0;
  }

  // factor[j - first_unit][lane] = 1 / (1 - probability) for what row first_row + lane keeps of units first_unit
  // (a multiple of 4) to first_unit + count, 0 for what it drops.
  template <typename scalar_t>
  void factors(int64_t first_row, int64_t first_unit, int64_t count, scalar_t* factor) const {
    constexpr int64_t panel = kPanel<scalar_t>;
    const uint64_t per_row = (width + 3) / 4;
    const auto least = static_cast<uint64_t>(std::nearbyint(probability * 4294967296.0));
    const auto kept = static_cast<scalar_t>(1.0 / (1.0 - probability));
    int32_t offset[panel];
    uint32_t words[4 * panel];
    for (int64_t lane = 0; lane < panel; ++lane) {
      offset[lane] = static_cast<int32_t>(lane * per_row);
    }
    for (int64_t unit = 0; unit < count; unit += 4) {
      philox4x32(seed, first + first_row * per_row + (first_unit + unit) / 4, offset, panel, words);
      for (int64_t k = 0; k < std::min<int64_t>(4, count - unit); ++k) {
        for (int64_t lane = 0; lane < panel; ++lane) {
          factor[(unit + k) * panel + lane] = words[4 * lane + k] >= least ? kept : scalar_t(0);
        }
      }
    }
  }
};

// values *= factors, where a factor is not zero; zero where it is, even of NaN.
template <typename scalar_t>
void drop(const scalar_t* __restrict factors, int64_t count, scalar_t* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = factors[i] != 0 ? values[i] * factors[i] : scalar_t(0);
  }
}

struct Problem {
  Tensor x, token, weight, offsets, place, up_weight, down_weight;
  std::optional<Tensor> up_bias, down_bias;
  int64_t tokens, rows, experts, width, made, hidden, out, places;
  bool gated;
  Phi phi;
  Dropout hidden_dropout, output_dropout;

  template <typename stored_t>
  static const stored_t* of(const Tensor& tensor) {
    return static_cast<const stored_t*>(tensor.const_data_ptr());
  }
  template <typename stored_t>
  static const stored_t* of(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? of<stored_t>(*tensor) : nullptr;
  }
};

// Rows of an expert in a round, in neighbouring panels.
struct Segment {
  int64_t expert, row, rows;
  int64_t panel, panels;  // in the round
  int64_t kept;           // first panel in the pre-activation
  bool first, last;       // of the expert

  template <typename scalar_t>
  int64_t rows_of(int64_t p) const {
    return std::min(kPanel<scalar_t>, rows - p * kPanel<scalar_t>);
  }
};

struct Round {
  std::vector<Segment> segments;
  int64_t panels = 0;
};

// Experts share rounds as long as they fit; an expert that does not is spread evenly over rounds of its own.
std::vector<Round> rounds_of(const Problem& problem, int64_t panel_width) {
  const int64_t* offsets = Problem::of<int64_t>(problem.offsets);
  std::vector<Round> rounds;
  int64_t kept = 0;
  for (int64_t e = 0; e < problem.experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], panels = (rows + panel_width - 1) / panel_width;
    const int64_t pieces = (panels + kPanelsOfRound - 1) / kPanelsOfRound;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t begin = panels * piece / pieces, end = panels * (piece + 1) / pieces;
      // Two experts that are spread never share a round: sums so far are kept of one.
      if (rounds.empty() || rounds.back().panels + end - begin > kPanelsOfRound || (pieces > 1 && piece == 0)) {
        rounds.emplace_back();
      }
      Round& round = rounds.back();
      round.segments.push_back(
          {e, offsets[e] + begin * panel_width, std::min(rows, end * panel_width) - begin * panel_width, round.panels,
           end - begin, kept + begin, piece == 0, piece + 1 == pieces});
      round.panels += end - begin;
    }
    kept += panels;
  }
  return rounds;
}

// Calls run(slot, begin, end) for as many slots as threads are worth it, units divided evenly.
template <typename Run>
void divide(int64_t units, double multiplications, const Run& run) {
  const auto worth = static_cast<int64_t>(std::min(multiplications / kWorthAThread, 1e6));
  const int64_t slots = std::max<int64_t>(
      1, std::min({static_cast<int64_t>(torch::stable::get_num_threads()), units, worth}));
  if (slots == 1) {
    run(0, 0, units);
    return;
  }
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      run(slot, units * slot / slots, units * (slot + 1) / slots);
    }
  });
}

// How the rows of a weight are cut into blocks: whole groups, and as many blocks as threads can share.
struct Blocks {
  int64_t size, count;

  Blocks(int64_t rows, int64_t most_rows) {
    const int64_t groups = std::max<int64_t>(1, (rows + kGroup - 1) / kGroup), most = most_rows / kGroup;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::min(groups, round_up((groups + most - 1) / most, threads));
    size = (groups + wanted - 1) / wanted * kGroup;
    count = std::max<int64_t>(1, (rows + size - 1) / size);
  }
};

// Memory for each thread to multiply in.
template <typename scalar_t>
class Desks {
 public:
  explicit Desks(int64_t panels)
      : size_(kPacked + panels * kRowsOfBlock * kPanel<scalar_t>),
        memory_(std::max<int64_t>(1, torch::stable::get_num_threads()) * size_) {}
  scalar_t* packed(int64_t slot) const {
    return memory_.data() + slot * size_;
  }
  scalar_t* tiles(int64_t slot) const {
    return packed(slot) + kPacked;
  }

 private:
  static constexpr int64_t kPacked = kRowsOfBlock / kTileRows * std::max(Rows::kTileStep, Columns::kTileStep);
  int64_t size_;
  Buffer<scalar_t> memory_;
};

// Panels of a round, `width` rows each.
template <typename scalar_t>
struct Panels {
  int64_t step;  // from one panel to the next
  Buffer<scalar_t> memory;

  // An odd number of tiles from panel to panel: neighbours then share no set of the first cache.
  Panels(int64_t panels, int64_t width)
      : step((round_up(width, 64) + kTileRows) * kPanel<scalar_t>), memory(std::max<int64_t>(1, panels * step)) {}
  scalar_t* of(int64_t panel) const {
    return memory.data() + panel * step;
  }
};

// The same numbers with rows and columns exchanged, to be the right side of a sum over tokens: [width / kPanel] times
// [panels of the round] times [tokens][kPanel units].
template <typename scalar_t>
struct TurnedPanels {
  static constexpr int64_t kWidth = kPanel<scalar_t>;
  int64_t panels;
  Buffer<scalar_t> memory;

  TurnedPanels(int64_t number, int64_t width)
      : panels(number), memory(std::max<int64_t>(1, number * round_up(width, kWidth) * kWidth)) {}
  scalar_t* of(int64_t first_unit, int64_t panel) const {
    return memory.data() + (first_unit / kWidth * panels + panel) * kWidth * kWidth;
  }
};

// panel[c][lane] = row lane's number c; zeros in the lanes of missing rows.
template <typename stored_t, typename scalar_t>
void gather_panel(
    const stored_t* source, const int64_t* token, int64_t rows, int64_t width, scalar_t* __restrict panel) {
  constexpr int64_t lanes = kPanel<scalar_t>, kAtOnce = 64;
  for (int64_t first = 0; first < width; first += kAtOnce) {
    const int64_t end = std::min(width, first + kAtOnce);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (lane < rows) {
        const stored_t* row = source + token[lane] * width;
        for (int64_t c = first; c < end; ++c) {
          panel[c * lanes + lane] = widened(row[c]);
        }
      } else {
        for (int64_t c = first; c < end; ++c) {
          panel[c * lanes + lane] = 0;
        }
      }
    }
  }
}

// The same, turned.
template <typename stored_t, typename scalar_t>
void gather_turned(
    const stored_t* source, const int64_t* token, int64_t rows, int64_t width, const TurnedPanels<scalar_t>& turned,
    int64_t panel) {
  constexpr int64_t lanes = kPanel<scalar_t>;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const stored_t* row = source + (lane < rows ? token[lane] * width : 0);
    for (int64_t first = 0; first < width; first += lanes) {
      scalar_t* __restrict out = turned.of(first, panel) + lane * lanes;
      for (int64_t c = 0; c < std::min(lanes, width - first); ++c) {
        out[c] = lane < rows ? widened(row[first + c]) : scalar_t(0);
      }
    }
  }
}

// Calls run(segment, p, panel of the round) for every panel, on all threads.
template <typename Run>
void for_each_panel(const Round& round, double work, const Run& run) {
  std::vector<std::pair<const Segment*, int64_t>> panels;
  for (const Segment& segment : round.segments) {
    for (int64_t p = 0; p < segment.panels; ++p) {
      panels.emplace_back(&segment, p);
    }
  }
  divide(round.panels, work, [&](int64_t, int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t i = begin; i < end; ++i) {
        run(*panels[i].first, panels[i].second, i);
      }
    });
  });
}

// For every segment of a round and every block of rows of the experts' matrices (as `Left` reads them, `parts` of
// `rows` rows, `inner` long, `matrix` elements from expert to expert): the product with the panels, and
// finish(segment, p, first row of the block, number of rows, tile), a tile being `parts` times [rows rounded up to whole
// tiles][kPanel].
template <typename Left, typename stored_t, typename scalar_t, typename Finish>
void multiply_experts(
    const Round& round, const stored_t* matrices, int64_t matrix, int64_t stride, int64_t parts, int64_t rows,
    int64_t inner, const Panels<scalar_t>& panels, const Desks<scalar_t>& desks, const Finish& finish) {
  const Blocks blocks(rows, kRowsOfBlock / parts);
  const auto segments = static_cast<int64_t>(round.segments.size());
  const double work = static_cast<double>(parts * rows) * inner * round.panels * kPanel<scalar_t>;
  divide(blocks.count * segments, work, [&](int64_t slot, int64_t begin, int64_t end) {
    with_best_instructions([&] {
      for (int64_t unit = begin; unit < end; ++unit) {
        const Segment& segment = round.segments[unit % segments];
        const int64_t first = unit / segments * blocks.size, some = std::min(blocks.size, rows - first);
        multiply_panels_by<Left>(
            matrices + segment.expert * matrix + Left::offset(stride, first, 0), stride, parts,
            Left::offset(stride, rows, 0), some, inner, segment.panels,
            [&](int64_t p) { return panels.of(segment.panel + p); }, desks.packed(slot), desks.tiles(slot),
            [&](int64_t p, scalar_t* tile) { finish(segment, p, first, some, tile); });
      }
    });
  });
}

// out[token] = sum of its rows, in the order of its places.
template <typename stored_t, typename scalar_t>
void combine(const Problem& problem, const scalar_t* rows, int64_t width, stored_t* out) {
  const int64_t* place = Problem::of<int64_t>(problem.place);
  const double work = static_cast<double>(problem.tokens) * (problem.places + width) * 16;
  divide(problem.tokens, work, [&](int64_t, int64_t begin, int64_t end) {
    Buffer<scalar_t> memory(width);
    scalar_t* __restrict sum = memory.data();
    with_best_instructions([&] {
      for (int64_t t = begin; t < end; ++t) {
        std::fill(sum, sum + width, scalar_t(0));
        for (int64_t k = 0; k < problem.places; ++k) {
          const int64_t row = place[t * problem.places + k];
          if (row < 0) {
            continue;
          }
          const scalar_t* __restrict term = rows + row * width;
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += term[i];
          }
        }
        stored_t* __restrict to = out + t * width;
        for (int64_t i = 0; i < width; ++i) {
          round_to(sum[i], to[i]);
        }
      }
    });
  });
}

// rows[row + lane][first + i] = weight[lane] tile[i][lane]
template <typename scalar_t>
void store_rows(
    const scalar_t* tile, int64_t row, int64_t rows, int64_t first, int64_t some, int64_t width,
    scalar_t* __restrict out, const scalar_t* weight) {
  for (int64_t lane = 0; lane < rows; ++lane) {
    const scalar_t factor = weight[lane];
    scalar_t* __restrict to = out + (row + lane) * width + first;
    for (int64_t i = 0; i < some; ++i) {
      to[i] = factor * tile[i * kPanel<scalar_t> + lane];
    }
  }
}

template <typename stored_t, typename scalar_t>
void add_bias(const stored_t* bias, int64_t rows, scalar_t* tile) {
  for (int64_t r = 0; bias != nullptr && r < rows; ++r) {
    const scalar_t number = widened(bias[r]);
    for (int64_t lane = 0; lane < kPanel<scalar_t>; ++lane) {
      tile[r * kPanel<scalar_t> + lane] += number;
    }
  }
}

// The weights of all rows in use.
template <typename scalar_t>
std::vector<scalar_t> weights_of(const Problem& problem) {
  const int64_t used = Problem::of<int64_t>(problem.offsets)[problem.experts];
  const auto converted = [&](const auto* weight) { return std::vector<scalar_t>(weight, weight + used); };
  return problem.weight.scalar_type() == ScalarType::Double ? converted(Problem::of<double>(problem.weight))
                                                            : converted(Problem::of<float>(problem.weight));
}

int64_t most_panels(const std::vector<Round>& rounds) {
  int64_t most = 0;
  for (const Round& round : rounds) {
    most = std::max(most, round.panels);
  }
  return most;
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
      if (problem.output_dropout.active()) {
        scalar_t factors[kGroup * lanes];
        for (int64_t group = 0; group < some; group += kGroup) {
          const int64_t count = std::min(kGroup, some - group);
          problem.output_dropout.factors(segment.row + p * lanes, first + group, count, factors);
          drop(factors, count * lanes, tile + group * lanes);
        }
      }
      const int64_t row = segment.row + p * lanes, number = segment.template rows_of<scalar_t>(p);
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

template <typename stored_t>
struct Gradients {
  stored_t *x, *up_weight, *up_bias, *down_weight, *down_bias;  // null where not needed
  Tensor weight;
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
  const bool parameters = gradients.up_weight != nullptr;
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
      if (problem.output_dropout.active()) {
        scalar_t factors[kGroup * lanes];
        for (int64_t first = 0; first < problem.out; first += kGroup) {
          const int64_t count = std::min(kGroup, problem.out - first);
          problem.output_dropout.factors(row, first, count, factors);
          drop(factors, count * lanes, grads + first * lanes);
        }
      }
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

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == dtype;
  for (int64_t d = 0; same && d < tensor.dim(); ++d) {
    same = tensor.size(d) == sizes.begin()[d];
  }
  STD_TORCH_CHECK(same, name, " has a wrong shape or dtype");
}

Problem checked_problem(
    const Tensor& x, const Tensor& token, const Tensor& weight, const Tensor& offsets, const Tensor& place,
    const Tensor& up_weight, const std::optional<Tensor>& up_bias, const Tensor& down_weight,
    const std::optional<Tensor>& down_bias, const std::string& activation, double hidden_dropout, double output_dropout,
    const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(
      x.dim() == 2 && up_weight.dim() == 3 && down_weight.dim() == 3 && place.dim() == 2,
      "x and place must be matrices, and there must be a matrix for each expert");
  Problem problem;
  problem.gated = activation == "geglu" || activation == "swiglu";
  STD_TORCH_CHECK(
      problem.gated || activation == "gelu" || activation == "gelu_tanh", "there is no activation ", activation);
  problem.phi = activation == "gelu_tanh" ? Phi::gelu_tanh : activation == "swiglu" ? Phi::silu : Phi::gelu;
  problem.tokens = x.size(0), problem.width = x.size(1), problem.rows = token.numel();
  problem.experts = up_weight.size(0), problem.made = up_weight.size(1), problem.places = place.size(1);
  problem.out = down_weight.size(1), problem.hidden = down_weight.size(2);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "x must be float32, float64, bfloat16 or float16");
  check_shape(
      up_weight, {problem.experts, problem.hidden * (1 + problem.gated), problem.width}, dtype, "up_weight");
  check_shape(down_weight, {problem.experts, problem.out, problem.hidden}, dtype, "down_weight");
  if (up_bias.has_value()) {
    check_shape(*up_bias, {problem.experts, problem.made}, dtype, "up_bias");
    problem.up_bias = torch::stable::contiguous(*up_bias);
  }
  if (down_bias.has_value()) {
    check_shape(*down_bias, {problem.experts, problem.out}, dtype, "down_bias");
    problem.down_bias = torch::stable::contiguous(*down_bias);
  }
  check_shape(token, {problem.rows}, ScalarType::Long, "token");
  check_shape(
      weight, {problem.rows}, weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
      "weight");
  check_shape(offsets, {problem.experts + 1}, ScalarType::Long, "offsets");
  check_shape(place, {problem.tokens, problem.places}, ScalarType::Long, "place");
  problem.x = torch::stable::contiguous(x), problem.token = torch::stable::contiguous(token);
  problem.weight = torch::stable::contiguous(weight), problem.offsets = torch::stable::contiguous(offsets);
  problem.place = torch::stable::contiguous(place), problem.up_weight = torch::stable::contiguous(up_weight);
  problem.down_weight = torch::stable::contiguous(down_weight);

  // An assignment that somebody made by hand must not read or write elsewhere.
  const int64_t *tokens = Problem::of<int64_t>(problem.token), *places = Problem::of<int64_t>(problem.place);
  const int64_t* offset = Problem::of<int64_t>(problem.offsets);
  const int64_t used = offset[problem.experts];
  STD_TORCH_CHECK(
      offset[0] == 0 && std::is_sorted(offset, offset + problem.experts + 1) && used <= problem.rows,
      "offsets must rise from 0 to at most the number of rows");
  STD_TORCH_CHECK(
      std::all_of(tokens, tokens + used, [&](int64_t t) { return t >= 0 && t < problem.tokens; }),
      "token must be below the number of tokens");
  STD_TORCH_CHECK(
      std::all_of(places, places + place.numel(), [&](int64_t row) { return row < used; }),
      "place must be below the last offset");

  const bool drops = hidden_dropout > 0 || output_dropout > 0;
  STD_TORCH_CHECK(
      hidden_dropout >= 0 && hidden_dropout < 1 && output_dropout >= 0 && output_dropout < 1,
      "dropout must be at least 0 and below 1");
  STD_TORCH_CHECK(!drops || seed.has_value(), "dropout needs a seed");
  if (drops) {
    STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, "seed must be one int64 number");
    const auto key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    problem.hidden_dropout = {hidden_dropout, key, 0, problem.hidden};
    const auto after = static_cast<uint64_t>(problem.rows * ((problem.hidden + 3) / 4));
    problem.output_dropout = {output_dropout, key, after, problem.out};
  }
  return problem;
}

// Calls run with a number of the type that a tensor's are stored in.
template <typename Run>
void with_stored_type(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(BFloat16());
    default:
      return run(Float16());
  }
}

std::tuple<Tensor, Tensor> expert_mlp_forward(
    const Tensor& x, const Tensor& token, const Tensor&, const Tensor& weight, const Tensor& offsets,
    const Tensor& place, const Tensor& up_weight, std::optional<Tensor> up_bias, const Tensor& down_weight,
    std::optional<Tensor> down_bias, std::string activation, double hidden_dropout, double output_dropout,
    std::optional<Tensor> seed, bool keep_preactivation) {
  const Problem problem = checked_problem(
      x, token, weight, offsets, place, up_weight, up_bias, down_weight, down_bias, activation, hidden_dropout,
      output_dropout, seed);
  const Tensor out = torch::stable::new_empty(x, {problem.tokens, problem.out});
  std::optional<Tensor> preactivation;
  with_stored_type(x, [&](auto zero) {
    using stored_t = decltype(zero);
    constexpr int64_t panel = kPanel<Compute<stored_t>>;
    preactivation = keep_preactivation
        ? torch::stable::new_empty(x, {problem.rows / panel + problem.experts, problem.made, panel})
        : torch::stable::new_empty(x, {0});
    forward<stored_t>(
        problem, static_cast<stored_t*>(out.mutable_data_ptr()),
        keep_preactivation ? static_cast<stored_t*>(preactivation->mutable_data_ptr()) : nullptr);
  });
  return {out, *preactivation};
}

// A gradient like a tensor, zero for experts without rows; without elements where it is not needed.
template <typename stored_t>
Tensor empty_gradient(const Problem& problem, const std::optional<Tensor>& tensor, bool needed, stored_t*& numbers) {
  if (!needed || !tensor.has_value()) {
    numbers = nullptr;
    return torch::stable::new_empty(problem.x, {0});
  }
  const Tensor gradient = torch::stable::new_empty(problem.x, tensor->sizes());
  numbers = static_cast<stored_t*>(gradient.mutable_data_ptr());
  const int64_t* offsets = Problem::of<int64_t>(problem.offsets);
  const int64_t size = gradient.numel() / std::max<int64_t>(1, problem.experts);
  for (int64_t e = 0; e < problem.experts; ++e) {
    if (offsets[e] == offsets[e + 1]) {
      std::memset(static_cast<void*>(numbers + e * size), 0, size * sizeof(stored_t));
    }
  }
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& grad_out, const Tensor& preactivation, const Tensor& x, const Tensor& token, const Tensor&,
    const Tensor& weight, const Tensor& offsets, const Tensor& place, const Tensor& up_weight,
    std::optional<Tensor> up_bias, const Tensor& down_weight, std::optional<Tensor> down_bias, std::string activation,
    double hidden_dropout, double output_dropout, std::optional<Tensor> seed, bool need_x, bool need_parameters) {
  const Problem problem = checked_problem(
      x, token, weight, offsets, place, up_weight, up_bias, down_weight, down_bias, activation, hidden_dropout,
      output_dropout, seed);
  check_shape(grad_out, {problem.tokens, problem.out}, x.scalar_type(), "grad_out");
  const Tensor grads = torch::stable::contiguous(grad_out), kept = torch::stable::contiguous(preactivation);
  const Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  std::vector<Tensor> found;
  with_stored_type(x, [&](auto zero) {
    using stored_t = decltype(zero);
    constexpr int64_t panel = kPanel<Compute<stored_t>>;
    check_shape(
        preactivation, {problem.rows / panel + problem.experts, problem.made, panel}, x.scalar_type(), "preactivation");
    Gradients<stored_t> gradients{nullptr, nullptr, nullptr, nullptr, nullptr, grad_weight};
    const Tensor grad_x = torch::stable::new_empty(x, need_x ? x.sizes() : torch::headeronly::IntHeaderOnlyArrayRef{0});
    gradients.x = need_x ? static_cast<stored_t*>(grad_x.mutable_data_ptr()) : nullptr;
    found = {
        grad_x,
        empty_gradient(problem, problem.up_weight, need_parameters, gradients.up_weight),
        empty_gradient(problem, problem.up_bias, need_parameters, gradients.up_bias),
        empty_gradient(problem, problem.down_weight, need_parameters, gradients.down_weight),
        empty_gradient(problem, problem.down_bias, need_parameters, gradients.down_bias),
    };
    backward(
        problem, static_cast<const stored_t*>(grads.const_data_ptr()),
        static_cast<const stored_t*>(kept.const_data_ptr()), gradients);
  });
  return {found[0], grad_weight, found[1], found[2], found[3], found[4]};
}

}  // namespace
}  // namespace m2mkd

STABLE_TORCH_LIBRARY_IMPL(m2mkd_fast, CPU, m) {
  m.impl("_expert_mlp_forward", TORCH_BOX(&m2mkd::expert_mlp_forward));
  m.impl("_expert_mlp_backward", TORCH_BOX(&m2mkd::expert_mlp_backward));
}
