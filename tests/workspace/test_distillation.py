"""Another teacher that was trained on images of another normalisation is shown the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import ViTConfig, ViTForImageClassification

from hawada.config import conf_dir, register_resolvers
from hawada.core.distill import Outputs
from hawada.experiment import Run
from hawada.workspace import Subject, check_distillation, make_distillation, open_stage
from hawada.workspace.distillation import _Renormalised

OURS, THEIRS = ((0.3,) * 3, (0.35,) * 3), ((0.5,) * 3, (0.25,) * 3)


def configured(tmp_path: Path, *overrides: str) -> Subject:
    register_resolvers()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", ["gpu.timing=simulated", "runtime.threads=1", f"output_dir={tmp_path}", *overrides])
    run = Run(tmp_path / "run", cfg)
    return open_stage(run.settings("train"), run)[0]


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A checkpoint for images of 32 pixels, normalised in its own way."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=16, image_size=32, patch_size=16, num_labels=10)
    ViTForImageClassification(config).eval().save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": THEIRS[0], "image_std": THEIRS[1]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "vit"


def test_images_reach_it_as_it_knows_them() -> None:
    pixels = torch.rand(4, 3, 5, 5)
    ours, theirs = ((pixels - mean[0]) / std[0] for mean, std in (OURS, THEIRS))

    def outputs(model: Any, inputs: torch.Tensor, *, features: bool, hidden: bool) -> Outputs:
        return Outputs(inputs)

    found = _Renormalised(outputs, OURS, THEIRS)(torch.nn.Identity(), ours, features=False, hidden=False)
    assert found.logits is not None and torch.allclose(found.logits, theirs, atol=1e-5)


def test_a_vit_teaches_a_resnet_on_the_same_pixels(vit: Path, tmp_path: Path) -> None:
    taught = configured(tmp_path, "teacher=vit", f"distill.teacher.path={vit}")
    check_distillation(taught, trains=True)
    distillation = make_distillation(taught)
    images, _ = next(iter(taught.data.calibration_loader(8, 8)))
    pixels = images * OURS[1][0] + OURS[0][0]
    model = ViTForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        expected = model((pixels - THEIRS[0][0]) / THEIRS[1][0]).logits
    targets = distillation.targets(torch.nn.Identity(), images).logits
    assert targets is not None and torch.allclose(targets, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.image_size=48", "model.adapter.image_size=48"],
            r"distill\.teacher: it does not take what tiny_resnet t",
        ),
        (["model.adapter.num_classes=12"], r"distill\.teacher: it knows 10 classes and tiny_resnet 12; choose one of"),
        (["distill.teacher.path=/nowhere"], r"distill\.teacher\.path: '/nowhere' does not exist; set it to a local"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(vit: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    refused = configured(tmp_path, "teacher=vit", f"distill.teacher.path={vit}", *overrides)
    with pytest.raises(ValueError, match=message):
        check_distillation(refused, trains=True)
    check_distillation(refused, trains=False)  # a stage that learns from nobody asks nothing of it
