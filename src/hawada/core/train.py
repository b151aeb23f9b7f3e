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
    """What one optimizer step, or the mean over an epoch, looked like.

    Attributes:
        kd: distillation loss.
        penalty: sum of the penalties.
        proxy_ms: predicted milliseconds of the soft widths.
        gap: (proxy_ms - target_ms) / teacher_ms; without a target, proxy_ms / teacher_ms.
        lambda_: the multiplier after the step.
        measured_ms: the last measured sliced student, or None.
    """

    kd: float
    penalty: float
    proxy_ms: float
    gap: float
    lambda_: float
    measured_ms: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """For JSON; the multiplier is called lambda there."""
        record = asdict(self)
        record["lambda"] = record.pop("lambda_")
        return record


class LagrangeTrainer:
    """Minimises KD + lambda * max(0, (proxy - target) / teacher_ms) + penalties over gates.

    The gap is relative to the teacher's latency, so lambda means the same on every device. lambda follows by dual
    ascent: it rises while the prediction exceeds the target, falls while there is slack, and never below 0. With
    `lambda_lr=0` it is fixed; without a target the whole latency is the cost, which traces the trade-off.

    Only gates train, with the model in eval mode, unless `weight_optimizer` is given; then each step has two phases:
    weights on KD, then gates on everything.

    Args:
        student: gated model.
        teacher: the original, or a frozen copy; called without gates.
        proxy: widths of *all* groups -> milliseconds.
        gate_optimizer: over the student's thetas.
        weight_optimizer: over its other parameters, or None.
        distillation: what the student is to reproduce.
        penalties: see `hawada.core.gates.penalties`.
        groups: every group that the proxy knows; those without a gate count as full.
        target_ms: or None.
        teacher_ms: the latency that makes gaps relative.
        lambda_init: first value of the multiplier.
        lambda_lr: its rise per step and unit of relative gap.
        minimum_fraction: every gate is projected to keep at least this fraction of its units in expectation.
        measure: a sliced model -> milliseconds, for `measure_latency`; None disables probes.
        slim: (model, kept indices) -> the sliced model that probes measure; None cuts a copy in place.
        policy: how probes read widths from gates.
        accelerator: places models, optimizers and batches.
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
        self.gated.gates.train()  # a gate that draws does so while it is trained
        self.teacher.eval()
        self.proxy, self.distillation, self.penalties, self.groups = proxy, distillation, list(penalties), list(groups)
        self.target_ms, self.teacher_ms = target_ms, teacher_ms
        self.lambda_, self.lambda_lr = float(lambda_init), float(lambda_lr)
        self.minimum_fraction = minimum_fraction
        self.measure, self.policy = measure, policy or ExportPolicy()
        self.slim = slim or (lambda model, keep: materialize(model, self.groups, keep))
        self.measured_ms: float | None = None

    def predicted_ms(self) -> Tensor:
        """The proxy's milliseconds for the present soft widths; differentiable in the gates."""
        return self.proxy.predict({**full_widths(self.groups), **self.gated.soft_widths()})

    def step_lambda(self, latency_gap: float) -> float:
        """Dual ascent by one step; returns the new multiplier.

        Args:
            latency_gap: (latency - target) / teacher latency; positive means too slow.
        """
        self.lambda_ = max(0.0, self.lambda_ + self.lambda_lr * latency_gap)
        return self.lambda_

    def measure_latency(self, model: nn.Module) -> float:
        """Really measured milliseconds of a sliced model.

        Raises:
            ValueError: when the trainer was made without `measure`.
        """
        if self.measure is None:
            raise ValueError("this trainer has no measure function; pass measure= to take real latencies")
        return self.measure(model)

    def probe(self) -> float:
        """Slice the student where its gates stand, measure it and add the figure to the proxy's fit."""
        gates = self.gated.own_gates()
        keep = completed(keep_from_gates(gates, self.gated.groups, self.policy), self.groups)
        self.measured_ms = self.measure_latency(self.slim(self.gated.model, keep))
        self.proxy.add_sample(widths_of(keep, self.groups), self.measured_ms)
        return self.measured_ms

    def train_epoch(
        self, loader: Iterable[Any], on_step: Callable[[Step], None] | None = None, max_steps: int | None = None
    ) -> Step:
        """One pass over the data, or its first `max_steps` batches; returns means over its steps (and the last lambda).

        Args:
            loader: yields (inputs,), (inputs, labels) or (inputs, labels, numbers), inputs of shape (batch, …). Labels
                only tell which tokens count; by the samples' numbers, (batch,), answers are remembered where the
                distillation has a cache.
            on_step: called after every step, for live display.
            max_steps: at most so many steps.

        Raises:
            FloatingPointError: when a loss is not finite; the optimizer step that it was for is not taken.
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
        settle: float = 0.02,
        on_step: Callable[[Step], None] | None = None,
        on_epoch: Callable[[int, Step], None] | None = None,
    ) -> str:
        """Train until the epochs are over or the gates have settled; returns why it stopped.

        Gates whose temperature comes down do not settle before it is down.

        Args:
            loader: see `train_epoch`.
            epochs: the most passes.
            steps_per_epoch: where a pass is long, what counts as one; None means all the data.
            probe_every: measure a sliced student after every so many epochs; 0 never.
            patience: stop when the gap has been within `settle` and KD has not improved by 1 % for so many epochs;
                0 never.
            settle: relative gap that counts as on target.
            on_step: see `train_epoch`.
            on_epoch: called with (epoch from 0, means).

        Returns:
            `finished`, `settled`, or `nan`: then the gates are those of the last finite epoch.
        """
        good, best, waited = self._snapshot(), math.inf, 0
        for epoch in range(epochs):
            progress = epoch / (epochs - 1) if epochs > 1 else 1.0
            for gate in self.gated.gates:
                gate.anneal(progress)  # type: ignore[operator]
            try:
                step = self.train_epoch(loader, on_step, steps_per_epoch)
                now = self._snapshot()
                if not all(bool(torch.isfinite(tensor).all()) for tensor in now.values()):
                    raise FloatingPointError("the last step made a gate or weight that is not finite")
            except FloatingPointError:
                self._restore(good)
                return "nan"
            good = now
            if probe_every and (epoch + 1) % probe_every == 0:
                self.probe()
            if on_epoch is not None:
                on_epoch(epoch, step)
            if self.target_ms is None or abs(step.gap) <= settle:
                improved = step.kd < 0.99 * best
                best, waited = min(best, step.kd), 0 if improved else waited + 1
                cooled = all(gate.temperature == gate.final_temperature for gate in self.gated.gates)
                if patience and waited >= patience and cooled:
                    return "settled"
            else:
                best, waited = math.inf, 0
        return "finished"

    def _step(self, inputs: Tensor, labels: Tensor | None, numbers: Tensor | None) -> Step:
        """Weights on KD if they train, then gates on KD, penalties and the latency gap, then lambda."""
        with self.accelerator.autocast():
            said = self.distillation.targets(self.teacher, inputs, numbers)
        if self.weight_optimizer is not None:
            self._descend(self._distill(inputs, labels, said), self.weight_optimizer)
        kd = self._distill(inputs, labels, said)
        predicted = self.predicted_ms()
        penalty = combined_penalty(self.gated.effective_gates(), self.gated.groups, self.penalties)
        gap = (predicted - (self.target_ms or 0.0)) / self.teacher_ms
        self._descend(kd + self.lambda_ * torch.relu(gap).to(kd) + penalty, self.gate_optimizer)
        if self.minimum_fraction > 0:
            for group, gate in zip(self.gated.groups, self.gated.gates, strict=True):
                project_gates_into_constraints([gate], minimum=self.minimum_fraction * group.units)  # type: ignore[list-item]
        if self.target_ms is not None:
            self.step_lambda(float(gap.detach()))
        kd_value, penalty_value, ms, gap_value = (float(value.detach()) for value in (kd, penalty, predicted, gap))
        return Step(kd_value, penalty_value, ms, gap_value, self.lambda_, self.measured_ms)

    def _distill(self, inputs: Tensor, labels: Tensor | None, said: Outputs) -> Tensor:
        with self.accelerator.autocast():
            losses = self.distillation.losses(self.distillation.outputs_of(self.student, inputs), said, labels)
        return torch.stack(list(losses.values())).sum()

    def _descend(self, loss: Tensor, optimizer: Optimizer) -> None:
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError("the loss is not finite")
        self.gate_optimizer.zero_grad()
        if self.weight_optimizer is not None:
            self.weight_optimizer.zero_grad()
        self.accelerator.backward(loss)
        optimizer.step()

    def _snapshot(self) -> dict[str, Tensor]:
        trained = {name for name, parameter in self.gated.named_parameters() if parameter.requires_grad}
        return {name: copy.deepcopy(tensor) for name, tensor in self.gated.state_dict().items() if name in trained}

    def _restore(self, snapshot: dict[str, Tensor]) -> None:
        self.gated.load_state_dict(snapshot, strict=False)
