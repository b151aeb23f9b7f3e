"""Trains encoder and adapters; goes on exactly where it was broken off."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import DictConfig

from hawada.config import build
from hawada.experiment import MetricsLog, Run
from hawada.experiment.results import InterlinguaResult
from hawada.interlingua.checkpoint import load_checkpoint, save_checkpoint
from hawada.interlingua.evaluation.answers import answer
from hawada.interlingua.evaluation.baselines import latent, shuffled
from hawada.interlingua.stages.figures import scores_of
from hawada.interlingua.stages.parts import InterlinguaParts
from hawada.interlingua.trainer import InterlinguaTrainer
from hawada.report import Progress

WATCHED_CONTEXTS = 64  # contexts by which the best is chosen, and on which collapse is looked for, while training


def run(cfg: DictConfig, run: Run) -> InterlinguaResult:
    """Write `best` and `last`, the trained weights, and how often each model answers right."""
    parts, node = InterlinguaParts(cfg, run), cfg.interlingua
    messenger = parts.new_messenger()
    trainer = InterlinguaTrainer(
        messenger,
        parts.llms,
        parts.task,
        build(node.objective),
        parts.schedule,
        sequential=node.sequential_models,
    )
    watched = parts.task.validation(WATCHED_CONTEXTS)
    with run.resuming("interlingua") as folder, Progress("interlingua", trainer.schedule.steps) as progress:
        log = MetricsLog(folder / "metrics.jsonl")
        state = load_checkpoint(folder / "last", messenger, trainer.optimizer) or {
            "step": 0,
            "best": -1.0,
            "seconds": 0,
        }
        trainer.step = state["step"]
        log.keep(lambda record: record["step"] <= state["step"])
        progress.skip(state["step"])
        start = time.perf_counter() - state["seconds"]
        while trainer.step < trainer.schedule.steps:
            losses = trainer.train_step()
            progress.step(loss=sum(losses.values()))
            if trainer.step % node.save_every and trainer.step != trainer.schedule.steps:
                continue
            figures = watch(parts, messenger, watched)
            log.write({"step": trainer.step, **losses, **trainer.metrics(), **figures})
            first = min(figures[f"{name}.top1"] for name in parts.llms)
            state = {"step": trainer.step, "best": max(state["best"], first), "seconds": time.perf_counter() - start}
            if first >= state["best"]:
                save_checkpoint(folder / "best", messenger, trainer.optimizer, state)
            save_checkpoint(folder / "last", messenger, trainer.optimizer, state)
        if load_checkpoint(folder / "best", messenger, None) is None:
            raise RuntimeError(f"{folder / 'best'} is gone; run stage=interlingua with overwrite=true to train again")
        tests = parts.task.test(node.test_contexts)
        scores = {
            name: scores_of(answer(llm, latent(messenger), tests, max_new_tokens=node.max_new_tokens))
            for name, llm in parts.llms.items()
        }
        exact_matches = ", ".join(f"{name} EM {score.em:.1%}" for name, score in scores.items())
        return run.finish(
            "interlingua",
            InterlinguaResult(
                summary=f"{node.latent_len} latents, {trainer.step} steps: {exact_matches}",
                scores=scores,
                seconds=state["seconds"],
                parameters=sum(p.numel() for p in messenger.parameters()),
            ),
        )


def watch(parts: InterlinguaParts, messenger: Any, examples: Any) -> dict[str, float]:
    """How well each model answers now, and whether latents have collapsed to the same for all."""
    figures: dict[str, float] = {}
    contexts = [example.context for example in examples]
    for name, llm in parts.llms.items():
        own = answer(llm, latent(messenger), examples, max_new_tokens=parts.cfg.interlingua.max_new_tokens)
        other = answer(llm, shuffled(messenger, contexts), examples, max_new_tokens=1)
        figures[f"{name}.em"] = float(own.em.mean())
        figures[f"{name}.top1"] = float(own.top1.mean())
        figures[f"{name}.top1_over_shuffled"] = float((own.top1 - other.top1).mean())
        figures[f"{name}.different_answers"] = float(len(set(own.texts)))
    return figures | {"cosine": messenger.cosine(examples)}
