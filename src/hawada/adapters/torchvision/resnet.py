"""torchvision's ResNets with BasicBlock or Bottleneck, the named ones and smaller ones of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hawada.adapters.graph import GraphAdapter
from hawada.adapters.weights import Source

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNetAdapter(GraphAdapter):
    """He et al., Deep Residual Learning for Image Recognition, 2015, as torchvision builds it.

    Args:
        arch: a torchvision ResNet (`resnet18` … `wide_resnet101_2`), or `basic` / `bottleneck` for torchvision's
            ResNet class with the given `layers`.
        layers: blocks per stage, four numbers; only for `basic` and `bottleneck`.
        num_classes: size of the classifier.
        image_size: side of the square input whose latency is optimised, in pixels.
        weights: name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: local weights instead: a `.safetensors` state dict, or a folder that this program saved.
        stream: the residual stream of each stage may become narrower.
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
        if (arch in BLOCKS) != (layers is not None):
            raise ValueError(
                f"model.adapter: arch={arch} with layers={layers}; layers go with basic or bottleneck only"
            )
        if arch not in BLOCKS and arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; resnet18 is one")
        super().__init__(
            "resnet18" if arch in BLOCKS else arch,
            num_classes=num_classes,
            image_size=image_size,
            weights=weights,
            path=path,
            stream=stream,
        )
        self.arch, self.layers = arch, layers

    def _declared(self, model: nn.Module) -> Any:
        if not isinstance(model, ResNet):
            raise ValueError(f"{type(model).__name__} is no ResNet of torchvision's; is model.adapter the right one?")
        return super()._declared(model)

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        return super().normalisation() if self.layers is None else None

    def _source(self) -> Source:
        return Source(str(self.arch), self.weights, self.path, named=self.layers is None)

    def _build(self) -> nn.Module:
        if self.layers is None:
            return super()._build()
        return ResNet(BLOCKS[str(self.arch)], list(self.layers), num_classes=self.num_classes or 1000)
