"""Results come back from JSON as they were, nothing unknown is read, and the schema is this version's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from stage_results import AS_JSON, ENDED_EARLY, example, final, typed

from hawada.core.verdict import Verdict
from hawada.experiment import PLANS
from hawada.experiment.results import RESULTS, EvaluateResult, FinalResult, from_json, to_json
from hawada.tools.result_schema import document, schema_path


def test_every_stage_has_a_result_and_an_example_of_it() -> None:
    assert set(RESULTS) == set(PLANS) == set(AS_JSON)


@pytest.mark.parametrize("stage", RESULTS)
def test_a_result_comes_back_from_json_as_it_was(stage: str) -> None:
    result = example(stage)
    text = json.dumps(to_json(result))
    assert json.loads(text) == AS_JSON[stage]
    assert typed(RESULTS[stage], json.loads(text)) == result
    assert json.dumps(to_json(typed(RESULTS[stage], json.loads(text)))) == text  # floats to the last bit


@pytest.mark.parametrize("stage", RESULTS)
@pytest.mark.parametrize("how", ["more", "less", "other"])
def test_what_is_not_a_result_is_refused_in_one_sentence(stage: str, how: str) -> None:
    plain: dict[str, Any] = dict(AS_JSON[stage])
    if how == "more":
        plain["judged"] = {}
    elif how == "less":
        del plain["summary"]
    else:
        plain["summary"] = 1.5
    name = "judged" if how == "more" else "summary"
    message = rf"^somewhere is not what this version writes \({name}: .*\); set overwrite=true$"
    with pytest.raises(ValueError, match=message) as caught:
        from_json(RESULTS[stage], plain, place="somewhere", remedy="set overwrite=true")
    assert "\n" not in str(caught.value)


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        example("finetune").summary = "better"  # type: ignore[misc] # that is the point


@pytest.mark.parametrize("value", [math.nan, math.inf, 5e-324, 1 / 3])
def test_odd_numbers_survive(value: float) -> None:
    text = json.dumps(to_json(example("finetune", losses={"kd": value})))
    assert repr(typed(RESULTS["finetune"], json.loads(text)).losses["kd"]) == repr(value)


def test_what_does_not_apply_is_absent_and_what_is_unknown_is_null() -> None:
    plain = to_json(final(target_ms=None, target_ratio=None))
    assert plain["target_ms"] is plain["target_ratio"] is plain["kd"] is None
    assert "perplexity" not in plain["slim"] and "prompt" not in plain["timed_as"]
    assert to_json(example("train", kd=None)).keys() == AS_JSON["train"].keys() - {"kd"}


@pytest.mark.parametrize("kind", ENDED_EARLY, ids=lambda kind: kind.__name__)
def test_a_final_result_is_known_by_what_it_holds(kind: type) -> None:
    found = typed(FinalResult, ENDED_EARLY[kind])
    assert type(found) is kind and to_json(found) == ENDED_EARLY[kind]
    assert type(final()) is EvaluateResult and final().verdict is Verdict.MET


def test_the_quality_is_the_accuracy_or_the_perplexity() -> None:
    assert final().slim.quality == 0.5
    model = {key: value for key, value in AS_JSON["evaluate"]["slim"].items() if key != "accuracy"}
    assert final(slim={**model, "perplexity": 8.16}).slim.quality == 8.16


def test_the_schema_that_is_shipped_is_not_stale() -> None:
    assert schema_path().read_text() == document(), "run python -m hawada.tools.result_schema"


def test_the_schema_names_the_stable_figures() -> None:
    schema = json.loads(schema_path().read_text())
    evaluate = schema["$defs"]["EvaluateResult"]
    stable = {"verdict", "target_ms", "latency_ratio", "teacher", "slim", "agreement", "phases", "proxy", "equivalence"}
    assert stable | {"environment"} <= set(evaluate["required"]) and not evaluate["additionalProperties"]
    assert set(schema["$defs"]["Verdict"]["enum"]) == {*Verdict}
    assert {"latency_ms", "params", "macs", "accuracy", "perplexity", "path"} <= set(
        schema["$defs"]["SlimFigures"]["properties"]
    )


def test_results_start_without_torch() -> None:
    script = "import sys, hawada.experiment.results as r; r.RESULTS; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
