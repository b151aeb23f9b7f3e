"""Lists the layers whose output channels are in no group, each with what keeps them and what would free them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import nn

from hawada.adapters.graph.declaration import Declaration
from hawada.adapters.graph.labels import Field
from hawada.adapters.graph.trace import Op, Trace
from hawada.adapters.graph.trial import WRITTEN
from hawada.adapters.graph.walk import OUTPUT
from hawada.core.structure import KeptWhole

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
OWN_ADAPTER = "declare its groups in an adapter of your own to prune them"
STREAM = ("residual blocks add into", "set model.adapter.stream=true to prune them")


def list_kept(declared: Declaration) -> list[KeptWhole]:
    """List the convolutions, linear layers and other producers of channels that keep some of them, in order."""
    labels = declared.walk.labels.resolve(staying=False)
    reasons: dict[int, tuple[Op, str]] = {}
    for op, found, reason in declared.walk.obstacles:
        for label in np.unique(labels[found]):
            reasons.setdefault(int(label), (op, reason))
    listed = []
    for tensor, produced in _produced(declared):
        staying = produced[declared.holder[declared.channels[produced]] < 0]
        if not len(staying):
            continue
        known = [reasons[label] for label in labels[staying].tolist() if label in reasons]
        reason, remedy = _reason_at(declared.trace, known[0]) if known else _reason_elsewhere(declared, staying)
        module = tensor.rpartition(".")[0]
        kind = type(declared.trace.model.get_submodule(module)).__name__
        listed.append(KeptWhole(module or tensor, kind, len(staying), reason, remedy))
    return listed


def _produced(declared: Declaration) -> Iterator[tuple[str, Field]]:
    """The weights that make channels, each with the labels of these; layers whose weight was never met included."""
    found: dict[str, Field] = {}
    for place in declared.walk.places:
        if place.role == "produces" and not place.tensor.endswith("bias"):
            found.setdefault(place.tensor, place.labels)
    for place in declared.walk.places:  # depthwise convolutions
        if place.role == "passes" and place.op.name == "convolution" and place.tensor.endswith("weight"):
            found.setdefault(place.tensor, place.labels)
    for path, module in declared.trace.model.named_modules():
        known = any(name.startswith(f"{path}.") for name in found)
        value = declared.trace.tensors.get(f"{path}.weight")
        if not isinstance(module, LAYERS) or known or value is None:
            continue
        axis = 1 if getattr(module, "transposed", False) else 0
        fields = [field for field in declared.walk.fields(value) if field.shape[axis] > 1]
        if fields:
            found[f"{path}.weight"] = fields[0].reshape(-1)
    yield from found.items()


def _reason_at(trace: Trace, obstacle: tuple[Op, str]) -> tuple[str, str]:
    """Return the reason that an operator gives for keeping channels, and the remedy."""
    op, reason = obstacle
    if reason == OUTPUT:
        return "are outputs of the model", ""
    where = type(trace.module(op.calls[-1])).__name__ if op.calls else "the model"
    remedy = OWN_ADAPTER
    if reason == WRITTEN:
        remedy = "let the code take it from a shape or an attribute to prune them"
    elif reason == "is not understood":
        remedy = f"add a rule for {op.name} (docs/graph.md) to prune them"
    return f"{op.name} in {where} {reason}", remedy


def _reason_elsewhere(declared: Declaration, staying: Field) -> tuple[str, str]:
    """Return the reason and the remedy where no operator keeps the channels itself."""
    if not declared.stream and declared.is_stream(staying):
        return STREAM
    return "are joined with channels that stay", OWN_ADAPTER
