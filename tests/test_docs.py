"""Every Python block in the README, the docs and the examples runs, in order, one namespace a file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_fast.pipeline import teaching

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code_of(page: Path) -> str:
    """The page's code, blank lines before each block so that an error names the page's own line."""
    text = page.read_text()
    if page.suffix == ".py":
        return text
    code = ""
    for block in BLOCK.finditer(text):
        code += "\n" * (text[: block.start(1)].count("\n") - code.count("\n")) + block[1]
    return code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, monkeypatch, tmp_path):
    """As it stands, but that no training is longer than two steps."""
    whole = teaching.fit
    monkeypatch.setattr(teaching, "fit", lambda task, split, config, **more: whole(task, split, short(config), **more))
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "__main__"})


def short(config):
    return replace(config, steps=min(config.steps, 2), batch_size=16)


def test_there_is_code_to_run():
    assert "teach_module" in code_of(ROOT / "README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
