import pytest
import torch

from hawada.core.distill import TeacherCache, teacher_cache


@pytest.fixture
def counted():
    """A model of sums and products, and the number of samples in each of its passes."""
    counts = []

    def compute(inputs):
        counts.append(len(inputs))
        return torch.stack([inputs.sum(1), inputs.prod(1)], dim=1)

    return compute, counts


def test_each_sample_is_computed_once(counted):
    compute, counts = counted
    x = torch.randn(6, 3)
    cache = TeacherCache(6)
    for rows in ([0, 1, 2], [2, 3, 0], [5, 4], [0, 1, 2, 3, 4, 5]):
        numbers = torch.tensor(rows)
        assert torch.equal(cache.logits(x[numbers], numbers, compute), compute(x[numbers]))
        counts.pop()
    assert counts == [3, 1, 2]


def test_logits_above_the_limit_are_computed_every_time(counted):
    compute, counts = counted
    x, numbers = torch.randn(6, 3), torch.arange(6)
    for limit, expected in ((6 * 8, [6]), (6 * 8 - 1, [6, 6, 6])):  # two floats a sample
        counts.clear()
        cache = TeacherCache(6, limit_bytes=limit)
        for _ in range(3):
            assert torch.equal(cache.logits(x, numbers, compute)[:, 0], x.sum(1))
        assert counts == expected


def test_logits_are_kept_where_an_eighth_of_the_free_memory_holds_them(counted, monkeypatch):
    compute, counts = counted
    for free, expected in ((8 * 6 * 8, [6]), (8 * 6 * 8 - 1, [6, 6])):
        counts.clear()
        monkeypatch.setattr(teacher_cache, "_free_bytes", lambda device, free=free: free)
        cache = TeacherCache(6)
        for _ in range(2):
            cache.logits(torch.randn(6, 3), torch.arange(6), compute)
        assert counts == expected
