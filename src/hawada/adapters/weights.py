"""Pretrained weights of torchvision's models: from its downloads, a local file or a folder that this program saved."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from hawada.adapters.saved import MANIFEST, load_model

# GoogLeNet and Inception have further classifiers, which run in training only.
AUXILIARY_CLASSIFIER = re.compile(r"^(aux1|aux2|AuxLogits)\.")
# Checkpoints of DenseNets were written with names that torch no longer allows: norm.1 for norm1.
OLD_DENSENET_NAME = re.compile(
    r"(?<=\.)(norm|conv)\.(\d)(?=\.(weight|bias|running_mean|running_var|num_batches_tracked)$)"
)


@dataclass(frozen=True)
class WeightsSource:
    """The place that a teacher's weights come from.

    Attributes:
        arch: The architecture that is filled, as messages name it; a torchvision model where `weights` are given.
        weights: The name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: Local weights to use instead, a `.safetensors` state dict or a folder that this program saved.
        named: Whether torchvision has weights for `arch`.
    """

    arch: str
    weights: str | None
    path: str | None
    named: bool = True

    def check(self) -> None:
        """Check quickly that the weights will be found; nothing is loaded.

        Raises:
            ValueError: The weights will not be found; the message names the local-path option.
        """
        if self.path is not None:
            path = Path(self.path)
            if not path.is_file() and not (path / MANIFEST).is_file():
                raise ValueError(
                    f"model.adapter.path: {path} is neither a .safetensors file nor a folder that a run saved"
                )
            if path.is_file():
                _check_readable(path)
            return
        url = self._entry().url
        if (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            return
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()  # honours proxies
        except OSError as error:
            raise self._unreachable(error) from None

    def fill(self, skeleton: Callable[[], nn.Module], classes: str, trust: tuple[str, ...] = ()) -> nn.Module:
        """Build the architecture and fill it with these weights, every one of which must fit.

        Args:
            skeleton: The function that builds the architecture.
            classes: The number of classes, as messages name it.
            trust: The package prefixes whose code a saved folder may import.

        Raises:
            ValueError: The weights are not found, cannot be downloaded or do not fit.
        """
        if self.path is not None:
            self.check()
            source, state = f"model.adapter.path: {self.path}", self._read_local(Path(self.path), trust)
        else:
            source, state = f"model.adapter.weights: {self.weights}", self._download()
        model = skeleton()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"{source} does not fit {self.arch} with {classes} classes: {first}") from None
        return model

    def _read_local(self, path: Path, trust: tuple[str, ...]) -> Mapping[str, Tensor]:
        try:
            return load_model(path, trust).state_dict() if path.is_dir() else load_file(path)
        except SafetensorError as error:
            raise _unreadable(path, error) from None

    def _download(self) -> Mapping[str, Tensor]:
        try:
            state = self._entry().get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise self._unreachable(error) from None
        except RuntimeError as error:
            raise ValueError(f"model.adapter.weights: {error}; set model.adapter.path to a local file") from None
        return {
            OLD_DENSENET_NAME.sub(r"\1\2", name): tensor
            for name, tensor in state.items()
            if not AUXILIARY_CLASSIFIER.match(name)
        }

    def _entry(self) -> WeightsEnum:
        """Find torchvision's entry for the named weights."""
        if self.weights is None or not self.named:
            raise ValueError("model.adapter: no weights and no path; set model.adapter.path or model.pretrain=true")
        try:
            return torchvision.models.get_model_weights(self.arch)[self.weights]
        except KeyError:
            raise ValueError(f"model.adapter.weights: {self.arch} has no weights {self.weights!r}") from None

    def _unreachable(self, error: OSError) -> ValueError:
        return ValueError(
            f"model.adapter.weights: {self.weights} is not in torch's cache and cannot be downloaded ({error}); "
            "connect to the network, or set model.adapter.path to a local .safetensors"
        )


def _check_readable(path: Path) -> None:
    """Read the header of a file of weights, which takes no time.

    Raises:
        ValueError: The file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(
        f"model.adapter.path: {path} is not a safetensors file ({error}); save a state dict with "
        "safetensors.torch.save_file and name that"
    )
