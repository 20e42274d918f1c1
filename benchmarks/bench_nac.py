"""Whole Neural Attentive Circuits: inference and training steps on the operators' kernels, against plain PyTorch.

The baseline is the same model on the plain reference of every operator, which computes what the published code does:
keys and values of every latent for every token, dense attention, scales of every layer at every call, noise of
PyTorch's generator. On a GPU it runs eagerly and through ``torch.compile``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _paired import Ratio, Results, paired_ratio
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd_fast.backend import use_backend
from m2mkd_fast.models import create_model
from m2mkd_fast.nn.evaluation_cache import CachesInEvaluation
from m2mkd_fast.nn.latent_kernel import DotProductKernel
from m2mkd_fast.ops.latent_affinity import latent_affinity_reference

# model, batch size on a CPU, published batch size, image size
CASES = {"tiny": ("nac_tiny.ring", 8, 128, 64), "imagenet": ("nac_imagenet.ring", 1, 32, 224)}
PHASES = ("inference", "training step")


def affinity_of_torch_noise(kernel: DotProductKernel, distance: Tensor, batch_size: int, **_: bool) -> Tensor:
    """As the published layer draws them: leaky, with PyTorch's generator (the kernels' is slow in plain PyTorch)."""
    return latent_affinity_reference(
        distance,
        kernel.bandwidth,
        kernel.truncation,
        uniform=torch.rand((batch_size, *distance.shape), device=distance.device) if kernel.samples else None,
        temperature=kernel.temperature,
        leaky=True,
    )


class Workload:
    """A model, its optimizer and a batch: one call is one inference or one training step."""

    def __init__(self, case: str, phase: str, device: str, batch_size: int, *, plain: bool, compiled: bool = False):
        name, _, _, size = CASES[case]
        torch.manual_seed(0)
        self.model = create_model(name).to(device).train(phase == "training step")
        if plain:
            for kernel in self.model.modules():
                if isinstance(kernel, DotProductKernel):
                    kernel.forward = partial(affinity_of_torch_noise, kernel)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.images = torch.randn(batch_size, 3, size, size, device=device)
        self.labels = torch.randint(self.model.num_classes, (batch_size,), device=device)
        self.backend = "reference" if plain else "auto"
        self.plain, self.device = plain, device

    def __call__(self) -> Tensor:
        if self.plain:
            for module in self.model.modules():
                if isinstance(module, CachesInEvaluation):
                    module.clear_caches()
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()
        with use_backend(self.backend), autocast:
            if not self.model.training:
                with torch.inference_mode():
                    return self.forward(self.images)
            loss = F.cross_entropy(self.forward(self.images), self.labels) + self.model.regularization_loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss


def measure(case: str, phase: str, pairs: int, *, device: str = "cpu", baseline: str = "eager") -> Ratio:
    """The model on its kernels against the plain model, in turns."""
    _, on_cpu, published, _ = CASES[case]
    batch_size = on_cpu if device == "cpu" else published
    plain = Workload(case, phase, device, batch_size, plain=True, compiled=baseline == "compiled")
    fused = Workload(case, phase, device, batch_size, plain=False)
    return paired_ratio(
        f"circuit, {case}, batch {batch_size}, {phase}, against {baseline}",
        plain,
        fused,
        pairs=pairs,
        warm_up=2,
        synchronize=torch.cuda.synchronize if device == "cuda" else None,
    )


class RecordProducts(TorchDispatchMode):
    """Keeps every matrix product and convolution with its arguments."""

    OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "aten::convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in self.OPERATORS:
            copies = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
            self.products.append(partial(func, *copies, **kwargs))
        return func(*args, **kwargs)


def measure_products(case: str, pairs: int) -> Ratio:
    """A training step on the kernels against its matrix products alone, which are the least that it can take."""
    step = Workload(case, "training step", "cpu", CASES[case][1], plain=False)
    with RecordProducts() as recorded:
        step()

    def products() -> None:
        for product in recorded.products:
            product()

    return paired_ratio(f"circuit, {case}, training step, against its products alone", step, products, pairs=pairs)


def measure_captured(case: str, pairs: int) -> Ratio:
    """Inference of one image by a captured CUDA graph against the plain model, eager."""
    from m2mkd_fast.models.cuda_graph import capture_inference

    plain = Workload(case, "inference", "cuda", 1, plain=True)
    model: nn.Module = Workload(case, "inference", "cuda", 1, plain=False).model
    with torch.autocast("cuda", torch.bfloat16):
        captured: Callable[[Tensor], Tensor] = capture_inference(model, plain.images)
    return paired_ratio(
        f"circuit, {case}, batch 1, inference by a CUDA graph, against eager",
        plain,
        lambda: captured(plain.images),
        pairs=pairs,
        synchronize=torch.cuda.synchronize,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = Results(options.json)
    for case, phase in itertools.product(CASES, PHASES):
        if torch.cuda.is_available():
            for baseline in ("eager", "compiled"):
                results.add(measure(case, phase, options.pairs, device="cuda", baseline=baseline))
        else:
            results.add(measure(case, phase, options.pairs))
    if not torch.cuda.is_available():
        for case in CASES:
            results.add(measure_products(case, options.pairs))
    if torch.cuda.is_available():
        for case in CASES:
            results.add(measure_captured(case, options.pairs))


if __name__ == "__main__":
    main()
