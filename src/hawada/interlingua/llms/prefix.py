"""The prefix that a language model reads in place of a context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """Soft tokens, keys and values for every layer, or both, between the begin token and the question.

    Attributes:
        soft: input embeddings of shape (batch, tokens, width), or None.
        mask: a mask of shape (batch, tokens), True where a soft token counts; the others take no position. None: all
            count.
        keys_values: keys and values for every layer, each (batch, KV heads, tokens, head width); position embeddings
            are not applied to the keys again.
    """

    soft: Tensor | None = None
    mask: Tensor | None = None
    keys_values: KeysValues = ()

    @property
    def places(self) -> int:
        """The most places that a row takes in the cache: its soft tokens, its keys, or both."""
        soft = 0 if self.soft is None else self.soft.shape[1]
        return soft + (self.keys_values[0][0].shape[2] if self.keys_values else 0)

    def rows(self, index: Tensor | list[int]) -> Prefix:
        """Select rows of the batch, each as often as its index is given."""
        place = torch.as_tensor(index)

        def select(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, place.to(tensor.device))  # its gradient is summed in order, unlike indexing's

        return Prefix(
            None if self.soft is None else select(self.soft),
            None if self.mask is None else select(self.mask),
            tuple((select(keys), select(values)) for keys, values in self.keys_values),
        )
