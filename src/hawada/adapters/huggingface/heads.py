"""The attention heads of any supported transformers model, found out from the model itself."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hawada.adapters.attach import is_attention_layer
from hawada.adapters.huggingface.llama import LlamaAdapter
from hawada.adapters.huggingface.vit import ViTAdapter
from hawada.core.structure import Group

FAMILIES = (LlamaAdapter, ViTAdapter)


class AttentionHeadAdapter:
    """Declares heads and nothing else, for `attach_adapters` in a program of one's own."""

    def groups(self, model: nn.Module) -> list[Group]:
        """KV heads and query heads, or heads, of every layer.

        Raises:
            ValueError: when the model is of no family that is known here.
        """
        paths = dict(model.named_modules())
        family = next((family for family in FAMILIES if family.layers in paths), None)
        if family is None:
            known = ", ".join(family.__name__ for family in FAMILIES)
            raise ValueError(f"{type(model).__name__} is none of the families of {known}; write an adapter for it")
        heads = [group for group in family().groups(model) if is_attention_layer(group, model)]
        names = {group.name for group in heads}
        return [group if group.parent in names else replace(group, parent=None) for group in heads]
