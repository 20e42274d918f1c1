"""What the README, the pages and the examples show runs: Python in order, one namespace a file; commands as typed."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

import m2mkd_fast
from m2mkd_fast import cli
from m2mkd_fast.pipeline import teaching
from m2mkd_fast.pipeline.config import load_config, make_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^(?P<margin> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)
PHASES = (
    "teacher.train",
    "meta.train",
    "incubation.train",
    "incubation.finetune",
    "pair.train",
    "e2e",
    "baseline.train",
)


def title(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[re.Match[str]]:
    return (block for block in FENCE.finditer(page.read_text()) if block["language"] == language)


def code_of(page: Path) -> str:
    """The page's code, blank lines before each block so that an error names the page's own line."""
    text, code = page.read_text(), ""
    for block in blocks(page, "python"):
        code += "\n" * (text[: block.start("code")].count("\n") - code.count("\n")) + block["code"]
    return code


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's shell blocks, as words."""
    return [words for block in blocks(page, "sh") for words in commands_of(block["code"])]


def commands_of(script: str) -> list[list[str]]:
    lines = script.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    # Settings of the environment stand before the command.
    return [line[next(i for i, word in enumerate(line) if not re.match(r"\w+=", word)) :] for line in words if line]


WITH_CODE = [page for page in PAGES if code_of(page)]
EXPORTING = [page for page in WITH_CODE if ".onnx" in code_of(page)]  # slowly
WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.fixture
def shortened(monkeypatch, tmp_path) -> None:
    """An empty folder to work in, no training of more than two steps, stand-ins for packages that cannot be had."""
    import published_fastmoe
    import published_nac

    circuits = "neural_compilers.model.nc.attention"
    parents = [circuits.rsplit(".", depth)[0] for depth in (1, 2, 3)]
    stand_ins = {name: ModuleType(name) for name in parents} | {circuits: published_nac, "fmoe": published_fastmoe}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    whole = teaching.fit
    monkeypatch.setattr(teaching, "fit", lambda task, split, config, **more: whole(task, split, short(config), **more))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in EXPORTING], ids=title)
def test_code_runs(page, shortened):
    """As it stands, but that no training is longer than two steps."""
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.skipif(None in map(find_spec, ("onnxruntime", "onnxscript")), reason="the packages for ONNX are missing")
@pytest.mark.parametrize("page", EXPORTING, ids=title)
def test_code_that_exports_runs(page, shortened):
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=title)
def test_examples_run(script, shortened):
    """They hold what the pages show, as scripts."""
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "__main__"})


def short(config):
    return replace(config, steps=min(config.steps, 2), batch_size=16)


def test_there_is_code_to_run():
    assert "teach_module" in code_of(ROOT / "README.md")
    assert len(WITH_CODE) > 8 and len(WITH_COMMANDS) > 3


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_no_block_escapes_the_tests(page):
    """Each block says what it is, so that it is run, read or known to be neither."""
    for block in FENCE.finditer(page.read_text()):
        assert block["language"] in ("python", "sh", "yaml", "cpp", "text", ""), (
            f"{title(page)}: ```{block['language']}"
        )
        assert not block["margin"] or block["language"] == "", f"{title(page)}: an indented block is not run"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=title)
def test_commands_can_be_typed(page):
    for words in commands(page):
        check_command(words)


def check_command(words: list[str]) -> None:
    line, program = shlex.join(words), words[0]
    if program == "m2mkd" or words[:3] == ["python", "-m", "m2mkd_fast"]:
        check_m2mkd(words[1:] if program == "m2mkd" else words[3:])
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None, f"{line}: no module {words[2]}"
    elif program == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{line}: no target {target}"
    elif program in ("python", "sbatch", "bash", "torchrun"):
        script = next(word for word in words[1:] if word.endswith((".py", ".sh")))
        assert (ROOT / script).is_file(), f"{line}: no file {script}"
    else:
        assert words[:2] == ["pip", "install"], f"{line}: this test knows no {program}"


def check_m2mkd(words: list[str]) -> None:
    """The parser takes it, and the configuration it names is there and has the keys that it sets."""
    try:
        options, rest = cli._parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"m2mkd {shlex.join(words)}: the parser refuses it")
    overrides = [*getattr(options, "overrides", []), *rest]
    assert all("=" in word for word in rest), f"m2mkd {shlex.join(words)}: nobody reads {rest}"
    if getattr(options, "config", None):
        load_config(ROOT / options.config, overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "yaml"))], ids=title)
def test_configurations_are_understood(page):
    for block in blocks(page, "yaml"):
        make_config([OmegaConf.create(block["code"])])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if "m2mkd " in page.read_text()], ids=title)
def test_a_reader_can_follow(page, shortened, tmp_path, capsys):
    """Code and `m2mkd` commands in the page's order; the project's configurations with one step a phase, few images."""
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.yaml"):
        config = OmegaConf.load(path)
        for phase in PHASES:
            OmegaConf.update(config, phase, {"steps": 1, "batch_size": 8, "evaluate_every": 1}, force_add=True)
        OmegaConf.update(config, "data.options", {"images_per_class": 8}, force_add=True)
        OmegaConf.update(config, "meta.max_hybrid_drop", 100.0, force_add=True)
        OmegaConf.save(config, tmp_path / "configs" / path.name)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in FENCE.finditer(page.read_text()):
        if block["language"] == "python":
            exec(block["code"], names)
        for words in commands_of(block["code"]) if block["language"] == "sh" else ():
            if words[0] == "m2mkd" and "--launcher" not in words:  # those want a cluster; tests/pipeline has one
                alone = re.sub(r" --jobs \d+", "", shlex.join(words[1:]))
                assert cli.main(shlex.split(alone)) == 0, f"{shlex.join(words)}: {capsys.readouterr().err[-2000:]}"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_pictures_are_those_that_the_script_draws():
    specification = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    pictures = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(pictures)
    for name, picture in pictures.all_pictures().items():
        path = ROOT / "docs" / "images" / name
        assert path.read_text() == picture, f"{name} is not what docs/pictures.py draws; run python docs/pictures.py"


def test_every_public_name_is_on_an_api_page():
    shown = {
        match[1]
        for page in (ROOT / "docs/api").glob("*.md")
        for match in re.finditer(r"^::: (\S+)", page.read_text(), re.M)
    }
    for name in set(m2mkd_fast.__all__) - {"__version__"}:
        home = getattr(m2mkd_fast, name).__module__
        assert home in shown, f"{name} is on no API page: add `::: {home}` to the page of its room in docs/api"
    for name in shown:
        assert find_spec(name) is not None, f"an API page asks for {name}, which is no module"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "objects.inv").read_bytes()
    assert inventory.startswith(b"# Sphinx inventory")
    operators = (tmp_path / "api/operators/index.html").read_text()
    assert ".. math::" not in operators and ":class:" not in operators
