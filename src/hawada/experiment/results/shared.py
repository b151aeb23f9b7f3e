"""What the results of several stages hold: the machine, what was timed, and how it ended. Imports no torch."""

from __future__ import annotations

from hawada.core.verdict import Comparison, Interval, Verdict
from hawada.experiment.results.record import OptionalInt, record

Widths = dict[str, int]
Sensitivities = dict[str, dict[str, float]]  # by group, and by width as JSON writes it


@record
class Environment:
    """Machine and versions.

    Attributes:
        fingerprint: what a latency belongs to; results of two machines whose fingerprints differ are not compared.
        platform: the operating system.
        python: its version.
        cpus: how many the machine has.
        versions: of every library that a result may depend on; None for one that is not installed.
    """

    fingerprint: dict[str, str | bool | int | float | None]
    platform: str
    python: str
    cpus: int | None
    versions: dict[str, str | None]


@record
class TimedAs:
    """What a latency is the latency of.

    Attributes:
        device: the kind of device.
        dtype: the floating-point type of the model.
        runtime: how the model was run.
        phase: which call was timed.
        batch: sequences or images at once.
        prompt: tokens of the prompt, for a language model.
        new_tokens: tokens that are generated after it, likewise.
    """

    device: str
    dtype: str
    runtime: str
    phase: str
    batch: int
    prompt: OptionalInt = None
    new_tokens: OptionalInt = None


@record
class StageResult:
    """What every stage writes.

    Attributes:
        summary: one line for the terminal.
    """

    summary: str


@record
class Conclusion(StageResult):
    """The result of a whole run, which lies beside the stages' folders.

    Attributes:
        verdict: whether the latency target was met.
        reason: the figures behind it.
        target_ms: milliseconds that were asked for; None without a target.
    """

    verdict: Verdict
    reason: str
    target_ms: float | None


@record
class Difference:
    """How far two outputs are apart.

    Attributes:
        max_abs_diff: the largest difference of two logits.
        max_abs_logit: the largest logit, which gives it a scale.
    """

    max_abs_diff: float
    max_abs_logit: float


@record
class Divergences:
    """Output divergence of an exported model from the teacher, without and with reconstruction."""

    sliced: float
    refitted: float


@record
class CandidateModel:
    """One sliced model that a search measured.

    Attributes:
        level: which of the sets of allowed widths it was allocated with; 0 is the finest.
        predicted_ratio: what the proxy predicted, relative to the teacher.
        ratio: what was measured.
        value: importance of the units that stay, or minus the output divergence where that is known.
        widths: how many units of each group it keeps.
    """

    level: int
    predicted_ratio: float
    ratio: Interval
    value: float
    widths: Widths


@record
class SearchOutcome(StageResult):
    """What a search for one target found.

    Attributes:
        status: how it ended.
        measured: the comparison of the chosen model with the teacher.
        candidates: every model that was measured.
    """

    status: str
    measured: Comparison
    candidates: tuple[CandidateModel, ...]
