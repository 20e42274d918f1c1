"""The first rule of the architecture: imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "m2mkd_fast"
# Lower rooms first. A room may import itself, those before it, and what is listed for it.
FLOORS = ["kernels", "ops", "nn", "models", "modules", "distill", "pipeline", "cli"]
FOUNDATION = {"errors", "atomic", "autocast", "backend", "checks", "_extension", "__init__", "__version__"}
SIDE_ROOMS = {"data", "evaluate", "interop", "report", "info", "patch", "patches"}
USERS_OF_SIDE_ROOMS = {"pipeline", "cli"}

SIDE_ROOMS_MAY_IMPORT = {
    "data": set(),
    "evaluate": {"data"},
    "interop": {"ops", "nn", "models", "modules", "patch"},
    "report": set(),
    "info": {"ops"},
    "patch": {"patches"},
    "patches": {"ops", "nn"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "m2mkd_fast":
                names = [f"m2mkd_fast.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("m2mkd_fast.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    if room in FOUNDATION | {"__main__"}:
        return
    allowed = FOUNDATION | {room}
    if room in SIDE_ROOMS:
        allowed |= SIDE_ROOMS_MAY_IMPORT[room]
    else:
        allowed |= set(FLOORS[: FLOORS.index(room)])
    if room in USERS_OF_SIDE_ROOMS:
        allowed |= SIDE_ROOMS
    upward = imported_rooms(path) - allowed
    assert not upward, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}"
