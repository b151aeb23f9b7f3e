"""Second moments of a layer's inputs and outputs: all that least squares for its weights needs."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_RIDGE = 1e-3  # the ridge where rows are plenty, as a fraction of the inputs' mean variance


class Moments:
    """Second moments of a layer's inputs x and outputs y, summed in double precision batch by batch.

    Args:
        inputs: the length of a row of x.
        outputs: the length of a row of y.
        centred: whether moments are taken about the means (True) or about 0 (False).
    """

    def __init__(self, inputs: int, outputs: int, *, centred: bool) -> None:
        self.centred = centred
        self.squares = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.products = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.sum_in = torch.zeros(inputs, dtype=torch.float64)
        self.sum_out = torch.zeros(outputs, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the rows of one batch, (rows, inputs) and (rows, outputs)."""
        self.squares = self.squares.to(x.device) + (x.T @ x).double()
        self.products = self.products.to(x.device) + (x.T @ y).double()
        self.sum_in = self.sum_in.to(x.device) + x.double().sum(0)
        self.sum_out = self.sum_out.to(x.device) + y.double().sum(0)
        self.count += len(x)

    @property
    def mean_in(self) -> Tensor:
        """The mean of the inputs, (inputs,); 0 when the moments are not centred."""
        return self.sum_in * (self.centred / self.count)

    @property
    def mean_out(self) -> Tensor:
        """The mean of the outputs, (outputs,); 0 when the moments are not centred."""
        return self.sum_out * (self.centred / self.count)

    def covariance(self) -> Tensor:
        """The covariance of the inputs, (inputs, inputs)."""
        return self.squares / self.count - torch.outer(self.mean_in, self.mean_in)

    def products_with_outputs(self) -> Tensor:
        """The covariance of the inputs with the outputs, (inputs, outputs)."""
        return self.products / self.count - torch.outer(self.mean_in, self.mean_out)

    def definite(self) -> Tensor:
        """The covariance with a ridge, (inputs, inputs), positive definite.

        The fewer rows there are for each input, the larger is the ridge, and the less the weights change.
        """
        covariance = self.covariance()
        ridge = RELATIVE_RIDGE + len(covariance) / self.count
        covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-12))
        return covariance
