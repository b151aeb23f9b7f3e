"""Whatever loaders and data sets users bring are turned into (inputs,) and (inputs, labels)."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hawada.core.structure import TensorRow
from hawada.data import own_data

X, Y, Z = torch.arange(10.0).view(10, 1), torch.arange(10) % 3, torch.arange(20.0).view(10, 2)


class Dictionaries(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Nested(Dataset):
    """Pairs of a dictionary and a label."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"z": Z[index], "x": X[index]}, Y[index]


@pytest.mark.parametrize(
    ("train", "names", "count"),
    [
        (TensorDataset(X, Y), [], 1),
        (DataLoader(TensorDataset(X, Y), batch_size=3), [], 1),
        (Dictionaries(image=X, label=Y), [], 1),
        (Dictionaries(image=X, target=Y, id=Y), ["image"], 1),
        (TensorDataset(X, Z, Y), [], 2),
        (Nested(), ["x", "z"], 2),
        (Dictionaries(z=Z, y=Y, x=X), ["x", "z"], 2),
    ],
)
def test_batches_are_inputs_and_labels(train, names, count):
    data = own_data((train, train), names=names, count=count)
    batches = list(data.test_loader(4))
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    inputs, labels = batches[1]
    assert labels.tolist() == Y[4:8].tolist()
    first = inputs.tensors[0] if count == 2 else inputs
    assert torch.equal(first, X[4:8]) and (count == 1 or torch.equal(inputs.tensors[1], Z[4:8]))


def test_labels_are_optional():
    data = own_data({"train": TensorDataset(X), "val": Dictionaries(image=X)})
    assert [len(batch) for loader in (data.train_loader(4, 0), data.test_loader(4)) for batch in loader] == [1] * 6


def test_training_is_shuffled_by_the_seed_and_calibration_is_the_same_every_time():
    data = own_data((DataLoader(TensorDataset(X, Y), batch_size=2), TensorDataset(X, Y)))
    orders = [torch.cat([x for x, _ in data.train_loader(4, seed)]).flatten().tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(10))
    first, again = ([x for x, _ in data.calibration_loader(3, 5)] for _ in range(2))
    assert sum(map(len, first)) == 5 and all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_a_last_sample_alone_is_left_out_of_training():
    data = own_data((TensorDataset(X, Y), TensorDataset(X, Y)))
    assert sum(len(x) for x, _ in data.train_loader(3, 0)) == 9


class Endless:
    """A loader of no data set."""

    def __len__(self):
        return 5

    def __iter__(self):
        return iter([(X[:2], Y[:2])] * 5)


def test_a_loader_of_another_kind_is_iterated_as_it_is():
    data = own_data((Endless(), Endless()))
    assert len(list(data.train_loader(64, 0))) == 5 and len(list(data.calibration_loader(64, 3))) == 2


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (TensorDataset(X, Y), r"returns a TensorDataset; return two data sets or DataLoaders"),
        ((1, 2), r"returns a tuple; return two"),
        ([TensorDataset(X)] * 3, r"returns a list; return two"),
    ],
)
def test_what_are_no_two_data_sets_is_refused(made, message):
    with pytest.raises(ValueError, match=rf"data\._target_: it {message}"):
        own_data(made)


def test_a_batch_without_what_the_model_takes_is_refused():
    data = own_data((Dictionaries(image=X, label=Y), TensorDataset(X, Y)), names=["picture"], count=1)
    with pytest.raises(ValueError, match=r"data: a batch has no 'picture' but image, label; name them alike"):
        next(iter(data.train_loader(2, 0)))
    with pytest.raises(ValueError, match=r"holds 1 tensors to call the model with and it takes 3"):
        next(iter(own_data((TensorDataset(X, Y),) * 2, count=3).test_loader(2)))


def test_a_row_moves_and_is_indexed_as_one_tensor_is():
    row = TensorRow([X, Y])
    assert len(row) == 10 and row.shape == ((10, 1), (10,)) and row.is_floating_point()
    moved = row.to(torch.zeros(1, dtype=torch.float64))
    assert [tensor.dtype for tensor in moved.tensors] == [torch.float64, torch.int64]
    assert row[torch.tensor([1, 3])].tensors[1].tolist() == [1, 0] and row.to("meta").device.type == "meta"


def test_what_are_no_labels_is_refused():
    images = torch.zeros(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"begins with two tensors of 4 axes and the model takes one; say what"):
        own_data((TensorDataset(X), TensorDataset(X))).batch((images, images, Y[:4]))
    with pytest.raises(ValueError, match=r"the labels of a batch are a list; yield one tensor, or no labels"):
        own_data((TensorDataset(X), TensorDataset(X))).batch((images, [Y]))
