"""The physically smaller model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hawada.core.structure.edits import Skipped, plan_edits, remains_of, set_structure, sliced_tensors
from hawada.core.structure.groups import Group
from hawada.core.structure.hooks import ModelHook
from hawada.core.structure.kept import Keep
from hawada.core.structure.slicing import all_tensors

# Makes one module of a slim model, given the unpruned model, its groups, the kept indices and the module's path.
SliceSite = Callable[[nn.Module, Sequence[Group], Keep, str], nn.Module]


def materialize(
    model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]], prefix: str = ""
) -> nn.Module:
    """The slim model: a copy of `model` with only the kept units, without gates or hooks.

    Args:
        model: the teacher, or a gated student's model; not changed.
        groups: its declaration.
        keep: kept indices of every group.
        prefix: path of the submodule that is returned instead of the whole, sliced; the identity where it is gone.

    Raises:
        ValueError: see `plan_edits`.
    """
    edits = plan_edits(model, groups, keep)
    keeps = edits.replaced.get(prefix)
    if edits.removes(prefix) and not keeps:
        return Skipped()
    tensors = all_tensors(model)
    sliced = sliced_tensors(model, edits, prefix).items()
    # What a deep copy finds in its memo it takes as the copy: every tensor is replaced by its slice, tied ones by one.
    memo: dict[int, Any] = {id(tensors[name]): _as_before(tensors[name], tensor) for name, tensor in sliced}
    slim = copy.deepcopy(model.get_submodule(prefix), memo)
    for module in slim.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, ModelHook)]:
                del hooks[key]
    slim = set_structure(slim, edits.attributes, edits.replaced, prefix)
    return remains_of(slim, keeps) if keeps else slim


def _as_before(original: Tensor, sliced: Tensor) -> Tensor:
    """A slice of a parameter as a parameter of its class, trainable or frozen as it was; that of a buffer as it is."""
    return type(original)(sliced, original.requires_grad) if isinstance(original, nn.Parameter) else sliced
