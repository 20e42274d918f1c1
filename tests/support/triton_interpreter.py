"""Kernels in Triton's interpreter: a process of their own for it, and what it needs to compute as a GPU does.

Triton reads TRITON_INTERPRET when a kernel is defined. So a test file runs once more in another process, where its
tests get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
in_another_process = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")


def run_in_the_interpreter(file: str, at_least: int) -> None:
    """Run the tests of a file that need no GPU in a process with the interpreter; as many as given have to pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "M2MKD_BACKEND": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) >= at_least, ran.stdout[-2000:]


@contextmanager
def as_a_gpu_does() -> Iterator[None]:
    """bfloat16 as a GPU does it, and calls without a search.

    - The interpreter keeps bfloat16 as the integers of their bits. It multiplies those integers, and cuts off what does
      not fit into a bfloat16 instead of rounding it.
    - For every call of a function it looks through all of `triton.language` for what to replace, again and again; for a
      kernel's own functions that is done when the kernel starts, for those of Triton it stays done.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    searched = set()

    def rounding_cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        bits = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def real_product(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
        return multiply(self, widened(a), widened(b), *others)

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in searched:
            interpreter._patch_lang(self.fn)
            searched.add(module)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        patch.setattr(InterpreterBuilder, "create_dot", real_product)
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
