"""Residual blocks, which are recognised by their structure, and the parts of each that stay when its branch goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from hawada.adapters.graph.operators import SUM_FUNCTIONS, is_type, never_negative, operator_name
from hawada.adapters.graph.trace import VALUE_META_KEY, Call, Trace

IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, StochasticDepth)  # they return their input in eval mode
RELU_MODULES = (nn.ReLU,)


@dataclass(frozen=True)
class Residual:
    """A block that computes after(x + branch(x)) or after(shortcut(x) + branch(x)).

    Attributes:
        call: The call of the block's module.
        gate: The path of the module whose output is the branch's output.
        keeps: The names of the children that stay when the branch goes.
        shortcut: The name of the child on the shortcut, or "" where the shortcut is the input itself.
    """

    call: Call
    gate: str
    keeps: tuple[str, ...]
    shortcut: str

    @property
    def path(self) -> str:
        """The path of the block's module."""
        return self.call.path

    def holds(self, module: str) -> bool:
        """Return whether the module at this path goes with the branch."""
        if not module.startswith(f"{self.path}."):
            return False
        return not any(
            f"{module}.".startswith(f"{self.path}.{child}.") for child in (*self.keeps, self.shortcut) if child
        )


def find_residuals(trace: Trace) -> list[Residual]:
    """Find the blocks whose branch can be removed exactly, in order of execution, outer ones first."""
    calls = trace.once()
    position = {node: index for index, node in enumerate(trace.nodes)}
    found = [_residual(trace, call, calls, position) for call in calls if not call.leaf and len(call.inputs) == 1]
    return [block for block in found if block is not None]


def _residual(trace: Trace, call: Call, calls: Sequence[Call], position: dict[fx.Node, int]) -> Residual | None:
    given, node = call.inputs[0], call.output
    children = [c for c in trace.calls if c.path.rpartition(".")[0] == call.path and call.holds(c)]
    if node is None or not _is_closed(trace, call, position):
        return None
    after: list[tuple[str, fx.Node]] = []  # the steps after the sum; functions have no name
    while position[node] in call and operator_name(node) not in SUM_FUNCTIONS:
        child = next((c for c in children if c.output is node and len(c.inputs) == 1 and c.inputs[0] is not node), None)
        if child is None and (operator_name(node) != "relu" or len(node.all_input_nodes) != 1):
            return None
        after.insert(0, (child.path.rpartition(".")[2] if child else "", node))
        node = child.inputs[0] if child else node.all_input_nodes[0]
    if position[node] not in call or operator_name(node) == "sub":
        return None
    if any(call.holds(inner) and position[node] in inner for inner in trace.calls):
        return None  # an inner module is the block
    ways = _ways(node, given, children)
    if ways is None:
        return None
    shortcut, branch = ways
    gate = _gated(branch, calls, call, trace.model)
    if gate is None:
        return None
    stays = given if shortcut is None else shortcut.output
    assert stays is not None
    if after and _is_relu(after[0][1], trace.model) and never_negative(stays, trace.model):
        after = after[1:]  # relu(x) = x where x is not negative
    if any(not name for name, _ in after):
        return None  # a function after the sum would go with the block
    name = "" if shortcut is None else shortcut.path.rpartition(".")[2]
    keeps = tuple(part for part in (name, *(child for child, _ in after)) if part)
    return Residual(call, gate, keeps, name)


def _is_closed(trace: Trace, call: Call, position: dict[fx.Node, int]) -> bool:
    """Return whether the block takes nothing but its input and hands on nothing but its output."""
    inside = set(trace.nodes[call.start : call.end])
    for node in inside:
        if any(other not in inside and other is not call.inputs[0] for other in node.all_input_nodes):
            return False
        if node is not call.output and any(user not in inside for user in node.users):
            return False
    return call.output in inside


def _ways(node: fx.Node, given: fx.Node, children: Sequence[Call]) -> tuple[Call | None, fx.Node] | None:
    """Tell a sum's operands apart: the child on the shortcut (None for the input itself), the branch's last node."""
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if len(node.args) != 2 or node.kwargs or len(operands) != 2 or operands[0] is operands[1]:
        return None
    shapes = {
        tuple(operand.meta[VALUE_META_KEY].shape)
        for operand in operands
        if isinstance(operand.meta[VALUE_META_KEY], Tensor)
    }
    if shapes != {tuple(node.meta[VALUE_META_KEY].shape)}:
        return None
    for shortcut, branch in (operands, operands[::-1]):
        if shortcut is given:
            return None, branch
    found = []
    for shortcut, branch in (operands, operands[::-1]):
        child = next((c for c in children if c.output is shortcut and c.inputs == (given,)), None)
        if child is not None:
            found.append((child, branch))
    if len(found) == 2:  # where both are children, the projection is the shorter one
        lengths = [child.end - child.start for child, _ in found]
        if lengths[0] == lengths[1]:
            return None
        return found[lengths.index(min(lengths))]
    return found[0] if found else None


def _gated(branch: fx.Node, calls: Sequence[Call], block: Call, model: nn.Module) -> str | None:
    """Find the module that a branch ends with, before modules that do nothing in eval mode."""
    ends = [c for c in calls if c.output is branch and block.holds(c)]
    inner = ends[-1] if ends else None
    while inner is not None and is_identity(model.get_submodule(inner.path)) and len(inner.inputs[0].users) == 1:
        before = [c for c in calls if c.output is inner.inputs[0] and block.holds(c)]
        if not before:
            break
        inner = before[-1]
    return None if inner is None else inner.path


def is_identity(module: nn.Module) -> bool:
    """Return whether a module returns its input unchanged in eval mode."""
    return isinstance(module, StochasticDepth) or is_type(module, IDENTITY_MODULES)


def _is_relu(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return is_type(model.get_submodule(str(node.target)), RELU_MODULES)
    return operator_name(node) == "relu"
