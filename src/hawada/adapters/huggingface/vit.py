"""Vision Transformers for image classification: heads, FFN neurons, layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from hawada.adapters.base import Shape
from hawada.adapters.huggingface import hub
from hawada.adapters.huggingface.transformer import TransformerAdapter, cut_linear, linear
from hawada.core.structure import GatePoint, Group, Inputs


class ViTAdapter(TransformerAdapter):
    """Dosovitskiy et al., An Image is Worth 16x16 Words, 2020."""

    auto = "AutoModelForImageClassification"
    model_types = ("vit",)
    layers = "vit.layers"
    branches: ClassVar = {"attention": ("attention", "layernorm_before", 2), "mlp": ("mlp", "layernorm_after", 1)}
    writers: ClassVar = {"attention": "o_proj", "mlp": "fc2"}
    into_ffn = ("fc1",)
    layer_widths: ClassVar = {
        "num_attention_heads": ("attention.q_proj.weight", 0, True),
        "intermediate_size": ("mlp.fc1.weight", 0, False),
    }
    embedding = "vit.embeddings"
    stream_tensors: ClassVar = {
        "vit.embeddings.cls_token": 2,
        "vit.embeddings.position_embeddings": 2,
        "vit.embeddings.patch_embeddings.projection.weight": 0,
        "vit.embeddings.patch_embeddings.projection.bias": 0,
        "classifier.weight": 1,
    }
    last_norm = "vit.layernorm"
    norm = ("layer", "layer_norm_eps")

    def head_groups(self, model: PreTrainedModel, path: str, parent: str) -> list[Group]:
        size, out = self.head_dim(model), f"{path}.o_proj"
        rows = [cut for name in ("q_proj", "k_proj", "v_proj") for cut in cut_linear(model, f"{path}.{name}", 0, size)]
        return [
            Group(
                name=f"{path}.heads",
                kind="head",
                units=linear(model, out).in_features // size,
                gated_at=(GatePoint(out, "input", dim=-1, per_unit=size),),
                cuts=(*rows, *cut_linear(model, out, 1, size)),
                parent=parent,
            )
        ]

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and deviation in the checkpoint's image processor; 0.5 where it has none, the default of ViT's own."""
        if self.path is None:
            return None
        file = hub.fetch(self.path) / "preprocessor_config.json"
        record = json.loads(file.read_text()) if file.is_file() else {}
        half = [0.5] * self.pretrained_config().num_channels
        return record.get("image_mean", half), record.get("image_std", half)

    def example_inputs(self, shape: Shape) -> Inputs:
        config = self.pretrained_config()
        generator = torch.Generator().manual_seed(0)
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        return (torch.randn(shape.batch, config.num_channels, height, width, generator=generator, device="cpu"),)
