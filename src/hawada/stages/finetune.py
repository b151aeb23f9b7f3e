"""Finetunes the slim model against the teacher (and labels); needs no particular device."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file

from hawada.config import build
from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.memory_format import channels_last
from hawada.core.structure import Keep
from hawada.experiment import MetricsLog, Run
from hawada.report import Progress
from hawada.workspace import Workspace, make_distillation


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `finetune/slim`."""
    work = Workspace(cfg, run)
    slim, teacher = work.saved_model("export", "slim"), work.teacher()
    keep: Keep = json.loads((run.folder("export") / "keep.json").read_text())
    slim.to(work.accelerator.device)
    samples, batch_size = cfg.finetune.recalibration_samples, cfg.finetune.batch_size
    if samples:
        recalibrate_batchnorm(slim, work.data.calibration_loader(batch_size, samples))
    loader = work.data.train_loader(batch_size, cfg.seed)
    trainer = build(cfg.finetune.trainer)
    history: list[dict[str, float]] = []
    with work.writing("finetune") as folder:
        log = MetricsLog(folder / "metrics.jsonl")

        def on_epoch(epoch: int, losses: dict[str, float]) -> None:
            history.append(losses)
            log.write({"epoch": epoch, **losses})

        with (
            Progress("finetune", trainer.epochs * len(loader)) as progress,
            channels_last([slim, teacher], cfg.compute.channels_last),
        ):
            trainer.fit(
                slim,
                loader,
                teacher=teacher,
                distillation=make_distillation(work, keep),
                accelerator=work.accelerator,
                on_step=lambda losses: progress.step(**losses),
                on_epoch=on_epoch,
            )
        if samples:
            recalibrate_batchnorm(slim, work.data.calibration_loader(batch_size, samples))
        save_file(work.answers(work.adapter.as_saved(slim.cpu())), folder / "answers.safetensors")
        work.save(folder / "slim", slim, keep)
        last = history[-1] if history else {}
        summary = ", ".join([f"{len(history)} epochs", *(f"{name} {value:.3g}" for name, value in last.items())])
        return run.finish("finetune", {"summary": summary, "epochs": len(history), **last})
