"""Imagenette, ten classes of ImageNet, added as users add their own data: a function that `data._target_` names."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hawada.data import VisionData
from hawada.data.vision import Batch, ImageTensors

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of the images that EfficientNet-Lite was trained on


def imagenette(root: str, samples: int | None = None, augment: bool = False) -> VisionData:
    """Load `train.npz` and `val.npz` with `jpeg` bytes of 224 x 224 images, `offsets` and `labels`.

    Args:
        root: the folder with the two archives.
        samples: the number of training images, the same random ones every time; None means all.
        augment: whether to mirror half of the training images.
    """
    train, test = (_read(Path(root) / f"{name}.npz") for name in ("train", "val"))
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))[
        :samples
    ]  # the archives are sorted by class
    train = (train[0][order], train[1][order])
    plain = ImageTensors(*train, mean=MEAN, std=STD)
    mirrored = ImageTensors(*train, mean=MEAN, std=STD, augment=_mirror) if augment else plain
    test_images = ImageTensors(*test, mean=MEAN, std=STD)
    return VisionData(mirrored, plain, test_images, classes=10, repeats=not augment, normalisation=(MEAN, STD))


def _mirror(images: torch.Tensor) -> torch.Tensor:
    chosen = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def _read(path: Path) -> Batch:
    with np.load(path, allow_pickle=False) as archive:
        data, labels = archive["jpeg"].tobytes(), archive["labels"].astype(np.int64)
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in pairwise(archive["offsets"])]
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
