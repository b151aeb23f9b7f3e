"""torchvision's detectors: backbone, neck and heads are pruned, and the postprocessing of boxes is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawada.adapters.graph import Declaration, GraphAdapter, Trace
from hawada.core.gates import Student
from hawada.core.task import AnyOutputs, Scores, Task

POOLED, POOLED_FOR_MASKS = 7, 14  # pixels of the regions that second-stage heads take
NO_OBJECT = -1  # the class of rows that fill up the boxes of an image
MATCHED_AT = 0.5  # intersection over union
Run = Callable[[nn.Module, Tensor], Any]


class DetectorAdapter(GraphAdapter):
    """SSD, RetinaNet, FCOS, Faster R-CNN and the models built on it, as torchvision builds them.

    The number of boxes depends on the image, so what is followed, compared and distilled are the raw outputs of the
    heads; those of a second stage are computed on the whole image in place of proposals. What is timed is the whole
    call. Images are (batch, 3, height, width), scaled to [0, 1]; the model normalises and resizes them.

    Args:
        arch: The name of a detector in torchvision (`ssdlite320_mobilenet_v3_large`).
        factory: See `GraphAdapter`; the function returns a detector of one of these classes.
        arguments: See `GraphAdapter`.
        num_classes: The number of classes; 0 is the background.
        image_size: See `GraphAdapter`.
        weights: The name of torchvision's weights (`COCO_V1`), or None.
        path: See `GraphAdapter`.
        stream: See `GraphAdapter`.
    """

    def __init__(
        self,
        arch: str | None = None,
        factory: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        image_size: int | list[int] | None = None,
        weights: str | None = None,
        path: str | None = None,
        stream: bool = False,
    ) -> None:
        super().__init__(
            arch,
            factory,
            arguments,
            num_classes=num_classes,
            image_size=320 if image_size is None else image_size,
            weights=weights,
            path=path,
            stream=stream,
        )

    def raw(self, model: nn.Module) -> nn.Module:
        shallow = copy.copy(model)
        if isinstance(model, Student):
            shallow._modules = dict(model._modules)  # a shallow copy would share them
            shallow._modules["model"] = self.raw(model.model)
        else:
            object.__setattr__(shallow, "forward", MethodType(_raw_forward(model), shallow))
        return shallow

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the model does that itself

    def _declaration_of(self, model: nn.Module) -> tuple[Trace, Declaration]:
        return super()._declaration_of(self.raw(model))


class Detection(AnyOutputs):
    """Object detection, scored by the mean average precision at an intersection over union of 0.5.

    Test labels are (batch, boxes, 5): left, top, right and bottom in pixels and the class, rows of -1 where an image
    has fewer boxes. Labels are not learned.
    """

    def metric(self, of_data: str, labelled: bool) -> str:
        return "map_50" if labelled else "agreement"

    def qualities(self, metric: str, teacher: Scores, slim: Scores) -> tuple[float, float]:
        return Task.qualities(self, metric, teacher, slim)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[Any], pick: Callable[[Any], Tensor]) -> Scores:
        """See `Task.score`.

        Raises:
            ValueError: torchmetrics is not installed.
        """
        try:
            from torchmetrics.detection import MeanAveragePrecision  # an optional package
        except ImportError as error:
            raise ValueError(
                f"task: the mean average precision needs torchmetrics and pycocotools ({error}); "
                "pip install 'hawada[detection]'"
            ) from None
        measured = MeanAveragePrecision(iou_thresholds=[MATCHED_AT])
        rows, labelled = [], False
        weight = next(model.parameters())
        for images, *rest in batches:
            found = model(images.to(weight))
            rows.append(_box_rows(found))
            if rest:
                labelled = True
                predicted = [{name: boxes[name].cpu() for name in ("boxes", "scores", "labels")} for boxes in found]
                measured.update(predicted, [_target_of(boxes) for boxes in rest[0].cpu()])
        figures = {"map_50": float(measured.compute()["map_50"])} if labelled else {}
        return Scores(nn.utils.rnn.pad_sequence([row for part in rows for row in part], True), figures)

    def agreement(self, teacher: Scores, slim: Scores) -> float:
        """The share of the teacher's boxes with a score above one half that the slim model has too."""
        found = [_matched(*pair) for pair in zip(teacher.predicted, slim.predicted, strict=True)]
        total = sum(count for _, count in found)
        return sum(matched for matched, _ in found) / total if total else 1.0


def _raw_forward(model: nn.Module) -> Run:
    """The function that computes the raw outputs of a detector's heads.

    Raises:
        ValueError: The model is no detector of torchvision's.
    """
    if hasattr(model, "backbone") and hasattr(model, "roi_heads"):
        return _two_stages
    if hasattr(model, "backbone") and hasattr(model, "head"):
        return _one_stage
    raise ValueError(f"{type(model).__name__} is no detector of torchvision's; is model.adapter the right one?")


def _one_stage(self: Any, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = self.head(list(_features(self, images).values()))
    return found


def _two_stages(self: Any, images: Tensor) -> dict[str, Any]:
    features = _features(self, images)
    objectness, deltas = self.rpn.head(list(features.values()))
    region, heads = next(iter(features.values())), self.roi_heads
    classes, boxes = heads.box_predictor(heads.box_head(F.adaptive_avg_pool2d(region, POOLED)))
    found: dict[str, Any] = {"objectness": objectness, "deltas": deltas, "classes": classes, "boxes": boxes}
    for kind in ("mask", "keypoint"):
        head = getattr(heads, f"{kind}_head", None)
        if head is not None:
            found[kind] = getattr(heads, f"{kind}_predictor")(head(F.adaptive_avg_pool2d(region, POOLED_FOR_MASKS)))
    return found


def _features(model: Any, images: Tensor) -> dict[str, Tensor]:
    features = model.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else features


def _target_of(boxes: Tensor) -> dict[str, Tensor]:
    real = boxes[boxes[:, 4] != NO_OBJECT]
    return {"boxes": real[:, :4].float(), "labels": real[:, 4].long()}


def _box_rows(found: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """The boxes of each image, (boxes, 6): corners, class and score."""
    return [
        torch.cat([image["boxes"], image["labels"][:, None].float(), image["scores"][:, None]], 1).float().cpu()
        for image in found
    ]


def _matched(teacher: Tensor, slim: Tensor) -> tuple[int, int]:
    """How many of the teacher's confident boxes the slim model has, and how many there are."""
    from torchvision.ops import box_iou

    confident = teacher[teacher[:, 5] > MATCHED_AT]
    given = slim[slim[:, 5] > MATCHED_AT / 2]
    if not len(confident) or not len(given):
        return 0, len(confident)
    same = (confident[:, None, 4] == given[None, :, 4]) & (box_iou(confident[:, :4], given[:, :4]) >= MATCHED_AT)
    return int(same.any(1).sum()), len(confident)
