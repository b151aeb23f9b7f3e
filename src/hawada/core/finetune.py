"""Training a model without gates: a slim model from its teacher, or a teacher from labels alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hawada.core.distill import Distillation
from hawada.core.gates import parameter_groups

# The norms with running statistics, which are wrong after slicing.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Finetuner:
    """AdamW with linear warm-up and cosine decay; it minimises the distillation loss + label_weight * cross-entropy.

    Norms and biases get no weight decay. The result is the weights after the last epoch: no epoch is chosen by its
    score on test data.

    Args:
        epochs: the number of passes over the data.
        lr: the peak learning rate.
        weight_decay: AdamW's weight decay, for weights with two or more axes.
        label_weight: the factor of the cross-entropy, when the data has labels.
        warm_up: the fraction of all steps over which the learning rate rises.
        clip: the largest norm of the gradient; 0 does not clip it.

    Raises:
        ValueError: when `epochs` is negative or `lr` is not above 0.
    """

    def __init__(
        self,
        epochs: int,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        label_weight: float = 1.0,
        warm_up: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        if epochs < 0 or lr <= 0:
            raise ValueError(f"epochs {epochs} must not be negative and lr {lr} must be above 0")
        self.epochs, self.lr, self.weight_decay = epochs, lr, weight_decay
        self.label_weight, self.warm_up, self.clip = label_weight, warm_up, clip

    def fit(
        self,
        model: nn.Module,
        loader: Any,
        *,
        teacher: nn.Module | None = None,
        distillation: Distillation | None = None,
        accelerator: Accelerator | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
        on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    ) -> nn.Module:
        """Train in place and return the model in eval mode.

        Args:
            model: the model, of which every parameter trains and BatchNorm statistics are updated.
            loader: an iterable with a length that yields (inputs,), (inputs, labels) or (inputs, labels, numbers). The
                numbers are the samples' indices in the data set, (batch,), by which the distillation's cache finds
                their logits.
            teacher: the frozen teacher; None trains from labels alone.
            distillation: runs the models and computes the losses; its `label_weight` is replaced by this finetuner's.
            accelerator: chooses the device and mixed precision.
            on_step: is called with the losses of each step.
            on_epoch: is called with the epoch, counted from 0, and its mean losses.

        Raises:
            ValueError: when there is neither a teacher nor labels.
            FloatingPointError: when the loss stops being finite.
        """
        accelerator = accelerator or Accelerator()
        distillation = copy.copy(distillation or Distillation())
        distillation.label_weight = self.label_weight
        model.requires_grad_(True)
        optimizer, schedule = self._optimizer(model, max(1, self.epochs * len(loader)))
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        for epoch in range(self.epochs):
            prepared.train()
            sums: dict[str, float] = {}
            for batch in loader:
                losses = self._losses(prepared, teacher, batch, distillation, accelerator)
                total_loss = torch.stack(list(losses.values())).sum()
                if not bool(torch.isfinite(total_loss)):
                    raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower the learning rate")
                optimizer.zero_grad()
                accelerator.backward(total_loss)
                if self.clip:
                    accelerator.clip_grad_norm_(prepared.parameters(), self.clip)
                optimizer.step()
                schedule.step()
                record = {name: float(value.detach()) for name, value in losses.items()}
                sums = {name: sums.get(name, 0.0) + value for name, value in record.items()}
                if on_step is not None:
                    on_step(record)
            if on_epoch is not None:
                on_epoch(epoch, {name: value / len(loader) for name, value in sums.items()})
        return model.eval()

    def _optimizer(self, model: nn.Module, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Make AdamW, and the schedule of its learning rate over all steps."""
        sorted_parameters = parameter_groups(model)
        optimizer = torch.optim.AdamW(
            [
                {"params": sorted_parameters["weights"], "weight_decay": self.weight_decay},
                {"params": sorted_parameters["norms_and_biases"], "weight_decay": 0.0},
            ],
            lr=self.lr,
        )
        rising_steps = max(1, int(self.warm_up * total_steps))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (rising_steps + 1), total_iters=rising_steps),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total_steps - rising_steps)),
            ],
            milestones=[rising_steps],
        )
        return optimizer, schedule

    def _losses(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        batch: Any,
        distillation: Distillation,
        accelerator: Accelerator,
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss: `kd` with a teacher, `label` when the batch has labels."""
        inputs, *rest = (tensor.to(accelerator.device) for tensor in batch)
        labels, numbers = (*rest, None, None)[:2]  # None for what the batch does not have
        with accelerator.autocast():
            outputs = distillation.outputs_of(model, inputs)
            targets = None if teacher is None else distillation.targets(teacher, inputs, numbers)
            losses = distillation.losses(outputs, targets, labels)
        if not losses:
            raise ValueError(
                "there is nothing to learn from: no teacher, and no labels or label_weight=0; give a teacher, or "
                "labels with label_weight above 0"
            )
        return losses


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace a model's BatchNorm statistics by plain averages over the batches, in place; returns the model.

    Slicing changes the inputs of the norms, so their old statistics are wrong until this is done. Weights stay as they
    are.

    Args:
        model: the model; without BatchNorms it is returned at once.
        batches: each is (inputs, …), of which only the inputs are used.

    Raises:
        ValueError: when there are no batches; the model's old statistics are lost then, so that it is of no use.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # None makes torch average all batches with equal weights
        norm.train()
    count = 0
    for batch in batches:
        model(batch[0].to(device))
        count += 1
    if count == 0:
        raise ValueError(
            "BatchNorm statistics cannot be recomputed without data; set finetune.recalibration_samples above 0"
        )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train(training)
