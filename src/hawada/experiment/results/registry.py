"""Which stage writes which result."""

from __future__ import annotations

from typing import Any

from hawada.experiment.results.diagnosis import DoctorResult, InspectResult
from hawada.experiment.results.interlingua import (
    InterlinguaDryResult,
    InterlinguaEvalResult,
    InterlinguaLLMsResult,
    InterlinguaResult,
)
from hawada.experiment.results.pruning import (
    EvaluateResult,
    ExportResult,
    FinetuneResult,
    FrontResult,
    PretrainResult,
    ProfileResult,
    PublishResult,
    TrainResult,
)
from hawada.experiment.results.record import from_json
from hawada.experiment.results.shared import StageResult

RESULTS: dict[str, type[StageResult]] = {
    "inspect": InspectResult,
    "doctor": DoctorResult,
    "profile": ProfileResult,
    "pretrain": PretrainResult,
    "train": TrainResult,
    "export": ExportResult,
    "front": FrontResult,
    "finetune": FinetuneResult,
    "evaluate": EvaluateResult,
    "publish": PublishResult,
    "interlingua-dry": InterlinguaDryResult,
    "interlingua-llms": InterlinguaLLMsResult,
    "interlingua": InterlinguaResult,
    "interlingua-eval": InterlinguaEvalResult,
}


def result_from_json(stage: str, plain: object, *, place: str, remedy: str) -> Any:
    """A stage's result from what `json.loads` gave.

    Args:
        stage: which wrote it.
        plain: the JSON.
        place: where it came from, for the message.
        remedy: what helps where it does not fit.

    Raises:
        ValueError: when it is not a result of that stage.
    """
    return from_json(RESULTS[stage], plain, place=place, remedy=remedy)
