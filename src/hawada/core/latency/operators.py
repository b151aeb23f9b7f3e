"""What a model asks of a device: its operators, each with the arithmetic it does and the bytes it moves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from hawada.core.structure import Inputs

aten = torch.ops.aten
ROWS_READ = {aten.embedding, aten.index, aten.index_select, aten.gather}  # of the table they read what they return
ROWS_WRITTEN = {aten.index_copy_, aten.index_put_}  # of the table they write what they are given


@dataclass(frozen=True)
class Operator:
    """One operator of a forward pass.

    Attributes:
        flops: floating-point operations, as torch counts them; 0 for whatever is no product of matrices.
        bytes: read and written, every tensor once.
    """

    flops: int
    bytes: int


def list_operators(model: nn.Module, inputs: Inputs, *, tile: int = 1, on_shapes: bool = True) -> list[Operator]:
    """The operators of one forward pass in order, without views, which move nothing.

    Args:
        model: in eval mode.
        inputs: what it is called with.
        tile: arithmetic is counted on channels that are rounded up to a multiple of this.
        on_shapes: call a copy without numbers, which computes nothing; otherwise the model itself, which then takes
            the kernels that its device has (a fused attention, say).
    """
    log = _OperatorLog(tile)
    if on_shapes:
        model, inputs = copy.deepcopy(model).to("meta"), tuple(x.to("meta") for x in inputs)
    with torch.no_grad(), log:
        model(*inputs)
    return log.operators


class _OperatorLog(TorchDispatchMode):
    """Notes every operator that runs while it is active."""

    def __init__(self, tile: int) -> None:
        super().__init__()
        self.tile = tile
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns):
            return output
        flops = 0
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            shapes = tree_map(self._tiled_shape, (args, kwargs, output))
            flops = formula(*shapes[0], **shapes[1], out_val=shapes[2])
        self.operators.append(Operator(int(flops), _moved(func.overloadpacket, args, kwargs, output)))
        return output

    def _tiled_shape(self, leaf: Any) -> Any:
        """The shape that a tensor occupies in whole tiles; anything else unchanged."""
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        shape = list(leaf.shape)
        for dim in (0, 1) if leaf.dim() > 3 else (-2, -1):  # images and heads: (N, C, ...); matrices: the last two
            shape[dim] = -(-shape[dim] // self.tile) * self.tile
        return torch.Size(shape)


def _moved(operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Bytes that an operator reads and writes."""
    given, returned = _bytes((args, kwargs)), _bytes(output)
    if operator in ROWS_READ:
        return given - _bytes(args[0]) + 2 * returned
    if operator in ROWS_WRITTEN:
        return 2 * (given - _bytes(args[0]))
    return given + returned


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
