"""The groups and sites of torchvision's ResNets, written down by hand: the graph adapter must find the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from hawada.core.structure import Cut, GatePoint, Group, Removal, Site


def groups_by_hand(model: nn.Module, *, stream: bool) -> list[Group]:
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
    return groups + [_stream_group(model, each) for each in (_streams(model) if stream else [])]


def sites_by_hand(model: nn.Module, *, stream: bool) -> list[Site]:
    streams = _streams(model) if stream else []
    inner = {path: _inner_names(path, block) for path, block in _blocks(model)}
    stem = next((each.name for each in streams if "conv1" in each.producers), None)
    sites = []
    if stem is not None:  # its convolution produces the stream; the modules up to the blocks pass it on
        passing = [Site(path, (stem,), "stem", stem, reads_dim=1) for path in ("bn1", "relu", "maxpool")]
        sites += [Site("conv1", (stem,), "stem"), *passing]
    for path, _ in _residuals(model):
        groups = (*inner.get(path, ()), *(each.name for each in streams if each.touches(path)))
        reads = next((each.name for each in streams if each.consumed_in(path)), None)
        if reads is not None:
            sites.append(Site(path, groups, path.partition(".")[0], reads, reads_dim=1))
        elif groups:
            sites.append(Site(path, groups, path.partition(".")[0]))
    last = [each.name for each in streams[-1:]]
    return sites + [Site(path, (name,), "head", name, reads_dim=1) for name in last for path in ("avgpool", "fc")]


def _residuals(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the residual blocks in order of execution, and the projections that stay where a branch went."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, BasicBlock | Bottleneck)
        or (isinstance(module, nn.Sequential) and hasattr(module, "downsample"))
    ]


def _blocks(model: nn.Module) -> list[tuple[str, BasicBlock | Bottleneck]]:
    """List the residual blocks in order of execution; those without their branch have nothing left to declare."""
    blocks = [(path, module) for path, module in _residuals(model) if isinstance(module, BasicBlock | Bottleneck)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no torchvision residual block; is model.adapter the right one?")
    return blocks


def _inner_convs(path: str, block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    """List the convolutions whose outputs stay inside the block."""
    return [block.conv1, block.conv2] if isinstance(block, Bottleneck) else [block.conv1]


def _inner_names(path: str, block: BasicBlock | Bottleneck) -> tuple[str, ...]:
    """Name the groups inside a block."""
    return (f"{path}.branch", *(f"{path}.conv{index + 1}" for index in range(len(_inner_convs(path, block)))))


def _inner_group(path: str, index: int, channels: int) -> Group:
    """Declare the output channels of conv<index>: its filters, the norm behind it and the next convolution's input."""
    consumer = f"{path}.conv{index + 1}"
    return Group(
        name=f"{path}.conv{index}",
        kind="channel",
        units=channels,
        gated_at=(GatePoint(consumer, side="input"),),
        cuts=(*_produced(f"{path}.conv{index}", f"{path}.bn{index}"), _consumed(consumer)),
        parent=f"{path}.branch",
    )


def _produced(conv: str, norm: str) -> tuple[Cut, ...]:
    """Cut the filters of a convolution and the norm behind it."""
    return (
        Cut(f"{conv}.weight", 0, follows="out_channels"),
        Cut(f"{norm}.weight", 0, follows="num_features"),
        *(Cut(f"{norm}.{name}", 0) for name in ("bias", "running_mean", "running_var")),
    )


def _consumed(consumer: str) -> Cut:
    """Cut the input channels of a convolution, or those of the classifier."""
    return Cut(f"{consumer}.weight", 1, follows="in_features" if consumer == "fc" else "in_channels")


@dataclass(frozen=True)
class _Stream:
    """The channels that all blocks of a stage add into.

    Attributes:
        name: The name of its group.
        producers: The convolutions whose output joins it, each with the norm behind it.
        consumers: The convolutions, or the classifier, that it goes into.
    """

    name: str
    producers: dict[str, str]
    consumers: list[str]

    def consumed_in(self, path: str) -> bool:
        """Return whether the module at `path` is a consumer or holds one."""
        return any(f"{consumer}.".startswith(f"{path}.") for consumer in self.consumers)

    def touches(self, path: str) -> bool:
        """Return whether the module at `path` is a consumer or producer or holds one."""
        return self.consumed_in(path) or any(f"{producer}.".startswith(f"{path}.") for producer in self.producers)


def _streams(model: nn.Module) -> list[_Stream]:
    """List the stream of each stage; a projection begins a new one, and without a projection the stem's goes on."""
    residuals = _residuals(model)
    streams = [_Stream("layer1.stream", {"conv1": "bn1"}, [])]
    for path, residual in residuals:
        if isinstance(residual, BasicBlock | Bottleneck):
            streams[-1].consumers.append(f"{path}.conv1")
        if residual.downsample is not None:
            down, stage = f"{path}.downsample", path.partition(".")[0]
            streams[-1].consumers.append(f"{down}.0")
            streams.append(_Stream(f"{stage}.stream", {f"{down}.0": f"{down}.1"}, []))
        if isinstance(residual, BasicBlock | Bottleneck):
            last = len(_inner_convs(path, residual)) + 1
            streams[-1].producers[f"{path}.conv{last}"] = f"{path}.bn{last}"
    streams[-1].consumers.append("fc")
    if residuals[0][1].downsample is not None:  # a stem of its own is no stage
        streams[0] = replace(streams[0], name="conv1.stream")
    return streams


def _stream_group(model: nn.Module, stream: _Stream) -> Group:
    """Gate the stream before everything that consumes it."""
    produced = [cut for conv, norm in stream.producers.items() for cut in _produced(conv, norm)]
    return Group(
        name=stream.name,
        kind="stream",
        units=model.get_parameter(produced[0].tensor).shape[0],
        gated_at=tuple(GatePoint(consumer, "input") for consumer in stream.consumers),
        cuts=(*produced, *(_consumed(consumer) for consumer in stream.consumers)),
    )
