"""torchvision's ResNets with BasicBlock or Bottleneck: inner channels of every block, and whole residual branches."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hawada.adapters.base import MANIFEST, Adapter, Shape, load_model
from hawada.core.structure import Cut, GatePoint, Group, Removal, Site

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNetAdapter(Adapter):
    """He et al., Deep Residual Learning for Image Recognition, 2015, as torchvision builds it.

    Args:
        arch: a torchvision ResNet (`resnet18` … `wide_resnet101_2`), or `basic` / `bottleneck` for torchvision's
            ResNet class with the given `layers`.
        layers: blocks per stage, four numbers; only for `basic` and `bottleneck`.
        num_classes: size of the classifier.
        image_size: side of the square input whose latency is optimised, in pixels.
        weights: name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: local weights instead: a `.safetensors` state dict, or a folder that this program saved.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        layers: Sequence[int] | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        weights: str | None = None,
        path: str | None = None,
    ) -> None:
        if (arch in BLOCKS) != (layers is not None):
            raise ValueError(
                f"model.adapter: arch={arch} with layers={layers}; layers go with basic or bottleneck only"
            )
        if arch not in BLOCKS and arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; resnet18 is one")
        self.arch, self.layers, self.num_classes = arch, layers, num_classes
        self.image_size, self.weights, self.path = image_size, weights, path

    def skeleton(self) -> nn.Module:
        if self.layers is not None:
            return ResNet(BLOCKS[self.arch], list(self.layers), num_classes=self.num_classes).eval()
        return torchvision.models.get_model(self.arch, weights=None, num_classes=self.num_classes).eval()

    def check_teacher(self) -> None:
        if self.path is not None:
            path = Path(self.path)
            if not path.is_file() and not (path / MANIFEST).is_file():
                raise ValueError(
                    f"model.adapter.path: {path} is neither a .safetensors file nor a folder that a run saved"
                )
            return
        url = self._weights().url
        if (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            return
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()  # honours proxies
        except OSError as error:
            raise self._unreachable(error) from None

    def teacher(self) -> nn.Module:
        if self.path is not None:
            return self._from_path(Path(self.path))
        try:
            state = self._weights().get_state_dict(progress=False, check_hash=True, weights_only=True)
        except OSError as error:
            raise self._unreachable(error) from None
        except RuntimeError as error:
            raise ValueError(f"model.adapter.weights: {error}; set model.adapter.path to a local file") from None
        return self._filled(state, f"model.adapter.weights: {self.weights}")

    def _weights(self) -> WeightsEnum:
        """torchvision's entry for the named weights."""
        if self.weights is None or self.arch in BLOCKS:
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

    def _from_path(self, path: Path) -> nn.Module:
        self.check_teacher()
        try:
            state = load_model(path).state_dict() if path.is_dir() else load_file(path)
        except SafetensorError as error:
            raise ValueError(f"model.adapter.path: {path} is not a safetensors file ({error})") from None
        return self._filled(state, f"model.adapter.path: {path}")

    def _filled(self, state: Mapping[str, Tensor], source: str) -> nn.Module:
        """The architecture with these tensors, every one of which must fit."""
        model = self.skeleton()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ValueError(f"{source} does not fit {self.arch} with {self.num_classes} classes: {first}") from None
        return model

    def groups(self, model: nn.Module) -> list[Group]:
        groups: list[Group] = []
        for path, block in _blocks(model):
            convs = _inner_convs(path, block)
            last = f"{path}.bn{len(convs) + 1}"
            keeps = ("downsample", "relu") if block.downsample is not None else ()
            # A block's input is never negative (it follows a ReLU), so without its branch relu(x) = x.
            groups.append(
                Group(
                    name=f"{path}.branch",
                    kind="branch",
                    units=1,
                    gated_at=(GatePoint(last),),
                    removes=(Removal(path, keeps),),
                )
            )
            for index, conv in enumerate(convs, start=1):
                groups.append(_inner_group(path, index, conv.out_channels))
        return groups

    def sites(self, model: nn.Module) -> list[Site]:
        return [
            Site(
                module=path,
                groups=(f"{path}.branch", *(f"{path}.conv{i + 1}" for i in range(len(_inner_convs(path, block))))),
                kind=path.partition(".")[0],
            )
            for path, block in _blocks(model)
        ]

    def example_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(shape.batch, 3, self.image_size, self.image_size, generator=generator, device="cpu"),)


def _blocks(model: nn.Module) -> list[tuple[str, BasicBlock | Bottleneck]]:
    """Residual blocks in order of execution; blocks whose branch was already removed have nothing left to declare."""
    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, BasicBlock | Bottleneck)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no torchvision residual block; is model.adapter the right one?")
    return blocks


def _inner_convs(path: str, block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    """Convolutions whose outputs stay inside the block."""
    convs = [block.conv1, block.conv2] if isinstance(block, Bottleneck) else [block.conv1]
    if any(conv.groups != 1 for conv in convs):
        raise ValueError(f"{path}: grouped convolutions (ResNeXt) are not supported by this adapter")
    return convs


def _inner_group(path: str, index: int, channels: int) -> Group:
    """Output channels of conv<index>: its filters, the norm behind it and the next convolution's input."""
    norm = f"{path}.bn{index}"
    return Group(
        name=f"{path}.conv{index}",
        kind="channel",
        units=channels,
        gated_at=(GatePoint(f"{path}.conv{index + 1}", side="input"),),
        cuts=(
            Cut(f"{path}.conv{index}.weight", 0, follows="out_channels"),
            *(Cut(f"{norm}.{name}", 0) for name in ("weight", "bias", "running_mean")),
            Cut(f"{norm}.running_var", 0, follows="num_features"),
            Cut(f"{path}.conv{index + 1}.weight", 1, follows="in_channels"),
        ),
        parent=f"{path}.branch",
    )
