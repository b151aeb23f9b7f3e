from __future__ import annotations

import pytest
import torch

from hawada.interlingua import Adapter
from hawada.interlingua.adapter import PrefixAdapter, Scale

Z = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean((1, 2)).sqrt()


@pytest.mark.parametrize("mode", ["embed_rms", "fixed"])
def test_every_example_has_the_scale_that_is_asked_for(mode: str) -> None:
    soft = torch.randn(5, 3, 16) * torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0]).view(5, 1, 1)
    expected = 0.25 if mode == "embed_rms" else 2.0
    assert torch.allclose(rms(Scale(mode, 0.25, value=2.0)(soft)), torch.full((5,), expected), rtol=1e-4)


def test_none_leaves_soft_tokens_as_they_are() -> None:
    soft = torch.randn(5, 3, 16)
    assert torch.equal(Scale("none", 0.25)(soft), soft)


def test_training_statistics_scale_all_alike_and_stand_still_afterwards() -> None:
    scale = Scale("train_stats", 0.25)
    soft = torch.randn(4, 3, 16) * 7
    for _ in range(3):
        scale(soft)
    running = scale.running.clone()
    scale.eval()
    louder = torch.cat([soft[:1], 2 * soft[:1]])
    scaled = scale(louder)
    assert torch.allclose(rms(scaled)[1], 2 * rms(scaled)[0], rtol=1e-5)
    assert torch.equal(scale.running, running) and float(rms(scale(soft)).mean()) == pytest.approx(0.25, 1e-3)


def test_another_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"interlingua\.scale: 'loud' is not one of none, embed_rms, fixed, train_stats; set it to"
    ):
        Scale("loud", 1.0)


def test_soft_tokens_begin_at_the_embeddings_scale() -> None:
    prefix = Adapter(8, 3, 16, 0.5, scale="none")(Z)
    assert prefix.soft.shape == (5, 3, 16) and torch.allclose(rms(prefix.soft), torch.full((5,), 0.5), rtol=1e-3)


def test_keys_and_values_have_the_shape_of_the_models_cache() -> None:
    prefix = PrefixAdapter(8, 3, layers=2, kv_heads=4, head_width=6)(Z)
    assert [(k.shape, v.shape) for k, v in prefix.keys_values] == [((5, 4, 3, 6), (5, 4, 3, 6))] * 2


@pytest.mark.parametrize("adapter", [Adapter(8, 3, 16, 0.5), PrefixAdapter(8, 3, layers=2, kv_heads=1, head_width=4)])
def test_an_adapter_tells_latents_and_places_apart(adapter: Adapter | PrefixAdapter) -> None:
    torch.nn.init.normal_(adapter.network.place)
    z = Z[:1, :1].expand(1, 3, 8)
    prefix = adapter(z)
    rows = prefix.soft[0] if prefix.soft is not None else prefix.keys_values[0][0][0, 0]
    assert not torch.allclose(rows[0], rows[1])
    torch.nn.init.zeros_(adapter.network.place)
    rows = adapter(z).soft[0] if prefix.soft is not None else adapter(z).keys_values[0][0][0, 0]
    assert torch.allclose(rows[0], rows[1])
