"""Train small language models to recall facts, so that everything can be tried without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper, padded_right
from hawada.interlingua.recall import Recall

Report = Callable[[int, dict[str, float]], None]

MIN_COPY_ACCURACY = 0.9  # the share of right tokens in repetitions at which training moves on to facts
MIN_RECALL_ACCURACY = 0.98  # the share of right answer tokens at which contexts get two more facts
WARM_UP_STEPS = 100
LR_HALVING_STEPS = 60  # once contexts have their full length, the learning rate halves in so many steps
MIN_LR_FACTOR = 0.03  # of the peak learning rate
REPORT_STEPS = 50  # steps between two reports
IGNORED = -100  # the label of a token that is not learned


def small_causal_lm(model_type: str, vocabulary: int, **sizes: int) -> nn.Module:
    """Make an untrained model of a family of the transformers library.

    Args:
        model_type: the family's name in transformers, such as llama or qwen2.
        vocabulary: the number of tokens; id 0 is the begin token and id 1 the end token.
        sizes: fields of the family's configuration and their values; embeddings are tied unless
            `tie_word_embeddings` is given.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **{"tie_word_embeddings": True, **sizes},
    )
    family: Any = AutoModelForCausalLM  # whose methods are untyped in transformers
    model: nn.Module = family.from_config(config)
    return model


def documents(examples: Sequence[Example], questions: int, llm: LMWrapper) -> tuple[list[list[int]], list[list[int]]]:
    """Write each context and all its questions with their answers into one sequence.

    Args:
        examples: the examples, with `questions` on each context behind each other.
        questions: the number of questions on each context.
        llm: the model whose tokenizer and template are used.

    Returns:
        The ids of each sequence, and its labels, which are `IGNORED` but for the answers.
    """
    rows, labels = [], []
    for start in range(0, len(examples), questions):
        asked = examples[start : start + questions]
        ids = [*llm.begin, *llm.tokenizer.encode(asked[0].context)]
        label = [IGNORED] * len(ids)
        for prompt, answer in zip(llm.prompts(asked), llm.targets(asked), strict=True):
            ids += [*prompt, *answer]
            label += [*([IGNORED] * len(prompt)), *answer]
        rows.append(ids)
        labels.append(label)
    return rows, labels


def repetitions(
    generator: np.random.Generator, vocabulary: int, rows: int, shortest: int = 4, longest: int = 16
) -> tuple[list[list[int]], list[list[int]]]:
    """Draw sequences of random tokens that come twice, with up to three other tokens in between.

    Copying is where induction heads come from (Olsson et al., In-context learning and induction heads, 2022), and
    recalling the value behind a key takes the same heads. Trained on facts alone, a model names any value of the
    context for a long time.

    Args:
        generator: the generator of the tokens.
        vocabulary: the number of tokens; id 0 is the begin token and id 1 the end token.
        rows: the number of sequences.
        shortest: the fewest tokens that are repeated.
        longest: the most tokens that are repeated.

    Returns:
        The ids of each sequence, and its labels, which are `IGNORED` but for the second time.
    """
    ids, labels = [], []
    for _ in range(rows):
        repeated = generator.integers(2, vocabulary, generator.integers(shortest, longest + 1)).tolist()
        first = [0, *repeated, *generator.integers(2, vocabulary, generator.integers(0, 4)).tolist(), repeated[0]]
        ids.append([*first, *repeated[1:]])
        labels.append([*([IGNORED] * len(first)), *repeated[1:]])
    return ids, labels


def pretrain_recall(
    llm: LMWrapper,
    *,
    pairs: int,
    seed: int,
    steps: int,
    lr: float = 3e-3,
    contexts: int = 32,
    questions: int = 16,
    enough: float = 0.9998,
    report: Report | None = None,
) -> float:
    """Train a model until it recalls from contexts of up to `pairs` facts.

    It first learns to repeat random tokens. Then contexts grow from two facts on: whenever the model recalls from the
    longest ones so far, they get two more.

    Args:
        llm: the model, whose weights are trained and then frozen again.
        pairs: the number of facts in the longest contexts.
        seed: the seed of the data.
        steps: the most training steps.
        lr: the peak learning rate of AdamW; it falls once contexts have their full length.
        contexts: the number of contexts in a step.
        questions: the number of questions on each context.
        enough: the share of right answer tokens at which training ends.
        report: a function that is called with the step and its figures every `REPORT_STEPS` steps.

    Returns:
        The share of right answer tokens on the longest contexts, as a moving average.
    """
    model: Any = llm.model
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    longest, right = 0, 0.0  # while the longest context has 0 facts, tokens are repeated
    full_length_steps = 0
    generator = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr
                * min(1.0, (step + 1) / WARM_UP_STEPS)
                * max(MIN_LR_FACTOR, 0.5 ** (full_length_steps / LR_HALVING_STEPS))
            )
        hardest = step % 2 == 0 or longest == 0
        count = longest if hardest else int(generator.integers(min(2, pairs), longest + 1))
        if count:
            rows = documents(Recall(count, questions, seed).train_batch(step, contexts), questions, llm)
        else:
            rows = repetitions(generator, llm.tokenizer.vocabulary, 2 * contexts)
        loss, correct = _loss_and_accuracy(model, *rows)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.9 * right + 0.1 * correct if hardest else right
        if report is not None and step % REPORT_STEPS == 0:
            report(step, {"loss": float(loss.detach()), "right": right, "pairs": longest})
        full_length_steps += longest == pairs
        if longest == pairs and right >= enough:
            break
        if longest < pairs and right >= (MIN_RECALL_ACCURACY if longest else MIN_COPY_ACCURACY):
            longest, right = min(longest + 2, pairs), 0.0
    model.requires_grad_(False).eval()
    return right


def _loss_and_accuracy(model: Any, rows: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, float]:
    """Compute the cross-entropy of the labels, and the share of them that is the most probable token."""
    device = model.get_input_embeddings().weight.device
    ids, mask = padded_right(rows, device)
    targets, _ = padded_right(labels, device)
    targets[~mask] = IGNORED
    logits, targets = model(input_ids=ids).logits[:, :-1], targets[:, 1:]
    counted = targets != IGNORED
    logits, targets = logits[counted], targets[counted]
    return F.cross_entropy(logits, targets), float((logits.argmax(-1) == targets).float().mean())
