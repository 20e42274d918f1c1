"""Inference as one CUDA graph: the processor starts a recording instead of hundreds of kernels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError

_WARM_UP = 3  # runs before the recording: Triton compiles, cuBLAS chooses, the layers' caches for evaluation fill


class CapturedInference:
    """A recorded forward pass; made by :func:`capture_inference`.

    Attributes:
        shape: of the inputs, the batch size included.
        dtype: of the inputs.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.shape, self.dtype, self.device = example.shape, example.dtype, example.device
        # A copy: the recording reads the memory of weights and cached values, which nobody else may change or free.
        self._model = copy.deepcopy(model)
        self._input = example.detach().clone()
        self._graph = torch.cuda.CUDAGraph()
        # Autocast's own cache would keep casts made while recording, in memory that belongs to the recording.
        autocast = torch.autocast(
            "cuda",
            enabled=torch.is_autocast_enabled("cuda"),
            dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(self.device), torch.no_grad(), autocast:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    output = self._model(self._input)
            torch.cuda.current_stream().wait_stream(side)
            if not isinstance(output, Tensor):
                raise M2MKDError(
                    f"the model returns a {type(output).__name__}, and one tensor is expected; wrap the model in a "
                    "module that returns its logits"
                )
            with torch.cuda.graph(self._graph):
                self._output = self._model(self._input)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's output for inputs like the example, in memory of its own, without a gradient.

        Nothing waits for the device.

        Raises:
            M2MKDError: inputs of another shape, dtype or device.
        """
        if inputs.shape != self.shape or inputs.dtype != self.dtype or inputs.device != self.device:
            raise M2MKDError(
                f"this graph was captured for {_described(self._input)}, but got {_described(inputs)}; fill up the "
                "batch to the captured size, or capture another graph for this one"
            )
        self._input.copy_(inputs)
        self._graph.replay()
        return self._output.clone()


def capture_inference(model: nn.Module, example: Tensor) -> CapturedInference:
    """Record a model's forward pass as a CUDA graph, and return a function that replays it.

    At small batches a circuit's time goes into starting kernels. A recording starts them all at once. It holds for
    inputs of one shape and dtype, and for the model as it is now: it keeps a copy of the weights (and takes their
    memory once more), so training `model` further changes nothing in it. Autocast counts as it is set here.

    What the model draws at random in evaluation, if it does, is drawn anew at each replay.

    Args:
        model: in evaluation mode, on a CUDA device, returning a tensor. Its forward pass must not wait for the device.
        example: inputs of the shape, dtype and device that the function will get; their values do not matter.

    Raises:
        M2MKDError: the model is in training mode, not on a CUDA device or not on the example's, or returns something
            else than a tensor.

    Example:
        >>> fast = capture_inference(model.eval().cuda(), images.cuda())
        >>> logits = fast(images.cuda())
    """
    where = {tensor.device for tensor in (*model.parameters(), *model.buffers(), example)}
    if len(where) > 1 or example.device.type != "cuda":
        found = " and ".join(sorted(map(str, where)))
        remedy = (
            "move model and example to one CUDA device (model.cuda(), example.cuda())"
            if torch.cuda.is_available()
            else "there is none here, so call the model itself"
        )
        raise M2MKDError(f"capture_inference records a CUDA graph, but model and example are on {found}; {remedy}")
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise M2MKDError(f"{training} is in training mode, and inference is captured in evaluation; call model.eval()")
    return CapturedInference(model, example)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
