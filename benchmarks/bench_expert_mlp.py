"""Experts of a mixture: our kernels against bare matrix products, loops over experts, grouped products, a dense MLP.

All of them get the same tokens and the same assignment, and return the same sums; a mixture's whole layer, with its
router, is timed by ``bench_vision_moe.py``. On a GPU the most important sizes come first and every result is written at
once, so that a run that is cut short is still worth something.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _mixture_peers import (
    DTYPES,
    TOP_K,
    DenseMLP,
    Kept,
    Mixture,
    Products,
    Rate,
    experts_of,
    kept_for_backward,
    loop,
)
from _paired import Ratio, Results, paired_ratios

from m2mkd_fast.backend import use_backend
from m2mkd_fast.ops.expert_mlp import expert_mlp

# Products alone: those that a layer has to do, expert by expert, and of the same size but in one piece.
PRODUCTS = ("products", "products in one piece")


def name_of(size: str, device: str, dtype: str, experts: int, routing: str = "balanced") -> str:
    return f"expert_mlp, {device}, {size}, {experts} experts, {routing}, {dtype}"


def passes_of(backward: bool) -> str:
    return "forward and backward" if backward else "forward"


def on_backend(backend: str, *tensors: Any) -> torch.Tensor:
    with use_backend(expert_mlp=backend):
        return expert_mlp(*tensors)


def baseline_call(name: str, mixture: Mixture, **arguments: Any) -> Callable[[], object]:
    """A pass of a baseline; ``arguments`` are those that the mixture was built with."""
    backward = arguments["backward"]
    if name in PRODUCTS:
        products = Products(mixture, whole=name != "products")
        return products.forward_and_backward if backward else products.forward
    if name == "dense MLP":
        return DenseMLP(mixture).call_of(backward)
    if name == "balanced routing":
        return Mixture(**{**arguments, "routing": "balanced"}).call_of(expert_mlp, backward)
    if name.startswith("backend "):
        return mixture.call_of(partial(on_backend, name.removeprefix("backend ")), backward)
    if name == "published":  # its parameters are float32, whatever the model computes in
        return Mixture(**{**arguments, "dtype": "float32"}).call_of(experts_of(name), backward)
    if name.endswith("loop"):  # which experts have how many rows it knows beforehand: it need not wait for the device
        return mixture.call_of(partial(experts_of(name), counts=mixture.counts), backward)
    return mixture.call_of(experts_of(name), backward)


def compare(
    size: str,
    baselines: Iterable[str],
    *,
    backward: bool,
    pairs: int,
    experts: int = 8,
    top_k: int = TOP_K,
    routing: str = "balanced",
    dtype: str = "float32",
    device: str = "cpu",
    warm_up: int = 2,
) -> Iterator[Ratio | str]:
    """Ours and the baselines in turns, one ratio for each; a line of text for one that cannot run."""
    arguments = {
        "size": size,
        "experts": experts,
        "top_k": top_k,
        "routing": routing,
        "dtype": dtype,
        "device": device,
        "backward": backward,
    }
    mixture = Mixture(**arguments)
    case = f"{name_of(size, device, dtype, experts, routing)}, {passes_of(backward)}"
    calls: dict[str, Callable[[], object]] = {}
    for name in baselines:
        try:
            call = baseline_call(name, mixture, **arguments)
            call()
        except Exception as error:  # a limit of the baseline: it is named, and the others are measured
            yield f"{case}, {name} cannot run: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        else:
            calls[f"{case}, against {name}"] = call
    synchronize = torch.cuda.synchronize if device == "cuda" else None
    ours = mixture.call_of(expert_mlp, backward)
    yield from paired_ratios(calls, ours, pairs=pairs, warm_up=warm_up, synchronize=synchronize)


def measure(size: str, baseline: str, **arguments: Any) -> Ratio:
    """:func:`compare` with one baseline, which has to run."""
    (ratio,) = compare(size, [baseline], **arguments)
    if isinstance(ratio, str):
        raise RuntimeError(ratio)
    return ratio


def kept(size: str, *, experts: int = 8, dtype: str = "float32", device: str = "cpu") -> Kept:
    """What the experts keep for the backward pass, against the loop."""
    mixture = Mixture(size, experts=experts, dtype=dtype, device=device)

    def kept_by(function: Callable[..., torch.Tensor]) -> float:
        return kept_for_backward(
            lambda: function(mixture.x, mixture.assignment, *mixture.parameters), mixture.parameters
        )

    case = f"{name_of(size, device, dtype, experts)}, kept for the backward pass, against a loop"
    return Kept(case, kept_by(loop), kept_by(expert_mlp))


def memory(**arguments: Any) -> Mapping[str, Any]:
    result = kept(**arguments)
    return {**vars(result), "ratio": result.ratio}


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Of one call on a GPU that has others before and after it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def ceiling(results: Results, *, dtype: str = "bfloat16", device: str = "cuda", side: int = 8192) -> float:
    """TFLOP/s of the fastest matrix product found: a large square, and each size's own products in one piece."""
    square = torch.randn(side, side, device=device, dtype=DTYPES[dtype])
    out = torch.empty_like(square)
    found = {f"{side} x {side} x {side}": (milliseconds(lambda: torch.mm(square, square, out=out)), 2 * side**3)}
    for size in ("B/16", "S/32", "L/16", "H/14"):
        mixture = Mixture(size, dtype=dtype, device=device, backward=False)
        products = Products(mixture, whole=True)
        found[f"{size}, two products in one piece"] = (
            milliseconds(products.forward),
            mixture.flops(False),
        )
    rates = {name: flops / taken / 1e9 for name, (taken, flops) in found.items()}
    best = max(rates.values())
    for name, (taken, _) in found.items():
        results.add(Rate(f"matrix product, {device}, {dtype}, {name}", rates[name], taken, rates[name] / best))
    return best


def rate(size: str, ceiling: float, *, backward: bool, experts: int = 8, dtype: str = "bfloat16") -> Rate:
    mixture = Mixture(size, experts=experts, dtype=dtype, device="cuda", backward=backward)
    taken = milliseconds(mixture.call_of(expert_mlp, backward))
    tflops = mixture.flops(backward) / taken / 1e9
    return Rate(f"{name_of(size, 'cuda', dtype, experts)}, {passes_of(backward)}", tflops, taken, tflops / ceiling)


def on_cpu(results: Results, pairs: int) -> None:
    size = "B/16, 8 images"
    for backward in (False, True):
        for baseline in (*PRODUCTS, "loop", "compiled loop", "dense MLP"):
            for result in compare(size, [baseline], backward=backward, pairs=pairs):
                results.add(result)
        for result in compare(size, ["loop"], backward=backward, pairs=max(pairs // 3, 2), dtype="bfloat16", warm_up=1):
            results.add(result)
        skew = {"top_k": 1, "routing": "one expert", "backward": backward}
        results.add(measure(size, "balanced routing", pairs=pairs, **skew))
    for dtype in ("float32", "bfloat16"):
        results.add(kept(size, dtype=dtype))


def on_gpu(results: Results, pairs: int, seconds: float) -> None:
    stop = time.monotonic() + seconds
    best = ceiling(results)
    # What the layer chooses by itself may be the kernel or not: the kernel by force shows whether it chose well.
    eager = ("dense MLP", "loop", "grouped products", "backend triton")
    compiled = ("compiled grouped products", "compiled loop")

    def run(size: str, baselines: Iterable[str], *, experts: int = 8, backward: bool = True, **more: Any) -> None:
        case = f"{name_of(size, 'cuda', 'bfloat16', experts, more.get('routing', 'balanced'))}, {passes_of(backward)}"
        if time.monotonic() > stop:
            results.add(f"{case}: not reached within {seconds:.0f} s")
            return
        options = {"experts": experts, "backward": backward, "dtype": "bfloat16", "device": "cuda", **more}
        for result in compare(size, baselines, pairs=pairs, **options):
            results.add(result)
        if not more:
            results.add(rate(size, best, backward=backward, experts=experts))

    run("B/16", (*eager, *compiled, "published", *PRODUCTS))
    results.add(kept("B/16", dtype="bfloat16", device="cuda"))
    run("B/16", ["balanced routing"], routing="one expert", top_k=1)
    run("B/16", ["balanced routing"], routing="skewed")
    run("B/16", (*eager, "published"), backward=False)
    for size in ("S/32", "L/16", "H/14"):
        run(size, (*eager, "compiled grouped products"))
        run(size, eager, backward=False)
    for size in ("B/16", "S/32", "L/16", "H/14"):
        for backward in (False, True):
            run(f"{size}, one image", eager, backward=backward)
    for experts in (32, 64):
        for size in ("B/16", "S/32", "L/16", "H/14"):
            for backward in (True, False):
                run(size, eager, experts=experts, backward=backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=180.0, help="on a GPU, begin no further size after so long")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    if torch.cuda.is_available():
        on_gpu(results, options.pairs, options.seconds)
    else:
        on_cpu(results, options.pairs)


if __name__ == "__main__":
    main()
