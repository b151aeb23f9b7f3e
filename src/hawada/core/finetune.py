"""Training a plain model: the slim one against its teacher, or a teacher from labels alone."""

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

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Finetuner:
    """AdamW with linear warm-up and cosine decay on KD + label_weight * cross-entropy.

    Norms and biases take no weight decay. The last epoch's weights are the result: nothing is selected on test data.

    Args:
        epochs: passes over the data.
        lr: peak learning rate.
        weight_decay: of the weights.
        label_weight: factor of the cross-entropy when the data has labels.
        warm_up: fraction of all steps that the learning rate rises.
        clip: largest gradient norm; 0 does not clip.
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
            model: every parameter trains, BatchNorm statistics included.
            loader: sized; yields (inputs,), (inputs, labels) or (inputs, labels, numbers): by the samples' numbers,
                (batch,), the teacher's answers are remembered where the distillation has a cache.
            teacher: frozen; None trains from labels alone.
            distillation: how models are run and what is compared; its label weight gives way to this trainer's.
            accelerator: device placement and mixed precision.
            on_step: called with the losses of each step.
            on_epoch: called with (epoch from 0, mean losses).

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

    def _optimizer(self, model: nn.Module, total: int) -> tuple[Optimizer, LRScheduler]:
        """AdamW, and its learning rate over `total` steps."""
        sorted_parameters = parameter_groups(model)
        optimizer = torch.optim.AdamW(
            [
                {"params": sorted_parameters["weights"], "weight_decay": self.weight_decay},
                {"params": sorted_parameters["norms_and_biases"], "weight_decay": 0.0},
            ],
            lr=self.lr,
        )
        rising = max(1, int(self.warm_up * total))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (rising + 1), total_iters=rising),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - rising)),
            ],
            milestones=[rising],
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
        """The weighted terms: `kd` with a teacher, `label` when the batch has labels."""
        inputs, *rest = (tensor.to(accelerator.device) for tensor in batch)
        labels, numbers = (*rest, None, None)[:2]
        with accelerator.autocast():
            said = distillation.outputs_of(model, inputs)
            wanted = None if teacher is None else distillation.targets(teacher, inputs, numbers)
            losses = distillation.losses(said, wanted, labels)
        if not losses:
            raise ValueError("there is nothing to learn from: no teacher, and no labels or label_weight=0")
        return losses


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace BatchNorm statistics by plain averages over `batches` of (inputs, …); weights stay. Returns the model.

    Slicing changes what the norms see, so their old statistics are wrong until this is done.

    Raises:
        ValueError: when there are no batches; the model is of no use then.
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
        norm.momentum = None  # None averages over every batch alike
        norm.train()
    count = 0
    for batch in batches:
        model(batch[0].to(device))
        count += 1
    if count == 0:
        raise ValueError("BatchNorm statistics cannot be recomputed on no data; check finetune.recalibration_samples")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train(training)
