"""Builds the kernels of a .cu file for the CPU, with `cuda_on_cpu.h` in place of CUDA, as a library of its own."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\b\w+(?:<[^;<>]*>)?)\s*<<<(.+?), (\w+), 0, stream>>>\(")


class CudaOnCpu:
    """Private ops of a .cu file, for CPU tensors."""

    def __init__(self, ops: torch._ops._OpNamespace, library: Path) -> None:
        self.ops, self._library = ops, ctypes.CDLL(str(library))

    def launches(self) -> int:
        """How many kernels were launched since the last call."""
        return self._library.cuda_on_cpu_launches()

    @contextmanager
    def backwards(self) -> Iterator[None]:
        """Blocks, and the threads of a block, take turns from the last to the first."""
        self._library.cuda_on_cpu_backwards(True)
        try:
            yield
        finally:
            self._library.cuda_on_cpu_backwards(False)


def with_local_headers(text: str, folder: Path, seen: set[str] | None = None) -> str:
    """The text with the headers of the folder in it, each once, and with `cuda_on_cpu.h` for launch.h and CUB."""
    seen = set() if seen is None else seen

    def header(match: re.Match) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        if name == "launch.h":
            return f'#include "{Path(__file__).with_suffix(".h")}"'
        return with_local_headers((folder / name).read_text().replace("#pragma once", ""), folder, seen)

    text = re.sub(r"^#include <cub/.*>$", "", text, flags=re.MULTILINE)
    return re.sub(r'^#include "([\w.]+)"$', header, text, flags=re.MULTILINE)


def load_cuda_on_cpu(source: Path, folder: Path) -> CudaOnCpu:
    """Compile and load `source`."""
    library = f"m2mkd_{source.stem}_on_cpu"
    schemas = (ROOT / "csrc/registration.cpp").read_text()
    schemas = schemas[: schemas.index('extern "C"')].replace("#include <Python.h>", "")
    kernels = with_local_headers(source.read_text(), source.parent)
    kernels, launches = LAUNCH.subn(r"cuda_on_cpu::launch(\1, \2, \3)(", kernels)
    assert launches > 0
    assert "<<<" not in kernels
    text = schemas.replace("STABLE_TORCH_LIBRARY(m2mkd_fast,", f"STABLE_TORCH_LIBRARY({library},")
    text += kernels.replace("(m2mkd_fast, CUDA,", f"({library}, CPU,")

    generated, built = folder / f"{library}.cpp", folder / f"{library}.so"
    generated.write_text(text)
    torch_home = Path(torch.__file__).parent
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-o",
        built,
        generated,
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", source.parent, "-I", torch_home / "include"]
    command += ["-L", torch_home / "lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(command, check=True)
    torch.ops.load_library(built)
    return CudaOnCpu(getattr(torch.ops, library), built)
