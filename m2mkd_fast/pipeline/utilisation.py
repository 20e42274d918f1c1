"""Model-FLOP utilisation: the training FLOPs done a second, as a share of what the device could do at its best."""

from __future__ import annotations

import functools
import re
import time

import torch

# Dense (no structured sparsity) peaks in TFLOP/s: bfloat16 and float16 on tensor cores that add in float32; "tf32",
# float32 on tensor cores; "float32", the ordinary cores. From NVIDIA's data sheets on each of these products (V100
# 2020, T4 2019, A100 2021, A10 2021, A30 2021, A40 2021, L4 2023, L40S 2023, H100 2024, H200 2024); figures that a
# sheet gives with sparsity are halved.
_GPU_PEAKS: dict[str, dict[str, float]] = {
    "V100-PCIE": {"float16": 112, "float32": 14},
    "V100": {"float16": 125, "float32": 15.7},  # SXM2
    "T4": {"float16": 65, "float32": 8.1},
    "A100": {"bfloat16": 312, "float16": 312, "tf32": 156, "float32": 19.5},
    "A10": {"bfloat16": 125, "float16": 125, "tf32": 62.5, "float32": 31.2},
    "A30": {"bfloat16": 165, "float16": 165, "tf32": 82, "float32": 10.3},
    "A40": {"bfloat16": 149.7, "float16": 149.7, "tf32": 74.8, "float32": 37.4},
    "L4": {"bfloat16": 121, "float16": 121, "tf32": 60, "float32": 30.3},
    "L40S": {"bfloat16": 362, "float16": 362, "tf32": 183, "float32": 91.6},
    "H100 PCIe": {"bfloat16": 756, "float16": 756, "tf32": 378, "float32": 51},
    "H100 NVL": {"bfloat16": 835, "float16": 835, "tf32": 417, "float32": 60},
    "H100": {"bfloat16": 989, "float16": 989, "tf32": 494, "float32": 67},  # SXM
    "H200 NVL": {"bfloat16": 835, "float16": 835, "tf32": 417, "float32": 60},
    "H200": {"bfloat16": 989, "float16": 989, "tf32": 494, "float32": 67},  # SXM
}
# Of the matrices that a CPU's peak is measured with: larger and larger ones, until enough time is spent.
_SIZES, _PASSES, _ENOUGH_SECONDS = (128, 256, 512, 1024, 2048), 4, 0.05


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs a second of a device at its best, where matrices are multiplied in ``dtype``; None where it is unknown.

    Of a GPU its vendor's figure for dense matrices. Of a CPU the fastest of some products of large matrices with the
    threads that torch has now, measured once a process in a few tenths of a second.
    """
    if device.type == "cpu":
        return _cpu_peak(dtype, torch.get_num_threads())
    if device.type != "cuda":
        return None
    kind = str(dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(device)
    if kind == "float32" and torch.get_float32_matmul_precision() != "highest":
        return gpu_peak(name, "tf32") or gpu_peak(name, "float32")  # older GPUs have no tf32
    return gpu_peak(name, kind)


def gpu_peak(name: str, kind: str) -> float | None:
    """FLOPs a second of the GPU that calls itself ``name``, for bfloat16, float16, tf32 or float32; None if unknown.

    A slice of a GPU (MIG) has no figure of its own.
    """
    known = [model for model in _GPU_PEAKS if re.search(rf"\b{re.escape(model)}\b", name)]
    if not known or "MIG" in name:
        return None
    tera = _GPU_PEAKS[max(known, key=len)].get(kind)
    return None if tera is None else tera * 1e12


@functools.cache
def _cpu_peak(dtype: torch.dtype, threads: int) -> float:
    best, spent = 0.0, 0.0
    for size in _SIZES:
        if spent > _ENOUGH_SECONDS:  # some processors take seconds for what others do in no time, in bfloat16 above all
            break
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        for _ in range(_PASSES):
            started = time.perf_counter()
            with torch.inference_mode():
                torch.mm(left, right)
            took = time.perf_counter() - started
            best, spent = max(best, 2 * size**3 / took), spent + took
    return best


def compute_dtype(autocast: torch.autocast, device: torch.device) -> torch.dtype:
    """The type in which a step's matrices are multiplied under a context of :class:`torch.autocast`."""
    with autocast:
        cast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if cast else torch.get_default_dtype()
