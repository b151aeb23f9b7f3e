"""The physically smaller model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from hawada.core.structure.edits import apply_edits, plan_edits
from hawada.core.structure.groups import Group
from hawada.core.structure.hooks import ModelHook


def materialize(
    model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]], prefix: str = ""
) -> nn.Module:
    """The slim model: a copy of `model` with only the kept units, without gates or hooks.

    Args:
        model: the teacher, or a gated student's model; not changed.
        groups: its declaration.
        keep: kept indices of every group.
        prefix: return only the submodule at this path, sliced (for timing a site).

    Raises:
        ValueError: see `plan_edits`.
    """
    edits = plan_edits(model, groups, keep)
    slim = copy.deepcopy(model.get_submodule(prefix))
    for module in slim.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, ModelHook)]:
                del hooks[key]
    return apply_edits(slim, edits, prefix)
