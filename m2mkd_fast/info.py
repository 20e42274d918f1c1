"""``python -m m2mkd_fast.info``: what was built, what will run on this machine, and why not where it will not."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from m2mkd_fast import __version__
from m2mkd_fast._extension import load

_PACKAGES = ("torch", "torchvision", "timm", "triton", "accelerate", "numpy", "safetensors")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def facts() -> dict[str, Any]:
    """Versions, compiled modules, processor, GPUs and the backends of every operator, as JSON-able values."""
    host, _ = load("_host")
    return {
        "m2mkd_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "modules": {name: load(name)[1] or "loaded" for name in ("_C", "_C_cuda", "_host")},
        "build": host.build_facts() if host else None,
        "processor": {
            "name": _processor_name(),
            "threads": torch.get_num_threads(),
            "instruction_sets": sorted(name for name, there in host.cpu_facts().items() if there) if host else None,
        },
        "gpus": _gpus(),
        "operators": {op: backends_of(op) for op in operators()},
    }


def operators() -> list[str]:
    """Names of the operators: those files of ``m2mkd_fast/ops`` that hold a reference."""
    folder = Path(__file__).parent / "ops"
    return sorted(file.stem for file in folder.glob("[a-z]*.py") if f"def {file.stem}_reference(" in file.read_text())


def backends_of(op: str) -> list[str]:
    """The backends that have a kernel of this operator in this installation."""
    load("_C")
    load("_C_cuda")
    name = f"m2mkd_fast::_{op}_forward"
    compiled = [
        backend
        for backend, key in _DISPATCH_KEYS.items()
        if torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]
    has_triton = find_spec("triton") is not None and (Path(__file__).parent / "kernels" / f"{op}.py").is_file()
    arranged = ["torch"] if '"torch": ' in (Path(__file__).parent / "ops" / f"{op}.py").read_text() else []
    return ["reference", *arranged, *compiled, *(["triton"] if has_triton else [])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m m2mkd_fast.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    found = facts()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else _as_text(found))


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"m2mkd_fast {found['m2mkd_fast']}, Python {found['python']}"]
    lines += [f"  {name:<12} {text or 'not installed'}" for name, text in found["packages"].items()]
    lines += ["compiled modules"]
    lines += [f"  {name:<12} {text}" for name, text in found["modules"].items()]
    if found["build"]:
        lines += ["build"] + [f"  {name:<12} {text}" for name, text in found["build"].items()]
    processor = found["processor"]
    lines += [f"processor: {processor['name']}, {processor['threads']} threads"]
    if processor["instruction_sets"] is not None:
        lines += [f"  {'sets':<12} {' '.join(processor['instruction_sets'])}"]
    lines += ["GPUs"] + [f"  {gpu}" for gpu in found["gpus"]]
    lines += ["operators and their backends"]
    lines += [f"  {op:<20} {', '.join(backends)}" for op, backends in found["operators"].items()]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    facts_file = Path("/proc/cpuinfo")
    if facts_file.is_file():
        for line in facts_file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if torch.version.cuda is None:
        return ["none: this torch is built without CUDA"]
    if not torch.cuda.is_available():
        return [f"none: torch is built for CUDA {torch.version.cuda}, but sees no device or no driver"]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]


if __name__ == "__main__":
    main()
