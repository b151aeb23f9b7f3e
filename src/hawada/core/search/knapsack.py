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
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

MAX_ENUMERATED_CHOICES = 4096  # of a piece with at most as many joint choices, all are tried
MAX_CONDITIONED_CHOICES = 4000  # of the variables that are conditioned on; beyond it the search goes coarse to fine
MAX_FRONTIER_POINTS = 4000  # resolution of the cost once there are more partial choices than this
MAX_ENUMERATED_FRONTIER_POINTS = MAX_FRONTIER_POINTS // 8  # the same for a piece of which all choices were tried

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
        value: what it gains.
    """

    picks: dict[str, int]
    cost: float
    value: float


@dataclass
class _Frontier:
    """Partial choices: `picks[i]` are options of `variables` that cost `cost[i]` and have the value `value[i]`."""

    variables: list[str]
    picks: NDArray[np.int32]
    cost: Array
    value: Array

    def undominated(self, limit: float, max_points: int) -> _Frontier:
        """The partial choices that may be part of the best choice, see `_select`."""
        kept = _select(self.cost, self.value, limit, max_points)
        return _Frontier(self.variables, self.picks[kept], self.cost[kept], self.value[kept])

    def plus(self, other: _Frontier, limit: float) -> _Frontier:
        """Every pair of partial choices of both, without those that are dominated."""
        cost = (self.cost[:, None] + other.cost[None, :]).reshape(-1)
        value = (self.value[:, None] + other.value[None, :]).reshape(-1)
        kept = _select(cost, value, limit, MAX_FRONTIER_POINTS)
        mine, others = kept // max(len(other.cost), 1), kept % max(len(other.cost), 1)
        picks = np.hstack([self.picks[mine], other.picks[others]])
        return _Frontier([*self.variables, *other.variables], picks, cost[kept], value[kept])


def _select(cost: Array, value: Array, limit: float, max_points: int) -> NDArray[np.intp]:
    """Indices of the most valuable choice of every cost within the limit.

    Where more than `max_points` choices are within the limit, of every one of as many equal steps of the cost.
    """
    fits: NDArray[np.intp] = np.flatnonzero(cost <= limit)
    if not len(fits):
        return fits
    cost, value = cost[fits], value[fits]
    low, high = float(cost.min()), float(cost.max())
    steps = np.round((cost - low) / max(high - low, 1e-300), 12)
    if len(fits) > max_points:
        steps = np.floor(steps * (max_points - 1))
    order = np.lexsort((value, steps))  # by step, the most valuable last
    selected: NDArray[np.intp] = fits[order[np.append(np.diff(steps[order]) != 0, True)]]
    return selected


def solve(
    domains: Mapping[str, int],
    factors: Sequence[Factor],
    limit: float,
    at_least: float = 0.0,
    options: Indices | None = None,
) -> Solution | None:
    """The most valuable choice that costs at most `limit` and at least `at_least`; None when the limit is out of reach.

    Where nothing costs as much as `at_least`, the most valuable among those within a percent of the dearest that fits.
    Exact while frontiers stay below `MAX_FRONTIER_POINTS` and conditioned choices below `MAX_CONDITIONED_CHOICES`.

    Args:
        domains: how many options each variable has.
        factors: what cost and value are sums of.
        limit: largest cost.
        at_least: smallest cost that is preferred.
        options: the options that may be taken, ascending; None means all.
    """
    full = {name: list((options or {}).get(name, range(count))) for name, count in domains.items()}
    conditioned = _conditioned(full, factors)
    allowed = dict(full)
    strides: dict[str, int] = {}
    while math.prod(len(allowed[name]) for name in conditioned) > MAX_CONDITIONED_CHOICES:
        widest = max(conditioned, key=lambda name: len(allowed[name]))
        strides[widest] = 2 * strides.get(widest, 1)
        allowed[widest] = sorted({*full[widest][:: -strides[widest]], full[widest][0]})
    found = _best(allowed, factors, limit, at_least)
    while strides and found is not None:
        strides = {name: stride // 2 for name, stride in strides.items() if stride > 1}
        for name, stride in strides.items():
            at = full[name].index(found.picks[name])
            allowed[name] = sorted({full[name][max(0, min(at + k * stride, len(full[name]) - 1))] for k in (-1, 0, 1)})
        found = _better(found, _best(allowed, factors, limit, at_least), at_least)
    return found


def _better(old: Solution, new: Solution | None, at_least: float) -> Solution:
    if new is None:
        return old
    return max(old, new, key=lambda solution: (min(solution.cost, at_least), solution.value))


def _best(allowed: Indices, factors: Sequence[Factor], limit: float, at_least: float) -> Solution | None:
    slack = limit * (1 + 1e-12)
    frontier = _solve_pieces(allowed, factors, {}, slack)
    if not len(frontier.cost):
        return None
    cost, value = frontier.cost, frontier.value
    good = cost >= at_least if (cost >= at_least).any() else cost >= cost.max() - 0.01 * abs(limit)
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
    if len(names) == 1 or math.prod(len(options) for options in allowed.values()) <= MAX_ENUMERATED_CHOICES:
        return _enumerate(allowed, touching, fixed).undominated(limit, MAX_ENUMERATED_FRONTIER_POINTS)
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
    whole = _Frontier(order, np.vstack(picks), np.concatenate(costs), np.concatenate(values))
    return whole.undominated(limit, MAX_FRONTIER_POINTS)


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


def _pieces(names: Sequence[str], factors: Sequence[Factor]) -> tuple[tuple[str, ...], ...]:
    """The variables in groups that no factor connects."""
    return _connected(tuple(names), tuple(factor.variables for factor in factors))


@lru_cache(maxsize=4096)  # asked for the same variables again for each value of what is conditioned on
def _connected(names: tuple[str, ...], scopes: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """The names in groups that no scope connects; groups and names in the order of `names`."""
    number = {name: index for index, name in enumerate(names)}
    adjacent = np.zeros((len(names), len(names)))
    for scope in scopes:
        inside = [number[name] for name in scope if name in number]
        adjacent[inside[:1], inside[1:]] = 1
    labels = connected_components(adjacent, directed=False)[1]
    pieces: dict[int, list[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        pieces.setdefault(label, []).append(name)
    return tuple(tuple(piece) for piece in pieces.values())


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
        if len(piece) > 1 and math.prod(len(allowed[name]) for name in piece) > MAX_ENUMERATED_CHOICES:
            touching = [factor for factor in factors if any(name in piece for name in factor.variables)]
            first = _separator(piece, touching)
            rest = {name: allowed[name] for name in piece if name != first}
            chains.append([first, *_conditioned(rest, touching)])
    return max(chains, key=lambda chain: math.prod(len(allowed[name]) for name in chain))
