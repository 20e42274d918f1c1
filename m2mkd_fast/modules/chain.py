"""A model as an ordered list of modules, each of which maps what its predecessor gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.cut import Cut


def in_cut(module: nn.Module) -> Cut | None:
    """What a module reads; None for one that reads images, or does not say."""
    return _cut(module, "in", "pre_stitch", "in_features")


def out_cut(module: nn.Module) -> Cut | None:
    """What a module gives; None for one that gives logits, or does not say."""
    return _cut(module, "out", "post_stitch", "out_features")


def _cut(module: nn.Module, side: str, stitch_name: str, stitch_attribute: str) -> Cut | None:
    """From the module's `in_cut`, else from a width alone: tokens whose number and grid are taken as they come."""
    if hasattr(module, f"{side}_cut"):
        return getattr(module, f"{side}_cut")
    stitch = getattr(module, stitch_name, None)
    width = getattr(module, f"{side}_width", getattr(stitch, stitch_attribute, None))
    return None if width is None else Cut(width)


class ModuleChain(nn.Module):
    """Modules 0 ... L-1 in a row: `forward(x) = stages[L-1](... stages[0](x))`.

    Shapes: images `[B, C, H, W]` in, features as `cuts[i]` says between modules i and i+1, logits `[B, classes]` out.
    Modules are counted from 0; a negative index is an error, because "the last module" means another module as
    soon as the chain is cut differently.

    Modules are held, not copied: two chains may share one. The constructor raises M2MKDError for an empty chain and for
    neighbours that do not read what they are given (another width, layout or grid).
    """

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        if not self.stages:
            raise M2MKDError("a chain needs at least one module, none was given")
        for i in range(len(self) - 1):
            given, read = out_cut(self.stages[i]), in_cut(self.stages[i + 1])
            if given is not None and read is not None and not given.agrees_with(read):
                raise M2MKDError(
                    f"module {i} gives {given}, module {i + 1} reads {read}; stitches between them are made by "
                    "`student_modules(model, parts, cuts)`"
                )

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.stages)

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        if isinstance(index, slice):
            for bound in (index.start, index.stop):
                if bound is not None:
                    self.check_index(bound, limit=len(self) + 1)
            return list(self.stages)[index]
        return self.stages[self.check_index(index)]

    def check_index(self, index: int, limit: int | None = None) -> int:
        """The index, if it is one of 0 ... limit-1 (limit: the number of modules); else M2MKDError."""
        limit = len(self) if limit is None else limit
        if not 0 <= index < limit:
            hint = f"; the last of {len(self)} modules is {len(self) - 1}" if index < 0 else ""
            raise M2MKDError(f"module index {index} is not in 0..{limit - 1}{hint}")
        return index

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Apply modules start ... stop-1 to x; none of them where start equals stop."""
        stop = len(self) if stop is None else self.check_index(stop, limit=len(self) + 1)
        if self.check_index(start, limit=len(self) + 1) > stop:
            raise M2MKDError(f"modules {start} to {stop} run backwards; start may be at most stop")
        for stage in list(self.stages)[start:stop]:
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What passes between the modules, at each of the L-1 cuts."""
        cuts = []
        for i in range(len(self) - 1):
            sides = [cut for cut in (out_cut(self.stages[i]), in_cut(self.stages[i + 1])) if cut is not None]
            if not sides:
                raise M2MKDError(
                    f"neither module {i} nor module {i + 1} says what passes between them; give one an attribute "
                    "`out_cut` or `in_cut`"
                )
            cuts.append(next((cut for cut in sides if cut.grid is not None), sides[0]))
        return tuple(cuts)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the features at each of the L-1 cuts."""
        return tuple(cut.width for cut in self.cuts)

    @property
    def tokens(self) -> tuple[int | None, ...]:
        """Number of positions at each of the L-1 cuts, None where it is not known."""
        return tuple(cut.tokens for cut in self.cuts)

    @property
    def num_classes(self) -> int:
        """Classes of the logits that the last module gives."""
        return self.stages[len(self) - 1].num_classes

    def no_weight_decay(self) -> set[str]:
        """Parameters that take no weight decay beside norms and biases: position embeddings and tokens."""
        return {
            f"stages.{i}.{name}"
            for i, stage in enumerate(self.stages)
            if hasattr(stage, "no_weight_decay")
            for name in stage.no_weight_decay()
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Which layer a parameter belongs to, for timm's layer-wise learning rates: the modules' layers in a row.

        A module that does not say what its layers are is one layer; `coarse` makes each of them one.
        """
        from timm.models import group_parameters  # here, because importing timm takes seconds

        layers = {}
        for i, stage in enumerate(self.stages):
            matcher = None if coarse else getattr(stage, "group_matcher", None)
            inside = {} if matcher is None else group_parameters(stage, matcher(), reverse=True)
            for name, _ in stage.named_parameters():
                layers[f"stages.{i}.{name}"] = (float(i), float(inside.get(name, 0)))
        return layers.__getitem__
