import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published_curves.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("published_curves", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOKENS = [1, 2, 4, *range(8, 512, 8)]


@pytest.mark.parametrize("choose", ["choose_points", "spread_points"])
def test_no_more_points_are_looked_at_than_are_taken(script, choose):
    seen = []

    def measure(tokens):
        seen.append(tokens)
        return float(1 + tokens // 100)

    points = getattr(script, choose)(TOKENS, 16, measure)
    assert len(seen) == len(set(seen)) <= 16 and sorted(seen) == list(points)
    assert (seen[0] in points) and {TOKENS[0], TOKENS[-1]} <= set(points)


def test_a_single_stair_is_found(script):
    curve = {tokens: 1.0 if tokens <= 304 else 3.0 for tokens in TOKENS}
    points = script.choose_points(TOKENS, 16, curve.__getitem__)
    assert {304, 312} <= set(points)
    assert script.left_out_errors("mlp", curve, points).max() < 1e-9


def test_a_straight_line_is_predicted_exactly(script):
    curve = {tokens: 0.1 + 0.01 * tokens for tokens in TOKENS}
    errors = script.left_out_errors("add", curve, script.choose_points(TOKENS, 16, curve.__getitem__))
    assert len(errors) == len(TOKENS) - 16 and errors.max() < 1e-9


def test_the_record_holds_every_curve(script, tmp_path, monkeypatch, capsys):
    columns = "time_stats.add.median,time_stats.mlp_up_proj.median,num_tokens,num_tensor_parallel_workers"
    rows = [f"{0.001 * n},{0.1 if n <= 304 else 0.5},{n},{degree}" for n in [*TOKENS, 9999] for degree in (1, 2)]
    with gzip.open(tmp_path / "tiny__mlp.csv.gz", "wt") as file:
        file.write("\n".join([columns, *rows]) + "\n")
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["published_curves", "--data", str(tmp_path), "--output", str(output)])
    script.main()
    result = json.loads(output.read_text())
    assert {(entry["operator"], entry["tensor_parallel"]) for entry in result["curves"]} == {
        (operator, degree) for operator in ("add", "mlp_up_proj") for degree in (1, 2)
    }
    assert all(max(entry["points"]) <= 4096 and len(entry["points"]) <= 16 for entry in result["curves"])
    assert np.isclose(result["summary"]["all curves"]["worst_curve"], 0.0, atol=1e-9)
    assert result["summary"]["matrix products"]["curves"] == 2
    assert '"versions"' in capsys.readouterr().out
