"""The measurement that the verdict rests on: teacher against slim model, in a fresh process that does nothing else.

The figures decide: the intervals of the rounds that count and of all rounds. A copy of the teacher is timed in the same
rounds; where it differs from the teacher, the machine is unstable and nothing is decided.

`python -m hawada.workspace.verification request.json` is that process; it writes what it measured where the request
asks for it, whatever happens to the device meanwhile.
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
from hawada.core.files import write_json
from hawada.core.latency import (
    Budget,
    DeviceMonitor,
    MeasurementError,
    Rounds,
    Sampled,
    Samples,
    comparison_of,
    environment,
    measure_together,
    prepare_cpu,
    source_of,
    widened,
)
from hawada.core.verdict import Comparison, merged

if TYPE_CHECKING:
    from hawada.workspace.stopwatch import ModelStopwatch  # much that the measuring process would wait for and not use

REPEATS = {"cuda": 3}
REPEATS_ELSEWHERE = 1
MAX_PASSES = 3  # over the repeats, while the figures do not decide
MIN_COUNTING = 0.25  # share of the rounds: where fewer count, what disturbed the others may have gone unseen in these
DISTURBED_MARGIN = 0.5  # by how much of itself disturbed rounds alone must be clear of the target
SELF_CHECK, EVERY = "self_check", "every_round"

Measure = Callable[[Sequence[nn.Module], Rounds], Sampled]


@dataclass(frozen=True)
class Verification:
    """What the verdict is made of.

    Attributes:
        comparison: of the rounds that count, the repeats combined, or None when nothing could be measured.
        every: the same of all rounds, those that were disturbed included; None when nothing else was compared.
        failed: why measuring broke off, or None.
        measured: every comparison that was made of the samples, by name, in order.
        environment: machine and versions of the process that measured.
        taken: the rounds that all of it was made of, in order; empty where another process took them.
    """

    comparison: Comparison | None
    every: Comparison | None = None
    failed: str | None = None
    measured: Mapping[str, Comparison] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    taken: Sequence[Sampled] = ()

    def or_else(self, earlier: Comparison) -> Comparison:
        """The comparison; without one, an earlier stage's figures, on which no verdict rests."""
        if self.comparison is not None:
            return self.comparison
        return replace(earlier, notes=(*earlier.notes, "the figures are those of an earlier stage"), noisy=self.failed)


def measure_verification(
    measure: Measure,
    teacher: nn.Module,
    slim: nn.Module,
    *,
    budget: Budget,
    rounds: Rounds,
    repeats: int,
    source: str = "measured",
    once: bool = False,
) -> Verification:
    """Time teacher, a copy of it and slim model in the same rounds, until the figures decide or patience ends.

    Args:
        measure: times models that are as they are timed, in the same rounds.
        teacher: the baseline.
        slim: the candidate.
        budget: what is asked for; its tolerance is also how much the teacher may differ from its copy.
        rounds: of one measurement; while the figures do not decide, as long ones are added to it.
        repeats: how many measurements are combined.
        source: where the milliseconds come from.
        once: leave out the copy, and add nothing: for a search, whose result is verified afterwards.
    """
    models = (teacher, slim) if once else (teacher, copy.deepcopy(teacher), slim)
    taken: list[Sampled] = []
    verification, failed = Verification(None), None
    try:
        for attempt in range(repeats if once else repeats * MAX_PASSES):
            taken.append(measure(models, rounds if attempt < repeats else _longer(rounds)))
            if len(taken) % repeats == 0:
                verification = _concluded(taken, repeats, budget, source)
                if not _undecided(verification, taken, budget):
                    break
    except RuntimeError as error:  # a device that is lost raises no narrower one on every version and backend
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        failed = f"measuring broke off ({type(error).__name__}: {reason})"
    if failed is None:
        return verification
    return _concluded(taken, repeats, budget, source, failed=failed) if taken else Verification(None, failed=failed)


def _undecided(verification: Verification, taken: Sequence[Sampled], budget: Budget) -> bool:
    """Whether more rounds can lead to a verdict."""
    if verification.comparison is None or not budget.has_target or any(sampled.broken for sampled in taken):
        return False
    return budget.verdict(verification.comparison, verification.every)[0] == "unverified"


def _concluded(
    taken: Sequence[Sampled], repeats: int, budget: Budget, source: str, *, failed: str | None = None
) -> Verification:
    """What the samples so far say; those of a repeat are pooled over the passes, the repeats are combined."""
    pools = [taken[repeat::repeats] for repeat in range(min(repeats, len(taken)))]
    notes = tuple(dict.fromkeys(note for sampled in taken for note in sampled.notes))
    rows = [np.concatenate([sampled.rows for sampled in pool]) for pool in pools]
    counted = [np.concatenate([sampled.rows[sampled.counts] for sampled in pool]) for pool in pools]
    few = any(
        len(kept) < max(pool[0].needed, MIN_COUNTING * len(every))
        for kept, every, pool in zip(counted, rows, pools, strict=True)
    )
    if few:  # figures of disturbed rounds are better than none, but they must be clear of the target
        counted = rows
        notes += (f"too few rounds were undisturbed: with all, intervals are widened by {DISTURBED_MARGIN:.0%}",)

    def compared(pools: Sequence[Samples], column: int) -> list[Comparison]:
        return [comparison_of(samples[:, [0, column]], source, notes=notes) for samples in pools]

    measured = {f"repeat_{index + 1}": found for index, found in enumerate(compared(counted, -1))}
    comparison, every = merged(list(measured.values()), ends="widest"), merged(compared(rows, -1), ends="widest")
    measured[EVERY] = every
    if rows[0].shape[1] > 2:
        measured[SELF_CHECK] = merged(compared(counted, 1), ends="widest")
        unstable = _unstable(measured[SELF_CHECK], budget)
    else:
        unstable = next((sampled.noisy for sampled in taken if sampled.noisy is not None), None)
    broken = next((sampled.broken for sampled in taken if sampled.broken is not None), None)
    if few:
        every = widened(every, DISTURBED_MARGIN)
        # Ratios hold when everything is slowed alike, milliseconds do not: they only tell how long it takes at most.
        every = replace(every, candidate=replace(every.candidate, low=0.0))
    return Verification(
        replace(comparison, noisy=failed or broken or unstable), every, failed, measured, taken=tuple(taken)
    )


def _longer(rounds: Rounds) -> Rounds:
    """Rounds that are added: as long, more precise, and with what is left of the patience."""
    return replace(
        rounds,
        precision=rounds.precision / 4,
        max_rounds=rounds.max_rounds * 4,
        patience_s=rounds.patience_s / MAX_PASSES,
    )


def _unstable(self_check: Comparison, budget: Budget) -> str | None:
    """Why nothing can be decided on a machine: it tells a model from its own copy."""
    off = max(abs(end - 1) for end in (self_check.ratio.low, self_check.ratio.high))
    if off <= budget.tolerance:
        return None
    return f"the same model differs from itself by {off:.1%}, and {budget.tolerance:.1%} is tolerated"


def compare_in_fresh_process(watch: ModelStopwatch, teacher: Path, slim: Path, folder: Path) -> Comparison:
    """Compare two saved models once, without a self-check; arguments as for `verify_in_fresh_process`.

    Raises:
        MeasurementError: when nothing came of it.
    """
    verification = verify_in_fresh_process(watch, teacher, slim, folder, once=True)
    if verification.comparison is None:
        raise MeasurementError(verification.failed or "nothing was measured")
    return verification.comparison


def verify_in_fresh_process(
    watch: ModelStopwatch, teacher: Path, slim: Path, folder: Path, *, once: bool = False
) -> Verification:
    """Measure two saved models in a new process; whatever happens to it, this one goes on.

    Args:
        watch: by which the stage measures.
        teacher: folder of the saved baseline.
        slim: folder of the saved candidate.
        folder: for `verification.json`, with every sample and the environment.
        once: compare once and leave out the self-check: for a search, whose result is verified afterwards.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _verify(watch, (teacher, slim), folder / "verification.json", scratch=Path(scratch), once=once)


def _verify(
    watch: ModelStopwatch, models: tuple[Path, Path], output: Path, *, scratch: Path, once: bool
) -> Verification:
    request, inputs = scratch / "request.json", scratch / "inputs.safetensors"
    save_file({f"{index:03d}": x.cpu().contiguous() for index, x in enumerate(watch.inputs())}, inputs)
    holds_gpu = watch.device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch does not annotate it
    if holds_gpu:
        torch.cuda.empty_cache()  # what was scored here before
    clock: Any = OmegaConf.to_container(watch.cfg.gpu.clock, resolve=True)
    write_json(
        request,
        {
            "models": [str(model.resolve()) for model in models],
            "trust": watch.subject.trust,
            "inputs": str(inputs.resolve()),
            "shape": asdict(watch.shape),
            "device": str(watch.device),
            "dtype": watch.cfg.gpu.dtype,
            "clock": clock,
            "rounds": asdict(watch.rounds),
            "budget": asdict(watch.budget_for(None) if once else watch.budget),
            "repeats": 1 if once else REPEATS.get(watch.device.type, REPEATS_ELSEWHERE),
            "once": once,
            "seed": watch.cfg.seed,
            "threads": torch.get_num_threads(),
            "own_pids": [os.getpid()] if holds_gpu else [],
            "handover_us": watch.handover_us,
            "output": str(output.resolve()),
        },
    )
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)  # adapters and clocks from elsewhere
    command = [sys.executable, "-P", "-m", "hawada.workspace.verification", str(request.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode != 0 or not output.is_file():
        reason = done.stderr.strip().splitlines() or ["without a message"]
        failed = f"the measuring process ended with exit code {done.returncode} ({reason[-1]})"
        return Verification(None, failed=failed)
    record = json.loads(output.read_text())
    comparison, every = (
        None if record[name] is None else Comparison.from_dict(record[name]) for name in ("comparison", "every")
    )
    return Verification(
        comparison,
        every,
        record["failed"],
        {name: Comparison.from_dict(comparison) for name, comparison in record["measured"].items()},
        record["environment"],
    )


def verify_here(watch: ModelStopwatch, teacher: nn.Module, slim: nn.Module) -> Verification:
    """Compare two models in this process, on a clock that runs nothing: there is no machine to distrust."""
    return Verification(watch.compare(watch.timed(teacher), watch.timed(slim), watch.inputs()))


def main(request: Path) -> None:
    """Measure what a request asks for and write what came of it."""
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

    def measure(models: Sequence[nn.Module], rounds: Rounds) -> Sampled:
        return measure_together(models, inputs, clock, rounds=rounds, seed=asked["seed"], monitor=monitor)

    verification = measure_verification(
        measure,
        *workloads,
        budget=Budget(**asked["budget"]),
        rounds=Rounds(**asked["rounds"]),
        repeats=asked["repeats"],
        source=source_of(clock),
        once=asked["once"],
    )
    write_json(Path(asked["output"]), as_dict(verification) | {"environment": environment(device)})


def as_dict(verification: Verification) -> dict[str, Any]:
    """For JSON, with the milliseconds of every round and whether it counts."""
    return {
        "comparison": None if verification.comparison is None else verification.comparison.as_dict(),
        "every": None if verification.every is None else verification.every.as_dict(),
        "failed": verification.failed,
        "measured": {name: comparison.as_dict() for name, comparison in verification.measured.items()},
        "rounds": [{"ms": part.rows.tolist(), "counts": part.counts.tolist()} for part in verification.taken],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
