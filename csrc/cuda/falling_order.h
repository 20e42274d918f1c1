// The stable falling order of the values of many segments, none of them negative; NaN comes first, as in torch.sort.
//
// A segment that fits is sorted by one block, all of them in one launch. Longer ones are sorted together, by the
// device-wide radix sort with the number of the segment in front of the key; that sort neither waits for the device nor
// looks at what it sorts, so a CUDA graph can hold it.
#pragma once

#include <cstdint>
#include <cstring>

#include <cub/block/block_radix_sort.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "launch.h"
#include "workspace.h"

namespace m2mkd {

constexpr int kSortThreads = 1024, kSortItems = 4;  // of a block; V-MoE groups 8 images of 197 tokens: 1,576
constexpr int kKeyThreads = 256;

// Value i of segment s is values[(s / inner * length + i) * stride + s % inner]: `inner` segments lie interleaved.
struct Segments {
  int64_t count;
  int length, inner, stride;

  __device__ int64_t index(int64_t segment, int i) const {
    return (segment / inner * length + i) * stride + segment % inner;
  }
};

template <typename scalar_t>
struct SortKey;
template <>
struct SortKey<float> {
  using Bits = uint32_t;
  using WithSegment = uint64_t;
};
template <>
struct SortKey<double> {
  using Bits = uint64_t;
  using WithSegment = unsigned __int128;
};

// Unsigned, in rising order where the values fall: the bits of floats that are not negative rise with them.
template <typename scalar_t>
__device__ typename SortKey<scalar_t>::Bits falling_key(scalar_t value) {
  typename SortKey<scalar_t>::Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  return isnan(value) ? 0 : ~bits;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSortThreads)
    sort_in_block(Segments segments, const scalar_t* __restrict__ values, int32_t* order) {
  using Bits = typename SortKey<scalar_t>::Bits;
  using Sort = cub::BlockRadixSort<Bits, kSortThreads, kSortItems, int32_t>;
  __shared__ typename Sort::TempStorage storage;
  Bits key[kSortItems];
  int32_t index[kSortItems];
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    index[i] = int(threadIdx.x) * kSortItems + i;
    // Beyond the end the key of 0, which stays behind zeros of lower index.
    key[i] = index[i] < segments.length ? falling_key(values[segments.index(blockIdx.x, index[i])]) : ~Bits(0);
  }
  Sort(storage).SortBlockedToStriped(key, index);
#pragma unroll
  for (int i = 0; i < kSortItems; ++i) {
    const int rank = int(threadIdx.x) + i * kSortThreads;
    if (rank < segments.length) {
      order[int64_t(blockIdx.x) * segments.length + rank] = index[i];
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKeyThreads) make_sort_keys(
    Segments segments, const scalar_t* __restrict__ values, typename SortKey<scalar_t>::WithSegment* keys,
    int32_t* indices) {
  using Key = typename SortKey<scalar_t>::WithSegment;
  const int64_t item = int64_t(blockIdx.x) * kKeyThreads + threadIdx.x;
  if (item < segments.count * segments.length) {
    const int64_t segment = item / segments.length;
    const int index = int(item % segments.length);
    keys[item] = Key(segment) << (8 * sizeof(scalar_t)) | falling_key(values[segments.index(segment, index)]);
    indices[item] = index;
  }
}

// order[s, rank] = index of the value within its segment.
template <typename scalar_t>
void falling_order(
    const Segments& segments, const scalar_t* values, int32_t* order, const torch::stable::Tensor& like,
    cudaStream_t stream) {
  if (segments.length <= kSortThreads * kSortItems) {
    sort_in_block<scalar_t><<<blocks_for(segments.count, 1), kSortThreads, 0, stream>>>(segments, values, order);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  using Key = typename SortKey<scalar_t>::WithSegment;
  const int64_t items = segments.count * segments.length;
  int bits = 8 * sizeof(scalar_t);
  for (int64_t last = segments.count - 1; last > 0; last /= 2) {
    ++bits;
  }
  const auto sort = [&](void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys, const int32_t* indices) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        temporary, bytes, keys, sorted_keys, indices, order, items, 0, bits, stream));
  };
  size_t bytes = 0;
  sort(nullptr, bytes, nullptr, nullptr, nullptr);
  Workspace space;
  const auto keys = space.reserve<Key>(items), sorted_keys = space.reserve<Key>(items);
  const auto indices = space.reserve<int32_t>(items);
  const auto temporary = space.reserve<char>(int64_t(bytes));
  space.allocate(like);
  make_sort_keys<scalar_t><<<blocks_for(items, kKeyThreads), kKeyThreads, 0, stream>>>(
      segments, values, space[keys], space[indices]);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sort(space[temporary], bytes, space[keys], space[sorted_keys], space[indices]);
}

}  // namespace m2mkd
