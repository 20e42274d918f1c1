"""A mixture's whole layer, router and experts: ours against PyTorch's operators, a dense MLP and other packages.

All layers are of the same sizes, drop nothing, and start from random parameters of their own. Packages that are not
installed are named. On a GPU the most important sizes come first and every result is written at once, so that a run
that is cut short is still worth something.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _mixture_peers import (
    DTYPES,
    EXPERTS,
    OTHER_PACKAGES,
    SIZES,
    TOP_K,
    Kept,
    Mixture,
    Products,
    kept_for_backward,
    layer_of,
)
from _paired import Ratio, Results, paired_ratio, paired_ratios
from torch import Tensor, nn

from m2mkd_fast.models import create_model
from m2mkd_fast.nn.expert_mlp import ExpertMLP
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.ops.route import Assignment

# Models whose routers drop nothing, because the baselines cannot.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "B/16": ("vmoe_base.m2mkd", {}),
    "S/32": ("vmoe_small32.every2", {"router": "m2mkd"}),
    "micro": ("vmoe_micro.m2mkd", {}),
}


class Pass:
    """One pass of a layer over a batch: its result, or with ``backward`` the gradients of tokens and parameters.

    ``dtype`` "autocast": parameters and tokens in float32, products in bfloat16.
    """

    def __init__(self, layer: Callable[[Tensor], Tensor], size: str, dtype: str, device: str, backward: bool) -> None:
        self.layer, self.device, self.dtype, self.backward = layer, device, dtype, backward
        generator = torch.Generator().manual_seed(0)
        shape = (SIZES[size].images, SIZES[size].tokens_per_image, SIZES[size].width)
        precision = DTYPES[parameter_dtype(dtype)]
        self.x = torch.randn(shape, generator=generator).to(device, precision).requires_grad_(backward)
        self.grad_out = torch.randn(shape, generator=generator).to(device, precision)
        self.parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []

    def forward(self) -> Tensor:
        autocast = torch.autocast(self.device, torch.bfloat16) if self.dtype == "autocast" else nullcontext()
        with autocast:
            return self.layer(self.x)

    def __call__(self) -> object:
        if not self.backward:
            with torch.inference_mode():
                return self.forward()
        out = self.forward()
        outputs, grads = [out], [self.grad_out.to(out.dtype)]
        loss = getattr(self.layer, "auxiliary_loss", None)
        if loss is not None:
            outputs, grads = [out, loss], [*grads, torch.ones_like(loss)]
        # allow_unused: a parameter that a package keeps for other uses of its layer
        return torch.autograd.grad(outputs, [self.x, *self.parameters], grads, allow_unused=True)


def parameter_dtype(dtype: str) -> str:
    return "float32" if dtype == "autocast" else dtype


def ours(size: str, experts: int, top_k: int, dtype: str, device: str, router: str | None = None) -> VisionMoE:
    """``router``: the name of a published one; by default softmax, then top-k, and nothing else."""
    torch.manual_seed(0)
    arguments = {} if router is None else ROUTERS[router]
    layer = VisionMoE(SIZES[size].width, SIZES[size].hidden, experts, top_k, **arguments)
    return layer.to(device, DTYPES[parameter_dtype(dtype)])


def name_of(size: str, device: str, dtype: str, experts: int, backward: bool) -> str:
    passes = "forward and backward" if backward else "forward"
    return f"VisionMoE, {device}, {size}, {experts} experts, {dtype}, {passes}"


def compare(
    size: str,
    baselines: Iterable[str],
    *,
    backward: bool,
    pairs: int,
    experts: int = 8,
    top_k: int = TOP_K,
    dtype: str = "float32",
    device: str = "cpu",
    router: str | None = None,
    warm_up: int = 2,
) -> Iterator[Ratio | str]:
    """Ours and the baselines in turns, one ratio for each; a line of text for one that cannot run."""
    layer = ours(size, experts, top_k, dtype, device, router)
    our_pass = Pass(layer, size, dtype, device, backward)
    case = name_of(size, device, dtype, experts, backward) + ("" if router is None else f", router {router}")

    def pass_of(name: str) -> Callable[[], object]:
        if name == "products":  # of the rows that our router makes
            precision = "bfloat16" if dtype == "autocast" else dtype
            mixture = Mixture(size, experts=experts, top_k=top_k, dtype=precision, device=device, backward=False)
            mixture.use(layer.gate(our_pass.x.detach()).assignment)
            products = Products(mixture, whole=False)
            return products.forward_and_backward if backward else products.forward
        if name == "plain router":
            return Pass(ours(size, experts, top_k, dtype, device), size, dtype, device, backward)
        peer = layer_of(name, size, experts, top_k, parameter_dtype(dtype), device)
        return Pass(peer, size, dtype, device, backward)

    calls: dict[str, Callable[[], object]] = {}
    for name in baselines:
        try:
            call = pass_of(name)
            call()
        except Exception as error:  # a limit of the baseline: it is named, and the others are measured
            yield f"{case}, {name} cannot run: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        else:
            calls[f"{case}, against {name}"] = call
    synchronize = torch.cuda.synchronize if device == "cuda" else None
    yield from paired_ratios(calls, our_pass, pairs=pairs, warm_up=warm_up, synchronize=synchronize)


def measure(size: str, baseline: str, **arguments: Any) -> Ratio:
    """:func:`compare` with one baseline, which has to run."""
    (ratio,) = compare(size, [baseline], **arguments)
    if isinstance(ratio, str):
        raise RuntimeError(ratio)
    return ratio


def kept(size: str, *, baseline: str = "loop", dtype: str = "float32", device: str = "cpu", experts: int = 8) -> Kept:
    """What the layer keeps for the backward pass, against another one."""

    def kept_by(layer: Callable[[Tensor], Tensor]) -> float:
        one = Pass(layer, size, dtype, device, backward=True)
        return kept_for_backward(one.forward, one.parameters)

    peer = layer_of(baseline, size, experts, TOP_K, parameter_dtype(dtype), device)
    case = name_of(size, device, dtype, experts, True).rpartition(",")[0]
    return Kept(
        f"{case}, kept for the backward pass, against {baseline}",
        kept_by(peer),
        kept_by(ours(size, experts, TOP_K, dtype, device)),
    )


def memory(**arguments: Any) -> Mapping[str, Any]:
    result = kept(**arguments)
    return {**vars(result), "ratio": result.ratio}


class Training:
    """Forward and backward pass of a whole V-MoE; with ``experts``, a function of ``EXPERTS``, in place of ours."""

    def __init__(self, model: str, images: int, device: str, experts: str | None = None) -> None:
        name, options = MODELS[model]
        torch.manual_seed(0)
        self.model, self.device = create_model(name, **options).to(device), device
        size = self.model.patch_embed.img_size
        self.images = torch.randn(images, self.model.patch_embed.proj.in_channels, *size, device=device)
        self.labels = torch.randint(self.model.num_classes, (images,), device=device)
        for layer in self.model.modules():
            if isinstance(layer, ExpertMLP) and experts is not None:
                layer.forward = partial(in_place_of_ours, EXPERTS[experts], layer)

    def __call__(self) -> Tensor:
        self.model.zero_grad()
        # As V-MoE is trained: on a GPU in bfloat16, by autocast.
        with torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        return loss


def in_place_of_ours(experts: Callable[..., Tensor], layer: ExpertMLP, x: Tensor, assignment: Assignment) -> Tensor:
    parameters = [layer.htoh4.weight, layer.htoh4.bias, layer.h4toh.weight, layer.h4toh.bias]
    if experts is not EXPERTS["published"] and torch.is_autocast_enabled(x.device.type):
        x, *parameters = (tensor.to(torch.bfloat16) for tensor in (x, *parameters))  # grouped products know no autocast
    return experts(x, assignment, *parameters)


def measure_model(model: str, baseline: str, images: int, pairs: int, *, device: str = "cpu") -> Ratio:
    """A whole V-MoE on our experts against the same with other ones; routers and all else are the same."""
    return paired_ratio(
        f"V-MoE {model}, {device}, {images} images, forward and backward, against experts by {baseline}",
        Training(model, images, device, baseline),
        Training(model, images, device),
        pairs=pairs,
        warm_up=2,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


def on_cpu(results: Results, pairs: int) -> None:
    size = "B/16, 8 images"
    for backward in (False, True):
        for baseline in ("products", "loop", "published", "dense MLP"):
            results.add(measure(size, baseline, backward=backward, pairs=pairs))
        few = max(pairs // 3, 2)
        results.add(measure(size, "loop", backward=backward, pairs=few, dtype="bfloat16", warm_up=1))
        results.add(measure(size, "plain router", backward=backward, pairs=pairs, router="vmoe"))
    for dtype in ("float32", "bfloat16"):
        results.add(kept(size, dtype=dtype))
    for baseline in ("loop", "published"):
        results.add(measure_model("S/32", baseline, 8, pairs))


def on_gpu(results: Results, pairs: int, seconds: float) -> None:
    stop = time.monotonic() + seconds

    def run(size: str, baselines: Iterable[str], *, backward: bool = True, experts: int = 8, **more: Any) -> None:
        options = {"experts": experts, "dtype": "bfloat16", **more}
        if time.monotonic() > stop:
            case = name_of(size, "cuda", options["dtype"], experts, backward)
            results.add(f"{case}: not reached within {seconds:.0f} s")
            return
        for result in compare(size, baselines, backward=backward, pairs=pairs, device="cuda", **options):
            results.add(result)

    plain = ("dense MLP", "loop", "grouped products")
    run("B/16", (*plain, "published", *OTHER_PACKAGES))
    results.add(kept("B/16", dtype="bfloat16", device="cuda"))
    run("B/16", ("compiled grouped products", "compiled loop"))
    run("B/16", (*plain, "published", *OTHER_PACKAGES), backward=False)
    run("B/16", ["plain router"], router="vmoe")
    run("B/16", ("dense MLP", "loop", "published"), dtype="autocast")
    for baseline in ("loop", "grouped products", "published"):
        if time.monotonic() < stop:
            results.add(measure_model("B/16", baseline, 128, max(pairs // 3, 2), device="cuda"))
    for size in ("S/32", "L/16", "H/14"):
        run(size, (*plain, *OTHER_PACKAGES))
    for size in ("B/16", "S/32", "L/16", "H/14"):
        run(f"{size}, one image", (*plain, *OTHER_PACKAGES), backward=False)
    for experts in (32, 64):
        for size in ("B/16", "S/32", "L/16", "H/14"):
            run(size, (*plain, *OTHER_PACKAGES), experts=experts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=150.0, help="on a GPU, begin no further size after so long")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results(options.json)
    if torch.cuda.is_available():
        on_gpu(results, options.pairs, options.seconds)
    else:
        on_cpu(results, options.pairs)


if __name__ == "__main__":
    main()
