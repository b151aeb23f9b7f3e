"""The layers of a student and its teacher, visited one after the other with the tensors that pass through them."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.reconstruction.stepwise import PassStopped, StepwisePass, pausing_at

MAX_WAITING_THREADS = 256  # on a CPU; each paused pass holds as many threads as torch computes with

Visits = Generator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]
"""For each layer its path and, batch by batch, the student's input of the layer and the teacher's output of it."""


def visit_layers(student: Student, teacher: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> Visits:
    """The layers at these paths, in order of execution; a layer's weights may be changed before the next is visited.

    All batches go through both models side by side where memory allows, and otherwise from the start for every layer;
    the tensors are the same. Close the generator when it is not exhausted.

    Args:
        student: the gated model, whose inputs of the layers are given.
        teacher: an ungated copy of the model on the same device, whose outputs of the layers are given.
        paths: paths of the layers, in the order in which the model calls them.
        inputs: the inputs of each batch, (batch, …).
    """
    side_by_side = len(paths) > 1 and _fits_side_by_side(student, inputs)
    return (_side_by_side if side_by_side else _from_the_start)(student, teacher, paths, inputs)


def layer_input_and_output(model: nn.Module, module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the output of one of a model's modules for a batch; the model does not run any further."""
    found: list[tuple[Tensor, Tensor]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append((args[0], output))
        raise PassStopped

    handle = module.register_forward_hook(stop)
    try:
        with suppress(PassStopped):  # the hook above raises it, and nothing else does
            model(inputs)
    finally:
        handle.remove()
    return found[0]


def _fits_side_by_side(student: Student, inputs: Sequence[Tensor]) -> bool:
    """Whether passes of all batches through both models may wait at a layer at once: in half of the free memory."""
    device, passes = next(student.model.parameters()).device, 2 * len(inputs)
    x = inputs[0].to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        student(x)
        bytes_of_pass = torch.cuda.max_memory_allocated(device) - before
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        return passes * bytes_of_pass <= free // 2
    if passes * torch.get_num_threads() > MAX_WAITING_THREADS:
        return False
    bytes_of_pass = _activation_bytes(student, x)
    available: int = psutil.virtual_memory().available
    return passes * bytes_of_pass <= available // 2


def _activation_bytes(student: Student, x: Tensor) -> int:
    """The bytes of the outputs of all layers of a model: more than a pass ever holds at once."""
    total = 0

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    leaves = [module for module in student.modules() if not list(module.children())]
    handles = [module.register_forward_hook(add) for module in leaves]
    student(x)
    for handle in handles:
        handle.remove()
    return total


def _side_by_side(student: Student, teacher: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> Visits:
    """Visits for which every batch runs once: its passes wait at each layer until the next is asked for."""
    device = next(student.model.parameters()).device
    own, originals = ([model.get_submodule(path) for path in paths] for model in (student.model, teacher))
    passes = [(StepwisePass(student, x), StepwisePass(teacher, x)) for x in (batch.to(device) for batch in inputs)]
    with pausing_at(own, before=True), pausing_at(originals, before=False):
        try:
            for path, module, original in zip(paths, own, originals, strict=True):
                yield path, ((mine.advance_to(module), its.advance_to(original)) for mine, its in passes)
        finally:
            for one in itertools.chain(*passes):
                one.close()


def _from_the_start(student: Student, teacher: nn.Module, paths: Sequence[str], inputs: Sequence[Tensor]) -> Visits:
    """Visits that hold the activations of one batch at a time: every batch runs from its inputs for every layer."""
    device = next(student.model.parameters()).device
    for path in paths:
        own, original = student.model.get_submodule(path), teacher.get_submodule(path)
        batches = (batch.to(device) for batch in inputs)
        yield (
            path,
            (
                (layer_input_and_output(student, own, x)[0], layer_input_and_output(teacher, original, x)[1])
                for x in batches
            ),
        )
