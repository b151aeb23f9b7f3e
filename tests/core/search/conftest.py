"""The exact optimum of a choice with one cost limit, by another method: a mixed-integer linear program."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp


def exact_optimum(domains, factors, limit):
    """One option of every variable of the largest value, found by branch and bound; None where no choice is in reach.

    A factor that depends on several variables has one binary for each cell of its table: of those exactly one is 1,
    and it lies at the options that are taken.

    Args:
        domains: how many options each variable has.
        factors: (variables, cost table, value table).
        limit: largest cost.
    """
    columns = {
        (name, option): index
        for index, (name, option) in enumerate((name, option) for name, n in domains.items() for option in range(n))
    }
    rows, equals = [], []
    for name, count in domains.items():
        rows.append({columns[name, option]: 1.0 for option in range(count)})
        equals.append(1.0)
    cost, value = dict.fromkeys(columns.values(), 0.0), dict.fromkeys(columns.values(), 0.0)
    for number, (variables, costs, values) in enumerate(factors):
        cells = list(itertools.product(*[range(domains[name]) for name in variables]))
        for cell in cells:
            columns[number, cell] = len(columns)
            cost[columns[number, cell]], value[columns[number, cell]] = float(costs[cell]), float(values[cell])
        rows.append({columns[number, cell]: 1.0 for cell in cells})
        equals.append(1.0)
        for axis, name in enumerate(variables):
            for option in range(domains[name]):
                row = {columns[number, cell]: 1.0 for cell in cells if cell[axis] == option}
                rows.append(row | {columns[name, option]: -1.0})
                equals.append(0.0)
    matrix = np.zeros((len(rows), len(columns)))
    for index, row in enumerate(rows):
        matrix[index, list(row)] = list(row.values())
    per_column = np.array([[cost[index], value[index]] for index in range(len(columns))])
    found = milp(
        -per_column[:, 1],
        constraints=[LinearConstraint(matrix, equals, equals), LinearConstraint(per_column[:, 0], -np.inf, limit)],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        assert found.status == 2, found.message  # infeasible, and nothing else
        return None
    return {name: max(range(count), key=lambda o: found.x[columns[name, o]]) for name, count in domains.items()}


@pytest.fixture(scope="session")
def oracle():
    """See `exact_optimum`."""
    return exact_optimum
