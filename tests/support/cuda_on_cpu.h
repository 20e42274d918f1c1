// Runs the kernels of a .cu file on the CPU, one thread block at a time and one fiber for each of its threads, so that
// their logic is tested where there is no GPU. Barriers, shuffles and votes need every thread of the block or warp, as
// on a GPU; one that never comes hangs here, too. Timing, memory spaces and memory ordering are not imitated.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)
#define STD_CUDA_CHECK(call) (call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

using cudaStream_t = void*;
using std::erfc;
using std::exp;
using std::isinf;
using std::isnan;
using std::log;
using std::memcpy;
using std::min;
using std::sqrt;

template <typename scalar_t>
scalar_t cospi(scalar_t x) {
  return scalar_t(std::cos(M_PI * double(x)));
}
template <typename scalar_t>
scalar_t sinpi(scalar_t x) {
  return scalar_t(std::sin(M_PI * double(x)));
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline int cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return 0;
}

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

// Lives on for the next block. makecontext starts it; from then on jumps switch, which make no system calls.
struct Fiber {
  ucontext_t context;
  jmp_buf stopped_at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool started = false, done = false;
};

inline jmp_buf scheduler;
inline std::deque<Fiber> fibers;  // which do not move when there are more
inline unsigned running;
inline std::function<void()> kernel;
inline int launches = 0;
inline bool backwards = false;  // blocks and threads take turns from the last to the first

__attribute__((noinline)) inline void pause() {
  if (_setjmp(fibers[running].stopped_at) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void run_fiber() {
  for (;;) {
    kernel();
    fibers[running].done = true;
    pause();
  }
}

// Until it pauses.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.stopped_at, 1);
  }
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
  setcontext(&fiber.context);
}

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  void wait() {
    const unsigned round = round_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
    }
    while (round_ == round) {
      pause();
    }
  }

 private:
  unsigned threads_, arrived_ = 0, round_ = 0;
};

struct Warp {
  Barrier barrier{32};
  uint64_t value[32];

  // Calls read() between two barriers, when every lane has given its value.
  template <typename T, typename Read>
  auto exchange(T mine, const Read& read) {
    uint64_t bits = 0;
    std::memcpy(&bits, &mine, sizeof(T));
    value[threadIdx.x % 32] = bits;
    barrier.wait();
    const auto result = read();
    barrier.wait();
    return result;
  }

  template <typename T>
  T from(unsigned lane, T mine) {
    return exchange(mine, [&] {
      T other;
      std::memcpy(&other, &value[lane], sizeof(T));
      return other;
    });
  }
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / 32) {}
  Barrier barrier;
  std::vector<Warp> warps;
};
inline Block* block;

inline Warp& warp() {
  return block->warps[threadIdx.x / 32];
}

inline void run_block(unsigned number, unsigned threads) {
  Block mine(threads);
  block = &mine;
  blockIdx.x = number;
  if (fibers.size() < threads) {
    fibers.resize(threads);
  }
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].done = false;
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      running = backwards ? threads - 1 - turn : turn;
      if (!fibers[running].done) {
        any = true;
        threadIdx.x = running;
        resume(fibers[running]);
      }
    }
  }
}

// kernel<<<blocks, threads, 0, stream>>>(arguments...) is rewritten to launch(kernel, blocks, threads)(arguments...).
template <typename Kernel>
auto launch(Kernel* function, unsigned blocks, unsigned threads) {
  return [=](auto... arguments) {
    kernel = [=] { function(arguments...); };
    gridDim.x = blocks;
    ++launches;
    for (unsigned turn = 0; turn < blocks; ++turn) {
      run_block(backwards ? blocks - 1 - turn : turn, threads);
    }
  };
}

}  // namespace cuda_on_cpu

// For the tests: the launches since the last call.
extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launches() {
  return std::exchange(cuda_on_cpu::launches, 0);
}
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_backwards(bool backwards) {
  cuda_on_cpu::backwards = backwards;
}

inline void __syncthreads() {
  cuda_on_cpu::block->barrier.wait();
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, int = 32) {
  return cuda_on_cpu::warp().from(threadIdx.x % 32 ^ mask, value);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_cpu::warp().from(lane >= distance ? lane - distance : lane, value);
}
template <typename T>
T __shfl_sync(unsigned, T value, unsigned lane, unsigned width = 32) {
  return cuda_on_cpu::warp().from(threadIdx.x % 32 / width * width + lane, value);
}
inline unsigned __match_any_sync(unsigned, int value) {
  auto& warp = cuda_on_cpu::warp();
  return warp.exchange(value, [&] {
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      same |= unsigned(int(warp.value[lane]) == value) << lane;
    }
    return same;
  });
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline void __threadfence() {}
inline int32_t atomicAdd(int32_t* target, int32_t value) {
  return std::exchange(*target, *target + value);
}

// The pieces of CUB that the kernels use.
namespace cub {

template <typename Key, int THREADS, int ITEMS, typename Value>
class BlockRadixSort {
 public:
  using TempStorage = std::vector<std::pair<Key, Value>>;
  explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}

  // Thread t gives items t * ITEMS ... and gets those of ranks t, t + THREADS, ...
  void SortBlockedToStriped(Key (&key)[ITEMS], Value (&value)[ITEMS]) {
    if (threadIdx.x == 0) {
      storage_.resize(THREADS * ITEMS);
    }
    __syncthreads();
    for (int i = 0; i < ITEMS; ++i) {
      storage_[threadIdx.x * ITEMS + i] = {key[i], value[i]};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const auto less = [](const auto& a, const auto& b) { return a.first < b.first; };
      std::stable_sort(storage_.begin(), storage_.end(), less);
    }
    __syncthreads();
    for (int i = 0; i < ITEMS; ++i) {
      std::tie(key[i], value[i]) = storage_[threadIdx.x + i * THREADS];
    }
  }

 private:
  TempStorage& storage_;
};

template <typename T, int THREADS>
class BlockScan {
 public:
  using TempStorage = std::vector<T>;
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T value, T& before, T& total) {
    if (threadIdx.x == 0) {
      storage_.assign(THREADS, 0);
    }
    __syncthreads();
    storage_[threadIdx.x] = value;
    __syncthreads();
    before = total = 0;
    for (unsigned i = 0; i < THREADS; ++i) {
      before += i < threadIdx.x ? storage_[i] : 0;
      total += storage_[i];
    }
    __syncthreads();
  }

 private:
  TempStorage& storage_;
};

struct DeviceRadixSort {
  template <typename Key, typename Value>
  static int SortPairs(
      void* temporary, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values, Value* sorted_values,
      int64_t count, int first_bit, int end_bit, cudaStream_t) {
    bytes = 1;
    if (temporary == nullptr) {
      return 0;
    }
    const auto digits = [&](int64_t i) {
      return end_bit < int(8 * sizeof(Key)) ? (keys[i] & ((Key(1) << end_bit) - 1)) >> first_bit : keys[i] >> first_bit;
    };
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return digits(a) < digits(b); });
    for (int64_t i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return 0;
  }
};

}  // namespace cub

namespace m2mkd {

struct LaunchContext {
  explicit LaunchContext(const torch::stable::Tensor&) {}
  cudaStream_t stream() const {
    return nullptr;
  }
};

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace m2mkd
