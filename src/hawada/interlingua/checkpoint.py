"""Where a training was: everything that going on exactly needs, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE, TENSORS = "state.json", "tensors.safetensors"


def save_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace what `folder` holds by the present state; an interruption leaves the old or the new one.

    Args:
        folder: of this checkpoint alone.
        module: parameters and buffers.
        optimizer: its moments and steps.
        state: plain values: the position in the data, the best figure so far.
    """
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial / TENSORS)
    (partial / STATE).write_text(json.dumps(state))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """Bring back what was saved; returns its plain values, or None where nothing was.

    Args:
        folder: as it was given to `save_checkpoint`.
        module: takes parameters and buffers.
        optimizer: takes moments; None where training does not go on.
    """
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)  # broken off between the two renames
    if not (folder / STATE).is_file():
        return None
    tensors = load_file(folder / TENSORS)
    module.load_state_dict(_below("module.", tensors))
    if optimizer is not None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        torch.set_rng_state(tensors["random"])
        for index, state in _below("random.", tensors).items():
            torch.cuda.set_rng_state(state, int(index))
    values: dict[str, Any] = json.loads((folder / STATE).read_text())
    return values


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
