"""Image classification data: scikit-learn's digits, CIFAR-10 and ImageNet-style folders."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIDENT_BYTES = 2**30  # images of one data set that are kept on the device where models train
Batch = tuple[Tensor, Tensor]
Normalisation = tuple[Sequence[float], Sequence[float]]


class ImageTensors(Dataset[Batch]):
    """Images that fit into memory; whole batches are fetched and augmented at once.

    Args:
        images: uint8, (N, 3, H, W).
        labels: int64, (N,).
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        augment: images (B, 3, H, W), float, on the device where they are kept -> the same shape; or None.
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
        """Other images, or the same elsewhere, treated alike."""
        other = copy.copy(self)
        other.images, other.labels = images, labels
        other.mean, other.std = self.mean.to(images.device), self.std.to(images.device)
        return other


class RandomShift:
    """Shifts each image by up to `pixels` either way, zero-padded, and mirrors half of them when `flip`."""

    def __init__(self, pixels: int, flip: bool) -> None:
        self.pixels, self.flip = pixels, flip

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, size, _ = images.shape
        pad, device = self.pixels, images.device
        corners = torch.randint(0, 2 * pad + 1, (count, 2)).to(device)  # drawn alike on every device
        rows, columns = (corner[:, None] + torch.arange(size, device=device) for corner in corners.T)  # (B, size)
        if self.flip:
            mirrored = (torch.rand(count) < 0.5).to(device)
            columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
        padded = F.pad(images, (pad, pad, pad, pad))
        shifted = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[-1]))
        return shifted.gather(3, columns[:, None, None, :].expand(-1, channels, size, -1))


class Numbered(Dataset[Any]):
    """Samples, each with its number.

    Args:
        samples: (image, label) by number, and if `whole`, whole batches of them.
        whole: whether batches are fetched at once.
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

    Calibration batches come from the training images without augmentation; nothing but `test_loader` shows the test
    images.

    Args:
        train: training images, augmented or not.
        plain: the same without augmentation.
        test: test images.
        classes: how many different labels there are.
        workers: loader processes.
        repeats: whether a training image is the same in every epoch, so that answers to it can be remembered.
        normalisation: mean and standard deviation per channel that images were normalised with, where they are known.
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
        """Shuffled, in an order that depends on the seed alone.

        Yields (images, labels), and where images repeat, their numbers too. A single image left over is dropped:
        BatchNorm cannot train on it.
        """
        generator = torch.Generator().manual_seed(seed)
        alone = len(self.train) % batch_size == 1  # type: ignore[arg-type]
        images = Numbered(self.train, _whole(self.train)) if self.repeats else self.train
        return self._loader(images, batch_size, shuffle=True, generator=generator, drop_last=alone)

    def resident(self, device: torch.device, limit_bytes: int = RESIDENT_BYTES) -> VisionData:
        """The same with all images on the device, where they are tensors and take no more than this; else as it is."""
        parts = [self.train, self.plain, self.test]
        tensors = {id(x): x for part in parts if isinstance(part, ImageTensors) for x in (part.images, part.labels)}
        few = sum(tensor.nbytes for tensor in tensors.values()) <= limit_bytes
        if not few or not all(isinstance(part, ImageTensors) for part in parts):
            return self
        moved = {key: tensor.to(device) for key, tensor in tensors.items()}  # what parts share they go on sharing
        placed = {
            id(part): part.with_tensors(moved[id(part.images)], moved[id(part.labels)])
            for part in parts
            if isinstance(part, ImageTensors)
        }
        other = copy.copy(self)
        other.train, other.plain, other.test = (placed[id(part)] for part in parts)
        other.workers = 0  # they cannot share a device's memory
        return other

    def calibration_loader(self, batch_size: int, samples: int) -> DataLoader[Any]:
        """The same random `samples` training images every time, without augmentation."""
        size = len(self.plain)  # type: ignore[arg-type]
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:samples].tolist()
        return self._loader(Subset(self.plain, chosen), batch_size)

    def test_loader(self, batch_size: int) -> DataLoader[Any]:
        """Every test image once."""
        return self._loader(self.test, batch_size)

    def _loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        if isinstance(dataset, Subset) and isinstance(dataset.dataset, ImageTensors):  # whole batches of it
            source, chosen = dataset.dataset, dataset.indices
            dataset = source.with_tensors(source.images[chosen], source.labels[chosen])
        collate = (lambda batch: batch) if _whole(dataset) else None
        return DataLoader(dataset, batch_size, num_workers=self.workers, collate_fn=collate, **options)


def _whole(dataset: Dataset[Any]) -> bool:
    """Whether a data set gives out whole batches at once."""
    return dataset.whole if isinstance(dataset, Numbered) else isinstance(dataset, ImageTensors)


def digits(
    image_size: int = 32, test_samples: int = 500, samples: int | None = None, augment: bool = True
) -> VisionData:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to (3, image_size, image_size); no download.

    Args:
        image_size: side of the square images, in pixels.
        test_samples: how many are the test split, which is stratified and always the same.
        samples: use only so many training images, the same random ones every time.
        augment: shift training images at random.
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
    """CIFAR-10 (Krizhevsky, 2009) from local files: its binary version, or `train.npz` and `test.npz`.

    The archives hold `labels` and either `images`, uint8 (N, 32, 32, 3), or `jpeg` bytes with `offsets`. The pickled
    Python version is not read.

    Args:
        root: folder with `data_batch_1.bin` … `test_batch.bin`, or the two archives.
        samples: use only so many training images, the same random ones every time.
        augment: shift and mirror training images at random.
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
    image_size: int = 224,
    workers: int = 8,
    samples: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    augment: bool = True,
) -> VisionData:
    """ImageNet (or any data of that layout) from `root/train/<class>/*` and `root/val/<class>/*`.

    Args:
        root: folder with `train` and `val`.
        image_size: side of the square crop, in pixels.
        workers: loader processes.
        samples: use only so many training images, the same random ones every time.
        mean: per channel, of images scaled to [0, 1]; a model may bring its own.
        std: likewise.
        augment: train on random crops, mirrored at random, rather than on the centre.
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    for part in ("train", "val"):
        if not (Path(root) / part).is_dir():
            raise ValueError(
                f"data.root: {root} has no folder {part}; ImageNet's layout is train/<class>/ and val/<class>/"
            )
    finish = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    varied = transforms.Compose([transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), *finish])
    central = transforms.Compose(
        [transforms.Resize(image_size * 256 // 224), transforms.CenterCrop(image_size), *finish]
    )
    train: Dataset[Any] = ImageFolder(f"{root}/train", varied)
    plain: Dataset[Any] = ImageFolder(f"{root}/train", central)
    if samples is not None:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples].tolist()  # type: ignore[arg-type]
        train, plain = Subset(train, chosen), Subset(plain, chosen)
    test = ImageFolder(f"{root}/val", central)
    return VisionData(
        train if augment else plain,
        plain,
        test,
        classes=len(test.classes),
        workers=workers,
        repeats=not augment,
        normalisation=(mean, std),
    )


def _in_memory(
    train: Batch,
    test: Batch,
    augment: Callable[[Tensor], Tensor] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> VisionData:
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
    """CIFAR-10's binary version: per image one byte of label, then 3 x 32 x 32 bytes."""
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"data.root: {path} is missing; the binary version has five data_batch files and test_batch.bin"
            )
    rows = torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073))
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def _archive(path: Path) -> Batch:
    """Images and labels of an .npz archive; JPEG bytes are decoded."""
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
