"""How well is the latency of unseen sliced models predicted? Site tables are compared with a roofline and with MACs.

    python benchmarks/fidelity.py --output benchmarks/results/fidelity_cpu.json

For each model, all proxies are fitted to the same sliced models and predict the same 30 unseen ones, whose widths are
drawn uniformly; all of these are measured once.
Further overrides go after `--`, e.g. `-- gpu=h100`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from hawada.config import build, conf_dir, register_resolvers
from hawada.core.latency import calibrate, fidelity
from hawada.core.structure import widths_of
from hawada.experiment import Run
from hawada.experiment.results import to_json
from hawada.report import Progress
from hawada.stages.profile import choose_models, measure_models, time_sites
from hawada.workspace import ModelStopwatch, open_stage

PROXIES = ("lookup", "roofline", "macs")


def workspace(model: str, proxy: str, root: Path, overrides: list[str]) -> ModelStopwatch:
    """Make the workspace of `stage=profile`."""
    register_resolvers()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"proxy={proxy}", f"output_dir={root}", *overrides])
    run = Run(root / cfg.name, cfg)
    return open_stage(run.settings("profile"), run)[1]


def compare_proxies(model: str, root: Path, overrides: list[str]) -> dict[str, Any]:
    """Compute the fidelity of every proxy on the same measured models."""
    spaces = {proxy: workspace(model, proxy, root, overrides) for proxy in PROXIES}
    watch = spaces["lookup"]
    teacher = watch.placed(watch.subject.adapter.skeleton())
    tables = {}
    with Progress(model, 100) as progress:
        for proxy, space in spaces.items():
            clock = build(space.cfg.proxy.clock) if space.cfg.proxy.get("clock") else space.clock
            tables[proxy] = time_sites(space, teacher, clock, progress)
        keeps = choose_models(watch.subject)
        measured, _ = measure_models(watch, teacher, keeps, progress)
    teacher_ms = measured[0].latency_ms.median
    samples = [
        (widths_of(keep, watch.subject.groups), sliced.ratio.median * teacher_ms)
        for keep, sliced in zip(keeps, measured, strict=True)
    ]
    record: dict[str, Any] = {"model": model, "teacher_ms": teacher_ms, "timed_as": watch.timed_as, "proxies": {}}
    for proxy, space in spaces.items():
        fitted = 2 + watch.cfg.profile.fitted_models
        predicted, real = calibrate(space.subject.new_proxy(tables[proxy]), samples, fitted=fitted)
        record["proxies"][proxy] = fidelity(predicted, real) | {"predicted_ms": predicted}
        record["measured_ms"] = real
    return record | {"environment": to_json(watch.store.environment)}


def main() -> None:
    """Evaluate every model and print a line for each proxy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny_resnet", "tiny_vit", "tiny_llama"])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="further hawada overrides")
    arguments = parser.parse_args()
    records = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as root:
            record = compare_proxies(model, Path(root), arguments.overrides)
        environment = record.pop("environment")
        records.append(record)
        for proxy, quality in record["proxies"].items():
            print(
                f"{model:12} {proxy:9} MAPE {quality['mape']:.1%}, Kendall tau {quality['kendall_tau']:.3f} "
                f"on {quality['samples']} unseen models",
                flush=True,
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"environment": environment, "models": records}, indent=1) + "\n")
    print(json.dumps(environment))


if __name__ == "__main__":
    main()
