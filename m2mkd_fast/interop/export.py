"""A trained model as a file that runs without its code: a torch.export program, or ONNX; checked by running it."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from m2mkd_fast.atomic import unwritable
from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.interop.onnx_operators import onnx_operators
from m2mkd_fast.nn.router import Router

Format = Literal["onnx", "pt2"]
# Largest difference to the model that a file may have, relative to the largest logit.
LIMITS: dict[str, float] = {"onnx": 1e-4, "pt2": 1e-5}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """An exported file and how well it agrees with the model.

    Attributes:
        path: the file. Beside it lies `<name>.data` where an ONNX model has more than 2 GB of weights.
        format: "onnx" or "pt2".
        errors: by the batch size that was run, the largest difference to the model's logits, relative to the largest
            of them.
        dynamic_batch: whether the file takes any number of images, or exactly one of `errors`.
        operators: operators of this package in a "pt2" program; where there are some, `import m2mkd_fast` and its
            operators' modules come before running it (:func:`load_exported` does that).
    """

    path: Path
    format: Format
    errors: dict[int, float]
    dynamic_batch: bool
    operators: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values())

    def __str__(self) -> str:
        batch = "any batch size" if self.dynamic_batch else f"batches of exactly {next(iter(self.errors))}"
        runs = ", ".join(f"{error:.1e} with {size} images" for size, error in self.errors.items())
        text = f"{self.path} ({self.format}, {batch}); largest relative difference to the model: {runs}"
        return text + (f"; needs the operators {', '.join(self.operators)}" if self.operators else "")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    images: Tensor,
    *,
    format: Format | None = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write a model's evaluation as a file, run the file on other batch sizes, and compare.

    * `"pt2"`: a program of `torch.export`, for :func:`load_exported` or `torch.export.load(path).module()`. It has the
      operators of the backends in force: by default this package's compiled ones, which whoever loads it needs too;
      inside `use_backend("reference", expert_mlp="torch")` PyTorch's alone.
    * `"onnx"`: for onnxruntime and others, of ONNX's own operators alone. Mixtures stay sparse: every expert multiplies
      the tokens that came to it. Input `images`, output `logits`.

    The model is exported as it evaluates now, inside :func:`~m2mkd_fast.nn.router.inference_routing` too; it is left as
    it was, mode included.

    Args:
        model: maps images to logits: a student, a chain of modules with stitches, a timm model.
        path: of the file; it appears whole, after the check, or not at all.
        images: `[B, C, H, W]`, an example with at least one image, where the model is.
        format: by default what the path's suffix says.
        dynamic_batch: whether the file takes batches of any size; otherwise of B images. Routers whose experts have
            too few slots for every token route by groups of images, which ties them to a batch.

    Raises:
        M2MKDError: the model cannot be exported (the message says which operator, or which layer, is the cause), the
            file computes something else, packages are missing, or the file cannot be written.

    Example:
        >>> print(export(model, "student.onnx", torch.zeros(1, 3, 224, 224)))
    """
    path = Path(path)
    format = format or path.suffix.removeprefix(".")
    if format not in LIMITS:
        raise UnknownNameError(
            "export format", format, LIMITS, "Give format=..., or a path that ends in .onnx or .pt2."
        )
    _check(model, images, format, dynamic_batch)
    batches = [images] if not dynamic_batch else [_more_images(images, 1), _more_images(images, len(images) + 2)]
    with _evaluating(model):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                file = Path(folder) / path.name
                operators = _WRITE[format](model, file, images, dynamic_batch)
                run = _RUN[format](file)
                errors = {len(batch): _error(run(batch), model(batch)) for batch in batches}
                report = ExportReport(path, format, errors, dynamic_batch, operators)
                if not report.max_error <= LIMITS[format]:
                    raise M2MKDError(
                        f"the exported {type(model).__name__} computes something else than the model: {report}; at "
                        f"most {LIMITS[format]:g} is rounding. Nothing was written. Is its evaluation deterministic?"
                    )
                for made in sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name):
                    os.replace(made, path.parent / made.name)
        except OSError as error:
            raise unwritable(path, error) from error
    return report


def load_exported(path: str | os.PathLike[str]) -> Callable[[Tensor], Tensor]:
    """The program of a `"pt2"` file as a function of images, with this package's operators at hand.

    Raises:
        M2MKDError: there is no such file, or it is no program.
    """
    import m2mkd_fast.models.nac  # registers the circuit's operators
    import m2mkd_fast.nn.vision_moe  # noqa: F401 (registers those of mixtures)

    if not Path(path).is_file():
        raise M2MKDError(f"there is no file {os.fspath(path)!r}; write one with m2mkd_fast.export")
    try:
        with _quiet():
            return torch.export.load(path).module()
    except (RuntimeError, AssertionError, ValueError, zipfile.BadZipFile) as error:
        raise M2MKDError(
            f"{os.fspath(path)} is no program of torch.export ({error}); export the model again"
        ) from error


def _check(model: nn.Module, images: Tensor, format: Format, dynamic_batch: bool) -> None:
    if images.dim() != 4 or len(images) == 0:
        raise M2MKDError(f"images have shape {list(images.shape)}; give an example [B, C, H, W] of at least one image")
    if format == "onnx":
        missing = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
        if missing:
            raise M2MKDError(f"ONNX needs {', '.join(missing)}; pip install m2mkd_fast[onnx]")
        dtypes = {tensor.dtype for tensor in (images, *model.parameters())} - {torch.float32}
        if dtypes:
            raise M2MKDError(f"ONNX files are written and checked in float32, not {dtypes.pop()}; call model.float()")
    if dynamic_batch:
        with _evaluating(model):
            limited = [
                name
                for name, module in model.named_modules()
                if isinstance(module, Router) and not module.drops_nothing
            ]
        if limited:
            raise M2MKDError(
                f"the experts of {', '.join(limited)} have a limited number of slots for a group of images, which ties "
                "the file to a batch: export with dynamic_batch=False and images of the size it will get, or inside "
                "inference_routing(model, capacity_factor=math.inf), which drops nothing"
            )


def _exported(model: nn.Module, images: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    # Of one image torch.export would conclude that there is never another number.
    example = _more_images(images, max(2, len(images))) if dynamic_batch else images
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except RuntimeError as error:
        raise M2MKDError(
            f"torch.export cannot follow this {type(model).__name__}: {str(error).strip()}. A shape that depends on "
            "values has to go; a program that is tied to its batch size can be had with dynamic_batch=False"
        ) from error


def _write_pt2(model: nn.Module, path: Path, images: Tensor, dynamic_batch: bool) -> tuple[str, ...]:
    with _quiet():
        program = _exported(model, images, dynamic_batch)
        program.example_inputs = None  # they would be written as a pickle
        torch.export.save(program, path)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = (str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function")
    return tuple(sorted({target.removesuffix(".default") for target in targets if target.startswith("m2mkd_fast.")}))


def _write_onnx(model: nn.Module, path: Path, images: Tensor, dynamic_batch: bool) -> tuple[str, ...]:
    with use_backend("reference", expert_mlp="torch"), _quiet():
        program = _exported(model, images, dynamic_batch)
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table=onnx_operators(),
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise M2MKDError(
                f"this {type(model).__name__} has no ONNX form: {cause}; replace that operation in the model, or "
                "export it as pt2"
            ) from error
        converted.save(path)
    return ()


def _run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return load_exported(path)


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


_WRITE = {"onnx": _write_onnx, "pt2": _write_pt2}
_RUN = {"onnx": _run_onnx, "pt2": _run_pt2}


def _error(made: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return float((made.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _more_images(images: Tensor, number: int) -> Tensor:
    """Images like the example's, `number` of them, no two alike: each repetition is a little darker."""
    repeats = -(-number // len(images))
    return torch.cat([images * 0.9**i + 0.1 * i for i in range(repeats)])[:number]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, also for parameters, which a program takes over as they are."""
    modes = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their progress, on what a layer notes in passing, and on other libraries."""
    logger: Any = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
