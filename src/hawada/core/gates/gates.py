"""Trainable gates: one number in [0, 1] for each unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def multiply_along(
    x: Tensor,
    gate: Tensor,
    dim: int,
    per_unit: int = 1,
    offsets: Sequence[int] | None = None,
    positions: Sequence[int] = (),
) -> Tensor:
    """Multiply `x` by one gate value per unit along `dim`.

    Args:
        x: the activation. Without `offsets`, `x.shape[dim]` is `len(gate) * per_unit`; it may be any size when the gate
            has a single value.
        gate: the gate values, (units,).
        dim: the axis that holds the units.
        per_unit: how many consecutive elements of that axis share a gate value.
        offsets: the positions at which runs of all the units begin, for an axis that holds other elements too; those
            elements stay as they are.
        positions: the positions of all elements, unit by unit, where the units lie in no such order.

    Raises:
        ValueError: when the axis does not hold that many units.
    """
    gate = gate.to(x.dtype)
    if gate.numel() == 1 and offsets is None and not positions:
        return x * gate.reshape(())
    if per_unit > 1:
        gate = gate.repeat_interleave(per_unit)
    if positions:
        index = torch.as_tensor(positions, device=gate.device)
        gate = gate.new_ones(x.shape[dim]).index_copy(0, index, gate)
    elif offsets is not None:
        gate = _spread(gate, x.shape[dim], offsets)
    if x.shape[dim] != gate.numel():
        raise ValueError(
            f"axis {dim} of an activation of shape {tuple(x.shape)} does not hold {gate.numel()} elements; check the "
            "axis, the units and the offsets of the group's gate points"
        )
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * gate.view(shape)


def _spread(gate: Tensor, size: int, offsets: Sequence[int]) -> Tensor:
    """An axis of `size` ones, (size,), in which the gate's values begin at each offset."""
    parts, end = [], 0
    for offset in sorted(offsets):
        parts += [gate.new_ones(offset - end), gate]
        end = offset + gate.numel()
    return torch.cat([*parts, gate.new_ones(max(size - end, 0))])


class SigmoidGate(nn.Module):
    """g = sigmoid(theta / temperature).

    `theta` is the raw parameter and `gate` is its expectation: the value that activations are multiplied by, that
    penalties and the latency proxy get and that export reads. Calling the gate multiplies an activation by it, with
    broadcasting.

    Args:
        shape: the shape of theta; an int means (units,).
        init: the initial theta; 4.0 gives g = 0.982.
        temperature: a value below 1 pushes gates towards 0 and 1.
        start_temperature: the temperature at the start of training, from which it falls to `temperature` by the end;
            None keeps `temperature` throughout.

    Raises:
        ValueError: when a temperature is not above 0.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        init: float = 4.0,
        temperature: float = 1.0,
        start_temperature: float | None = None,
    ) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        for name, value in (("temperature", temperature), ("start_temperature", start_temperature)):
            if value is not None and value <= 0:
                raise ValueError(f"gate.{name}: {value} is not above 0; 1.0 is the plain sigmoid")
        self.theta = nn.Parameter(torch.full(shape, float(init)))
        self.temperature = self.final_temperature = float(temperature)
        self.start_temperature = float(temperature if start_temperature is None else start_temperature)
        self.hard: Tensor | None = None  # a 0/1 mask that replaces the gate while kept units are tried

    @property
    def gate(self) -> Tensor:
        """The gate values in [0, 1], in the shape of theta and in float32 even under autocast."""
        if self.hard is not None:
            return self.hard
        return self.expectation(self.theta.float())

    @property
    def factor(self) -> Tensor:
        """What activations are multiplied by: the gate itself, or a random draw in gates that draw."""
        return self.gate

    def expectation(self, theta: Tensor) -> Tensor:
        """The gate values that a theta would give, in its shape; they rise with theta."""
        return torch.sigmoid(theta / self.temperature)

    def redraw(self) -> None:
        """Make a new draw, in gates that draw; the student calls this before every forward pass."""

    def anneal(self, progress: float) -> None:
        """Set the temperature for this part of training; equal parts lower it by equal factors.

        Args:
            progress: 0 at the start of training and 1 at its end; a gate that is not trained is as at the end.
        """
        self.temperature = self.start_temperature ** (1 - progress) * self.final_temperature**progress

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


class HardConcreteGate(SigmoidGate):
    """A gate that is drawn at random in every training step, and whose draws may be exactly 0 or exactly 1.

    It is the hard concrete gate of Louizos et al., Learning sparse neural networks through L0 regularization, 2018, and
    theta is their log alpha. `gate`, which penalties, proxy and export get, is the probability that a draw is not 0, in
    closed form.

    Args:
        shape: the shape of theta; an int means (units,).
        init: the initial theta.
        temperature: the temperature of the draw; the paper has 2/3.
        low: the lower end of the range that a draw is stretched to before it is cut off at 0; it is below 0.
        high: the upper end of that range, before draws are cut off at 1; it is above 1.

    Raises:
        ValueError: when `low` is not below 0 or `high` is not above 1.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        init: float = 2.0,
        temperature: float = 2 / 3,
        low: float = -0.1,
        high: float = 1.1,
    ) -> None:
        super().__init__(shape, init, temperature)
        if not low < 0 < 1 < high:
            raise ValueError(f"gate: low {low} must be below 0 and high {high} above 1; the paper has -0.1 and 1.1")
        self.low, self.high = low, high
        self.noise: Tensor | None = None

    @property
    def factor(self) -> Tensor:
        """A draw in training; otherwise the paper's estimate: sigmoid(theta), stretched and cut off at 0 and 1."""
        if self.hard is not None:
            return self.hard
        theta = self.theta.float()
        if self.noise is not None:
            theta = (self.noise + theta) / self.temperature
        return (torch.sigmoid(theta) * (self.high - self.low) + self.low).clamp(0.0, 1.0)

    def expectation(self, theta: Tensor) -> Tensor:
        return torch.sigmoid(theta - self.temperature * math.log(-self.low / self.high))

    def redraw(self) -> None:
        """Make one draw for everything that the gate multiplies in a forward pass; outside training there is none."""
        uniform = torch.rand_like(self.theta, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        self.noise = torch.logit(uniform) if self.training else None


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort a model's parameters for separate optimizers, or for settings such as weight decay.

    Returns:
        `gates` holds the theta of every gate, `weights` the other parameters with two or more axes, and
        `norms_and_biases` the rest, which usually gets no weight decay.
    """
    sorted_parameters: dict[str, list[nn.Parameter]] = {"gates": [], "weights": [], "norms_and_biases": []}
    thetas = {id(module.theta) for module in model.modules() if isinstance(module, SigmoidGate)}
    for parameter in model.parameters():
        if id(parameter) in thetas:
            sorted_parameters["gates"].append(parameter)
        else:
            sorted_parameters["weights" if parameter.dim() > 1 else "norms_and_biases"].append(parameter)
    return sorted_parameters
