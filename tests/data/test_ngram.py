import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from hawada.data import witten_bell_perplexity
from hawada.data.ngram import MAX_ORDER

ABBA = b"abracadabra, abracadabra! " * 20


def slow_perplexity(train, test, order):
    """The same model by its recursive definition, over dictionaries."""
    counts, followers = Counter(), defaultdict(set)
    for length in range(1, order + 1):
        for start in range(len(train) - length + 1):
            gram = train[start : start + length]
            counts[gram] += 1
            followers[gram[:-1]].add(gram[-1])
    totals = Counter()
    for gram, count in counts.items():
        totals[gram[:-1]] += count

    def probability(byte, context):
        lower = probability(byte, context[1:]) if context else 1 / 256
        if not totals[context]:
            return lower
        kinds = len(followers[context])
        return (counts[context + bytes([byte])] + kinds * lower) / (totals[context] + kinds)

    logs = [math.log(probability(byte, test[max(0, at - order + 1) : at])) for at, byte in enumerate(test)]
    return math.exp(-sum(logs) / len(logs))


def random_bytes(seed, size, kinds=256):
    return np.random.default_rng(seed).integers(0, kinds, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("order", [1, 2, 3, 5, MAX_ORDER])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        (ABBA, b"a cadaver, abraded"),
        (random_bytes(0, 3000, kinds=4), random_bytes(1, 500, kinds=5)),
        (random_bytes(2, 3000), random_bytes(3, 500)),
        (bytes(range(256)), b"\xff\x00\xff\xff\xfe"),
        (b"ab", b"abababab"),
        (b"abcdefgh", b"a"),
    ],
    ids=["words", "few kinds", "noise", "high bytes", "short train", "short test"],
)
def test_it_agrees_with_the_definition(train, test, order):
    assert witten_bell_perplexity(train, test, order) == pytest.approx(slow_perplexity(train, test, order), rel=1e-9)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("train", [b"", b"ab", ABBA])
def test_the_probabilities_of_the_next_byte_sum_to_one(train, order):
    before = b"ab"
    base = -len(before) * math.log(witten_bell_perplexity(train, before, order))

    def after(byte):
        text = before + bytes([byte])
        return math.exp(-len(text) * math.log(witten_bell_perplexity(train, text, order)) - base)

    assert sum(map(after, range(256))) == pytest.approx(1, abs=1e-9)


def test_without_training_text_every_byte_is_as_likely():
    assert witten_bell_perplexity(b"", b"anything", 5) == pytest.approx(256)


def test_a_longer_context_helps_on_text_that_repeats():
    figures = [witten_bell_perplexity(ABBA, b"abracadabra", order) for order in (1, 2, 3, 5)]
    assert figures == sorted(figures, reverse=True) and figures[-1] < 2


def test_noise_cannot_be_predicted():
    assert 240 < witten_bell_perplexity(random_bytes(0, 200_000), random_bytes(1, 20_000), 1) < 260


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="the test text is empty; give at least one byte"):
        witten_bell_perplexity(b"abc", b"")


@pytest.mark.parametrize("order", [0, MAX_ORDER + 1])
def test_an_order_out_of_range_is_refused(order):
    with pytest.raises(ValueError, match=rf"order: {order} is not from 1 to 8; choose one of these"):
        witten_bell_perplexity(b"abc", b"abc", order)
