"""The whole pipeline on a ViT and a LLaMA, on a simulated device with far too little data: all but the quality."""

import json
import shutil
from pathlib import Path

import pytest
from command import hawada
from safetensors.torch import load_file

QUICK = (
    "gpu.timing=simulated",
    "schedule.pretrain=1",
    "schedule.train=1",
    "schedule.finetune=1",
    "profile.points=2",
    "profile.fitted_models=1",
    "profile.held_out_models=2",
    "runtime.threads=1",
)
TEXT = (
    "data.samples=48",
    "data.sequence_length=32",
    "budget.prompt=16",
    "budget.new_tokens=4",
    "budget.batch=2",
    "budget.target_ratio=0.85",
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights train along with the gates, with losses in chunks and hidden states compared."""
    root = tmp_path_factory.mktemp("llama")
    options = (
        "train=two_phase",
        "distill.chunk=40",
        "distill.hidden_weight=0.1",
        "groups.kind=[kv_head,query_head,ffn]",
    )
    options += (
        "data.limit_bytes=80000",
        "model.adapter.config.num_hidden_layers=2",
        "calibration.samples=16",
    )
    done = hawada("model=tiny_llama", f"output_dir={root}", "name=run", *QUICK, *TEXT, *options)
    assert done.code == 0, done.err
    return root / "run"


def test_a_language_model_is_slimmed_scored_and_proved(llama: Path) -> None:
    result = json.loads((llama / "result.json").read_text())
    assert result["verdict"] == "simulated" and result["metric"] == "perplexity"
    assert set(result["phases"]) == {"prefill", "decode"} and result["timed_as"]["phase"] == "prefill"
    assert result["slim"]["perplexity"] > 1 and result["slim"]["params"] < result["teacher"]["params"]
    reload = result["equivalence"]["reload"]
    assert reload["stock"] and reload["same_tokens"]
    assert reload["max_abs_diff"] <= 1e-5 * reload["max_abs_logit"]
    assert load_file(llama / "finetune" / "check_outputs.safetensors")["tokens"].shape == (4, 32)
    pretrain = json.loads((llama / "pretrain" / "result.json").read_text())
    assert 0 < pretrain["bits_per_byte"]["ngram"] < 8 and pretrain["bits_per_byte"]["model"] > 0


def test_the_folder_is_an_ordinary_checkpoint_with_a_card(llama: Path) -> None:
    folder = llama / "finetune" / "slim"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] in ("llama", "mistral") and config["head_dim"] == 16 and "auto_map" not in config
    assert (folder / "tokenizer.json").is_file() and not (folder / "modeling_slim.py").exists()
    card = (folder / "README.md").read_text()
    assert "| prefill, ms |" in card and "simulated device" in card and str(llama) not in card


def test_gates_beside_a_checkpoint_are_exported_without_training(llama: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(llama / "export" / "teacher", tmp_path / "checkpoint")
    shutil.copy(llama / "train" / "gates.safetensors", checkpoint)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Document {i}. " + "Once upon a time there was a bear. " * 80 for i in range(60)))
    options = (f"model.path={checkpoint}", f"data.path={corpus}", f"output_dir={tmp_path}", "name=run", "stage=export")
    gated = "groups.kind=[kv_head,query_head,ffn]"
    for stage in ("stage=profile", "stage=train", "stage=export"):
        done = hawada("model=llama", *QUICK, *TEXT, *options[:-1], stage, gated)
        assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "train" / "result.json").read_text())
    assert result["stopped"] == "adopted" and result["epochs"] == 0
    assert (tmp_path / "run" / "export" / "slim" / "model.safetensors").is_file()
    refused = hawada("model=llama", *QUICK, *TEXT, *options[:-1], "stage=train", "overwrite=true")
    assert refused.code == 2 and "gate the same groups" in refused.err


def test_a_vit_with_layers_of_its_own_widths_and_other_formats(tmp_path: Path, reload_here: None) -> None:
    options = (
        "export.layout=heterogeneous",
        "model.adapter.branches=true",
        "export.formats=[hf,pt2]",
        "budget.batch=8",
        "model.adapter.config.num_hidden_layers=2",
        "data.samples=128",
        "data.test_samples=100",
        "calibration.samples=32",
    )
    done = hawada("model=tiny_vit", f"output_dir={tmp_path}", "name=run", *QUICK, *options)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["equivalence"]["reload"]["stock"] and result["metric"] == "accuracy"
    parity = json.loads((tmp_path / "run" / "publish" / "result.json").read_text())["formats"]["pt2"]
    assert parity["max_abs_diff"] <= 1e-5 * parity["max_abs_logit"]
    assert (tmp_path / "run" / "publish" / "slim.pt2").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=tiny_llama", "export.formats=[onnx]"), "export.formats: onnx and pt2 are for image models"),
        (("model=tiny_llama", "data=digits"), "digits is not text data"),
        (("model=tiny_llama", "budget.phase=forward"), "budget.phase: forward is not a phase of LlamaAdapter"),
        (
            ("model=tiny_llama", "model.adapter.branches=true"),
            "export.layout: uniform cannot leave out single branches",
        ),
        (("model=tiny_vit", "distill.chunk=16"), "distill.chunk: only language models"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    done = hawada(f"output_dir={tmp_path}", *QUICK, *overrides)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.rglob("manifest.json"))
