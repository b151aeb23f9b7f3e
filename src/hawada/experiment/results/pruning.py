"""The results of the stages from a teacher to a slim model. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hawada.core.verdict import Comparison, Interval, Latency
from hawada.experiment.results.record import Omitted, OptionalFloat, OptionalInt, OptionalStr, record
from hawada.experiment.results.shared import (
    Conclusion,
    Difference,
    Divergences,
    Environment,
    SearchOutcome,
    Sensitivities,
    StageResult,
    TimedAs,
    Widths,
)


@record
class Fidelity:
    """How well the proxy predicts models that it was not fitted on.

    Attributes:
        mape: mean absolute error relative to the measurement.
        kendall_tau: rank correlation; None below two samples.
        samples: how many models were predicted.
    """

    mape: float
    kendall_tau: float | None
    samples: int


@record
class HeldOutModel:
    """A model that the proxy was not fitted on."""

    predicted_ms: float
    measured_ms: float


@record
class ProfiledModel:
    """A whole sliced model that was measured, with its time relative to the teacher's in the same rounds."""

    widths: Widths
    latency_ms: Latency
    ratio: Interval


@record
class ProfileResult(StageResult):
    """What `stage=profile` measured.

    Attributes:
        teacher_ms: the median of the teacher.
        teacher: its latency.
        fastest_ratio: the smallest model that all groups allow, relative to the teacher.
        fastest_ms: the same in milliseconds.
        fidelity: of the proxy on `held_out`.
        held_out: models that the proxy was not fitted on.
        models: every model that was measured.
        timed_as: what was timed.
        handover_us: how near to each other the threads of a CPU ran, or None.
        noisy: why no verdict may rest on the figures, or None.
        simulated: whether no device was timed but a simulation of one.
        environment: machine and versions.
    """

    teacher_ms: float
    teacher: Latency
    fastest_ratio: Interval
    fastest_ms: float
    fidelity: Fidelity
    held_out: tuple[HeldOutModel, ...]
    models: tuple[ProfiledModel, ...]
    timed_as: TimedAs
    handover_us: float | None = None
    noisy: str | None = None
    simulated: bool
    environment: Environment


@record
class BitsPerByte:
    """Bits per byte of the test text: the model's, and those of an interpolated Witten-Bell byte 5-gram."""

    model: float
    ngram: float


@record
class PretrainResult(StageResult):
    """How good a teacher that was trained here is on test data."""

    accuracy: OptionalFloat = None
    perplexity: OptionalFloat = None
    mean_iou: OptionalFloat = None
    score: OptionalFloat = None
    bits_per_byte: Annotated[BitsPerByte | None, Omitted] = None


@record
class TrainResult(StageResult):
    """How the training of gates ended.

    Attributes:
        stopped: why it ended.
        epochs: how many there were.
        kd: distillation loss of the last epoch, as the figures that follow; absent without an epoch.
        penalty: sum of the penalties.
        proxy_ms: predicted milliseconds of the soft widths.
        gap: what the prediction lacks to the target, relative to the teacher.
        measured_ms: the last measured sliced student.
        lambda_: the multiplier; `lambda` in JSON.
        target_ms: milliseconds that were aimed at.
        open_units: for each gated group, how many gates are at least one half.
        source: the file that the gates were taken from, where none were trained.
    """

    stopped: str
    epochs: int
    kd: OptionalFloat = None
    penalty: OptionalFloat = None
    proxy_ms: OptionalFloat = None
    gap: OptionalFloat = None
    measured_ms: OptionalFloat = None
    lambda_: Annotated[float | None, Field(alias="lambda", exclude_if=lambda value: value is None)] = None
    target_ms: float | None = None
    open_units: Annotated[dict[str, int] | None, Omitted] = None
    source: OptionalStr = None


@record
class ExportResult(SearchOutcome):
    """What was chosen, sliced and reconstructed.

    Attributes:
        widths: how many units of each group stay.
        equivalence: of the hard-gated student and the slim model before reconstruction.
        refitted: how many layers were reconstructed.
        nats: output divergence without and with reconstruction, where that was measured.
        sensitivity: output divergence of each group at each width, where that was measured.
    """

    widths: Widths
    equivalence: Difference
    refitted: int
    nats: Annotated[Divergences | None, Omitted] = None
    sensitivity: Annotated[Sensitivities | None, Omitted] = None


@record
class InfeasibleExport(SearchOutcome, Conclusion):
    """A search that found nothing as fast as was asked for."""


@record
class FrontPoint(SearchOutcome):
    """One target of a front; what follows `value` is absent where nothing is as fast.

    Attributes:
        target_ratio: what was asked for, relative to the teacher.
        value: see `CandidateModel`.
        widths: as of `ExportResult`, likewise the three that follow.
        path: the folder of the slim model.
    """

    target_ratio: float
    value: float
    widths: Annotated[Widths | None, Omitted] = None
    equivalence: Annotated[Difference | None, Omitted] = None
    refitted: OptionalInt = None
    nats: Annotated[Divergences | None, Omitted] = None
    path: OptionalStr = None


@record
class FrontSeconds:
    """How long a front took; `all` includes `measuring`."""

    all: float
    measuring: float


@record
class FrontResult(StageResult):
    """Many targets from one training."""

    points: tuple[FrontPoint, ...]
    sensitivity: Annotated[Sensitivities | None, Omitted] = None
    seconds: FrontSeconds
    teacher_ms: float
    timed_as: TimedAs
    environment: Environment


@record
class FinetuneResult(StageResult):
    """How finetuning ended: epochs, and the losses of the last one by name."""

    epochs: int
    losses: dict[str, float]


# The measures of quality; of those in LOWER_IS_BETTER smaller ones are better.
QUALITIES = ("accuracy", "perplexity", "mean_iou", "map_50", "output_error", "score", "agreement")
LOWER_IS_BETTER = ("perplexity", "output_error")


@record
class ModelLatency(Interval):
    """Milliseconds per call: median with interval, and 95th percentile."""

    p95: float


@record
class ModelFigures:
    """What a model costs and how good it is on test data; it has one measure of quality.

    Attributes:
        params: parameters.
        macs: multiply-accumulates of one call with a batch of 1.
        accuracy: the share of test samples that are classified right.
        perplexity: of the test text.
        mean_iou: the mean over the classes of the intersection over union of a segmentation.
        map_50: the mean average precision of detected boxes at an intersection over union of 0.5.
        output_error: how far the outputs are from the teacher's, relative to their standard deviation.
        score: the user's own.
        agreement: how often the predictions are the teacher's, where the test data have no labels.
        latency_ms: milliseconds per call.
        path: the folder of the saved model.
    """

    params: int
    macs: int
    accuracy: OptionalFloat = None
    perplexity: OptionalFloat = None
    mean_iou: OptionalFloat = None
    map_50: OptionalFloat = None
    output_error: OptionalFloat = None
    score: OptionalFloat = None
    agreement: OptionalFloat = None
    latency_ms: ModelLatency
    path: str

    @property
    def quality(self) -> float:
        """The one measure that there is."""
        found: list[float | None] = [getattr(self, name) for name in QUALITIES]
        return next(quality for quality in found if quality is not None)


@record
class SlimFigures(ModelFigures):
    """The same of the slim model.

    Attributes:
        loads_with: Python code that loads it.
    """

    loads_with: str


@record
class PhaseLatency:
    """One phase of the teacher and the slim model."""

    teacher_ms: Interval
    slim_ms: Interval
    ratio: Interval


@record
class Reload(Difference):
    """The difference between the finetuned model in memory and its files in a fresh process.

    Attributes:
        stock: whether the process loaded them with stock tools, without this package.
        same_tokens: whether a language model generated the same tokens.
    """

    stock: bool
    same_tokens: Annotated[bool | None, Omitted] = None


@record
class Equivalence(Difference):
    """Of the hard-gated student and the slim model; `reload` is of the files."""

    reload: Reload


@record
class EvaluateResult(Conclusion):
    """The final result.

    Attributes:
        target_ratio: the target relative to the teacher.
        timed_as: what was timed.
        latency_ratio: slim model relative to the teacher, within rounds.
        metric: the measure of quality, one of `QUALITIES`.
        agreement: how often both models predict the same.
        teacher: the original.
        slim: the smaller model.
        phases: latencies of the phase that the target is on, and of others.
        kd: distillation loss at the end of gate training, or None.
        proxy: how well the proxy predicts.
        equivalence: differences between gated, sliced and reloaded models.
        environment: machine and versions.
        measured: the comparison that the verdict rests on.
        verification: the ratio of every comparison that was made.
    """

    target_ratio: float | None
    timed_as: TimedAs
    latency_ratio: Interval
    metric: str
    agreement: float
    teacher: ModelFigures
    slim: SlimFigures
    phases: dict[str, PhaseLatency]
    kd: float | None
    proxy: Fidelity
    equivalence: Equivalence
    environment: Environment
    measured: Comparison
    verification: dict[str, Interval]


@record
class TeacherLatency:
    """What is known of the teacher before anything is trained."""

    latency_ms: Latency


@record
class DecidedByProfile(Conclusion):
    """The result when measurements alone decide: the teacher meets the budget already, or nothing can."""

    teacher: TeacherLatency
    environment: Environment


@record
class PublishResult(StageResult):
    """Further formats of the slim model, each compared with the model in memory, and where it was pushed to."""

    formats: dict[str, Difference]
    address: str | None


FinalResult = EvaluateResult | InfeasibleExport | DecidedByProfile
