"""Image classification data: scikit-learn's digits, CIFAR-10 and ImageNet-style folders."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Sequence, Sized
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hawada.data.photos import Photos, find_photos

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_RESIDENT_BYTES = 2**30  # of the images of one data set that are kept on the device where models train
Batch = tuple[Tensor, Tensor]
Normalisation = tuple[Sequence[float], Sequence[float]]


class ImageTensors(Dataset[Batch]):
    """Images that fit into memory; whole batches are fetched and augmented at once.

    Args:
        images: the images, uint8, (N, 3, H, W).
        labels: their labels, int64, (N,).
        mean: the mean of each channel, of images scaled to [0, 1].
        std: the standard deviation of each channel, likewise.
        augment: a function that changes float images, (B, 3, H, W), on the device where they are kept, and returns the
            same shape; None changes nothing.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, device=self.images.device)
        images = (self.images[index].float() / 255 - self.mean) / self.std  # (B, 3, H, W)
        return (self.augment(images) if self.augment else images), self.labels[index]

    def with_tensors(self, images: Tensor, labels: Tensor) -> ImageTensors:
        """Make a copy with other images, or with the same images on another device."""
        other = copy.copy(self)
        other.images, other.labels = images, labels
        other.mean, other.std = self.mean.to(images.device), self.std.to(images.device)
        return other


class RandomShift:
    """Shifts each image by up to `pixels` in each direction, zero-padded, and mirrors half of them when `flip`."""

    def __init__(self, pixels: int, flip: bool) -> None:
        self.pixels, self.flip = pixels, flip

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, size, _ = images.shape
        pad, device = self.pixels, images.device
        corners = torch.randint(0, 2 * pad + 1, (count, 2)).to(
            device
        )  # drawn on the CPU, so that they are equal on every device
        rows, columns = (corner[:, None] + torch.arange(size, device=device) for corner in corners.T)  # (B, size)
        if self.flip:
            mirrored = (torch.rand(count) < 0.5).to(device)
            columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
        padded = F.pad(images, (pad, pad, pad, pad))
        shifted = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[-1]))
        return shifted.gather(3, columns[:, None, None, :].expand(-1, channels, size, -1))


class Numbered(Dataset[Any]):
    """Samples of another data set, each with its number.

    Args:
        samples: a data set of (image, label).
        whole: whether it returns whole batches at once.
    """

    def __init__(self, samples: Any, whole: bool) -> None:
        self.samples, self.whole = samples, whole

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.samples[index], index)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        if not self.whole:
            return [self[index] for index in indices]
        images, labels = self.samples.__getitems__(indices)
        return images, labels, torch.as_tensor(indices)


class VisionData:
    """Training and test images of one data set.

    Calibration data are training images without augmentation; only `test_loader` loads the test images.

    Args:
        train: the training images, augmented or not.
        plain: the training images without augmentation.
        test: the test images.
        classes: the number of different labels.
        workers: the number of loader processes.
        repeats: whether a training image is the same in every epoch, so that outputs for it can be cached.
        normalisation: the mean and standard deviation per channel that images were normalised with, if they are known.
    """

    metric = "accuracy"

    def __init__(
        self,
        train: Dataset[Any],
        plain: Dataset[Any],
        test: Dataset[Any],
        *,
        classes: int,
        workers: int = 0,
        repeats: bool = False,
        normalisation: Normalisation | None = None,
    ) -> None:
        self.train, self.plain, self.test, self.classes, self.workers = train, plain, test, classes, workers
        self.repeats, self.normalisation = repeats, normalisation

    def train_loader(self, batch_size: int, seed: int) -> DataLoader[Any]:
        """Load training images, shuffled in an order that depends on the seed alone.

        Yields (images, labels), and where images repeat, their numbers too. A last batch of a single image is dropped,
        because BatchNorm cannot train on it.
        """
        generator = torch.Generator().manual_seed(seed)
        alone = _size(self.train) % batch_size == 1
        images = Numbered(self.train, _whole(self.train)) if self.repeats else self.train
        return self._loader(images, batch_size, shuffle=True, generator=generator, drop_last=alone)

    def resident(self, device: torch.device, limit_bytes: int = MAX_RESIDENT_BYTES) -> VisionData:
        """Keep all images on the device, if they are tensors and small enough.

        Args:
            device: the device where models train.
            limit_bytes: the most bytes that the images may take.

        Returns:
            A copy with its images on the device, or this object if they stay where they are.
        """
        parts = [self.train, self.plain, self.test]
        tensors = {id(x): x for part in parts if isinstance(part, ImageTensors) for x in (part.images, part.labels)}
        fits = sum(tensor.nbytes for tensor in tensors.values()) <= limit_bytes
        if not fits or not all(isinstance(part, ImageTensors) for part in parts):
            return self
        moved = {key: tensor.to(device) for key, tensor in tensors.items()}  # tensors that parts share stay shared
        placed = {
            id(part): part.with_tensors(moved[id(part.images)], moved[id(part.labels)])
            for part in parts
            if isinstance(part, ImageTensors)
        }
        other = copy.copy(self)
        other.train, other.plain, other.test = (placed[id(part)] for part in parts)
        other.workers = 0  # processes cannot share a device's memory
        return other

    def calibration_loader(self, batch_size: int, samples: int) -> DataLoader[Any]:
        """Load `samples` random training images without augmentation, the same ones every time."""
        chosen = torch.randperm(_size(self.plain), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        return self._loader(Subset(self.plain, chosen), batch_size)

    def test_loader(self, batch_size: int) -> DataLoader[Any]:
        """Load every test image once."""
        return self._loader(self.test, batch_size)

    def _loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        if isinstance(dataset, Subset) and isinstance(dataset.dataset, ImageTensors):  # which returns whole batches
            source, chosen = dataset.dataset, dataset.indices
            dataset = source.with_tensors(source.images[chosen], source.labels[chosen])
        collate = (lambda batch: batch) if _whole(dataset) else None
        workers = min(self.workers, os.cpu_count() or 1)  # more would only wait for each other
        return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, **options)


def _size(dataset: Dataset[Any]) -> int:
    """The number of samples; torch's base class does not declare a length."""
    return len(cast(Sized, dataset))


def _whole(dataset: Dataset[Any]) -> bool:
    """Whether a data set returns whole batches at once."""
    return dataset.whole if isinstance(dataset, Numbered) else isinstance(dataset, ImageTensors)


def digits(
    image_size: int = 32, test_samples: int = 500, samples: int | None = None, augment: bool = True
) -> VisionData:
    """Load scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to (3, image_size, image_size), without download.

    Args:
        image_size: the side of the square images in pixels.
        test_samples: the size of the test split, which is stratified and always the same.
        samples: the number of training images, the same random ones every time; None means all.
        augment: whether to shift training images at random.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=test_samples, random_state=0, stratify=labels)
    train = train[:samples]  # already shuffled
    grey = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    pixels = (large * 255).round().byte().expand(-1, 3, -1, -1).contiguous()
    return _in_memory(
        (pixels[train], torch.tensor(labels[train])),
        (pixels[test], torch.tensor(labels[test])),
        RandomShift(image_size // 8, flip=False) if augment else None,
        mean=(0.3, 0.3, 0.3),
        std=(0.35, 0.35, 0.35),
    )


def cifar10(root: str, samples: int | None = None, augment: bool = True) -> VisionData:
    """Load CIFAR-10 (Krizhevsky, 2009) from local files: its binary version, or `train.npz` and `test.npz`.

    The archives hold `labels` and either `images`, uint8 (N, 32, 32, 3), or `jpeg` bytes with `offsets`. The pickled
    Python version is not read.

    Args:
        root: the folder with `data_batch_1.bin` … `test_batch.bin`, or with the two archives.
        samples: the number of training images, the same random ones every time; None means all.
        augment: whether to shift and mirror training images at random.

    Raises:
        ValueError: when a file is missing.
    """
    folder = Path(root)
    if (folder / "test_batch.bin").is_file():
        train = _binary_batches([folder / f"data_batch_{number}.bin" for number in range(1, 6)])
        test = _binary_batches([folder / "test_batch.bin"])
    else:
        train, test = _archive(folder / "train.npz"), _archive(folder / "test.npz")
    if samples is not None:  # archives may be sorted by class
        chosen = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))[:samples]
        train = (train[0][chosen], train[1][chosen])
    shift = RandomShift(4, flip=True) if augment else None
    return _in_memory(train, test, shift, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def imagenet(
    root: str,
    image_size: int | Sequence[int] = 224,
    workers: int = 8,
    samples: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: bool = True,
    test_fraction: float = 0.2,
    channels: int = 3,
) -> VisionData:
    """Load ImageNet, or any photos in `root/train/<class>/` and `root/val/<class>/`, or in `root/<class>/` alone.

    Photos that all have the size which is asked for are taken as they are, and shifted in training. Others are resized
    and cropped, in training to random parts.

    Args:
        root: The folder; see `find_photos`.
        image_size: The side of the square crop in pixels, or its height and width.
        workers: The number of loader processes.
        samples: The number of training images, the same random ones every time; None means all.
        mean: The mean of each channel, of images scaled to [0, 1]; None stands for ImageNet's.
        std: The standard deviation of each channel, likewise.
        augment: Whether to train on random crops, mirrored at random, instead of on the centre.
        test_fraction: The fraction of each class to test on, where the folder has no split of its own.
        channels: The channels of an image: 3, or 1 for grey ones.

    Raises:
        ValueError: The folder does not hold photos as described.
    """
    from torchvision import transforms

    photos = find_photos(root, test_fraction)
    height, width = height_and_width(image_size)
    mean, std = IMAGENET_MEAN if mean is None else mean, IMAGENET_STD if std is None else std
    if channels == 1 and len(mean) == 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if photos.shared_size() == (height, width):
        exact = transforms.Resize((height, width))  # of many photos not every size was looked at
        vary: list[Any] = [exact, transforms.RandomCrop((height, width), padding=[width // 8, height // 8])]
        centre: list[Any] = [exact]
    else:
        vary = [transforms.RandomResizedCrop((height, width))]
        centre = [transforms.Resize(max(height, width) * 256 // 224), transforms.CenterCrop((height, width))]
    finish = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    chosen = photos.train
    if samples is not None:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        chosen = tuple(chosen[index] for index in order)
    grey = channels == 1
    plain = Photos(chosen, transforms.Compose([*centre, *finish]), grey=grey)
    varied = Photos(chosen, transforms.Compose([*vary, transforms.RandomHorizontalFlip(), *finish]), grey=grey)
    return VisionData(
        varied if augment else plain,
        plain,
        Photos(photos.test, plain.transform, grey=grey),
        classes=len(photos.classes),
        workers=workers,
        repeats=not augment,
        normalisation=(mean, std),
    )


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """The height and width of images, given these or the side of square ones."""
    sides = [image_size] if isinstance(image_size, int) else list(image_size)
    return sides[0], sides[-1]


def _in_memory(
    train: Batch,
    test: Batch,
    augment: Callable[[Tensor], Tensor] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> VisionData:
    """Make a data set of images that are in memory."""
    plain = ImageTensors(*train, mean=mean, std=std)
    return VisionData(
        plain if augment is None else ImageTensors(*train, mean=mean, std=std, augment=augment),
        plain,
        ImageTensors(*test, mean=mean, std=std),
        classes=int(test[1].max()) + 1,
        repeats=augment is None,
        normalisation=(mean, std),
    )


def _binary_batches(paths: Sequence[Path]) -> Batch:
    """Read CIFAR-10's binary version: for each image one byte of label, then 3 x 32 x 32 bytes."""
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"data.root: {path} is missing; the binary version needs five data_batch files and test_batch.bin, "
                "so set data.root to a folder that holds them all"
            )
    rows = torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073))
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def _archive(path: Path) -> Batch:
    """Read images and labels from an .npz archive; JPEG bytes are decoded."""
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"data.root: {path} is missing; give CIFAR-10's binary version, or train.npz and test.npz")
    with np.load(path, allow_pickle=False) as archive:
        labels = torch.from_numpy(archive["labels"].astype(np.int64))
        if "images" in archive:
            images = archive["images"]
        else:
            data, offsets = archive["jpeg"].tobytes(), archive["offsets"]
            images = np.stack(
                [np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")) for start, end in pairwise(offsets)]
            )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels  # (N, H, W, 3) -> (N, 3, H, W)
