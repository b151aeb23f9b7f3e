import pytest
import torch

from hawada.core.distill import AnswerCache, teacher_cache as answer_cache


@pytest.fixture
def asked():
    """A model of sums, and how many samples it was asked about each time."""
    counts = []

    def ask(inputs):
        counts.append(len(inputs))
        return torch.stack([inputs.sum(1), inputs.prod(1)], dim=1)

    return ask, counts


def test_each_sample_is_asked_for_once(asked):
    ask, counts = asked
    x = torch.randn(6, 3)
    cache = AnswerCache(6)
    for rows in ([0, 1, 2], [2, 3, 0], [5, 4], [0, 1, 2, 3, 4, 5]):
        numbers = torch.tensor(rows)
        assert torch.equal(cache.take(x[numbers], numbers, ask), ask(x[numbers]))
        counts.pop()
    assert counts == [3, 1, 2]


def test_what_is_too_much_is_asked_for_every_time(asked):
    ask, counts = asked
    x, numbers = torch.randn(6, 3), torch.arange(6)
    for limit, expected in ((6 * 8, [6]), (6 * 8 - 1, [6, 6, 6])):  # two floats a sample
        counts.clear()
        cache = AnswerCache(6, limit_bytes=limit)
        for _ in range(3):
            assert torch.equal(cache.take(x, numbers, ask)[:, 0], x.sum(1))
        assert counts == expected


def test_as_much_is_kept_as_an_eighth_of_the_free_memory_holds(asked, monkeypatch):
    ask, counts = asked
    for free, expected in ((8 * 6 * 8, [6]), (8 * 6 * 8 - 1, [6, 6])):
        counts.clear()
        monkeypatch.setattr(answer_cache, "_free_bytes", lambda device, free=free: free)
        cache = AnswerCache(6)
        for _ in range(2):
            cache.take(torch.randn(6, 3), torch.arange(6), ask)
        assert counts == expected
