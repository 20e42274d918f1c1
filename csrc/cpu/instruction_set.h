// Compiles a kernel twice, for any processor of the platform and for AVX2 with FMA, and runs what the processor has.
#pragma once

namespace m2mkd {

#if defined(__x86_64__) && defined(__GNUC__)

// Everything that the kernel calls is compiled into it, and so for the same instructions.
template <typename Kernel>
__attribute__((target("avx2,fma"), flatten, noinline)) void run_with_avx2(const Kernel& kernel) {
  kernel();
}

inline bool has_avx2() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
}

// Calls kernel(), compiled for the best instructions at hand. To be called inside parallel_for: what is called through
// a pointer is not compiled along.
template <typename Kernel>
void with_best_instructions(const Kernel& kernel) {
  has_avx2() ? run_with_avx2(kernel) : kernel();
}

#else

template <typename Kernel>
void with_best_instructions(const Kernel& kernel) {
  kernel();
}

#endif

// Eight floats or four doubles. Compilers without such registers take several smaller ones.
template <typename scalar_t>
struct VectorOf {
  typedef scalar_t type __attribute__((vector_size(32), aligned(sizeof(scalar_t)), may_alias));
  static constexpr int size = 32 / sizeof(scalar_t);
};

}  // namespace m2mkd
