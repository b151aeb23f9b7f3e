"""Trains encoder and adapters on what frozen models answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawada.interlingua.examples import Example, Task
from hawada.interlingua.llms.llm import LMWrapper
from hawada.interlingua.messenger import Messenger
from hawada.interlingua.objective import Objective


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: in all.
        contexts: different ones in a step.
        lr: peak learning rate of AdamW; it rises over the first `warm_up` of the steps and falls to 0 as a cosine.
        weight_decay: of AdamW.
        warm_up: share of the steps.
        clip: most that the gradient's norm may be.
        curriculum: share of the steps over which contexts grow to their full length; 0: they are always full.
        shortest: share of the full length at which they begin.
    """

    steps: int
    contexts: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.02
    clip: float = 1.0
    curriculum: float = 0.0
    shortest: float = 0.5

    def factor(self, step: int) -> float:
        """Of the learning rate at a step."""
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def share(self, step: int) -> float:
        """Of the contexts' full length at a step."""
        growing = self.curriculum * self.steps
        return 1.0 if step >= growing else self.shortest + (1 - self.shortest) * step / growing


class InterlinguaTrainer:
    """One optimizer over encoder and adapters; every step reads a batch with each model.

    Args:
        messenger: what is trained.
        llms: the frozen models, by name.
        task: where examples come from.
        objective: losses.
        schedule: how long.
        sequential: one model at a time is read and back-propagated, so that no two models' activations are held at
            once; gradients are the same.
    """

    def __init__(
        self,
        messenger: Messenger,
        llms: Mapping[str, LMWrapper],
        task: Task,
        objective: Objective,
        schedule: Schedule,
        *,
        sequential: bool = False,
    ) -> None:
        self.messenger, self.llms, self.task = messenger, dict(llms), task
        self.objective, self.schedule, self.sequential = objective, schedule, sequential
        self.parameters = [parameter for parameter in messenger.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.98)
        )
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """One step; returns its losses, named by model and term.

        Raises:
            FloatingPointError: when a loss is not finite; nothing is changed then.
        """
        examples = self.task.train_batch(self.step, self.schedule.contexts, self.schedule.share(self.step))
        self.messenger.train()
        self.optimizer.zero_grad()
        losses = self.backward(examples)
        if not all(math.isfinite(value) for value in losses.values()):
            raise FloatingPointError(f"step {self.step}: a loss is not finite")
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr * self.schedule.factor(self.step)
        self.optimizer.step()
        self.step += 1
        return losses

    def metrics(self) -> dict[str, float]:
        """What features tell about themselves, named by feature and figure."""
        features = self.messenger.every_feature().items()
        return {f"{name}.{key}": value for name, own in features for key, value in own.metrics().items()}

    def backward(self, examples: Sequence[Example]) -> dict[str, float]:
        """Add the gradients of a batch to the parameters; returns the losses."""
        latents, index = self.messenger.latents(examples)
        read = {name: z.detach().requires_grad_() for name, z in latents.items()} if self.sequential else latents
        found: dict[str, float] = {}
        total: list[Tensor] = []
        for name, llm in self.llms.items():
            prefix = self.messenger.prefix(name, read[name]).rows(index)
            terms = self.objective.losses(llm, prefix, examples)
            for own, feature in self.messenger.every_feature().items():
                further = feature.losses(llm, prefix, examples, self.step)
                terms |= {f"{own}.{term}": value for term, value in further.items()}
            loss = torch.stack(list(terms.values())).sum()
            found |= {f"{name}.{term}": float(value.detach()) for term, value in terms.items()}
            if not loss.requires_grad:  # no latents, no features: nothing to learn
                continue
            if self.sequential:
                loss.backward()
                del prefix, terms, loss
            else:
                total.append(loss)
        if self.sequential:
            pairs = [(z, read[name].grad) for name, z in latents.items() if read[name].grad is not None]
            if pairs:
                torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])
        elif total:
            torch.stack(total).sum().backward()
        return found
