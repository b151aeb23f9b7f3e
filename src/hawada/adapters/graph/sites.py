"""Sites: the modules of a traced model that the latency table times."""

from __future__ import annotations

from collections.abc import Sequence

from hawada.adapters.graph.declaration import MAX_GROUPS_PER_SITE, Declaration
from hawada.adapters.graph.labels import axes_of
from hawada.adapters.graph.residual import Residual
from hawada.adapters.graph.trace import Call, Trace
from hawada.core.structure import Site


def find_sites(trace: Trace, declared: Declaration) -> list[Site]:
    """Choose the sites, in order of execution.

    They are the residual blocks and, elsewhere, the largest modules that few groups touch, down to single layers.
    """
    blocks = {block.call: block for block in declared.residuals}
    chosen: list[tuple[Call, Site]] = []
    for call in _candidates(trace):
        if any(outer.holds(call) for outer, _ in chosen):
            continue
        if call not in blocks and any(call.holds(block) for block in blocks):
            continue
        site = _site(trace, declared, call, list(blocks.values()))
        if site is not None and (call in blocks or call.leaf or len(site.groups) <= MAX_GROUPS_PER_SITE):
            chosen.append((call, site))
    return [site for _, site in chosen]


def _candidates(trace: Trace) -> list[Call]:
    """List the calls that take and return one tensor; a layer that is called again is timed once."""
    once, seen, found = set(trace.once()), set(), []
    for call in trace.calls:
        layer = call.leaf and any(True for _ in trace.module(call).parameters())
        if not call.path or not call.alone or call.output in call.inputs or call.path in seen:
            continue
        if call in once or layer:
            seen.add(call.path)
            found.append(call)
    return found


def _site(trace: Trace, declared: Declaration, call: Call, blocks: Sequence[Residual]) -> Site | None:
    """Make the site of one call; None where no group touches it or its input cannot be cut to fit."""
    within = [block for block in blocks if block.call is call or call.holds(block.call)]
    names = {f"{block.path}.branch" for block in within}
    values = [call.inputs[0], *(value for op in trace.ops[call.start : call.end] for value in op.outputs)]
    for value in values:
        for field in declared.walk.fields(value):
            names |= set(declared.groups_on(field))
    if not names:
        return None
    touching = tuple(group.name for group in declared.groups if group.name in names)
    kind = _kind_of_site(call, blocks)
    entering = [(field, read) for field in declared.walk.fields(call.inputs[0]) if (read := declared.groups_on(field))]
    if not entering:
        return Site(call.path, touching, kind)
    field, read = entering[0]
    each = set(read.values())
    if len(entering) > 1 or len(each) > 1 or len(axes_of(field)) > 1:
        return None
    reads = next(iter(read)) if len(read) == 1 else tuple(read)
    return Site(call.path, touching, kind, reads, axes_of(field)[0], each.pop())


def _kind_of_site(call: Call, blocks: Sequence[Residual]) -> str:
    """Name the kind of a site; sites of one kind share a scale.

    A stage is one kind, and so is everything before all residual blocks (the stem) and after them (the head).
    """
    if blocks and call.end <= min(block.call.start for block in blocks):
        return "stem"
    if blocks and call.start >= max(block.call.end for block in blocks):
        return "head"
    return call.path.partition(".")[0]
