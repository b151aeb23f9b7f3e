"""Latency tables in files: measured once where the model will run, and used anywhere to train for that device."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
# Entries of the fingerprint that must agree where the table was measured on the same kind of device as the one at hand.
COMPARED_ON_SAME_DEVICE = ("torch", "driver", "cuda", "cudnn", "threads")
COMPARED_ON_OTHER_DEVICE = ("torch",)


def read_table_file(path: Path) -> dict[str, Any]:
    """Read the record that `stage=profile` wrote to `latency_table.json`.

    Raises:
        ValueError: when the file cannot be read, or is not a latency table.
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
    """Check that a table was measured as the configuration asks, and with the software at hand.

    Args:
        record: the table, see `read_table_file`.
        path: the path of its file, for messages.
        gpu: the `gpu=` choice, for messages.
        device: the kind of device that this choice asks for, or `auto` for any.
        match: a regular expression that the device's name must contain, or None for any name.
        timed_as: the dtype, runtime and shapes that are asked for.
        here: the fingerprint of the machine at hand; if that is another device, only torch's versions are compared.

    Raises:
        ValueError: when the table differs from what is asked for; the message names the difference.
    """
    there = record["fingerprint"]
    if device not in ("auto", there["device"]) or (match and not re.search(match, there["name"], re.IGNORECASE)):
        raise ValueError(
            f"gpu.table: {path} was measured on {there['name']} ({there['device']}), and gpu={gpu} is "
            f"{match or device}; use the table of that device, or choose gpu= accordingly"
        )
    for key, value in timed_as.items():
        if key != "device" and record["timed_as"].get(key) != value:
            raise ValueError(
                f"gpu.table: {path} was measured with {key} {record['timed_as'].get(key)}, and {key} {value} is "
                "asked for; ask for the same, or measure another table with stage=profile"
            )
    same_device = here.get("name") == there["name"]
    for key in COMPARED_ON_SAME_DEVICE if same_device else COMPARED_ON_OTHER_DEVICE:
        if _release(here.get(key)) != _release(there.get(key)):
            raise ValueError(
                f"gpu.table: {path} was measured with {key} {there.get(key)}, and {key} {here.get(key)} is here; "
                "latencies do not carry over: use the same version, or measure another table with stage=profile"
            )


def _release(version: Any) -> Any:
    """Return a version without its patch and build numbers, and anything else unchanged."""
    return ".".join(str(version).split("+")[0].split(".")[:2]) if isinstance(version, str) else version
