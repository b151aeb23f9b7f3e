"""The profiled table and what it predicts, whether it was measured here or came as a file from another device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hawada.core.files import write_json
from hawada.core.latency import (
    FORMAT,
    LatencyTable,
    Proxy,
    check_table_file,
    fingerprint,
    read_table_file,
)
from hawada.core.structure import Keep, full_widths, widths_of
from hawada.core.verdict import Comparison, Interval, Latency
from hawada.experiment.results import ProfileResult, to_json
from hawada.workspace.stopwatch import ModelStopwatch
from hawada.workspace.subject import Subject

TABLE_FILE = "latency_table.json"


def write_table(watch: ModelStopwatch, folder: Path, table: LatencyTable, proxy: Proxy, result: ProfileResult) -> None:
    """Write the file that carries everything which was measured to another machine."""
    record = {
        "format": FORMAT,
        "gpu": watch.cfg.gpu.name,
        "fingerprint": fingerprint(watch.device),
        "timed_as": watch.timed_as,
        "simulated": watch.clock.simulated,
        "model": watch.subject.adapter_spec,
        **table.as_dict(),
        "proxy": proxy.state(),
        "result": to_json(result),
    }
    write_json(folder / TABLE_FILE, record)


def given_table(watch: ModelStopwatch) -> dict[str, Any]:
    """What `gpu.table` holds.

    Raises:
        ValueError: when it is missing, or is not the table of what is asked for.
    """
    gpu, spec = watch.cfg.gpu, watch.subject.adapter_spec
    if gpu.table is None:
        raise ValueError("gpu.table: gpu.timing=table needs one; set gpu.table to a latency_table.json")
    path = Path(gpu.table)
    record = read_table_file(path)
    check_table_file(
        record,
        path,
        gpu=gpu.name,
        device=gpu.device,
        match=gpu.match,
        timed_as=watch.timed_as,
        here=fingerprint(watch.device),
    )
    if record["model"] != json.loads(json.dumps(spec)):
        raise ValueError(
            f"gpu.table: {path} was measured for another model ({record['model']}); measure this one with "
            "stage=profile where it will run, or set the model's options to the same"
        )
    return record


def load_proxy(subject: Subject, stage: str) -> Proxy:
    """The configured proxy over the profiled table, with the samples that a stage left."""
    proxy = subject.new_proxy(
        LatencyTable.from_dict(json.loads((subject.store.folder("profile") / TABLE_FILE).read_text()))
    )
    proxy.load_state(json.loads((subject.store.folder(stage) / "proxy.json").read_text()))
    return proxy


def predicted(subject: Subject, keep: Keep) -> Comparison:
    """What the table predicts for a choice beside the teacher, where nothing can be measured."""
    proxy, teacher = load_proxy(subject, "profile"), subject.store.run.result("profile").teacher
    ratio = float(proxy.predict(widths_of(keep, subject.groups))) / float(proxy.predict(full_widths(subject.groups)))
    slim_ms = ratio * teacher.median
    slim = Latency(slim_ms, slim_ms, slim_ms, slim_ms, 0)
    return Comparison(teacher, slim, Interval(ratio, ratio, ratio), source="table")
