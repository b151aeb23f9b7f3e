"""torchvision's ResNets with BasicBlock or Bottleneck: inner channels, residual branches and, on request, streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hawada.adapters.base import Shape
from hawada.adapters.block_states import BlockStates
from hawada.adapters.torchvision.weights import Source
from hawada.core.structure import Cut, GatePoint, Group, Removal, Site

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNetAdapter(BlockStates):
    """He et al., Deep Residual Learning for Image Recognition, 2015, as torchvision builds it.

    Args:
        arch: a torchvision ResNet (`resnet18` … `wide_resnet101_2`), or `basic` / `bottleneck` for torchvision's
            ResNet class with the given `layers`.
        layers: blocks per stage, four numbers; only for `basic` and `bottleneck`.
        num_classes: size of the classifier.
        image_size: side of the square input whose latency is optimised, in pixels.
        weights: name of torchvision weights (`IMAGENET1K_V1`), or None.
        path: local weights instead: a `.safetensors` state dict, or a folder that this program saved.
        stream: the residual stream of each stage may become narrower.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        layers: Sequence[int] | None = None,
        num_classes: int = 1000,
        image_size: int = 224,
        weights: str | None = None,
        path: str | None = None,
        stream: bool = False,
    ) -> None:
        if (arch in BLOCKS) != (layers is not None):
            raise ValueError(
                f"model.adapter: arch={arch} with layers={layers}; layers go with basic or bottleneck only"
            )
        if arch not in BLOCKS and arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"model.adapter.arch: torchvision has no model {arch!r}; resnet18 is one")
        self.arch, self.layers, self.num_classes = arch, layers, num_classes
        self.image_size, self.weights, self.path = image_size, weights, path
        self.with_stream = stream

    def skeleton(self) -> nn.Module:
        if self.layers is not None:
            return ResNet(BLOCKS[self.arch], list(self.layers), num_classes=self.num_classes).eval()
        return torchvision.models.get_model(self.arch, weights=None, num_classes=self.num_classes).eval()

    def check_teacher(self) -> None:
        self._source().check()

    def teacher(self) -> nn.Module:
        return self._source().fill(self.skeleton, str(self.num_classes))

    def _source(self) -> Source:
        return Source(self.arch, self.weights, self.path, named=self.arch not in BLOCKS)

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
        return groups + [_stream_group(model, stream) for stream in self._streams(model)]

    def sites(self, model: nn.Module) -> list[Site]:
        streams, inner = self._streams(model), {path: _inner_names(path, block) for path, block in _blocks(model)}
        stem = next((stream.name for stream in streams if "conv1" in stream.writers), None)
        sites = []
        if stem is not None:  # its convolution writes the stream, what comes before the blocks passes it on
            passing = [Site(path, (stem,), "stem", stem, reads_dim=1) for path in ("bn1", "relu", "maxpool")]
            sites += [Site("conv1", (stem,), "stem"), *passing]
        for path, _ in _residuals(model):
            groups = (*inner.get(path, ()), *(stream.name for stream in streams if stream.touches(path)))
            reads = next((stream.name for stream in streams if stream.read_in(path)), None)
            if reads is not None:
                sites.append(Site(path, groups, path.partition(".")[0], reads, reads_dim=1))
            elif groups:
                sites.append(Site(path, groups, path.partition(".")[0]))
        last = [stream.name for stream in streams[-1:]]
        return sites + [Site(path, (name,), "head", name, reads_dim=1) for name in last for path in ("avgpool", "fc")]

    def _streams(self, model: nn.Module) -> list[_Stream]:
        return _streams(model) if self.with_stream else []

    def example_inputs(self, shape: Shape) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(shape.batch, 3, self.image_size, self.image_size, generator=generator, device="cpu"),)


def _residuals(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Residual blocks in order of execution, and the projections that are left where a branch was removed."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BasicBlock | Bottleneck)
        or (isinstance(module, nn.Sequential) and hasattr(module, "downsample"))
    ]


def _blocks(model: nn.Module) -> list[tuple[str, BasicBlock | Bottleneck]]:
    """Residual blocks in order of execution; blocks whose branch was already removed have nothing left to declare."""
    blocks = [(path, module) for path, module in _residuals(model) if isinstance(module, BasicBlock | Bottleneck)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no torchvision residual block; is model.adapter the right one?")
    return blocks


def _inner_convs(path: str, block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    """Convolutions whose outputs stay inside the block."""
    convs = [block.conv1, block.conv2] if isinstance(block, Bottleneck) else [block.conv1]
    if any(conv.groups != 1 for conv in convs):
        raise ValueError(f"{path}: grouped convolutions (ResNeXt) are not supported by this adapter")
    return convs


def _inner_names(path: str, block: BasicBlock | Bottleneck) -> tuple[str, ...]:
    """The groups inside a block."""
    return (f"{path}.branch", *(f"{path}.conv{index + 1}" for index in range(len(_inner_convs(path, block)))))


def _inner_group(path: str, index: int, channels: int) -> Group:
    """Output channels of conv<index>: its filters, the norm behind it and the next convolution's input."""
    reader = f"{path}.conv{index + 1}"
    return Group(
        name=f"{path}.conv{index}",
        kind="channel",
        units=channels,
        gated_at=(GatePoint(reader, side="input"),),
        cuts=(*_written(f"{path}.conv{index}", f"{path}.bn{index}"), _read(reader)),
        parent=f"{path}.branch",
    )


def _written(conv: str, norm: str) -> tuple[Cut, ...]:
    """The filters of a convolution and the norm behind it."""
    return (
        Cut(f"{conv}.weight", 0, follows="out_channels"),
        *(Cut(f"{norm}.{name}", 0) for name in ("weight", "bias", "running_mean")),
        Cut(f"{norm}.running_var", 0, follows="num_features"),
    )


def _read(reader: str) -> Cut:
    """The input channels of a convolution, or those of the classifier."""
    return Cut(f"{reader}.weight", 1, follows="in_features" if reader == "fc" else "in_channels")


@dataclass(frozen=True)
class _Stream:
    """The channels that all blocks of a stage add into.

    Attributes:
        name: of its group.
        writers: the convolutions whose output joins it, each with the norm behind it.
        readers: the convolutions, or the classifier, that it goes into.
    """

    name: str
    writers: dict[str, str]
    readers: list[str]

    def read_in(self, path: str) -> bool:
        """Whether the module at `path` is a reader or holds one."""
        return any(f"{reader}.".startswith(f"{path}.") for reader in self.readers)

    def touches(self, path: str) -> bool:
        """Whether the module at `path` is a reader or writer or holds one."""
        return self.read_in(path) or any(f"{writer}.".startswith(f"{path}.") for writer in self.writers)


def _streams(model: nn.Module) -> list[_Stream]:
    """The stream of each stage; a projection begins a new one, and without a projection the stem's goes on."""
    residuals = _residuals(model)
    streams = [_Stream("layer1.stream", {"conv1": "bn1"}, [])]
    for path, residual in residuals:
        if isinstance(residual, BasicBlock | Bottleneck):
            streams[-1].readers.append(f"{path}.conv1")
        if residual.downsample is not None:
            down, stage = f"{path}.downsample", path.partition(".")[0]
            streams[-1].readers.append(f"{down}.0")
            streams.append(_Stream(f"{stage}.stream", {f"{down}.0": f"{down}.1"}, []))
        if isinstance(residual, BasicBlock | Bottleneck):
            last = len(_inner_convs(path, residual)) + 1
            streams[-1].writers[f"{path}.conv{last}"] = f"{path}.bn{last}"
    streams[-1].readers.append("fc")
    return streams if residuals[0][1].downsample is None else streams[1:]  # a stem of its own is no stage


def _stream_group(model: nn.Module, stream: _Stream) -> Group:
    """Gated behind the norm of every writer: sums, ReLUs and pooling pass a factor that is not negative on."""
    written = [cut for conv, norm in stream.writers.items() for cut in _written(conv, norm)]
    return Group(
        name=stream.name,
        kind="stream",
        units=model.get_parameter(written[0].tensor).shape[0],
        gated_at=tuple(GatePoint(norm) for norm in stream.writers.values()),
        cuts=(*written, *(_read(reader) for reader in stream.readers)),
    )
