import math

import pytest
import torch

from hawada.core.distill import KDConfig, kd_loss, mse_reg

KL = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # teacher (1/4, 3/4), student (1/2, 1/2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_kd_by_hand(temperature):
    teacher = torch.tensor([[0.0, temperature * math.log(3.0)]])
    student = torch.tensor([[1.0, 1.0]])
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(temperature**2 * KL, rel=1e-5)


def test_kd_is_averaged_over_every_axis_but_the_last():
    teacher = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]).repeat(3, 1, 1)  # (3, 2, classes); half agree
    assert float(kd_loss(torch.zeros(3, 2, 2), teacher)) == pytest.approx(KL / 2, rel=1e-5)


def test_kd_does_not_see_an_offset_and_mse_does():
    logits = torch.randn(4, 5)
    assert float(kd_loss(logits + 3, logits)) == pytest.approx(0.0, abs=1e-6)
    assert float(mse_reg(logits + 3, logits)) == pytest.approx(9.0, rel=1e-5)


def test_losses_of_half_precision_logits_are_float32():
    logits = torch.randn(4, 5, dtype=torch.bfloat16)
    assert kd_loss(logits, -logits).dtype == mse_reg(logits, -logits).dtype == torch.float32


def test_config_adds_the_weighted_terms():
    teacher, student = torch.tensor([[0.0, 2 * math.log(3.0)]]), torch.zeros(1, 2)
    mse = (2 * math.log(3.0)) ** 2 / 2
    assert float(KDConfig(2.0)(student, teacher)) == pytest.approx(4 * KL, rel=1e-5)
    assert float(KDConfig(2.0, 0.5)(student, teacher)) == pytest.approx(4 * KL + 0.5 * mse, rel=1e-5)


def test_gradient_flows_to_the_student():
    student = torch.zeros(1, 2, requires_grad=True)
    KDConfig(2.0, 0.5)(student, torch.tensor([[0.0, 1.0]])).backward()
    assert float(student.grad[0, 0]) > 0 > float(student.grad[0, 1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"kd\.temperature: .* is not above 0; 1 to 4 are usual"):
        KDConfig(temperature)


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_mse_weight_must_not_be_negative(weight):
    with pytest.raises(ValueError, match=r"kd\.mse_weight: .* is negative; 0 switches the term off"):
        KDConfig(2.0, weight)
