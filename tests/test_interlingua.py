"""The interlingua by the command: tiny models, a few steps, everything but the quality."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import hawada

QUICK = (
    "data=recall",
    "data.pairs=2",
    "runtime.threads=1",
    "gpu.device=cpu",
    "gpu.timing=simulated",
    "llms.training.steps=3",
    "llms.training.pairs=2",
    "llms.training.text_em=0",
    "llms.llama.config.hidden_size=16",
    "llms.qwen.config.hidden_size=16",
    "llms.llama.config.num_hidden_layers=1",
    "llms.qwen.config.num_hidden_layers=2",
    "interlingua.latent_len=2",
    "interlingua.d_z=8",
    "interlingua.encoder.width=16",
    "interlingua.adapter.hidden=16",
    "interlingua.schedule.steps=30",
    "interlingua.schedule.contexts=4",
    "interlingua.save_every=5",
    "evaluate.prompt_steps=2",
    "interlingua.test_contexts=8",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage=interlingua."""
    root = tmp_path_factory.mktemp("interlingua")
    done = hawada("stage=interlingua", f"output_dir={root}", "name=run", *QUICK)
    assert done.code == 0, done.err
    return root


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_training_says_how_each_model_answers(finished: Path) -> None:
    llms = read(finished / "run" / "interlingua-llms" / "result.json")
    assert set(llms["llama"]["text_em"]) == {"2"} and (finished / "run" / "interlingua-llms" / "qwen").is_dir()
    result = read(finished / "run" / "interlingua" / "result.json")
    assert set(result["scores"]) == {"llama", "qwen"}
    lines = [json.loads(line) for line in (finished / "run" / "interlingua" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 31, 5))
    assert {"cosine", "llama.top1_over_shuffled", "qwen.different_answers", "llama.answer_ce"} <= set(lines[0])


def test_the_evaluation_has_every_row_and_what_it_costs(finished: Path) -> None:
    done = hawada("stage=interlingua-eval", f"output_dir={finished}", "name=run", *QUICK)
    assert done.code == 0, done.err
    result = read(finished / "run" / "interlingua-eval" / "result.json")
    rows = {"text", "oracle embeddings", "latents", "latents int8", "latents int4", "shuffled latents", "zero latents"}
    rows |= {"prompt tuning", "head", "tail", "random tokens", "nothing"}
    for model in result["models"].values():
        assert set(model["rows"]) == rows
        assert model["rows"]["text"]["nll"] == pytest.approx(model["rows"]["oracle embeddings"]["nll"], abs=1e-5)
        assert set(model["prefill"]) == {"batch", "latents", "latents with encoding"}
        assert set(model["prefill"]["latents"]) == {"text_ms", "latency_ms", "ratio", "noisy"}
    assert result["guessing"]["values without keys"] == 0.5 and not result["query_aware"]
    assert result["answers_shown_to_encoder"] == 1.0
    assert (finished / "run" / "interlingua-eval" / "rows.md").read_text().count("\n") == 2 + 2 * len(rows)


def test_no_other_mode_than_the_eager_one_is_timed(finished: Path, tmp_path: Path) -> None:
    for stage in ("interlingua-llms", "interlingua"):
        shutil.copytree(finished / "run" / stage, tmp_path / "run" / stage)
    done = hawada("stage=interlingua-eval", f"output_dir={tmp_path}", "name=run", *QUICK, "runtime=cudagraph")
    assert done.code == 2 and "runtime.mode: prompts are timed eagerly, not by cudagraph" in done.err


def test_a_run_that_was_killed_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "interlingua-llms", tmp_path / "run" / "interlingua-llms")
    script = "import sys; from hawada.cli import main; sys.argv[0] = 'hawada'; main()"
    arguments = ["stage=interlingua", f"output_dir={tmp_path}", "name=run", *QUICK]
    folder = tmp_path / "run" / "interlingua"
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=os.environ)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
        if len(lines) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists() and (folder / "last").is_dir()
    done = hawada(*arguments)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 31, 5))
    for name in ("last", "best"):
        own = (folder / name / "tensors.safetensors").read_bytes()
        assert own == (finished / "run" / "interlingua" / name / "tensors.safetensors").read_bytes()


def test_a_multirun_shares_the_models_and_an_evaluation_of_it_finds_them(tmp_path: Path) -> None:
    fixed = (override for override in QUICK if not override.startswith(("interlingua.latent_len", "interlingua.sched")))
    others = ("interlingua.encoder_type=states", "interlingua.schedule.steps=5", f"output_dir={tmp_path}", *fixed)
    for stage in ("interlingua", "interlingua-eval"):
        done = hawada("-m", f"stage={stage}", "interlingua.latent_len=1,2", *others)
        assert done.code == 0, done.err
    assert len(list(tmp_path.rglob("interlingua-llms/manifest.json"))) == 1
    for latents in (1, 2):
        folder = tmp_path / "interlingua" / f"interlingua.latent_len={latents}" / "interlingua-eval"
        llama = read(folder / "result.json")["models"]["llama"]
        assert llama["rows"]["latents"]["tokens"] == latents
        # two facts are four tokens; one layer, keys and values of four heads of width 4, two bytes each
        assert llama["cache_bytes_saved"] == (4 - latents) * 2 * 4 * 4 * 2


def test_models_that_cannot_recall_from_text_are_refused(tmp_path: Path) -> None:
    done = hawada("stage=interlingua-llms", f"output_dir={tmp_path}", *QUICK, "llms.training.text_em=0.99")
    assert done.code == 1 and "and 99.0% are asked for; raise llms.training.steps" in done.err
    assert not list(tmp_path.rglob("manifest.json"))


OWN = """
import torch
from hawada.interlingua.features import Feature

class First(torch.nn.Module):
    def __init__(self, latents, width):
        super().__init__()
        self.latents = latents
    def forward(self, features, mask):
        return features[:, : self.latents]

class Drift(Feature):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.drift = torch.nn.Parameter(torch.ones(()))
    def losses(self, llm, prefix, examples, step):
        return {"size": self.weight * self.drift.square()}
    def metrics(self):
        return {"drift": self.drift.item()}
"""


def test_pooling_and_features_of_ones_own_take_a_line_of_configuration(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_parts.py").write_text(OWN)
    shutil.copytree(finished / "run" / "interlingua-llms", tmp_path / "run" / "interlingua-llms")
    own = (
        "interlingua.pooling._target_=own_parts.First",
        "+interlingua.features.own={_target_: own_parts.Drift, weight: 2.0}",
        "feature=deep_prefix",
        "interlingua.injection=soft",
        "interlingua.private_len=1",
        "interlingua.schedule.steps=5",
    )
    for stage in ("interlingua", "interlingua-eval"):
        done = hawada(f"stage={stage}", f"output_dir={tmp_path}", "name=run", *QUICK, *own)
        assert done.code == 0, done.err
    (line,) = map(json.loads, (tmp_path / "run" / "interlingua" / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["own.drift"] < 1 and line["llama.own.size"] == pytest.approx(line["qwen.own.size"])
    result = read(tmp_path / "run" / "interlingua-eval" / "result.json")
    assert result["payload_bytes"]["fp16"] == (1 + 2) * 8 * 2  # a shared latent, and one of each model's own
    assert result["models"]["llama"]["rows"]["latents"]["tokens"] == 2 * 2  # soft tokens, and keys beside them


def test_no_latents_are_trained_and_evaluated_too(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "interlingua-llms", tmp_path / "run" / "interlingua-llms")
    short = (*QUICK, "interlingua.latent_len=0", "interlingua.schedule.steps=5")
    for stage in ("interlingua", "interlingua-eval"):
        done = hawada(f"stage={stage}", f"output_dir={tmp_path}", "name=run", *short)
        assert done.code == 0, done.err
    for model in read(tmp_path / "run" / "interlingua-eval" / "result.json")["models"].values():
        assert model["rows"]["latents"] == model["rows"]["nothing"]


SENTENCES = [f"The {color} house stands in {city}." for color in ("red", "blue") for city in ("Paris", "Rome", "Oslo")]


def write_checkpoint(folder: Path, model_type: str, width: int) -> None:
    """A tiny language model with random weights and a tokenizer of bytes, as transformers saves them."""
    import tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = AutoConfig.for_model(
        model_type, vocab_size=260, hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("own", [("interlingua.query_aware=true",), ("interlingua.injection=soft", "feature=lora")])
def test_pretrained_models_answer_questions_on_real_texts(tmp_path: Path, own: tuple[str, ...]) -> None:
    rows = [
        {"context": f"{text} It is {age} years old.", "question": question, "answers": {"text": [answer]}}
        for age, text in enumerate(SENTENCES * 2)
        for question, answer in (("Where is it?", text[:-1].split()[-1]), ("How old is it?", str(age)))
    ]
    (tmp_path / "train.json").write_text(json.dumps({"data": rows}))
    write_checkpoint(tmp_path / "one", "llama", 16)
    write_checkpoint(tmp_path / "two", "qwen2", 24)
    overrides = (
        "data=squad",
        f"data.path={tmp_path / 'train.json'}",
        "data.test_fraction=0.3",
        f"interlingua.llama_id={tmp_path / 'one'}",
        f"interlingua.qwen_id={tmp_path / 'two'}",
        "interlingua.epochs=1",
        *(override for override in QUICK if not override.startswith(("data", "llms", "interlingua.schedule.steps"))),
        *own,
    )
    for stage in ("interlingua", "interlingua-eval"):
        done = hawada(f"stage={stage}", f"output_dir={tmp_path}", "name=run", *overrides)
        assert done.code == 0, done.err
    result = read(tmp_path / "run" / "interlingua-eval" / "result.json")
    assert result["answers_shown_to_encoder"] == 1.0 and result["query_aware"] == ("query_aware" in own[0])
    for model in result["models"].values():
        assert model["rows"]["text"]["nll"] == pytest.approx(model["rows"]["oracle embeddings"]["nll"], abs=1e-4)
        assert model["context_tokens"] > 40 and model["rows"]["head"]["tokens"] == 2


REAL = {
    "llama": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
             "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("injection", ["soft", "keys"])
def test_a_dry_run_of_real_models_needs_no_weights(tmp_path: Path, injection: str) -> None:
    """Llama-3.1-8B and Qwen2.5-7B: config.json alone."""
    for name, config in REAL.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    ids = [f"interlingua.{name}_id={tmp_path / name}" for name in REAL]
    sizes = ("interlingua.latent_len=32", "interlingua.d_z=256", f"interlingua.injection={injection}")
    done = hawada("stage=interlingua-dry", "llms=pretrained", f"output_dir={tmp_path}", *ids, *sizes)
    assert done.code == 0, done.err
    result = read(tmp_path / "interlingua" / "interlingua-dry" / "result.json")
    llama, qwen = result["models"]["llama"], result["models"]["qwen"]
    assert (llama["parameters"], qwen["parameters"]) == (8_030_261_248, 7_615_616_512)
    assert llama["latents"] == qwen["latents"] == [1, 32, 256]
    if injection == "soft":
        assert (llama["prefix"], qwen["prefix"]) == ({"soft": [1, 32, 4096]}, {"soft": [1, 32, 3584]})
    else:
        assert llama["prefix"] == {"keys_values": [32, 2, 1, 8, 32, 128]}
        assert qwen["prefix"] == {"keys_values": [28, 2, 1, 4, 32, 128]}
    assert (llama["logits"][-1], qwen["logits"][-1]) == (128256, 152064)
    assert llama["cache_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert 0 < llama["trainable"] + qwen["trainable"] < result["trainable"]
    assert result["payload_bytes"]["fp16"] == 32 * 256 * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=digits",), "data: hawada.data.digits has no questions; choose data=recall, squad or hotpotqa"),
        (("data=recall", "data.pairs=9"), "data.pairs: 9 is more than the 8 that the models are trained to recall"),
        (("data=recall", "interlingua.latent_len=-1"), "interlingua.latent_len: -1 is not"),
        (("data=recall", "interlingua.injection=hope"), "interlingua.injection: 'hope' is not one of soft, keys"),
        (("data=recall", "interlingua.private_len=5"), "interlingua.private_len: 5 is not between 0 and"),
        (
            ("data=recall", "interlingua.objective.k=0"),
            "interlingua.objective.k: 0 is not a whole number of at least 1",
        ),
        (("data=recall", "interlingua.epochs=1"), "interlingua.epochs: data=recall has no end"),
        (("data=recall", "interlingua.test_contexts=1"), "interlingua.test_contexts: 1 is not"),
        (("data=recall", "interlingua.encoder.heads=3"), "interlingua.encoder.heads: 3 do not divide"),
        (("data=recall", "feature=deep_prefix"), "DeepPrefix adds what keys have; set interlingua.injection=soft"),
        (
            ("data=recall", "llms.training.pairs=1", "data.pairs=1"),
            "llms.training.pairs: 1 is not a whole number of at least 2",
        ),
        (("data=recall", "llms.training.pairs=999", "data.pairs=1"), "llms.training.pairs: 999 is not between 2 and"),
        (("data=recall", "llms.llama.source=x"), "llms: one model has a source and the other has none"),
        (("data=squad", "interlingua.llama_id=nobody/nothing"), "interlingua.llama_id: nobody/nothing"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    done = hawada("stage=interlingua", f"output_dir={tmp_path}", *overrides)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))
