"""LLaMA and what shares its layout (Mistral, Qwen2, Qwen3, SmolLM): KV heads, query heads, FFN neurons, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, MistralConfig, PreTrainedConfig, PreTrainedModel

from hawada.adapters.base import Shape
from hawada.adapters.huggingface import hub
from hawada.adapters.huggingface.byte_tokenizer import byte_tokenizer
from hawada.adapters.huggingface.phases import Decode, Generate, Prefill
from hawada.adapters.huggingface.transformer import TransformerAdapter, cut_linear, linear
from hawada.core.structure import GatePoint, Group, Inputs


class LlamaAdapter(TransformerAdapter):
    """Touvron et al., LLaMA, 2023; grouped-query attention: Ainslie et al., GQA, 2023.

    A KV head goes together with its query heads; of the query heads, every KV head keeps the same number. A model that
    is made from a `config` reads bytes.
    """

    auto = "AutoModelForCausalLM"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    modality = "text"
    phases = ("prefill", "decode", "generate")
    layers = "model.layers"
    branches: ClassVar = {
        "attention": ("self_attn", "input_layernorm", 2),
        "mlp": ("mlp", "post_attention_layernorm", 1),
    }
    writers: ClassVar = {"attention": "o_proj", "mlp": "down_proj"}
    into_ffn = ("gate_proj", "up_proj")
    layer_widths: ClassVar = {
        "num_attention_heads": ("self_attn.q_proj.weight", 0, True),
        "num_key_value_heads": ("self_attn.k_proj.weight", 0, True),
        "intermediate_size": ("mlp.down_proj.weight", 1, False),
    }
    embedding = "model.embed_tokens"
    stream_tensors: ClassVar = {"model.embed_tokens.weight": 1, "lm_head.weight": 1}
    head = "lm_head"
    last_norm = "model.norm"
    norm = ("rms", "rms_norm_eps")

    def head_groups(self, model: PreTrainedModel, path: str, parent: str) -> list[Group]:
        size = self.head_dim(model)
        heads, kv_heads = (linear(model, f"{path}.{name}").out_features // size for name in ("q_proj", "k_proj"))
        share, out = heads // kv_heads, f"{path}.o_proj"
        kv = Group(
            name=f"{path}.kv",
            kind="kv_head",
            units=kv_heads,
            gated_at=(GatePoint(out, "input", dim=-1, per_unit=size * share),),
            cuts=(
                *cut_linear(model, f"{path}.q_proj", 0, size * share),
                *cut_linear(model, f"{path}.k_proj", 0, size),
                *cut_linear(model, f"{path}.v_proj", 0, size),
                *cut_linear(model, out, 1, size * share),
            ),
            parent=parent,
        )
        if share == 1:
            return [kv]
        query = Group(
            name=f"{path}.query",
            kind="query_head",
            units=heads,
            gated_at=(GatePoint(out, "input", dim=-1, per_unit=size),),
            cuts=(*cut_linear(model, f"{path}.q_proj", 0, size), *cut_linear(model, out, 1, size)),
            parent=kv.name,
            equal_per_parent=share,
            attributes=(f"{path}.num_key_value_groups",),
        )
        return [kv, query]

    def check_layout(self, layout: str, groups: Sequence[Group]) -> None:
        super().check_layout(layout, groups)
        config = self.pretrained_config()
        if layout == "uniform" and config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
            raise ValueError(
                "export.layout: uniform would need the heads of a llama with biases to divide its hidden size, which "
                "transformers demands of that type; set export.layout=heterogeneous"
            )

    def uniform_config(self, stock: type[PreTrainedConfig], settings: Mapping[str, Any]) -> PreTrainedConfig | None:
        """The family's own configuration; `mistral` for a bias-free llama whose heads do not divide its stream."""
        if stock.model_type != "llama" or settings["hidden_size"] % settings["num_attention_heads"] == 0:
            return stock(**settings)
        if settings["attention_bias"] or settings["mlp_bias"]:
            return None
        dropped = ("model_type", "attention_bias", "mlp_bias", "pretraining_tp")
        return MistralConfig(**{k: v for k, v in settings.items() if k not in dropped}, sliding_window=None)

    def check_shape(self, shape: Shape) -> None:
        super().check_shape(shape)
        longest = self.pretrained_config().max_position_embeddings
        if shape.prompt + shape.new_tokens > longest:
            raise ValueError(
                f"budget.prompt: {shape.prompt} tokens and budget.new_tokens {shape.new_tokens} exceed the {longest} "
                "positions of the model; lower them"
            )

    def example_inputs(self, shape: Shape) -> Inputs:
        vocabulary = self.pretrained_config().vocab_size
        length = 1 if shape.phase == "decode" else shape.prompt
        generator = torch.Generator().manual_seed(0)
        return (torch.randint(0, vocabulary, (shape.batch, length), generator=generator, device="cpu"),)

    def workload(self, model: nn.Module, shape: Shape) -> nn.Module:
        assert isinstance(model, PreTrainedModel)
        length = shape.prompt + shape.new_tokens
        if shape.phase == "prefill":
            return Prefill(model, length)
        if shape.phase == "decode":
            return Decode(model, shape.prompt, length)
        return Generate(model, shape.new_tokens, length) if shape.phase == "generate" else model

    def parts(self, model: nn.Module, shape: Shape) -> list[tuple[float, nn.Module, Shape]]:
        if shape.phase != "generate":
            return super().parts(model, shape)
        both = [(1.0, "prefill"), (shape.new_tokens - 1.0, "decode")]
        shapes = [(times, Shape(shape.batch, phase, shape.prompt, shape.new_tokens)) for times, phase in both]
        return [(times, self.workload(model, part), part) for times, part in shapes if times]

    def greedy_tokens(self, model: nn.Module, inputs: Inputs, count: int) -> Tensor:
        tokens: Tensor = model.generate(  # type: ignore[operator]  # every causal model has it
            inputs[0],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            attention_mask=torch.ones_like(inputs[0]),
            pad_token_id=0,
        )
        return tokens[:, inputs[0].shape[1] :]

    def tokenizer(self) -> Any:
        """The checkpoint's own; bytes for a model that is trained here."""
        if self.path is None:
            return byte_tokenizer()
        return AutoTokenizer.from_pretrained(hub.fetch(self.path), local_files_only=True)

    def write_companions(self, path: Path) -> None:
        if self.path is None:
            byte_tokenizer().save_pretrained(path)
        else:
            super().write_companions(path)
