"""A model's forward pass as a graph: which modules are called with what, and the shapes that flow between them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import StochasticDepth

from hawada.core.structure import Inputs

LEAVES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    _NormBase,
    StochasticDepth,
)  # subclasses too: their code is ours to read
VALUE = "value"  # of a node's meta: what it evaluates to, tensors on the meta device


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: of the module.
        inputs: the tensors among its arguments.
        output: the node of what it returns; None unless it is called with one tensor alone and returns one.
        index: how many calls began before it.
        start: how many nodes came before it.
        end: how many came before whatever follows.
        leaf: whether the graph knows nothing of its inside.
    """

    path: str
    inputs: tuple[fx.Node, ...]
    output: fx.Node | None
    index: int
    start: int
    end: int
    leaf: bool

    def holds(self, other: Call) -> bool:
        """Whether the other call happens within this one."""
        return self.index < other.index and other.end <= self.end

    def __contains__(self, index: int) -> bool:
        return self.start <= index < self.end


@dataclass(frozen=True)
class Trace:
    """One forward pass in eval mode.

    Attributes:
        model: what ran, without numbers: its parameters are on the meta device.
        nodes: in order of execution; `node.meta["value"]` is what each evaluates to.
        calls: of modules, in the order in which they begin, outer ones first.
    """

    model: nn.Module
    nodes: tuple[fx.Node, ...]
    calls: tuple[Call, ...]

    def once(self) -> list[Call]:
        """Calls of the modules that are called exactly once, the whole model left out."""
        paths = [call.path for call in self.calls]
        return [call for call in self.calls if call.path and paths.count(call.path) == 1]


class _Tracer(fx.Tracer):
    """Notes where each module's call begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = 0
        self.calls: list[Call] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

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
    """Notes what every node evaluates to."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta[VALUE] = super().run_node(n)
        return n.meta[VALUE]


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Follow a forward pass without computing it; the model may be on any device and is not changed.

    Raises:
        ValueError: naming the place, when the pass depends on data, does not fit the inputs, skips a module with
            parameters or returns something else than one tensor.
    """
    numberless: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    numberless |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    model = copy.deepcopy(model, numberless).eval()  # shares nothing, copies no numbers
    tracer = _Tracer()
    name = type(model).__name__
    try:
        graph = tracer.trace(model, _defaults(model))
    except Exception as error:  # whatever a forward pass does with a stand-in for a tensor
        raise ValueError(
            f"{name}: torch.fx cannot follow {_place(error)} ({_first_line(error)}); "
            "write forward without branches or loops that depend on the values or shapes of tensors"
        ) from error
    try:
        _Evaluator(fx.GraphModule(tracer.root, graph)).run(*(x.to("meta") for x in inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(
            f"{name}: the forward pass fails on an input of shape {shapes} ({_first_line(error)}); "
            "set model.adapter.image_size and model.adapter.channels to what the model takes"
        ) from error
    nodes = tuple(graph.nodes)
    returned = nodes[-1].meta[VALUE]
    if not isinstance(returned, Tensor):
        raise ValueError(
            f"{name}: output returns {nodes[-1].args[0]} and not one tensor, the logits; wrap the model in a module "
            "that picks them"
        )
    found = Trace(model, nodes, tuple(sorted(tracer.calls, key=lambda call: call.index)))
    _check_complete(found)
    return found


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Values of the optional arguments, so that branches on a flag can be followed."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}


def _check_complete(found: Trace) -> None:
    """A module that eval mode skips would keep its old width and fail when the slim model trains."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")


def _place(error: BaseException) -> str:
    """The innermost line of a forward pass that an error went through."""
    place, step = "forward", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            place = f"{code.co_qualname} (line {step.tb_lineno})"
        step = step.tb_next
    return place
