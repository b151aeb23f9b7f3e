import pytest
import torch

from hawada.core.importance import obs_ranks
from hawada.core.importance.obs import elimination_ranks
from hawada.core.structure import Cut, Group


@pytest.fixture
def problem():
    """Rows of six correlated units of two columns each, and the weights of a linear layer."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(5000, 12, generator=generator, dtype=torch.float64) @ mix
    x = x - x.mean(0)
    return x, torch.randn(12, 4, generator=generator, dtype=torch.float64)


def error_without(x, weights, columns):
    """The mean squared error of the best fit without some columns."""
    stays = [column for column in range(x.shape[1]) if column not in columns]
    targets = x @ weights
    return (x[:, stays] @ torch.linalg.lstsq(x[:, stays], targets).solution - targets).square().sum(1).mean()


def test_each_step_removes_the_unit_with_the_least_error(problem):
    x, weights = problem
    positions = torch.arange(12).reshape(6, 2)
    ranks = elimination_ranks(x.T @ x / len(x), weights, positions)
    assert sorted(ranks.tolist()) == [1, 2, 3, 4, 5, 6]
    gone: list[int] = []
    for rank in range(1, 6):
        removed = int((ranks == rank).nonzero())
        left = [unit for unit in range(6) if unit not in gone]
        errors = {
            unit: float(error_without(x, weights, [c for u in (*gone, unit) for c in positions[u].tolist()]))
            for unit in left
        }
        assert errors[removed] <= 1.01 * min(errors.values())
        gone.append(removed)


def test_of_two_equal_units_one_is_removed_first(problem):
    x, weights = problem
    x = x.clone()
    x[:, 2:4] = x[:, 8:10]
    definite = x.T @ x / len(x) + 1e-3 * torch.eye(12)
    ranks = elimination_ranks(definite, weights, torch.arange(12).reshape(6, 2))
    assert 1 in (ranks[1], ranks[4])


def test_many_units_are_removed_a_few_at_a_time():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 100, generator=generator, dtype=torch.float64)
    weights = torch.linspace(0.1, 10, 100, dtype=torch.float64)[:, None]
    ranks = elimination_ranks(x.T @ x / len(x), weights, torch.arange(100)[:, None])
    assert sorted(ranks.tolist()) == list(range(1, 101))
    # units that are not correlated are removed in the order of their weights' sizes
    assert (ranks - torch.arange(1, 101)).abs().max() <= 4


def test_groups_with_a_single_consumer_are_ranked(toy, groups, inputs):
    shared = Group("stream", "stream", 5, (), (Cut("first.up.weight", 1), Cut("second.up.weight", 1)))
    ranks = obs_ranks(toy, [*groups, shared], [(inputs,)])
    assert set(ranks) == {"first.hidden", "second.hidden"}
    assert sorted(ranks["first.hidden"].tolist()) == list(range(1, 9))
