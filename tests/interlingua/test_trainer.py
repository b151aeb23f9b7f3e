from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hawada.interlingua import Adapter, InterlinguaEncoder, LMWrapper, Objective, Recall, Schedule
from hawada.interlingua.checkpoint import load_checkpoint, save_checkpoint
from hawada.interlingua.features import Feature
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.messenger import Messenger
from hawada.interlingua.recall import word_tokenizer
from hawada.interlingua.trainer import InterlinguaTrainer

SCHEDULE = Schedule(steps=12, contexts=4, lr=1e-2, curriculum=0.5)
EVERYTHING = Objective(1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1, k=2)


def trainer(
    llms: dict[str, LMWrapper], messenger: Messenger, objective: Objective = EVERYTHING, **options: Any
) -> InterlinguaTrainer:
    return InterlinguaTrainer(messenger, llms, Recall(3, 2), objective, SCHEDULE, **options)


def gradients(messenger: Messenger) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone() for name, parameter in messenger.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", ["soft", "keys"])
def test_one_model_at_a_time_gives_the_same_gradients(
    kind: str, llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    found = []
    for sequential in (False, True):
        messenger = make_messenger(llms, kind=kind, private_len=1)
        losses = trainer(llms, messenger, sequential=sequential).backward(Recall(3, 2).train_batch(0, 4))
        found.append((losses, gradients(messenger)))
    (losses, joint), (same, alone) = found
    assert losses.keys() == same.keys() and joint.keys() == alone.keys()
    assert {name.partition(".")[2] for name in losses} >= {"answer_ce", "kd_answer", "kd_hidden"}
    for name, value in losses.items():
        assert same[name] == pytest.approx(value, rel=1e-6)
    for name, gradient in joint.items():
        assert torch.allclose(alone[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


def test_training_lowers_the_loss(llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]) -> None:
    one = trainer(llms, make_messenger(llms, kind="keys"), Objective())
    one.schedule = Schedule(steps=40, contexts=8, lr=3e-2)
    examples = Recall(3, 4).train_batch(100, 8)
    before = sum(one.backward(examples).values())
    for _ in range(40):
        one.train_step()
    assert sum(one.backward(examples).values()) < before - 1.0


@pytest.mark.parametrize("kind", ["soft", "keys"])
def test_encoder_and_adapters_stay_in_full_precision_beside_models_in_half(
    kind: str, llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    for llm in llms.values():
        llm.model.bfloat16()
    messenger = make_messenger(llms, kind=kind)
    losses = trainer(llms, messenger).train_step()
    assert losses.keys() >= {"llama.answer_ce", "qwen.kd_hidden"}
    assert {parameter.dtype for parameter in messenger.parameters()} == {torch.float32}
    assert all(gradient.abs().max() > 0 for name, gradient in gradients(messenger).items() if "leave" in name)


def test_nothing_is_changed_when_a_loss_is_not_finite(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    messenger = make_messenger(llms)
    one = trainer(llms, messenger, Objective())
    adapter = messenger.adapters["llama"]
    assert isinstance(adapter, Adapter)
    adapter.scale.data.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in messenger.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"step 0: a loss is not finite; set interlingua\.schedule\.lr or"):
        one.train_step()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in messenger.state_dict().items() if "scale" not in name
    )


class Noise(Feature):
    """Random soft tokens: what follows depends on the generator's state."""

    def prefix(self, name: str, z: torch.Tensor, prefix: Prefix) -> Prefix:
        assert prefix.soft is not None
        return Prefix(prefix.soft + 0.1 * torch.randn_like(prefix.soft))


def test_going_on_from_a_checkpoint_is_going_on(
    llms: dict[str, LMWrapper], make_messenger: Callable[..., Messenger], tmp_path: Path
) -> None:
    def noisy() -> Messenger:
        messenger = make_messenger(llms)
        messenger.features["noise"] = Noise()
        return messenger

    whole = trainer(llms, noisy())
    for _ in range(4):
        whole.train_step()
    save_checkpoint(tmp_path / "last", whole.messenger, whole.optimizer, {"step": whole.step})
    losses = [whole.train_step() for _ in range(4)]
    resumed = trainer(llms, noisy())
    assert isinstance(resumed.messenger.encoder, InterlinguaEncoder)
    torch.nn.init.zeros_(resumed.messenger.encoder.project.weight)
    state = load_checkpoint(tmp_path / "last", resumed.messenger, resumed.optimizer)
    assert state is not None
    resumed.step = state["step"]
    assert resumed.step == 4 and [resumed.train_step() for _ in range(4)] == losses
    for name, tensor in whole.messenger.state_dict().items():
        assert torch.equal(tensor, resumed.messenger.state_dict()[name])


def test_a_checkpoint_is_replaced_whole_or_not_at_all(
    llms: dict[str, LMWrapper],
    make_messenger: Callable[..., Messenger],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = trainer(llms, make_messenger(llms), Objective())
    save_checkpoint(tmp_path / "last", one.messenger, one.optimizer, {"step": 0})
    one.train_step()
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_checkpoint(tmp_path / "last", one.messenger, one.optimizer, {"step": 1})
    assert load_checkpoint(tmp_path / "last", one.messenger, one.optimizer) == {"step": 0}
    assert load_checkpoint(tmp_path / "none", one.messenger, None) is None


def test_the_schedule_rises_falls_and_grows() -> None:
    schedule = Schedule(steps=100, contexts=1, warm_up=0.1, curriculum=0.5, shortest=0.25)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] == 1.0 and factors[-1] < 0.01
    assert schedule.share(0) == 0.25 and schedule.share(25) == pytest.approx(0.625) and schedule.share(50) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"answer_ce_weight": -1.0},
            r"interlingua\.objective\.answer_ce_weight: -1\.0 is negative; set it to 0 or more",
        ),
        ({"answer_ce_weight": 0.0, "first_token_ce_weight": 0.0}, "every weight is 0, so nothing is learned"),
        ({"k": 0}, r"k must be at least 1 and kd_temperature above 0, and they are 0 and 1\.0; set them so"),
    ],
)
def test_an_objective_without_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_imports_nothing_from_the_other_layers() -> None:
    script = (
        "import sys, hawada.interlingua.trainer; print([m for m in sys.modules if m.startswith('hawada.adapters')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Held:
    """A tensor that autograd keeps for the backward pass; counts while it is kept."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.now += self.size
        Held.peak = max(Held.peak, Held.now)

    def __del__(self) -> None:
        Held.now -= self.size


def activation_peak(llms: dict[str, LMWrapper], messenger: Messenger, **options: Any) -> int:
    """Most bytes that autograd held at once in the backward pass of a step, weights left out."""
    weights = {p.data_ptr() for llm in llms.values() for p in llm.model.parameters()}
    weights |= {p.data_ptr() for p in messenger.parameters()}
    Held.now = Held.peak = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor | Held:
        return tensor if tensor.data_ptr() in weights else Held(tensor)

    def unpack(held: torch.Tensor | Held) -> torch.Tensor:
        return held.tensor if isinstance(held, Held) else held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        trainer(llms, messenger, Objective(), **options).backward(Recall(8, 8).train_batch(0, 16))
    assert Held.now == 0
    return Held.peak


@pytest.mark.parametrize("kind", ["soft", "keys"])
def test_one_model_at_a_time_holds_little_more_than_half(
    kind: str, make_llm: Callable[..., LMWrapper], make_messenger: Callable[..., Messenger]
) -> None:
    llms = {name: make_llm(name, word_tokenizer(), "llama", width=64) for name in ("one", "other")}
    joint = activation_peak(llms, make_messenger(llms, kind=kind))
    sequential = activation_peak(llms, make_messenger(llms, kind=kind), sequential=True)
    assert sequential <= 0.65 * joint
