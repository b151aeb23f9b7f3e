"""The operators that a model runs, each with the arithmetic that it does and the bytes that it moves."""

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
ROW_LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # read only those rows that they return
ROW_UPDATES = {aten.index_copy_, aten.index_put_}  # write only those rows that they are given


@dataclass(frozen=True)
class Operator:
    """One operator of a forward pass.

    Attributes:
        flops: the floating-point operations as torch counts them, which are those of products of matrices only.
        bytes: the bytes that are read and written, every tensor once.
    """

    flops: int
    bytes: int


def list_operators(model: nn.Module, inputs: Inputs, *, tile: int = 1, on_shapes: bool = True) -> list[Operator]:
    """List the operators of one forward pass in order, without views, which move nothing.

    Args:
        model: a model in eval mode.
        inputs: the tensors that it is called with.
        tile: the number that channels are rounded up to a multiple of before arithmetic is counted.
        on_shapes: whether to call a copy on the meta device, which computes nothing; otherwise the model itself is
            called, and then uses the kernels of its own device (a fused attention, for example).
    """
    log = _OperatorLog(tile)
    if on_shapes:
        model, inputs = copy.deepcopy(model).to("meta"), tuple(x.to("meta") for x in inputs)
    with torch.no_grad(), log:
        model(*inputs)
    return log.operators


class _OperatorLog(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Records every operator that runs while it is active."""

    def __init__(self, tile: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
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
        self.operators.append(Operator(int(flops), _bytes_moved(func.overloadpacket, args, kwargs, output)))
        return output

    def _tiled_shape(self, leaf: Any) -> Any:
        """Return the shape that a tensor takes up in whole tiles, and anything else unchanged."""
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        shape = list(leaf.shape)
        for dim in (0, 1) if leaf.dim() > 3 else (-2, -1):  # images and heads: (N, C, ...); matrices: the last two
            shape[dim] = -(-shape[dim] // self.tile) * self.tile
        return torch.Size(shape)


def _bytes_moved(operator: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Count the bytes that an operator reads and writes."""
    given, returned = _bytes((args, kwargs)), _bytes(output)
    if operator in ROW_LOOKUPS:
        return given - _bytes(args[0]) + 2 * returned
    if operator in ROW_UPDATES:
        return 2 * (given - _bytes(args[0]))
    return given + returned


def _bytes(tree: Any) -> int:
    """Add up the bytes of all tensors in a nested structure."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
