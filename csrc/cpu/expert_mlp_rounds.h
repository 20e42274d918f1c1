// How the work of `expert_mlp` is ordered and divided: rounds of panels, one after the other; in each, blocks of a
// weight's rows or single panels, which threads share.
//
// Apart from what is computed, because forward and backward follow one plan. The sizes are measured ones
// (dev/kernels/expert_mlp.md).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "expert_mlp_problem.h"
#include "instruction_set.h"
#include "row_products.h"

namespace m2mkd {
namespace {

constexpr int64_t kGroup = 48;         // rows of a weight that are not divided between threads; whole tiles, and whole
                                       // counters of dropout
constexpr int64_t kRowsOfBlock = 192;  // of a weight, whose packed part fills half of a second cache
constexpr int64_t kPanelsOfRound = 32;
constexpr double kWorthAThread = 1e6;  // multiplications

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

int64_t most_panels(const std::vector<Round>& rounds) {
  int64_t most = 0;
  for (const Round& round : rounds) {
    most = std::max(most, round.panels);
  }
  return most;
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

}  // namespace
}  // namespace m2mkd
