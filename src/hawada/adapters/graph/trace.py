"""A model's forward pass as a graph: the calls of its modules, and the shapes that flow between them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import StochasticDepth

from hawada.core.structure import Inputs

LEAF_MODULES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    _NormBase,
    StochasticDepth,
)  # and their subclasses: their calls stay single nodes, which the adapter understands by class
VALUE_META_KEY = "value"  # under this key a node's meta holds its value, with tensors on the meta device


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: The path of the module.
        inputs: The nodes of the tensors among its arguments.
        output: The node of its result; None unless it is called with one tensor alone and returns one.
        index: The number of calls that began before it.
        start: The number of nodes before its first one.
        end: The number of nodes up to and with its last one.
        leaf: Whether the graph does not look inside the module.
    """

    path: str
    inputs: tuple[fx.Node, ...]
    output: fx.Node | None
    index: int
    start: int
    end: int
    leaf: bool

    def holds(self, other: Call) -> bool:
        """Return whether the other call happens within this one."""
        return self.index < other.index and other.end <= self.end

    def __contains__(self, index: int) -> bool:
        return self.start <= index < self.end


@dataclass(frozen=True)
class Trace:
    """One forward pass in eval mode.

    Attributes:
        model: A copy of the model whose parameters are on the meta device and so have no values.
        nodes: The nodes in order of execution; `node.meta["value"]` is the value of each.
        calls: The calls of modules, in the order in which they begin, outer ones first.
    """

    model: nn.Module
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]

    def once(self) -> list[Call]:
        """List the calls of modules that are called exactly once, without that of the whole model."""
        paths = [call.path for call in self.calls]
        return [call for call in self.calls if call.path and paths.count(call.path) == 1]


class _Tracer(fx.Tracer):
    """A tracer that records where each module's call begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.calls: list[Call] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAF_MODULES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path, start, index = self.path_of_module(m), len(self.graph.nodes), self.begun
        self.begun += 1
        output = super().call_module(m, forward, args, kwargs)
        given = (*args, *kwargs.values())
        one = isinstance(output, fx.Proxy) and len(args) == 1 and isinstance(args[0], fx.Proxy) and not kwargs
        call = Call(
            path=path,
            inputs=tuple(arg.node for arg in given if isinstance(arg, fx.Proxy)),
            output=output.node if one else None,
            index=index,
            start=start,
            end=len(self.graph.nodes),
            leaf=self.is_leaf_module(m, path),
        )
        self.calls.append(call)
        return output


class _Evaluator(fx.Interpreter):
    """An interpreter that stores the value of every node in its meta."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta[VALUE_META_KEY] = super().run_node(n)
        return n.meta[VALUE_META_KEY]


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Follow a forward pass without computing it; the model may be on any device and is not changed.

    Raises:
        ValueError: The pass depends on data, does not fit the inputs, skips a module with parameters or returns
            something other than one tensor; the message names the place.
    """
    valueless: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    valueless |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    model = copy.deepcopy(model, valueless).eval()  # the copy shares nothing and copies no values
    tracer = _Tracer()
    name = type(model).__name__
    try:
        graph = tracer.trace(model, _optional_arguments(model))
    except Exception as error:  # a forward pass may do anything with a stand-in for a tensor
        raise ValueError(
            f"{name}: torch.fx cannot follow {_innermost_line(error)} ({_first_line_of(error)}); "
            "write forward without branches or loops that depend on the values or shapes of tensors"
        ) from error
    try:
        _Evaluator(fx.GraphModule(tracer.root, graph)).run(*(x.to("meta") for x in inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(
            f"{name}: the forward pass fails on an input of shape {shapes} ({_first_line_of(error)}); "
            "set model.adapter.image_size and model.adapter.channels to what the model takes"
        ) from error
    nodes = tuple(graph.nodes)
    returned = nodes[-1].meta[VALUE_META_KEY]
    if not isinstance(returned, Tensor):
        raise ValueError(
            f"{name}: output returns {nodes[-1].args[0]} and not one tensor, the logits; wrap the model in a module "
            "that picks them"
        )
    found = Trace(model, nodes, tuple(sorted(tracer.calls, key=lambda call: call.index)))
    _check_complete(found)
    return found


def _optional_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the default values of the optional arguments, so that branches on a flag can be followed."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}


def _check_complete(found: Trace) -> None:
    """Refuse a module that eval mode skips: it would keep its old width and fail when the slim model trains."""
    called = {call.path for call in found.calls}
    read = {str(node.target).rpartition(".")[0] for node in found.nodes if node.op == "get_attr"}
    aliases: dict[int, list[str]] = {}
    for path, module in found.model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(path)
    for paths in aliases.values():
        if not paths[0] or not found.model.get_submodule(paths[0])._parameters:
            continue
        inside_leaf = any(f"{path}.".startswith(f"{c.path}.") for path in paths for c in found.calls if c.leaf)
        if not called.intersection(paths) and not read.intersection(paths) and not inside_leaf:
            raise ValueError(
                f"{paths[0]}: never called in eval mode, so its channels would no longer fit; build the model without "
                "it (model.adapter.arguments, for example aux_logits: false)"
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
