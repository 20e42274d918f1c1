// m2mkd_fast._host: facts about this build and this processor, for `python -m m2mkd_fast.info` and for run-time
// dispatch; and what runs on the host alone (pack_tiles.cpp).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

void define_pack_tiles(pybind11::module_& m);  // pack_tiles.cpp

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// The M2MKD_* strings are set by setup.py.
std::map<std::string, std::string> build_facts() {
  return {
      {"compiler", kCompiler},
      {"flags", M2MKD_COMPILE_FLAGS},
      {"torch", M2MKD_TORCH_VERSION},
      {"torch_target", M2MKD_TORCH_TARGET},
      {"python", PY_VERSION},
      {"cuda", M2MKD_CUDA},
  };
}

// Instruction sets that the processor and the operating system offer, by the kernel-independent name.
std::map<std::string, bool> cpu_facts() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_cpu_init();
  return {
      {"avx2", __builtin_cpu_supports("avx2") > 0},
      {"fma", __builtin_cpu_supports("fma") > 0},
      {"avx512f", __builtin_cpu_supports("avx512f") > 0},
      {"avx512bw", __builtin_cpu_supports("avx512bw") > 0},
      {"avx512vnni", __builtin_cpu_supports("avx512vnni") > 0},
#if !defined(__clang__) && __GNUC__ >= 11
      {"avx512bf16", __builtin_cpu_supports("avx512bf16") > 0},
      {"amx_tile", __builtin_cpu_supports("amx-tile") > 0},
      {"amx_bf16", __builtin_cpu_supports("amx-bf16") > 0},
#endif
  };
#elif defined(__aarch64__)
  return {{"neon", true}};
#else
  return {};
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about this build and this processor, and graph tools.";
  m.def("build_facts", &build_facts, "What built the extension modules, and with which options.");
  m.def("cpu_facts", &cpu_facts, "Instruction sets that the processor offers.");
  define_pack_tiles(m);
}
