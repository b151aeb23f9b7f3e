"""What a network is called with: tensors by position or by name, nested as its forward pass takes them.

Everything else calls models with a plain row of tensors. A hook on the model turns such a row into the arguments that
its forward pass takes; a call with those arguments goes through it unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hawada.core.structure import TensorRow

# Shapes without the batch by the names of forward's parameters, a list of them, or the path of a function.
ExampleSpec = str | Sequence[Any] | Mapping[str, Any]
LEAF_KEYS = {"shape", "dtype", "high"}
DEFAULT_HIGH = 2  # whole numbers are drawn from 0 and 1


class Arguments:
    """A forward pre-hook that makes the arguments of a forward pass of a row of tensors.

    It is an object, so that a deep copy of a model copies it too; a slim model keeps it.

    Args:
        structure: The positional and the keyword arguments, as a tree whose leaves are the tensors.
    """

    def __init__(self, structure: pytree.TreeSpec) -> None:
        self.structure = structure

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) == 1 and isinstance(args[0], TensorRow):
            args = args[0].tensors
        row = len(args) == self.structure.num_leaves and all(isinstance(given, Tensor) for given in args)
        if kwargs or not row:
            return args, kwargs
        made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(list(args), self.structure)
        return made


def example_tensors(spec: ExampleSpec, batch: int) -> tuple[Tensor, ...]:
    """Make the tensors of an example in a row, the same values every time.

    Args:
        spec: See `GraphAdapter`.
        batch: The size of the first axis of each.

    Raises:
        ValueError: The spec does not describe tensors.
    """
    leaves = pytree.tree_leaves(_make(spec, batch))
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"model.adapter.example: {spec} does not make tensors; give shapes without the batch, as in "
            "'{image: [3, 64, 64], mask: [1, 64, 64]}', or the path of a function of the batch size"
        )
    return tuple(leaves)


def take_rows(model: nn.Module, spec: ExampleSpec | None) -> Callable[[], None]:
    """Let a model be called with the tensors of an example in a row; return a function that undoes this."""
    if spec is None or any(isinstance(hook, Arguments) for hook in model._forward_pre_hooks.values()):
        return lambda: None
    given = _make(spec, 1)
    if isinstance(given, Tensor):
        return lambda: None
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    if isinstance(given, Mapping):
        parameters = inspect.signature(model.forward).parameters
        named = set(given) <= set(parameters) or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        arguments = ((), dict(given)) if named else ((given,), {})
    else:
        arguments = (tuple(given), {})
    structure = pytree.tree_structure(arguments)
    return model.register_forward_pre_hook(Arguments(structure), with_kwargs=True).remove


def names_of(spec: ExampleSpec) -> list[str]:
    """The innermost key of every tensor of an example; empty where one has none."""
    paths = [path for path, _ in pytree.tree_flatten_with_path(_make(spec, 1))[0]]
    keys = [[str(step.key) for step in path if isinstance(step, pytree.MappingKey)] for path in paths]
    return [inner[-1] for inner in keys] if all(keys) else []


def describe_forward(model: nn.Module) -> str:
    """An example of a spec for messages, with the names of the parameters of a model's forward pass."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    ]
    return "{" + ", ".join(f"{name}: [3, 32, 32]" for name in required or ["x"]) + "}"


def _make(spec: ExampleSpec, batch: int) -> Any:
    """Make the tensors that a spec describes; only the whole of it may name code, which `Adapter.imports` guards."""
    return _call(spec, batch) if isinstance(spec, str) else _build(spec, batch)


def _build(spec: Any, batch: int) -> Any:
    """Make the tensors that lists and mappings describe, nested as they are."""
    if isinstance(spec, str):
        raise ValueError(
            f"model.adapter.example: {spec} stands where a shape is expected, such as [3, 64, 64]; the path of a "
            "function may only be the whole example"
        )
    if isinstance(spec, Tensor):
        return spec.repeat(-(-batch // len(spec)), *([1] * (spec.ndim - 1)))[:batch]
    if isinstance(spec, Mapping):
        if "shape" in spec and set(spec) <= LEAF_KEYS:
            return _draw(spec["shape"], batch, str(spec.get("dtype", "float32")), int(spec.get("high", DEFAULT_HIGH)))
        return {str(name): _build(inner, batch) for name, inner in spec.items()}
    if isinstance(spec, Sequence) and all(isinstance(size, int) for size in spec):
        return _draw(spec, batch, "float32", DEFAULT_HIGH)
    if isinstance(spec, Sequence):
        return [_build(inner, batch) for inner in spec]
    return spec


def _draw(shape: Sequence[int], batch: int, dtype: str, high: int) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"model.adapter.example: {dtype} is no dtype; int64 is one")
    generator = torch.Generator().manual_seed(0)
    size = (batch, *shape)
    if kind.is_floating_point:
        return torch.randn(size, generator=generator, device="cpu").to(kind)
    return torch.randint(0, high, size, generator=generator, device="cpu").to(kind)


def _call(path: str, batch: int) -> Any:
    """Call the user's own function."""
    try:
        function = resolve_name(path)
        takes = len(inspect.signature(function).parameters)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"model.adapter.example: {path} cannot be imported and called ({error}); name a function of the batch size"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(batch) if takes else function()
