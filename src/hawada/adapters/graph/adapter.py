"""The adapter for any network: it finds channels, heads, branches and streams by following the forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pkgutil import resolve_name
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hawada.adapters.base import Shape
from hawada.adapters.graph.block_states import BlockStates
from hawada.adapters.graph.declaration import Declaration
from hawada.adapters.graph.example import ExampleSpec, example_tensors, names_of, take_rows
from hawada.adapters.graph.kept import list_kept
from hawada.adapters.graph.sites import find_sites
from hawada.adapters.graph.trace import Trace, trace
from hawada.adapters.graph.trial import declare
from hawada.adapters.graph.unwrap import plain_model
from hawada.adapters.weights import WeightsSource
from hawada.core.structure import Group, KeptWhole, Site, all_tensors

MAX_DECLARED = 4  # declarations that are remembered: a stage asks for that of its teacher and of slim models
_DECLARED: dict[object, tuple[Trace, Declaration]] = {}

IMAGE_SIZE = 224  # pixels, of networks that are not told another
ARCHS_WITH_AUXILIARY_CLASSIFIERS = ("googlenet", "inception_v3")  # only training runs these classifiers


class GraphAdapter(BlockStates):
    """Networks from torchvision or from the user's own code.

    The groups are read from the operators that the forward pass runs, never from names or classes. Channels that meet
    an operator which is not understood stay. A number of channels that is written into code follows them where it is an
    attribute of a module, or is that of the module's input; otherwise they stay too.

    Args:
        arch: The name of a torchvision model (`mobilenet_v2`), or None with `factory`.
        factory: The path of a function or class that returns the model (`mypackage.nets.resnet20`). It is imported and
            called; a saved model that names one loads only with `trust=["mypackage."]`.
        arguments: Plain keyword arguments of the factory or of torchvision's builder. `pretrained: true` is left out
            wherever the weights come from elsewhere. GoogLeNet and Inception are built
            without their auxiliary classifiers unless these arguments ask for them.
        num_classes: The number of classes, which the builder gets under this name; None leaves it to the builder.
        image_size: The side of the square image whose latency is optimised, in pixels; of other inputs the size along
            each axis behind the channels: `[height, width]`, `[length]` of a sequence, `[frames, height, width]`. None
            stands for 224.
        channels: The number of channels that the input has.
        weights: The name of torchvision weights (`IMAGENET1K_V1`), or None; they go with `arch` only.
        path: Local weights to use instead: a state dict in a `.safetensors` file or one of torch's (`.pth`, `.pt`,
            `.bin`, `.ckpt`), or a folder that this program saved. A factory without one returns the model with its
            weights.
        stream: Whether the channels that residual blocks add into may become fewer too.
        example: What the forward pass takes, where that is not one image; `image_size` and `channels` are not used
            then. Shapes without the batch, `[3, 64, 64]`, by the names of parameters (`{image: [3, 64, 64], age: [1]}`)
            or in a list by their order, nested where a parameter is a dictionary or a list. `{shape: [16], dtype:
            int64, high: 1000}` stands for whole numbers below 1,000. A text is the path of a function of the batch size
            that returns a tensor, a tuple of arguments or a dictionary.

    Raises:
        ValueError: Neither or both of `arch` and `factory` are given, `arch` is unknown, or the weights do not go with
            the model.
    """

    imports: tuple[str, ...] = ("factory", "example")

    def __init__(
        self,
        arch: str | None = None,
        factory: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        weights: str | None = None,
        path: str | None = None,
        stream: bool = False,
        example: ExampleSpec | None = None,
    ) -> None:
        if (arch is None) == (factory is None):
            raise ValueError(
                f"model.adapter: arch={arch} with factory={factory}; give the name of a torchvision model as arch, or "
                "the path of a function of your own as factory"
            )
        if arch is not None and arch not in torchvision.models.list_models():
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; mobilenet_v2 is one")
        if factory is not None and weights is not None:
            raise ValueError(f"model.adapter.weights: {weights} is torchvision's; set model.adapter.path for {factory}")
        if factory is None and "weights" in (arguments or {}):
            raise ValueError("model.adapter.arguments.weights: a skeleton has none; set model.adapter.weights instead")
        self.arch, self.factory, self.arguments = arch, factory, dict(arguments or {})
        size = IMAGE_SIZE if image_size is None else image_size
        self.image_size = size if isinstance(size, int) else list(size)
        self.num_classes, self.channels = num_classes, channels
        self.weights, self.path, self.with_stream, self.example = weights, path, stream, example

    def skeleton(self) -> nn.Module:
        device = torch.get_default_device()
        try:
            return self._build_model()
        except (NotImplementedError, RuntimeError):
            if device.type != "meta":
                raise
        with torch.device("cpu"):  # some builders compute with the values of tensors
            model = self._build_model()
        return model.to(device)

    def check_teacher(self) -> None:
        if not self._builds_with_weights():
            self._weights_source().check(self.skeleton)
        elif self._draws_weights():
            raise ValueError(
                f"model.path: {self.factory} returns a model with random weights; set model.path to the weights, or "
                "let the function load them"
            )

    def teacher(self) -> nn.Module:
        if self._builds_with_weights():
            with torch.device("cpu"):
                return self._build_model(with_weights=True)
        return self._weights_source().fill(self.skeleton, self._code())

    def loads_with(self, path: str, model: nn.Module) -> str:
        packages = list(dict.fromkeys(name.partition(".")[0] + "." for name in self._code()))
        if not packages:
            return super().loads_with(path, model)
        return f"import hawada\n\nmodel = hawada.load({path!r}, trust={packages!r})"

    def groups(self, model: nn.Module) -> list[Group]:
        return self._declaration_of(model)[1].groups

    def kept_whole(self, model: nn.Module) -> list[KeptWhole]:
        return list_kept(self._declaration_of(model)[1])

    def sites(self, model: nn.Module) -> list[Site]:
        return find_sites(*self._declaration_of(model))

    def example_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        if self.example is not None:
            return example_tensors(self.example, shape.batch)
        generator = torch.Generator().manual_seed(0)
        size = self.image_size
        inner = (size, size) if isinstance(size, int) else tuple(size)
        return (torch.randn((shape.batch, self.channels, *inner), generator=generator, device="cpu"),)

    def input_names(self) -> list[str]:
        return [] if self.example is None else names_of(self.example)

    def logits(self, output: Any) -> Tensor:
        """The one tensor that the model returns, or the elements of all of them, (batch, elements)."""
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if len(tensors) == 1:
            return tensors[0]
        by_sample = len({tensor.shape[:1] for tensor in tensors}) == 1 and tensors[0].ndim > 0
        rows = [tensor.reshape(len(tensor) if by_sample else 1, -1) for tensor in tensors]
        return torch.cat([row.float() for row in rows], 1)

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        if self.arch is None or self.weights is None or self.path is not None:
            return None
        transforms: Any = torchvision.models.get_model_weights(self.arch)[self.weights].transforms()
        return transforms.mean, transforms.std

    def _declaration_of(self, model: nn.Module) -> tuple[Trace, Declaration]:
        """Follow the forward pass of a model and declare its groups, which models of the same structure share."""
        elsewhere = torch.get_default_device().type != "cpu"  # the context costs time in every call of torch
        with torch.device("cpu") if elsewhere else nullcontext():  # labels are computed with
            inputs = self.example_inputs(Shape(2))
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in all_tensors(model).items())
            numbers = tuple(
                (path, name, repr(value))
                for path, module in model.named_modules()
                for name, value in sorted(vars(module).items())
                if isinstance(value, int | float | str | list | tuple)
            )
            key = (
                type(model),
                repr(model),
                numbers,
                shapes,
                tuple(tuple(x.shape) for x in inputs),
                self.with_stream,
                repr(self.example),
            )
            if key not in _DECLARED:
                undo = take_rows(model, self.example)
                try:
                    found = trace(model, inputs)
                finally:
                    undo()
                declared = declare(found, stream=self.with_stream)
                while len(_DECLARED) >= MAX_DECLARED:
                    del _DECLARED[next(iter(_DECLARED))]
                _DECLARED[key] = found, declared
            return _DECLARED[key]

    def _code(self) -> tuple[str, ...]:
        """The import paths of the user's own functions that make the model and its example."""
        return tuple(name for name in (self.factory, self.example) if isinstance(name, str))

    def _builds_with_weights(self) -> bool:
        """Whether the user's own function returns the model with its weights, as no others are named."""
        return self.factory is not None and self.path is None

    def _draws_weights(self) -> bool:
        """Whether the user's own function returns other weights when other random numbers are drawn."""
        built = []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(seed)
                built.append(self._build_model(with_weights=True).state_dict())
        return any(not torch.equal(one, other) for one, other in zip(*(state.values() for state in built), strict=True))

    def _weights_source(self) -> WeightsSource:
        named = self.arch is not None
        return WeightsSource(self.arch or str(self.factory), self.weights, self.path, named, self.num_classes)

    def _build_model(self, *, with_weights: bool = False) -> nn.Module:
        """Build the model in eval mode and in float32, without what wraps it."""
        arguments = self.arguments | ({} if self.num_classes is None else {"num_classes": self.num_classes})
        if arguments.get("pretrained") is True and not with_weights:
            arguments["pretrained"] = False
        model = plain_model(self._build(arguments)).eval()
        take_rows(model, self.example)
        kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        return model.float() if kinds - {torch.float32} else model

    def _build(self, arguments: dict[str, Any]) -> nn.Module:
        if self.arch in ARCHS_WITH_AUXILIARY_CLASSIFIERS:
            # torchvision's weights were trained on inputs that the model itself transforms
            plain = {"aux_logits": False, "init_weights": False, "transform_input": self.weights is not None}
            arguments = plain | arguments
        if self.arch is not None:
            takes = inspect.signature(torchvision.models.get_model_builder(self.arch)).parameters
            none = {name: None for name in ("weights", "weights_backbone") if name in takes}
            named: nn.Module = torchvision.models.get_model(self.arch, **none, **arguments)
            return named
        assert self.factory is not None
        build = import_factory(self.factory)
        try:
            inspect.signature(build).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"model.adapter.factory: {self.factory} cannot be called ({error}); give its arguments as "
                "model.adapter.arguments='{name: value}', and the number of classes as model.adapter.num_classes"
            ) from None
        model = build(**arguments)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model.adapter.factory: {self.factory} returns a {type(model).__name__}, not a module")
        return model


def import_factory(path: str) -> Callable[..., Any]:
    """Import the user's own function or class that returns a model.

    Args:
        path: Its import path, `mypackage.nets.resnet20`.

    Raises:
        ValueError: It cannot be imported, is a module, or belongs to another package than its path says.
    """
    try:
        build = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model.adapter.factory: {path} cannot be imported ({error}); is its package installed, or in the working "
            "directory?"
        ) from error
    package = path.partition(".")[0]
    if not callable(build):
        raise ValueError(
            f"model.adapter.factory: {path} is a {type(build).__name__}; name the function or class in it that returns "
            "the model"
        )
    if (getattr(build, "__module__", None) or "").partition(".")[0] != package:  # a name that was imported there
        raise ValueError(
            f"model.adapter.factory: {path} is not defined in {package}; name a function or class where it is defined"
        )
    made: Callable[..., Any] = build
    return made
