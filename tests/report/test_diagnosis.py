"""The doctor's sentences follow the figures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from stage_results import AS_JSON, STAIRS, typed

from hawada.experiment.results import DoctorResult
from hawada.report import console, describe, print_diagnosis, summarize_findings


def timed(ratio: float, spread: float = 0.01) -> dict[str, Any]:
    interval = {"median": ratio, "low": ratio - spread, "high": ratio + spread}
    latency_ms = {key: 10 * value for key, value in interval.items()} | {"p95": 10 * ratio, "samples": 5}
    return {"ratio": interval, "latency_ms": latency_ms}


def found(ratio: float, spread: float = 0.01, removed: float = 0.0) -> dict[str, Any]:
    return {**timed(ratio, spread), "removed": removed, "widths": {}}


RESULT: dict[str, Any] = {
    "bottleneck": {
        "kind": "launch",
        "launch_ms": 9.0,
        "memory_ms": 1.0,
        "compute_ms": 0.5,
        "shares": {"launch": 0.9, "memory": 0.1, "compute": 0.05},
        "impossible": False,
        "measured_ms": 10.0,
        "operators": 3,
        "flops": 30,
        "bytes": 300,
    },
    **{name: AS_JSON["doctor"][name] for name in ("summary", "words", "peaks", "environment")},
    "teacher": timed(1.0),
    "slices": {
        "half": found(0.96, removed=0.5),
        "width": found(0.9, removed=0.9),
        "depth": found(0.25),
        "both": found(0.2, removed=0.9),
    },
    "runtimes": {"cudagraph": {**timed(0.3), "against": "eager", "half": found(0.62)["ratio"]}},
    "stairs": [
        {**STAIRS, "ends": [8, 16, 24]},
        {**STAIRS, "site": "layer2.0", "ends": [48, 96]},
    ],
    "target": {"ratio": [0.25, 0.64], "ms": [2.5, 6.4]},
    "timed_as": {"batch": 1, "phase": "forward", "runtime": "eager", "device": "cuda", "dtype": "float32"},
    "units": {"width": ["channel"], "depth": ["branch"]},
    "simulated": False,
}


def changed(**changes: Any) -> DoctorResult:
    result = copy.deepcopy(RESULT)
    for key, value in changes.items():
        node, _, name = key.replace("__", ".").rpartition(".")
        target = result
        for part in node.split(".") if node else ():
            target = target[part]
        target[name] = value
    return typed(DoctorResult, result)


def test_a_launch_bound_model_on_a_gpu() -> None:
    assert describe(changed())[0] == (
        "At batch 1 in eager mode this model is launch-bound: removing half of the channels buys 4%. "
        "Remove branches, raise the batch, or use runtime=cudagraph."
    )


@pytest.mark.parametrize(("device", "runtime"), [("cpu", "eager"), ("cuda", "cudagraph")])
def test_cuda_graphs_are_advised_only_where_they_are_possible_and_not_used_yet(device: str, runtime: str) -> None:
    words = describe(changed(timed_as__device=device, timed_as__runtime=runtime))
    assert words[0].endswith("Remove branches or raise the batch.")


def test_a_compute_bound_model_is_to_be_narrowed() -> None:
    words = describe(changed(bottleneck__kind="compute", timed_as__device="cpu"))
    assert "this model is compute-bound" in words[0] and "Narrow it, remove branches" in words[0]
    assert "cudagraph" not in words[0]


def test_a_memory_bound_model_may_take_a_smaller_dtype() -> None:
    assert "half-precision" in describe(changed(bottleneck__kind="memory"))[0]
    assert "half-precision" not in describe(changed(bottleneck__kind="memory", timed_as__dtype="bfloat16"))[0]


def test_the_phase_and_all_kinds_of_units_are_named() -> None:
    units = {"width": ["kv_head", "query_head", "ffn", "odd"], "depth": ["layer"]}
    words = describe(changed(timed_as__phase="decode", units=units))[0]
    assert words.startswith("At batch 1 in decode in eager mode") and "Remove layers" in words
    assert "half of the KV heads, query heads, FFN neurons and odd units" in words


@pytest.mark.parametrize(
    ("half", "text"),
    [
        (found(0.99, spread=0.02, removed=0.5), "removing half of the channels buys nothing measurable"),
        (found(1.2, spread=0.02, removed=0.5), "removing half of the channels costs 20%"),
        (found(0.9, removed=0.2), "removing 20% of the channels buys 10%"),
    ],
)
def test_no_more_is_claimed_than_was_measured(half: dict[str, Any], text: str) -> None:
    assert text in describe(changed(slices__half=half))[0]


def test_a_resource_that_explains_little_is_named_with_its_share() -> None:
    shares = {"launch": 0.2, "memory": 0.1, "compute": 0.05}
    assert "explains only 20% of its time" in describe(changed(bottleneck__shares=shares))[0]


def test_more_than_the_whole_time_is_doubted() -> None:
    shares = {"launch": 1.4, "memory": 0.1, "compute": 0.05}
    words = describe(changed(bottleneck__shares=shares, bottleneck__impossible=True))
    assert "Take this with care: that would need 140%" in words[1]


def test_the_reach_names_what_cannot_go() -> None:
    assert "1.11x by width alone, 4.00x by depth alone, 5.00x by width and depth" in " ".join(describe(changed()))
    without = {name: RESULT["slices"][name] for name in ("half", "width", "both")}
    words = " ".join(describe(changed(units__depth=[], slices=without)))
    assert "No layers or branches of this model can go" in words and "depth alone" not in words
    assert "must stay (export.minimum)" in " ".join(describe(changed(slices=without)))


def test_nothing_to_remove_at_all_still_gives_words() -> None:
    nothing = {"slices": {}, "units": {"width": [], "depth": []}, "target": None}
    words = " ".join(describe(changed(**nothing, bottleneck__kind="memory", timed_as__dtype="float16")))
    assert "this model is memory-bound. No layers" in words
    assert "No widths of this model can shrink" in words and "No target is sensible" in words
    assert summarize_findings(changed(slices={})) == "launch-bound; pruning could give up to 1.00x"


def test_runtimes_are_compared_or_refused() -> None:
    words = " ".join(describe(changed()))
    assert "runtime=cudagraph takes 0.30 of the time that eager takes; half of the widths buys 38% there." in words
    refused = describe(changed(runtimes={"compile": {"refused": "no compiler"}}))
    assert "runtime=compile is not possible here: no compiler." in refused


def test_stairs_are_named_as_multiples_where_they_are() -> None:
    assert "(layer1.0 after multiples of 8; layer2.0 after 48, 96)" in " ".join(describe(changed()))
    assert "No stairs show" in " ".join(describe(changed(stairs=[{**RESULT["stairs"][0], "ends": []}])))
    assert "stairs" not in " ".join(describe(changed(stairs=[])))


def test_the_target_is_a_range_and_a_suggestion_inside_it() -> None:
    assert (
        describe(changed())[-1].endswith("budget.target_ratio=0.40.") and "2.5 ms (0.25 of" in describe(changed())[-1]
    )


def test_a_simulated_device_is_named_first() -> None:
    assert describe(changed(simulated=True))[0] == "This device is simulated; nothing was measured."
    assert "(simulated)" in summarize_findings(changed(simulated=True))


def test_the_table_shows_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 240)
    with console.capture() as capture:
        print_diagnosis(changed(words=describe(changed())))
    text = capture.get()
    for cell in ("0.96 [0.95, 0.97]", "launching operators, at least", "90%", "5.00x", "teacher, runtime=cudagraph"):
        assert cell in text
    assert all(sentence in text for sentence in describe(changed()))
