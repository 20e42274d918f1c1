from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain, in_cut, out_cut
from m2mkd_fast.modules.split import split
from m2mkd_fast.nn.cut import Cut


class Part(nn.Module):
    """A linear module that says its widths the way a Neural Attentive Circuit's student does: by bare stitches."""

    def __init__(self, read: int | None, width: int, given: int | None) -> None:
        super().__init__()
        if read is not None:
            self.pre_stitch = nn.Linear(read, width)
        self.body = nn.Linear(width, width)
        if given is not None:
            self.post_stitch = nn.Linear(width, given)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.pre_stitch(x) if hasattr(self, "pre_stitch") else x)
        return self.post_stitch(x) if hasattr(self, "post_stitch") else x


@pytest.fixture
def chain() -> ModuleChain:
    torch.manual_seed(0)
    return ModuleChain([Part(None, 3, 5), Part(5, 4, 6), Part(6, 2, None)])


def test_runs_the_modules_in_order(chain: ModuleChain) -> None:
    x = torch.randn(2, 3)
    first, second, third = chain
    assert torch.equal(chain(x), third(second(first(x))))
    assert torch.equal(chain.run(x, 0, 2), second(first(x)))
    middle = first(x)
    assert torch.equal(chain.run(middle, 1), third(second(middle)))
    assert chain.run(x, 1, 1) is x
    assert chain.run(x, 3) is x


def test_indexing(chain: ModuleChain) -> None:
    assert len(chain) == 3
    assert chain[1] is chain.stages[1]
    assert chain[1:] == [chain[1], chain[2]]
    assert chain[:2] == [chain[0], chain[1]]


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c[-1],
        lambda c: c[3],
        lambda c: c[-1:],
        lambda c: c[:-1],
        lambda c: c.run(torch.zeros(1, 3), -1),
        lambda c: c.run(torch.zeros(1, 3), 0, -1),
        lambda c: c.run(torch.zeros(1, 3), 4),
        lambda c: c.check_index(-2),
    ],
)
def test_indices_out_of_range_are_refused(chain: ModuleChain, use) -> None:
    with pytest.raises(M2MKDError, match="is not in 0\\.\\."):
        use(chain)


def test_running_backwards_is_refused(chain: ModuleChain) -> None:
    with pytest.raises(M2MKDError, match="backwards"):
        chain.run(torch.zeros(1, 3), 2, 1)


def test_widths_come_from_either_side_of_a_cut(chain: ModuleChain) -> None:
    assert chain.widths == (5, 6)
    assert (in_cut(chain[0]), out_cut(chain[2])) == (None, None)
    assert ModuleChain([nn.Linear(3, 5), chain[1], chain[2]]).widths == (5, 6)
    with pytest.raises(M2MKDError, match="module 0 nor module 1"):
        _ = ModuleChain([nn.Linear(3, 5), nn.Linear(5, 2)]).widths


def test_neighbours_that_do_not_fit_are_refused(chain: ModuleChain) -> None:
    with pytest.raises(M2MKDError, match="module 0 gives tokens of width 5, module 1 reads tokens of width 6"):
        ModuleChain([chain[0], chain[2]])
    with pytest.raises(M2MKDError, match="at least one"):
        ModuleChain([])


def test_facts_of_a_split_model() -> None:
    chain = split(create_model("vit_micro", embed_dim=16, num_heads=2, depth=3, num_classes=7), 3)
    assert (chain.widths, chain.tokens, chain.num_classes) == ((16, 16), (17, 17), 7)
    assert {"stages.0.pos_embed", "stages.0.cls_token"} <= chain.no_weight_decay()


def test_golden_names_of_published_stages(golden_dir, read_golden) -> None:
    """A chain's state dict has the names under which the published checkpoints hold a model's stages."""
    metadata, tensors = read_golden(golden_dir / "m2mkd_vmoe_idx1_soft.safetensors")
    config = metadata["config"]
    model = create_model("vit_micro", in_chans=3, depth=sum(config["teacher_depths"]), **config["vit"])
    published = {k.removeprefix("teacher/"): v.shape for k, v in tensors.items() if k.startswith("teacher/")}
    chain = split(model, config["teacher_depths"])
    assert {name: tensor.shape for name, tensor in chain.state_dict().items()} == published


def test_neighbours_of_other_layouts_and_grids_are_refused() -> None:
    map_of = {"out_cut": Cut(4, "channels_last", (2, 2))}
    for read in (Cut(4), Cut(4, "channels_first", (2, 2)), Cut(4, "channels_last", (2, 3))):
        with pytest.raises(M2MKDError, match=r"gives channels-last maps of width 4 on a grid of 2x2, module 1 reads"):
            ModuleChain([with_cuts(**map_of), with_cuts(in_cut=read)])
    chain = ModuleChain([with_cuts(**map_of), with_cuts(in_cut=Cut(4, "channels_last"))])
    assert (chain.cuts, chain.widths, chain.tokens) == ((map_of["out_cut"],), (4,), (4,)), (
        "the side that knows the grid"
    )


def with_cuts(**cuts: Cut) -> nn.Module:
    module = nn.Identity()
    for name, cut in cuts.items():
        setattr(module, name, cut)
    return module
