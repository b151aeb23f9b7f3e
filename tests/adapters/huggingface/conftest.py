"""Tiny models of every family whose weights, norms and biases are random, and random choices of units in them."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils import logging

from hawada.adapters.huggingface import LlamaAdapter, ViTAdapter
from hawada.core.latency import random_keep
from hawada.core.structure import ExportPolicy, keep_first, widths_of

# Stock configurations demand 8 | hidden_size of some families only, so that head_dim 6 = 48 / 8 can also be left out.
TEXT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
    "layer_norm_eps": 1e-12,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "mha": {"model_type": "llama", **TEXT, "num_key_value_heads": 8},
    "gqa4": {"model_type": "llama", **TEXT, "tie_word_embeddings": True, "rope_parameters": ROPE},
    "gqa8": {"model_type": "llama", **TEXT, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **TEXT, "head_dim": 6, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", **TEXT},
    "qwen3": {"model_type": "qwen3", **TEXT, "head_dim": 8},
    "smollm3": {"model_type": "smollm3", **TEXT, "no_rope_layer_interval": 2, "pad_token_id": 0},
    "vit": {"model_type": "vit", **VISION},
}


def build(family, *, stream=True, branches=False, **changes):
    """The adapter of a family and its teacher: fresh norms and biases would hide a gate on the wrong side of them."""
    adapter_class = ViTAdapter if family == "vit" else LlamaAdapter
    adapter = adapter_class(config=FAMILIES[family] | changes, stream=stream, branches=branches)
    torch.manual_seed(0)
    teacher = adapter.skeleton()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.8, std=0.3)
    return adapter, teacher


def choose_units(groups, seed, *, uniform=False):
    """Random widths and, within them, random units; one layer and one attention stay at least."""
    random = np.random.default_rng(seed)
    policy = ExportPolicy(minimum={"layer": 1, "attention": 1, "stream": 5}, uniform=uniform)
    widths = widths_of(random_keep(groups, policy, random), groups)
    order = {group.name: random.permutation(group.units).tolist() for group in groups}
    return keep_first(groups, widths, order)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """No progress bars of transformers between the test names."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def build_model():
    return build


@pytest.fixture(scope="session")
def random_units():
    return choose_units


@pytest.fixture(scope="session")
def families():
    return tuple(FAMILIES)
