"""Networks of timm, with its weights from the Hub or from a local file, its normalisation and its image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hawada.adapters.graph import GraphAdapter
from hawada.adapters.huggingface import hub
from hawada.adapters.weights import WeightsSource

LOADING = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")  # arguments that fetch weights


class TimmAdapter(GraphAdapter):
    """A network of timm's (Wightman, PyTorch Image Models).

    Args:
        arch: The name of the model (`mobilenetv3_small_100`), with a tag for certain weights
            (`vit_tiny_patch16_224.augreg_in21k`).
        arguments: Plain keyword arguments of timm's builder.
        num_classes: The number of classes; None stands for that of the weights.
        image_size: See `GraphAdapter`; None stands for the size that the weights were trained on.
        path: Local weights instead of those on the Hub; see `GraphAdapter`.
        stream: See `GraphAdapter`.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """

    imports = ()

    def __init__(
        self,
        arch: str,
        arguments: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int | Sequence[int] | None = None,
        path: str | None = None,
        stream: bool = False,
    ) -> None:
        timm = import_timm()
        loading = [name for name in LOADING if name in (arguments or {})]
        if loading:
            raise ValueError(
                f"model.adapter.arguments.{loading[0]}: the weights are loaded elsewhere; set model.path to local ones"
            )
        if not timm.is_model(arch):
            similar = timm.list_models(f"*{arch.partition('.')[0]}*")[:3]
            hint = f"; {', '.join(similar)} are some" if similar else "; timm.list_models() lists them"
            raise ValueError(f"model.adapter.arch: timm has no model {arch!r}{hint}")
        self.cfg = timm.get_pretrained_cfg(arch)
        channels, *size = self.cfg.input_size
        super().__init__(
            factory=f"timm.{arch}",
            arguments=arguments,
            num_classes=num_classes,
            image_size=(size[0] if len(set(size)) == 1 else size) if image_size is None else image_size,
            channels=channels,
            path=path,
            stream=stream,
        )
        self.model_name = arch

    def check_teacher(self) -> None:
        if self.path is not None:
            self._weights_source().check(self.skeleton)
            return
        if self.cfg.hf_hub_id is None:
            raise ValueError(f"model.adapter.arch: timm has no weights for {self.model_name}; set model.path to yours")
        if self.num_classes not in (None, self.cfg.num_classes):
            raise ValueError(
                f"model.adapter.num_classes: the weights of {self.model_name} know {self.cfg.num_classes} classes and "
                f"not {self.num_classes}; leave it out, or set model.path to weights of your own"
            )
        hub.check_source(self.cfg.hf_hub_id)

    def teacher(self) -> nn.Module:
        if self.path is not None:
            return self._weights_source().fill(self.skeleton)
        self.check_teacher()
        weights = hub.fetch(self.cfg.hf_hub_id) / "model.safetensors"
        with torch.device("cpu"):
            return self._create(pretrained=True, pretrained_cfg_overlay={"file": str(weights)}).eval()

    def loads_with(self, path: str, model: nn.Module) -> str:
        return f"import hawada\n\nmodel = hawada.load({path!r})"

    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        return tuple(self.cfg.mean), tuple(self.cfg.std)

    def _weights_source(self) -> WeightsSource:
        return WeightsSource(self.model_name, None, self.path, named=False, classes=self.num_classes)

    def _build_model(self, *, with_weights: bool = False) -> nn.Module:
        return self._create().eval()

    def _create(self, **options: Any) -> nn.Module:
        timm = import_timm()
        arguments = dict(self.arguments)
        if self.num_classes is not None:
            arguments["num_classes"] = self.num_classes
        size = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        if self.cfg.fixed_input_size and size != list(self.cfg.input_size[1:]):
            arguments.setdefault("img_size", size)
        model: nn.Module = timm.create_model(self.model_name, **arguments, **options)
        return model


def import_timm() -> Any:
    """Import timm, an optional package.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("model: timm is not installed; pip install 'hawada[timm]'") from None
    return timm
