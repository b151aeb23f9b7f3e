"""Pretrained weights of torchvision's models: from its downloads, a local file or a folder that this program saved."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from hawada.adapters.base import MANIFEST
from hawada.adapters.checkpoints import check_readable, read_checkpoint, without_prefixes
from hawada.adapters.saved import load_model
from hawada.core.structure import all_tensors

# GoogLeNet, Inception and networks for segmentation have further classifiers, which only training needs.
AUXILIARY_CLASSIFIER = re.compile(r"^(aux1|aux2|AuxLogits|aux_classifier)\.")
# Checkpoints of DenseNets were written with names that torch no longer allows: norm.1 for norm1.
OLD_DENSENET_NAME = re.compile(
    r"(?<=\.)(norm|conv)\.(\d)(?=\.(weight|bias|running_mean|running_var|num_batches_tracked)$)"
)

MAX_REASON = 300  # characters of what torch tells about weights that do not fit


@dataclass(frozen=True)
class WeightsSource:
    """The place that a teacher's weights come from.

    Attributes:
        arch: The architecture that is filled, as messages name it; a torchvision model where `weights` are given.
        weights: The name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: Local weights to use instead: a state dict in a `.safetensors` file or one of torch's, or a folder that
            this program saved.
        named: Whether torchvision has weights for `arch`.
        classes: The number of classes, as messages name it; None where the architecture has one of its own.
    """

    arch: str
    weights: str | None
    path: str | None
    named: bool = True
    classes: int | None = None

    def check(self, skeleton: Callable[[], nn.Module] | None = None) -> None:
        """Check quickly that the weights will be found, and that those of a local file fit.

        Args:
            skeleton: The function that builds the architecture, where a file's names and shapes are to be compared.

        Raises:
            ValueError: The weights will not be found, and the message names the local-path option; or they do not fit.
        """
        if self.path is not None:
            path = Path(self.path)
            if not path.is_file() and not (path / MANIFEST).is_file():
                raise ValueError(
                    f"model.adapter.path: {path} is neither a file of weights nor a folder that a run saved"
                )
            if path.is_file():
                check_readable(path)
                if skeleton is not None:
                    with torch.device("meta"):
                        model = skeleton()
                    self._fit(model, {name: tensor.to("meta") for name, tensor in read_checkpoint(path).items()})
            return
        url = self._entry().url
        if (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            return
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()  # honours proxies
        except OSError as error:
            raise self._unreachable(error) from None

    def fill(self, skeleton: Callable[[], nn.Module], trust: tuple[str, ...] = ()) -> nn.Module:
        """Build the architecture and fill it with these weights, every one of which must fit.

        Args:
            skeleton: The function that builds the architecture.
            trust: The package prefixes whose code a saved folder may import.

        Raises:
            ValueError: The weights are not found, cannot be downloaded or do not fit.
        """
        if self.path is not None:
            self.check()
            state = self._read_local(Path(self.path), trust)
        else:
            state = self._download()
        model = skeleton()
        self._fit(model, state)
        return model

    def _fit(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Give a model its weights.

        Raises:
            ValueError: Some have no place, are missing or have another shape; the first of them is named.
        """
        place = f"weights: {self.weights}" if self.path is None else f"path: {self.path}"
        own = model.state_dict().keys()
        state = without_prefixes(state, own)
        state = {name: x for name, x in state.items() if name in own or not AUXILIARY_CLASSIFIER.match(name)}
        first: dict[int, str] = {}  # a tensor with several names may have been saved under one of them
        for name, tensor in all_tensors(model).items():
            held = first.setdefault(id(tensor), name)
            state |= {name: state[held]} if held in state and name not in state else {}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            found = str(error).splitlines()
            reason = shorten((found[1] if len(found) > 1 else found[0]).strip(), MAX_REASON, placeholder=" ...")
            model_name = self.arch + ("" if self.classes is None else f" with {self.classes} classes")
            raise ValueError(f"model.adapter.{place} does not fit {model_name}: {reason}") from None

    def _read_local(self, path: Path, trust: tuple[str, ...]) -> Mapping[str, Tensor]:
        return load_model(path, trust).state_dict() if path.is_dir() else read_checkpoint(path)

    def _download(self) -> Mapping[str, Tensor]:
        try:
            state = self._entry().get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise self._unreachable(error) from None
        except RuntimeError as error:
            raise ValueError(f"model.adapter.weights: {error}; set model.adapter.path to a local file") from None
        return {OLD_DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in state.items()}

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
