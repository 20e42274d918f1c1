"""Builds the kernels of a .cu file for the CPU, with `cuda_on_cpu.h` in place of CUDA, as a library of its own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\b\w+(?:<[^;<>]*>)?)<<<(.+?), (\w+), 0, stream>>>\(")


def load_cuda_on_cpu(source: Path, folder: Path) -> torch._ops._OpNamespace:
    """Compile and load `source`; returns the namespace with its ops, implemented for CPU tensors."""
    library = f"m2mkd_{source.stem}_on_cpu"
    schemas = (ROOT / "csrc/registration.cpp").read_text()
    schemas = schemas[: schemas.index('extern "C"')].replace("#include <Python.h>", "")
    kernels = source.read_text().replace('#include "launch.h"', f'#include "{Path(__file__).with_suffix(".h")}"')
    kernels, launches = LAUNCH.subn(r"cuda_on_cpu::launch(\1, \2, \3)(", kernels)
    assert launches == source.read_text().count("<<<") > 0
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
    return getattr(torch.ops, library)
