"""A latency table as a file: measured once where the model will run, used anywhere to train for that device."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
STACK = (
    "torch",
    "driver",
    "cuda",
    "cudnn",
    "threads",
)  # of the fingerprint: compared where the machine at hand has them too


def read_table_file(path: Path) -> dict[str, Any]:
    """The record that `stage=profile` wrote to `latency_table.json`.

    Raises:
        ValueError: when it is not there or is not such a file.
    """
    remedy = "set gpu.table to the latency_table.json that stage=profile wrote on that device"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ValueError(f"gpu.table: cannot read {path} ({reason}); {remedy}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or "fingerprint" not in record:
        raise ValueError(f"gpu.table: {path} is not a latency table of format {FORMAT}; {remedy}")
    return record


def check_table_file(
    record: Mapping[str, Any],
    path: Path,
    *,
    gpu: str,
    device: str,
    match: str | None,
    timed_as: Mapping[str, Any],
    here: Mapping[str, Any],
) -> None:
    """Check that a table answers the question that is asked, and that it is of the software at hand.

    Args:
        record: see `read_table_file`.
        path: for messages.
        gpu: the `gpu=` choice, for messages.
        device: kind that it asks for, or `auto` for any.
        match: regular expression that the device's name must contain, or None.
        timed_as: dtype, runtime and shapes that are asked for.
        here: fingerprint of the machine at hand; where it is another device, only versions of torch are compared.

    Raises:
        ValueError: naming what differs.
    """
    there = record["fingerprint"]
    if device not in ("auto", there["device"]) or (match and not re.search(match, there["name"], re.IGNORECASE)):
        raise ValueError(
            f"gpu.table: {path} was measured on {there['name']} ({there['device']}), and gpu={gpu} is "
            f"{match or device}; use the table of that device, or choose gpu= accordingly"
        )
    wanted = {key: value for key, value in timed_as.items() if key != "device"}
    for key, value in wanted.items():
        if record["timed_as"].get(key) != value:
            raise ValueError(
                f"gpu.table: {path} was measured with {key} {record['timed_as'].get(key)}, and {key} {value} is "
                "asked for; ask for the same, or measure another table with stage=profile"
            )
    same_device = here.get("name") == there["name"]
    for key in STACK if same_device else ("torch",):
        if _release(here.get(key)) != _release(there.get(key)):
            raise ValueError(
                f"gpu.table: {path} was measured with {key} {there.get(key)}, and {key} {here.get(key)} is here; "
                "latencies do not carry over: use the same version, or measure another table with stage=profile"
            )


def _release(version: Any) -> Any:
    """A version without its patch and build."""
    return ".".join(str(version).split("+")[0].split(".")[:2]) if isinstance(version, str) else version
