import random

import pytest
import torch
from torch import nn

from hawada.adapters.torchvision import ResNetAdapter

ADAPTERS = {
    "tiny": {"arch": "basic", "layers": [2, 2, 1, 1], "num_classes": 10, "image_size": 32},
    "resnet18": {"arch": "resnet18", "image_size": 32},
    "resnet50": {"arch": "resnet50", "image_size": 32},
}


def build(name, **options):
    """Return an adapter and its network in eval mode; random norms show a gate on the wrong side."""
    torch.manual_seed(0)
    adapter = ResNetAdapter(**ADAPTERS[name], **options)
    model = adapter.skeleton()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
    return adapter, model


def choose_units(groups, seed):
    """Choose random units of every group, and remove about a third of the branches."""
    draw = random.Random(seed)
    return {
        group.name: (
            tuple(range(draw.random() < 0.7))
            if group.removes
            else tuple(sorted(draw.sample(range(group.units), draw.randint(1, group.units))))
        )
        for group in groups
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: networks this small gain little from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    return build("tiny")


@pytest.fixture
def build_network():
    return build


@pytest.fixture
def random_units():
    return choose_units


@pytest.fixture
def specs():
    """Return the constructor's arguments of each network."""
    return ADAPTERS
