"""The configuration: where it lies, what is wrong with it, and how objects are made from it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf

GATES = "hawada.core.importance.gates.Gates"  # the only importance whose scores also compare groups
GPU_SHORTHANDS = {"4090": "rtx4090"}


def conf_dir() -> str:
    """The folder with the configuration: inside the wheel, else in the checkout."""
    package = Path(__file__).resolve().parent
    return str(next(path for path in (package / "conf", package.parents[1] / "conf") if path.is_dir()))


def register_resolvers() -> None:
    """`${unless:a,b}` is null when `a` is set and `b` otherwise: a default that gives way to an alternative key."""
    OmegaConf.register_new_resolver(
        "unless", lambda given, default: None if given is not None else default, replace=True
    )


def build(node: Any, **arguments: Any) -> Any:
    """Make the object that a node's `_target_` names; the only place that instantiates.

    Args:
        node: a config node with `_target_`.
        arguments: objects handed to the constructor as they are.

    Raises:
        ValueError: one sentence naming the target, when it cannot be imported or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        partial = instantiate(node, _convert_="all", _partial_=True)
        return partial(**arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"{node.get('_target_')}: {' '.join(str(cause).split())}") from error
    except TypeError as error:
        raise ValueError(f"{node.get('_target_')}: {error}; its arguments are the keys beside _target_") from error


@dataclass(frozen=True)
class Range:
    """Values that a number may have; `above` excludes the lower end."""

    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        lower = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        return f"{kind} {lower}" + ("" if math.isinf(self.high) else f" and at most {self.high:g}")


POSITIVE, NOT_NEGATIVE = Range(0, above=True), Range(0)
COUNT, COUNT_OR_ZERO = Range(1, whole=True), Range(0, whole=True)

# A key that is absent (a user's own class has other arguments) is not checked.
RANGES: dict[str, Range] = {
    "seed": COUNT_OR_ZERO,
    "budget.target_ms": POSITIVE,
    "budget.target_ratio": Range(0, 1, above=True),
    "budget.tolerance": Range(0, 0.5, above=True),
    "budget.batch": COUNT,
    "budget.prompt": COUNT,
    "budget.new_tokens": Range(2, whole=True),
    "distill.chunk": COUNT,
    "distill.hidden_weight": NOT_NEGATIVE,
    "runtime.threads": COUNT,
    "measure.precision": POSITIVE,
    "measure.min_rounds": Range(2, whole=True),
    "measure.max_rounds": Range(2, whole=True),
    "measure.max_seconds": POSITIVE,
    "measure.patience_s": NOT_NEGATIVE,
    "kd.temperature": POSITIVE,
    "kd.mse_weight": NOT_NEGATIVE,
    "lambda.init": NOT_NEGATIVE,
    "lambda.lr": NOT_NEGATIVE,
    "penalties.l1": NOT_NEGATIVE,
    "penalties.structured": NOT_NEGATIVE,
    "penalties.polarization": NOT_NEGATIVE,
    "penalties.floor": Range(0, 1),
    "penalties.ceiling": Range(0, 1),
    "penalties.bounds": NOT_NEGATIVE,
    "gate.temperature": POSITIVE,
    "gate.start_temperature": POSITIVE,
    "profile.points": Range(2, whole=True),
    "profile.fitted_models": COUNT_OR_ZERO,
    "profile.held_out_models": Range(2, whole=True),
    "doctor.points": Range(8, whole=True),
    "doctor.max_seconds": POSITIVE,
    "train.epochs": COUNT_OR_ZERO,
    "train.batch_size": COUNT,
    "train.steps_per_epoch": COUNT,
    "train.probe_every": COUNT_OR_ZERO,
    "train.patience": COUNT_OR_ZERO,
    "train.minimum_fraction": Range(0, 1),
    "train.importance.samples": COUNT_OR_ZERO,
    "train.importance.spread": NOT_NEGATIVE,
    "export.threshold": Range(0, 1, above=True),
    "export.max_measurements": COUNT,
    "calibration.samples": COUNT_OR_ZERO,
    "calibration.batch_size": COUNT,
    "export.points": Range(2, whole=True),
    "pretrain.batch_size": COUNT,
    "pretrain.trainer.epochs": COUNT_OR_ZERO,
    "pretrain.trainer.lr": POSITIVE,
    "finetune.batch_size": COUNT,
    "finetune.recalibration_samples": COUNT_OR_ZERO,
    "finetune.trainer.epochs": COUNT_OR_ZERO,
    "finetune.trainer.lr": POSITIVE,
    "finetune.trainer.label_weight": NOT_NEGATIVE,
    "evaluate.batch_size": COUNT,
    "evaluate.prompt_steps": COUNT_OR_ZERO,
    "interlingua.latent_len": COUNT_OR_ZERO,
    "interlingua.private_len": COUNT_OR_ZERO,
    "interlingua.d_z": COUNT,
    "interlingua.samples": COUNT,
    "interlingua.epochs": COUNT,
    "interlingua.max_source_tokens": COUNT,
    "interlingua.max_new_tokens": COUNT,
    "interlingua.save_every": COUNT,
    "interlingua.test_contexts": Range(2, whole=True),
    "interlingua.schedule.steps": COUNT,
    "interlingua.schedule.contexts": COUNT,
    "interlingua.schedule.lr": POSITIVE,
}

# Keys for which null has a meaning.
NULLABLE = (
    "budget.target_ms",
    "budget.target_ratio",
    "budget.tolerance",
    "budget.batch",
    "runtime.threads",
    "distill.chunk",
    "measure.precision",
    "measure.max_rounds",
    "train.steps_per_epoch",
    "gate.start_temperature",
    "interlingua.samples",
    "interlingua.epochs",
    "evaluate.prompt_steps",
)

RUNTIMES = ("eager", "cudagraph", "compile")

CHOICES: dict[str, tuple[Any, ...]] = {
    "gpu.timing": ("measured", "simulated", "table"),
    "gpu.dtype": ("float32", "bfloat16", "float16"),
    "gpu.device": ("auto", "cpu", "mps", "cuda"),
    "export.widths": ("allocation", "gates"),
    "export.layout": ("uniform", "heterogeneous"),
    "export.sensitivity": ("measured", "gates"),
    "export.reconstruct": (False, True),
    "export.push": ("slim", "gated"),
    "budget.phase": ("forward", "prefill", "decode", "generate"),
    "runtime.mode": ("eager", "cudagraph", "compile"),
    "compute.mixed_precision": ("no", "bf16", "fp16"),
    "compute.channels_last": (False, True),
}


def check_targets(node: Any, key: str = "") -> None:
    """Check that every class that a configuration names can be imported.

    Raises:
        ValueError: naming the key.
    """
    if OmegaConf.is_list(node):
        for index, inner in enumerate(node):
            check_targets(inner, f"{key}[{index}]")
    if not OmegaConf.is_dict(node):
        return
    for name, inner in node.items():
        here = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            try:
                resolve_name(inner)
            except Exception as error:  # whatever importing a user's module may raise
                reason = " ".join(str(error).split())
                raise ValueError(f"{here}: {inner} cannot be imported ({reason}); is its package installed?") from error
        check_targets(inner, here)


def validate(cfg: DictConfig, *, measures: bool, reads: Iterable[str] = ()) -> None:
    """Check everything that can be known before anything heavy is imported.

    Args:
        cfg: the composed configuration.
        measures: whether a stage takes latencies, and so needs the device that `gpu=` names.
        reads: the keys that the stages read; only these need a value where `conf/` has none.

    Raises:
        ValueError: one sentence with the key, what came, what was wanted and the remedy.
    """
    if measures and cfg.gpu.timing == "measured":
        from hawada.core.latency import check_device, check_runtime

        check_device(gpu=cfg.gpu.name, device=cfg.gpu.device, match=cfg.gpu.match)
        check_runtime(cfg.runtime.mode, gpu=cfg.gpu.name, device=cfg.gpu.device)
    read = {key.partition(".")[0] for key in reads}
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.partition(".")[0] in read)
    if missing:
        raise ValueError(f"{missing[0]}: no value is given; set {missing[0]}=...")
    for key, allowed in RANGES.items():
        parent, _, last = key.rpartition(".")
        if last not in (OmegaConf.select(cfg, parent) if parent else cfg):
            continue
        value = OmegaConf.select(cfg, key)
        listed = list(value) if OmegaConf.is_list(value) and value and key == "budget.target_ratio" else [value]
        if any(each not in allowed for each in listed) and not (value is None and key in NULLABLE):
            raise ValueError(f"{key}: {value} is not {allowed}; set {key} to one")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}; set {key} to one of them")
    if cfg.budget.target_ms is not None and cfg.budget.target_ratio is not None:
        raise ValueError(
            "budget.target_ratio: a target in milliseconds (budget.target_ms or latency_target_ms) is given too; "
            "set one of the two and leave the other out"
        )
    ranked_by = cfg.export.importance.get("_target_")
    if ranked_by != GATES and (
        cfg.export.sensitivity == "gates" or cfg.export.widths == "gates" or not cfg.calibration.samples
    ):
        raise ValueError(
            f"importance: the scores of {ranked_by} rank units within a group and do not compare groups; set "
            "export.sensitivity=measured, export.widths=allocation and calibration.samples above 0"
        )
    if cfg.penalties.floor > cfg.penalties.ceiling:
        raise ValueError(f"penalties.floor: {cfg.penalties.floor} is above penalties.ceiling; lower it")
    for kind, value in cfg.export.minimum.items():
        if value not in COUNT_OR_ZERO:
            raise ValueError(f"export.minimum.{kind!s}: {value} is not {COUNT_OR_ZERO}; set it to one")
    _check_multiples(cfg.gpu.multiple)
    for runtime in cfg.doctor.runtimes or ():
        if runtime not in RUNTIMES:
            raise ValueError(f"doctor.runtimes: {runtime} is not one of {', '.join(RUNTIMES)}; list some of them")
    root = None if "data" not in read or OmegaConf.is_missing(cfg.data, "root") else cfg.data.get("root")
    if root is not None and not Path(root).exists():
        raise ValueError(f"data.root: {root} does not exist; set data.root to the folder that holds the data")


def _check_multiples(multiple: DictConfig) -> None:
    for kind, values in multiple.items():
        listed: Sequence[Any] = [values] if not OmegaConf.is_list(values) else list(values)
        if not listed or any(value not in COUNT for value in listed):
            raise ValueError(f"gpu.multiple.{kind!s}: {values} is not {COUNT} or a list of such; use 1 for no rounding")
