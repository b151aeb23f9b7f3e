"""The measurement that the verdict rests on: teacher against slim model, in a fresh process that does nothing else.

`python -m hawada.workspace.judge request.json` is that process; it writes its answer where the request says, whatever
happens to the device meanwhile.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from hawada.adapters import Shape, load_with_adapter
from hawada.config import build
from hawada.core.latency import (
    Budget,
    Comparison,
    DeviceMonitor,
    Interval,
    Latency,
    MeasurementError,
    Rounds,
    compare,
    environment,
    prepare_cpu,
)
from hawada.experiment import write_json

if TYPE_CHECKING:
    from hawada.workspace.workspace import Workspace  # much that the measuring process would wait for and not use

REPEATS = {"cuda": 3}
REPEATS_ELSEWHERE = 1
SELF_CHECK = "self_check"

Measure = Callable[[nn.Module, nn.Module, Rounds], Comparison]


@dataclass(frozen=True)
class Judgement:
    """What the verdict is made of.

    Attributes:
        comparison: the repeats combined, or None when nothing could be measured.
        failed: why measuring broke off, or None.
        measured: everything that was measured, by name, in order.
        environment: machine and versions of the process that measured.
    """

    comparison: Comparison | None
    failed: str | None = None
    measured: Mapping[str, Comparison] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None

    def or_else(self, earlier: Comparison) -> Comparison:
        """The comparison; without one, an earlier stage's figures, which are not judged."""
        if self.comparison is not None:
            return self.comparison
        return replace(earlier, notes=(*earlier.notes, "the figures are those of an earlier stage"), noisy=self.failed)


def combine(repeats: Sequence[Comparison]) -> Comparison:
    """Repeats as one, conservatively: the median of medians, the lowest low and the highest high."""
    return Comparison(
        _combined_latency([repeat.baseline for repeat in repeats]),
        _combined_latency([repeat.candidate for repeat in repeats]),
        _combined_interval([repeat.ratio for repeat in repeats]),
        repeats[0].source,
        tuple(dict.fromkeys(note for repeat in repeats for note in repeat.notes)),
        next((repeat.noisy for repeat in repeats if repeat.noisy is not None), None),
    )


def _combined_interval(parts: Sequence[Interval]) -> Interval:
    median = float(np.median([part.median for part in parts]))
    return Interval(median, min(part.low for part in parts), max(part.high for part in parts))


def _combined_latency(parts: Sequence[Latency]) -> Latency:
    whole = _combined_interval(parts)
    p95, samples = max(part.p95 for part in parts), sum(part.samples for part in parts)
    return Latency(whole.median, whole.low, whole.high, p95, samples)


def measure_judgement(
    measure: Measure,
    teacher: nn.Module,
    slim: nn.Module,
    *,
    budget: Budget,
    rounds: Rounds,
    repeats: int,
    once: bool = False,
) -> Judgement:
    """Compare teacher and slim model, after the teacher with a copy of itself; what breaks off is kept up to there.

    When the interval straddles the target, everything but the self-check is measured once more, and for longer.

    Args:
        measure: compares two models that are as they are timed.
        teacher: the baseline.
        slim: the candidate.
        budget: what is asked for; its tolerance is also how much the teacher may differ from itself.
        rounds: of one comparison.
        repeats: how many comparisons are combined.
        once: leave out the self-check, and do not measure for longer.
    """
    measured: dict[str, Comparison] = {}
    comparison, failed = None, None
    done: list[Comparison] = []
    try:
        if not once:
            measured[SELF_CHECK] = measure(teacher, copy.deepcopy(teacher), rounds)
        for prefix, how in (("repeat", rounds), ("longer", _longer(rounds))):
            done = []
            for index in range(repeats):
                done.append(measure(teacher, slim, how))
                measured[f"{prefix}_{index + 1}"] = done[-1]
            comparison = combine(done)
            if once or not budget.has_target or comparison.noisy or budget.verdict(comparison)[0] != "unverified":
                break
    except RuntimeError as error:  # a device that is lost raises no narrower one on every version and backend
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        failed = f"measuring broke off ({type(error).__name__}: {said})"
        comparison = comparison or (combine(done) if done else None)
    if comparison is not None:
        restless = _restless(measured[SELF_CHECK], budget) if SELF_CHECK in measured else None
        comparison = replace(comparison, noisy=failed or comparison.noisy or restless)
    return Judgement(comparison, failed, measured)


def _longer(rounds: Rounds) -> Rounds:
    return replace(
        rounds,
        precision=rounds.precision / 4,
        max_rounds=rounds.max_rounds * 4,
        max_seconds=rounds.max_seconds * 2,
    )


def _restless(self_check: Comparison, budget: Budget) -> str | None:
    """Why a machine cannot judge anything: it tells a model from its own copy."""
    off = abs(self_check.ratio.median - 1)
    if self_check.noisy is not None or off <= budget.tolerance:
        return self_check.noisy
    return f"the same model differs from itself by {off:.1%}, and {budget.tolerance:.1%} is tolerated"


def measure_afresh(work: Workspace, teacher: Path, slim: Path, folder: Path) -> Comparison:
    """Compare two saved models once in a new process, without a self-check; arguments as for `judge_afresh`.

    Raises:
        MeasurementError: when nothing came of it.
    """
    judgement = judge_afresh(work, teacher, slim, folder, once=True)
    if judgement.comparison is None:
        raise MeasurementError(judgement.failed or "nothing was measured")
    return judgement.comparison


def judge_afresh(work: Workspace, teacher: Path, slim: Path, folder: Path, *, once: bool = False) -> Judgement:
    """Measure two saved models in a new process; whatever happens to it, this one goes on.

    Args:
        work: of the stage that judges.
        teacher: folder of the saved baseline.
        slim: folder of the saved candidate.
        folder: for `judgement.json`, with every sample and the environment.
        once: compare once and leave out the self-check: for a search, whose result is judged afterwards.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _judge_afresh(work, (teacher, slim), folder / "judgement.json", scratch=Path(scratch), once=once)


def _judge_afresh(work: Workspace, models: tuple[Path, Path], answer: Path, *, scratch: Path, once: bool) -> Judgement:
    request, inputs = scratch / "request.json", scratch / "inputs.safetensors"
    save_file({f"{index:03d}": x.cpu().contiguous() for index, x in enumerate(work.inputs())}, inputs)
    holds_gpu = work.device.type == "cuda" and torch.cuda.is_initialized()
    if holds_gpu:
        torch.cuda.empty_cache()  # what was scored here before
    clock: Any = OmegaConf.to_container(work.cfg.gpu.clock, resolve=True)
    write_json(
        request,
        {
            "models": [str(model.resolve()) for model in models],
            "trust": work.trust,
            "inputs": str(inputs.resolve()),
            "shape": asdict(work.shape),
            "device": str(work.device),
            "dtype": work.cfg.gpu.dtype,
            "clock": clock,
            "rounds": asdict(work.rounds),
            "budget": asdict(work.budget_for(None) if once else work.budget),
            "repeats": 1 if once else REPEATS.get(work.device.type, REPEATS_ELSEWHERE),
            "once": once,
            "seed": work.cfg.seed,
            "threads": torch.get_num_threads(),
            "own_pids": [os.getpid()] if holds_gpu else [],
            "handover_us": work.handover_us,
            "answer": str(answer.resolve()),
        },
    )
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # adapters and clocks from elsewhere
    command = [sys.executable, "-P", "-m", "hawada.workspace.judge", str(request.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode != 0 or not answer.is_file():
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        return Judgement(None, f"the measuring process ended with exit code {done.returncode} ({said[-1]})")
    record = json.loads(answer.read_text())
    return Judgement(
        None if record["comparison"] is None else Comparison.from_dict(record["comparison"]),
        record["failed"],
        {name: Comparison.from_dict(comparison) for name, comparison in record["measured"].items()},
        record["environment"],
    )


def judge_here(work: Workspace, teacher: nn.Module, slim: nn.Module) -> Judgement:
    """Compare two models in this process, on a clock that runs nothing: there is no machine to distrust."""
    return Judgement(work.compare(work.timed(teacher), work.timed(slim)))


def main(request: Path) -> None:
    """Measure what a request asks for and write the answer."""
    asked = json.loads(request.read_text())
    prepare_cpu(asked["threads"])
    torch.manual_seed(asked["seed"])
    device, dtype, shape = torch.device(asked["device"]), getattr(torch, asked["dtype"]), Shape(**asked["shape"])
    workloads = []
    for path in asked["models"]:
        adapter, model = load_with_adapter(Path(path), asked["trust"])
        workloads.append(adapter.workload(model.to(device, dtype).eval(), shape))
    given = load_file(asked["inputs"])
    inputs = tuple(given[name].to(device) for name in sorted(given))
    clock = build(OmegaConf.create(asked["clock"]))
    monitor = DeviceMonitor(device, own_pids=asked["own_pids"], handover_us=asked["handover_us"])

    def measure(baseline: nn.Module, candidate: nn.Module, rounds: Rounds) -> Comparison:
        return compare(baseline, candidate, inputs, clock, rounds=rounds, seed=asked["seed"], monitor=monitor)

    judgement = measure_judgement(
        measure,
        *workloads,
        budget=Budget(**asked["budget"]),
        rounds=Rounds(**asked["rounds"]),
        repeats=asked["repeats"],
        once=asked["once"],
    )
    write_json(Path(asked["answer"]), as_dict(judgement) | {"environment": environment(device)})


def as_dict(judgement: Judgement) -> dict[str, Any]:
    """For JSON, with every sample."""
    return {
        "comparison": None if judgement.comparison is None else judgement.comparison.as_dict(),
        "failed": judgement.failed,
        "measured": {
            name: {**comparison.as_dict(), "samples_ms": _listed(comparison)}
            for name, comparison in judgement.measured.items()
        },
    }


def _listed(comparison: Comparison) -> list[list[float]]:
    return [] if comparison.samples is None else comparison.samples.tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
