"""Data of the user's own: whatever loaders or data sets a function returns, in the form that stages take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hawada.core.structure import TensorRow

LABELS = ("label", "labels", "target", "targets", "y", "mask", "masks")  # the keys of labels in a dictionary


class OwnData:
    """Training and test data that a function of the user's own returned.

    A batch is a tensor; (inputs, labels), where inputs are one tensor or as many as the model takes; or a dictionary.
    Labels are optional: distillation needs none, and without them the agreement with the teacher is reported.

    Args:
        train: A data set or a loader to train on; of a loader, its data set is loaded in batches of the configured
            size and shuffled evenly, whatever its sampler. Calibration data are taken from it as it is.
        test: The same to test on.
        names: The keys under which a dictionary holds the inputs; empty where any but `LABELS` will do.
        count: The number of tensors that the model takes.
    """

    metric = "accuracy"
    classes: int | None = None
    repeats = False
    normalisation = None

    def __init__(self, train: Any, test: Any, *, names: Sequence[str] = (), count: int = 1) -> None:
        self.train, self.test, self.names, self.count = train, test, tuple(names), count

    def train_loader(self, batch_size: int, seed: int) -> _Batches:
        """Load training data, shuffled in an order that depends on the seed alone; a last sample alone is left out."""
        dataset = _dataset(self.train)
        if dataset is None:
            return _Batches(self.train, self)
        generator = torch.Generator().manual_seed(seed)
        alone = _size(dataset) % batch_size == 1
        return self._loader(self.train, dataset, batch_size, shuffle=True, generator=generator, drop_last=alone)

    def calibration_loader(self, batch_size: int, samples: int) -> _Batches:
        """Load `samples` random training samples, the same ones every time."""
        dataset = _dataset(self.train)
        if dataset is None:
            first = next(iter(self.train))
            size = len(pytree.tree_leaves(first)[0])
            return _Batches(list(islice(self.train, -(-samples // size))), self)
        order = torch.randperm(_size(dataset), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        return self._loader(self.train, Subset(dataset, order), batch_size)

    def test_loader(self, batch_size: int) -> _Batches:
        """Load all test data once."""
        dataset = _dataset(self.test)
        return _Batches(self.test, self) if dataset is None else self._loader(self.test, dataset, batch_size)

    def batch(self, given: Any) -> tuple[Any, ...]:
        """Return (inputs,) or (inputs, labels) of a batch as the user's loader yields it.

        Raises:
            ValueError: The batch does not hold what the model takes.
        """
        if isinstance(given, Mapping):
            names = self.names or tuple(name for name in given if name not in LABELS)
            missing = [name for name in names if name not in given]
            if missing:
                raise ValueError(
                    f"data: a batch has no {missing[0]!r} but {', '.join(map(str, given))}; name them alike"
                )
            inputs: Any = [given[name] for name in names]
            labels = [given[name] for name in LABELS if name in given and name not in names]
        elif isinstance(given, Tensor):
            inputs, labels = given, []
        elif self.count > 1 and len(given) >= self.count and all(isinstance(each, Tensor) for each in given):
            inputs, labels = given[: self.count], list(given[self.count :])
        else:
            inputs, labels = given[0], list(given[1:])
            if len(labels) > 1 and isinstance(labels[0], Tensor) and labels[0].ndim == getattr(inputs, "ndim", 0) > 2:
                raise ValueError(
                    f"data: a batch begins with two tensors of {labels[0].ndim} axes and the model takes one; say what "
                    "it takes with model.adapter.example, or yield (inputs, labels)"
                )
        if isinstance(inputs, Mapping) and self.names:
            inputs = [inputs[name] for name in self.names]
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if len(leaves) != self.count:
            raise ValueError(
                f"data: a batch holds {len(leaves)} tensors to call the model with and it takes {self.count}; yield "
                "(inputs, labels), with inputs as model.adapter.example describes them"
            )
        if labels and not isinstance(labels[0], Tensor):
            raise ValueError(
                f"data: the labels of a batch are a {type(labels[0]).__name__}; yield one tensor, or no labels"
            )
        made = leaves[0] if self.count == 1 else TensorRow(leaves)
        return (made, *(label for label in labels[:1] if isinstance(label, Tensor)))

    def _loader(self, given: Any, dataset: Dataset[Any], batch_size: int, **options: Any) -> _Batches:
        if isinstance(given, DataLoader):
            options |= {"num_workers": given.num_workers, "collate_fn": given.collate_fn}
        return _Batches(DataLoader(dataset, batch_size, **options), self)


class _Batches:
    """Yields batches in the form that stages take."""

    def __init__(self, loader: Any, data: OwnData) -> None:
        self.loader, self.data = loader, data

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for given in self.loader:
            yield self.data.batch(given)


def own_data(made: Any, *, names: Sequence[str] = (), count: int = 1) -> OwnData:
    """Take what a function of the user's own returned: (training, test) data sets or loaders.

    Args:
        made: What the function returned.
        names: See `OwnData`.
        count: See `OwnData`.

    Raises:
        ValueError: It is something else.
    """
    pair = list(made.values()) if isinstance(made, Mapping) else made
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(hasattr(part, "__len__") for part in pair):
        raise ValueError(
            f"data._target_: it returns a {type(made).__name__}; return two data sets or DataLoaders, one to train on "
            "and one to test on"
        )
    return OwnData(*pair, names=names, count=count)


def _dataset(given: Any) -> Dataset[Any] | None:
    """The data set of a loader; None for a loader of another kind, which is iterated as it is."""
    if isinstance(given, DataLoader):
        return None if isinstance(given.dataset, IterableDataset) else given.dataset
    return cast("Dataset[Any]", given) if hasattr(given, "__getitem__") else None


def _size(dataset: Dataset[Any]) -> int:
    return len(cast(Sized, dataset))
