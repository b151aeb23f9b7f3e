"""torchvision's ResNets with BasicBlock or Bottleneck, the named ones and smaller ones of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hawada.adapters.graph import Declaration, GraphAdapter, Trace
from hawada.adapters.weights import WeightsSource

BLOCK_TYPES = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNetAdapter(GraphAdapter):
    """He et al., Deep Residual Learning for Image Recognition, 2015, as torchvision builds it.

    Args:
        arch: The name of a torchvision ResNet (`resnet18` … `wide_resnet101_2`), or `basic` / `bottleneck` for
            torchvision's ResNet class with the given `layers`.
        layers: The number of blocks in each of the four stages; only `basic` and `bottleneck` take it.
        num_classes: The number of classes.
        image_size: The side of the square input whose latency is optimised, in pixels.
        weights: The name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: Local weights to use instead, a `.safetensors` state dict or a folder that this program saved.
        stream: Whether the residual stream of each stage may become narrower.

    Raises:
        ValueError: `arch` is unknown, or does not go with `layers`.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        layers: Sequence[int] | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        weights: str | None = None,
        path: str | None = None,
        stream: bool = False,
    ) -> None:
        if (arch in BLOCK_TYPES) != (layers is not None):
            raise ValueError(
                f"model.adapter: arch={arch} with layers={layers}; layers go with basic or bottleneck only"
            )
        if arch not in BLOCK_TYPES and arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; resnet18 is one")
        super().__init__(
            "resnet18" if arch in BLOCK_TYPES else arch,
            num_classes=num_classes,
            image_size=image_size,
            weights=weights,
            path=path,
            stream=stream,
        )
        self.arch, self.layers = arch, layers

    def _declaration_of(self, model: nn.Module) -> tuple[Trace, Declaration]:
        if not isinstance(model, ResNet):
            raise ValueError(f"{type(model).__name__} is no ResNet of torchvision's; is model.adapter the right one?")
        return super()._declaration_of(model)

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        return super().normalisation() if self.layers is None else None

    def _weights_source(self) -> WeightsSource:
        return WeightsSource(
            str(self.arch), self.weights, self.path, named=self.layers is None, classes=self.num_classes
        )

    def _build(self, arguments: dict[str, Any]) -> nn.Module:
        if self.layers is None:
            return super()._build(arguments)
        model: nn.Module = ResNet(BLOCK_TYPES[str(self.arch)], list(self.layers), num_classes=self.num_classes or 1000)
        return model
