"""Writes `src/hawada/experiment/result.schema.json`, the JSON Schema of a run's final result.

Run it as `python -m hawada.tools.result_schema`.
"""

from __future__ import annotations

import json
from pathlib import Path

from hawada import experiment
from hawada.experiment.results import FinalResult, json_schema


def schema_path() -> Path:
    """Where the schema lies."""
    assert experiment.__file__ is not None
    return Path(experiment.__file__).with_name("result.schema.json")


def document() -> str:
    """The whole file."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "HawAda's result.json"}
    return json.dumps(head | json_schema(FinalResult), indent=1) + "\n"


def main() -> None:
    """Write the file in the checkout."""
    schema_path().write_text(document())


if __name__ == "__main__":
    main()
