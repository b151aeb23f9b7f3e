"""Which configuration each stage reads, and which stages must have finished before it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: also its folder's.
        reads: config keys that it is handed; a change of one of them makes its old result another experiment's.
        needs: stages whose results it reads, apart from the teacher's.
        teacher: whether it loads the teacher, and so needs `pretrain` for a model that is trained here.
        measures: whether it takes latencies.
        retargets: whether gates that were trained for another target will do.
        writes: names of its files, relative to its folder, beside those that every stage writes; `*` stands for
            anything within one name. Only what is listed here, or what a saved model reports, is ever replaced.
    """

    name: str
    reads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    teacher: bool = False
    measures: bool = False
    retargets: bool = False
    writes: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Path of the module whose `run` runs the stage."""
        if self.name.startswith("interlingua"):
            return f"hawada.interlingua.stages.{self.name.removeprefix('interlingua').removeprefix('-') or 'train'}"
        return f"hawada.stages.{self.name}"


EVERY_STAGE_WRITES = ("config.yaml", "environment.json", "result.json")
_MODEL_FILES = (
    *("hawada.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "modeling_slim.py", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.*"),
)


def _saved(*folders: str) -> tuple[str, ...]:
    """Names of the files of saved models."""
    places = [place for folder in folders for place in (folder, f"{folder}/model")]  # the second while it is written
    return tuple(f"{place}/{name}" for place in places for name in _MODEL_FILES)


_MODEL = ("seed", "model", "runtime.threads")
_COMPUTED = (*_MODEL, "compute.mixed_precision")
_TRAINED = (*_COMPUTED, "compute.channels_last")
_SHAPE = ("budget.batch", "budget.phase", "budget.prompt", "budget.new_tokens")
_LATENCY = ("gpu", "runtime.mode", *_SHAPE, "measure", "export.minimum", "export.layout")
_RANKED = ("export.importance", "export.sensitivity", "export.reconstruct", "export.points", "calibration")
_EXPORT = ("export.widths", "export.threshold", "export.max_measurements", *_RANKED, "data", "task", "distill")
_INTERLINGUA = ("seed", "runtime.threads", "gpu.device")
TARGET = ("budget.target_ms", "budget.target_ratio", "budget.tolerance")
_TRAINING = (
    "data",
    "task",
    "budget",
    "kd",
    "distill",
    "lambda",
    "penalties",
    "penalty",
    "gate",
    "groups",
    "train",
    "proxy",
)

PLANS: dict[str, StagePlan] = {
    plan.name: plan
    for plan in (
        StagePlan(
            "inspect",
            reads=(*_MODEL, "gpu", *_SHAPE, "measure", "export.minimum", "export.layout", "gate", "groups"),
        ),
        StagePlan("doctor", reads=(*_MODEL, *_LATENCY, "doctor"), measures=True, writes=("staircase.png",)),
        StagePlan(
            "profile",
            reads=(*_MODEL, *_LATENCY, "profile", "proxy"),
            measures=True,
            writes=("latency_table.json", "proxy.json"),
        ),
        StagePlan(
            "pretrain",
            reads=(*_TRAINED, "gpu.device", "data", "task", "distill.chunk", "pretrain"),
            writes=("metrics.jsonl", *_saved("teacher")),
        ),
        StagePlan(
            "train",
            reads=(*_TRAINED, *_LATENCY, *_TRAINING, "export.threshold"),
            needs=("profile",),
            teacher=True,
            measures=True,
            writes=("metrics.jsonl", "gates.safetensors", "weights.safetensors", "proxy.json"),
        ),
        StagePlan(
            "export",
            reads=(*_COMPUTED, *_LATENCY, "budget", *_EXPORT, "gate", "groups", "proxy"),
            needs=("profile", "train"),
            teacher=True,
            measures=True,
            retargets=True,
            writes=("keep.json", *_saved("slim", "teacher")),
        ),
        StagePlan(
            "front",
            reads=(*_COMPUTED, *_LATENCY, "budget", *_EXPORT, "gate", "groups", "proxy"),
            needs=("profile", "train"),
            teacher=True,
            measures=True,
            retargets=True,
            writes=("front.png", "*/keep.json", *_saved("*/slim")),
        ),
        StagePlan(
            "finetune",
            reads=(*_TRAINED, "gpu.device", "data", "task", "kd", "distill", "finetune"),
            needs=("export",),
            teacher=True,
            writes=("metrics.jsonl", "check_outputs.safetensors", *_saved("slim")),
        ),
        StagePlan(
            "evaluate",
            reads=(*_MODEL, *_LATENCY, "data", "task", "budget", "evaluate"),
            needs=("profile", "train", "export", "finetune"),
            teacher=True,
            measures=True,
            retargets=True,
            writes=("verification.json",),
        ),
        StagePlan(
            "publish",
            reads=(*_MODEL, "gpu.device", *_SHAPE, "export.formats", "export.push_to", "export.push"),
            needs=("train", "export", "finetune", "evaluate"),
            retargets=True,
            writes=("slim.onnx", "slim.onnx.data", "slim.pt2", "slim.onnx/slim.onnx*", "slim.pt2/slim.pt2"),
        ),
        StagePlan("interlingua-dry", reads=(*_INTERLINGUA, "llms", "interlingua")),
        StagePlan(
            "interlingua-llms", reads=(*_INTERLINGUA, "llms"), writes=("metrics.jsonl", *_saved("llama", "qwen"))
        ),
        StagePlan(
            "interlingua",
            reads=(*_INTERLINGUA, "llms", "data", "interlingua"),
            needs=("interlingua-llms",),
            writes=(
                "attempt.json",
                "metrics.jsonl",
                "best/state.json",
                "best/tensors.safetensors",
                "last/state.json",
                "last/tensors.safetensors",
            ),
        ),
        StagePlan(
            "interlingua-eval",
            reads=(*_INTERLINGUA, "llms", "data", "interlingua", "evaluate", "gpu", "runtime.mode", "measure"),
            needs=("interlingua-llms", "interlingua"),
            measures=True,
            writes=("rows.md",),
        ),
    )
}
# Keys that a group's choices fill, where these are not called the same.
OF_GROUP = {"feature": "interlingua.features", "importance": "export.importance", "teacher": "distill.teacher"}
INTERLINGUA = tuple(name for name in PLANS if name.startswith("interlingua"))


def planned(stage: str, cfg: DictConfig) -> list[str]:
    """The stages that a command checks and runs: one, or all of a pipeline's. `inspect` is not among them, as it is
    always done anew. An export for many targets is `front`.

    Raises:
        ValueError: when there is no such stage, or several targets are given to another stage.
    """
    if stage not in (*PLANS, "pipeline"):
        raise ValueError(f"stage: there is no stage {stage}; choose among {', '.join((*PLANS, 'pipeline'))}")
    if stage == "inspect":
        return []
    if stage in INTERLINGUA:
        return [*upstream(stage, cfg), stage] if stage == "interlingua" else [stage]
    many = OmegaConf.is_list(cfg.budget.target_ratio)
    if many and stage == "export":
        return ["front"]
    if many and stage in (*PLANS, "pipeline"):
        raise ValueError(
            "budget.target_ratio: several targets are for stage=export, once gates are trained; "
            "to train for each, sweep with -m budget.target_ratio=0.8,0.6"
        )
    return order(cfg) if stage == "pipeline" else [name for name in PLANS if name == stage]


def order(cfg: DictConfig) -> list[str]:
    """The stages of a whole pipeline, in order."""
    left_out = {"inspect", "doctor", "front", *INTERLINGUA} | (set() if cfg.model.pretrain else {"pretrain"})
    if cfg.export.push_to is None and set(cfg.export.formats) <= {"hf"}:
        left_out.add("publish")
    return [name for name in PLANS if name not in left_out]


def upstream(name: str, cfg: DictConfig) -> list[str]:
    """Stages that must have finished before `name`, in order."""
    plan = PLANS[name]
    if name in INTERLINGUA:
        return [n for n in INTERLINGUA if n in plan.needs and (n != "interlingua-llms" or trains_llms(cfg))]
    return [n for n in order(cfg) if n in plan.needs or (n == "pretrain" and plan.teacher)]


def trains_llms(cfg: DictConfig) -> bool:
    """Whether the interlingua's models are trained here, as those are that come without weights."""
    nodes = [node for node in cfg.llms.values() if OmegaConf.is_dict(node)]
    return any("source" in node and node.source is None for node in nodes)


def everything_read(name: str, cfg: DictConfig) -> set[str]:
    """Config keys that a stage's result depends on, its upstream's included."""
    keys = set(PLANS[name].reads)
    for earlier in upstream(name, cfg):
        keys |= everything_read(earlier, cfg)
    return keys
