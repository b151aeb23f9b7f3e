"""Train encoder and adapters through frozen language models, which answer questions from latents."""

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
    """How long encoder and adapters are trained, with which learning rates and lengths of contexts.

    Attributes:
        steps: the number of training steps.
        contexts: the number of different contexts in a step.
        lr: the peak learning rate of AdamW; it rises linearly while warming up and then falls to 0 as a cosine.
        weight_decay: the weight decay of AdamW.
        warm_up: the fraction of the steps over which the learning rate rises.
        clip: the norm that gradients are clipped to.
        curriculum: the fraction of the steps over which contexts grow to their full length; 0 gives it at once.
        shortest: the fraction of the full length at which contexts begin.
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
        """Return the learning rate at a step, counted from 0, as a fraction of the peak."""
        rising_steps = max(1, round(self.warm_up * self.steps))
        if step < rising_steps:
            return (step + 1) / rising_steps
        return 0.5 * (1 + math.cos(math.pi * (step - rising_steps) / max(1, self.steps - rising_steps)))

    def share(self, step: int) -> float:
        """Return the length of contexts at a step, counted from 0, as a fraction of their full length."""
        growing_steps = self.curriculum * self.steps
        return 1.0 if step >= growing_steps else self.shortest + (1 - self.shortest) * step / growing_steps


class InterlinguaTrainer:
    """Train encoder and adapters with one optimizer; in every step each language model reads the same batch.

    Args:
        messenger: the encoder, adapters and features that are trained.
        llms: the frozen language models, by name.
        task: the source of examples.
        objective: the losses.
        schedule: the number of steps, learning rates and lengths of contexts.
        sequential: whether the models run forward and backward one after the other, so that the activations of only
            one of them are in memory at a time; gradients are the same.
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
        """Take one training step; return its losses, named by model and term.

        Raises:
            FloatingPointError: when a loss is not finite; parameters and optimizer are unchanged then.
        """
        examples = self.task.train_batch(self.step, self.schedule.contexts, self.schedule.share(self.step))
        self.messenger.train()
        self.optimizer.zero_grad()
        losses = self.backward(examples)
        if not all(math.isfinite(value) for value in losses.values()):
            raise FloatingPointError(
                f"step {self.step}: a loss is not finite; set interlingua.schedule.lr or .clip lower"
            )
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr * self.schedule.factor(self.step)
        self.optimizer.step()
        self.step += 1
        return losses

    def metrics(self) -> dict[str, float]:
        """Return the figures that features report, named by feature and figure."""
        features = self.messenger.features_by_name().items()
        return {f"{name}.{key}": value for name, own in features for key, value in own.metrics().items()}

    def backward(self, examples: Sequence[Example]) -> dict[str, float]:
        """Add the gradients of a batch to those of the parameters; return the losses, named by model and term."""
        latents, index = self.messenger.latents(examples)
        # Detached latents collect the gradients of one model after the other; the encoder's pass back comes at the end.
        inputs = {name: z.detach().requires_grad_() for name, z in latents.items()} if self.sequential else latents
        values: dict[str, float] = {}
        joint_losses: list[Tensor] = []
        for name, llm in self.llms.items():
            prefix = self.messenger.prefix(name, inputs[name]).rows(index)
            terms = self.objective.losses(llm, prefix, examples)
            for own, feature in self.messenger.features_by_name().items():
                further = feature.losses(llm, prefix, examples, self.step)
                terms |= {f"{own}.{term}": value for term, value in further.items()}
            loss = torch.stack(list(terms.values())).sum()
            values |= {f"{name}.{term}": float(value.detach()) for term, value in terms.items()}
            if not loss.requires_grad:  # without latents and features there is nothing to learn
                continue
            if self.sequential:
                torch.autograd.backward(loss)
                del prefix, terms, loss
            else:
                joint_losses.append(loss)
        if self.sequential:
            pairs = [(z, inputs[name].grad) for name, z in latents.items() if inputs[name].grad is not None]
            if pairs:
                torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])
        elif joint_losses:
            torch.autograd.backward(torch.stack(joint_losses).sum())
        return values
