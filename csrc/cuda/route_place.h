// The later kernels of `route`: from every token's choices to rows.
#pragma once

#include <cub/block/block_scan.cuh>

#include "route_common.h"
#include "route_losses.h"

namespace m2mkd {

// With a filling order of its own: how many choices of a chunk of positions want each expert.
static __global__ void __launch_bounds__(kChunk) count_choices(
    Chunks c, const int32_t* __restrict__ choice, const int32_t* __restrict__ order, int32_t* counts) {
  __shared__ int32_t wanted[kMaxTopK * kMaxExperts];
  const int64_t group = blockIdx.x / c.per_group;
  const int chunk = int(blockIdx.x % c.per_group);
  for (int i = threadIdx.x; i < c.top_k * c.experts; i += kChunk) {
    wanted[i] = 0;
  }
  __syncthreads();
  const int position = chunk * kChunk + int(threadIdx.x);
  if (position < c.tokens) {
    const int64_t token = c.token_at(order, group, position);
    for (int k = 0; k < c.top_k; ++k) {
      atomicAdd(&wanted[k * c.experts + choice[token * c.top_k + k]], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < c.top_k * c.experts; i += kChunk) {
    counts[c.count_index(group, i % c.experts, i / c.experts, chunk)] = wanted[i];
  }
}

// Inclusive sum over the lanes of a warp.
inline __device__ int32_t sum_up_to_lane(int32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t before = __shfl_up_sync(kAll, value, distance);
    value += lane >= distance ? before : 0;
  }
  return value;
}

// A warp for each of `number` sums over chunks, and for each (group, expert): there, counts become first slots.
// The block that ends last then has everything for the first row of each (expert, group), and for the losses.
template <typename scalar_t>
struct Scanning {
  Chunks chunks;
  int64_t capacity;
  int32_t* counts;   // null where experts choose
  int64_t* kept;     // [E, G], how many rows, and then the first one
  int64_t* offsets;
  const scalar_t* sums;  // [sum, chunk]
  scalar_t* totals;
  Losses<scalar_t> losses;
  int32_t* blocks_done;
};

template <typename scalar_t>
__device__ void scan_slots(const Scanning<scalar_t>& s, int64_t pair) {
  const Chunks& c = s.chunks;
  const int lane = threadIdx.x % 32, length = c.top_k * c.per_group;
  int32_t* mine = s.counts + pair * length;
  constexpr int kAtOnce = 4;  // so that loads wait together
  int32_t before = 0;
  for (int start = lane; start - lane < length; start += 32 * kAtOnce) {
    int32_t value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      value[i] = start + 32 * i < length ? mine[start + 32 * i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t up_to = sum_up_to_lane(value[i]);
      if (start + 32 * i < length) {
        mine[start + 32 * i] = before + up_to - value[i];
      }
      before += __shfl_sync(kAll, up_to, 31);
    }
  }
  if (lane == 0) {
    s.kept[pair % c.experts * c.groups + pair / c.experts] = before < s.capacity ? before : s.capacity;
  }
}

template <typename scalar_t>
__device__ void add_chunks(const Scanning<scalar_t>& s, Sum kind, int64_t pair) {
  const int64_t number = s.chunks.sum_number(kind, pair);
  scalar_t sum = 0;
#pragma unroll 4
  for (int chunk = threadIdx.x % 32; chunk < s.chunks.per_group; chunk += 32) {
    sum += s.sums[number * s.chunks.per_group + chunk];
  }
  sum = sum_of_lanes<32>(sum);
  if (threadIdx.x % 32 == 0) {
    s.totals[number] = sum;
  }
}

// For one block: kept[expert, group] becomes the first row of the pair.
template <typename scalar_t>
__device__ void scan_rows(const Scanning<scalar_t>& s) {
  using Scan = cub::BlockScan<int64_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const Chunks& c = s.chunks;
  const int64_t length = c.groups * c.experts;
  int64_t before = 0;
  for (int64_t start = 0; start < length; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    int64_t first, total;
    Scan(storage).ExclusiveSum(i < length ? __ldcg(s.kept + i) : 0, first, total);
    if (i < length) {
      s.kept[i] = before + first;
      if (i % c.groups == 0) {
        s.offsets[i / c.groups] = before + first;
      }
    }
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    s.offsets[c.experts] = before;
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) scan(Scanning<scalar_t> s) {
  __shared__ bool is_last;
  const Chunks& c = s.chunks;
  const int warp = threadIdx.x / 32;
  const int64_t pair = int64_t(blockIdx.x) * kWarps + warp;  // group * experts + expert
  if (pair < c.groups * c.experts) {                         // a whole warp at a time
    if (s.counts != nullptr) {
      scan_slots(s, pair);
    }
    if (s.losses.wanted & kImportance) {
      add_chunks(s, importance_sum, pair);
    }
    if (s.losses.wanted & kLoad) {
      add_chunks(s, load_sum, pair);
    }
    if (s.losses.wanted & kGshard) {
      add_chunks(s, gshard_sum, pair);
      add_chunks(s, first_choice_sum, pair);
    }
    if (s.losses.wanted & kZ && pair < c.groups) {  // not a pair here, just as many warps as groups
      add_chunks(s, z_sum, pair);
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(s.blocks_done, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();
  if (s.counts != nullptr) {
    scan_rows(s);
  }
  for (int64_t group = warp; s.losses.wanted != 0 && group < c.groups; group += kWarps) {
    losses_of_group(c, s.losses, group);
  }
}

template <typename scalar_t>
struct Rows {
  int64_t* token;
  int64_t* expert;
  scalar_t* weight;
  int64_t* place;

  __device__ void put(int64_t row, int64_t token_number, int expert_number, scalar_t value) const {
    token[row] = token_number;
    expert[row] = expert_number;
    weight[row] = value;
  }
};

// A thread for each position of a chunk gives its token's choices their rows.
template <typename scalar_t>
__global__ void __launch_bounds__(kChunk) place_rows(
    Chunks c, int64_t capacity, const int32_t* __restrict__ choice, const scalar_t* __restrict__ gates,
    const int32_t* __restrict__ order, const int32_t* __restrict__ first_slot, const int64_t* __restrict__ first_row,
    const int64_t* __restrict__ offsets, Rows<scalar_t> out) {
  constexpr int warps = kChunk / 32;
  __shared__ int32_t in_warp[warps][kMaxExperts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x / c.per_group;
  const int chunk = int(blockIdx.x % c.per_group);
  const int position = chunk * kChunk + int(threadIdx.x);
  const bool real = position < c.tokens;
  const int64_t token = real ? c.token_at(order, group, position) : 0;
  const int64_t used = offsets[c.experts];

  for (int k = 0; k < c.top_k; ++k) {
    for (int i = threadIdx.x; i < warps * c.experts; i += kChunk) {
      in_warp[i / c.experts][i % c.experts] = 0;
    }
    __syncthreads();
    const int expert = real ? choice[token * c.top_k + k] : -1;
    const unsigned same = __match_any_sync(kAll, expert);
    int slot = __popc(same & ((1u << lane) - 1));  // wanted by earlier positions of this warp
    if (real && slot == 0) {
      in_warp[warp][expert] = __popc(same);
    }
    __syncthreads();
    if (real) {
      for (int w = 0; w < warp; ++w) {
        slot += in_warp[w][expert];
      }
      slot += first_slot[c.count_index(group, expert, k, chunk)];
      const bool kept = slot < capacity;
      const int64_t row = kept ? first_row[expert * c.groups + group] + slot : -1;
      out.place[token * c.top_k + k] = row;
      if (kept) {
        out.put(row, token, expert, gates[token * c.experts + expert]);
      }
      // The tail beyond the rows in use: as many indices as choices, so each choice takes care of one.
      const int64_t index = (group * c.tokens + position) * c.top_k + k;
      if (index >= used) {
        out.put(index, 0, c.experts - 1, scalar_t(0));
      }
    }
    __syncthreads();
  }
}

// Where experts choose: a thread for each expert and token, which it takes if its rank is below the capacity.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) take_rows(
    Chunks c, int64_t capacity, const scalar_t* __restrict__ gates, const int32_t* __restrict__ order,
    int64_t* offsets, Rows<scalar_t> out) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;  // [G, E, rank]
  if (item < c.groups * c.experts * c.tokens) {
    const int64_t pair = item / c.tokens, rank = item % c.tokens, group = pair / c.experts;
    const int expert = int(pair % c.experts);
    const int64_t token = group * c.tokens + order[item];
    const bool taken = rank < capacity;
    const int64_t row = taken ? (expert * c.groups + group) * capacity + rank : -1;
    out.place[token * c.experts + expert] = row;
    if (taken) {
      out.put(row, token, expert, gates[token * c.experts + expert]);
    }
  }
  if (item <= c.experts) {
    offsets[item] = item * c.groups * capacity;
  }
}

}  // namespace m2mkd
