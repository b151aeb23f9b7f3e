"""What a language model reads in place of a context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """Soft tokens, keys and values for every layer, or both; behind the begin token and before the question.

    Attributes:
        soft: input embeddings, (batch, tokens, width), or None.
        mask: (batch, tokens), True where a soft token counts; None: all do. One that does not takes no position.
        keys_values: for every layer keys and values, each (batch, KV heads, tokens, head width); keys are taken as they
            are, already rotated.
    """

    soft: Tensor | None = None
    mask: Tensor | None = None
    keys_values: KeysValues = ()

    @property
    def places(self) -> int:
        """In the cache that it takes at most: soft tokens, keys, or both."""
        soft = 0 if self.soft is None else self.soft.shape[1]
        return soft + (self.keys_values[0][0].shape[2] if self.keys_values else 0)

    def rows(self, index: Tensor | list[int]) -> Prefix:
        """The prefix of some of the batch's rows, each as often as it is named."""
        place = torch.as_tensor(index)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, place.to(tensor.device))  # its gradient is summed in order, unlike indexing's

        return Prefix(
            None if self.soft is None else chosen(self.soft),
            None if self.mask is None else chosen(self.mask),
            tuple((chosen(keys), chosen(values)) for keys, values in self.keys_values),
        )
