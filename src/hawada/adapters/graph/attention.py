"""What torch's own attention insists on: as many heads, of one size, as make up the width of its input.

`torch.nn.MultiheadAttention` compares its `embed_dim` with the input, so its heads go together with the channels of the
stream that it reads: head h with the channels that have its place.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from hawada.adapters.graph.declaration import Declaration, Remedies
from hawada.adapters.graph.labels import Field, axes_of
from hawada.adapters.graph.trace import Call

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
WIDTHS = ("embed_dim", "kdim", "vdim")


def tie_heads(declared: Declaration) -> Remedies:
    """Couple the heads of every `MultiheadAttention` with the channels of its query; its attributes follow."""
    tied: list[tuple[Field, Field]] = []
    following: list[tuple[str, Field]] = []
    for call in declared.trace.calls:
        module = declared.trace.module(call)
        if not isinstance(module, nn.MultiheadAttention):
            continue
        channels = _channels(declared, call, module.embed_dim)
        if channels is None:
            continue
        for name in PROJECTIONS:
            rows = _rows(declared, f"{call.path}.{name}")
            if rows is not None:
                tied.append((rows.reshape(-1, module.embed_dim), channels[None]))
        following += [(f"{call.path}.{name}", channels) for name in WIDTHS if getattr(module, name) == len(channels)]
        following.append((f"{call.path}.num_heads", channels[:: module.head_dim]))
    return Remedies(tied=tuple(tied), following=tuple(following))


def _channels(declared: Declaration, call: Call, width: int) -> Field | None:
    """The labels of the channels of the query, along its last axis; None where they are not followed there."""
    if not call.inputs:
        return None
    last = len(call.inputs[0].shape) - 1
    for field in declared.walk.fields(call.inputs[0]):
        if axes_of(field) == [last] and field.size == width:
            return field.reshape(-1)
    return None


def _rows(declared: Declaration, tensor: str) -> Field | None:
    """The labels of the rows of a projection."""
    value = declared.trace.tensors.get(tensor)
    fields = () if value is None else declared.walk.fields(value)
    return next((np.asarray(field).reshape(-1) for field in fields if axes_of(field) == [0]), None)
