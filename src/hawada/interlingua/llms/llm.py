"""A frozen language model that reads a prefix and answers questions on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hawada.interlingua.examples import Example
from hawada.interlingua.llms.prefix import KeysValues, Prefix
from hawada.interlingua.llms.tokenizers import Tokenizer

BOS_POLICIES = ("auto", "yes", "no")


@dataclass(frozen=True)
class Reading:
    """What a model computes at the positions that predict the answers.

    Attributes:
        logits: the logits that predict answer token t at index t, of shape (batch, tokens, vocabulary).
        targets: ids of the right answers with their end tokens, of shape (batch, tokens).
        mask: a mask of shape (batch, tokens), True where the answer has a token t.
        hidden: hidden states of every layer at the same positions, each (batch, tokens, width); empty unless they were
            asked for.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Template:
    """The text around context and question in a prompt.

    Attributes:
        question: the text that follows the context, with `{question}` in it.
        anchor: the text just before the answer, such as "Answer: ".
        head: the beginning of a chat, special tokens included, before the context; it replaces the begin token.
        tail: the end of the user's turn in a chat and the beginning of the model's, just before the anchor.
    """

    question: str = "\nQuestion: {question}\n"
    anchor: str = "Answer: "
    head: str = ""
    tail: str = ""

    def prompt(self, question: str) -> str:
        """Return everything between context and answer."""
        return self.question.format(question=question) + self.tail + self.anchor.rstrip(" ")

    @property
    def space(self) -> str:
        """The spaces that end the anchor; tokenizers join them to the next word, so they are moved to the answer."""
        return self.anchor[len(self.anchor.rstrip(" ")) :]


class Switch(Protocol):
    """A layer that changes the outputs of a model and can be switched off, such as those of peft."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the change on or off."""


class LMWrapper:
    """Wrap a causal language model of the transformers library, whose weights never change here.

    A sequence is [begin or chat header] [prefix] [question, anchor] [answer, end]. Questions are padded on the left and
    answers on the right, so that every answer begins at the same index; padding takes no position and is not attended
    to.

    Args:
        name: the name of the model in results.
        model: a model that takes input embeddings, cache and mask as those of transformers do.
        tokenizer: the tokenizer of the model.
        template: the text around context and question.
        bos: whether a sequence begins with the begin token: "yes", "no", or "auto", where the tokenizer has one. A chat
            header has its own; "yes" adds the token to a header that has none.
        stop: a text at which an answer ends, beside the end token; empty for none.

    Attributes:
        begin: the ids before the prefix.
        extras: layers that features added to the model, which `as_pretrained` switches off.

    Raises:
        ValueError: when `bos` is not one of `BOS_POLICIES`, or is "yes" and the tokenizer has no begin token.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        template: Template,
        bos: str = "auto",
        stop: str = "",
    ) -> None:
        if bos not in BOS_POLICIES:
            raise ValueError(f"llms.bos: {bos!r} is not one of {', '.join(BOS_POLICIES)}; set it to one of them")
        if bos == "yes" and tokenizer.bos is None:
            raise ValueError(f"llms.bos: the tokenizer of {name} has no begin token; set it to auto or no")
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self.model: Any = model.requires_grad_(False).eval()
        self.begin = tokenizer.encode(template.head) if template.head else []
        begins = bos == "yes" or (bos == "auto" and not template.head)
        if begins and tokenizer.bos is not None and self.begin[:1] != [tokenizer.bos]:
            self.begin.insert(0, tokenizer.bos)
        self.extras: list[Switch] = []
        self.stop = stop
        self._begin_keys_values: Any = None

    @property
    def device(self) -> torch.device:
        """The device that the embeddings are on."""
        return self._embedding_weight.device

    @property
    def width(self) -> int:
        """The width of the input embeddings."""
        return self._embedding_weight.shape[1]

    @property
    def _embedding_weight(self) -> Tensor:
        """The input embeddings of all tokens, (vocabulary, width)."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @cached_property
    def embedding_rms(self) -> float:
        """The root mean square of the input embeddings; on the meta device, the one that they are initialised with."""
        weight = self._embedding_weight.detach()
        if weight.is_meta:
            return float(self.model.config.initializer_range)
        return float(weight.float().square().mean().sqrt())

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """The number of layers, of key-value heads in each layer, and the width of a head."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, width

    @contextmanager
    def as_pretrained(self, pretrained: bool = True) -> Iterator[None]:
        """Switch off what features added to the model, within a `with` block; with False, change nothing."""
        switched = self.extras if pretrained else []
        for extra in switched:
            extra.enable_adapters(False)
        try:
            yield
        finally:
            for extra in switched:
                extra.enable_adapters(True)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the input embeddings of ids (batch, tokens), as (batch, tokens, width)."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the ids between context and answer for each example."""
        return [self.tokenizer.encode(self.template.prompt(example.question)) for example in examples]

    def targets(self, examples: Sequence[Example]) -> list[list[int]]:
        """Return the ids of each example's first answer and the end token; the end alone where there is no answer."""
        return [self.target_ids(example.answers[0] if example.answers else "") for example in examples]

    def target_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer, with the space before it, and the end token; the end alone for no answer.

        Raises:
            UnknownText: when the tokenizer has no tokens for the answer.
        """
        return [*(self.tokenizer.encode(self.template.space + answer) if answer else []), self.tokenizer.eos]

    def answer_text(self, ids: Sequence[int]) -> str:
        """Return the answer in generated ids: their text up to `stop`."""
        text = self.tokenizer.decode(ids).lstrip()
        return text.partition(self.stop)[0].rstrip() if self.stop else text

    def text(self, ids: Sequence[Sequence[int]]) -> Prefix:
        """Return the input embeddings of contexts as a prefix, from the ids of each."""
        padded, mask = padded_right(ids, self.device)
        return Prefix(self.embed(padded), mask)

    def read(
        self,
        prefix: Prefix,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Reading:
        """Run the model on prefix, prompts and right answers (teacher forcing); gradients flow into the prefix.

        Args:
            prefix: the prefix, with one row for each prompt.
            prompts: the ids between context and answer, a row for each example.
            targets: the ids of the right answer with its end token, a row for each example.
            hidden: whether hidden states are returned too.
        """
        prompt_ids, prompt_mask = padded_left(prompts, self.device)
        target_ids, mask = padded_right(targets, self.device)
        ids = torch.cat([prompt_ids, target_ids[:, :-1]], 1)
        last = target_ids.shape[1]
        out = self._forward(prefix, ids, torch.cat([prompt_mask, mask[:, :-1]], 1), last, hidden=hidden)
        states = tuple(state[:, -last:] for state in out.hidden_states) if hidden else ()
        return Reading(out.logits, target_ids, mask, states)

    @torch.no_grad()
    def generate(self, prefix: Prefix, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Generate answers greedily.

        Args:
            prefix: the prefix, with one row for each prompt.
            prompts: the ids between context and answer, a row for each example.
            max_new_tokens: the most tokens of an answer.

        Returns:
            The ids of each answer up to its end token, which is left out.
        """
        ids, mask = padded_left(prompts, self.device)
        out = self._forward(prefix, ids, mask, 1, cached=True)
        attended = out.attention_mask
        position = attended.sum(1, keepdim=True)
        generated: list[list[int]] = [[] for _ in prompts]
        cache = {_cache_name(): getattr(out, _cache_name())}
        unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        token = out.logits[:, -1].argmax(-1)
        for count in range(1, max_new_tokens + 1):
            unfinished &= token != self.tokenizer.eos
            for row in unfinished.nonzero().flatten().tolist():
                generated[row].append(int(token[row]))
            if count == max_new_tokens or not bool(unfinished.any()):
                break
            attended = torch.cat([attended, attended.new_ones(len(attended), 1)], 1)
            step = self.model(
                input_ids=token[:, None],
                attention_mask=attended,
                position_ids=position,
                use_cache=True,
                **cache,
            )
            token, position = step.logits[:, -1].argmax(-1), position + 1
        return generated

    def _forward(
        self, prefix: Prefix, ids: Tensor, mask: Tensor, last: int, *, hidden: bool = False, cached: bool = False
    ) -> Any:
        """Run the model on [begin] [prefix] [ids].

        Args:
            prefix: the prefix, with one row for each row of ids.
            ids: the ids behind it, (batch, tokens).
            mask: a mask of shape (batch, tokens), True where there is a token.
            last: for how many of the last indices logits are computed.
            hidden: whether hidden states are returned.
            cached: whether keys and values are returned.

        Returns:
            The output of the model, with the mask that it attended to as `attention_mask`.
        """
        embeddings, masks = [self.embed(ids)], [mask]
        if prefix.soft is not None:
            embeddings.insert(0, prefix.soft.to(embeddings[0]))
            masks.insert(0, mask.new_ones(prefix.soft.shape[:2]) if prefix.mask is None else prefix.mask)
        past = None
        if prefix.keys_values:
            past = self._cache(prefix.keys_values, len(ids))
        elif self.begin:
            embeddings.insert(0, self.embed(ids.new_tensor([self.begin])).expand(len(ids), -1, -1))
            masks.insert(0, mask.new_ones(len(ids), len(self.begin)))
        visible = torch.cat(masks, 1)
        before = past.get_seq_length() if past is not None else 0
        attended = torch.cat([visible.new_ones(len(ids), before), visible], 1).long()
        out = self.model(
            inputs_embeds=torch.cat(embeddings, 1),
            attention_mask=attended,
            position_ids=(visible.long().cumsum(1) - 1).clamp_min(0) + before,
            use_cache=cached or past is not None,
            output_hidden_states=hidden,
            logits_to_keep=last,
            **{_cache_name(): past},
        )
        out.attention_mask = attended
        return out

    def _cache(self, keys_values: KeysValues, rows: int) -> Any:
        """Make a cache of the keys and values of `begin`, if any, and then those of the prefix, for so many rows."""
        from transformers import DynamicCache

        begin = self._begin_cache() if self.begin else None
        weight = self._embedding_weight
        cache = DynamicCache()
        for index, (keys, values) in enumerate(keys_values):
            keys, values = keys.to(weight), values.to(weight)
            if begin is not None:
                first = begin.layers[index]
                keys = torch.cat([first.keys.expand(rows, -1, -1, -1), keys], 2)
                values = torch.cat([first.values.expand(rows, -1, -1, -1), values], 2)
            cache.update(keys, values, index)
        return cache

    def _begin_cache(self) -> Any:
        """Return keys and values of `begin`; they are computed once, unless features change the model."""
        ids = torch.tensor([self.begin], device=self.device)
        if self.extras:
            return getattr(self.model(input_ids=ids, use_cache=True), _cache_name())
        if self._begin_keys_values is None or self._begin_keys_values.layers[0].keys.device != self.device:
            with torch.no_grad():
                self._begin_keys_values = getattr(self.model(input_ids=ids, use_cache=True), _cache_name())
        return self._begin_keys_values


def _cache_name() -> str:
    """Return `CACHE_NAME`, imported late: a model that is called has loaded the transformers library already."""
    from hawada.adapters.huggingface import CACHE_NAME

    return CACHE_NAME


def padded_right(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows of ids with 0 behind; return the ids and a mask that is True for each id given, both (rows, longest)."""
    return _padded(rows, device, left=False)


def padded_left(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows of ids with 0 in front; return ids and mask like `padded_right`."""
    return _padded(rows, device, left=True)


def _padded(rows: Sequence[Sequence[int]], device: torch.device | None, *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=0)
    empty = [[0] * (longest - len(row)) for row in rows]
    filled = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, empty, strict=True)]
    ids = torch.tensor(filled, dtype=torch.long).view(len(rows), longest)
    lengths, places = torch.tensor([len(row) for row in rows]).view(-1, 1), torch.arange(longest)
    mask = places >= longest - lengths if left else places < lengths
    return ids.to(device), mask.to(device)
