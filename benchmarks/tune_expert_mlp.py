"""Measure tiles of the Triton kernels of expert_mlp on this GPU, and write the best ones into the table.

For each kernel every candidate runs in the pass it belongs to, forward or backward, with the best tiles so far for the
others, in turns with the tiles that are best so far; it takes their place where the whole confidence interval of the
ratio says that it is faster. Then forward and backward together are compared with PyTorch's own products, which is what
`prefers_torch` reads. All is measured at the sizes of V-MoE, with balanced routing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from _paired import Ratio, paired_ratio
from torch import Tensor
from triton.runtime.errors import OutOfResources

from m2mkd_fast.backend import use_backend
from m2mkd_fast.kernels import expert_mlp as kernels
from m2mkd_fast.kernels.expert_mlp import KERNELS, TABLE, Tile, backward, forward, tiles_of
from m2mkd_fast.ops.expert_mlp import expert_mlp
from m2mkd_fast.ops.route import Assignment, route

# rows, columns, step, group, slices, warps, stages, programs
HALF = {
    90: [
        Tile(128, 128, 64, 8, 4, 8, 3, 2),
        Tile(128, 128, 64, 8, 4, 4, 3, 2),
        Tile(128, 128, 64, 8, 2, 4, 3, 2),
        Tile(128, 128, 64, 8, 4, 8, 4, 1),
        Tile(128, 256, 64, 8, 4, 8, 3, 1),
        Tile(128, 256, 64, 4, 4, 8, 4, 1),
        Tile(256, 128, 64, 4, 4, 8, 3, 1),
        Tile(64, 256, 64, 16, 4, 4, 3, 1),
        Tile(128, 64, 64, 8, 2, 4, 3, 2),
    ],
    80: [
        Tile(128, 128, 32, 8, 4, 8, 4, 2),
        Tile(128, 128, 32, 8, 4, 4, 4, 2),
        Tile(128, 128, 64, 8, 4, 8, 3, 1),
        Tile(128, 128, 32, 16, 4, 8, 5, 1),
        Tile(128, 256, 32, 8, 4, 8, 3, 1),
        Tile(256, 128, 32, 4, 4, 8, 3, 1),
        Tile(128, 64, 32, 8, 4, 4, 4, 2),
        Tile(64, 128, 32, 8, 4, 4, 4, 2),
    ],
}
FLOAT32 = [
    Tile(64, 64, 16, 8, 2, 8, 2, 2),
    Tile(64, 64, 32, 8, 2, 8, 2, 2),
    Tile(128, 64, 16, 8, 4, 8, 2, 1),
    Tile(128, 64, 16, 8, 4, 8, 3, 1),
    Tile(64, 32, 16, 8, 2, 4, 3, 2),
]


@dataclass(frozen=True)
class Size:
    name: str
    images: int
    tokens: int
    width: int
    experts: int
    top_k: int


SIZES = [
    Size("V-MoE-S/32", 256, 50, 512, 8, 2),
    Size("V-MoE-B/16", 128, 197, 768, 8, 2),
    Size("V-MoE-B/16, one image", 1, 197, 768, 8, 2),
    Size("V-MoE-L/16", 64, 197, 1024, 8, 2),
]
TUNED_AT = SIZES[1]


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    assignment: Assignment
    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    grad: Tensor
    seed: Tensor
    gated: bool

    def arguments(self, dropout: float) -> tuple[Any, ...]:
        activation = "geglu" if self.gated else "gelu"
        return (self.x, *self.assignment[:5], *self.parameters, activation, dropout, 0.0, self.seed)


def inputs_of(size: Size, gated: bool, dtype: torch.dtype, device: str = "cuda") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    hidden, tokens = 4 * size.width, size.images * size.tokens
    made = 2 * hidden if gated else hidden

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    assignment = route(torch.randn(1, tokens, size.experts, generator=generator, device=device), top_k=size.top_k)
    parameters = (
        random(size.experts, made, size.width, scale=size.width**-0.5),
        random(size.experts, made),
        random(size.experts, size.width, hidden, scale=hidden**-0.5),
        random(size.experts, size.width),
    )
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return Inputs(random(tokens, size.width), assignment, parameters, random(tokens, size.width), seed, gated)


def candidates(kernel: str, architecture: int, half: bool) -> Iterator[Tile]:
    """The gated product of the first layer makes two tiles of columns at once: half as many columns each."""
    for tile in HALF[architecture] if half else FLOAT32:
        if kernel == "up_gated":
            tile = tile._replace(columns=tile.columns // 2, slices=max(tile.slices // 2, 1))
        if kernel == "grad_matrix":  # reads indices first, which takes stages of its own
            tile = tile._replace(slices=1, stages=2 * tile.stages - 1)
        yield tile


def passes(kernel: str, inputs: Inputs) -> Callable[[dict[str, Tile]], tuple[Tensor, ...]]:
    """The pass a kernel belongs to, with tiles of one's choice."""
    arguments = inputs.arguments(0.1 if kernel == "grad_hidden_dropout" else 0.0)
    if kernel in ("up", "up_gated", "down"):
        return lambda tiles: forward(*arguments, True, tiles=tiles)
    _, preactivation = forward(*arguments, True)
    return lambda tiles: backward(inputs.grad, preactivation, *arguments, True, True, tiles=tiles)


def tune(
    kernel: str,
    best: dict[str, Tile],
    run: Callable[[dict[str, Tile]], tuple[Tensor, ...]],
    found: list[Tile],
    pairs: int,
) -> tuple[Tile, float]:
    """The best tile of one kernel, and the milliseconds of its pass."""
    tile = best[kernel]
    milliseconds = ratio_of(kernel, run, best, best, pairs).candidate_ms
    for candidate in found:
        if candidate == tile:
            continue
        before, after = {**best, kernel: tile}, {**best, kernel: candidate}
        try:
            check_same(run(before), run(after))
            ratio = ratio_of(kernel, run, before, after, pairs)
        except OutOfResources as error:
            print(f"{kernel}: {tuple(candidate)} does not fit: {error}", flush=True)
            continue
        print(f"{kernel}: {tuple(candidate)} {ratio}", flush=True)
        if ratio.low > 1.0:
            tile, milliseconds = candidate, ratio.candidate_ms
    return tile, milliseconds


def check_same(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """A tile that the compiler gets wrong is no candidate, however fast."""
    for theirs, ours in zip(expected, found, strict=True):
        error = (ours.float() - theirs.float()).abs().max() if theirs.numel() else torch.zeros(())
        assert error <= 1e-2 * theirs.float().abs().max(), f"an error of {error:.2e}"


def ratio_of(
    name: str,
    run: Callable[[dict[str, Tile]], tuple[Tensor, ...]],
    before: dict[str, Tile],
    after: dict[str, Tile],
    pairs: int,
) -> Ratio:
    return paired_ratio(
        name, partial(run, before), partial(run, after), pairs=pairs, synchronize=torch.cuda.synchronize
    )


def compare(size: Size, gated: bool, dtype: torch.dtype, pairs: int) -> Ratio:
    """Forward and backward: PyTorch's products, then these kernels."""
    inputs = inputs_of(size, gated, dtype)
    leaves = [tensor.requires_grad_() for tensor in (inputs.x, *inputs.parameters)]

    def run(backend: str) -> None:
        with use_backend(expert_mlp=backend):
            activation = "geglu" if gated else "gelu"
            out = expert_mlp(inputs.x, inputs.assignment, *inputs.parameters, activation=activation)
        torch.autograd.grad(out, leaves, inputs.grad)

    return paired_ratio(
        f"{size.name}, {'gated' if gated else 'plain'}, {dtype}",
        partial(run, "torch"),
        partial(run, "triton"),
        pairs=pairs,
        synchronize=torch.cuda.synchronize,
    )


def facts() -> dict[str, Any]:
    """Where numbers come from; `measured` of an entry has the milliseconds beside them."""
    ran = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "commit": ran.stdout.strip() or None,
    }


def write_table(
    path: Path,
    architecture: int,
    half: bool,
    tiles: dict[str, tuple[Tile, float]],
    comparisons: list[dict[str, Any]],
    where: dict[str, Any],
) -> None:
    """Put the entries of one architecture and precision into the table, in place of those that were there; the others
    stay. One entry a line, so that a difference can be read."""
    table = json.loads(path.read_text())
    same = {"architecture": architecture, "half": half}
    for kernel, (tile, milliseconds) in tiles.items():
        entry = {**same, "kernel": kernel, **tile._asdict(), "measured": {**where, "milliseconds": milliseconds}}
        places = [n for n, old in enumerate(table["tiles"]) if {**old, **same, "kernel": kernel} == old]
        for place in reversed(places):
            del table["tiles"][place]
        table["tiles"].insert(places[0] if places else len(table["tiles"]), entry)
    table["comparisons"] = [old for old in table["comparisons"] if {**old, **same} != old]
    table["comparisons"] += [{**same, **comparison, "measured": where} for comparison in comparisons]

    def lines(entries: list[dict[str, Any]]) -> str:
        return ",".join(f"\n    {json.dumps(entry)}" for entry in entries) + ("\n  " if entries else "")

    lists = [f'  "{name}": [{lines(entries)}]' for name, entries in table.items()]
    path.write_text("{\n" + ",\n".join(lists) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; tiles can only be measured on one")
    major, minor = torch.cuda.get_device_capability()
    architecture, dtype = 10 * major + minor, getattr(torch, options.dtype)
    if architecture not in HALF:
        raise SystemExit(f"there are no candidates for sm_{architecture}; those for {sorted(HALF)} are in HALF")
    half = dtype != torch.float32
    where, best, measured = facts(), dict(tiles_of(architecture, half)), {}
    for gated in (False, True):
        inputs = inputs_of(TUNED_AT, gated, dtype)
        for kernel in KERNELS:
            if kernel.endswith("_gated") == gated:
                found = list(candidates(kernel, architecture, half))
                measured[kernel] = tune(kernel, best, passes(kernel, inputs), found, options.pairs)
                best[kernel] = measured[kernel][0]
    write_table(TABLE, architecture, half, measured, [], where)
    kernels._table.cache_clear()  # the comparison runs with what was found
    tiles_of.cache_clear()
    comparisons = []
    for gated in (False, True):
        for size in SIZES:
            ratio = compare(size, gated, dtype, options.pairs)
            print(ratio, flush=True)
            comparisons.append(
                {
                    "gated": gated,
                    "rows_per_expert": size.images * size.tokens * size.top_k / size.experts,
                    "width": size.width,
                    "hidden": 4 * size.width,
                    "outputs": size.width,
                    "torch_ms": ratio.baseline_ms,
                    "triton_ms": ratio.candidate_ms,
                }
            )
    write_table(TABLE, architecture, half, measured, comparisons, where)


if __name__ == "__main__":
    main()
