import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hawada.core.search import knapsack
from hawada.core.search.knapsack import Factor, solve


def random_problem(seed, variables=6, options=4, stairs=False):
    """Variables in a chain of couplings, one of them coupled to all others, with integer or real costs."""
    random = np.random.default_rng(seed)
    names = [f"v{index}" for index in range(variables)]
    domains = {name: int(random.integers(2, options + 1)) for name in names}
    scopes = [(name,) for name in names] + [tuple(names[i : i + 2]) for i in range(0, variables - 1, 2)]
    scopes += [(name, names[0]) for name in names[2:5]] + [()]
    factors = []
    for scope in scopes:
        shape = [domains[name] for name in scope]
        cost = random.integers(0, 8, shape).astype(float) if stairs else random.random(shape)
        factors.append(Factor(scope, np.asarray(cost), np.asarray(random.random(shape))))
    return domains, factors


def totals(factors, picks):
    index = [tuple(picks[name] for name in factor.variables) for factor in factors]
    return (
        float(sum(factor.cost[at] for factor, at in zip(factors, index, strict=True))),
        float(sum(factor.value[at] for factor, at in zip(factors, index, strict=True))),
    )


def brute_force(domains, factors, limit, at_least=0.0):
    every = [
        totals(factors, dict(zip(domains, picks, strict=True)))
        for picks in itertools.product(*[range(count) for count in domains.values()])
    ]
    fitting = [(cost, value) for cost, value in every if cost <= limit]
    return max((value for cost, value in fitting if cost >= at_least), default=None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("joint", [1, 16, 4096])
@pytest.mark.parametrize("stairs", [False, True])
def test_small_problems_are_solved_exactly_however_they_are_cut_into_pieces(monkeypatch, seed, joint, stairs):
    monkeypatch.setattr(knapsack, "MAX_ENUMERATED_CHOICES", joint)
    domains, factors = random_problem(seed, stairs=stairs)
    highest = totals(factors, {name: count - 1 for name, count in domains.items()})[0]
    for share in (0.6, 0.8, 1.0):
        for floor in (0.0, 0.97):
            limit = share * highest
            best, found = (
                brute_force(domains, factors, limit, floor * limit),
                solve(domains, factors, limit, floor * limit),
            )
            if best is None:
                assert found is None or found.cost <= limit
                continue
            assert (found.cost, found.value) == pytest.approx(totals(factors, found.picks))
            assert floor * limit <= found.cost <= limit * (1 + 1e-9)
            assert found.value == pytest.approx(best)


@st.composite
def coupled(draw):
    """Variables with a few options, tables over one to three of them, whole costs, and a limit between two of these."""
    names = [f"v{index}" for index in range(draw(st.integers(1, 5)))]
    domains = {name: draw(st.integers(1, 4)) for name in names}
    scopes = draw(st.lists(st.lists(st.sampled_from(names), unique=True, max_size=3), min_size=1, max_size=7))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factors = []
    for scope in scopes:
        shape = [domains[name] for name in scope]
        costs = random.integers(0, 9, shape).astype(float)
        factors.append(Factor(tuple(scope), np.asarray(costs), np.asarray(random.random(shape))))
    low, high = (sum(float(end(factor.cost)) for factor in factors) for end in (np.min, np.max))
    return domains, factors, low + math.floor(draw(st.floats(-0.1, 1.1)) * (high - low + 1)) + 0.5


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problem=coupled(), enumerated=st.sampled_from([1, 8, 4096]))
def test_the_optimum_is_that_of_a_mixed_integer_program(oracle, problem, enumerated):
    domains, factors, limit = problem
    picks = oracle(domains, [(factor.variables, factor.cost, factor.value) for factor in factors], limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "MAX_ENUMERATED_CHOICES", enumerated)
        found = solve(domains, factors, limit)
    if picks is None:
        assert found is None
        return
    cost, value = totals(factors, found.picks)
    assert cost <= limit and (cost, value) == pytest.approx((found.cost, found.value), rel=1e-12)
    assert value == pytest.approx(totals(factors, picks)[1], rel=1e-9)


def test_a_limit_out_of_reach_has_no_solution():
    assert solve({"a": 2}, [Factor(("a",), np.array([2.0, 3.0]), np.array([1.0, 2.0]))], 1.0) is None


def test_where_nothing_costs_enough_the_dearest_that_fits_is_taken():
    factors = [Factor(("a",), np.array([1.0, 5.0, 20.0]), np.array([9.0, 1.0, 2.0]))]
    assert solve({"a": 3}, factors, 10.0, at_least=9.0).picks == {"a": 1}
    assert solve({"a": 3}, factors, 10.0, at_least=0.5).picks == {"a": 0}


def test_only_options_that_may_be_taken_are():
    factors = [Factor(("a",), np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))]
    assert solve({"a": 3}, factors, 10.0, options={"a": [0, 1]}).picks == {"a": 1}


@pytest.mark.parametrize("seed", range(5))
def test_coarse_frontiers_and_coarse_steps_lose_little(monkeypatch, seed):
    domains, factors = random_problem(seed, variables=7, options=5)
    limit = float(sum(np.median(factor.cost) for factor in factors))
    best = brute_force(domains, factors, limit)
    monkeypatch.setattr(knapsack, "MAX_FRONTIER_POINTS", 300)
    monkeypatch.setattr(knapsack, "MAX_ENUMERATED_FRONTIER_POINTS", 300 // 8)
    monkeypatch.setattr(knapsack, "MAX_ENUMERATED_CHOICES", 4)
    assert solve(domains, factors, limit).value >= 0.995 * best
    monkeypatch.setattr(knapsack, "MAX_CONDITIONED_CHOICES", 6)
    assert solve(domains, factors, limit).value >= 0.9 * best


def test_many_classes_are_solved_within_a_thousandth_of_the_relaxation():
    random = np.random.default_rng(0)
    cost, gain = np.sort(random.random((60, 10)), axis=1), np.sort(random.random((60, 10)), axis=1)
    factors = [Factor((f"v{row}",), cost[row], gain[row]) for row in range(60)]
    limit = 0.5 * cost[:, -1].sum()
    found = solve({f"v{row}": 10 for row in range(60)}, factors, limit)
    multipliers = np.geomspace(0.05, 20, 2000)
    dual = multipliers * limit + (gain[:, :, None] - multipliers * cost[:, :, None]).max(axis=1).sum(axis=0)
    assert found.cost <= limit and 0.999 * dual.min() <= found.value <= dual.min()
