"""A frozen language model that answers questions on what a prefix tells it."""

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
    """What a model says at the answers' positions.

    Attributes:
        logits: from which answer token t is predicted, (batch, tokens, vocabulary).
        targets: the answers with their ends, (batch, tokens).
        mask: (batch, tokens), True where the answer has such a token.
        hidden: states of every layer at the same positions, (batch, tokens, width); empty unless asked for.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Template:
    """How a question is put to a model.

    Attributes:
        question: with `{question}` in it; it follows the context.
        anchor: what comes just before the answer, such as "Answer: ".
        head: of a chat, special tokens included; it stands before the context, in place of the begin token.
        tail: of a chat, from the end of what the user said to the beginning of the answer.
    """

    question: str = "\nQuestion: {question}\n"
    anchor: str = "Answer: "
    head: str = ""
    tail: str = ""

    def prompt(self, question: str) -> str:
        """Everything between context and answer."""
        return self.question.format(question=question) + self.tail + self.anchor.rstrip(" ")

    @property
    def space(self) -> str:
        """What the anchor ends with; tokenizers take it for a part of the next word, so the answer begins with it."""
        return self.anchor[len(self.anchor.rstrip(" ")) :]


class Switch(Protocol):
    """Something that changes what a model says, and can be left out for a while."""

    def enable_adapters(self, enabled: bool) -> None: ...


class LMWrapper:
    """A causal language model of the transformers library; its weights never change here.

    A sequence is [begin or chat header] [prefix] [question, anchor] [answer, end]. Questions are padded on the left and
    answers on the right, so that every answer begins at the same place; what is padded takes no position and is not
    attended to.

    Args:
        name: of the model, as results call it.
        model: takes input embeddings, cache and mask as transformers' models do.
        tokenizer: its own.
        template: how questions are put.
        bos: whether the begin token is set first: yes, no, or auto, where the tokenizer has one; a chat header has its
            own, to which `yes` adds one where it lacks it.
        stop: a text at which an answer ends, beside the end token.

    Attributes:
        begin: ids before the prefix.
        extras: what features added to the model and can switch off, see `as_pretrained`.

    Raises:
        ValueError: for another policy, or when the tokenizer has no begin token to set.
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
            raise ValueError(f"llms.bos: {bos!r} is not one of {', '.join(BOS_POLICIES)}")
        if bos == "yes" and tokenizer.bos is None:
            raise ValueError(f"llms.bos: the tokenizer of {name} has no begin token; set it to auto or no")
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self.model: Any = model.requires_grad_(False).eval()
        self.begin = tokenizer.encode(template.head) if template.head else []
        wanted = bos == "yes" or (bos == "auto" and not template.head)
        if wanted and tokenizer.bos is not None and self.begin[:1] != [tokenizer.bos]:
            self.begin.insert(0, tokenizer.bos)
        self.extras: list[Switch] = []
        self.stop = stop
        self._begun: Any = None

    @property
    def device(self) -> torch.device:
        """Where its embeddings lie."""
        return self.model.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        """Of its embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of its input embeddings; without weights, what the configuration begins with."""
        weight = self.model.get_input_embeddings().weight.detach()
        if weight.is_meta:
            return float(self.model.config.initializer_range)
        return float(weight.float().square().mean().sqrt())

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, KV heads of each, and their width."""
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, width

    @contextmanager
    def as_pretrained(self, wanted: bool = True) -> Iterator[None]:
        """The model as it came, without what features added to it; as it is where that is not wanted."""
        switched = self.extras if wanted else []
        for extra in switched:
            extra.enable_adapters(False)
        try:
            yield
        finally:
            for extra in switched:
                extra.enable_adapters(True)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings, (batch, tokens) -> (batch, tokens, width)."""
        return self.model.get_input_embeddings()(ids)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Ids of what lies between context and answer."""
        return [self.tokenizer.encode(self.template.prompt(example.question)) for example in examples]

    def answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """Ids of each example's first answer and the end; of the end alone where there is none."""
        return [self.written(example.answers[0] if example.answers else "") for example in examples]

    def written(self, answer: str) -> list[int]:
        """Ids of an answer, with the space that parts it from the anchor, and the end; of the end alone for none."""
        return [*(self.tokenizer.encode(self.template.space + answer) if answer else []), self.tokenizer.eos]

    def said(self, ids: Sequence[int]) -> str:
        """The answer in what was generated."""
        text = self.tokenizer.decode(ids).lstrip()
        return text.partition(self.stop)[0].rstrip() if self.stop else text

    def text(self, ids: Sequence[Sequence[int]]) -> Prefix:
        """The plain context as a prefix: its own embeddings."""
        padded, mask = padded_right(ids, self.device)
        return Prefix(self.embed(padded), mask)

    def read(
        self,
        prefix: Prefix,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
    ) -> Reading:
        """What the model says when the answers are shown to it token by token; gradients flow into the prefix.

        Args:
            prefix: one row for each prompt.
            prompts: ids between context and answer.
            answers: ids with the end.
            hidden: whether states are wanted too.
        """
        head, head_mask = padded_left(prompts, self.device)
        targets, mask = padded_right(answers, self.device)
        ids = torch.cat([head, targets[:, :-1]], 1)
        last = targets.shape[1]
        out = self._forward(prefix, ids, torch.cat([head_mask, mask[:, :-1]], 1), last, hidden=hidden)
        states = tuple(state[:, -last:] for state in out.hidden_states) if hidden else ()
        return Reading(out.logits, targets, mask, states)

    @torch.no_grad()
    def generate(self, prefix: Prefix, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, without the end; they stop there or after so many tokens."""
        ids, mask = padded_left(prompts, self.device)
        out = self._forward(prefix, ids, mask, 1, cached=True)
        seen = out.attention_mask
        position = seen.sum(1, keepdim=True)
        answers: list[list[int]] = [[] for _ in prompts]
        cache = {_cache_name(): getattr(out, _cache_name())}
        going = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        token = out.logits[:, -1].argmax(-1)
        for count in range(1, max_new_tokens + 1):
            going &= token != self.tokenizer.eos
            for row in going.nonzero().flatten().tolist():
                answers[row].append(int(token[row]))
            if count == max_new_tokens or not bool(going.any()):
                break
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            step = self.model(
                input_ids=token[:, None],
                attention_mask=seen,
                position_ids=position,
                use_cache=True,
                **cache,
            )
            token, position = step.logits[:, -1].argmax(-1), position + 1
        return answers

    def _forward(
        self, prefix: Prefix, ids: Tensor, mask: Tensor, last: int, *, hidden: bool = False, cached: bool = False
    ) -> Any:
        """The model on [begin] [prefix] [ids], with logits of the last places; the mask that it saw is added."""
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
        shown = torch.cat(masks, 1)
        before = past.get_seq_length() if past is not None else 0
        attended = torch.cat([shown.new_ones(len(ids), before), shown], 1).long()
        out = self.model(
            inputs_embeds=torch.cat(embeddings, 1),
            attention_mask=attended,
            position_ids=(shown.long().cumsum(1) - 1).clamp_min(0) + before,
            use_cache=cached or past is not None,
            output_hidden_states=hidden,
            logits_to_keep=last,
            **{_cache_name(): past},
        )
        out.attention_mask = attended
        return out

    def _cache(self, keys_values: KeysValues, rows: int) -> Any:
        """A cache that holds what begins every sequence, and then a prefix."""
        from transformers import DynamicCache

        begin = self._begin_cache() if self.begin else None
        weight = self.model.get_input_embeddings().weight
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
        """Keys and values of what begins every sequence; computed once where no feature changes the model."""
        ids = torch.tensor([self.begin], device=self.device)
        if self.extras:
            return getattr(self.model(input_ids=ids, use_cache=True), _cache_name())
        if self._begun is None or self._begun.layers[0].keys.device != self.device:
            with torch.no_grad():
                self._begun = getattr(self.model(input_ids=ids, use_cache=True), _cache_name())
        return self._begun


def _cache_name() -> str:
    """See `CACHE_NAME`; imported when a model is there, which has loaded the transformers library."""
    from hawada.adapters.huggingface import CACHE_NAME

    return CACHE_NAME


def padded_right(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Ids filled up with 0 behind, and where there are any; both (rows, longest)."""
    return _padded(rows, device, left=False)


def padded_left(rows: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Likewise filled up before."""
    return _padded(rows, device, left=True)


def _padded(rows: Sequence[Sequence[int]], device: torch.device | None, *, left: bool) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=0)
    empty = [[0] * (longest - len(row)) for row in rows]
    filled = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, empty, strict=True)]
    ids = torch.tensor(filled, dtype=torch.long).view(len(rows), longest)
    lengths, places = torch.tensor([len(row) for row in rows]).view(-1, 1), torch.arange(longest)
    mask = places >= longest - lengths if left else places < lengths
    return ids.to(device), mask.to(device)
