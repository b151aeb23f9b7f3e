"""What may be trained along with encoder and adapters, each by its `_target_`: the trainer knows no names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hawada.core.distill import hidden_mse
from hawada.interlingua.adapter import PrefixAdapter
from hawada.interlingua.encoder import InterlinguaEncoder
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper, padded_right
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.losses import k_token_ce_from_prefix
from hawada.interlingua.pooling import segments


class Feature(nn.Module):
    """Nothing; a feature overrides the hooks that it needs. Its parameters and buffers are trained and saved along."""

    def check(self, injection: str) -> None:
        """Called before anything is loaded; `injection` is soft or keys.

        Raises:
            ValueError: when this feature does not go with it, or a package is missing.
        """

    def attach(self, encoder: InterlinguaEncoder, llms: Mapping[str, LMWrapper]) -> None:
        """Called once, before training: parameters whose sizes depend on the models are made here."""

    def prefix(self, name: str, z: Tensor, prefix: Prefix) -> Prefix:
        """What a model reads, given its latents, (batch, latents, d_z), and what it would read without the feature."""
        return prefix

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example], step: int) -> dict[str, Tensor]:
        """Further terms of the loss, by name: scalars with their weight; `prefix` has one row for each example."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Figures for the log, by name."""
        return {}


class DeepPrefix(Feature):
    """Keys and values for every layer beside the soft tokens: Li and Liang, Prefix-tuning, 2021.

    Args:
        hidden: width of the network between latents and keys.
    """

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = hidden
        self.adapters = nn.ModuleDict()

    def check(self, injection: str) -> None:
        if injection != "soft":
            raise ValueError("interlingua.features: DeepPrefix adds what keys have; set interlingua.injection=soft")

    def attach(self, encoder: InterlinguaEncoder, llms: Mapping[str, LMWrapper]) -> None:
        for name, llm in llms.items():
            self.adapters[name] = PrefixAdapter(encoder.d_z, encoder.latent_len, *llm.cache_shape, hidden=self.hidden)

    def prefix(self, name: str, z: Tensor, prefix: Prefix) -> Prefix:
        return Prefix(prefix.soft, prefix.mask, self.adapters[name](z).keys_values)


class LoRA(Feature):
    """Low-rank changes of the models themselves: Hu et al., LoRA, 2021; through peft.

    Rows that read text read it with the model as it came.

    Args:
        rank: of each change.
        alpha: changes are multiplied by alpha / rank.
        targets: names of the linear layers that are changed.
    """

    def __init__(self, rank: int = 8, alpha: int = 16, targets: Sequence[str] = ("q_proj", "v_proj")) -> None:
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, list(targets)
        self.weights = nn.ModuleDict()

    def check(self, injection: str) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ValueError("interlingua.features: LoRA needs peft; pip install 'hawada[lora]'")

    def attach(self, encoder: InterlinguaEncoder, llms: Mapping[str, LMWrapper]) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, lora_dropout=0.0)
        for name, llm in llms.items():
            inject_adapter_in_model(config, llm.model)
            own = [weight for path, weight in llm.model.named_parameters() if ".lora_" in path]
            for weight in own:
                weight.requires_grad_(True)
            self.weights[name] = nn.ParameterList(own)
            llm.extras += [layer for layer in llm.model.modules() if isinstance(layer, BaseTunerLayer)]


class Reconstruction(Feature):
    """A warm-up: from its latents alone, each frozen model must write out the text.

    Args:
        weight: of the loss.
        until: the step at which it ends.
        ask: what stands between latents and text.
        max_tokens: of the text.
    """

    def __init__(self, weight: float = 1.0, until: int = 500, ask: str = "?", max_tokens: int = 256) -> None:
        super().__init__()
        self.weight, self.until, self.ask, self.max_tokens = weight, until, ask, max_tokens

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example], step: int) -> dict[str, Tensor]:
        if step >= self.until:
            return {}
        ask = llm.tokenizer.encode(self.ask)
        if not ask:
            raise ValueError(f"interlingua.features: Reconstruction.ask={self.ask!r} has no token; set it to some text")
        rows = _first_rows(examples)
        texts = [llm.tokenizer.encode(examples[row].context)[: self.max_tokens] for row in rows]
        ends = [[*text, llm.tokenizer.eos] for text in texts]
        said = llm.read(prefix.rows(rows), [ask] * len(rows), ends)
        return {"reconstruction": self.weight * k_token_ce_from_prefix(said.logits, said.targets, said.mask)}


class TextAlignment(Feature):
    """A warm-up from text: each soft token begins as the mean of the embeddings of its share of the text.

    Args:
        weight: of the loss, which is relative to the embeddings' mean square.
        until: the step at which it ends.
    """

    def __init__(self, weight: float = 1.0, until: int = 500) -> None:
        super().__init__()
        self.weight, self.until = weight, until

    def check(self, injection: str) -> None:
        if injection != "soft":
            raise ValueError("interlingua.features: TextAlignment is for soft tokens; set interlingua.injection=soft")

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example], step: int) -> dict[str, Tensor]:
        if step >= self.until or prefix.soft is None:
            return {}
        rows = _first_rows(examples)
        ids, mask = padded_right([llm.tokenizer.encode(examples[row].context) for row in rows], llm.device)
        embeddings = llm.embed(ids).float()
        wanted = segments(mask, prefix.soft.shape[1]).to(embeddings) @ embeddings
        return {"alignment": self.weight * hidden_mse([prefix.soft[rows]], [wanted])}


def _first_rows(examples: Sequence[Example]) -> list[int]:
    """The first example of each different context."""
    first: dict[str, int] = {}
    for row, example in enumerate(examples):
        first.setdefault(example.context, row)
    return list(first.values())
