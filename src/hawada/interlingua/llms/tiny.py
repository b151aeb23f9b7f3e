"""Two small language models that can recall facts: trained here, so that everything can be tried without a download."""

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

COPIED, RECALLED = 0.9, 0.98  # share of right tokens at which contexts get their first facts, and further ones
HALVED = 60  # steps at the full length in which the learning rate halves, until it is 3 % of its peak


def small_causal_lm(model_type: str, vocabulary: int, **sizes: int) -> nn.Module:
    """An untrained model of a family of the transformers library.

    Args:
        model_type: such as llama or qwen2.
        vocabulary: number of tokens; 0 begins and 1 ends.
        sizes: of its configuration, as overrides of its own values; embeddings are tied unless it says otherwise.
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
    return AutoModelForCausalLM.from_config(config)


def documents(examples: Sequence[Example], questions: int, llm: LMWrapper) -> tuple[list[list[int]], list[list[int]]]:
    """Each context and its questions with answers behind one another: ids, and the labels of what is to be learned.

    Args:
        examples: `questions` on each context behind each other.
        questions: on each context.
        llm: its tokenizer and template.
    """
    rows, labels = [], []
    for start in range(0, len(examples), questions):
        asked = examples[start : start + questions]
        ids = [*llm.begin, *llm.tokenizer.encode(asked[0].context)]
        label = [-100] * len(ids)
        for prompt, answer in zip(llm.prompts(asked), llm.answers(asked), strict=True):
            ids += [*prompt, *answer]
            label += [*([-100] * len(prompt)), *answer]
        rows.append(ids)
        labels.append(label)
    return rows, labels


def repetitions(
    generator: np.random.Generator, vocabulary: int, rows: int, shortest: int = 4, longest: int = 16
) -> tuple[list[list[int]], list[list[int]]]:
    """Random tokens said twice, with up to three others in between: ids, and the second time as labels.

    Copying is where induction heads come from (Olsson et al., In-context learning and induction heads, 2022), and
    recalling the value behind a key takes the same heads. From facts alone a model stays long at naming any value.

    Args:
        generator: of the tokens.
        vocabulary: number of tokens; 0 begins and 1 ends.
        rows: how many sequences.
        shortest: tokens that are repeated, at least.
        longest: and at most.
    """
    ids, labels = [], []
    for _ in range(rows):
        said = generator.integers(2, vocabulary, generator.integers(shortest, longest + 1)).tolist()
        first = [0, *said, *generator.integers(2, vocabulary, generator.integers(0, 4)).tolist(), said[0]]
        ids.append([*first, *said[1:]])
        labels.append([*([-100] * len(first)), *said[1:]])
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
    """Train a model until it recalls from contexts of up to `pairs` facts; returns the share of right answer tokens.

    It first learns to repeat random tokens. Then contexts grow from two facts: whenever the longest so far are
    answered, two more are added.

    Args:
        llm: its model's weights are trained and frozen again.
        pairs: the longest contexts.
        seed: of the data.
        steps: at most so many.
        lr: peak learning rate of AdamW; it falls once contexts have their full length.
        contexts: in a step.
        questions: on each.
        enough: share of right answer tokens at which training ends.
        report: called with (step, figures) now and then.
    """
    model: Any = llm.model
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    longest, right, last = 0, 0.0, 0  # 0 facts: tokens are repeated; steps at the full length
    generator = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * max(0.03, 0.5 ** (last / HALVED))
        hardest = step % 2 == 0 or longest == 0
        count = longest if hardest else int(generator.integers(min(2, pairs), longest + 1))
        if count:
            rows = documents(Recall(count, questions, seed).train_batch(step, contexts), questions, llm)
        else:
            rows = repetitions(generator, llm.tokenizer.vocabulary, 2 * contexts)
        loss, correct = _answers(model, *rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.9 * right + 0.1 * correct if hardest else right
        if report is not None and step % 50 == 0:
            report(step, {"loss": float(loss.detach()), "right": right, "pairs": longest})
        last += longest == pairs
        if longest == pairs and right >= enough:
            break
        if longest < pairs and right >= (RECALLED if longest else COPIED):
            longest, right = min(longest + 2, pairs), 0.0
    model.requires_grad_(False).eval()
    return right


def _answers(model: Any, rows: list[list[int]], labels: list[list[int]]) -> tuple[Tensor, float]:
    """Cross-entropy of the labels, and the share of them that would be predicted."""
    device = model.get_input_embeddings().weight.device
    ids, mask = padded_right(rows, device)
    wanted, _ = padded_right(labels, device)
    wanted[~mask] = -100
    logits = model(input_ids=ids).logits[:, :-1]
    counted = wanted[:, 1:] != -100
    chosen, targets = logits[counted], wanted[:, 1:][counted]
    return F.cross_entropy(chosen, targets), float((chosen.argmax(-1) == targets).float().mean())
