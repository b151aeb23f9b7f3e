"""What an interlingua between real models would be: shapes, parameters and bytes, before any weight is loaded."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from hawada.experiment import Run
from hawada.experiment.results import DryModel, InterlinguaDryResult
from hawada.interlingua.evaluation.cost import cache_bytes, payload_bytes
from hawada.interlingua.examples import PlainExample
from hawada.interlingua.llms.prefix import Prefix
from hawada.interlingua.stages.parts import InterlinguaParts

EXAMPLE = PlainExample("A context.", "A question?", ("an answer",))


def run(cfg: DictConfig, run: Run) -> InterlinguaDryResult:
    """Write what each model would read, what would be trained, sent and saved; everything lies on the meta device."""
    parts, node = InterlinguaParts(cfg, run, dry=True), cfg.interlingua
    messenger = parts.new_messenger()
    latents, _ = messenger.latents([EXAMPLE])
    models: dict[str, DryModel] = {}
    for name, llm in parts.llms.items():
        prefix = messenger.prefix(name, latents[name])
        reading = llm.read(prefix, llm.prompts([EXAMPLE]), llm.targets([EXAMPLE]))
        models[name] = DryModel(
            parameters=count(llm.model, trainable=False),
            trainable=count(messenger.adapters[name], trainable=True),
            latents=tuple(latents[name].shape),
            prefix=shapes(prefix),
            logits=tuple(reading.logits.shape),
            cache_bytes_per_token=cache_bytes(llm, 1),
        )
    trainable = count(messenger, trainable=True)
    with run.writing("interlingua-dry"):
        frozen = " and ".join(f"{name} ({model.parameters / 1e9:.2f} G)" for name, model in models.items())
        return run.finish(
            "interlingua-dry",
            InterlinguaDryResult(
                summary=f"{node.latent_len} latents of {node.d_z} for {frozen}; {trainable:,} parameters to train",
                trainable=trainable,
                models=models,
                payload_bytes=payload_bytes(parts.latents_sent, node.d_z),
            ),
        )


def count(module: nn.Module, *, trainable: bool) -> int:
    """Parameters, all of them or those that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def shapes(prefix: Prefix) -> dict[str, tuple[int, ...]]:
    """Of what a model reads; keys and values of all layers as (layers, 2, batch, KV heads, latents, head width)."""
    found: dict[str, tuple[int, ...]] = {} if prefix.soft is None else {"soft": tuple(prefix.soft.shape)}
    if prefix.keys_values:
        found["keys_values"] = (len(prefix.keys_values), 2, *prefix.keys_values[0][0].shape)
    return found
