"""Where a training was: everything that going on exactly needs, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hawada.core.files import PARTIAL, partial_path

STATE, TENSORS = "state.json", "tensors.safetensors"


def save_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by the present state; an interruption leaves the old or the new one.

    Files that are not the checkpoint's stay in the folder.

    Args:
        folder: made if missing.
        module: parameters and buffers.
        optimizer: its moments and steps.
        state: plain values: the position in the data, the best figure so far.

    Raises:
        ValueError: when `folder` is a link.
    """
    _check_no_link(folder)
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    partial = partial_path(folder)
    partial.mkdir(parents=True)
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(whole, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(state))
    except BaseException:
        _remove(partial)
        raise
    if folder.exists():
        old = partial.with_suffix(".old")
        os.replace(folder, old)
        os.replace(partial, folder)
        _put_back(old, folder)
    else:
        os.replace(partial, folder)


def load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    """Bring back what was saved; returns its plain values, or None where nothing was.

    Args:
        folder: as it was given to `save_checkpoint`.
        module: takes parameters and buffers.
        optimizer: takes moments; None where training does not go on.

    Raises:
        ValueError: when `folder` is a link.
    """
    _check_no_link(folder)
    _recover(folder)
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


def _check_no_link(folder: Path) -> None:
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, where a checkpoint's own folder was expected; put the folder there")


def _recover(folder: Path) -> None:
    """Settle what a save left that was broken off: the old checkpoint comes back, one that is not whole goes."""
    found = [path for path in folder.parent.glob(f".{folder.name}.*") if PARTIAL.fullmatch(path.name)]
    for path in sorted(path for path in found if path.is_dir() and not path.is_symlink()):
        if path.suffix == ".partial":
            _remove(path)
        elif folder.exists():
            _put_back(path, folder)
        else:
            os.replace(path, folder)  # broken off between the two renames


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint's two files, and its folder where nothing else is in it."""
    for name in (STATE, TENSORS):
        (checkpoint / name).unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()


def _put_back(old: Path, folder: Path) -> None:
    """Remove the old checkpoint and bring what else lay in its folder to the same place in the new one."""
    for path in old.iterdir():
        if path.name not in (STATE, TENSORS) and not os.path.lexists(folder / path.name):
            os.rename(path, folder / path.name)
    _remove(old)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
