"""Find the blocks of a model: the modules of which its depth is made, in whatever containers they stand."""

from __future__ import annotations

import re

from torch import nn

from m2mkd_fast.errors import M2MKDError

_LISTS = (nn.Sequential, nn.ModuleList)


def find_blocks(model: nn.Module) -> set[str]:
    """Paths of the modules that a cut may run between; no path lies within another.

    timm's models say them (`group_matcher`); other models' blocks are the compound modules in their plain lists
    (nn.Sequential, nn.ModuleList), or of the model itself where there are none. Where that leads to stages that hold a
    list of several blocks of one class, the blocks are those. Raises M2MKDError for a model without any.
    """
    blocks = _matched(model)
    if len(blocks) < 2:
        blocks = _by_structure(model)
    if not blocks:
        blocks = {name for name, child in model.named_children() if _compound(child)}
    if not blocks:
        raise M2MKDError(
            f"no blocks found in a {type(model).__qualname__}; a model that is cut holds its blocks in an "
            "nn.Sequential or nn.ModuleList, or names them in timm's `group_matcher`"
        )
    modules = dict(model.named_modules())
    return {inner for path in blocks for inner in _refined(path, modules[path])}


def _refined(path: str, module: nn.Module) -> set[str]:
    """The blocks of a stage that was found where its blocks were looked for; else the block itself."""
    found = set()
    for name, child in module.named_children():
        blocks = {key: block for key, block in child.named_children() if _compound(block)}
        kinds = {type(block) for block in blocks.values()}
        if type(child) in _LISTS and len(blocks) > 1 and len(kinds) == 1 and kinds.isdisjoint(_LISTS):
            for key, block in blocks.items():
                found |= _refined(f"{path}.{name}.{key}", block)
    return found or {path}


def _matched(model: nn.Module) -> set[str]:
    if not hasattr(model, "group_matcher"):
        return set()
    matcher = model.group_matcher(coarse=False)
    patterns = matcher.get("blocks") if isinstance(matcher, dict) else None
    if patterns is None or callable(patterns):
        return set()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # A pattern with an order of its own is of a single layer, such as the last norm.
    patterns = [p if isinstance(p, str) else p[0] for p in patterns if isinstance(p, str) or p[1] is None]
    modules = dict(model.named_modules())
    found = set()
    for name, _ in model.named_parameters():
        for pattern in patterns:
            match = re.match(pattern, name)
            if match and match.groups():
                path = match.group(0).rstrip(".")
                while path and path not in modules:
                    path = path.rpartition(".")[0]
                if path and _compound(modules[path]):
                    found.add(path)
                break
    return _innermost(found)


def _by_structure(model: nn.Module, path: str = "", in_list: bool = False) -> set[str]:
    found = set()
    for name, child in model.named_children():
        place = f"{path}.{name}" if path else name
        if type(child) in _LISTS and any(map(_compound, child.children())):
            found |= _by_structure(child, place, True)
        elif in_list and _compound(child):
            found.add(place)
        elif not in_list:
            found |= _by_structure(child, place)
    return found


def _compound(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _innermost(paths: set[str]) -> set[str]:
    return {path for path in paths if not any(other.startswith(path + ".") for other in paths)}
