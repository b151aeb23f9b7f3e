"""Residual blocks, which are recognised by their structure, and the parts of each that stay when its branches go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hawada.adapters.graph.rules.views import VIEWS
from hawada.adapters.graph.trace import Call, Op, Trace, Value

ZERO_KEEPING = {*VIEWS.table, "clone", "mul", "div", "_to_copy", "alias"} - {
    "cat",
    "concat",
    "stack",
    "embedding",
    "constant_pad_nd",
    "pad",
    "scatter",
    "index_put",
    "copy",
}
NON_NEGATIVE = {"relu", "sigmoid", "hardsigmoid", "softplus", "exp", "_softmax", "square", "abs"}
SIGN_KEEPING = {*VIEWS.table, "clone", "add", "mul", "mean", "amax", "max_pool2d_with_indices", "max_pool2d",
                "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "alias"}  # fmt: skip


@dataclass(frozen=True)
class Residual:
    """A block that computes after(x + branch(x) + …) or after(shortcut(x) + branch(x)).

    Attributes:
        call: The call of the block's module.
        gates: The paths of the modules with whose outputs the branches end.
        keeps: The names of the children that stay when the branches go.
        shortcut: The name of the child on the shortcut, or "" where the shortcut is the input itself.
    """

    call: Call
    gates: tuple[str, ...]
    keeps: tuple[str, ...]
    shortcut: str

    @property
    def path(self) -> str:
        """The path of the block's module."""
        return self.call.path

    def holds(self, module: str) -> bool:
        """Return whether the module at this path goes with the branches."""
        if not module.startswith(f"{self.path}."):
            return False
        return not any(
            f"{module}.".startswith(f"{self.path}.{child}.") for child in (*self.keeps, self.shortcut) if child
        )


def find_residuals(trace: Trace) -> list[Residual]:
    """Find the blocks whose branches can be removed exactly, in order of execution, outer ones first."""
    calls = trace.once()
    found = [_residual(trace, call, calls) for call in calls if not call.leaf and call.alone]
    return [block for block in found if block is not None]


def _residual(trace: Trace, call: Call, calls: Sequence[Call]) -> Residual | None:
    given, value = call.inputs[0], call.output
    children = [c for c in trace.calls if c.path.rpartition(".")[0] == call.path and call.holds(c)]
    if value is None or value is given or not _is_closed(trace, call):
        return None
    after: list[tuple[str, Op]] = []  # the steps after the sum; functions have no name
    while (op := value.op) in call and op is not None and not _is_sum(op):
        child = next((c for c in children if c.output is value and c.alone and c.inputs[0] is not value), None)
        if child is None and (op.name != "relu" or len(op.inputs) != 1):
            return None
        after.insert(0, (child.path.rpartition(".")[2] if child else "", op))
        value = child.inputs[0] if child else op.inputs[0]
    if op is None or op not in call or any(call.holds(inner) and op in inner for inner in trace.calls):
        return None  # an inner module is the block
    ways = _ways(value, given, children, call)
    if ways is None:
        return None
    shortcut, branches = ways
    gates = [_gated(branch, calls, call) for branch in branches]
    if not gates or not all(gates) or len(set(gates)) < len(gates):
        return None
    kept = given if shortcut is None else shortcut.output
    assert kept is not None
    if after and after[0][1].name == "relu" and never_negative(kept):
        after = after[1:]  # relu(x) = x where x is not negative
    if any(not name for name, _ in after):
        return None  # a function after the sum would go with the block
    name = "" if shortcut is None else shortcut.path.rpartition(".")[2]
    keeps = tuple(part for part in (name, *(child for child, _ in after)) if part)
    return Residual(call, tuple(gate for gate in gates if gate), keeps, name)


def _is_sum(op: Op) -> bool:
    return op.name == "add" and len(op.args) == 2 and not op.kwargs and len(op.inputs) == 2


def _is_closed(trace: Trace, call: Call) -> bool:
    """Return whether the block takes nothing but its input and hands on nothing but its output."""
    given = call.inputs[0]
    for op in trace.ops[call.start : call.end]:
        if any(value is not given and not value.constant and value.op not in call for value in op.inputs):
            return False
        for value in op.outputs:
            if value is not call.output and any(user not in call for user in value.users):
                return False
    return call.output is not None and call.output.op in call


def _ways(value: Value, given: Value, children: Sequence[Call], call: Call) -> tuple[Call | None, list[Value]] | None:
    """Tell the operands of a sum apart: the child on the shortcut (None for the input itself), the branches' ends."""
    op = value.op
    if op is None or op not in call or not _is_sum(op):
        return None
    one, other = op.inputs
    if one is other or one.shape != value.shape or other.shape != value.shape:
        return None
    for stays, branch in ((one, other), (other, one)):
        if stays is given:
            return None, [branch]
    for stays, branch in ((one, other), (other, one)):
        before = _ways(stays, given, children, call)
        if before is not None and before[0] is None:
            return None, [*before[1], branch]
    found = []
    for stays, branch in ((one, other), (other, one)):
        child = next((c for c in children if c.output is stays and c.inputs == (given,)), None)
        if child is not None:
            found.append((child, branch))
    if len(found) == 2:  # where both are children, the projection is the shorter one
        lengths = [child.end - child.start for child, _ in found]
        if lengths[0] == lengths[1]:
            return None
        child, branch = found[lengths.index(min(lengths))]
        return child, [branch]
    return (found[0][0], [found[0][1]]) if found else None


def _gated(branch: Value, calls: Sequence[Call], block: Call) -> str | None:
    """Find the module that a branch ends with, before operators that make nothing of zeros but zeros."""
    while True:
        ends = [c for c in calls if c.output is branch and block.holds(c) and branch not in c.inputs]
        if ends:
            return ends[-1].path
        op = branch.op
        if op is None or op not in block or op.name not in ZERO_KEEPING:
            return None
        moving = [value for value in op.inputs if not value.constant]
        if len(moving) != 1 or (op.name == "div" and op.inputs[0] is not moving[0]):
            return None
        branch = moving[0]


def never_negative(value: Value) -> bool:
    """Return whether no element of a value can be below zero."""
    op = value.op
    if op is None:
        return False
    if op.name in NON_NEGATIVE or (op.name == "hardtanh" and op.argument(1, "min_val", -1) >= 0):
        return True
    if op.name in ("clamp", "clamp_min") and isinstance(least := op.argument(1, "min"), int | float) and least >= 0:
        return True
    numbers = [arg for arg in (*op.args, *op.kwargs.values()) if isinstance(arg, int | float)]
    if op.name in ("add", "mul", "constant_pad_nd") and any(number < 0 for number in numbers):
        return False
    return op.name in SIGN_KEEPING and bool(op.inputs) and all(never_negative(given) for given in op.inputs)
