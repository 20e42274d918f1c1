"""The package imports lightly, its public names exist, and its rooms import only from below."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import m2mkd_fast

PACKAGE = Path(m2mkd_fast.__file__).parent
# Each room may import itself and the rooms before it; the side rooms are for pipeline and cli alone.
ROOMS = ["errors", "_extension", "backend", "kernels", "ops", "nn", "models", "modules", "distill", "pipeline", "cli"]
SIDE_ROOMS = ["data", "evaluate", "interop", "patches", "report"]


def run_python(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_is_lazy():
    loaded = run_python("import sys, m2mkd_fast; print(*(name for name in sys.modules if '.' not in name))")
    assert not {"torch", "triton", "torchvision", "timm", "numpy"} & set(loaded)


@pytest.mark.parametrize(
    "module",
    [
        "ops.route",
        "ops.routing_losses",
        "ops.modulated_norm",
        "ops.modulated_geglu",
        "ops.latent_attention",
        "backend",
        "nn",
    ],
)
def test_operators_and_layers_import_no_vision_and_start_no_cuda(module):
    code = f"import sys, torch; before = set(sys.modules); import m2mkd_fast.{module}; "
    code += "print(torch.cuda.is_initialized(), *(set(sys.modules) - before))"
    started_cuda, *loaded = run_python(code)
    assert started_cuda == "False"
    assert not {"torchvision", "timm"} & set(loaded)
    assert not {name for name in loaded if name.partition(".")[0] == "triton"}


@pytest.mark.parametrize("name", m2mkd_fast.__all__)
def test_public_name_exists(name):
    assert getattr(m2mkd_fast, name) is not None
    assert name in dir(m2mkd_fast)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        m2mkd_fast.distil  # noqa: B018


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(file: Path) -> set[str]:
    """Modules of the package that a file imports, in any of its functions too, as absolute names."""
    package = ["m2mkd_fast", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from m2mkd_fast import data` names a room, `from m2mkd_fast.data import x` does not add to its module.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "m2mkd_fast" else {module}
    return {name for name in found if name.startswith("m2mkd_fast.")}


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("errors", "_extension", "kernels")])
def test_rooms_import_only_from_below(room):
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    if room in ("pipeline", "cli"):
        allowed |= set(SIDE_ROOMS)
    found = {(str(file.relative_to(PACKAGE)), name) for file in files for name in imported_modules(file)}
    assert files
    shared = {file.stem for file in PACKAGE.glob("*.py")} - {"cli"}  # single files beside the rooms serve them all
    assert {(file, name) for file, name in found if room_of(name) not in allowed | shared} == set()


def test_the_check_of_rooms_sees_imports_inside_functions(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "ops" / "x.py"
    file.parent.mkdir()
    file.write_text(
        "from m2mkd_fast import data\ndef f():\n    from ..pipeline.run import run\n    import m2mkd_fast.cli\n"
    )
    assert imported_modules(file) == {"m2mkd_fast.data", "m2mkd_fast.pipeline.run", "m2mkd_fast.cli"}
