"""Gate training: distillation against the teacher under a latency constraint with an adaptive multiplier."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from hawada.core.distill import Distillation, Outputs
from hawada.core.gates import Penalty, Student, combined_penalty, parameter_groups, project_gates_into_constraints
from hawada.core.latency import Proxy
from hawada.core.structure import (
    ExportPolicy,
    Group,
    Keep,
    completed,
    full_widths,
    keep_from_gates,
    materialize,
    widths_of,
)


@dataclass(frozen=True)
class Step:
    """The figures of one optimizer step, or their means over an epoch.

    Attributes:
        kd: the distillation loss.
        penalty: the sum of the penalties.
        proxy_ms: the latency that the proxy predicts for the soft widths, in milliseconds.
        gap: (proxy_ms - target_ms) / teacher_ms; without a target, proxy_ms / teacher_ms.
        lambda_: the multiplier after the step.
        measured_ms: the measured latency of the student that was sliced last, in milliseconds; None before the first.
    """

    kd: float
    penalty: float
    proxy_ms: float
    gap: float
    lambda_: float
    measured_ms: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The figures for JSON, where the multiplier is called `lambda`."""
        record = asdict(self)
        record["lambda"] = record.pop("lambda_")
        return record


class LagrangeTrainer:
    """Minimises KD + lambda * max(0, (proxy - target) / teacher_ms) + penalties over gates.

    The gap is relative to the teacher's latency, so lambda means the same on every device. It follows dual ascent:
    lambda rises while the prediction exceeds the target, falls while the prediction is below it, and is never negative.
    With `lambda_lr=0` it is fixed. Without a target it multiplies the whole latency, and a fixed lambda traces the
    trade-off between latency and quality.

    Only gates train, with the model in eval mode, unless there is a `weight_optimizer`. Then each step has two phases:
    weights train on KD alone, and after that gates train on everything.

    Args:
        student: the gated model.
        teacher: the frozen original, without gates.
        proxy: predicts milliseconds from the widths of *all* groups.
        gate_optimizer: the optimizer of the student's thetas.
        weight_optimizer: the optimizer of the student's other parameters; None does not train them.
        distillation: runs the models and computes the distillation loss.
        penalties: the penalties on the effective gates, see `hawada.core.gates.penalties`.
        groups: all groups of the model; those without a gate count with their full width.
        target_ms: the latency to reach, in milliseconds; None has no target.
        teacher_ms: the teacher's latency, in milliseconds.
        lambda_init: the first value of lambda.
        lambda_lr: by how much lambda rises in a step for each unit of the relative gap.
        minimum_fraction: every gate keeps at least this fraction of its units in expectation.
        measure: measures a sliced model, in milliseconds; None allows no probes.
        slim: (model, kept indices) -> the sliced model that a probe measures; None slices with `materialize`.
        policy: how a probe reads widths from gates.
        accelerator: places models, optimizers and batches.

    Raises:
        ValueError: when `lambda_init` or `lambda_lr` is negative.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module,
        *,
        proxy: Proxy,
        gate_optimizer: Optimizer,
        weight_optimizer: Optimizer | None = None,
        distillation: Distillation,
        penalties: Sequence[Penalty] = (),
        groups: Sequence[Group],
        target_ms: float | None,
        teacher_ms: float,
        lambda_init: float = 1.0,
        lambda_lr: float = 0.1,
        minimum_fraction: float = 0.0,
        measure: Callable[[nn.Module], float] | None = None,
        slim: Callable[[nn.Module, Keep], nn.Module] | None = None,
        policy: ExportPolicy | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        if lambda_init < 0 or lambda_lr < 0:
            raise ValueError(f"lambda.init {lambda_init} and lambda.lr {lambda_lr} must not be negative")
        self.accelerator = accelerator or Accelerator()
        thetas = {id(theta) for theta in parameter_groups(student)["gates"]}
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in thetas or weight_optimizer is not None)
        teacher.requires_grad_(False)
        self.student, self.teacher, self.gate_optimizer = self.accelerator.prepare(student, teacher, gate_optimizer)
        self.weight_optimizer = None if weight_optimizer is None else self.accelerator.prepare(weight_optimizer)
        self.gated: Student = self.accelerator.unwrap_model(self.student)
        self.student.eval()
        self.gated.gates.train()  # gates that draw at random do so only in training mode
        self.teacher.eval()
        self.proxy, self.distillation, self.penalties, self.groups = proxy, distillation, list(penalties), list(groups)
        self.target_ms, self.teacher_ms = target_ms, teacher_ms
        self.lambda_, self.lambda_lr = float(lambda_init), float(lambda_lr)
        self.minimum_fraction = minimum_fraction
        self.measure, self.policy = measure, policy or ExportPolicy()
        self.slim = slim or (lambda model, keep: materialize(model, self.groups, keep))
        self.measured_ms: float | None = None

    def predicted_ms(self) -> Tensor:
        """The milliseconds that the proxy predicts for the soft widths: a scalar, differentiable in the gates."""
        return self.proxy.predict({**full_widths(self.groups), **self.gated.soft_widths()})

    def step_lambda(self, latency_gap: float) -> float:
        """Take one step of dual ascent and return the new lambda.

        Args:
            latency_gap: (latency - target) / teacher latency; a positive gap is too slow.
        """
        self.lambda_ = max(0.0, self.lambda_ + self.lambda_lr * latency_gap)
        return self.lambda_

    def measure_latency(self, model: nn.Module) -> float:
        """The measured latency of a sliced model, in milliseconds.

        Raises:
            ValueError: when the trainer was made without `measure`.
        """
        if self.measure is None:
            raise ValueError("this trainer has no measure function; pass measure= to take real latencies")
        return self.measure(model)

    def probe(self) -> float:
        """Slice the student by its present gates, measure it and add the measurement to the proxy's fit.

        Returns:
            The measured latency in milliseconds.

        Raises:
            ValueError: when the trainer was made without `measure`.
        """
        gates = self.gated.own_gates()
        keep = completed(keep_from_gates(gates, self.gated.groups, self.policy), self.groups)
        self.measured_ms = self.measure_latency(self.slim(self.gated.model, keep))
        self.proxy.add_sample(widths_of(keep, self.groups), self.measured_ms)
        return self.measured_ms

    def train_epoch(
        self, loader: Iterable[Any], on_step: Callable[[Step], None] | None = None, max_steps: int | None = None
    ) -> Step:
        """Train on one pass over the data; returns the means over its steps, with the last lambda.

        Args:
            loader: yields (inputs,), (inputs, labels) or (inputs, labels, numbers), with inputs of shape (batch, …).
                Labels only tell which tokens count. The numbers are the samples' indices in the data set, (batch,), by
                which the distillation's cache finds their logits.
            on_step: is called after every step, for a live display.
            max_steps: the most steps to take; None takes the whole pass.

        Raises:
            ValueError: when the data is empty.
            FloatingPointError: when a loss is not finite; the optimizer does not take that step.
        """
        steps: list[Step] = []
        for batch in islice(loader, max_steps):
            inputs, *rest = (tensor.to(self.accelerator.device) for tensor in batch)
            labels, numbers = (*rest, None, None)[:2]
            steps.append(self._step(inputs, labels, numbers))
            if on_step is not None:
                on_step(steps[-1])
        if not steps:
            raise ValueError("the training data is empty; check data.root and data.samples")
        count = len(steps)
        return Step(
            kd=sum(step.kd for step in steps) / count,
            penalty=sum(step.penalty for step in steps) / count,
            proxy_ms=sum(step.proxy_ms for step in steps) / count,
            gap=sum(step.gap for step in steps) / count,
            lambda_=self.lambda_,
            measured_ms=self.measured_ms,
        )

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        steps_per_epoch: int | None = None,
        probe_every: int = 0,
        patience: int = 0,
        converged_within: float = 0.02,
        on_step: Callable[[Step], None] | None = None,
        on_epoch: Callable[[int, Step], None] | None = None,
    ) -> str:
        """Train until the epochs are over or the gates have converged; returns the reason for stopping.

        Gates with an annealed temperature count as converged only at their final temperature.

        Args:
            loader: the data, see `train_epoch`.
            epochs: the largest number of epochs.
            steps_per_epoch: the steps that count as an epoch, where a pass over the data is long; None means a pass.
            probe_every: the number of epochs between probes, see `probe`; 0 never probes.
            patience: the number of epochs after which training stops, if in all of them the gap was within
                `converged_within` and KD did not improve by 1 %; 0 never stops early.
            converged_within: the largest relative gap that counts as on target.
            on_step: is called after every step, for a live display.
            on_epoch: is called with the epoch, counted from 0, and its means.

        Returns:
            `finished`, `settled` when the gates converged early, or `nan` when a loss, gate or weight was not finite;
            then the student is that of the last finite epoch.
        """
        last_finite, best, epochs_without_progress = self._snapshot(), math.inf, 0
        for epoch in range(epochs):
            progress = epoch / (epochs - 1) if epochs > 1 else 1.0
            for _, gate in self.gated.groups_and_gates():
                gate.anneal(progress)
            try:
                step = self.train_epoch(loader, on_step, steps_per_epoch)
                now = self._snapshot()
                if not all(bool(torch.isfinite(tensor).all()) for tensor in now.values()):
                    raise FloatingPointError("the last step made a gate or weight that is not finite")
            except FloatingPointError:
                self._restore(last_finite)
                return "nan"
            last_finite = now
            if probe_every and (epoch + 1) % probe_every == 0:
                self.probe()
            if on_epoch is not None:
                on_epoch(epoch, step)
            if self.target_ms is None or abs(step.gap) <= converged_within:
                improved = step.kd < 0.99 * best
                best = min(best, step.kd)
                epochs_without_progress = 0 if improved else epochs_without_progress + 1
                annealed = all(gate.temperature == gate.final_temperature for _, gate in self.gated.groups_and_gates())
                if patience and epochs_without_progress >= patience and annealed:
                    return "settled"
            else:
                best, epochs_without_progress = math.inf, 0
        return "finished"

    def _step(self, inputs: Tensor, labels: Tensor | None, numbers: Tensor | None) -> Step:
        """Train weights on KD, if they train at all, then gates on KD, penalties and the gap; then update lambda."""
        with self.accelerator.autocast():
            targets = self.distillation.targets(self.teacher, inputs, numbers)
        if self.weight_optimizer is not None:
            self._descend(self._distillation_loss(inputs, labels, targets), self.weight_optimizer)
        kd = self._distillation_loss(inputs, labels, targets)
        predicted = self.predicted_ms()
        penalty = combined_penalty(self.gated.effective_gates(), self.gated.groups, self.penalties)
        gap = (predicted - (self.target_ms or 0.0)) / self.teacher_ms
        self._descend(kd + self.lambda_ * torch.relu(gap).to(kd) + penalty, self.gate_optimizer)
        if self.minimum_fraction > 0:
            for group, gate in self.gated.groups_and_gates():
                project_gates_into_constraints([gate], minimum=self.minimum_fraction * group.units)
        if self.target_ms is not None:
            self.step_lambda(float(gap.detach()))
        kd_value, penalty_value, ms, gap_value = (float(value.detach()) for value in (kd, penalty, predicted, gap))
        return Step(kd_value, penalty_value, ms, gap_value, self.lambda_, self.measured_ms)

    def _distillation_loss(self, inputs: Tensor, labels: Tensor | None, targets: Outputs) -> Tensor:
        with self.accelerator.autocast():
            losses = self.distillation.losses(self.distillation.outputs_of(self.student, inputs), targets, labels)
        return torch.stack(list(losses.values())).sum()

    def _descend(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Take one optimizer step on a loss, a scalar."""
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("the loss is not finite")
        self.gate_optimizer.zero_grad()
        if self.weight_optimizer is not None:
            self.weight_optimizer.zero_grad()
        self.accelerator.backward(loss)
        optimizer.step()

    def _snapshot(self) -> dict[str, Tensor]:
        """Copies of everything that trains."""
        trained = {name for name, parameter in self.gated.named_parameters() if parameter.requires_grad}
        return {name: copy.deepcopy(tensor) for name, tensor in self.gated.state_dict().items() if name in trained}

    def _restore(self, snapshot: dict[str, Tensor]) -> None:
        self.gated.load_state_dict(snapshot, strict=False)
