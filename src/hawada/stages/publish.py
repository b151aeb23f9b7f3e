"""Writes the finished slim model in further formats and pushes it to the Hub."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from hawada.adapters.huggingface import hub
from hawada.core.formats import export_onnx, export_pt2
from hawada.experiment import Run
from hawada.experiment.results import Difference, PublishResult
from hawada.report import Progress
from hawada.workspace import open_stage

WRITERS = {"onnx": export_onnx, "pt2": export_pt2}


def run(cfg: DictConfig, run: Run) -> PublishResult:
    """Write `publish/slim.onnx` and the like, each compared with the model in memory; push if asked.

    Raises:
        ValueError: when the slim model missed its budget, or the hub refuses.
    """
    verdict = run.result("evaluate").verdict
    if not verdict.may_be_published:
        raise ValueError(f"stage=publish: the verdict is {verdict}; a model that missed its budget is not published")
    subject, _, store = open_stage(cfg, run)
    slim = subject.saved_model("finetune", "slim")
    formats = [name for name in cfg.export.formats if name in WRITERS]
    with store.writing("publish") as folder, Progress("publish", len(formats) + 1) as progress:
        parity: dict[str, Difference] = {}
        for name in formats:
            path = folder / f"slim.{name}"
            written = WRITERS[name](slim, subject.check_inputs(), path, logits=subject.adapter.logits)
            parity[name] = Difference(**written)
            progress.step(f"wrote {path.name}")
        address = None
        if cfg.export.push_to is not None:
            progress.say(f"pushing to {cfg.export.push_to}")
            address = _push(cfg, run, [folder / f"slim.{name}" for name in formats])
        progress.done()
        done = [f"{name} differs by {record.max_abs_diff:.1e}" for name, record in parity.items()]
        summary = ", ".join([*done, *([f"pushed to {address}"] if address else [])])
        return run.finish("publish", PublishResult(summary=summary, formats=parity, address=address))


def _push(cfg: DictConfig, run: Run, files: list[Path]) -> str:
    """The slim model, or the teacher with its trained gates; returns the repository's address."""
    if cfg.export.push == "slim":
        return hub.push(run.folder("finetune") / "slim", cfg.export.push_to, extra=files)
    gates = run.folder("train") / "gates.safetensors"
    return hub.push(run.folder("export") / "teacher", cfg.export.push_to, extra=[gates])
