"""Spellings of the command line: old ones that are refused, and short ones that are accepted."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig

GPU_SHORTHANDS = {"4090": "rtx4090"}

# A key that was renamed, and what is written now; a key below an old one counts as that one.
OLD_SPELLINGS = {
    "export.quality.order": "importance=gates or importance=obs (what was order=reconstruction)",
    "export.quality.worth": "export.sensitivity",
    "export.quality.compensate": "export.reconstruct",
    "export.quality.points": "export.points",
    "export.quality.samples": "calibration.samples",
    "export.quality.batch_size": "calibration.batch_size",
    "export.quality": "importance=..., export.sensitivity, export.reconstruct, export.points, calibration.samples "
    "and calibration.batch_size",
    "profile.calibration": "profile.fitted_models",
    "profile.held_out": "profile.held_out_models",
    "interlingua.calibration": "interlingua.scale",
    "runtime.mixed_precision": "compute.mixed_precision",
    "runtime.channels_last": "compute.channels_last",
}

# What `penalties.structured=true` stands for. Tried on tiny_resnet (simulated clock, target 0.5, 15 epochs, seed 0): a
# weight of 0.1 changed next to nothing, 1 lowered the variance of the mean gates within a branch by 17 % at 7 % more KD
# loss, and 10 halved it at 32 % more. So 1 is the first power of ten that does something, and 10 costs much.
STRUCTURED_WEIGHT = 1.0


def new_spelling(key: str) -> str | None:
    """A sentence that names the new spelling of a key, or None where the key was not renamed."""
    for old, new in OLD_SPELLINGS.items():
        if f"{key}.".startswith(f"{old}."):
            return f"{key}: this key has another name now; write {new}"
    return None


def check_spellings(arguments: Iterable[str]) -> None:
    """Check that the command line has no old spelling.

    Args:
        arguments: of the command; what is no override is looked over.

    Raises:
        ValueError: naming the new spelling.
    """
    for argument in arguments:
        key, equals, _ = argument.lstrip("+~").partition("=")
        told = new_spelling(key.partition("@")[0]) if equals or argument.startswith("~") else None
        if told:
            raise ValueError(told)


def expand(argument: str) -> str:
    """`gpu=4090` as `gpu=rtx4090`: Hydra refuses a choice that looks like a number."""
    key, equals, value = argument.partition("=")
    if key != "gpu" or not equals:
        return argument
    return "gpu=" + ",".join(GPU_SHORTHANDS.get(choice, choice) for choice in value.split(","))


def spell_out(cfg: DictConfig) -> None:
    """Write the two short spellings out, in place: `penalties.structured=true` and `encoder_type=byte`."""
    penalties, interlingua = cfg.get("penalties"), cfg.get("interlingua")
    if isinstance(penalties, DictConfig) and isinstance(penalties.get("structured"), bool):
        penalties.structured = STRUCTURED_WEIGHT if penalties.structured else 0.0
    if isinstance(interlingua, DictConfig) and interlingua.get("encoder_type") == "byte":
        interlingua.encoder_type = "bytes"
