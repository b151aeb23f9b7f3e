"""An analytic device with the profiler's clock interface, for rehearsals and deterministic tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from hawada.core.profiler import Inputs


class SimulatedClock:
    """Roofline time of every operator, summed: launch cost + max(compute, memory traffic).

    Channels are rounded up to a tile, so the device has the stairs of a real one. Williams et al., Roofline, 2009.
    Nothing is executed: shapes are propagated on the meta device.

    Args:
        tflops: arithmetic peak, 1e12 operations per second.
        gbps: memory bandwidth, 1e9 bytes per second.
        launch_us: fixed cost of one operator in microseconds.
        tile: channels are processed in multiples of this.
        noise: relative standard deviation of a sample; 0 is exactly repeatable.
        seed: of the noise.
    """

    simulated = True

    def __init__(
        self,
        tflops: float = 0.2,
        gbps: float = 20.0,
        launch_us: float = 5.0,
        tile: int = 8,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.tflops, self.gbps, self.launch_us, self.tile = tflops, gbps, launch_us, tile
        self.noise = noise
        self._random = np.random.default_rng(seed)

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        meter = _Roofline(self)
        shapes, meta_inputs = copy.deepcopy(model).to("meta"), [x.to("meta") for x in inputs]
        with torch.no_grad(), meter:
            shapes(*meta_inputs)
        return lambda: meter.milliseconds * float(max(0.1, 1 + self.noise * self._random.standard_normal()))


class _Roofline(TorchDispatchMode):
    """Adds up the time of each operator that runs while it is active."""

    def __init__(self, clock: SimulatedClock) -> None:
        super().__init__()
        self.clock = clock
        self.milliseconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns):
            return output  # a view moves no data
        tensors = [leaf for leaf in tree_flatten((args, kwargs, output))[0] if isinstance(leaf, Tensor)]
        traffic = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        flops = 0
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            args, kwargs, result = tree_map(self._tiled_shape, (args, kwargs, output))
            flops = formula(*args, **kwargs, out_val=result)
        compute_ms = flops / (self.clock.tflops * 1e9)
        memory_ms = traffic / (self.clock.gbps * 1e6)
        self.milliseconds += self.clock.launch_us * 1e-3 + max(compute_ms, memory_ms)
        return output

    def _tiled_shape(self, leaf: Any) -> Any:
        """The shape that a tensor occupies in whole tiles; anything else unchanged."""
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        shape = list(leaf.shape)
        for dim in (0, 1) if leaf.dim() > 3 else (-2, -1):  # images and heads: (N, C, ...); matrices: the last two
            shape[dim] = -(-shape[dim] // self.clock.tile) * self.clock.tile
        return torch.Size(shape)
