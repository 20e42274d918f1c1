"""Neural Attentive Circuits and their student modules: what the shapes of their tensors say, and how to build them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.student import student_modules
from m2mkd_fast.models.nac.tokenizers import CAPACITIES
from m2mkd_fast.models.nac.variants import merge_options
from m2mkd_fast.models.published.names import grouped
from m2mkd_fast.models.published.record import Published, differences
from m2mkd_fast.models.registry import create_model

FAMILIES = ("nac_tiny", "nac_imagenet", "nac_micro")
# Our student modules keep the codes and states that the published code draws at every start and does not save.
DRAWN = ("codes", "states")
# What two circuits of one family may differ in.
_FREE = ("num_classes", "in_chans", "img_size", "latent_graph_kwargs.num_iterations")


def is_circuit(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a circuit, or of a module of one."""
    return any(name.startswith(("latent_graphs.", "read_in.", "latent_attention.")) for name in state)


def identify(state: dict[str, Tensor], options: Mapping[str, Any], facts: dict[str, Any]) -> Published:
    """Name and options of the circuit, or of the circuit that the module is a part of.

    Options beside those of the circuit: `model`, `num_heads` and `head_dim`, and `tokens` of a read-in module.

    Raises:
        M2MKDError: the number of heads is needed and not given, or does not fit.
    """
    options = dict(options)
    part = _part(state)
    assumed = []
    tokens = options.pop("tokens", 1)
    found = _description(state)
    if part is not None:
        _require_widths(state, part, found)
    model = options.pop("model", None)
    if model is None:
        model = min(FAMILIES, key=lambda family: _distance(found, _reference(f"{family}.scale_free"))) + ".scale_free"
        if part is None:
            assumed.append(f"model={model}: weights do not show the graph, by which only the regulariser differs")
    defaults = _reference(model)
    if "inner" not in defaults:
        raise M2MKDError(f"{model} is no circuit, and these weights are one's; give --option model=nac_tiny.ring, say")
    heads = _heads(found, defaults, options, model, assumed)
    overrides = differences(found, defaults) | heads
    if "state_dim" in overrides and "input_tokenizer_kwargs.repr_dim" in found:  # which follows from it by default
        overrides["input_tokenizer_kwargs.repr_dim"] = found["input_tokenizer_kwargs.repr_dim"]
    overrides.pop("inner", None)
    if part is not None and "codes" not in state:
        state = state | _drawn(part, tokens, found)
        assumed.append("codes and states are drawn from seed 0 (the published modules are saved without theirs)")
    kind: Literal["circuit", "circuit module"] = "circuit" if part is None else "circuit module"
    nested = merge_options(_nested(overrides), options)
    return Published(kind, model, nested, state, part, facts, tuple(assumed))


def build(published: Published) -> nn.Module:
    """The circuit, or the module, with other weights."""
    options = merge_options(published.options, {"fit_signatures": False})  # the weights bring theirs
    if published.part is None:
        return create_model(published.model, **options)
    shapes = {name: tensor.shape for name, tensor in published.state.items()}
    width = shapes["post_stitch.weight"][0] if "post_stitch.weight" in shapes else shapes["pre_stitch.weight"][1]
    before = shapes["pre_stitch.weight"][1] if "pre_stitch.weight" in shapes else width
    tokens = shapes["codes"][0] if published.part == "first" else 1
    circuit = create_model(published.model, **merge_options(options, {"latent_graph_kwargs": {"num_iterations": 1}}))
    if published.part == "first":
        module = student_modules(circuit, (width, width), tokens)[0]
    elif published.part == "middle":
        module = student_modules(circuit, (before, width))[1]
    else:
        module = student_modules(circuit, (before, before))[2]
        module.num_classes = circuit.num_classes
    if "slot" in published.facts:
        module.slot = published.facts["slot"]
    return module


def _part(state: Mapping[str, Tensor]) -> Literal["first", "middle", "last"] | None:
    if any(name.startswith("latent_graphs.") for name in state):
        return None
    if any(name.startswith("read_in.") for name in state):
        return "first"
    return "last" if any(name.startswith(("tokenizer.", "head.")) for name in state) else "middle"


def _require_widths(state: Mapping[str, Tensor], part: str, found: Mapping[str, Any]) -> None:
    """M2MKDError where a module lacks what its widths are read from."""
    needed = {"first": ("post",), "middle": ("pre", "post"), "last": ("pre",)}[part]
    names = [f"{side}_stitch.weight" for side in needed]
    absent = [name for name in names if name not in state or state[name].dim() != 2]
    if "state_dim" not in found:
        absent.append("...receiver_layernorm.weight")
    if "latent_graph_kwargs.code_dim" not in found:
        absent.append("...query_compiler.scale.weight")
    if absent:
        raise M2MKDError(
            f"these are weights of a circuit's {part} module without a usable {', '.join(absent)}, which its widths "
            "are read from; its names are " + "; ".join(grouped(state))
        )


@functools.cache
def _reference(model: str) -> dict[str, Any]:
    """The description of a circuit with a name."""
    with torch.device("meta"):
        return _description(create_model(model).state_dict())


def _distance(found: Mapping[str, Any], named: Mapping[str, Any]) -> int:
    return sum(found[key] != named.get(key) for key in found if key not in _FREE)


def _description(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes say, by dotted keys of the configuration; `inner` is heads times their size."""

    def shape(*endings: str) -> torch.Size | None:
        return next((state[name].shape for ending in endings for name in state if name.endswith(ending)), None)

    def count(pattern: str) -> int:
        return len({match[1] for name in state if (match := re.search(pattern, name))})

    found: dict[str, Any] = {}

    def note(key: str, of: torch.Size | None, axis: int) -> None:
        if of is not None and len(of) > axis:
            found[key] = of[axis]

    note("state_dim", shape("receiver_layernorm.weight"), 0)
    note("latent_graph_kwargs.code_dim", shape("query_compiler.scale.weight"), 1)
    note("inner", shape("query_compiler.native_weight"), 0)
    note("latent_graph_kwargs.signature_dim", shape("input_latents.signatures_"), 1)
    for latents in ("input", "mediator", "output"):
        note(f"latent_graph_kwargs.num_{latents}_latents", shape(f"{latents}_latents.codes_"), 0)
    hidden = shape("ffn.ffn.2.native_weight")
    if hidden is not None and len(hidden) == 2 and hidden[0]:
        found["latent_graph_kwargs.ffn_capacity_factor"] = hidden[1] / hidden[0]
    if steps := count(r"^latent_graphs\.0\.propagators\.(\d+)\."):
        found["latent_graph_kwargs.num_iterations"] = steps
    note("num_classes", shape("to_logits.weight"), 0)
    stem = shape("downsample_layers.0.0.weight")
    if stem is not None and len(stem) == 4:
        found |= {"in_chans": stem[1], "input_tokenizer_kwargs.repr_dim": 4 * stem[0]}
        stages = count(r"downsample_layers\.(\d+)\.")
        depths = tuple(count(rf"backbone\.stages\.{stage}\.(\d+)\.") for stage in range(stages))
        found |= {"input_tokenizer_kwargs.num_stages": stages, **_capacity(depths)}
        grid = shape("positional_grid.grid")
        if grid is not None and len(grid) == 3:
            found["input_tokenizer_kwargs.positional_grid_kwargs.dim"] = grid[0]
            found["img_size"] = grid[1] * 4 * 2 ** (stages - 1)
            if grid[1] != grid[2]:
                found["input_tokenizer_kwargs.positional_grid_kwargs.grid_size"] = list(grid[1:])
    return found


def _capacity(depths: tuple[int, ...]) -> dict[str, str]:
    # Of presets that are the same in as many stages as there are, the first stands for all.
    presets = [name for name, blocks in CAPACITIES.items() if blocks[: len(depths)] == depths]
    return {"input_tokenizer_kwargs.capacity_preset": presets[0]} if presets else {}


def _heads(
    found: Mapping[str, Any], defaults: Mapping[str, Any], options: dict[str, Any], model: str, assumed: list[str]
) -> dict[str, Any]:
    """Overrides for heads and their size, which the weights do not tell apart; takes them out of the options."""
    inner = found.get("inner", defaults["inner"])
    given = {key: options.pop(key) for key in ("num_heads", "head_dim") if key in options}
    graph = options.get("latent_graph_kwargs", {})
    given |= {key: graph[key] for key in ("num_heads", "head_dim") if key in graph}
    if not given:
        if (inner, found.get("state_dim")) != (defaults["inner"], defaults["state_dim"]):
            raise M2MKDError(
                f"the weights say that attention is {inner} wide here, and not how many heads share that; give "
                "--option num_heads=N"
            )
        assumed.append(f"the number of heads is that of {model} (weights do not show it)")
        return {}
    heads = given.get("num_heads") or inner // given["head_dim"]
    if inner % heads or heads * given.get("head_dim", inner // heads) != inner:
        raise M2MKDError(f"{given} does not give the {inner} that attention is wide here; correct --option num_heads=N")
    return {"latent_graph_kwargs.num_heads": heads, "latent_graph_kwargs.head_dim": inner // heads}


def _drawn(part: str, tokens: int, found: Mapping[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    number = tokens if part == "first" else 1
    drawn = {"codes": torch.randn(number, found["latent_graph_kwargs.code_dim"], generator=generator)}
    if part != "middle":
        drawn["states"] = torch.randn(1, number, found["state_dim"], generator=generator)
    return drawn


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = nested
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return nested
