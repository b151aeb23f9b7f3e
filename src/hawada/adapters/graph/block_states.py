"""Hidden states of residual networks for images: the outputs of their blocks."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hawada.adapters.base import Adapter
from hawada.core.distill import Outputs
from hawada.core.gates import Student


class BlockStates(Adapter):
    """An adapter whose hidden states are the outputs of residual blocks, (batch, channels, height, width).

    A block whose branch was removed still returns its shortcut, so a slim model has as many states as its teacher.

    Attributes:
        with_stream: Whether the channels that blocks add into may become fewer; no states can be compared then.
    """

    with_stream: bool

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The paths of the blocks that have a branch to remove."""
        groups = self.groups(self.skeleton())
        return tuple(group.removes[0].module for group in groups if group.kind == "branch")

    def check_outputs(self, *, features: bool, hidden: bool) -> None:
        if features:
            raise ValueError("distill.chunk: only language models are computed in chunks of tokens; set it to null")
        if hidden and self.with_stream:
            raise ValueError(
                "distill.hidden_weight: a narrower stream has no states to compare with the teacher's; set it to 0, or "
                "model.adapter.stream=false"
            )
        if hidden and not self.blocks:
            raise ValueError("distill.hidden_weight: this network has no residual blocks to compare; set it to 0")

    def outputs(self, model: nn.Module, inputs: Tensor, *, features: bool = False, hidden: bool = False) -> Outputs:
        if not hidden:
            return super().outputs(model, inputs, features=features)
        self.check_outputs(features=features, hidden=hidden)
        inner: Any = getattr(model, "module", model)  # data-parallel training wraps the model
        inner = inner.model if isinstance(inner, Student) else inner
        states: dict[str, Tensor] = {}
        handles = [inner.get_submodule(path).register_forward_hook(_StateHook(states, path)) for path in self.blocks]
        try:
            logits = self.logits(model(inputs))
        finally:
            for handle in handles:
                handle.remove()
        return Outputs(logits, hidden=tuple(states[path] for path in self.blocks))


class _StateHook:
    """A forward hook that stores a module's output under its path."""

    def __init__(self, states: dict[str, Tensor], path: str) -> None:
        self.states, self.path = states, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.states[self.path] = output
