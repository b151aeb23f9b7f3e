"""A model's forward pass: its operators, the shapes that flow between them, and the calls of its modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hawada.adapters.graph.example import describe_forward
from hawada.core.structure import Inputs, all_tensors


@dataclass(eq=False, repr=False)
class Value:
    """A tensor that flows through the forward pass.

    Attributes:
        shape: Its shape.
        op: The operator that made it; None for what was there before, or made by code that no operator shows.
        name: The name of the parameter or buffer that it is, or "".
        constant: Whether it depends on parameters and buffers alone.
        users: The operators that take it, in order.
    """

    shape: tuple[int, ...]
    op: Op | None = None
    name: str = ""
    constant: bool = False
    users: list[Op] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Op:
    """One operator that the forward pass runs.

    Attributes:
        index: The number of operators before it.
        name: The name of the operator (`convolution`), without that of its overload or the mark of an in-place one.
        func: The operator itself.
        args: Its arguments, with a `Value` for every tensor.
        kwargs: Its keyword arguments, likewise.
        outputs: The tensors that it makes.
        calls: The calls of modules that it runs in, outer ones first.
    """

    index: int
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    calls: tuple[Call, ...]

    @property
    def inputs(self) -> list[Value]:
        """The tensors among its arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def output(self) -> Value:
        """The first of its outputs."""
        return self.outputs[0]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or else by its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def place(self) -> str:
        """The innermost module that it runs in and its name, for messages."""
        path = self.calls[-1].path if self.calls else ""
        return f"{path or 'the model'} ({self.name})"


@dataclass(eq=False, repr=False)
class Call:
    """One call of a module.

    Attributes:
        path: The path of the module; "" is the whole model.
        index: The number of calls that began before it.
        start: The number of operators before it.
        inputs: The tensors among its arguments.
        first: The tensor that is its first positional argument; None where that is something else.
        end: The number of operators before its end.
        output: Its result; None unless that is one tensor.
        leaf: Whether no other module is called within it.
    """

    path: str
    index: int
    start: int
    inputs: tuple[Value, ...]
    first: Value | None
    end: int = -1
    output: Value | None = None
    leaf: bool = True

    @property
    def alone(self) -> bool:
        """Whether it takes one tensor, as the first argument, and returns one."""
        return len(self.inputs) == 1 and self.first is self.inputs[0] and self.output is not None

    def holds(self, other: Call) -> bool:
        """Return whether the other call happens within this one."""
        return self.index < other.index and other.end <= self.end and other.start >= self.start

    def __contains__(self, op: Op | None) -> bool:
        return op is not None and self.start <= op.index < self.end


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass in eval mode.

    Attributes:
        model: A copy of the model whose parameters are on the meta device and so have no values.
        ops: The operators in order of execution.
        calls: The calls of modules, in the order in which they begin, outer ones first.
        tensors: The parameters and buffers, each under the first of its names.
        inputs: The tensors that the model is called with.
        outputs: The tensors that it returns.
        given: What the model is called with, on the meta device.
        result: What it returns.
        error: Why the pass was broken off, or None.
    """

    model: nn.Module
    ops: list[Op]
    calls: list[Call]
    tensors: dict[str, Value]
    inputs: list[Value]
    outputs: list[Value]
    given: tuple[Any, ...]
    result: Any = None
    error: Exception | None = None

    def once(self) -> list[Call]:
        """List the calls of modules that are called exactly once, without that of the whole model."""
        paths = [call.path for call in self.calls]
        return [call for call in self.calls if call.path and paths.count(call.path) == 1]

    def module(self, call: Call) -> nn.Module:
        """Return the module that is called."""
        return self.model.get_submodule(call.path)


class _Enough(BaseException):
    """Ends a forward pass of which no more is to be seen; no code that catches errors catches it."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate what subclassing calls
    """Writes down every operator that runs while it is active, and through hooks every call of a module."""

    def __init__(self, model: nn.Module, limit: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.limit = limit
        self.unseen = 0  # the modules around whose operators are not written down one by one
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.tensors: dict[str, Value] = {}
        self.values: dict[int, Value] = {}
        self._alive: list[Any] = []  # an id means a tensor only as long as the tensor lives
        for name, tensor in all_tensors(model).items():
            if id(tensor) not in self.values:
                self.tensors[name] = self._remember(tensor, Value(tuple(tensor.shape), name=name, constant=True))
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._begins(path), with_kwargs=True)
            module.register_forward_hook(self._ends, with_kwargs=True)

    def value(self, tensor: Tensor) -> Value:
        """Return the value that a tensor holds now; one that no operator made becomes known."""
        known = self.values.get(id(tensor))
        return known or self._remember(tensor, Value(tuple(tensor.shape), constant=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.limit is not None and len(self.ops) >= self.limit:
            raise _Enough
        with torch._C.DisableTorchFunction():  # the default device was filled in already
            result = func(*args, **kwargs)
        if not self.unseen:
            self._write(_name_of(func), func, args, kwargs, result)
        return result

    def _write(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Write down an operator that has run."""
        given = pytree.tree_map_only(Tensor, self.value, (args, kwargs))
        op = Op(len(self.ops), name, func, tuple(given[0]), given[1], (), tuple(self.stack))
        constant = all(value.constant for value in op.inputs)
        for value in op.inputs:
            value.users.append(op)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        outputs = [Value(tuple(tensor.shape), op, constant=constant) for tensor in made]
        for tensor, value in zip(made, outputs, strict=True):
            self._remember(tensor, value)  # an in-place operator makes a new value of an old tensor
        op.outputs = tuple(outputs)
        self.ops.append(op)

    def _remember(self, tensor: Tensor, value: Value) -> Value:
        self.values[id(tensor)] = value
        self._alive.append(tensor)
        return value

    def _begins(self, path: str) -> Any:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            first = self.value(args[0]) if args and isinstance(args[0], Tensor) else None
            inputs = tuple(self.value(tensor) for tensor in given)
            if self.stack:
                self.stack[-1].leaf = False
            call = Call(path, len(self.calls), len(self.ops), inputs, first)
            self.calls.append(call)
            self.stack.append(call)
            self.unseen += isinstance(module, nn.RNNBase)

        return begin

    def _ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, nn.RNNBase):  # which would be many operators for every step of the sequence
            self.unseen -= 1
            self._write(type(module).__name__, None, (*args, *module.parameters()), kwargs, output)
        call = self.stack.pop()
        call.end = len(self.ops)
        call.output = self.value(output) if isinstance(output, Tensor) else None


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Follow a forward pass without computing it; the model may be on any device and is not changed.

    Raises:
        ValueError: The pass depends on the values of tensors, does not fit the inputs, skips a module with parameters
            or returns no tensor; the message names the place.
    """
    bare = _without_values(model)
    # A pass may leave something behind, such as a cache of positions.
    found = replace(record(copy.deepcopy(bare), inputs), model=bare)
    name = type(model).__name__
    if found.error is not None:
        shapes = ", ".join(str(tuple(x.shape)) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
        place, reason = _innermost_line(found.error), _first_line_of(found.error)
        if "meta" in reason.lower():
            raise ValueError(
                f"{name}: {place} depends on the values of tensors ({reason}); write forward without branches or loops "
                "that do"
            ) from found.error
        remedy = (
            "set model.adapter.image_size and model.adapter.channels to what the model takes; the size may be [height, "
            "width], [length] of a sequence or [frames, height, width] of a video"
        )
        if isinstance(found.error, TypeError | IndexError | KeyError | AttributeError):  # it wants something else
            remedy = (
                f"set model.adapter.example to what forward takes, as in '{describe_forward(model)}': shapes without "
                "the batch, nested where a parameter is a dictionary or a list"
            )
        raise ValueError(
            f"{name}: the forward pass fails on an input of shape {shapes} at {place} ({reason}); {remedy}"
        ) from found.error
    if not found.outputs:
        raise ValueError(
            f"{name}: forward returns a {type(found.result).__name__} in which no tensor is found; let it return "
            "tensors, or tuples, lists or dictionaries of them"
        )
    _check_complete(found)
    return found


def record(model: nn.Module, inputs: Inputs, limit: int | None = None) -> Trace:
    """Run a model once without computing anything and write down what it does, up to where it fails.

    Args:
        model: The model on the meta device, in eval mode; it cannot be used afterwards, since the hooks stay on it.
        inputs: What it is called with, on any device.
        limit: The number of operators after which the pass is ended; None lets it run to its end.
    """
    given = pytree.tree_map_only(Tensor, lambda x: x.to("meta", copy=True), tuple(inputs))
    recorder = _Recorder(model, limit)
    known = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    entering = [recorder._remember(tensor, Value(tuple(tensor.shape))) for tensor in known]
    error: Exception | None = None
    result: Any = ()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole block would hide its parts
    try:
        # What the pass makes has no values either; past the limit there is nothing more to see.
        with suppress(_Enough), torch.no_grad(), torch.device("meta"), recorder:
            result = model(*given)
    except Exception as raised:  # a forward pass may raise anything
        error = raised
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    returned = [recorder.value(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return Trace(model, recorder.ops, recorder.calls, recorder.tensors, entering, returned, given, result, error)


def _without_values(model: nn.Module) -> nn.Module:
    """Copy a model with every parameter and buffer on the meta device; the copy shares nothing and copies no values."""
    valueless: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
    valueless |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    bare = copy.deepcopy(model, valueless).eval()
    for module in bare.modules():
        for name, plain in vars(module).items():  # tensors that were never registered
            if isinstance(plain, Tensor):
                setattr(module, name, plain.to("meta"))
    return bare


def _name_of(func: Any) -> str:
    name = str(func.name()).partition("::")[2].partition(".")[0]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _check_complete(found: Trace) -> None:
    """Refuse a module that eval mode skips: it would keep its old width and fail when the slim model trains."""
    used = {name for name, value in found.tensors.items() if value.users}
    called = {call.path for call in found.calls}
    names = {id(tensor): name for name, tensor in reversed(all_tensors(found.model).items())}
    for path, module in found.model.named_modules():
        own = [names[id(parameter)] for parameter in module._parameters.values() if parameter is not None]
        if own and path and path not in called and not used.intersection(own) and not module._buffers:
            raise ValueError(_skipped(path))
        if own and path and not used.intersection(own) and isinstance(module, nn.modules.batchnorm._NormBase):
            raise ValueError(_skipped(path))


def _skipped(path: str) -> str:
    return (
        f"{path}: never called in eval mode, so its channels would no longer fit; build the model without it "
        "(model.adapter.arguments, for example aux_logits: false)"
    )


def _first_line_of(error: Exception) -> str:
    """Return the first line of an exception's text, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")


def _innermost_line(error: BaseException) -> str:
    """Name the innermost line of a forward pass that an error went through."""
    place, step = "forward", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            place = f"{code.co_qualname} (line {step.tb_lineno})"
        step = step.tb_next
    return place
