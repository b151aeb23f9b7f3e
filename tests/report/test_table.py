"""What is printed at the end shows the figures of `result.json`, unaltered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stage_results import AS_JSON, ENDED_EARLY, example, typed

from hawada.experiment import Job
from hawada.experiment.results import DecidedByProfile, FinalResult, InfeasibleExport, StageResult
from hawada.report import console, print_result, print_sweep

RESULT: dict[str, Any] = {
    **AS_JSON["evaluate"],
    "verdict": "met",
    "reason": "ratio 0.575 [0.570, 0.581] against a target of 0.600",
    "target_ms": 3.846,
    "target_ratio": 0.6,
    "timed_as": {"device": "cpu", "dtype": "float32", "batch": 256, "runtime": "eager", "phase": "forward"},
    "latency_ratio": {"median": 0.575, "low": 0.570, "high": 0.581},
    "teacher": {
        "latency_ms": {"median": 6.41, "low": 6.38, "high": 6.45, "p95": 6.5},
        "params": 5280330,
        "macs": 27579392,
        "accuracy": 0.972,
        "path": "/out/export/teacher",
    },
    "slim": {
        "latency_ms": {"median": 3.6857, "low": 3.65, "high": 3.72, "p95": 3.8},
        "params": 2707274,
        "macs": 12041216,
        "accuracy": 0.9648,
        "path": "/out/finetune/slim",
        "loads_with": "import hawada\n\nmodel = hawada.load('/out/finetune/slim')",
    },
    "phases": {},
    "metric": "accuracy",
    "agreement": 0.9736,
    "kd": 0.0613,
}


KEYS = ["lambda.lr"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 240)


def printed_result(result: dict[str, Any], root: str = "outputs/tiny_resnet-local") -> str:
    with console.capture() as capture:
        print_result(typed(FinalResult, result), Path(root))
    return capture.get()


def printed_sweep(*jobs: Job, keys: Sequence[str] = KEYS) -> str:
    with console.capture() as capture:
        print_sweep(jobs, keys)
    return capture.get()


def a_job(
    value: str, result: dict[str, Any] | StageResult | None, error: Exception | None = None, *, key: str = KEYS[0]
) -> Job:
    whole = typed(FinalResult, result) if isinstance(result, dict) else result
    return Job({key: value, "seed": "0"}, whole, error)


def cells(text: str, label: str) -> list[str]:
    """The cells of the one table row whose first cell is the label."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    (found,) = [row for row in rows if row[0] == label]
    return found[1:]


def figures(cell: str) -> list[float]:
    """The numbers in a cell."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell.replace(",", "" if "[" not in cell else " "))]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("parameters", [[5280330], [2707274], [0.513]]),
        ("MACs", [[27579392], [12041216], [0.437]]),
        ("latency ms", [[6.41, 6.38, 6.45], [3.69, 3.65, 3.72], [0.575, 0.570, 0.581]]),
        ("speed-up", [[1.0], [1.74], []]),
        ("accuracy", [[97.2], [96.48], []]),
        ("agreement", [[], [97.36], []]),
        ("target", [[], [3.846], [0.6]]),
    ],
)
def test_the_result_shows_teacher_and_slim_side_by_side(label: str, expected: list[list[float]]) -> None:
    found = [figures(cell) for cell in cells(printed_result(RESULT), label)]
    assert [len(cell) for cell in found] == [len(cell) for cell in expected]
    for cell, numbers in zip(found, expected, strict=True):
        assert cell == pytest.approx(numbers, rel=2e-3)


def test_other_phases_than_the_targets_have_rows_of_their_own() -> None:
    intervals = [{"median": m, "low": m - 0.5, "high": m + 0.5} for m in (20.0, 12.0, 0.75)]
    decode = dict(zip(("teacher_ms", "slim_ms", "ratio"), intervals, strict=True))
    own = {"prefill": dict.fromkeys(decode, intervals[0])}  # that of the target is in the first row already
    timed_as = {**RESULT["timed_as"], "phase": "prefill"}
    text = printed_result({**RESULT, "timed_as": timed_as, "phases": {"decode": decode, **own}})
    assert [figures(cell)[0] for cell in cells(text, "prefill ms")] == [6.41, 3.69, 0.575]
    assert [figures(cell) for cell in cells(text, "decode ms")] == [
        [20, 19.5, 20.5],
        [12, 11.5, 12.5],
        [0.75, 0.25, 1.25],
    ]
    assert "latency ms" not in text


def test_a_language_models_quality_is_its_perplexity() -> None:
    quality = {
        name: {key: value for key, value in RESULT[name].items() if key != "accuracy"} | {"perplexity": perplexity}
        for name, perplexity in (("teacher", 8.16), ("slim", 1234.5))
    }
    result = {**RESULT, **quality, "metric": "perplexity"}
    assert cells(printed_result(result), "perplexity") == ["8.16", "1234", ""]
    assert "accuracy" not in printed_result(result)
    assert cells(printed_sweep(a_job("0.1", result)), "0.1")[3] == "1234"


@pytest.mark.parametrize("verdict", ["met", "missed", "simulated"])
def test_the_result_shows_its_verdict_and_why(verdict: str) -> None:
    text = printed_result({**RESULT, "verdict": verdict})
    assert verdict in cells(text, "verdict")
    assert RESULT["reason"] in text


def test_the_result_shows_how_to_load_the_model() -> None:
    text = printed_result(RESULT)
    assert "tiny_resnet-local" in text
    assert "hawada.load('/out/finetune/slim')" in text


def test_without_a_target_none_is_shown() -> None:
    text = printed_result({**RESULT, "target_ms": None, "target_ratio": None, "verdict": "unverified"})
    assert "│ target" not in text
    assert "unverified" in text


def test_a_run_that_ended_early_shows_its_verdict_and_the_reason() -> None:
    reason = "the fastest is 1.250 ms, the target is 0.100 ms"
    text = printed_result({**ENDED_EARLY[InfeasibleExport], "reason": reason})
    assert f"infeasible: {reason}" in " ".join(text.split())


def test_a_path_with_brackets_is_shown_as_it_is() -> None:
    """A sweep over `groups.name=[layer1.*]` makes such directories; brackets are also rich's mark-up."""
    path = "/out/groups.name=[layer1.*]/finetune/slim"
    slim = {**RESULT["slim"], "path": path, "loads_with": f"model = hawada.load('{path}')"}
    text = printed_result({**RESULT, "slim": slim}, "out/groups.name=[layer1.*]")
    assert f"slim model: {path}" in text
    assert f"hawada.load('{path}')" in text
    assert text.lstrip().startswith("groups.name=[layer1.*]")


def test_a_sweep_has_one_row_per_job_with_its_figures() -> None:
    other = {**RESULT, "verdict": "missed", "latency_ratio": {"median": 0.811, "low": 0.8, "high": 0.82}}
    text = printed_sweep(a_job("0.1", RESULT), a_job("0.5", other))
    assert "2 jobs" in text and "lambda.lr" in text
    assert cells(text, "0.1") == ["met", "0.575", "3.69", "96.48%", "97.36%", "0.0613"]
    assert cells(text, "0.5")[:2] == ["missed", "0.811"]


def test_a_sweep_over_two_keys_shows_both() -> None:
    job = Job({"lambda.lr": "0.1", "seed": "7"}, typed(FinalResult, RESULT), None)
    assert cells(printed_sweep(job, keys=["lambda.lr", "seed"]), "0.1")[:3] == ["7", "met", "0.575"]


def test_a_sweep_shows_why_a_job_failed_and_goes_on() -> None:
    text = printed_sweep(a_job("-1", None, ValueError("lambda.lr: -1 is not\n at least 0")), a_job("0.1", RESULT))
    assert cells(text, "-1")[0].startswith("failed")
    assert "lambda.lr: -1 is not at least 0" in " ".join(text.split())
    assert "0.575" in cells(text, "0.1")


def test_a_sweep_over_a_single_stage_shows_that_it_is_done() -> None:
    text = printed_sweep(a_job("0.1", example("finetune")), a_job("0.5", ENDED_EARLY[DecidedByProfile]))
    assert cells(text, "0.1")[0] == "done"
    assert cells(text, "0.5")[0] == "already_met"


@pytest.mark.parametrize("error", [None, ValueError("groups: [layer9.*] matches nothing of [a, b]")])
def test_a_sweep_shows_brackets_as_they_are(error: ValueError | None) -> None:
    job = a_job("[layer9.*]", RESULT if error is None else None, error, key="groups.name")
    text = printed_sweep(job, keys=["groups.name"])
    assert cells(text, "[layer9.*]")
    assert error is None or str(error) in " ".join(text.split())
