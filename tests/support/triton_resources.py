"""What a Triton kernel takes of a GPU, told without one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def resource_usage(
    kernel: Any,
    types: Mapping[str, str | tuple[str, ...]],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    num_warps: int,
    architecture: int,
    folder: Path,
    num_stages: int | None = None,
) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel, compiled as a call would compile it.

    Args:
        kernel: the function under ``triton.jit``.
        types: of its arguments, a tuple for an argument that is one; 32-bit integers where not given.
        constants: the values of arguments that are constants of the compiler.
        aligned: numbers that are multiples of 16, as pointers are in any case.
        num_warps: warps of a program.
        architecture: 80 or 90.
        folder: for the compiled file.
        num_stages: of loops whose loads run ahead; the compiler's own number where not given.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    multiples_of_16: list[tuple[int, ...]] = []
    for number, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            multiples_of_16 += [(number, item) for item in range(len(kind))]
        elif kind.startswith("*") or (name in aligned and kind != "constexpr"):
            multiples_of_16.append((number,))
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=dict(constants),
            attrs={place: [["tt.divisibility", 16]] for place in multiples_of_16},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages}),
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    assert len(found) == 4, text
    # What Triton asks for at launch the binary does not say.
    return {**found, "SHARED": max(found["SHARED"], compiled.metadata.shared)}
