"""Layers of different widths: what a transformers model needs to be built when its layers are not all alike.

This file is shipped beside the weights of such a model, so it needs nothing but torch and transformers.
"""

# mypy: ignore-errors
import copy

from torch import nn


class NoBranch(nn.Module):
    """Stands where an attention or MLP was removed: adds nothing to the residual stream."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs  # an attention returns (output, weights), an MLP its output

    def forward(self, hidden_states, *args, **kwargs):
        nothing = hidden_states.new_zeros(())
        return nothing if self.outputs == 1 else (nothing, *[None] * (self.outputs - 1))


class SlimLayers:
    """Mixin in front of a transformers model class; builds each layer with the widths that `config.slim` lists.

    `config.slim` holds `layers` (path of the layer list), `branches` (for each, its module, its norm and how many
    values it returns) and `widths` (for each layer, config attributes of its own; a branch's name with False where it
    is gone).
    """

    def __init__(self, config, *args, **kwargs):
        config.validate()
        super().__init__(config, *args, **kwargs)
        layers = self.get_submodule(config.slim["layers"])
        attends = False
        for index, widths in enumerate(config.slim["widths"]):
            own = copy.deepcopy(config)
            gone = [name for name, value in widths.items() if value is False]
            for name, value in widths.items():
                if name not in gone:
                    object.__setattr__(own, name, value)
            old = layers[index]
            numbered = "layer_idx" in type(old).__init__.__code__.co_varnames
            layer = type(old)(own, index) if numbered else type(old)(own)
            for name, (branch, norm, outputs) in config.slim["branches"].items():
                if name in gone:
                    setattr(layer, branch, NoBranch(outputs))
                    setattr(layer, norm, nn.Identity())
                elif hasattr(getattr(layer, branch), "layer_idx"):
                    # A cache tells its length by its first entry (of each kind), which must not stay empty.
                    getattr(layer, branch).layer_idx = index if attends else 0
                    attends = True
            layers[index] = layer.to(next(old.parameters()).dtype)
        self.post_init()


class SlimConfig:
    """Mixin in front of a transformers config class: widths are checked layer by layer, not for the whole."""

    def validate(self):
        for check in self.__class_validators__:  # the stock class's list, which names its own validate_architecture
            getattr(self, check.__name__)()

    def validate_architecture(self):
        for widths in self.slim["widths"] if getattr(self, "slim", None) else ():
            heads, kv_heads = widths.get("num_attention_heads", 1), widths.get("num_key_value_heads", 1)
            if heads % kv_heads:
                raise ValueError(f"{heads} query heads cannot be shared equally by {kv_heads} KV heads")
