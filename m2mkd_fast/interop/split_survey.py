"""Which of timm's architectures `split` cuts, each shown on a small model of random values: `m2mkd split --check`."""

from __future__ import annotations

import fnmatch
import gc
import json
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from m2mkd_fast.atomic import unwritable, write_text_atomically
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.interop.small_models import PARAMETERS_AT_MOST, small_model, smallest
from m2mkd_fast.modules import ModuleChain, verify_split
from m2mkd_fast.modules.split import cuttable_of

EXACT = "bit-exact"


@dataclass(frozen=True)
class Finding:
    """What became of one architecture.

    Attributes:
        family: module of timm.models that defines it.
        pixels: side of the square images; None where the model was not built.
        shortened: arguments that built it with fewer blocks, or "".
        units: blocks and other parts between which it is cut; None where it is not.
        cuts: places between modules at the finest cut.
        layouts: what passes there, each kind once.
        evaluation, training: "bit-exact", or why not, in that mode.
    """

    family: str
    architecture: str
    pixels: int | None = None
    shortened: str = ""
    units: int | None = None
    cuts: int | None = None
    layouts: tuple[str, ...] = ()
    evaluation: str = ""
    training: str = ""
    timm: str = timm.__version__

    @property
    def exact(self) -> bool:
        """Whether the chain equals the model bit for bit in evaluation mode, at the finest cut and at four modules."""
        return self.evaluation == EXACT


def families(pattern: str = "*") -> dict[str, list[str]]:
    """timm's architectures by family: all of the families that match a shell pattern, and single ones that do.

    Raises:
        UnknownNameError: nothing matches.
    """
    found = {}
    for family in timm.list_modules():
        architectures = timm.list_models(module=family)
        whole = fnmatch.fnmatchcase(family, pattern)
        matching = [name for name in architectures if whole or fnmatch.fnmatchcase(name, pattern)]
        if matching:
            found[family] = matching
    if not found:
        known = [*timm.list_modules(), *timm.list_models()]
        raise UnknownNameError("family or architecture of timm", pattern, known, "Patterns are the shell's: 'swin*'.")
    return found


def survey(
    pattern: str = "*", every_architecture: bool = False, output: str | Path | None = None
) -> Iterator[tuple[Finding, int]]:
    """Check the smallest architecture of each matching family, or every one; yield what was found and for how many.

    Models are built one at a time and forgotten.

    Args:
        pattern: shell pattern of families' or architectures' names.
        every_architecture: check all that match, not the smallest of each family.
        output: file of JSON lines that findings are added to; what it already holds from this version of timm is read
            instead of checked again.

    Raises:
        UnknownNameError: nothing matches the pattern.
        M2MKDError: the output file is none of this kind, or cannot be written.
    """
    known = _read(Path(output)) if output is not None else {}
    for family, architectures in families(pattern).items():
        for name in architectures if every_architecture else [smallest(architectures)]:
            finding = known.get(name)
            if finding is None:
                finding = check(family, name)
                gc.collect()  # traced graphs refer to themselves, and hold models of up to a GiB
                if output is not None:
                    _append(Path(output), finding)
            yield finding, 1 if every_architecture else len(architectures)


def check(family: str, architecture: str) -> Finding:
    """Build one architecture small, cut it between all its units and into four, and compare with the model.

    The comparison is bit for bit, at a batch of four images, in evaluation and in training mode.
    """
    found: dict = {"family": family, "architecture": architecture}
    try:
        small = small_model(architecture)
        found |= {"pixels": small.image_shape[-1], "shortened": small.shortened}
        cuttable = cuttable_of(small.model.eval(), small.image_shape)  # traced once, for both cuts
        if cuttable.units == 1:
            raise M2MKDError(f"no place to cut{cuttable.why_no_more}")
        chains = [cuttable.cut(cuttable.units), cuttable.cut(min(4, cuttable.units))]
        layouts = tuple(sorted({stage.out_cut.layout for stage in list(chains[0])[:-1]}))
        found |= {"units": cuttable.units, "cuts": len(chains[0]) - 1, "layouts": layouts}
    except Exception as error:  # whatever a model of others' does is a finding, and the next one's turn
        return Finding(**found, evaluation=_reason(error), training=_reason(error))
    images = torch.randn(4, *small.image_shape, generator=torch.Generator().manual_seed(1))
    return Finding(
        **found,
        evaluation=_compare(small.model.eval(), chains, images),
        training=_compare(small.model.train(), chains, images),
    )


def _compare(model: nn.Module, chains: list[ModuleChain], images: Tensor) -> str:
    try:
        for chain in chains:
            verify_split(model, chain.train(model.training), images)
    except Exception as error:  # as above
        return _reason(error)
    return EXACT


def _reason(error: Exception) -> str:
    """One line: a refusal in its own words; anything else with its kind and place."""
    message = " ".join(str(error).split())
    if isinstance(error, M2MKDError):
        return message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {message}"


def _append(path: Path, finding: Finding) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finding)) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def _read(path: Path) -> dict[str, Finding]:
    if not path.exists():
        return {}
    findings = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            finding = Finding(**entry | {"layouts": tuple(entry["layouts"])})
        except (ValueError, TypeError, KeyError) as error:
            raise M2MKDError(
                f"{path}:{number} is no finding of m2mkd split --check ({error}); name another file or remove the line"
            ) from error
        if finding.timm == timm.__version__:
            findings[finding.architecture] = finding
    return findings


HEADINGS = ("family", "architectures", "tried", "pixels", "units", "cuts", "layouts", "evaluation", "training")


def cells(finding: Finding, architectures: int) -> tuple[str, ...]:
    """One row of the table, under `HEADINGS`."""
    tried = finding.architecture + (f" ({finding.shortened})" if finding.shortened else "")
    counts = ("-" if number is None else str(number) for number in (finding.pixels, finding.units, finding.cuts))
    layouts = ", ".join(layout.replace("_", " ") for layout in finding.layouts) or "-"
    results = (textwrap.shorten(result, 240, placeholder=" …") for result in (finding.evaluation, finding.training))
    return finding.family, str(architectures), tried, *counts, layouts, *results


def share(findings: list[tuple[Finding, int]], every_architecture: bool) -> str:
    """The line under the table: what part of the architectures is cut, and how that is known."""
    total = sum(count for _, count in findings)
    exact = sum(count for finding, count in findings if finding.exact)
    how = "each checked itself" if every_architecture else "in families whose smallest was checked"
    return f"{exact} of {total} architectures of timm {timm.__version__} ({100 * exact / total:.1f} %) are cut, {how}."


def write_markdown(path: str | Path, findings: list[tuple[Finding, int]], every_architecture: bool, line: str) -> None:
    """Write the table as a page; `line` is the command that does so again."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(cells(*finding) for finding in findings)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    write_text_atomically(
        Path(path),
        f"""# What of timm can be split

Written by `{line}`: do not edit.

{share(findings, every_architecture)}

Each architecture is built with random values at the smallest image size that it takes, in brackets with fewer blocks
where it has more than {PARAMETERS_AT_MOST // 10**6} million parameters. It is cut between all its units, and into four
modules; *{EXACT}* says that both chains equal the model bit for bit on a batch of four images.

{table}
""",
    )
