"""Any convolutional network: channels, residual branches and streams found by following its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from hawada.adapters.base import Shape
from hawada.adapters.graph.block_states import BlockStates
from hawada.adapters.graph.declaration import Declaration
from hawada.adapters.graph.sites import find_sites
from hawada.adapters.graph.trace import trace
from hawada.adapters.weights import Source
from hawada.core.structure import Group, Site

WITH_AUXILIARIES = ("googlenet", "inception_v3")  # classifiers on the way that only training runs


class GraphAdapter(BlockStates):
    """Convolutional networks from torchvision or from code of one's own.

    What may be removed is read from the graph that torch.fx makes of the forward pass, never from names. Channels
    that meet an operator which is not understood, or a number of channels written into code, all stay.

    Args:
        arch: name of a torchvision model (`mobilenet_v2`), or None with `factory`.
        factory: path of a function or class that returns the model (`mypackage.nets.resnet20`). It is imported and
            called; a saved model that names one loads only with `trust=["mypackage."]`.
        arguments: keyword arguments of the factory, or of torchvision's builder; plain values. GoogLeNet and Inception
            come without their auxiliary classifiers unless these ask for them.
        num_classes: size of the classifier, handed on under this name; None leaves it to the builder.
        image_size: side of the square input whose latency is optimised, in pixels.
        channels: of the input image.
        weights: name of torchvision weights (`IMAGENET1K_V1`), or None; for `arch` only.
        path: local weights instead: a `.safetensors` state dict, or a folder that this program saved.
        stream: channels that residual blocks add into may become fewer too.
    """

    imports = ("factory",)

    def __init__(
        self,
        arch: str | None = None,
        factory: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int = 224,
        channels: int = 3,
        weights: str | None = None,
        path: str | None = None,
        stream: bool = False,
    ) -> None:
        if (arch is None) == (factory is None):
            raise ValueError(
                f"model.adapter: arch={arch} with factory={factory}; give the name of a torchvision model as arch, or "
                "the path of a function of your own as factory"
            )
        if arch is not None and arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; mobilenet_v2 is one")
        if factory is not None and weights is not None:
            raise ValueError(f"model.adapter.weights: {weights} is torchvision's; set model.adapter.path for {factory}")
        if "weights" in (arguments or {}):
            raise ValueError("model.adapter.arguments.weights: a skeleton has none; set model.adapter.weights instead")
        self.arch, self.factory, self.arguments = arch, factory, dict(arguments or {})
        self.num_classes, self.image_size, self.channels = num_classes, image_size, channels
        self.weights, self.path, self.with_stream = weights, path, stream

    def skeleton(self) -> nn.Module:
        device = torch.get_default_device()
        try:
            return self._build().eval()
        except (NotImplementedError, RuntimeError):
            if device.type != "meta":
                raise
        with torch.device("cpu"):  # a builder that computes with tensors
            model = self._build()
        return model.to(device).eval()

    def check_teacher(self) -> None:
        self._source().check()

    def teacher(self) -> nn.Module:
        trust = () if self.factory is None else (self.factory,)
        return self._source().fill(self.skeleton, str(self.num_classes or "its"), trust)

    def loads_with(self, path: str, model: nn.Module) -> str:
        if self.factory is None:
            return super().loads_with(path, model)
        return f"import hawada\n\nmodel = hawada.load({path!r}, trust=[{self.factory.partition('.')[0] + '.'!r}])"

    def groups(self, model: nn.Module) -> list[Group]:
        return self._declared(model)[1].groups

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(*self._declared(model))

    def example_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        size = (shape.batch, self.channels, self.image_size, self.image_size)
        return (torch.randn(size, generator=generator, device="cpu"),)

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        if self.arch is None or self.weights is None or self.path is not None:
            return None
        transforms: Any = torchvision.models.get_model_weights(self.arch)[self.weights].transforms()
        return transforms.mean, transforms.std

    def _declared(self, model: nn.Module) -> Any:
        found = trace(model, self.example_inputs(Shape(2)))
        return found, Declaration(found, stream=self.with_stream)

    def _source(self) -> Source:
        return Source(self.arch or str(self.factory), self.weights, self.path, named=self.arch is not None)

    def _build(self) -> nn.Module:
        arguments = self.arguments | ({} if self.num_classes is None else {"num_classes": self.num_classes})
        if self.arch in WITH_AUXILIARIES:  # torchvision's weights were trained on inputs that the model transforms
            plain = {"aux_logits": False, "init_weights": False, "transform_input": self.weights is not None}
            arguments = plain | arguments
        if self.arch is not None:
            return torchvision.models.get_model(self.arch, weights=None, **arguments)
        assert self.factory is not None
        try:
            build = resolve_name(self.factory)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"model.adapter.factory: {self.factory} cannot be imported ({error}); is its package installed?"
            ) from error
        package = self.factory.partition(".")[0]
        if (getattr(build, "__module__", None) or "").partition(".")[0] != package:  # what a module imports is not its
            raise ValueError(
                f"model.adapter.factory: {self.factory} is not defined in {package}; name a function or class where it "
                "is defined"
            )
        model = build(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model.adapter.factory: {self.factory} returns a {type(model).__name__}, not a module")
        return model
