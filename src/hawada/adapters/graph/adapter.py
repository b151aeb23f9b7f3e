"""The adapter for any convolutional network: it finds channels, branches and streams by following the forward pass."""

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
from hawada.adapters.graph.trace import Trace, trace
from hawada.adapters.graph.trial import declare
from hawada.adapters.graph.unwrap import plain_model
from hawada.adapters.weights import WeightsSource
from hawada.core.structure import Group, Site, all_tensors

MAX_DECLARED = 4  # declarations that are remembered: a stage asks for that of its teacher and of slim models
_DECLARED: dict[object, tuple[Trace, Declaration]] = {}

ARCHS_WITH_AUXILIARY_CLASSIFIERS = ("googlenet", "inception_v3")  # only training runs these classifiers


class GraphAdapter(BlockStates):
    """Convolutional networks from torchvision or from the user's own code.

    The groups are read from the operators that the forward pass runs, never from names or classes. Channels that meet
    an operator which is not understood stay. A number of channels that is written into code follows them where it is an
    attribute of a module, or is that of the module's input; otherwise they stay too.

    Args:
        arch: The name of a torchvision model (`mobilenet_v2`), or None with `factory`.
        factory: The path of a function or class that returns the model (`mypackage.nets.resnet20`). It is imported and
            called; a saved model that names one loads only with `trust=["mypackage."]`.
        arguments: Plain keyword arguments of the factory or of torchvision's builder. GoogLeNet and Inception are built
            without their auxiliary classifiers unless these arguments ask for them.
        num_classes: The number of classes, which the builder gets under this name; None leaves it to the builder.
        image_size: The side of the square image whose latency is optimised, in pixels; of other inputs the size along
            each axis behind the channels: `[height, width]`, `[length]` of a sequence, `[frames, height, width]`.
        channels: The number of channels that the input has.
        weights: The name of torchvision weights (`IMAGENET1K_V1`), or None; they go with `arch` only.
        path: Local weights to use instead, a `.safetensors` state dict or a folder that this program saved.
        stream: Whether the channels that residual blocks add into may become fewer too.

    Raises:
        ValueError: Neither or both of `arch` and `factory` are given, `arch` is unknown, or the weights do not go with
            the model.
    """

    imports = ("factory",)

    def __init__(
        self,
        arch: str | None = None,
        factory: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int | Sequence[int] = 224,
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
        self.image_size = image_size if isinstance(image_size, int) else list(image_size)
        self.num_classes, self.channels = num_classes, channels
        self.weights, self.path, self.with_stream = weights, path, stream

    def skeleton(self) -> nn.Module:
        device = torch.get_default_device()
        try:
            return plain_model(self._build_model()).eval()
        except (NotImplementedError, RuntimeError):
            if device.type != "meta":
                raise
        with torch.device("cpu"):  # some builders compute with the values of tensors
            model = plain_model(self._build_model())
        return model.to(device).eval()

    def check_teacher(self) -> None:
        self._weights_source().check()

    def teacher(self) -> nn.Module:
        trust = () if self.factory is None else (self.factory,)
        return self._weights_source().fill(self.skeleton, str(self.num_classes or "its"), trust)

    def loads_with(self, path: str, model: nn.Module) -> str:
        if self.factory is None:
            return super().loads_with(path, model)
        return f"import hawada\n\nmodel = hawada.load({path!r}, trust=[{self.factory.partition('.')[0] + '.'!r}])"

    def groups(self, model: nn.Module) -> list[Group]:
        return self._declaration_of(model)[1].groups

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(*self._declaration_of(model))

    def example_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        size = self.image_size
        inner = (size, size) if isinstance(size, int) else tuple(size)
        return (torch.randn((shape.batch, self.channels, *inner), generator=generator, device="cpu"),)

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        if self.arch is None or self.weights is None or self.path is not None:
            return None
        transforms: Any = torchvision.models.get_model_weights(self.arch)[self.weights].transforms()
        return transforms.mean, transforms.std

    def _declaration_of(self, model: nn.Module) -> tuple[Trace, Declaration]:
        """Follow the forward pass of a model and declare its groups, which models of the same structure share."""
        with torch.device("cpu"):  # labels are computed with, whatever device the model is made on
            inputs = self.example_inputs(Shape(2))
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in all_tensors(model).items())
            numbers = tuple(
                (path, name, repr(value))
                for path, module in model.named_modules()
                for name, value in sorted(vars(module).items())
                if isinstance(value, int | float | str | list | tuple)
            )
            key = (type(model), repr(model), numbers, shapes, tuple(tuple(x.shape) for x in inputs), self.with_stream)
            if key not in _DECLARED:
                found = trace(model, inputs)
                declared = declare(found, stream=self.with_stream)
                while len(_DECLARED) >= MAX_DECLARED:
                    del _DECLARED[next(iter(_DECLARED))]
                _DECLARED[key] = found, declared
            return _DECLARED[key]

    def _weights_source(self) -> WeightsSource:
        return WeightsSource(self.arch or str(self.factory), self.weights, self.path, named=self.arch is not None)

    def _build_model(self) -> nn.Module:
        arguments = self.arguments | ({} if self.num_classes is None else {"num_classes": self.num_classes})
        if self.arch in ARCHS_WITH_AUXILIARY_CLASSIFIERS:
            # torchvision's weights were trained on inputs that the model itself transforms
            plain = {"aux_logits": False, "init_weights": False, "transform_input": self.weights is not None}
            arguments = plain | arguments
        if self.arch is not None:
            named: nn.Module = torchvision.models.get_model(self.arch, weights=None, **arguments)
            return named
        assert self.factory is not None
        try:
            build = resolve_name(self.factory)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"model.adapter.factory: {self.factory} cannot be imported ({error}); is its package installed?"
            ) from error
        package = self.factory.partition(".")[0]
        if (getattr(build, "__module__", None) or "").partition(".")[
            0
        ] != package:  # an imported name belongs to another package
            raise ValueError(
                f"model.adapter.factory: {self.factory} is not defined in {package}; name a function or class where it "
                "is defined"
            )
        model = build(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model.adapter.factory: {self.factory} returns a {type(model).__name__}, not a module")
        return model
