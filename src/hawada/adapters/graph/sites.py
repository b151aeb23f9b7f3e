"""Which modules of a traced model the latency table times."""

from __future__ import annotations

from collections.abc import Sequence

from hawada.adapters.graph.axes import Axis
from hawada.adapters.graph.declaration import MOST_JOINED, Declaration
from hawada.adapters.graph.residual import Residual, is_nothing
from hawada.adapters.graph.trace import Call, Trace
from hawada.core.structure import Site


def find_sites(trace: Trace, declared: Declaration) -> list[Site]:
    """Residual blocks; elsewhere the largest modules that few groups touch, down to single layers; in order."""
    blocks = {block.call: block for block in declared.residuals}
    chosen: list[tuple[Call, Site]] = []
    for call in _candidates(trace):
        if any(outer.holds(call) for outer, _ in chosen):
            continue
        if call not in blocks and any(call.holds(block) for block in blocks):
            continue
        site = _site(trace, declared, call, list(blocks.values()))
        if site is not None and (call in blocks or call.leaf or len(site.groups) <= MOST_JOINED):
            chosen.append((call, site))
    return [site for _, site in chosen]


def _candidates(trace: Trace) -> list[Call]:
    """Calls with one tensor in and out; a layer that is called again is timed once."""
    once, seen, found = set(trace.once()), set(), []
    for call in trace.calls:
        layer = call.leaf and any(True for _ in trace.model.get_submodule(call.path).parameters())
        nothing = call.leaf and is_nothing(trace.model.get_submodule(call.path))
        if len(call.inputs) != 1 or call.output is None or nothing or call.path in seen:
            continue
        if call in once or layer:
            seen.add(call.path)
            found.append(call)
    return found


def _site(trace: Trace, declared: Declaration, call: Call, blocks: Sequence[Residual]) -> Site | None:
    """The site of one call; None where no group touches it or its input cannot be made to fit."""
    within = [block for block in blocks if block.call is call or call.holds(block.call)]
    names = {f"{block.path}.branch" for block in within}
    axes = [declared.coupling.axes[node] for node in (call.inputs[0], *trace.nodes[call.start : call.end])]
    for axis in axes:
        names |= set(declared.groups_on(axis))
    if not names:
        return None
    touching = tuple(group.name for group in declared.groups if group.name in names)
    given: Axis | None = axes[0]
    read = declared.groups_on(given)
    each = set(read.values())
    if len(each) > 1:
        return None
    kind = _kind(call, blocks)
    if given is None or not read:
        return Site(call.path, touching, kind)
    reads = next(iter(read)) if len(read) == 1 else tuple(read)
    return Site(call.path, touching, kind, reads, given.dim, each.pop())


def _kind(call: Call, blocks: Sequence[Residual]) -> str:
    """Sites of one kind share a scale: those of a stage, and what lies before and behind all residual blocks."""
    if blocks and call.end <= min(block.call.start for block in blocks):
        return "stem"
    if blocks and call.start >= max(block.call.end for block in blocks):
        return "head"
    return call.path.partition(".")[0]
