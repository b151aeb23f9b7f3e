"""Trains the teacher of a model that comes without weights, from labels."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig

from hawada.config import build
from hawada.core.distill import Distillation
from hawada.core.evaluate import Scores, score
from hawada.core.memory_format import channels_last
from hawada.core.structure import keep_all
from hawada.data import TextData, witten_bell_perplexity
from hawada.experiment import MetricsLog, Run
from hawada.report import Progress, shown
from hawada.workspace import Workspace


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `pretrain/teacher` and how good it is on test data."""
    work = Workspace(cfg, run)
    loader = work.data.train_loader(cfg.pretrain.batch_size, cfg.seed)
    model = work.adapter.skeleton()
    trainer = build(cfg.pretrain.trainer)
    with work.writing("pretrain") as folder:
        log = MetricsLog(folder / "metrics.jsonl")
        with (
            Progress("pretrain", trainer.epochs * len(loader)) as progress,
            channels_last([model], cfg.compute.channels_last),
        ):
            trainer.fit(
                model,
                loader,
                distillation=Distillation(reader=work.adapter.outputs, chunk=cfg.distill.chunk),
                accelerator=work.accelerator,
                on_step=lambda losses: progress.step(loss=losses["label"]),
                on_epoch=lambda epoch, losses: log.write({"epoch": epoch, **losses}),
            )
        work.save(folder / "teacher", model, keep_all(work.groups))
        scores = score(model, work.data.test_loader(cfg.pretrain.batch_size), work.adapter.logits)
        metric = work.data.metric
        result: dict[str, Any] = {metric: getattr(scores, metric)}
        summary = f"test {metric} {shown(metric, result[metric])}"
        if isinstance(work.data, TextData):
            result["bits_per_byte"] = compare_with_ngram(work.data, scores)
            summary += ", bits per byte: model {model:.3f}, interpolated byte 5-gram {ngram:.3f}".format(
                **result["bits_per_byte"]
            )
        return run.finish("pretrain", {"summary": summary, **result})


def compare_with_ngram(data: TextData, scores: Scores) -> dict[str, float]:
    """Bits per byte of the test text: the model's, and those of an interpolated Witten-Bell byte 5-gram."""
    train, test = data.byte_splits()
    return {
        "model": scores.nll * len(scores.predicted) / math.log(2) / len(test),
        "ngram": math.log2(witten_bell_perplexity(train, test, order=5)),
    }
