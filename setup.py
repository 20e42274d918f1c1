"""Extension modules; everything else is in pyproject.toml.

Environment:
    M2MKD_BUILD_CUDA      auto (default): build the CUDA kernels where a CUDA torch and a matching CUDA toolkit are
    found;
                          1: fail where they are not; 0: leave them out.
    TORCH_CUDA_ARCH_LIST  architectures to build for, "8.0;9.0" if unset and no GPU is visible.
    MAX_JOBS              compiler processes at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI as of torch 2.10


def find_cuda_home() -> Path | None:
    """The CUDA toolkit with headers and libraries.

    torch takes the folder above the nvcc on the PATH, which is wrong where that nvcc is a script that calls the real
    one; nvcc itself, asked for a dry run, tells where it lives.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        candidates += [top.group(1).strip() if top else None, str(Path(nvcc).resolve().parent.parent)]
    candidates += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for candidate in candidates:
        if not candidate:
            continue
        home = Path(os.path.normpath(candidate))
        libraries = any((home / name).is_dir() for name in ("lib64", "lib", "lib/x64"))
        if (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file() and libraries:
            return home
    return None


def cuda_version(home: Path) -> str:
    output = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    return release.group(1) if release else "unknown"


def choose_cuda(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and the reason why not."""
    wish = os.environ.get("M2MKD_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"M2MKD_BUILD_CUDA is {wish!r}; expected auto, 1 or 0")
    if wish == "0":
        return None, "switched off by M2MKD_BUILD_CUDA=0"
    home = find_cuda_home() if torch_cuda else None
    if torch_cuda is None:
        reason = "this torch is built without CUDA"
    elif home is None:
        reason = "no CUDA toolkit with nvcc, headers and libraries was found; set CUDA_HOME"
    elif cuda_version(home).split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"the toolkit in {home} is CUDA {cuda_version(home)}, torch needs {torch_cuda}"
    else:
        return home, f"CUDA {cuda_version(home)} in {home}"
    if wish == "1":
        sys.exit(f"M2MKD_BUILD_CUDA=1, but {reason}")
    return None, reason


def extensions() -> tuple[list, dict]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"m2mkd_fast: no C++ compiler ({compiler}); installing pure Python, which runs the reference operators.")
        return [], {}
    try:
        import torch
    except ImportError:
        print("m2mkd_fast: torch is not importable here; installing pure Python, which runs the reference operators.")
        return [], {}

    cuda_home, cuda = choose_cuda(torch.version.cuda)
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = str(cuda_home)  # read by torch.utils.cpp_extension when it is imported
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0"
        cuda += f" for {os.environ.get('TORCH_CUDA_ARCH_LIST') or 'the visible GPU'}"
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    print(f"m2mkd_fast: torch {torch.__version__}, {compiler}; CUDA kernels: {cuda}")
    # Without traps and errno, which nobody reads here, compilers can vectorise; no result changes.
    flags = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]

    def sources(*patterns: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))

    headers = sources("*.h", "cpu/*.h", "cuda/*.h")
    modules = [
        CppExtension(
            "m2mkd_fast._C",
            sources("registration.cpp", "cpu/*.cpp"),
            depends=headers,
            extra_compile_args={"cxx": flags + stable},
            py_limited_api=True,
        ),
        CppExtension(
            "m2mkd_fast._host",
            sources("host/*.cpp"),
            extra_compile_args={"cxx": flags},
            define_macros=[
                ("M2MKD_COMPILE_FLAGS", quoted(" ".join(flags))),
                ("M2MKD_TORCH_VERSION", quoted(torch.__version__)),
                ("M2MKD_TORCH_TARGET", quoted(TORCH_TARGET)),
                ("M2MKD_CUDA", quoted(cuda)),
            ],
        ),
    ]
    if cuda_home is not None:
        cuda_flags = [*stable, "-DUSE_CUDA"]
        modules.append(
            CUDAExtension(
                "m2mkd_fast._C_cuda",
                sources("registration_cuda.cpp", "cuda/*.cu"),
                depends=headers,
                extra_compile_args={"cxx": flags + cuda_flags, "nvcc": ["-O3", "-lineinfo", *cuda_flags]},
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": BuildExtension}


def quoted(text: str) -> str:
    """A C string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    ext_modules, cmdclass = extensions()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
