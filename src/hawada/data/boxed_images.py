"""Images with boxes from a COCO annotation file, for object detection."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hawada.data.photos import TRAINING, VALIDATION
from hawada.data.vision import VisionData, height_and_width

NO_OBJECT = -1.0  # fills up the boxes of an image


class BoxedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image, (3, height, width) in [0, 1], and its boxes, (most boxes, 5).

    A box is left, top, right and bottom in pixels of the resized image, and the class; rows of -1 fill up.

    Args:
        files: The images.
        boxes: Of each image, (left, top, width, height, class) in pixels of the file.
        size: The height and width that images are resized to, in pixels.
    """

    def __init__(
        self, files: Sequence[Path], boxes: Sequence[Sequence[tuple[float, ...]]], size: tuple[int, int]
    ) -> None:
        self.files, self.boxes, self.size = tuple(files), tuple(boxes), size
        self.most = max((len(of_image) for of_image in boxes), default=0)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import functional  # takes a while to import

        height, width = self.size
        with Image.open(self.files[index]) as image:
            across, down = width / image.width, height / image.height
            pixels = functional.to_tensor(image.convert("RGB").resize((width, height)))
        rows = torch.full((max(1, self.most), 5), NO_OBJECT)
        for row, (left, top, wide, high, kind) in zip(rows, self.boxes[index], strict=False):
            corners = (left * across, top * down, (left + wide) * across, (top + high) * down)
            row.copy_(torch.tensor([*corners, kind]))
        return pixels, rows


def coco(
    root: str,
    image_size: int | Sequence[int] = 320,
    workers: int = 8,
    samples: int | None = None,
    test_fraction: float = 0.2,
) -> VisionData:
    """Load images and their boxes from a COCO annotation file, or from one in train and one in val.

    The annotation file is the only `.json` in `root`, `root/annotations` or the part's folder; images lie beside it or
    in a folder `images`. The classes are the ids of the categories, of which 0 is the background's; where an id is 0,
    all are one more.

    Args:
        root: The folder.
        image_size: The side of the square that images are resized to in pixels, or its height and width.
        workers: The number of loader processes.
        samples: The number of training images, the same random ones every time; None means all.
        test_fraction: The fraction to test on, where the folder has no split of its own.

    Raises:
        ValueError: The folder does not hold images and annotations as described.
    """
    folder = Path(root)
    size = height_and_width(image_size)
    named = sorted(inner for inner in folder.iterdir() if inner.is_dir())  # COCO's own are train2017 and val2017
    parts = [
        next((inner for name in names for inner in named if inner.name.startswith(name)), None)
        for names in (TRAINING, VALIDATION)
    ]
    if parts[0] is not None and parts[1] is not None:
        (train, classes), (test, of_test) = _read(folder, parts[0]), _read(folder, parts[1])
        if of_test != classes:
            raise ValueError(
                f"data.root: {parts[1]} has other categories than {parts[0]}; give both the same list of categories"
            )
    else:
        everything, classes = _read(folder, folder)
        random.Random(0).shuffle(everything)
        tested = min(max(1, round(len(everything) * test_fraction)), len(everything) - 1)
        train, test = everything[tested:], everything[:tested]
    if samples is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        train = [train[index] for index in order]
    made = [BoxedImages([file for file, _ in part], [boxes for _, boxes in part], size) for part in (train, test)]
    return VisionData(made[0], made[0], made[1], classes=max(classes) + 1, workers=workers, repeats=True)


def _read(root: Path, part: Path) -> tuple[list[tuple[Path, list[tuple[float, ...]]]], tuple[int, ...]]:
    """Read the images of one part with their boxes, and the classes."""
    path = _annotations(root, part)
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        ids = sorted(int(each["id"]) for each in record["categories"])
        number = {kind: kind + (1 if ids[0] == 0 else 0) for kind in ids}
        boxes: dict[int, list[tuple[float, ...]]] = {image["id"]: [] for image in record["images"]}
        for each in record["annotations"]:
            boxes[each["image_id"]].append((*each["bbox"], number[each["category_id"]]))
        named = [(image["file_name"], boxes[image["id"]]) for image in record["images"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"data.root: {path} is not COCO's format ({error!r}); it has images, annotations and categories"
        ) from None
    found = [(_image(part, name), of_image) for name, of_image in named]
    if len(found) < 2:
        raise ValueError(f"data.root: {path} lists {len(found)} images; two are the fewest")
    return found, tuple(number.values())


def _annotations(root: Path, part: Path) -> Path:
    """Find the annotation file of a part: in its folder, or the one of its name in `annotations`."""
    folders = dict.fromkeys((part, part / "annotations", root / "annotations", root))
    for folder in folders:
        listed = sorted(folder.glob("*.json")) if folder.is_dir() else []
        named = [path for path in listed if part is root or folder is part or part.name in path.stem]
        boxes = [path for path in named if path.stem.startswith("instances")] or named
        if len(boxes) == 1:
            return boxes[0]
    raise ValueError(
        f"data.root: {part} has no annotation file, or several; put COCO's .json beside the images, or one with "
        f"{part.name} in its name into {root / 'annotations'}"
    )


def _image(part: Path, name: str) -> Path:
    for path in (part / name, part / "images" / name):
        if path.is_file():
            return path
    raise ValueError(f"data.root: {part / name} is missing, which the annotations list; put it there")
