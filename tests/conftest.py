"""What all tests share: the golden files, how they are read, and how a number is compared with one of theirs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from processes import run_checks
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN_TOLERANCE = 1e-9
ROUNDING = 1e-14

GoldenFile = tuple[dict[str, Any], dict[str, torch.Tensor]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden_case(*patterns, exclude=()): run once per golden file that matches")
    # The models of the tests are so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    # Examples are small; how long one takes on a busy machine says nothing.
    hypothesis.settings.register_profile("project", deadline=None)
    hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip without a CUDA device, unless `M2MKD_REQUIRE_GPU=1` says that there has to be one."""
    if torch.cuda.is_available() or os.environ.get("M2MKD_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device; run `make gpu-check` on a machine with one"))


def find_golden_dir() -> Path:
    """The folder of golden files: `M2MKD_GOLDEN_DIR` where it is set, the project's own otherwise."""
    return Path(os.environ.get("M2MKD_GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_files(*patterns: str) -> list[Path]:
    """The golden files whose names match one of the patterns, sorted by name."""
    return sorted({path for pattern in patterns for path in find_golden_dir().glob(pattern)})


def read_golden_file(path: Path) -> GoldenFile:
    """Metadata with its JSON decoded, and the tensors, of one golden file."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: _decode(text) for key, text in (file.metadata() or {}).items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|; absolute where the expected tensor is zero. NaN counts as infinite.

    Gradients that vanish mathematically (a bias in front of a softmax) are stored as what rounding left of them:
    expected tensors below `ROUNDING` count as zero.
    """
    if expected.numel() == 0:
        return 0.0
    # Equal infinities (a log of zero) have no difference; any other one shows up as infinity or NaN.
    difference = torch.where(actual == expected, torch.zeros_like(expected), (actual - expected).abs())
    scale = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else expected.new_zeros(())
    error = difference.max() / scale if scale > ROUNDING else difference.max()
    return float("inf") if error.isnan() else error.item()


def check_golden(actual: torch.Tensor | None, expected: torch.Tensor, name: str) -> None:
    """Fail unless `actual` has the shape of the golden tensor and its numbers to 1e-9; `None` is a missing gradient."""
    assert actual is not None, f"{name}: nothing was computed"
    actual = actual.detach()
    if expected.shape == (1,) and actual.shape == ():
        actual = actual.reshape(1)  # a scalar is stored with one element
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, golden {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{name}: other integers than the golden file's"
        return
    error = relative_error(actual.to(expected.dtype), expected)
    assert error < GOLDEN_TOLERANCE, f"{name}: relative error {error:.2e}, allowed {GOLDEN_TOLERANCE:.0e}"


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # a bare word such as the dtype


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return find_golden_dir()


@pytest.fixture(scope="session")
def read_golden() -> Callable[[Path], GoldenFile]:
    return read_golden_file


@pytest.fixture(scope="session")
def assert_golden() -> Callable[[torch.Tensor | None, torch.Tensor, str], None]:
    return check_golden


@pytest.fixture
def altered_golden(tmp_path: Path) -> Callable[[Path, str], Path]:
    """Copy a golden file with one number changed by a millionth of its tensor's largest: no check may accept it."""

    def alter(path: Path, key: str) -> Path:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = tensors[key].view(-1)
        numbers[0] += 1e-6 * numbers.abs().max()
        save_file(tensors, tmp_path / path.name, metadata)
        return tmp_path / path.name

    return alter


@pytest.fixture(scope="session")
def golden_manifest(golden_dir: Path) -> dict[str, Any]:
    """Names and shapes of every tensor in the published models' checkpoints, with their configurations."""
    return json.loads((golden_dir / "reference_state_manifest.json").read_text())


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, list[str]], dict[str, str]]:
    """What came of a module's checks on so many processes, which are started once for a list of them."""
    known: dict[tuple, dict[str, str]] = {}

    def run(processes: int, names: list[str]) -> dict[str, str]:
        key = (processes, *names)
        if key not in known:
            known[key] = run_checks(str(request.path), names, processes, tmp_path_factory.mktemp("processes"), 240)
        return known[key]

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test marked `golden_case(*patterns, exclude=...)` once for every golden file that matches.

    A pattern without any file is an error of the project's own folder; a folder named by M2MKD_GOLDEN_DIR may hold
    less.
    """
    marker = metafunc.definition.get_closest_marker("golden_case")
    if marker is None or "golden_case" not in metafunc.fixturenames:
        return
    excluded = golden_files(*marker.kwargs.get("exclude", ()))
    files = [path for path in golden_files(*marker.args) if path not in excluded]
    if not files and "M2MKD_GOLDEN_DIR" not in os.environ:
        pytest.fail(f"no golden file matches {marker.args} in {find_golden_dir()}", pytrace=False)
    metafunc.parametrize("golden_case", files, ids=[path.stem for path in files])
