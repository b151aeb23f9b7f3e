"""The most value within a cost limit, where variables with a few options each are coupled by tables.

A knapsack with multiple choices, generalised: cost and value are sums of factors, and a factor may depend on several
variables (a site on every width that touches it). Variables that couple everything are conditioned on, the rest falls
apart into small pieces, and pieces are put together by dynamic programming over frontiers of (cost, value). Nemhauser
and Ullmann, 1969; Kellerer et al., Knapsack Problems, 2004; Dechter, Bucket elimination, 1999.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

JOINT = 4096  # options of a piece that are simply all tried
WORK = 4000  # pieces that are solved anew for each value of what is conditioned on; beyond it, coarse to fine
BINS = 4000  # resolution of the cost once there are more partial choices than this

Array = NDArray[np.float64]
Indices = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Factor:
    """A part of the cost and of the value.

    Attributes:
        variables: what it depends on, each once.
        cost: one axis per variable, as long as the variable has options.
        value: likewise.
    """

    variables: tuple[str, ...]
    cost: Array
    value: Array


@dataclass(frozen=True)
class Solution:
    """One option of every variable.

    Attributes:
        picks: index of the option, by variable.
        cost: what it costs.
        value: what it is worth.
    """

    picks: dict[str, int]
    cost: float
    value: float


@dataclass
class _Frontier:
    """Partial choices: `picks[i]` are the options of `variables` that cost `cost[i]` and are worth `value[i]`."""

    variables: list[str]
    picks: NDArray[np.int32]
    cost: Array
    value: Array

    def thinned(self, limit: float, bins: int = BINS) -> _Frontier:
        """What is left of it, see `_select`."""
        kept = _select(self.cost, self.value, limit, bins)
        return _Frontier(self.variables, self.picks[kept], self.cost[kept], self.value[kept])

    def plus(self, other: _Frontier, limit: float) -> _Frontier:
        """Every pair of partial choices of both, thinned."""
        cost = (self.cost[:, None] + other.cost[None, :]).reshape(-1)
        value = (self.value[:, None] + other.value[None, :]).reshape(-1)
        kept = _select(cost, value, limit)
        mine, others = kept // max(len(other.cost), 1), kept % max(len(other.cost), 1)
        picks = np.hstack([self.picks[mine], other.picks[others]])
        return _Frontier([*self.variables, *other.variables], picks, cost[kept], value[kept])


def _select(cost: Array, value: Array, limit: float, bins: int = BINS) -> NDArray[np.int64]:
    """Indices, of those within the limit, of the most valuable of every cost; of every step of it where too many."""
    fits = np.flatnonzero(cost <= limit)
    if not len(fits):
        return fits
    cost, value = cost[fits], value[fits]
    low, high = float(cost.min()), float(cost.max())
    steps = np.round((cost - low) / max(high - low, 1e-300), 12)
    if len(fits) > bins:
        steps = np.floor(steps * (bins - 1))
    order = np.lexsort((value, steps))  # by step, the most valuable last
    return fits[order[np.append(np.diff(steps[order]) != 0, True)]]


def solve(
    domains: Mapping[str, int],
    factors: Sequence[Factor],
    limit: float,
    wanted: float = 0.0,
    start: Indices | None = None,
) -> Solution | None:
    """The most valuable choice that costs at most `limit` and at least `wanted`; None when the limit is out of reach.

    Where nothing costs as much as `wanted`, the most valuable among those within a percent of the dearest that fits.
    Exact while frontiers stay below `BINS` and work below `WORK`.

    Args:
        domains: how many options each variable has.
        factors: what cost and value are sums of.
        limit: largest cost.
        wanted: smallest cost that is preferred.
        start: the options that may be taken, ascending; None means all.
    """
    full = {name: list((start or {}).get(name, range(count))) for name, count in domains.items()}
    conditioned = _conditioned(full, factors)
    allowed = dict(full)
    strides: dict[str, int] = {}
    while math.prod(len(allowed[name]) for name in conditioned) > WORK:
        widest = max(conditioned, key=lambda name: len(allowed[name]))
        strides[widest] = 2 * strides.get(widest, 1)
        allowed[widest] = sorted({*full[widest][:: -strides[widest]], full[widest][0]})
    found = _best(allowed, factors, limit, wanted)
    while strides and found is not None:
        strides = {name: stride // 2 for name, stride in strides.items() if stride > 1}
        for name, stride in strides.items():
            at = full[name].index(found.picks[name])
            allowed[name] = sorted({full[name][max(0, min(at + k * stride, len(full[name]) - 1))] for k in (-1, 0, 1)})
        found = _better(found, _best(allowed, factors, limit, wanted), wanted)
    return found


def _better(old: Solution, new: Solution | None, wanted: float) -> Solution:
    if new is None:
        return old
    return max(old, new, key=lambda solution: (min(solution.cost, wanted), solution.value))


def _best(allowed: Indices, factors: Sequence[Factor], limit: float, wanted: float) -> Solution | None:
    slack = limit * (1 + 1e-12)
    frontier = _solve_pieces(allowed, factors, {}, slack)
    if not len(frontier.cost):
        return None
    cost, value = frontier.cost, frontier.value
    good = cost >= wanted if (cost >= wanted).any() else cost >= cost.max() - 0.01 * abs(limit)
    last = int(np.flatnonzero(good)[np.argmax(value[good])])
    picks = dict(zip(frontier.variables, frontier.picks[last].tolist(), strict=True))
    return Solution(picks, float(cost[last]), float(value[last]))


def _solve_pieces(allowed: Indices, factors: Sequence[Factor], fixed: dict[str, int], limit: float) -> _Frontier:
    """The frontier of all variables that are not fixed: piece by piece, then put together."""
    free = [name for name in allowed if name not in fixed]
    pieces = _pieces(free, factors)
    constants = [factor for factor in factors if all(name in fixed for name in factor.variables)]
    cost = float(sum(factor.cost[tuple(fixed[name] for name in factor.variables)] for factor in constants))
    value = float(sum(factor.value[tuple(fixed[name] for name in factor.variables)] for factor in constants))
    result = _Frontier([], np.zeros((1, 0), dtype=np.int32), np.array([cost]), np.array([value]))
    solved = [_solve_piece({name: allowed[name] for name in piece}, factors, fixed, limit) for piece in pieces]
    left = [float(piece.cost.min()) if len(piece.cost) else math.inf for piece in solved]
    for index, piece in enumerate(solved):
        result = result.plus(piece, limit - sum(left[index + 1 :]))
    return result


def _solve_piece(allowed: Indices, factors: Sequence[Factor], fixed: dict[str, int], limit: float) -> _Frontier:
    """The frontier of variables that hang together."""
    touching = [factor for factor in factors if any(name in allowed for name in factor.variables)]
    names = list(allowed)
    if len(names) == 1 or math.prod(len(options) for options in allowed.values()) <= JOINT:
        return _enumerate(allowed, touching, fixed).thinned(limit, BINS // 8)
    separator = _separator(names, touching)
    rest = {name: options for name, options in allowed.items() if name != separator}
    parts = []
    for option in allowed[separator]:
        part = _solve_pieces(rest, touching, fixed | {separator: option}, limit)
        column = np.full((len(part.cost), 1), option, dtype=np.int32)
        parts.append(_Frontier([*part.variables, separator], np.hstack([part.picks, column]), part.cost, part.value))
    order = parts[0].variables
    picks = [part.picks[:, [part.variables.index(name) for name in order]] for part in parts]
    costs, values = [part.cost for part in parts], [part.value for part in parts]
    return _Frontier(order, np.vstack(picks), np.concatenate(costs), np.concatenate(values)).thinned(limit)


def _enumerate(allowed: Indices, factors: Sequence[Factor], fixed: dict[str, int]) -> _Frontier:
    """Every joint choice of a few variables."""
    names = list(allowed)
    shape = [len(allowed[name]) for name in names]
    cost, value = np.zeros(shape), np.zeros(shape)
    for factor in factors:
        index = np.ix_(*[allowed.get(name, [fixed.get(name, 0)]) for name in factor.variables])
        own = [name for name in names if name in factor.variables]
        axes = [factor.variables.index(name) for name in own]
        spread = [shape[k] if name in own else 1 for k, name in enumerate(names)]
        for total, table in ((cost, factor.cost), (value, factor.value)):
            picked = table[index]
            others = [axis for axis in range(picked.ndim) if axis not in axes]
            total += picked.transpose([*axes, *others]).reshape(spread)
    grids = np.meshgrid(*[np.asarray(allowed[name], dtype=np.int32) for name in names], indexing="ij")
    return _Frontier(names, np.stack([grid.reshape(-1) for grid in grids], axis=1), cost.reshape(-1), value.reshape(-1))


def _pieces(names: Sequence[str], factors: Sequence[Factor]) -> list[list[str]]:
    """The variables in groups that no factor connects."""
    root = {name: name for name in names}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for factor in factors:
        inside = [name for name in factor.variables if name in root]
        for other in inside[1:]:
            root[find(other)] = find(inside[0])
    pieces: dict[str, list[str]] = {}
    for name in names:
        pieces.setdefault(find(name), []).append(name)
    return list(pieces.values())


def _separator(names: Sequence[str], factors: Sequence[Factor]) -> str:
    """The variable that touches most of the others."""
    near: dict[str, set[str]] = {name: set() for name in names}
    for factor in factors:
        for name in factor.variables:
            if name in near:
                near[name].update(factor.variables)
    return max(names, key=lambda name: len(near[name] & set(names)))


def _conditioned(allowed: Indices, factors: Sequence[Factor]) -> list[str]:
    """The longest chain of variables that are conditioned on inside one another."""
    chains: list[list[str]] = [[]]
    for piece in _pieces(list(allowed), factors):
        if len(piece) > 1 and math.prod(len(allowed[name]) for name in piece) > JOINT:
            touching = [factor for factor in factors if any(name in piece for name in factor.variables)]
            first = _separator(piece, touching)
            rest = {name: allowed[name] for name in piece if name != first}
            chains.append([first, *_conditioned(rest, touching)])
    return max(chains, key=lambda chain: math.prod(len(allowed[name]) for name in chain))
