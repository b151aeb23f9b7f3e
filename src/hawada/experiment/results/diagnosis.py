"""What the doctor found. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hawada.core.verdict import Interval, Latency
from hawada.experiment.results.record import Omitted, record
from hawada.experiment.results.shared import Environment, StageResult, TimedAs, Widths


@record
class BottleneckFigures:
    """What bounds a model, see `hawada.core.latency.diagnosis.Bottleneck`."""

    kind: str
    launch_ms: float
    memory_ms: float
    compute_ms: float
    measured_ms: float
    operators: int
    flops: int
    bytes: int
    shares: dict[str, float]
    impossible: bool

    @property
    def bounds_ms(self) -> dict[str, float]:
        """The least time for each resource."""
        return {"launch": self.launch_ms, "memory": self.memory_ms, "compute": self.compute_ms}


@record
class Bandwidth:
    """Gigabytes a second, for transfers of so many bytes."""

    bytes: int
    gbps: float


@record
class PeakFigures:
    """What the device does at best."""

    launch_us: float
    gbps: tuple[Bandwidth, ...]
    tflops: float


@record
class TimedModel:
    """Latency of a model, and its ratio to the teacher."""

    latency_ms: Latency
    ratio: Interval


@record
class TimedSlice(TimedModel):
    """A sliced model: the share of units that were removed, and the widths that are left."""

    removed: float
    widths: Widths


@record
class ComparedRuntime(TimedModel):
    """The teacher in another runtime.

    Attributes:
        against: the runtime that the ratio is to.
        half: ratio of the half-width model to the teacher in the same runtime.
    """

    against: str
    half: Annotated[Interval | None, Omitted] = None


@record
class RefusedRuntime:
    """Why a runtime cannot be used."""

    refused: str


@record
class Stairs:
    """Times of one site over widths, see `hawada.core.latency.diagnosis.Staircase`."""

    site: str
    kind: str
    group: str
    unit: str
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    half_widths: tuple[float, ...]
    ends: tuple[int, ...]


@record
class SensibleTarget:
    """The lowest and the highest sensible target, relative to the teacher and in milliseconds."""

    ratio: tuple[float, float]
    ms: tuple[float, float]


@record
class RemovableUnits:
    """Kinds of units that may go: those that make layers narrower, and those that remove layers or branches."""

    width: tuple[str, ...]
    depth: tuple[str, ...]


@record
class DoctorResult(StageResult):
    """The diagnosis of a model on a device, and what pruning could buy.

    Attributes:
        words: the findings as sentences.
        bottleneck: what bounds the model.
        peaks: what the device does at best.
        teacher: the model itself.
        slices: sliced models by name.
        runtimes: other runtimes by name.
        stairs: times of sites over widths.
        target: what is sensible to ask for; None where nothing is.
        timed_as: what was timed.
        units: what may go.
        simulated: whether no device was timed but a simulation of one.
        environment: machine and versions.
    """

    words: tuple[str, ...]
    bottleneck: BottleneckFigures
    peaks: PeakFigures
    teacher: TimedModel
    slices: dict[str, TimedSlice]
    runtimes: dict[str, ComparedRuntime | RefusedRuntime]
    stairs: tuple[Stairs, ...]
    target: SensibleTarget | None
    timed_as: TimedAs
    units: RemovableUnits
    simulated: bool
    environment: Environment


@record
class InspectedGroup:
    """One group, and the values of its gates.

    Attributes:
        name: The name of the group.
        kind: The kind of its units.
        units: How many there are.
        parent: The group whose unit they belong to; "" where there is none.
        gated_at: The modules or weights that are gated.
        least: The smallest gate.
        mean: The mean of the gates.
        most: The largest gate.
        open: How many gates are at least 0.5.
    """

    name: str
    kind: str
    units: int
    parent: str
    gated_at: tuple[str, ...]
    least: float
    mean: float
    most: float
    open: int


@record
class KeptLayer:
    """A layer that keeps units.

    Attributes:
        module: The path of the layer.
        kind: The name of its class; `class` in JSON.
        units: The number of its output channels that stay.
        reason: What keeps them.
        remedy: What would free them; "" where nothing is wrong.
    """

    module: str
    kind: Annotated[str, Field(alias="class")]
    units: int
    reason: str
    remedy: str


@record
class Shares:
    """What is left of a model, as fractions of the whole."""

    params: float
    macs: float


@record
class InspectResult(StageResult):
    """What may be removed from a model, and what may not.

    Attributes:
        params: The parameters of the model.
        macs: The multiply-accumulates of one input's forward pass.
        trained: Whether the gates are as training left them; otherwise they are as they start.
        groups: The groups that are gated.
        kept_whole: The layers that keep units.
        half: What is left where every width is half and every branch stays.
    """

    params: int
    macs: int
    trained: bool
    groups: tuple[InspectedGroup, ...]
    kept_whole: tuple[KeptLayer, ...]
    half: Shares
