"""Does a finished run end in a verdict on an idle machine, and does no disturbance make a verdict wrong?

    hawada name=resnet output_dir=runs && hawada name=vit model=tiny_vit output_dir=runs
    python benchmarks/verdicts.py runs/resnet runs/vit --output benchmarks/results/verdicts_cpu.json

Each run is verified ten times as stage=evaluate does it, in a fresh process, on the saved teacher and slim model; a
verification meanwhile which more than 5 % of the CPUs' time was stolen by the host is repeated. The truth is the median
ratio of all of a run's idle verifications. Then the first run is verified beside every disturbance, with the target 5 %
above and 5 % below the truth. What the output holds already is not measured again: an interrupted benchmark goes on
where it stopped, and `--kinds` does some disturbances now and others later. The exit code is 1 when a verdict is wrong
(`met` above the target, `missed` below it) or fewer than 19 of 20 idle verifications are `met`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from omegaconf import OmegaConf

from hawada.experiment import Run
from hawada.workspace import open_stage, verify_in_fresh_process

STOLEN = 0.05  # share of the CPUs' time above which an idle verification is repeated
TRIES = 4  # of an idle verification, before the benchmark gives up
SIDES = {"above": 1.05, "below": 0.95}  # the target, as a multiple of the truth
IDLE_MET = 19 / 20
IMPORTS_S = 7.0  # about when the measuring process has imported and warmed up, so that it is being timed
STREAMED_BYTES = 256 << 20


def spin() -> None:
    """Use a CPU."""
    while True:
        pass


def burst(shortest_s: float, longest_s: float) -> None:
    """Use a CPU for a random while, and leave it for as long."""
    draw = random.Random(0)
    while True:
        end = time.perf_counter() + draw.uniform(shortest_s, longest_s)
        while time.perf_counter() < end:
            pass
        time.sleep(draw.uniform(shortest_s, longest_s))


def stream() -> None:
    """Copy through more memory than any cache holds."""
    source = np.ones(STREAMED_BYTES // 8)
    target = np.empty_like(source)
    while True:
        np.copyto(target, source)


def stop(process: psutil.Process, times: int, seconds: float, between_s: float) -> None:
    """Stop the measuring process several times, or until it is done.

    Raises:
        RuntimeError: when it was done before it was stopped once.
    """
    stopped = 0
    time.sleep(IMPORTS_S)
    with suppress(psutil.NoSuchProcess):
        for _ in range(times):
            process.suspend()
            time.sleep(seconds)
            process.resume()
            stopped += 1
            time.sleep(between_s)
    if not stopped:
        raise RuntimeError("the measuring process ended before it was stopped")


def _beside(target: Callable[..., None], *arguments: float) -> multiprocessing.Process:
    process = multiprocessing.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def disturb(kind: str, measuring: psutil.Process) -> list[multiprocessing.Process]:
    """Begin a disturbance of the measuring process; the processes that make it are to be ended afterwards."""
    if kind == "spin":
        return [_beside(spin)]
    if kind == "bursts_short":
        return [_beside(burst, 0.002, 0.015)]
    if kind == "bursts_long":
        return [_beside(burst, 0.015, 0.080)]
    if kind == "stream":
        return [_beside(stream)]
    if kind == "stream_late":
        time.sleep(9.0)
        return [_beside(stream)]
    if kind == "stop_20s":
        stop(measuring, 1, 20.0, 0.0)
    elif kind == "stop_4x2s":
        stop(measuring, 4, 2.0, 1.0)
    elif kind == "stop_30x0.1s":
        stop(measuring, 30, 0.1, 0.3)
    elif kind == "reniced":
        measuring.nice(19)
        for thread in measuring.threads():
            os.setpriority(os.PRIO_PROCESS, thread.id, 19)
        return [_beside(spin)]
    return []


KINDS = (
    "spin",
    "bursts_short",
    "bursts_long",
    "stream",
    "stream_late",
    "stop_20s",
    "stop_4x2s",
    "stop_30x0.1s",
    "reniced",
)


class Disturbance(threading.Thread):
    """Waits for the measuring process and disturbs it until it is ended."""

    def __init__(self, kind: str) -> None:
        super().__init__(daemon=True)
        self.kind, self.disturbed = kind, False
        self.processes: list[multiprocessing.Process] = []

    def run(self) -> None:
        """Find the process that measures, and begin."""
        deadline = time.perf_counter() + 60
        while time.perf_counter() < deadline:
            for child in psutil.Process().children():
                try:
                    if "hawada.workspace.verification" in child.cmdline():
                        self.processes = disturb(self.kind, child)
                        self.disturbed = True
                        return
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.02)

    def end(self) -> None:
        """End what disturbs."""
        self.join()
        for process in self.processes:
            process.kill()
            process.join()


def settings(root: Path, target_ratio: float | None) -> Run:
    """A finished run with the configuration that its evaluation read, and if one is given another target."""
    cfg = OmegaConf.load(root / "evaluate" / "config.yaml")
    if target_ratio is not None:
        cfg.budget.target_ms, cfg.budget.target_ratio = None, target_ratio
    return Run(root, cfg)


def cpu_times() -> tuple[float, float]:
    """Seconds of all CPUs so far, and those of them that the host took."""
    times = psutil.cpu_times()
    return sum(getattr(times, name) for name in times._fields if not name.startswith("guest")), times.steal


def verify(root: Path, target_ratio: float | None = None, kind: str | None = None) -> dict[str, Any]:
    """Verify a finished run once, as stage=evaluate does; with a kind of disturbance beside it."""
    run = settings(root, target_ratio)
    watch = open_stage(run.settings("evaluate"), run)[1]
    watch.inputs()  # what the measuring process is handed is made before the clock runs
    disturbance = None if kind is None else Disturbance(kind)
    (all_before, stolen_before), start = cpu_times(), time.perf_counter()
    if disturbance is not None:
        disturbance.start()
    with tempfile.TemporaryDirectory() as folder:
        models = root / "export" / "teacher", root / "finetune" / "slim"
        verification = verify_in_fresh_process(watch, *models, Path(folder))
    seconds = time.perf_counter() - start
    all_after, stolen_after = cpu_times()
    if disturbance is not None:
        disturbance.end()
        if not disturbance.disturbed:
            raise RuntimeError(f"{kind}: the measuring process was not found")
    if verification.comparison is None:
        raise RuntimeError(f"{root}: {verification.failed}")
    verdict, reason = watch.budget.verdict(verification.comparison, verification.every, run.result("export").measured)
    return {
        "target_ratio": watch.budget.target_ratio,
        "verdict": verdict,
        "reason": reason,
        "ratio": verification.comparison.ratio.as_dict(),
        "ratio_of_all_rounds": None if verification.every is None else verification.every.ratio.as_dict(),
        "self_check": {name: c.ratio.as_dict() for name, c in verification.measured.items() if name == "self_check"},
        "rounds": verification.comparison.baseline.samples,
        "notes": list(verification.comparison.notes),
        "seconds": round(seconds, 1),
        "stolen": round((stolen_after - stolen_before) / max(all_after - all_before, 1e-9), 4),
        "environment": verification.environment,
    }


def wrong(record: dict[str, Any], truth: float) -> bool:
    """Whether a verdict contradicts the truth."""
    above = truth > record["target_ratio"]
    return bool((record["verdict"] == "met" and above) or (record["verdict"] == "missed" and not above))


def line(name: str, record: dict[str, Any]) -> str:
    """A verification in words."""
    ratio = record["ratio"]
    return (
        f"{name:32} target {record['target_ratio']:.3f}: {record['verdict']:10} {ratio['median']:.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}], {record['rounds']} rounds, {record['seconds']:.0f} s, "
        f"{record['stolen']:.1%} stolen; {record['reason']}"
    )


class Record:
    """The output file: what was verified so far, written after every verification."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.environment = known.get("environment")
        self.idle: list[dict[str, Any]] = known.get("idle", [])
        self.disturbed: list[dict[str, Any]] = known.get("disturbed", [])

    def truths(self) -> dict[str, float]:
        """The median ratio of every run's idle verifications."""
        names = {record["run"] for record in self.idle}
        return {
            name: float(np.median([r["ratio"]["median"] for r in self.idle if r["run"] == name]))
            for name in sorted(names)
        }

    def summary(self) -> dict[str, Any]:
        """The counts that decide, and how long a verification takes."""
        truths = self.truths()
        both = [*self.idle, *self.disturbed]
        return {
            "truth": truths,
            "idle": len(self.idle),
            "idle_met": sum(record["verdict"] == "met" for record in self.idle),
            "disturbed": len(self.disturbed),
            "disturbed_decided": sum(record["verdict"] != "unverified" for record in self.disturbed),
            "wrong": [
                {key: record.get(key) for key in ("run", "kind", "side", "verdict")}
                for record in both
                if wrong(record, truths[record["run"]])
            ],
            "idle_seconds_median": float(np.median([r["seconds"] for r in self.idle])) if self.idle else None,
            "idle_seconds_most": max((r["seconds"] for r in self.idle), default=None),
        }

    def add(self, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
        """Keep one more verification."""
        self.environment = record.pop("environment")
        records.append(record)
        self.write()

    def write(self) -> None:
        """Write everything."""
        whole = {
            "environment": self.environment,
            "summary": self.summary(),
            "idle": self.idle,
            "disturbed": self.disturbed,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(partial, self.path)


def verify_idle(record: Record, roots: list[Path], count: int) -> None:
    """Verify every run several times, all runs in turn."""
    for number in range(count):
        for root in roots:
            if sum(known["run"] == root.name for known in record.idle) > number:
                continue
            for _ in range(TRIES):
                found = verify(root)
                if found["stolen"] <= STOLEN:
                    break
                print(f"{found['stolen']:.1%} of the time was stolen: once more", flush=True)
            else:
                sys.exit(f"the host stole more than {STOLEN:.0%} of the time {TRIES} times in a row: measure elsewhere")
            record.add(record.idle, {"run": root.name, **found})
            print(line(f"{root.name} idle {number + 1}", found), flush=True)


def verify_disturbed(record: Record, root: Path, kinds: list[str]) -> None:
    """Verify a run beside every kind of disturbance, on both sides of the truth."""
    truth = record.truths().get(root.name)
    if truth is None:
        sys.exit(f"--idle: the truth of {root.name} is the median of its idle verifications; take at least one")
    for kind in kinds:
        for side, factor in SIDES.items():
            done = [(known["run"], known["kind"], known["side"]) for known in record.disturbed]
            if (root.name, kind, side) in done:
                continue
            found = verify(root, factor * truth, kind)
            record.add(record.disturbed, {"run": root.name, "kind": kind, "side": side, **found})
            print(line(f"{root.name} {kind} target {side}", found), flush=True)


def main() -> int:
    """Verify as asked, print a line each, and say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, and to go on with")
    parser.add_argument("--idle", type=int, default=10, help="idle verifications of each run")
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="disturbances; a bare --kinds: none"
    )
    parser.add_argument("--disturbed", type=Path, nargs="*", help="runs that are disturbed; the first by default")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no disturbance outlives an ended benchmark
    record = Record(arguments.output)
    verify_idle(record, arguments.runs, arguments.idle)
    for root in arguments.runs[:1] if arguments.disturbed is None else arguments.disturbed:
        verify_disturbed(record, root, arguments.kinds)
    record.write()
    summary = record.summary()
    print(json.dumps(summary, indent=1))
    enough = summary["idle_met"] >= math.floor(IDLE_MET * summary["idle"])
    return 0 if enough and not summary["wrong"] else 1


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn" if sys.platform == "darwin" else "fork")
    sys.exit(main())
