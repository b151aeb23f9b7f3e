"""Save and load everything that a training needs to continue bit for bit; a checkpoint is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hawada.core.files import PARTIAL, partial_path

STATE_FILE, TENSORS_FILE = "state.json", "tensors.safetensors"


def save_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by the present state; an interruption leaves the old or the new one.

    Files that are not the checkpoint's stay in the folder.

    Args:
        folder: the folder of the checkpoint, made if it is missing.
        module: the module whose parameters and buffers are saved.
        optimizer: the optimizer whose moments and step counts are saved.
        state: plain values for JSON, such as the position in the data and the best figure so far.

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
    saved = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(saved, partial / TENSORS_FILE)
        (partial / STATE_FILE).write_text(json.dumps(state))
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
    """Load what `save_checkpoint` saved; return its plain values, or None where there is no checkpoint.

    Args:
        folder: the folder that was given to `save_checkpoint`.
        module: the module that takes the parameters and buffers.
        optimizer: the optimizer that takes the moments; the random generators are then set to the saved state too.
            None where training does not continue.

    Raises:
        ValueError: when `folder` is a link.
    """
    _check_no_link(folder)
    _recover(folder)
    if not (folder / STATE_FILE).is_file():
        return None
    tensors = load_file(folder / TENSORS_FILE)
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
    values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return values


def _check_no_link(folder: Path) -> None:
    """Refuse a folder that is a link, so that nothing is written or removed elsewhere."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, where a checkpoint's own folder was expected; put the folder there")


def _recover(folder: Path) -> None:
    """Tidy up after an interrupted save: bring back the old checkpoint, and remove one that is not whole."""
    leftovers = [path for path in folder.parent.glob(f".{folder.name}.*") if PARTIAL.fullmatch(path.name)]
    for path in sorted(path for path in leftovers if path.is_dir() and not path.is_symlink()):
        if path.suffix == ".partial":
            _remove(path)
        elif folder.exists():
            _put_back(path, folder)
        else:
            os.replace(path, folder)  # the save was interrupted between its two renames


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint's two files, and its folder where nothing else is in it."""
    for name in (STATE_FILE, TENSORS_FILE):
        (checkpoint / name).unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()


def _put_back(old: Path, folder: Path) -> None:
    """Remove the old checkpoint, and move everything else in its folder to the same place in the new one."""
    for path in old.iterdir():
        if path.name not in (STATE_FILE, TENSORS_FILE) and not os.path.lexists(folder / path.name):
            os.rename(path, folder / path.name)
    _remove(old)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names begin with the prefix, and take it off."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
