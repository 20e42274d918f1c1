"""`apply`: what is replaced, what is refused before anything changes, and the way back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_fastmoe import FMoETransformerMLP
from published_nac import ModFFN
from timm.layers import Mlp
from torch import Tensor, nn

from m2mkd_fast import accelerate, apply, fastmoe_mlp, mixture, nac_layer
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.vision_moe import VisionMoE
from m2mkd_fast.patch import _matches


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = Mlp(8, 16)
        self.moe = FMoETransformerMLP(2, 8, 4, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.moe(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(3)), "head": Mlp(8, 16)}).double()


def run(model: nn.Module) -> Tensor:
    x = torch.linspace(-2, 2, 80, dtype=torch.float64).view(2, 5, 8)
    for block in model["blocks"]:
        x = block(x)
    return model["head"](x)


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("blocks.*.mlp", ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        ("blocks.[12].mlp", ["blocks.1.mlp", "blocks.2.mlp"]),
        ("*.?.mlp", ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        ("**.mlp", ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        ("**.head", ["head"]),
        ("he*", ["head"]),
    ],
)
def test_patterns_choose_modules(pattern: str, paths: list[str]) -> None:
    patched = model()
    handle = apply(patched, {pattern: mixture(2)})
    assert names_of(patched, VisionMoE) == paths
    assert [path for row in handle.report for path in row.paths] == paths


@given(
    st.lists(st.sampled_from(["a", "b", "*", "**"]), min_size=1, max_size=5),
    st.lists(st.sampled_from("ab"), min_size=1),
)
def test_fuzz_patterns_mean_what_a_search_through_all_expansions_finds(pattern: list[str], path: list[str]) -> None:
    def expansions(parts: list[str], length: int) -> list[list[str]]:
        """With every ``**`` written out as so many ``*`` that there are ``length`` parts."""
        if not parts:
            return [[]] if length == 0 else []
        if parts[0] != "**":
            return [[parts[0], *rest] for rest in expansions(parts[1:], length - 1)]
        return [["*"] * some + rest for some in range(length + 1) for rest in expansions(parts[1:], length - some)]

    wanted = any(
        all(part in ("*", name) for part, name in zip(expansion, path, strict=True))
        for expansion in expansions(pattern, len(path))
    )
    assert _matches(pattern, path) == wanted


def test_several_rules_log_and_report(caplog: pytest.LogCaptureFixture) -> None:
    patched = model()
    wanted = run(patched)
    with caplog.at_level(logging.INFO, logger="m2mkd_fast"):
        handle = apply(patched, {"blocks.1.mlp": mixture(2), "blocks.*.moe": fastmoe_mlp()})
    torch.testing.assert_close(run(patched), wanted, rtol=1e-12, atol=1e-12)
    assert [message for message in caplog.messages if "->" in message] == [f"replaced {row}" for row in handle.report]
    assert caplog.messages[-1] == "replaced 4 modules of ModuleDict"
    table = str(handle.report).splitlines()
    assert table[0].split() == ["path", "from", "to", "parameters", "before", "after"]
    assert table[1].split() == ["blocks.0.moe", "FMoETransformerMLP", "VisionMoE", "170", "170"]
    assert table[2].split() == ["blocks.1.mlp", "Mlp", "VisionMoE", "280", "576"]
    assert len({len(line) for line in table}) == 1


def test_revert_puts_the_very_modules_back() -> None:
    patched = model()
    modules, wanted = dict(patched.named_modules()), run(patched)
    handle = apply(patched, {"blocks.*.moe": fastmoe_mlp(), "head": mixture(2)})
    assert patched["head"] is not modules["head"]
    handle.revert()
    after = dict(patched.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert torch.equal(run(patched), wanted)
    with pytest.raises(M2MKDError, match="reverted before"):
        handle.revert()


def test_context_manager_reverts_also_after_errors() -> None:
    patched = model()
    head = patched["head"]
    with pytest.raises(ValueError, match="mine"), apply(patched, {"head": mixture(2)}):
        raise ValueError("mine")
    assert patched["head"] is head
    with apply(patched, {"head": mixture(2)}) as handle:
        handle.revert()
    assert patched["head"] is head


def test_reverted_modules_follow_the_model() -> None:
    patched = model()
    patched["head"].drop1.eval()
    with apply(patched, {"head": mixture(2)}):
        patched.float()
    assert patched["head"].fc1.weight.dtype == torch.float32
    assert patched["head"].training and not patched["head"].drop1.training
    with apply(patched, {"head": mixture(2), "blocks.0.moe": fastmoe_mlp()}):
        patched.eval()
    assert not any(module.training for module in patched.modules())


def test_a_module_in_several_places_is_replaced_in_all() -> None:
    patched = model()
    shared = patched["blocks"][0].mlp
    patched["blocks"][2].mlp = shared
    twice = patched["blocks"][1]
    patched["again"] = twice
    handle = apply(patched, {"blocks.2.mlp": mixture(2), "again.moe": fastmoe_mlp()})
    assert patched["blocks"][0].mlp is patched["blocks"][2].mlp
    assert isinstance(patched["blocks"][0].mlp, VisionMoE)
    assert handle.report[0].paths == ("blocks.0.mlp", "blocks.2.mlp")
    assert handle.report[1].paths == ("blocks.1.moe", "again.moe")
    handle.revert()
    assert patched["blocks"][0].mlp is shared is patched["blocks"][2].mlp
    assert isinstance(twice.moe, FMoETransformerMLP)


def broken_rules() -> dict[str, tuple[object, str]]:
    moe, fast = mixture(2), fastmoe_mlp()
    return {
        "no match": ({"head": moe, "blocks.*.mpl": moe}, r"'blocks.\*.mpl'; did you mean 'blocks.\*.mlp'"),
        "two rules": ({"blocks.*.mlp": moe, "**.mlp": moe}, r"two rules match blocks.0.mlp: 'blocks.\*.mlp' and '\*\*"),
        "nested": ({"blocks.0": moe, "blocks.*.mlp": moe}, "replaces blocks.0, and .* replaces blocks.0.mlp inside it"),
        "root": ({"**": moe}, "matches the model itself"),
        "unknown module": ({"blocks.*.mlp": moe, "blocks.2.norm": moe}, "^blocks.2.norm: cannot upcycle a LayerNorm"),
        "other kind": ({"head": moe, "blocks.0.mlp": fast}, "^blocks.0.mlp: fastmoe_mlp.. replaces"),
        "no rules": ({}, "rules is empty"),
        "no patterns": (moe, "rules is a Mixture; expected {pattern"),
        "no replacement": ({"head": moe, "blocks.0.mlp": VisionMoE}, "the rule for 'blocks.0.mlp' is a type"),
        "nothing to accelerate": ({"head": moe, "blocks.*.norm": accelerate()}, "recognises nothing"),
    }


@pytest.mark.parametrize("case", broken_rules())
def test_errors_come_before_the_first_replacement(case: str) -> None:
    rules, message = broken_rules()[case]
    patched = model()
    modules, state = list(patched.modules()), copy.deepcopy(patched.state_dict())
    with pytest.raises(M2MKDError, match=message):
        apply(patched, rules)
    assert list(patched.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in patched.state_dict().items())


def test_unmatched_patterns_are_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown module path or pattern"):
        apply(model(), {"layers.*.mlp": mixture(2)})


@pytest.mark.parametrize("pattern", ["blocks.0.moe", "blocks.0.moe.experts.0", "blocks.0"])
def test_a_place_is_patched_once_at_a_time(pattern: str) -> None:
    patched = model()
    handle = apply(patched, {"blocks.*.moe": fastmoe_mlp()})
    with pytest.raises(M2MKDError, match="earlier call of apply"):
        apply(patched, {pattern: mixture(2)})
    apply(patched, {"blocks.*.mlp": mixture(2)})
    handle.revert()
    apply(patched, {"blocks.*.moe": fastmoe_mlp()})
    with pytest.raises(M2MKDError, match="blocks.0.moe: .* not a VisionMoE"):
        apply(copy.deepcopy(patched), {"blocks.0.moe": fastmoe_mlp()})


def test_revert_refuses_where_the_user_put_something_else() -> None:
    patched = model()
    handle = apply(patched, {"blocks.*.mlp": mixture(2)})
    patched["blocks"][1].mlp = nn.Identity()
    with pytest.raises(M2MKDError, match="a Identity at blocks.1.mlp now"):
        handle.revert()
    assert isinstance(patched["blocks"][0].mlp, VisionMoE)
    del patched["blocks"][1].mlp
    with pytest.raises(M2MKDError, match="nothing at blocks.1.mlp now"):
        handle.revert()
    patched = model()
    handle = apply(patched, {"blocks.*.moe": fastmoe_mlp()})
    moe = patched["blocks"][2].moe
    moe.gate.gate.bias = None
    with pytest.raises(M2MKDError, match=r"has other tensors .*gate.gate.bias \(none, not \(2,\)\)"):
        handle.revert()
    assert isinstance(patched["blocks"][0].moe, VisionMoE)


def my_hook(*arguments: object) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda mlp: mlp.register_forward_hook(my_hook), r"head has a forward hook \(my_hook\)"),
        (lambda mlp: mlp.fc1.register_forward_pre_hook(my_hook), r"head.fc1 has a forward pre-hook \(my_hook\)"),
        (lambda mlp: mlp.register_full_backward_hook(my_hook), "head has a backward hook"),
        (lambda mlp: mlp.fc2.register_state_dict_post_hook(my_hook), "head.fc2 has a state_dict hook"),
        (lambda mlp: mlp.fc2.weight.register_hook(my_hook), "head.fc2 has a hook on its weight"),
        (lambda mlp: setattr(mlp, "forward", my_hook), "head has a forward of its own"),
    ],
)
def test_hooks_are_refused_by_name(put: object, message: str) -> None:
    patched = model()
    put(patched["head"])
    with pytest.raises(M2MKDError, match=message):
        apply(patched, {"head": mixture(2)})


def test_no_class_changes_and_other_models_stay() -> None:
    patched, other = model(), model()
    kinds = {type(module): dict(vars(type(module))) for module in patched.modules()}
    apply(patched, {"blocks.*.moe": fastmoe_mlp(), "**.mlp": mixture(2)})
    assert names_of(other, VisionMoE) == []
    assert {kind: dict(vars(kind)) for kind in kinds} == kinds


def test_accelerate_takes_all_that_it_knows() -> None:
    patched = model()
    patched["ffn"] = ModFFN(8, 4)
    wanted, names = run(patched), list(patched.state_dict())
    handle = apply(patched, accelerate())
    assert [row.paths[0] for row in handle.report] == ["blocks.0.moe", "blocks.1.moe", "blocks.2.moe", "ffn"]
    torch.testing.assert_close(run(patched), wanted, rtol=1e-12, atol=1e-12)
    assert list(patched.state_dict()) == names
    handle.revert()
    handle = apply(patched, {"blocks.1.**": accelerate(), "ffn": nac_layer()})
    assert [row.paths[0] for row in handle.report] == ["blocks.1.moe", "ffn"]
