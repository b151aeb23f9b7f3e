"""Trainable gates: one number in [0, 1] per unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def multiply_along(
    x: Tensor, gate: Tensor, dim: int, per_unit: int = 1, offsets: Sequence[int] | None = None
) -> Tensor:
    """Multiply `x` by one gate value per unit along `dim`.

    Args:
        x: activation; without `offsets`, `x.shape[dim] == len(gate) * per_unit`, or anything when the gate has one
            value.
        gate: shape (units,).
        dim: axis that holds the units.
        per_unit: consecutive elements of that axis that share a gate value.
        offsets: where each run of units begins, for an axis that holds other elements too: those stay as they are.

    Raises:
        ValueError: when the axis does not hold that many units.
    """
    gate = gate.to(x.dtype)
    if gate.numel() == 1 and offsets is None:
        return x * gate.reshape(())
    if per_unit > 1:
        gate = gate.repeat_interleave(per_unit)
    if offsets is not None:
        gate = _spread(gate, x.shape[dim], offsets)
    if x.shape[dim] != gate.numel():
        raise ValueError(f"axis {dim} of an activation of shape {tuple(x.shape)} does not hold {gate.numel()} elements")
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * gate.view(shape)


def _spread(gate: Tensor, size: int, offsets: Sequence[int]) -> Tensor:
    """An axis of `size` ones with the gate's values in a row from each offset on."""
    parts, end = [], 0
    for offset in sorted(offsets):
        parts += [gate.new_ones(offset - end), gate]
        end = offset + gate.numel()
    return torch.cat([*parts, gate.new_ones(max(size - end, 0))])


class SigmoidGate(nn.Module):
    """g = sigmoid(theta / temperature).

    `theta` is the raw parameter and `gate` its expectation: the value that training multiplies with, that penalties
    and the latency proxy see and that export reads. Calling the gate multiplies with broadcasting.

    Args:
        shape: any shape; an int means (units,).
        init: initial theta; 4.0 gives g = 0.982.
        temperature: below 1 pushes gates towards 0 and 1.
        start_temperature: what training begins with, to come down to `temperature` by the end; None: the same
            throughout.
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
        self.hard: Tensor | None = None  # a 0/1 mask that stands in for the gate while a choice is being checked

    @property
    def gate(self) -> Tensor:
        """Values in [0, 1], the shape of theta, in float32 even under autocast."""
        if self.hard is not None:
            return self.hard
        return self.expectation(self.theta.float())

    @property
    def factor(self) -> Tensor:
        """What activations are multiplied with: the gate itself, unless a gate draws."""
        return self.gate

    def expectation(self, theta: Tensor) -> Tensor:
        """The gate that this theta would give; rises with it."""
        return torch.sigmoid(theta / self.temperature)

    def redraw(self) -> None:
        """Called before every forward pass of the model, for gates that draw."""

    def anneal(self, progress: float) -> None:
        """Set the temperature of this part of training; it comes down by the same factor in equal parts.

        Args:
            progress: 0 where training begins, 1 at its end, which is also where gates are that are not trained.
        """
        self.temperature = self.start_temperature ** (1 - progress) * self.final_temperature**progress

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


class HardConcreteGate(SigmoidGate):
    """A gate that is drawn anew in every training step and may come out as exactly 0 or exactly 1.

    Louizos et al., Learning sparse neural networks through L0 regularization, 2018: theta is their log alpha. `gate`,
    what penalties, proxy and export see, is the probability that the unit is there at all, in closed form.

    Args:
        shape: any shape; an int means (units,).
        init: initial theta.
        temperature: of the relaxed draw; 2/3 in the paper.
        low: the draw is stretched to begin here, below 0.
        high: and to end here, above 1.
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
        """In training a draw; else the paper's estimate, its sigmoid stretched and cut off at 0 and 1."""
        if self.hard is not None:
            return self.hard
        theta = self.theta.float()
        if self.noise is not None:
            theta = (self.noise + theta) / self.temperature
        return (torch.sigmoid(theta) * (self.high - self.low) + self.low).clamp(0.0, 1.0)

    def expectation(self, theta: Tensor) -> Tensor:
        return torch.sigmoid(theta - self.temperature * math.log(-self.low / self.high))

    def redraw(self) -> None:
        """One draw for everything that the gate multiplies in a forward pass; none outside training."""
        uniform = torch.rand_like(self.theta, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        self.noise = torch.logit(uniform) if self.training else None


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort parameters for separate optimizers (or settings such as weight decay).

    Returns:
        `gates`: theta of every gate; `weights`: other parameters with two or more axes;
        `norms_and_biases`: the rest, which usually takes no weight decay.
    """
    sorted_parameters: dict[str, list[nn.Parameter]] = {"gates": [], "weights": [], "norms_and_biases": []}
    thetas = {id(module.theta) for module in model.modules() if isinstance(module, SigmoidGate)}
    for parameter in model.parameters():
        if id(parameter) in thetas:
            sorted_parameters["gates"].append(parameter)
        else:
            sorted_parameters["weights" if parameter.dim() > 1 else "norms_and_biases"].append(parameter)
    return sorted_parameters
