"""Trains the teacher of a model that comes without weights, from labels."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig

from hawada.config import build
from hawada.core.distill import Distillation
from hawada.core.memory_format import channels_last
from hawada.core.structure import keep_all
from hawada.core.task import Scores
from hawada.data import TextData, witten_bell_perplexity
from hawada.experiment import MetricsLog, Run
from hawada.experiment.results import BitsPerByte, PretrainResult
from hawada.report import Progress, format_quality
from hawada.workspace import open_stage


def run(cfg: DictConfig, run: Run) -> PretrainResult:
    """Write `pretrain/teacher` and how good it is on test data."""
    subject, _, store = open_stage(cfg, run)
    loader = subject.data.train_loader(cfg.pretrain.batch_size, cfg.seed)
    model = subject.adapter.skeleton()
    trainer = build(cfg.pretrain.trainer)
    with store.writing("pretrain") as folder:
        log = MetricsLog(folder / "metrics.jsonl")
        with (
            Progress("pretrain", trainer.epochs * len(loader)) as progress,
            channels_last([model], cfg.compute.channels_last),
        ):
            trainer.fit(
                model,
                loader,
                distillation=Distillation(outputs=subject.outputs, chunk=cfg.distill.chunk, task=subject.task),
                accelerator=subject.accelerator,
                on_step=lambda losses: progress.step(loss=losses["label"]),
                on_epoch=lambda epoch, losses: log.write({"epoch": epoch, **losses}),
            )
        subject.save(folder / "teacher", model, keep_all(subject.groups))
        scores = subject.task.score(model, subject.data.test_loader(cfg.pretrain.batch_size), subject.pick)
        metric = subject.task.metric(subject.data.metric, True)
        quality = scores.figures.get(metric)  # some tasks tell nothing of one model alone
        summary, bits = "trained" if quality is None else f"test {metric} {format_quality(metric, quality)}", None
        own: dict[str, Any] = {metric if metric in ("accuracy", "perplexity", "mean_iou") else "score": quality}
        if isinstance(subject.data, TextData):
            bits = compare_with_ngram(subject.data, scores)
            summary += f", bits per byte: model {bits.model:.3f}, interpolated byte 5-gram {bits.ngram:.3f}"
        return run.finish("pretrain", PretrainResult(summary=summary, bits_per_byte=bits, **own))


def compare_with_ngram(data: TextData, scores: Scores) -> BitsPerByte:
    """Bits per byte of the test text: the model's, and those of an interpolated Witten-Bell byte 5-gram."""
    train, test = data.byte_splits()
    return BitsPerByte(
        model=scores.nll * len(scores.predicted) / math.log(2) / len(test),
        ngram=math.log2(witten_bell_perplexity(train, test, order=5)),
    )
