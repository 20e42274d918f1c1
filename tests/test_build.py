"""How the extension modules are built and loaded, what the distributions hold, and what the CUDA kernels use."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m2mkd_fast import _extension, info

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def setup_file() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def fake_toolkit(folder: Path, release: str) -> Path:
    """A folder that looks like a CUDA toolkit of this release."""
    for path in ("bin", "include", "lib64"):
        (folder / path).mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    nvcc = folder / "bin/nvcc"
    release_line = f"Cuda compilation tools, release {release}, V{release}.1"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={folder}' >&2\necho '{release_line}'\n")
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def toolkit_behind_a_script(tmp_path, monkeypatch) -> Path:
    """The PATH's nvcc is a script, in a folder without headers, that calls the real one."""
    toolkit = fake_toolkit(tmp_path / "cuda-13.9", "13.9")
    script = tmp_path / "bin/nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("M2MKD_BUILD_CUDA", raising=False)
    return toolkit


def test_the_toolkit_behind_a_script_is_found(setup_file, toolkit_behind_a_script):
    assert setup_file.find_cuda_home() == toolkit_behind_a_script
    home, text = setup_file.choose_cuda("13.0")
    assert home == toolkit_behind_a_script
    assert text == f"CUDA 13.9 in {toolkit_behind_a_script}"


def test_a_folder_without_headers_is_no_toolkit(setup_file, toolkit_behind_a_script, monkeypatch):
    (toolkit_behind_a_script / "include/cuda_runtime.h").unlink()
    assert setup_file.find_cuda_home() != toolkit_behind_a_script


def test_cuda_home_goes_before_the_path(setup_file, toolkit_behind_a_script, tmp_path, monkeypatch):
    other = fake_toolkit(tmp_path / "other", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert setup_file.find_cuda_home() == other
    home, reason = setup_file.choose_cuda("13.0")
    assert home is None
    assert reason == f"the toolkit in {other} is CUDA 12.8, torch needs 13.0"


@pytest.mark.parametrize(
    ("wish", "torch_cuda", "reason"),
    [("0", "13.0", "switched off by M2MKD_BUILD_CUDA=0"), ("auto", None, "this torch is built without CUDA")],
)
def test_why_cuda_is_left_out(setup_file, toolkit_behind_a_script, monkeypatch, wish, torch_cuda, reason):
    monkeypatch.setenv("M2MKD_BUILD_CUDA", wish)
    assert setup_file.choose_cuda(torch_cuda) == (None, reason)


@pytest.mark.parametrize(
    ("wish", "message"),
    [("1", "M2MKD_BUILD_CUDA=1, but this torch is built without CUDA"), ("yes", "expected auto, 1 or 0")],
)
def test_impossible_wishes_end_the_build(setup_file, toolkit_behind_a_script, monkeypatch, wish, message):
    monkeypatch.setenv("M2MKD_BUILD_CUDA", wish)
    with pytest.raises(SystemExit, match=message):
        setup_file.choose_cuda(None)


def test_without_a_compiler_the_package_is_pure_python(setup_file, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert setup_file.extensions() == ([], {})
    assert "no C++ compiler (no-such-compiler); installing pure Python" in capsys.readouterr().out


def test_a_module_that_was_not_built_has_a_reason_and_a_remedy(monkeypatch):
    monkeypatch.setattr(_extension, "find_spec", lambda name: None)
    assert _extension._load("_C_cuda") == (
        None,
        "m2mkd_fast._C_cuda was not built; reinstall with M2MKD_BUILD_CUDA=1 to see what is missing",
    )


def test_a_module_that_does_not_load_has_a_reason(monkeypatch):
    def broken(name: str):
        raise ImportError("undefined symbol: aoti_torch_nothing")

    monkeypatch.setattr(_extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    module, reason = _extension._load("_host")
    assert module is None
    assert "does not load (undefined symbol: aoti_torch_nothing)" in reason


def test_info_names_versions_modules_and_backends(capsys, monkeypatch):
    found = info.facts()
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found["modules"]) == {"_C", "_C_cuda", "_host"}
    assert "route" in found["operators"]
    assert found["operators"]["route"][0] == "reference"
    assert ("cpu" in found["operators"]["route"]) == (found["modules"]["_C"] == "loaded")
    assert ("cuda" in found["operators"]["route"]) == (found["modules"]["_C_cuda"] == "loaded")
    arranged = {op for op, backends in found["operators"].items() if "torch" in backends}
    assert arranged == {"expert_mlp", "read_in_attention"}
    monkeypatch.setattr(sys, "argv", ["info"])
    info.main()
    text = capsys.readouterr().out
    assert all(op in text for op in found["operators"])


@pytest.mark.skipif(_extension.why_missing("_host") is not None, reason=str(_extension.why_missing("_host")))
def test_build_facts_name_compiler_and_flags():
    host, _ = _extension.load("_host")
    build = host.build_facts()
    assert re.match(r"(gcc|clang) \d+", build["compiler"])
    assert "-O3" in build["flags"]
    assert "march" not in build["flags"]
    assert build["python"].split(".")[:2] == sys.version.split(".")[:2]
    processor = Path("/proc/cpuinfo")
    if processor.is_file() and "avx2" in host.cpu_facts():
        assert host.cpu_facts()["avx2"] == (" avx2" in processor.read_text())


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of what the distributions are made of, so that building leaves nothing in the project."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "constraints.txt"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "kernels", "m2mkd_fast"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    return tree


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_and_source_distribution_are_complete(source_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_BUILD_CUDA", "0")
    run = {"cwd": source_tree, "check": True, "capture_output": True}
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], **run)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".h")]
    sources = {str(path.relative_to(ROOT)) for path in files}
    kernels = {f"m2mkd_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.*")}
    modules = {str(path.relative_to(source_tree)) for path in (source_tree / "m2mkd_fast").rglob("*.py")}
    assert sources | kernels | modules | {"setup.py", "m2mkd_fast/py.typed"} <= packed

    (unpacked,) = (tmp_path / "unpacked").iterdir()  # the wheel is built from the source distribution
    wheel_command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*wheel_command, "."], **{**run, "cwd": unpacked})
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert modules | kernels | {"m2mkd_fast/py.typed", "m2mkd_fast/_C.abi3.so"} <= packed
    assert any(name.startswith("m2mkd_fast/_host.") for name in packed)
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/", "csrc/", "dev/")) for name in packed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=[source.stem for source in CUDA_SOURCES])
def test_cuda_kernels_compile_without_spills(setup_file, source, architecture, tmp_path):
    home = setup_file.find_cuda_home()
    if home is None:
        pytest.skip("no CUDA toolkit with nvcc, headers and libraries")
    include = Path(torch.__file__).parent / "include"
    command = [home / "bin/nvcc", "-cubin", "-arch", architecture, "-O3", "-Xptxas", "-v", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={setup_file.TORCH_TARGET}", "-std=c++17", "--expt-relaxed-constexpr"]
    command += ["-I", include, "-I", include / "torch/csrc/api/include", "-o", tmp_path / "kernel.cubin", source]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", compiled.stderr)]
    assert len(spills) == len(registers) > 0
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 128
