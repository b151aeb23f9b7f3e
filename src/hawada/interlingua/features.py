"""Optional parts that are trained along with encoder and adapters; each is chosen by its `_target_`."""

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
    """The base class of features, which changes nothing; a feature overrides the hooks that it needs.

    Parameters and buffers of a feature are trained and saved with encoder and adapters.
    """

    def check(self, injection: str) -> None:
        """Check that the feature can be used; this is called before anything is loaded.

        Args:
            injection: how latents enter the language models, as soft tokens ("soft") or keys and values ("keys").

        Raises:
            ValueError: when the feature does not work with this injection, or a package is missing.
        """

    def attach(self, encoder: InterlinguaEncoder, llms: Mapping[str, LMWrapper]) -> None:
        """Make the parameters whose sizes depend on the models; this is called once, before training.

        Args:
            encoder: the encoder whose latents the models get.
            llms: the language models, by name.
        """

    def prefix(self, name: str, z: Tensor, prefix: Prefix) -> Prefix:
        """Return the prefix that a language model reads.

        Args:
            name: the name of the model.
            z: its latents, of shape (batch, latents, d_z).
            prefix: the prefix that it would read without this feature.
        """
        return prefix

    def losses(self, llm: LMWrapper, prefix: Prefix, examples: Sequence[Example], step: int) -> dict[str, Tensor]:
        """Return further terms of the loss by name, scalars that are already multiplied by their weights.

        Args:
            llm: the language model.
            prefix: what the model reads, with one row for each example.
            examples: the examples of the batch.
            step: the number of the training step, counted from 0.
        """
        return {}

    def metrics(self) -> dict[str, float]:
        """Return figures for the log, by name."""
        return {}


class DeepPrefix(Feature):
    """Give every layer keys and values beside the soft tokens: Li and Liang, Prefix-tuning, 2021.

    Args:
        hidden: the hidden width of the network from latents to keys and values.
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
    """Train low-rank changes of the language models themselves, with peft: Hu et al., LoRA, 2021.

    Wherever a model reads plain text, as a baseline or in distillation, the changes are switched off.

    Args:
        rank: the rank of each change.
        alpha: the strength; a change is multiplied by alpha / rank.
        targets: the names of the linear layers that are changed.
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
    """Warm up by reconstructing the text: each frozen model is to write out the context from its latents alone.

    Args:
        weight: the weight of the loss.
        until: the step from which the loss is left out.
        ask: the prompt that stands between the latents and the text.
        max_tokens: the most tokens of a context that are to be written; the rest is cut.
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
        targets = [[*text, llm.tokenizer.eos] for text in texts]
        reading = llm.read(prefix.rows(rows), [ask] * len(rows), targets)
        return {"reconstruction": self.weight * k_token_ce_from_prefix(reading.logits, reading.targets, reading.mask)}


class TextAlignment(Feature):
    """Warm up by aligning soft tokens with the text: each is drawn to the mean embedding of its share of the text.

    Args:
        weight: the weight of the loss, which is relative to the embeddings' mean square.
        until: the step from which the loss is left out.
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
        targets = segments(mask, prefix.soft.shape[1]).to(embeddings) @ embeddings  # (contexts, soft tokens, width)
        return {"alignment": self.weight * hidden_mse([prefix.soft[rows]], [targets])}


def _first_rows(examples: Sequence[Example]) -> list[int]:
    """Return the row of the first example of each different context."""
    first: dict[str, int] = {}
    for row, example in enumerate(examples):
        first.setdefault(example.context, row)
    return list(first.values())
