"""Reconstruction: least squares for layers that lost inputs, so that they give the teacher's outputs again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.reconstruction.layers import batch_statistics, is_centred, is_linear
from hawada.core.reconstruction.moments import Moments
from hawada.core.reconstruction.rows import input_rows, output_rows
from hawada.core.reconstruction.visits import visit_layers
from hawada.core.structure import plan_edits


@torch.no_grad()
def reconstruct(
    student: Student, teacher: nn.Module, keep: Mapping[str, Sequence[int]], batches: Sequence[Any]
) -> list[str]:
    """Refit every consumer of pruned units to the teacher's outputs of it; returns the consumers' paths, in order.

    Layers are refitted one by one in the order of execution, each on the inputs that the layers before it now give, so
    that a layer also corrects the errors of those before it (He et al., Channel pruning for accelerating very deep
    neural networks, 2017). A ridge towards the old weights decides where the data does not. Meanwhile BatchNorms use
    the statistics of each batch; recalibrate them when the model has been sliced. Layers are left as they are when they
    share their weights, are called more than once or have more than `MAX_LAYER_INPUTS` inputs.

    All batches go through the models side by side and wait at each layer until it is refitted, so the models must not
    store anything about a pass on their modules. Where that would take more than half of the free memory, batches run
    from the start for every layer, which gives the same weights and takes longer.

    Args:
        student: the gated model. Its weights change in the columns of the inputs that stay, and biases change; slice it
            to `keep` afterwards.
        teacher: an ungated copy of that model, in eval mode on the same device.
        keep: the kept indices of every gated group.
        batches: calibration data: (inputs, …), a few hundred samples in all.

    Raises:
        RuntimeError: when the model does not call its layers in the same order for every batch.
    """
    removed = plan_edits(teacher, student.groups, keep).removed
    with student.hard_gated(keep), batch_statistics(student):
        order = consumers(student, teacher, keep, batches[0][0])
        with closing(visit_layers(student, teacher, order, [batch[0] for batch in batches])) as visits:
            for path, pairs in visits:
                _refit(student.model, path, removed[f"{path}.weight"][1], pairs)
    return order


@torch.no_grad()
def consumers(student: Student, teacher: nn.Module, keep: Mapping[str, Sequence[int]], example: Tensor) -> list[str]:
    """Paths of the layers that `reconstruct` refits, in the order in which the model calls them.

    Args:
        student: the gated model.
        teacher: an ungated copy of that model.
        keep: the kept indices of every gated group.
        example: inputs of the model, (batch, …).
    """
    edits = plan_edits(teacher, student.groups, keep)
    owners = Counter(id(parameter) for module in student.model.modules() for parameter in module._parameters.values())
    found: dict[nn.Module, str] = {}
    for name, dims in edits.removed.items():
        path, _, tensor = name.rpartition(".")
        module = student.model.get_submodule(path)
        gone = any(f"{path}.".startswith(f"{other}.") for other in edits.replaced)
        if tensor == "weight" and 1 in dims and not gone and is_linear(module) and owners[id(module.weight)] == 1:
            found[module] = path
    called: list[str] = []
    handles = [module.register_forward_hook(lambda module, *_: called.append(found[module])) for module in found]
    student(example.to(next(student.model.parameters()).device))
    for handle in handles:
        handle.remove()
    return [path for path in called if called.count(path) == 1]


def _refit(model: nn.Module, path: str, gone: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Solve for the weights of one layer's inputs that stay, and for its bias if it has one.

    Args:
        model: the student's model, without gates of its own.
        path: the path of the layer.
        gone: the indices of the inputs that are removed.
        pairs: the layer's inputs and its target outputs, batch by batch.
    """
    module = cast(nn.Linear | nn.Conv2d, model.get_submodule(path))  # `is_linear` chose it
    stays = torch.ones(module.weight.shape[1], dtype=torch.bool)
    stays[gone] = False
    index = stays.nonzero().flatten().to(module.weight.device)
    old = module.weight[:, index].flatten(1).T.double()  # (inputs, outputs)
    moments = Moments(len(old), old.shape[1], centred=is_centred(model, module))
    for layer_input, target in pairs:
        x = input_rows(module, layer_input.index_select(1 if isinstance(module, nn.Conv2d) else -1, index))
        moments.add(x, output_rows(module, target))
    covariance = moments.covariance()
    change = torch.linalg.solve(moments.definite(), moments.products_with_outputs() - covariance @ old)
    new = old + change
    module.weight[:, index] = new.T.reshape(-1, len(index), *module.weight.shape[2:]).to(module.weight.dtype)
    if module.bias is not None:
        module.bias.copy_(moments.mean_out - moments.mean_in @ new)
