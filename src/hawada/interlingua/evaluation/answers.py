"""How well questions are answered from what a model is shown, and what two models answer together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hawada.interlingua.evaluation.baselines import Contender
from hawada.interlingua.evaluation.scores import exact_match, f1
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper, Reading
from hawada.interlingua.llms.tokenizers import UnknownText

RESAMPLES = 1000
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What one model answered, example by example.

    Attributes:
        texts: greedy answers.
        em: exact match, 0 or 1.
        f1: of words.
        nll: nats per token of the first right answer without its end, as a model that reads text may go past it; of the
            end where there is no answer.
        top1: whether its first token is the most probable one, 0 or 1.
        top5: whether it is among the five most probable.
        tokens: places in the cache that stand for the context, on average.
    """

    texts: list[str]
    em: Values
    f1: Values
    nll: Values
    top1: Values
    top5: Values
    tokens: float


@torch.no_grad()
def answer(
    llm: LMWrapper, contender: Contender, examples: Sequence[Example], *, batch: int = 64, max_new_tokens: int = 16
) -> Answers:
    """Let a model answer every example from what a contender shows it.

    Args:
        llm: answers.
        contender: see `hawada.interlingua.evaluation.baselines`.
        examples: what is asked.
        batch: examples at once.
        max_new_tokens: longest answer.
    """
    texts: list[str] = []
    readings: list[tuple[Values, Values, Values]] = []
    tokens: list[float] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        shown = contender(llm, part)
        with llm.as_pretrained(shown.as_pretrained):
            said = llm.read(shown.prefix, shown.prompts, llm.answers(part))
            texts += map(llm.said, llm.generate(shown.prefix, shown.prompts, max_new_tokens))
        readings.append(_first_and_nll(said))
        tokens += [shown.tokens] * len(part)
    nll, top1, top5 = (np.concatenate(column) for column in zip(*readings, strict=True))
    golds = [example.answers for example in examples]
    return Answers(
        texts,
        np.array([float(exact_match(text, gold)) for text, gold in zip(texts, golds, strict=True)]),
        np.array([float(f1(text, gold)) for text, gold in zip(texts, golds, strict=True)]),
        nll,
        top1,
        top5,
        float(np.mean(tokens)),
    )


def _first_and_nll(said: Reading) -> tuple[Values, Values, Values]:
    """Nats per answer token without the end, and whether the first is the most probable or among five; per example."""
    logs = said.logits.float().log_softmax(-1)
    lengths = said.mask.sum(1, keepdim=True)
    counted = torch.arange(said.mask.shape[1], device=said.mask.device) < (lengths - 1).clamp_min(1)
    nll = -(logs.gather(-1, said.targets[..., None])[..., 0] * counted).sum(1) / counted.sum(1)
    rank = (logs[:, 0] > logs[:, 0].gather(-1, said.targets[:, :1])).sum(-1)
    nll, rank = nll.cpu().double(), rank.cpu()
    return nll.numpy(), (rank < 1).double().numpy(), (rank < 5).double().numpy()


def writable(llms: Mapping[str, LMWrapper], text: str) -> bool:
    """Whether every model has tokens for an answer."""
    try:
        for llm in llms.values():
            llm.written(text)
    except UnknownText:
        return False
    return True


def difference(one: Values, other: Values, contexts: Sequence[str]) -> dict[str, float]:
    """Mean of paired differences and its 95 % bootstrap interval over contexts, whose questions go together.

    Args:
        one: a figure per example.
        other: the same figure of another contender, on the same examples.
        contexts: of the examples.
    """
    places: dict[str, int] = {}
    place = [places.setdefault(context, len(places)) for context in contexts]
    sums, counts = np.bincount(place, one - other), np.bincount(place)
    draws = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return {"mean": float((one - other).mean()), "low": float(low), "high": float(high)}


@torch.no_grad()
def answer_together(
    llms: Mapping[str, LMWrapper],
    contenders: Mapping[str, Contender],
    alone: Mapping[str, Answers],
    examples: Sequence[Example],
    *,
    batch: int = 64,
) -> dict[str, float]:
    """What models answer together: of the answers that any of them gives, the one all find most probable.

    Args:
        llms: by name.
        contenders: what each is shown.
        alone: what each answered.
        examples: what is asked.
        batch: examples at once.

    Returns:
        Means over examples: `em` and `f1` of the joint answer, `agreement` (all answered the same), `any_right`.
    """
    candidates = [list(dict.fromkeys(texts)) for texts in zip(*(alone[name].texts for name in llms), strict=True)]
    flat = [(index, text) for index, texts in enumerate(candidates) for text in texts if writable(llms, text)]
    total = np.zeros(len(flat))
    for name, llm in llms.items():
        for start in range(0, len(flat), batch):
            part = flat[start : start + batch]
            shown = contenders[name](llm, [examples[index] for index, _ in part])
            ids = [llm.written(text) for _, text in part]
            with llm.as_pretrained(shown.as_pretrained):
                said = llm.read(shown.prefix, shown.prompts, ids)
            logs = said.logits.float().log_softmax(-1).gather(-1, said.targets[..., None])[..., 0]
            total[start : start + len(part)] += (logs * said.mask).sum(1).cpu().double().numpy()
    best: dict[int, tuple[float, str]] = {index: (-np.inf, texts[0]) for index, texts in enumerate(candidates)}
    for (index, text), score in zip(flat, total, strict=True):
        if score > best[index][0]:
            best[index] = (score, text)
    golds = [example.answers for example in examples]
    right = np.stack([answers.em for answers in alone.values()])
    return {
        "em": float(np.mean([exact_match(best[index][1], gold) for index, gold in enumerate(golds)])),
        "f1": float(np.mean([f1(best[index][1], gold) for index, gold in enumerate(golds)])),
        "agreement": float(np.mean([len(texts) == 1 for texts in candidates])),
        "any_right": float(right.max(0).mean()),
    }
