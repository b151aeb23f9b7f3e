"""Formats that run without this package, an ONNX graph and a torch.export program, each checked once written."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hawada.core.files import partial_path
from hawada.core.structure import Inputs

FORMATS = ("hf", "onnx", "pt2")  # hf, the native folder, is always written
NEEDED_PACKAGES = {"onnx": ("onnxruntime", "onnxscript")}
# Relative to the largest logit. The runtime folds norms into convolutions and sums in another order than torch, with
# kernels that differ by CPU and release: rounding alone was 4e-7 to 1.2e-6 for convolutional nets and transformers of
# 12 to 50 layers at random weights. 1e-5 leaves other CPUs, deeper models and trained weights too little room.
ONNX_TOLERANCE = 1e-4
PT2_TOLERANCE = 1e-5  # the same kernels in the same order


def check_formats(formats: Sequence[str]) -> None:
    """Check `export.formats` without importing anything, before any work.

    Raises:
        ValueError: when it is not a list, when a name is unknown or given twice, or when a package that a format needs
            is missing.
    """
    if isinstance(formats, str):
        raise ValueError(f"export.formats: {formats!r} is not a list; write [{formats}]")
    if len(set(formats)) < len(formats):
        raise ValueError(f"export.formats: [{','.join(formats)}] names a format twice; list each once")
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"export.formats: {name!r} is not one of {', '.join(FORMATS)}; list only these")
        needed = NEEDED_PACKAGES.get(name, ())
        if any(find_spec(package) is None for package in needed):
            raise ValueError(f"export.formats: {name} needs {' and '.join(needed)}; pip install hawada[{name}]")


def export_onnx(
    model: nn.Module, inputs: Inputs, path: Path, *, logits: Callable[[Any], Tensor] = lambda output: output
) -> dict[str, float]:
    """Write an ONNX graph of the model in float32 and compare onnxruntime on the CPU with torch.

    The graph's inputs have the names of the parameters of `model.forward`, its one output is `logits`, and the first
    axis of each is `batch`. The file holds the weights; above 1.5 GiB torch puts them beside it, in `<path>.data`.

    Args:
        model: the model, which is left as it is; a copy in eval mode is exported.
        inputs: tensors that the model is called with, batch first; few samples are enough. The outputs are compared on
            these and on another batch size.
        path: the path of the graph's file; nothing may be there yet, and after an error nothing is.
        logits: a function that picks the logits, (batch, ...), from the model's output.

    Returns:
        `max_abs_diff`, the largest difference between the two, and `max_abs_logit`, the model's largest logit, over
        both batch sizes.

    Raises:
        ValueError: when a package is missing, or a file is there already.
        RuntimeError: when torch cannot export the model, or the two differ by more than `ONNX_TOLERANCE`.
    """
    check_formats(["onnx"])
    import onnxruntime

    frozen = _freeze(model, logits)
    names = _input_names(model, len(inputs))
    with _whole(path) as written:
        program = _trace(frozen, inputs)
        with _quiet():
            torch.onnx.export(
                program,
                f=written,
                dynamo=True,
                dynamic_shapes=(tuple({0: "batch"} for _ in inputs),),
                input_names=names,
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])

        def run(*batch: Tensor) -> Tensor:
            feeds = {name: x.numpy() for name, x in zip(names, batch, strict=True)}
            return torch.from_numpy(session.run(["logits"], feeds)[0])

        return _compare(frozen, run, inputs, path, ONNX_TOLERANCE)


def export_pt2(
    model: nn.Module, inputs: Inputs, path: Path, *, logits: Callable[[Any], Tensor] = lambda output: output
) -> dict[str, float]:
    """Write a torch.export program of the model in float32, load it again and compare the two on the CPU.

    `torch.export.load(written).module()` takes the model's inputs and returns the logits, for any batch size.

    Args:
        model: the model, which is left as it is; a copy in eval mode is exported.
        inputs: tensors that the model is called with, batch first; few samples are enough. The outputs are compared on
            these and on another batch size.
        path: the path of the program's file, ending in `.pt2`; nothing may be there yet, and after an error nothing
            is.
        logits: a function that picks the logits, (batch, ...), from the model's output.

    Returns:
        `max_abs_diff`, the largest difference between the two, and `max_abs_logit`, the model's largest logit, over
        both batch sizes.

    Raises:
        ValueError: when a file is there already.
        RuntimeError: when torch cannot export the model, or the two differ by more than `PT2_TOLERANCE`.
    """
    frozen = _freeze(model, logits)
    with _whole(path) as written:
        program = _trace(frozen, inputs)
        with warnings.catch_warnings(action="ignore"):
            torch.export.save(program, written)
            loaded = torch.export.load(written)
        return _compare(frozen, loaded.module(), inputs, path, PT2_TOLERANCE)


class _Logits(nn.Module):
    """A model that returns its logits only."""

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.logits(self.model(*inputs))


def _freeze(model: nn.Module, logits: Callable[[Any], Tensor]) -> nn.Module:
    """Copy the model to the CPU, in float32 and eval mode, without gradients and with contiguous weights."""
    copied = copy.deepcopy(model).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    return _Logits(copied, logits).eval().requires_grad_(False)


def _on_cpu(inputs: Inputs) -> Inputs:
    """Convert inputs to those that the frozen copy takes; whole numbers keep their type."""
    return tuple(x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype) for x in inputs)


def _trace(frozen: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Trace the program for any batch size, on two samples, because the size 1 would be taken for a constant.

    The samples are saved with the program, so they are zeros; so would be the local paths of the source files, which
    are therefore deleted.
    """
    rows = tuple(x.new_zeros(2, *x.shape[1:]) for x in _on_cpu(inputs))
    batch = Dim("batch")
    with _quiet(), torch.no_grad():
        program = torch.export.export(frozen, rows, dynamic_shapes=(tuple({0: batch} for _ in rows),), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _input_names(model: nn.Module, count: int) -> list[str]:
    """Name the inputs after the parameters of `model.forward`, or by numbers where it takes any number of them."""
    parameters = list(inspect.signature(model.forward).parameters.values())[:count]
    if len(parameters) < count or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return [f"input_{index}" for index in range(count)]
    return [parameter.name for parameter in parameters]


def _compare(
    frozen: nn.Module, run: Callable[..., Tensor], inputs: Inputs, path: Path, tolerance: float
) -> dict[str, float]:
    """Compare the written model with the traced one, on the inputs and on another batch size.

    Raises:
        RuntimeError: when shapes differ, or logits by more than the tolerance.
    """
    given = _on_cpu(inputs)
    single = len(given[0]) == 1
    other = tuple(torch.cat([x, x.flip(-1)]) if single else x[:1] for x in given)
    found = {"max_abs_diff": 0.0, "max_abs_logit": 0.0}
    for batch in (given, other):
        with torch.no_grad():
            expected, got = frozen(*batch), run(*batch)
        if expected.shape != got.shape:
            raise RuntimeError(f"{path}: logits have the shape {tuple(got.shape)}, the model's {tuple(expected.shape)}")
        difference, largest = float((expected - got).abs().max()), float(expected.abs().max())
        allowed = tolerance * largest
        if not difference <= allowed:  # also when one of them is nan
            raise RuntimeError(
                f"{path}: logits differ from the model's by {difference:.3g} at a batch of "
                f"{len(expected)}, more than {allowed:.3g} ({tolerance:g} of the largest)"
            )
        found = {
            "max_abs_diff": max(found["max_abs_diff"], difference),
            "max_abs_logit": max(found["max_abs_logit"], largest),
        }
    return found


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is written there is moved to `path` unless an error is raised, which deletes it.

    Raises:
        ValueError: when something is at `path` already.
    """
    beside = path.with_name(f"{path.name}.data")
    for taken in (path, beside):
        if os.path.lexists(taken):
            raise ValueError(f"{taken} exists already and is not replaced; move it away, or write to another path")
    scratch = partial_path(path)
    scratch.mkdir()
    written = scratch / path.name  # the same name, because a graph names the file with its weights
    try:
        yield written
        for part, final in ((written.with_name(beside.name), beside), (written, path)):
            if part.is_file():
                os.replace(part, final)
    finally:
        shutil.rmtree(scratch)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings, raised or logged; errors are not hidden."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
