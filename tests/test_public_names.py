"""The names that the project is known by are importable from their rooms, and a room alone loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hawada
from hawada.adapters import Shape
from hawada.adapters.graph import GraphAdapter
from hawada.core.structure import check_groups

SRC = Path(hawada.__file__).parent
PUBLIC_NAMES = {
    "hawada": "load",
    "hawada.core.structure": "Group Cut check_groups keep_all keep_first full_widths widths_of materialize "
    "ExportPolicy Rounding keep_group_indices_from_gate keep_element_indices_from_gate "
    "slice_linear slice_conv2d slice_embedding",
    "hawada.core.gates": "SigmoidGate Student combined_penalty project_gates_into_constraints",
    "hawada.core.distill": "KDConfig kd_loss mse_reg",
    "hawada.core.latency": "LatencyProxy measure_latency_ms",
    "hawada.core.search": "grid_search_latency",
    "hawada.core.train": "LagrangeTrainer",
    "hawada.core.evaluate": "compare_outputs",
    "hawada.adapters": "Adapter Shape save_model attach_adapters is_attention_layer GroupFilter",
    "hawada.adapters.huggingface": "AttentionHeadAdapter",
    "hawada.adapters.graph": "GraphAdapter",
    "hawada.interlingua": "InterlinguaEncoder Adapter LMWrapper ByteTokenizer k_token_ce_from_prefix "
    "kd_first_k_prefix_vs_text kd_hidden_states_first_k",
}
IMPORT = """
import importlib, json, sys
rooms, public_names = json.loads(sys.argv[1])
early = []
for room in rooms:
    importlib.import_module(room)
    if "torch" in sys.modules:
        early.append(room)
importlib.import_module("hawada.core.structure").Group
late = "torch" in sys.modules
broken = []
for room, names in public_names.items():
    for name in names.split():
        try:
            found = getattr(importlib.import_module(room), name)
        except (ImportError, AttributeError) as error:
            broken.append(f"{room}.{name}: {error}")
        else:
            if getattr(found, "__name__", None) != name:
                broken.append(f"{room}.{name} is {found!r}")
print(json.dumps({"early": early, "late": late, "broken": broken}))
"""


@pytest.fixture(scope="module")
def rooms() -> list[str]:
    folders = sorted(path.parent.relative_to(SRC.parent) for path in SRC.rglob("__init__.pyi"))
    return [".".join(folder.parts) for folder in folders]


@pytest.fixture(scope="module")
def imported(rooms: list[str]) -> dict[str, Any]:
    """What a fresh interpreter finds that imports the rooms, and then every name."""
    command = [sys.executable, "-c", IMPORT, json.dumps([["hawada", *rooms], PUBLIC_NAMES])]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_public_name_is_importable_from_its_room(imported: dict[str, Any]) -> None:
    assert imported["broken"] == []


def test_a_room_loads_torch_only_when_a_name_of_it_is_used(rooms: list[str], imported: dict[str, Any]) -> None:
    assert {room for room in PUBLIC_NAMES if room.rpartition(".")[2] not in ("hawada", "train", "evaluate")} <= {*rooms}
    assert imported["early"] == [] and imported["late"]


def test_the_graph_adapter_declares_a_network_of_the_users_own() -> None:
    adapter = GraphAdapter(
        factory="torchvision.models.squeezenet1_1",
        arguments={"dropout": 0.1},
        num_classes=5,
        image_size=32,
        channels=3,
        stream=True,
    )
    with torch.device("meta"):
        model = adapter.skeleton()
    groups = adapter.groups(model)
    check_groups(groups, model)
    (images,) = adapter.example_inputs(Shape(2))
    assert images.shape == (2, 3, 32, 32)
    assert {name for site in adapter.sites(model) for name in site.groups} == {group.name for group in groups}
    assert model(images.to("meta")).shape == (2, 5)
