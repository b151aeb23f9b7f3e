"""Folders of photos with one directory per class: which photos are trained on, and what they tell about a network."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

TRAINING, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test")
MAX_SIZES_READ = 1000  # photos whose size is read to find out whether all share one
Photo = tuple[str, int]  # the path of a photo and the index of its class


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder.

    Attributes:
        classes: The names of the classes, sorted.
        train: The photos to train on.
        test: The photos to test on.
    """

    classes: tuple[str, ...]
    train: tuple[Photo, ...]
    test: tuple[Photo, ...]

    def shared_size(self) -> tuple[int, int] | None:
        """The (height, width) in pixels that all photos have; None where they differ.

        Of many photos a part is looked at, spread evenly.
        """
        photos = (*self.train, *self.test)
        sizes = {_size_of(path) for path, _ in photos[:: max(1, len(photos) // MAX_SIZES_READ)]}
        return sizes.pop() if len(sizes) == 1 else None


def find_photos(root: str | Path, test_fraction: float) -> PhotoFolder:
    """List the photos in `root/train/<class>/` and `root/val/<class>/`, or those in `root/<class>/`, which are split.

    Folders called `training`, `valid`, `validation` and `test` do as well. The same photos are always split alike.

    Args:
        root: The folder.
        test_fraction: The fraction of each class's photos to test on, where the folder has no split of its own.

    Raises:
        ValueError: The folder has only one part of a split, or fewer than two classes; a class has no photo; or
            there are photos to test on of a class that has none to train on.
    """
    root = Path(root)
    train, test = _part(root, TRAINING), _part(root, VALIDATION)
    if (train is None) != (test is None):
        raise ValueError(
            f"data.root: {root} has no folder {'train' if train is None else 'val'}; set data.root to a folder of "
            "train/<class>/ and val/<class>/, or to one of <class>/ alone, which is split"
        )
    if train is None or test is None:
        classes = _classes(root)
        return PhotoFolder(classes, *_split(_photos(root, classes), test_fraction))
    classes, tested = _classes(train), _classes(test)
    unknown = sorted(set(tested) - set(classes))
    if unknown:
        raise ValueError(f"data.root: {test / unknown[0]} has no counterpart in {train}; both need the same classes")
    known = {name: index for index, name in enumerate(classes)}
    shown = [(path, known[tested[label]]) for path, label in _photos(test, tested)]
    return PhotoFolder(classes, tuple(_photos(train, classes)), tuple(shown))


class Photos(Dataset[tuple[Any, int]]):
    """Photos that are read when they are asked for.

    Args:
        photos: Their paths and labels.
        transform: A function of an image of PIL's.
        grey: Whether images have one channel instead of three.
    """

    def __init__(self, photos: Iterable[Photo], transform: Callable[[Image.Image], Any], *, grey: bool = False) -> None:
        self.photos, self.transform, self.mode = tuple(photos), transform, "L" if grey else "RGB"

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.photos[index]
        with _opened(path) as image:
            return self.transform(image.convert(self.mode)), label


def _part(root: Path, names: Iterable[str]) -> Path | None:
    """Find the folder of one part of a split, which has folders in it; a class of such a name has none."""
    found = (root / name for name in names if (root / name).is_dir())
    return next((part for part in found if any(inner.is_dir() for inner in part.iterdir())), None)


def _classes(folder: Path) -> tuple[str, ...]:
    """List the classes: the folders in a folder that are not hidden."""
    found = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if len(found) < 2:
        raise ValueError(
            f"data.root: {folder} has {len(found)} folders of photos and two classes are the fewest; set data.root to "
            "the folder that holds one folder per class, or train/<class>/ and val/<class>/"
        )
    return tuple(found)


def _photos(folder: Path, classes: tuple[str, ...]) -> list[Photo]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # takes a while to import

    try:
        index = {name: number for number, name in enumerate(classes)}
        photos: list[Photo] = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(f"data.root: {error} in {folder}; add photos to these classes or remove them") from None
    return [photo for photo in photos if not Path(photo[0]).name.startswith(".")]


def _split(photos: list[Photo], test_fraction: float) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """Split the photos of each class at random, always alike; each part has some of every class that has two."""
    parts: tuple[list[Photo], list[Photo]] = [], []
    by_label: dict[int, list[Photo]] = {}
    for photo in photos:
        by_label.setdefault(photo[1], []).append(photo)
    for label, own in by_label.items():
        random.Random(label).shuffle(own)
        tested = min(max(1, round(len(own) * test_fraction)), len(own) - 1)
        parts[0].extend(own[tested:])
        parts[1].extend(own[:tested])
    if not parts[1]:
        raise ValueError("data.root: no class has two photos, so there are none to test on; add photos")
    return tuple(parts[0]), tuple(parts[1])


def _size_of(path: str) -> tuple[int, int]:
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open a photo.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise ValueError(f"data.root: {path} cannot be read as an image ({error}); mend or remove it") from None
