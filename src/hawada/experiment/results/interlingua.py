"""The results of the interlingua's stages. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hawada.core.verdict import Interval, Latency
from hawada.experiment.results.record import record
from hawada.experiment.results.shared import Environment, StageResult


@record
class DryModel:
    """What one language model would read.

    Attributes:
        parameters: of the frozen model.
        trainable: parameters of its adapter.
        latents: shape of what it is sent.
        prefix: shapes of what it reads.
        logits: shape of what comes out.
        cache_bytes_per_token: bytes of keys and values.
    """

    parameters: int
    trainable: int
    latents: tuple[int, ...]
    prefix: dict[str, tuple[int, ...]]
    logits: tuple[int, ...]
    cache_bytes_per_token: float


@record
class InterlinguaDryResult(StageResult):
    """Shapes, parameters and bytes, before any weight is loaded."""

    trainable: int
    models: dict[str, DryModel]
    payload_bytes: dict[str, int]


@record
class TrainedLLM:
    """A tiny language model: its parameters, and exact match from text by the number of facts."""

    parameters: int
    text_em: dict[str, float]


@record
class InterlinguaLLMsResult(StageResult):
    """The two tiny language models that were trained to recall facts."""

    llama: TrainedLLM
    qwen: TrainedLLM


@record
class AnswerScores:
    """How well a model answers, as means over questions, see `hawada.interlingua.evaluation.answers`."""

    em: float
    f1: float
    nll: float
    top1: float
    top5: float
    tokens: float
    different_answers: int


@record
class InterlinguaResult(StageResult):
    """How encoder and adapters were trained: scores of each model, seconds and trained parameters."""

    scores: dict[str, AnswerScores]
    seconds: float
    parameters: int


@record
class PairedDifference:
    """Mean of paired differences and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@record
class PrefillComparison:
    """Time to the first token of an answer from latents, beside that from text; `noisy` as of `Comparison`."""

    text_ms: Latency
    latency_ms: Latency
    ratio: Interval
    noisy: str | None


@record
class PrefillFigures:
    """The comparison without and with the time that encoding takes, for so many questions at once."""

    batch: int
    latents: PrefillComparison
    latents_with_encoding: Annotated[PrefillComparison, Field(alias="latents with encoding")]


@record
class EvaluatedLLM:
    """What one model answers.

    Attributes:
        rows: scores by what it was shown.
        latents_minus: exact match from latents minus that from something else.
        context_tokens: tokens of the text.
        cache_bytes_saved: bytes of cache that latents save beside it.
        prefill: time to the first token.
    """

    rows: dict[str, AnswerScores]
    latents_minus: dict[str, PairedDifference]
    context_tokens: float
    cache_bytes_saved: float
    prefill: PrefillFigures


@record
class JointAnswers:
    """What models answer together, as means over questions."""

    em: float
    f1: float
    agreement: float
    any_right: float


@record
class InterlinguaEvalResult(StageResult):
    """Answers and costs of latents beside text and the baselines.

    Attributes:
        query_aware: whether the encoder saw the question.
        questions: how many were asked.
        guessing: exact match of whoever knows nothing; for recall alone.
        models: what each answers.
        together: what they answer together.
        answers_shown_to_encoder: the share of questions whose answer was in what the encoder saw.
        payload_bytes: bytes of one context's latents, by format.
        environment: machine and versions.
    """

    query_aware: bool
    questions: int
    guessing: dict[str, float]
    models: dict[str, EvaluatedLLM]
    together: JointAnswers
    answers_shown_to_encoder: float
    payload_bytes: dict[str, int]
    environment: Environment
