"""Trains the gates against the teacher under the latency budget."""

from __future__ import annotations

import copy
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.config import build
from hawada.core.gates import Student, parameter_groups
from hawada.core.importance.fisher import fisher_importance, start_from_importance
from hawada.core.memory_format import channels_last
from hawada.core.train import LagrangeTrainer, Step
from hawada.experiment import MetricsLog, Run, write_json
from hawada.report import Progress
from hawada.workspace import Workspace, load_proxy, make_distillation


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write `train/gates.safetensors` (theta by group name) and the proxy as corrected by probes."""
    work = Workspace(cfg, run)
    if work.adapter.saved_gates() is not None:
        return adopt_gates(work, run)
    profile = run.result("profile")
    with work.writing("train") as folder:
        trainer = make_trainer(work, profile["teacher_ms"])
        loader = work.data.train_loader(cfg.train.batch_size, cfg.seed)
        steps = min(len(loader), cfg.train.steps_per_epoch or len(loader))
        log = MetricsLog(folder / "metrics.jsonl")
        history: list[Step] = []

        def on_epoch(epoch: int, step: Step) -> None:
            history.append(step)
            log.write({"epoch": epoch, **step.as_dict()})

        with (
            Progress("train", cfg.train.epochs * steps) as progress,
            channels_last([trainer.gated, trainer.teacher], cfg.compute.channels_last),
        ):
            stopped = trainer.fit(
                loader,
                epochs=cfg.train.epochs,
                steps_per_epoch=cfg.train.steps_per_epoch,
                probe_every=0 if cfg.gpu.timing == "table" else cfg.train.probe_every,
                patience=cfg.train.patience,
                on_step=lambda step: progress.step(
                    None,
                    **{"KD": step.kd, "proxy ms": step.proxy_ms, "real ms": step.measured_ms, "lambda": step.lambda_},
                ),
                on_epoch=on_epoch,
            )
            progress.done()
        if stopped == "nan" and not history:
            raise ValueError("train: the loss was not finite from the start; lower train.gate_optimizer.lr")
        student = trainer.gated
        own = student.own_gates()
        save_file({name: gate.detach().cpu() for name, gate in _thetas(student).items()}, folder / "gates.safetensors")
        if trainer.weight_optimizer is not None:
            tensors = {
                **dict(student.model.named_parameters()),
                **dict(student.model.named_buffers()),
            }  # tied ones once
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(weights, folder / "weights.safetensors")
        write_json(folder / "proxy.json", trainer.proxy.state())
        last = history[-1].as_dict() if history else {}
        return run.finish(
            "train",
            {
                "summary": _summary(stopped, history),
                "stopped": stopped,
                "epochs": len(history),
                **last,
                "target_ms": trainer.target_ms,
                "open_units": {name: int((gate >= 0.5).sum()) for name, gate in own.items()},
            },
        )


def adopt_gates(work: Workspace, run: Run) -> dict[str, Any]:
    """Take the gates that lie beside the teacher's weights instead of training.

    Raises:
        ValueError: when they do not belong to the groups that are gated.
    """
    source = work.adapter.saved_gates()
    assert source is not None
    thetas = load_file(source)
    wanted = {group.name: (group.units,) for group in work.gated_groups}
    found = {name: tuple(theta.shape) for name, theta in thetas.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))[0]
        raise ValueError(
            f"model.path: {source} has {found.get(odd, 'no gates')} for {odd}, the model wants "
            f"{wanted.get(odd, 'none')}; gate the same groups, or remove the file to train gates anew"
        )
    with work.writing("train") as folder:
        save_file(thetas, folder / "gates.safetensors")
        write_json(folder / "proxy.json", load_proxy(work, "profile").state())
        result = {"stopped": "adopted", "epochs": 0, "source": str(source)}
        return run.finish("train", {"summary": f"gates taken from {source}", **result})


def _summary(stopped: str, history: list[Step]) -> str:
    """One line for the terminal."""
    if not history:
        return "no epochs"
    last, why = history[-1], "; NaN: the gates are those of the last good epoch" if stopped == "nan" else ""
    return f"{len(history)} epochs, KD {last.kd:.3g}, predicted {last.proxy_ms:.3g} ms, lambda {last.lambda_:.3g}{why}"


def make_trainer(work: Workspace, teacher_ms: float) -> LagrangeTrainer:
    """Student, teacher, proxy, optimizers and losses as configured."""
    cfg = work.cfg
    teacher = work.teacher()
    student = Student(copy.deepcopy(teacher), work.gated_groups, work.new_gate)
    _start(work, student)
    weights = cfg.train.weight_optimizer
    sorted_parameters = parameter_groups(student)
    budget = work.budget
    return LagrangeTrainer(
        student,
        teacher,
        proxy=load_proxy(work, "profile"),
        gate_optimizer=build(cfg.train.gate_optimizer, params=sorted_parameters["gates"]),
        weight_optimizer=None
        if weights is None
        else build(weights, params=sorted_parameters["weights"] + sorted_parameters["norms_and_biases"]),
        distillation=make_distillation(work),
        penalties=[build(node) for node in cfg.penalty.values()],
        groups=work.groups,
        target_ms=budget.middle(teacher_ms) * teacher_ms if budget.has_target else None,
        teacher_ms=teacher_ms,
        lambda_init=cfg["lambda"].init,
        lambda_lr=cfg["lambda"].lr,
        minimum_fraction=cfg.train.minimum_fraction,
        measure=_probe_function(work, teacher, teacher_ms),
        slim=work.slim,
        policy=work.policy,
        accelerator=work.accelerator,
    )


def _start(work: Workspace, student: Student) -> None:
    """Gates of units that matter begin further open, if so configured."""
    node = work.cfg.train.importance
    if node.samples:
        student.to(work.accelerator.device).eval().requires_grad_(False)  # the trainer says what trains
        batches = work.data.calibration_loader(work.cfg.train.batch_size, node.samples)
        importance = fisher_importance(student, batches, work.adapter.outputs, work.cfg.distill.chunk)
        start_from_importance(student, importance, node.spread)


def _probe_function(work: Workspace, teacher: nn.Module, teacher_ms: float) -> Any:
    """Measures a sliced student beside the teacher; the ratio, which drift does not touch, gives the milliseconds."""
    if work.cfg.gpu.timing == "table":
        return None
    reference = work.timed(copy.deepcopy(teacher))  # before accelerate wraps the teacher's forward

    def measure(slim: nn.Module) -> float:
        slim.to(memory_format=torch.contiguous_format)  # as it would be saved
        return work.compare(reference, work.timed(slim), work.quick_rounds).ratio.median * teacher_ms

    return measure


def _thetas(student: Student) -> dict[str, torch.Tensor]:
    return {group.name: student.gate_of(group.name).theta for group in student.groups}
