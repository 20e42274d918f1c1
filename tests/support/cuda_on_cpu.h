// Runs the kernels of a .cu file on the CPU, one thread block at a time and one fiber for each of its threads, so that their
// logic is tested where there is no GPU. Barriers, shuffles and votes need every thread of the block or warp, as on a GPU;
// one that never comes hangs here, too. Timing, memory spaces and memory ordering are not imitated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(threads)
#define STD_CUDA_CHECK(call) (call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

using cudaStream_t = void*;
using std::exp;
using std::isnan;
using std::min;

inline int cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return 0;
}

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned running;
inline std::function<void()> kernel;

inline void pause() {
  swapcontext(&fibers[running].context, &scheduler);
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

inline void run_fiber() {
  kernel();
  fibers[running].done = true;
  pause();
}

inline void run_block(unsigned number, unsigned threads) {
  Block mine(threads);
  block = &mine;
  blockIdx.x = number;
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (running = 0; running < threads; ++running) {
      if (!fibers[running].done) {
        any = true;
        threadIdx.x = running;
        swapcontext(&scheduler, &fibers[running].context);
      }
    }
  }
}

// kernel<<<blocks, threads, 0, stream>>>(arguments...) is rewritten to launch(kernel, blocks, threads)(arguments...).
template <typename Kernel>
auto launch(Kernel* function, unsigned blocks, unsigned threads) {
  return [=](auto... arguments) {
    kernel = [=] { function(arguments...); };
    for (unsigned number = 0; number < blocks; ++number) {
      run_block(number, threads);
    }
  };
}

}  // namespace cuda_on_cpu

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
T __shfl_sync(unsigned, T value, unsigned lane) {
  return cuda_on_cpu::warp().from(lane, value);
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
inline int32_t atomicAdd(int32_t* target, int32_t value) {
  return std::exchange(*target, *target + value);
}

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
