"""Images with a mask beside each, for semantic segmentation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hawada.core.task import IGNORED
from hawada.data.photos import TRAINING, VALIDATION
from hawada.data.vision import IMAGENET_MEAN, IMAGENET_STD, VisionData, height_and_width

IMAGES = ("images", "image", "img", "imgs", "JPEGImages")
MASKS = ("masks", "mask", "labels", "annotations", "SegmentationClass")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VOID = 255  # the value of pixels that do not count
MAX_COUNTED = 200  # masks that are looked at for the number of classes
Pair = tuple[Path, Path]  # an image and its mask


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of an image, (3, height, width), and the classes of its pixels, (height times width,), row by row.

    Args:
        pairs: The files.
        size: The height and width that both are resized to, in pixels.
        mean: The mean of each channel, of images scaled to [0, 1].
        std: The standard deviation of each channel, likewise.
        augment: Whether to crop and mirror at random.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment: bool = False,
    ) -> None:
        from torchvision.transforms import v2  # takes a while to import

        self.pairs = tuple(pairs)
        vary = [v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
        self.place = v2.Compose(vary if augment else [v2.Resize(size)])
        self.finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors

        image_path, mask_path = self.pairs[index]
        with Image.open(image_path) as image:
            pixels = tv_tensors.Image(image.convert("RGB"))
        image, mask = self.place(pixels, tv_tensors.Mask(_classes_of(mask_path)))
        labels = mask.flatten().long()
        return self.finish(image).as_subclass(Tensor), torch.where(labels == VOID, IGNORED, labels).as_subclass(Tensor)


def masks(
    root: str,
    image_size: int | Sequence[int] = 224,
    workers: int = 8,
    samples: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: bool = True,
    test_fraction: float = 0.2,
) -> VisionData:
    """Load images and masks of the same names from `root/images` and `root/masks`, or from these in train and val.

    A mask is an image of one channel, or with a palette, whose values are classes; 255 does not count.

    Args:
        root: The folder; folders called `JPEGImages`, `SegmentationClass`, `labels` and the like do as well.
        image_size: The side of the square that images are resized to in pixels, or its height and width.
        workers: The number of loader processes.
        samples: The number of training images, the same random ones every time; None means all.
        mean: The mean of each channel, of images scaled to [0, 1]; None stands for ImageNet's.
        std: The standard deviation of each channel, likewise.
        augment: Whether to train on random crops, mirrored at random.
        test_fraction: The fraction to test on, where the folder has no split of its own.

    Raises:
        ValueError: The folder does not hold images and masks as described.
    """
    train, test = find_pairs(Path(root), test_fraction)
    if samples is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        train = [train[index] for index in order]
    size = height_and_width(image_size)
    normalisation = (IMAGENET_MEAN if mean is None else mean, IMAGENET_STD if std is None else std)
    plain = MaskedImages(train, size, *normalisation)
    found = [_classes_of(mask) for _, mask in train[:: max(1, len(train) // MAX_COUNTED)]]
    classes = 1 + max(int(mask[mask != VOID].max(initial=0)) for mask in found)
    if classes < 2:
        raise ValueError(
            f"data.root: the masks in {root} hold one class beside {VOID}, which does not count; write the classes as "
            "0, 1, 2 and so on"
        )
    return VisionData(
        MaskedImages(train, size, *normalisation, augment=True) if augment else plain,
        plain,
        MaskedImages(test, size, *normalisation),
        classes=classes,
        workers=workers,
        repeats=not augment,
        normalisation=normalisation,
    )


def find_pairs(root: Path, test_fraction: float) -> tuple[list[Pair], list[Pair]]:
    """List the images and masks to train on and to test on.

    Raises:
        ValueError: A folder is missing, or fewer than two images have a mask.
    """
    for place in (root, *(root / name for name in IMAGES)):
        parts = [next((name for name in names if (place / name).is_dir()), None) for names in (TRAINING, VALIDATION)]
        if parts[0] is not None and parts[1] is not None:
            train, test = (_pairs(place / part if place == root else root, part) for part in parts if part)
            return train, test
    pairs = _pairs(root)
    random.Random(0).shuffle(pairs)
    tested = min(max(1, round(len(pairs) * test_fraction)), len(pairs) - 1)
    return pairs[tested:], pairs[:tested]


def _pairs(folder: Path, part: str = "") -> list[Pair]:
    """List the images that have a mask, in the folder or in a part of its images and masks."""
    images, masks = (
        next((folder / name for name in names if (folder / name).is_dir()), None) for names in (IMAGES, MASKS)
    )
    if images is None or masks is None:
        raise ValueError(
            f"data.root: {folder} has no folder {'masks' if images else 'images'}; set data.root to a folder with "
            "images and masks of the same names, or with these in train and val"
        )
    images, masks = (inner / part if part and (inner / part).is_dir() else inner for inner in (images, masks))
    named = {path.relative_to(masks).with_suffix(""): path for path in _files(masks)}
    found = [(path, named.get(path.relative_to(images).with_suffix(""))) for path in _files(images)]
    pairs = [(path, mask) for path, mask in found if mask is not None]
    if len(pairs) < 2:
        raise ValueError(
            f"data.root: {len(pairs)} of the {len(found)} images in {images} have a mask of their name in {masks}; two "
            "are the fewest"
        )
    return pairs


def _files(folder: Path) -> list[Path]:
    shown = (path for path in folder.rglob("*") if not path.name.startswith("."))
    return sorted(path for path in shown if path.suffix.lower() in SUFFIXES)


def _classes_of(path: Path) -> Any:
    """The classes of the pixels of a mask, (height, width)."""
    with Image.open(path) as mask:
        values = np.array(mask)
    if values.ndim != 2:
        raise ValueError(
            f"data.root: {path} has {values.shape[-1]} channels; a mask has one, or a palette, whose values are classes"
        )
    if values.size and int(values.max()) > VOID:
        raise ValueError(f"data.root: {path} holds the class {int(values.max())}; {VOID - 1} is the largest")
    return values.astype(np.uint8)
