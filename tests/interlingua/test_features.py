from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hawada.interlingua import DeepPrefix, LMWrapper, LoRA, Objective, Recall, Reconstruction, Schedule, TextAlignment
from hawada.interlingua.encoder import InterlinguaEncoder
from hawada.interlingua.evaluation.answers import answer
from hawada.interlingua.evaluation.baselines import latent, text
from hawada.interlingua.examples import Example
from hawada.interlingua.features import Feature
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.messenger import Messenger, context_ids
from hawada.interlingua.pooling import segments
from hawada.interlingua.trainer import InterlinguaTrainer

TASK = Recall(2, 2)
EXAMPLES = TASK.test(3)


@pytest.fixture
def attached(llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]) -> Callable[..., Messenger]:
    """A messenger of these models with one feature, attached."""

    def make(feature: Feature, **options: Any) -> Messenger:
        messenger = make_messenger(llms, **options)
        messenger.features["own"] = feature
        assert isinstance(messenger.encoder, InterlinguaEncoder)
        feature.attach(messenger.encoder, llms)
        return messenger

    return make


def trainer(messenger: Messenger, llms: dict[str, LMWrapper]) -> InterlinguaTrainer:
    return InterlinguaTrainer(messenger, llms, TASK, Objective(), Schedule(steps=5, contexts=2, lr=1e-2))


class Watching(Feature):
    """A user's own feature, with every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.5))
        self.steps: list[tuple[str, int]] = []

    def prefix(self, name: str, z: torch.Tensor, prefix: Prefix) -> Prefix:
        assert prefix.soft is not None
        return Prefix(prefix.soft + self.shift)

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example], step: int) -> dict[str, torch.Tensor]:
        self.steps.append((llm.name, step))
        return {"own": self.shift.square()}

    def metrics(self) -> dict[str, float]:
        return {"shift": self.shift.item()}


def test_a_features_hooks_are_all_used(attached: Callable[..., Messenger], llms: dict[str, LMWrapper]) -> None:
    feature = Watching()
    messenger = attached(feature)
    train = trainer(messenger, llms)
    losses = train.train_step()
    assert losses["llama.own.own"] == losses["qwen.own.own"] == 0.25
    assert feature.steps == [("llama", 0), ("qwen", 0)]
    assert feature.shift.item() < 0.5 and "features.own.shift" in messenger.state_dict()
    assert train.metrics() == {"own.shift": feature.shift.item()}


def test_a_deep_prefix_adds_keys_and_values_to_soft_tokens(
    attached: Callable[..., Messenger], llms: dict[str, LMWrapper], prefixes: Callable[..., dict[str, Prefix]]
) -> None:
    torch.manual_seed(0)
    messenger = attached(DeepPrefix(hidden=8))
    for name, prefix in prefixes(messenger, EXAMPLES).items():
        layers, heads, width = llms[name].cache_shape
        assert prefix.soft is not None and prefix.soft.shape == (len(EXAMPLES), 3, llms[name].width)
        assert len(prefix.keys_values) == layers
        assert prefix.keys_values[0][0].shape == (len(EXAMPLES), heads, 3, width)
    before = {name: value.clone() for name, value in messenger.features["own"].state_dict().items()}
    trainer(messenger, llms).train_step()
    assert all(
        not torch.equal(value, before[name])
        for name, value in messenger.features["own"].state_dict().items()
        if not name.endswith("film.weight")
    )


@pytest.mark.parametrize("feature", [DeepPrefix(), TextAlignment()])
def test_what_is_for_soft_tokens_is_refused_for_keys(feature: Feature) -> None:
    feature.check("soft")
    with pytest.raises(ValueError, match=r"set interlingua\.injection=soft"):
        feature.check("keys")


def test_lora_trains_the_models_and_text_is_read_without_it(
    attached: Callable[..., Messenger], llms: dict[str, LMWrapper]
) -> None:
    pytest.importorskip("peft")
    before = {name: answer(llm, text(), EXAMPLES, max_new_tokens=2).nll for name, llm in llms.items()}
    plain = {name: weight.clone() for name, weight in llms["llama"].model.state_dict().items()}
    feature = LoRA(rank=2)
    messenger = attached(feature)
    train = trainer(messenger, llms)
    for _ in range(3):
        train.train_step()
    for name, llm in llms.items():
        own = feature.weights[name]
        assert isinstance(own, torch.nn.ParameterList)
        assert len(own) == 2 * 2 * 2 and all(weight.requires_grad for weight in own)  # A and B, two targets, two layers
        assert any(float(weight.detach().abs().max()) > 0 for weight in list(own)[1::2])  # B begins at 0
        assert (answer(llm, text(), EXAMPLES, max_new_tokens=2).nll == before[name]).all()
        with_it = answer(llm, latent(messenger), EXAMPLES, max_new_tokens=2).nll
        for weight in list(own)[1::2]:
            weight.data.zero_()
        assert (answer(llm, latent(messenger), EXAMPLES, max_new_tokens=2).nll != with_it).any()
    for name, weight in llms["llama"].model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer", "")])


def test_reconstruction_is_the_cross_entropy_of_the_text(
    llama: LMWrapper, attached: Callable[..., Messenger], prefixes: Callable[..., dict[str, Prefix]]
) -> None:
    messenger = attached(Reconstruction(weight=2.0, until=3, ask="?"))
    prefix = prefixes(messenger, EXAMPLES)["llama"]
    found = messenger.features_by_name()["own"].losses(llama, prefix, EXAMPLES, 2)["reconstruction"]
    contexts = context_ids(llama, EXAMPLES)
    total, count = 0.0, 0
    for row in (0, 2, 4):  # two questions on each context
        ids = [*contexts[row], llama.tokenizer.eos]
        reading = llama.read(prefix.rows([row]), [llama.tokenizer.encode("?")], [ids])
        total -= reading.logits.log_softmax(-1)[0, range(len(ids)), ids].sum().item()
        count += len(ids)
    assert found.item() == pytest.approx(2.0 * total / count, rel=1e-4)
    assert messenger.features_by_name()["own"].losses(llama, prefix, EXAMPLES, 3) == {}
    with pytest.raises(ValueError, match=r"Reconstruction\.ask='' has no token"):
        Reconstruction(ask="").losses(llama, prefix, EXAMPLES, 0)


def test_alignment_draws_soft_tokens_to_their_share_of_the_text(
    llama: LMWrapper, attached: Callable[..., Messenger]
) -> None:
    messenger = attached(TextAlignment(until=1))
    ids = torch.tensor(context_ids(llama, EXAMPLES))
    share = segments(torch.ones_like(ids, dtype=torch.bool), 3).float() @ llama.embed(ids)
    losses = messenger.features_by_name()["own"].losses
    assert float(losses(llama, Prefix(share), EXAMPLES, 0)["alignment"]) == pytest.approx(0.0, abs=1e-6)
    assert float(losses(llama, Prefix(torch.zeros_like(share)), EXAMPLES, 0)["alignment"]) == pytest.approx(1.0)
    assert losses(llama, Prefix(share), EXAMPLES, 1) == {}
