"""Compares latents with text, truncation, prompt tuning, shuffled and zero latents: quality and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from hawada.config import build
from hawada.experiment import Run
from hawada.experiment.results import (
    EvaluatedLLM,
    InterlinguaEvalResult,
    JointAnswers,
    PairedDifference,
    PrefillComparison,
    PrefillFigures,
)
from hawada.interlingua.checkpoint import load_checkpoint
from hawada.interlingua.evaluation.answers import Answers, answer, answer_together, difference
from hawada.interlingua.evaluation.baselines import (
    Baseline,
    head,
    latent,
    nothing,
    oracle,
    quantized,
    scattered,
    shuffled,
    tail,
    text,
)
from hawada.interlingua.evaluation.cost import LatentPrefill, TextPrefill, cache_bytes, payload_bytes
from hawada.interlingua.examples import Example
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.messenger import Messenger
from hawada.interlingua.recall import Recall
from hawada.interlingua.stages.figures import scores_of
from hawada.interlingua.stages.parts import InterlinguaParts
from hawada.interlingua.trainer import InterlinguaTrainer
from hawada.report import Progress

TIMED_EXAMPLES = 8  # examples of which prefill is timed at once
COMPARED_ROWS = (
    "text",
    "shuffled latents",
    "prompt tuning",
    "head",
    "tail",
    "random tokens",
    "nothing",
)  # with latents, example by example


def run(cfg: DictConfig, run: Run) -> InterlinguaEvalResult:
    """Write every row's figures, the paired differences, what models answer together, and what all of it costs."""
    parts, node = InterlinguaParts(cfg, run), cfg.interlingua
    prompt = tuned_prompt(parts)
    messenger = parts.new_messenger()
    best = run.folder("interlingua") / "best"
    if load_checkpoint(best, messenger, None) is None:
        raise RuntimeError(f"{best} is gone; run stage=interlingua with overwrite=true to train again")
    examples = parts.task.test(node.test_contexts)
    contexts = [example.context for example in examples]
    rows = compared_ways(messenger, prompt, examples, node.latent_len)
    with run.writing("interlingua-eval") as folder, Progress("evaluate", len(rows) * len(parts.llms)) as progress:
        found: dict[str, dict[str, Answers]] = {name: {} for name in parts.llms}
        for name, llm in parts.llms.items():
            for row, way in rows.items():
                found[name][row] = answer(
                    llm, way, examples, batch=cfg.evaluate.batch_size, max_new_tokens=node.max_new_tokens
                )
                progress.step(f"{name}: {row}")
        together = answer_together(
            parts.llms,
            {name: rows["latents"] for name in parts.llms},
            {name: answers["latents"] for name, answers in found.items()},
            examples,
            batch=cfg.evaluate.batch_size,
        )
        kind = "query-aware" if node.query_aware else "query-agnostic"
        exact_matches = ", ".join(
            f"{name} {answered['latents'].em.mean():.1%} (text {answered['text'].em.mean():.1%}, "
            f"shuffled {answered['shuffled latents'].em.mean():.1%})"
            for name, answered in found.items()
        )
        result = InterlinguaEvalResult(
            summary=f"exact match, {kind}: {exact_matches}",
            query_aware=node.query_aware,
            questions=len(examples),
            guessing=guessing(parts),
            models={
                name: EvaluatedLLM(
                    rows={row: scores_of(answers) for row, answers in answered.items()},
                    latents_minus={
                        row: PairedDifference(**difference(answered["latents"].em, answered[row].em, contexts))
                        for row in COMPARED_ROWS
                        if row in answered
                    },
                    context_tokens=answered["text"].tokens,
                    cache_bytes_saved=cache_bytes(
                        parts.llms[name], answered["text"].tokens - answered["latents"].tokens
                    ),
                    prefill=prefill(
                        parts, parts.llms[name], messenger, of_different_contexts(examples)[:TIMED_EXAMPLES], rows
                    ),
                )
                for name, answered in found.items()
            },
            together=JointAnswers(**together),
            answers_shown_to_encoder=sum(map(messenger.source.holds_answer, examples)) / len(examples),
            payload_bytes=payload_bytes(parts.latents_sent, node.d_z),
            environment=parts.store.environment,
        )
        (folder / "rows.md").write_text(table(result))
        return run.finish("interlingua-eval", result)


def tuned_prompt(parts: InterlinguaParts) -> Messenger | None:
    """One prompt for all texts, trained as the latents are; none where features train along, which it would lack."""
    node, steps = parts.cfg.interlingua, parts.cfg.evaluate.prompt_steps
    if steps == 0 or node.features:
        return None
    prompt, schedule = parts.new_prompt(), parts.schedule
    if steps is not None:
        schedule = replace(schedule, steps=steps)
    trainer = InterlinguaTrainer(
        prompt, parts.llms, parts.task, build(node.objective), schedule, sequential=node.sequential_models
    )
    with Progress("prompt", schedule.steps) as progress:
        while node.latent_len and trainer.step < schedule.steps:
            progress.step(loss=sum(trainer.train_step().values()))
        progress.done()
    return prompt


def of_different_contexts(examples: Sequence[Example]) -> list[Example]:
    """The first question on each context."""
    return list({example.context: example for example in reversed(examples)}.values())[::-1]


def compared_ways(
    messenger: Messenger, prompt: Messenger | None, examples: Sequence[Example], latent_len: int
) -> dict[str, Baseline]:
    """The rows of the table, by name; a prompt only where it was tuned."""
    return {
        "text": text(),
        "oracle embeddings": oracle(),
        "latents": latent(messenger),
        "latents int8": latent(messenger, quantized(8)),
        "latents int4": latent(messenger, quantized(4)),
        "shuffled latents": shuffled(messenger, [example.context for example in examples]),
        "zero latents": latent(messenger, torch.zeros_like),
        **({} if prompt is None else {"prompt tuning": latent(prompt)}),
        "head": head(latent_len),
        "tail": tail(latent_len),
        "random tokens": scattered(latent_len),
        "nothing": nothing(),
    }


def guessing(parts: InterlinguaParts) -> dict[str, float]:
    """Exact match of whoever knows nothing, or the values without their keys; for recall alone."""
    if not isinstance(parts.task, Recall):
        return {}
    return {"no knowledge": 1 / 100, "values without keys": 1 / parts.task.pairs}


def prefill(
    parts: InterlinguaParts, llm: LMWrapper, messenger: Messenger, examples: Any, rows: dict[str, Baseline]
) -> PrefillFigures:
    """Time to the first answer token as a fraction of the text's, without and with encoding."""
    inputs = (torch.zeros(1, device=parts.device),)
    whole = TextPrefill(llm, rows["text"](llm, examples))

    def compared(candidate: LatentPrefill) -> PrefillComparison:
        comparison = parts.watch.compare(whole, candidate, inputs)
        return PrefillComparison(
            text_ms=comparison.baseline,
            latency_ms=comparison.candidate,
            ratio=comparison.ratio,
            noisy=comparison.noisy,
        )

    return PrefillFigures(
        batch=len(examples),
        latents=compared(LatentPrefill(llm, messenger, examples, encode=False)),
        latents_with_encoding=compared(LatentPrefill(llm, messenger, examples, encode=True)),
    )


def table(result: InterlinguaEvalResult) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | shown | tokens | EM | F1 | NLL | first token top-1 | top-5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in result.models.items():
        for row, scores in model.rows.items():
            lines.append(
                f"| {name} | {row} | {scores.tokens:.1f} | {scores.em:.3f} | {scores.f1:.3f} | {scores.nll:.3f} | "
                f"{scores.top1:.3f} | {scores.top5:.3f} |"
            )
    return "\n".join(lines) + "\n"
