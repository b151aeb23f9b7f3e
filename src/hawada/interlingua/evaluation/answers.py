"""How well language models answer questions, alone and together, from latents and from baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hawada.interlingua.evaluation.baselines import Baseline
from hawada.interlingua.evaluation.scores import exact_match, f1
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper, Reading
from hawada.interlingua.llms.tokenizers import UnknownText

BOOTSTRAP_RESAMPLES = 1000
PerExample = NDArray[np.float64]  # a figure for each example


@dataclass(frozen=True)
class Answers:
    """The answers of one language model and their figures, example by example.

    Attributes:
        texts: the answers that the model generated greedily.
        em: the exact match with a right answer, 0 or 1.
        f1: the F1 of words, from 0 to 1.
        nll: the negative log-likelihood of the first right answer, in nats per token. Its end token does not count, as
            a model that reads text may continue; where there is no right answer, the end token alone counts.
        top1: whether the first token of the first right answer is the most probable one, 0 or 1.
        top5: whether that token is among the five most probable ones, 0 or 1.
        tokens: how many places in the cache stand for the context, on average.
    """

    texts: list[str]
    em: PerExample
    f1: PerExample
    nll: PerExample
    top1: PerExample
    top5: PerExample
    tokens: float


@torch.no_grad()
def answer(
    llm: LMWrapper, baseline: Baseline, examples: Sequence[Example], *, batch: int = 64, max_new_tokens: int = 16
) -> Answers:
    """Let a language model answer every example, and score the answers.

    Args:
        llm: the language model.
        baseline: what the model is shown of each context, see `hawada.interlingua.evaluation.baselines`.
        examples: the examples whose questions are asked.
        batch: the number of examples in a batch.
        max_new_tokens: the most tokens of an answer.
    """
    texts: list[str] = []
    scores: list[tuple[PerExample, PerExample, PerExample]] = []
    tokens: list[float] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        shown = baseline(llm, part)
        with llm.as_pretrained(shown.as_pretrained):
            reading = llm.read(shown.prefix, shown.prompts, llm.targets(part))
            texts += map(llm.answer_text, llm.generate(shown.prefix, shown.prompts, max_new_tokens))
        scores.append(_nll_and_top_tokens(reading))
        tokens += [shown.tokens] * len(part)
    nll, top1, top5 = (np.concatenate(column) for column in zip(*scores, strict=True))
    right_answers = [example.answers for example in examples]
    return Answers(
        texts,
        np.array([float(exact_match(text, right)) for text, right in zip(texts, right_answers, strict=True)]),
        np.array([float(f1(text, right)) for text, right in zip(texts, right_answers, strict=True)]),
        nll,
        top1,
        top5,
        float(np.mean(tokens)),
    )


def _nll_and_top_tokens(reading: Reading) -> tuple[PerExample, PerExample, PerExample]:
    """Compute the `nll`, `top1` and `top5` of `Answers` from what a model computes on a batch of right answers."""
    log_probabilities = reading.logits.float().log_softmax(-1)
    lengths = reading.mask.sum(1, keepdim=True)
    counted = torch.arange(reading.mask.shape[1], device=reading.mask.device) < (lengths - 1).clamp_min(1)
    nll = -(log_probabilities.gather(-1, reading.targets[..., None])[..., 0] * counted).sum(1) / counted.sum(1)
    rank = (log_probabilities[:, 0] > log_probabilities[:, 0].gather(-1, reading.targets[:, :1])).sum(-1)
    nll, rank = nll.cpu().double(), rank.cpu()
    return nll.numpy(), (rank < 1).double().numpy(), (rank < 5).double().numpy()


def writable(llms: Mapping[str, LMWrapper], text: str) -> bool:
    """Tell whether the tokenizers of all models can write a text."""
    try:
        for llm in llms.values():
            llm.target_ids(text)
    except UnknownText:
        return False
    return True


def difference(one: PerExample, other: PerExample, contexts: Sequence[str]) -> dict[str, float]:
    """Compute the mean of one figure minus the other, example by example, and its 95 % bootstrap interval.

    Contexts are resampled with all their questions, as the questions on one context depend on each other.

    Args:
        one: a figure for each example.
        other: the same figure of a baseline, on the same examples.
        contexts: the context of each example.

    Returns:
        The `mean`, and the ends `low` and `high` of its interval.
    """
    index_of: dict[str, int] = {}
    indices = [index_of.setdefault(context, len(index_of)) for context in contexts]
    sums, counts = np.bincount(indices, one - other), np.bincount(indices)  # one entry for each different context
    draws = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAP_RESAMPLES, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return {"mean": float((one - other).mean()), "low": float(low), "high": float(high)}


@torch.no_grad()
def answer_together(
    llms: Mapping[str, LMWrapper],
    baselines: Mapping[str, Baseline],
    alone: Mapping[str, Answers],
    examples: Sequence[Example],
    *,
    batch: int = 64,
) -> dict[str, float]:
    """Let models answer together: of the answers that they give, choose the one that all find most probable.

    That is the one with the largest sum of the models' log-likelihoods. Where no answer can be written by all models,
    the answer of the first model is taken.

    Args:
        llms: the language models, by name.
        baselines: what each model is shown of a context, by the name of the model.
        alone: the answers of each model, by its name.
        examples: the examples whose questions are asked.
        batch: the number of answers in a batch.

    Returns:
        Means over examples: `em` and `f1` of the joint answer, `agreement`, the share of examples for which all models
        give the same answer, and `any_right`, the share for which at least one model is right.
    """
    candidates = [list(dict.fromkeys(texts)) for texts in zip(*(alone[name].texts for name in llms), strict=True)]
    rated = [(index, text) for index, texts in enumerate(candidates) for text in texts if writable(llms, text)]
    log_likelihoods = np.zeros(len(rated))
    for name, llm in llms.items():
        for start in range(0, len(rated), batch):
            part = rated[start : start + batch]
            shown = baselines[name](llm, [examples[index] for index, _ in part])
            ids = [llm.target_ids(text) for _, text in part]
            with llm.as_pretrained(shown.as_pretrained):
                reading = llm.read(shown.prefix, shown.prompts, ids)
            log_probabilities = reading.logits.float().log_softmax(-1).gather(-1, reading.targets[..., None])[..., 0]
            sums = (log_probabilities * reading.mask).sum(1)
            log_likelihoods[start : start + len(part)] += sums.cpu().double().numpy()
    best: dict[int, tuple[float, str]] = {index: (-np.inf, texts[0]) for index, texts in enumerate(candidates)}
    for (index, text), score in zip(rated, log_likelihoods, strict=True):
        if score > best[index][0]:
            best[index] = (score, text)
    right_answers = [example.answers for example in examples]
    right_alone = np.stack([own.em for own in alone.values()])
    return {
        "em": float(np.mean([exact_match(best[index][1], right) for index, right in enumerate(right_answers)])),
        "f1": float(np.mean([f1(best[index][1], right) for index, right in enumerate(right_answers)])),
        "agreement": float(np.mean([len(texts) == 1 for texts in candidates])),
        "any_right": float(right_alone.max(0).mean()),
    }
