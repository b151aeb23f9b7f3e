"""Trains the gates against the teacher under the latency budget."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.config import build
from hawada.core.files import write_json
from hawada.core.gates import Student, parameter_groups
from hawada.core.importance.fisher import fisher_importance, start_from_importance
from hawada.core.memory_format import channels_last
from hawada.core.train import LagrangeTrainer, Step
from hawada.experiment import MetricsLog, Run
from hawada.experiment.results import TrainResult
from hawada.report import Progress
from hawada.workspace import ModelStopwatch, Subject, load_proxy, make_distillation, open_stage


def run(cfg: DictConfig, run: Run) -> TrainResult:
    """Write `train/gates.safetensors` (theta by group name) and the proxy as corrected by probes."""
    subject, watch, store = open_stage(cfg, run)
    if subject.adapter.saved_gates() is not None:
        return adopt_gates(subject, run)
    profile = run.result("profile")
    with store.writing("train") as folder:
        trainer = make_trainer(watch, profile.teacher_ms)
        loader = subject.data.train_loader(cfg.train.batch_size, cfg.seed)
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
        result = TrainResult(
            summary=_summary(stopped, history),
            stopped=stopped,
            epochs=len(history),
            target_ms=trainer.target_ms,
            open_units={name: int((gate >= 0.5).sum()) for name, gate in own.items()},
        )
        return run.finish("train", replace(result, **asdict(history[-1])) if history else result)


def adopt_gates(subject: Subject, run: Run) -> TrainResult:
    """Take the gates that lie beside the teacher's weights instead of training.

    Raises:
        ValueError: when they do not belong to the groups that are gated.
    """
    source = subject.adapter.saved_gates()
    assert source is not None
    thetas = load_file(source)
    expected = {group.name: (group.units,) for group in subject.gated_groups}
    found = {name: tuple(theta.shape) for name, theta in thetas.items()}
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[0]
        raise ValueError(
            f"model.path: {source} has {found.get(odd, 'no gates')} for {odd}, the model takes "
            f"{expected.get(odd, 'none')}; gate the same groups, or remove the file to train gates anew"
        )
    with subject.store.writing("train") as folder:
        save_file(thetas, folder / "gates.safetensors")
        write_json(folder / "proxy.json", load_proxy(subject, "profile").state())
        summary = f"gates taken from {source}"
        return run.finish("train", TrainResult(summary=summary, stopped="adopted", epochs=0, source=str(source)))


def _summary(stopped: str, history: list[Step]) -> str:
    """One line for the terminal."""
    if not history:
        return "no epochs"
    last, why = history[-1], "; NaN: the gates are those of the last good epoch" if stopped == "nan" else ""
    return f"{len(history)} epochs, KD {last.kd:.3g}, predicted {last.proxy_ms:.3g} ms, lambda {last.lambda_:.3g}{why}"


def make_trainer(watch: ModelStopwatch, teacher_ms: float) -> LagrangeTrainer:
    """Student, teacher, proxy, optimizers and losses as configured."""
    subject, cfg = watch.subject, watch.cfg
    teacher = subject.teacher()
    student = Student(copy.deepcopy(teacher), subject.gated_groups, subject.new_gate)
    _start(subject, student)
    weights = cfg.train.weight_optimizer
    sorted_parameters = parameter_groups(student)
    budget = watch.budget
    return LagrangeTrainer(
        student,
        teacher,
        proxy=load_proxy(subject, "profile"),
        gate_optimizer=build(cfg.train.gate_optimizer, params=sorted_parameters["gates"]),
        weight_optimizer=None
        if weights is None
        else build(weights, params=sorted_parameters["weights"] + sorted_parameters["norms_and_biases"]),
        distillation=make_distillation(subject),
        penalties=[build(node) for node in cfg.penalty.values()],
        groups=subject.groups,
        target_ms=budget.middle(teacher_ms) * teacher_ms if budget.has_target else None,
        teacher_ms=teacher_ms,
        lambda_init=cfg["lambda"].init,
        lambda_lr=cfg["lambda"].lr,
        minimum_fraction=cfg.train.minimum_fraction,
        measure=_probe_function(watch, teacher, teacher_ms),
        slim=subject.slim,
        policy=subject.policy,
        accelerator=subject.accelerator,
    )


def _start(subject: Subject, student: Student) -> None:
    """Gates of units that matter begin further open, if so configured."""
    node = subject.cfg.train.importance
    if node.samples:
        student.to(subject.accelerator.device).eval().requires_grad_(False)  # the trainer chooses what trains
        batches = subject.data.calibration_loader(subject.cfg.train.batch_size, node.samples)
        importance = fisher_importance(student, batches, subject.outputs, subject.cfg.distill.chunk, subject.task)
        start_from_importance(student, importance, node.spread)


def _probe_function(watch: ModelStopwatch, teacher: nn.Module, teacher_ms: float) -> Any:
    """Measures a sliced student beside the teacher; the ratio, which drift does not touch, gives the milliseconds."""
    if watch.cfg.gpu.timing == "table":
        return None
    inputs, reference = (
        watch.inputs(),
        watch.timed(copy.deepcopy(teacher)),
    )  # before accelerate wraps the teacher's forward

    def measure(slim: nn.Module) -> float:
        slim.to(memory_format=torch.contiguous_format)  # as it would be saved
        return watch.compare(reference, watch.timed(slim), inputs, watch.quick_rounds).ratio.median * teacher_ms

    return measure


def _thetas(student: Student) -> dict[str, torch.Tensor]:
    return {group.name: student.gate_of(group.name).theta for group in student.groups}
