"""A declaration is compared with what slicing does before anything is timed, and a wrong group is named."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hawada.adapters import Shape
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.structure import ExportPolicy, GatePoint
from hawada.workspace import prove_declaration


class Mistaken(ResNetAdapter):
    """Gates one group where it is not consumed."""

    def groups(self, model):
        groups = super().groups(model)
        at = next(index for index, group in enumerate(groups) if group.name == "layer3.0.conv1")
        groups[at] = replace(groups[at], gated_at=(GatePoint("layer3.0.bn2", "output", 1),))
        return groups


def subject_of(adapter):
    with torch.device("meta"):
        meta = adapter.skeleton()
    groups = adapter.groups(meta)
    return SimpleNamespace(
        adapter=adapter,
        meta=meta,
        groups=groups,
        policy=ExportPolicy(),
        check_inputs=lambda: adapter.example_inputs(Shape(2)),
        slim=lambda model, keep: adapter.slim(model, groups, keep),
    )


def test_a_right_declaration_passes_and_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    prove_declaration(subject_of(ResNetAdapter("basic", [1, 1, 1, 1], num_classes=3, image_size=16)))
    assert torch.equal(torch.rand(1), expected)


def test_a_wrong_group_is_named():
    adapter = Mistaken("basic", [1, 1, 1, 1], num_classes=3, image_size=16)
    with pytest.raises(ValueError, match=r"model\.adapter: .* the declaration of layer3\.0\.conv1 is wrong; report"):
        prove_declaration(subject_of(adapter))
