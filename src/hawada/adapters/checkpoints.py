"""State dicts as people have them: safetensors or torch's own files, nested, with the prefixes that wrappers add."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# The keys that training scripts save a model's state dict under, in the order in which they are looked for.
NESTED_UNDER = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params"),
    *("model_ema", "ema"),
)
COMPILED = re.compile(r"(?:^|(?<=\.))_orig_mod\.")
PARALLEL = "module."  # of DataParallel and DistributedDataParallel
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def check_readable(path: Path) -> None:
    """Check that a file is one that `read_checkpoint` reads; of a safetensors file only the header is read.

    Raises:
        ValueError: The file is neither a safetensors file nor one of torch's.
    """
    if path.suffix in TORCH_SUFFIXES:
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise _unreadable(path, str(error)) from None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file, on the CPU. Nothing is unpickled but tensors and plain containers.

    Args:
        path: A `.safetensors` file, or one that `torch.save` wrote of a state dict or of a dictionary that holds one.

    Raises:
        ValueError: The file cannot be read, or holds no state dict.
    """
    if path.suffix not in TORCH_SUFFIXES:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _unreadable(path, str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it says of TorchScript is said below
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"model.adapter.path: {path} holds more than tensors, such as a whole model, and is not unpickled; "
            "where it was made, save model.state_dict() with torch.save or safetensors.torch.save_file and name that"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"model.adapter.path: {path} is a TorchScript program; save state_dict() of the module that it was "
                "made of with torch.save or safetensors.torch.save_file and name that"
            ) from None
        raise _unreadable(path, str(error)) from None
    state = _find_state_dict(held)
    if state is None:
        keys = f" with the keys {', '.join(map(str, list(held)[:8]))}" if isinstance(held, Mapping) else ""
        raise ValueError(
            f"model.adapter.path: {path} holds no state dict but a {type(held).__name__}{keys}; save "
            "model.state_dict() with torch.save or safetensors.torch.save_file and name that"
        )
    return state


def without_prefixes(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Take off the prefixes that wrappers add to the names of a state dict.

    These are `module.` and `_orig_mod.`, and any other (`model.`, `backbone.`) below which all expected names are.

    Args:
        state: The state dict.
        expected: The names that the model has.

    Raises:
        ValueError: There are all expected names below several prefixes, such as those of a model and of its average.
    """
    if set(expected) <= set(state):
        return dict(state)
    plain = {COMPILED.sub("", name): tensor for name, tensor in state.items() if name != COUNTER}
    while not set(expected) <= set(plain) and plain and all(name.startswith(PARALLEL) for name in plain):
        plain = {name.removeprefix(PARALLEL): tensor for name, tensor in plain.items()}
    if set(expected) <= set(plain):
        return plain
    prefixes = sorted({name.partition(".")[0] + "." for name in plain if "." in name})
    below = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
        for prefix in prefixes
    }
    fitting = [prefix for prefix in prefixes if set(expected) <= set(below[prefix])]
    if len(fitting) > 1:
        raise ValueError(
            f"model.adapter.path: the file holds the weights of several models, below {', '.join(fitting)}; save those "
            "of one alone and name that file"
        )
    return below[fitting[0]] if fitting else plain


def _find_state_dict(held: Any) -> dict[str, Tensor] | None:
    """Find the state dict in what a file holds; None where there is none."""
    if not isinstance(held, Mapping):
        return None
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    for key in NESTED_UNDER:
        if isinstance(held.get(key), Mapping) and (inner := _find_state_dict(held[key])):
            return inner
    return tensors or None


def _unreadable(path: Path, reason: str) -> ValueError:
    kind = "file that torch.save wrote" if path.suffix in TORCH_SUFFIXES else "safetensors file"
    return ValueError(
        f"model.adapter.path: {path} is not a {kind} ({reason.splitlines()[0]}); save a state dict with "
        "safetensors.torch.save_file and name that"
    )
