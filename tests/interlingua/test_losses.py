from __future__ import annotations

import math

import pytest
import torch

from hawada.interlingua import k_token_ce_from_prefix, kd_first_k_prefix_vs_text, kd_hidden_states_first_k
from hawada.interlingua.losses import first_k, scale_penalty

# Two answers of two tokens and one, of a vocabulary of three; probabilities are easy to take logarithms of.
PROBABILITIES = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]])
LOGITS = PROBABILITIES.log()
TARGETS = torch.tensor([[0, 1], [2, 0]])
MASK = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(
    ("k", "probabilities"), [(None, (0.5, 0.8, 0.6)), (1, (0.5, 0.6)), (2, (0.5, 0.8, 0.6)), (9, (0.5, 0.8, 0.6))]
)
def test_cross_entropy_of_the_first_tokens(k: int | None, probabilities: tuple[float, ...]) -> None:
    expected = -sum(math.log(p) for p in probabilities) / len(probabilities)
    assert float(k_token_ce_from_prefix(LOGITS, TARGETS, MASK, k)) == pytest.approx(expected, rel=1e-6)


def test_targets_are_not_shifted_again() -> None:
    """Logits at place t belong to target t: a model that is sure of each has no loss, one place off it has much."""
    sure = 50.0 * torch.nn.functional.one_hot(TARGETS, 3).float()
    assert float(k_token_ce_from_prefix(sure, TARGETS, MASK)) < 1e-6
    assert float(k_token_ce_from_prefix(sure.roll(1, 1), TARGETS, torch.ones_like(MASK))) > 10


def test_what_is_padded_has_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    torch.autograd.backward(k_token_ce_from_prefix(logits, TARGETS, MASK))
    assert logits.grad is not None
    assert float(logits.grad[1, 1].abs().sum()) == 0.0 and float(logits.grad[0, 1].abs().sum()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_the_divergence_from_the_text(temperature: float) -> None:
    text = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 3.0, 0.0], [9.0, 0.0, 0.0]]])
    expected = []
    for row, place in ((0, 0), (0, 1), (1, 0)):
        p = [math.exp(value / temperature) for value in text[row, place].tolist()]
        q = [math.exp(value / temperature) for value in LOGITS[row, place].tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = kd_first_k_prefix_vs_text(LOGITS, text, MASK, None, temperature)
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-5)
    first = kd_first_k_prefix_vs_text(LOGITS, text, MASK, 1, temperature)
    assert float(first) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)


def test_the_text_is_not_trained() -> None:
    own, text = LOGITS.clone().requires_grad_(), LOGITS.flip(-1).clone().requires_grad_()
    torch.autograd.backward(kd_first_k_prefix_vs_text(own, text, MASK))
    assert own.grad is not None and text.grad is None


def test_hidden_states_are_compared_place_by_place() -> None:
    text = [torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[0.0, 2.0], [7.0, 7.0]]])]
    own = [text[0] + torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [5.0, 5.0]]])]
    # squares of what counts: 1 and 0, 0 and 0, 0 and 1, of six numbers; the text's own mean square is 10 / 6
    assert float(kd_hidden_states_first_k(own, text, MASK)) == pytest.approx((2 / 6) / (10 / 6))
    assert float(kd_hidden_states_first_k(text, text, MASK)) == 0.0
    assert float(kd_hidden_states_first_k([text[0].roll(1, 1)], text, MASK)) > 0  # one place off


def test_the_first_k_of_a_mask() -> None:
    assert first_k(MASK, None).tolist() == MASK.tolist()
    assert first_k(MASK, 1).tolist() == [[True, False], [True, False]]


def test_the_scale_is_right_at_the_embeddings_rms() -> None:
    soft = torch.tensor([[[3.0, -3.0], [6.0, 6.0]]])
    assert float(scale_penalty(soft, 3.0)) == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert float(scale_penalty(soft[:, :1], 3.0)) == pytest.approx(0.0, abs=1e-12)
