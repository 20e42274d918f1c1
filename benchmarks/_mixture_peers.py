"""What a mixture's layer is measured against: the same sums as plain products, as loops, and by other packages.

Every function of :data:`EXPERTS` computes what :func:`m2mkd_fast.ops.expert_mlp.expert_mlp` computes (erf GELU, biases,
no token dropped); a test holds them to it. They gather and combine rows by :class:`Gather` and :class:`Combine`, whose
gradients are as cheap as their results: PyTorch's own would scatter row by row, and lose for that alone.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from m2mkd_fast.ops.route import Assignment, route


@dataclass(frozen=True)
class Size:
    images: int
    tokens_per_image: int
    width: int
    hidden: int

    @property
    def tokens(self) -> int:
        return self.images * self.tokens_per_image


# Widths and tokens of V-MoE's four sizes at 224 pixels, with the batches of one GPU.
SIZES = {
    "B/16": Size(128, 197, 768, 3072),
    "S/32": Size(256, 50, 512, 2048),
    "L/16": Size(64, 197, 1024, 4096),
    "H/14": Size(64, 257, 1280, 5120),
    "B/16, 8 images": Size(8, 197, 768, 3072),
    "S/32, one image": Size(1, 50, 512, 2048),
    "B/16, one image": Size(1, 197, 768, 3072),
    "L/16, one image": Size(1, 197, 1024, 4096),
    "H/14, one image": Size(1, 257, 1280, 5120),
    "tiny": Size(3, 16, 32, 64),
}
TOP_K = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How the experts share the tokens; the share of an expert falls as 1 / (its number + 1) for "skewed".
ROUTINGS = ("balanced", "skewed", "one expert")


class Mixture:
    """Tokens, an assignment of them, the parameters of the experts and a gradient of the result."""

    def __init__(
        self,
        size: str,
        *,
        experts: int = 8,
        top_k: int = TOP_K,
        dtype: str = "float32",
        device: str = "cpu",
        routing: str = "balanced",
        backward: bool = True,
    ) -> None:
        self.size, self.experts, self.top_k, self.device = SIZES[size], experts, top_k, device
        tokens, width, hidden = self.size.tokens, self.size.width, self.size.hidden
        generator = torch.Generator().manual_seed(0)
        # Parameters are drawn on the device: half a billion numbers of 64 experts take a processor seconds.
        on_device = generator if device == "cpu" else torch.Generator(device).manual_seed(0)

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.empty(shape, device=device, dtype=DTYPES[dtype]).normal_(generator=on_device)
            return drawn.mul_(scale).requires_grad_(backward)

        self.x = tensor(tokens, width)
        self.parameters = [
            tensor(experts, hidden, width, scale=width**-0.5),
            tensor(experts, hidden, scale=0.1),
            tensor(experts, width, hidden, scale=hidden**-0.5),
            tensor(experts, width, scale=0.1),
        ]
        self.grad_out = tensor(tokens, width).detach()
        self.use(assignment_of(tokens, experts, top_k, routing, generator, device))
        self.assignment.weight.requires_grad_(backward)

    def use(self, assignment: Assignment) -> None:
        """Another assignment of the same tokens."""
        self.assignment = assignment._replace(weight=assignment.weight.detach())
        self.counts = self.assignment.offsets.diff().tolist()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.assignment.weight, *self.parameters]

    def flops(self, backward: bool) -> int:
        """Of the products: two in the forward pass, four in the backward pass."""
        return (6 if backward else 2) * 2 * sum(self.counts) * self.size.width * self.size.hidden

    def call_of(self, experts: Callable[..., Tensor], backward: bool) -> Callable[[], object]:
        """One pass of a function of ``(x, assignment, *parameters)``."""

        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = experts(self.x, self.assignment, *self.parameters)
            return torch.autograd.grad(out, self.leaves, self.grad_out.to(out.dtype)) if backward else out

        return call


def assignment_of(
    tokens: int, experts: int, top_k: int, routing: str, generator: torch.Generator, device: str
) -> Assignment:
    """Choices drawn without replacement (by Gumbel noise) from the shares that ``routing`` gives the experts."""
    number = torch.arange(1.0, experts + 1)
    log_share = {"balanced": torch.zeros(experts), "skewed": -number.log(), "one expert": -1e3 * number}[routing]
    noise = -torch.rand(tokens, experts, generator=generator).clamp(1e-9, 1 - 1e-7).log().neg().log()
    return route((log_share + noise).to(device), top_k=top_k)


class Gather(torch.autograd.Function):
    """Rows of tokens; the gradient of a token is the sum over its places."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_of_places(grad, place), None, None


class Combine(torch.autograd.Function):
    """Sum over a token's places; every row gets the gradient of its token."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_of_places(rows, place)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None


def _sum_of_places(rows: Tensor, place: Tensor) -> Tensor:
    return rows.index_select(0, place.flatten()).view(*place.shape, rows.shape[1]).sum(dim=1)


def loop(x: Tensor, assignment: Assignment, *parameters: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """``F.linear`` by ``F.linear``. Without the experts' ``counts`` it waits for the device to read them."""
    counts = assignment.offsets.diff().tolist() if counts is None else counts
    rows = Gather.apply(x, assignment.token, assignment.place)
    outputs = [
        F.linear(F.gelu(F.linear(rows_of_one, up, up_bias)), down, down_bias)
        for rows_of_one, up, up_bias, down, down_bias in zip(
            rows.split(counts), *(parameter.unbind() for parameter in parameters), strict=True
        )
    ]
    weighted = torch.cat(outputs) * assignment.weight.to(x.dtype).unsqueeze(1)
    return Combine.apply(weighted, assignment.token, assignment.place)


def grouped_products(x: Tensor, assignment: Assignment, *parameters: Tensor) -> Tensor:
    """Two ``F.grouped_mm``, as in the ``grouped_mm`` experts of transformers."""
    up, up_bias, down, down_bias = parameters
    stops = assignment.offsets[1:].to(torch.int32)
    rows = Gather.apply(x, assignment.token, assignment.place)
    hidden = F.gelu(F.grouped_mm(rows, up.transpose(1, 2), offs=stops) + up_bias[assignment.expert])
    out = F.grouped_mm(hidden, down.transpose(1, 2), offs=stops) + down_bias[assignment.expert]
    weighted = out * assignment.weight.to(x.dtype).unsqueeze(1)
    return Combine.apply(weighted, assignment.token, assignment.place)


def published(x: Tensor, assignment: Assignment, *parameters: Tensor) -> Tensor:
    """What the published m2mKD V-MoE runs: every expert in float32, also under autocast, its count read by the host."""
    with torch.autocast(x.device.type, enabled=False):
        return _published(x, assignment, *parameters)


def _published(x: Tensor, assignment: Assignment, *parameters: Tensor) -> Tensor:
    counts = assignment.offsets.diff().tolist()
    rows = x.float().index_select(0, assignment.token)
    outputs = [
        F.linear(F.gelu(F.linear(rows_of_one, up, up_bias)), down, down_bias)
        for rows_of_one, up, up_bias, down, down_bias in zip(
            rows.split(counts), *(parameter.float().unbind() for parameter in parameters), strict=True
        )
    ]
    by_choice = torch.cat(outputs).index_select(0, assignment.place.flatten()).unflatten(0, assignment.place.shape)
    weight = assignment.weight.index_select(0, assignment.place.flatten()).view_as(assignment.place)
    return torch.bmm(weight.unsqueeze(1), by_choice).squeeze(1).to(x.dtype)


EXPERTS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "grouped products": grouped_products,
    "published": published,
}


def experts_of(name: str) -> Callable[..., Tensor]:
    """A function of :data:`EXPERTS`, or ``"compiled ..."`` of it."""
    if name.startswith("compiled "):
        torch._dynamo.reset()  # each size gets code of its own
        return torch.compile(EXPERTS[name.removeprefix("compiled ")], dynamic=False)
    return EXPERTS[name]


class Products:
    """The layer's matrix products and nothing else, into memory that is there already.

    ``whole=False`` multiplies expert by expert, as a layer has to; ``whole=True`` all rows with one expert's matrices.
    """

    def __init__(self, mixture: Mixture, *, whole: bool) -> None:
        rows, width, hidden = sum(mixture.counts), mixture.size.width, mixture.size.hidden
        like = mixture.x.detach()
        self.rows, self.out, self.grad_rows = (torch.empty_like(like[:1].expand(rows, width)) for _ in range(3))
        self.hidden, self.grad_hidden = (like.new_empty(rows, hidden) for _ in range(2))
        torch.index_select(like, 0, mixture.assignment.token, out=self.rows)
        self.grad_out = mixture.grad_out.index_select(0, mixture.assignment.token)
        self.counts = [rows] if whole else mixture.counts
        self.up, _, self.down, _ = (p.detach()[: len(self.counts)] for p in mixture.parameters)
        self.grad_up, self.grad_down = torch.empty_like(self.up), torch.empty_like(self.down)

    def forward(self) -> None:
        for e, rows in self._slices():
            torch.mm(self.rows[rows], self.up[e].t(), out=self.hidden[rows])
            torch.mm(self.hidden[rows], self.down[e].t(), out=self.out[rows])

    def forward_and_backward(self) -> None:
        self.forward()
        for e, rows in self._slices():
            torch.mm(self.grad_out[rows], self.down[e], out=self.grad_hidden[rows])
            torch.mm(self.grad_out[rows].t(), self.hidden[rows], out=self.grad_down[e])
            torch.mm(self.grad_hidden[rows], self.up[e], out=self.grad_rows[rows])
            torch.mm(self.grad_hidden[rows].t(), self.rows[rows], out=self.grad_up[e])

    def _slices(self) -> Iterator[tuple[int, slice]]:
        stops = itertools.accumulate(self.counts)
        return ((e, slice(stop - count, stop)) for e, (stop, count) in enumerate(zip(stops, self.counts, strict=True)))


class DenseMLP:
    """One dense MLP of the same arithmetic: its hidden layer is as wide as the experts of a token together."""

    def __init__(self, mixture: Mixture) -> None:
        width, hidden = mixture.size.width, mixture.top_k * mixture.size.hidden
        self.mlp = Mlp(width, hidden, device=mixture.device, dtype=mixture.x.dtype)
        self.mlp.requires_grad_(mixture.x.requires_grad)
        self.mixture = mixture

    def call_of(self, backward: bool) -> Callable[[], object]:
        mixture, leaves = self.mixture, [self.mixture.x, *self.mlp.parameters()]

        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = self.mlp(mixture.x)
            return torch.autograd.grad(out, leaves, mixture.grad_out) if backward else out

        return call


# Whole layers: router and experts.


class PlainMoE(nn.Module):
    """V-MoE's layer without noise and without losses, of PyTorch's operators; ``experts`` is one of :data:`EXPERTS`."""

    def __init__(self, experts: str, width: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.experts, self.top_k, self.num_experts = EXPERTS[experts], top_k, num_experts
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.up_weight = nn.Parameter(torch.randn(num_experts, hidden, width) * width**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(num_experts, hidden))
        self.down_weight = nn.Parameter(torch.randn(num_experts, width, hidden) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        gates = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)
        assignment = sorted_choices(gates, self.top_k)
        parameters = (self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        return self.experts(tokens, assignment, *parameters).view_as(x)


def sorted_choices(gates: Tensor, top_k: int) -> Assignment:
    """The assignment of [T, E] gates by ``topk`` and a stable sort; nothing is read by the host."""
    weight, expert = gates.topk(top_k, dim=-1)
    sorted_expert, order = expert.flatten().sort(stable=True)
    row = torch.arange(len(order), device=gates.device)
    return Assignment(
        token=order // top_k,
        expert=sorted_expert,
        weight=weight.flatten()[order],
        offsets=torch.searchsorted(sorted_expert, torch.arange(gates.shape[1] + 1, device=gates.device)),
        place=torch.empty_like(order).scatter(0, order, row).view_as(expert),
        **dict.fromkeys(Assignment._fields[5:]),  # gates, and what else a router's losses read
    )


class ScatterMoE(nn.Module):
    """github.com/shawntan/scattermoe has no router: this one is V-MoE's."""

    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        mlp = importlib.import_module("scattermoe.mlp")
        self.gate, self.top_k = nn.Linear(width, num_experts, bias=False), top_k
        self.experts = mlp.MLP(width, hidden, num_experts, top_k, bias=True, activation=nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        gates = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)
        weight, expert = gates.topk(self.top_k, dim=-1)
        return self.experts(tokens, weight.to(x.dtype), expert).view_as(x)


def _megablocks(width: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    """github.com/databricks/megablocks: dropless, grouped products; its experts have no biases."""
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=width,
        ffn_hidden_size=hidden,
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        moe_loss_weight=0.0,
        activation_fn=F.gelu,
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
    )
    return importlib.import_module("megablocks.layers.dmoe").dMoE(arguments)


def _tutel(width: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    """github.com/microsoft/tutel: capacity 0 drops nothing and pads every expert to the fullest."""
    return importlib.import_module("tutel.moe").moe_layer(
        gate_type={"type": "top", "k": top_k, "capacity_factor": 0, "fp32_gate": True},
        model_dim=width,
        experts={
            "type": "ffn",
            "num_experts_per_device": num_experts,
            "hidden_size_per_expert": hidden,
            "activation_fn": F.gelu,
        },
        normalize_gate=False,
    )


def _fastmoe(width: int, hidden: int, num_experts: int, top_k: int) -> nn.Module:
    """github.com/laekov/fastmoe, as m2mKD uses it: its experts stay in float32."""
    return importlib.import_module("fmoe").FMoETransformerMLP(num_experts, width, hidden, top_k=top_k)


class InFloat32(nn.Module):
    """A layer that takes float32 alone, in a model of another dtype."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(x.dtype)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "dense MLP": lambda width, hidden, num_experts, top_k: Mlp(width, top_k * hidden),
    **{name: partial(PlainMoE, name) for name in EXPERTS},
    "scattermoe": ScatterMoE,
    "megablocks": _megablocks,
    "tutel": _tutel,
    "fastmoe": _fastmoe,
}
OTHER_PACKAGES = ("scattermoe", "megablocks", "tutel", "fastmoe")


def layer_of(name: str, size: str, num_experts: int, top_k: int, dtype: str, device: str) -> Callable[[Tensor], Tensor]:
    """A layer of :data:`LAYERS`, or ``"compiled ..."`` of it, on the device; ImportError where its package is not."""
    torch.manual_seed(0)
    plain = name.removeprefix("compiled ")
    layer = LAYERS[plain](SIZES[size].width, SIZES[size].hidden, num_experts, top_k).to(device)
    layer = InFloat32(layer) if plain in ("fastmoe", "published") else layer.to(DTYPES[dtype])
    if plain == name:
        return layer
    torch._dynamo.reset()
    return torch.compile(layer, dynamic=False)


@dataclass(frozen=True)
class Rate:
    """Arithmetic per second, and its share of the fastest matrix product that this run measured."""

    name: str
    tflops: float
    milliseconds: float
    share_of_ceiling: float

    def __str__(self) -> str:
        share = f"{self.share_of_ceiling:6.1%} of the ceiling"
        return f"{self.name:<60} {self.tflops:7.1f} TFLOP/s  {share}  {self.milliseconds:9.3f} ms"


@dataclass(frozen=True)
class Kept:
    """What a forward pass leaves for the backward pass, its result and the parameters not counted."""

    name: str
    baseline_mib: float
    candidate_mib: float

    @property
    def ratio(self) -> float:
        return self.baseline_mib / self.candidate_mib

    def __str__(self) -> str:
        return f"{self.name:<60} {self.ratio:6.2f}x  {self.baseline_mib:.1f} MiB -> {self.candidate_mib:.1f} MiB"


def kept_for_backward(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> float:
    """MiB of the distinct storages that autograd saves in a forward pass, those of ``parameters`` left out.

    A view of a tensor, and a tensor that is saved twice, count once and whole. On a GPU also what a function holds
    without telling autograd counts: there it is the growth of allocated memory, or the sum of the storages if larger.
    """
    on_gpu = parameters[0].is_cuda
    forward()  # once for what stays: workspaces, tuned launches, compiled code
    storages: dict[int, int] = {}
    held = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # or another might get its address
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    if on_gpu:
        torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()
    if on_gpu:
        torch.cuda.synchronize()
    grown = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes() if on_gpu else 0
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return max(grown, sum(storages.values())) / 2**20
