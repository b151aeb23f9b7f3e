"""Trains the teacher of a model that comes without weights, from labels."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from hawada.adapters.base import save_model
from hawada.config import build
from hawada.core.evaluate import predict_classes
from hawada.core.structure import keep_all
from hawada.report.progress import Progress
from hawada.run import MetricsLog, Run
from hawada.stages.workspace import Workspace


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `pretrain/teacher` and its test accuracy."""
    work = Workspace(cfg, run)
    loader = work.data.train_loader(cfg.pretrain.batch_size, cfg.seed)
    model = work.adapter.skeleton()
    trainer = build(cfg.pretrain.trainer)
    with work.writing("pretrain") as folder:
        log = MetricsLog(folder / "metrics.jsonl")
        with Progress("pretrain", trainer.epochs * len(loader)) as progress:
            trainer.fit(
                model,
                loader,
                logits=work.adapter.logits,
                accelerator=work.accelerator,
                on_step=lambda losses: progress.step(loss=losses["label"]),
                on_epoch=lambda epoch, losses: log.write({"epoch": epoch, **losses}),
            )
        save_model(
            folder / "teacher",
            model,
            adapter_spec=work.adapter_spec,
            teacher=work.meta,
            groups=work.groups,
            keep=keep_all(work.groups),
        )
        predicted, labels = predict_classes(model, work.data.test_loader(cfg.pretrain.batch_size), work.adapter.logits)
        accuracy = float((predicted == labels).float().mean())
        return run.finish("pretrain", {"summary": f"test accuracy {accuracy:.2%}", "accuracy": accuracy})
