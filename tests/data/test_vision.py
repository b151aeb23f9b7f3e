import io

import numpy as np
import pytest
import torch
from PIL import Image

from hawada.data import VisionData, cifar10, digits, imagenet
from hawada.data.vision import IMAGENET_MEAN, IMAGENET_STD, ImageTensors, RandomShift

MEAN, STD = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def data():
    return digits(image_size=16)


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_the_digits_split_is_disjoint_stratified_and_fixed(data):
    train, test = data.plain, data.test
    assert (len(train), len(test), len(data.train)) == (1297, 500, 1297)
    fingerprints = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    assert not fingerprints[0] & fingerprints[1]
    shares = [torch.bincount(part.labels, minlength=10) / len(part) for part in (train, test)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.002
    assert torch.equal(digits(image_size=16, samples=40).plain.images, train.images[:40])
    again = digits(image_size=16)
    assert torch.equal(again.test.images, test.images) and torch.equal(again.test.labels, test.labels)


def test_digits_have_the_size_that_was_asked_for():
    images, labels = next(iter(digits(image_size=24, test_samples=100).test_loader(100)))
    assert images.shape == (100, 3, 24, 24) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    assert torch.equal(images[:, 0], images[:, 1])


def test_images_are_normalised_per_channel():
    pixels = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    image, label = ImageTensors(pixels, torch.tensor([7]), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 0.1))[0]
    assert torch.allclose(image[:, 0, 0], torch.tensor([0.2, 0.0, -1.0]), atol=1e-6)
    assert int(label) == 7


def test_the_order_of_training_depends_on_the_seed_alone(data):
    def labels(seed, noise):
        torch.manual_seed(noise)
        return everything(data.train_loader(64, seed))[1]

    assert torch.equal(labels(1, 0), labels(1, 99))
    assert not torch.equal(labels(1, 0), labels(2, 0))
    assert torch.equal(labels(1, 0).bincount(), data.train.labels.bincount())


def test_epochs_of_one_loader_differ_and_repeat_by_seed(data):
    first, second = data.train_loader(64, 3), data.train_loader(64, 3)
    torch.manual_seed(0)
    epochs = [everything(first) for _ in range(2)]
    torch.manual_seed(0)
    repeated = [everything(second) for _ in range(2)]
    assert not torch.equal(epochs[0][1], epochs[1][1])
    for (images, labels), (same_images, same_labels) in zip(epochs, repeated, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_calibration_is_the_same_unaugmented_training_images_every_time(data):
    images, labels = everything(data.calibration_loader(32, 80))
    again, _ = everything(data.calibration_loader(40, 80))
    assert len(labels) == 80 and torch.equal(images, again)
    plain = {image.numpy().tobytes() for image in data.plain.__getitems__(range(len(data.plain)))[0]}
    assert {image.numpy().tobytes() for image in images} <= plain


def test_the_test_loader_shows_every_test_image_once_and_in_order(data):
    images, labels = everything(data.test_loader(64))
    assert torch.equal(labels, data.test.labels)
    assert torch.equal(images, data.test.__getitems__(range(500))[0])


def test_training_images_are_shifted_and_test_images_are_not(data):
    assert data.train.augment is not None and data.plain.augment is data.test.augment is None
    torch.manual_seed(0)
    shifted, plain = (part.__getitems__(range(50))[0] for part in (data.train, data.plain))
    moved = [not torch.equal(a, b) for a, b in zip(shifted, plain, strict=True)]
    assert sum(moved) > 25


def test_a_shift_moves_by_at_most_the_pixels_and_pads_with_zeros():
    images = torch.zeros(300, 3, 9, 9)
    images[:, :, 4, 4] = 1.0
    torch.manual_seed(0)
    shifted = RandomShift(2, flip=False)(images)
    assert shifted.shape == images.shape and torch.equal(shifted.sum((1, 2, 3)), images.sum((1, 2, 3)))
    places = {tuple(place) for place in shifted[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_half_of_the_images_are_mirrored():
    images = torch.arange(4.0).expand(400, 3, 4, 4)
    torch.manual_seed(0)
    flipped = RandomShift(0, flip=True)(images)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_a_shift_is_a_window_of_the_padded_image():
    images = torch.randn(20, 3, 6, 6)
    torch.manual_seed(0)
    shifted = RandomShift(2, flip=True)(images)
    torch.manual_seed(0)
    corners, mirrored = torch.randint(0, 5, (20, 2)).tolist(), torch.rand(20) < 0.5
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for index, (y, x) in enumerate(corners):
        window = padded[index, :, y : y + 6, x : x + 6]
        assert torch.equal(shifted[index], window.flip(-1) if mirrored[index] else window)


def test_images_that_are_the_same_in_every_epoch_come_with_their_numbers():
    data = digits(image_size=16, samples=40, augment=False)
    assert data.repeats and not digits(image_size=16, samples=40).repeats
    loader = data.train_loader(16, seed=0)
    for _ in range(2):
        images, labels, numbers = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert sorted(numbers.tolist()) == list(range(40)) and numbers.tolist() != list(range(40))
        expected = data.plain.__getitems__(numbers.tolist())
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    assert len(next(iter(data.calibration_loader(4, 8)))) == 2
    assert not VisionData(data.plain, data.plain, data.test, classes=10).repeats  # unless the caller declares it


@pytest.mark.parametrize("limit", [None, 1000])
def test_few_images_are_kept_on_the_device(limit):
    data = digits(image_size=16, samples=40)
    placed = data.resident(torch.device("meta"), **({} if limit is None else {"limit_bytes": limit}))
    assert (placed is data) == (limit is not None)
    device = "cpu" if limit else "meta"
    assert {part.images.device.type for part in (placed.train, placed.plain, placed.test)} == {device}
    assert placed.train.images is placed.plain.images and placed.train.augment is not None  # held once
    assert placed.classes == 10 and not placed.repeats and placed.normalisation == ((0.3,) * 3, (0.35,) * 3)
    assert digits(image_size=16, augment=False).resident(torch.device("meta")).repeats


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_a_gpu_are_the_same():
    data = digits(image_size=16, samples=40)
    placed = data.resident(torch.device("cuda"))
    for seed in range(2):
        batches = []
        for each in (data, placed):
            torch.manual_seed(seed)
            batches.append(next(iter(each.train_loader(16, seed))))
        (images, labels), (there, their_labels) = batches
        assert there.device.type == their_labels.device.type == "cuda"
        assert torch.allclose(images, there.cpu(), atol=1e-6) and torch.equal(labels, their_labels.cpu())


def random_images(count, seed):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, count)


def normalised(images):
    """uint8 (N, H, W, 3) as the network sees it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def write_binary(folder, name, images, labels):
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(-1, 3072)], axis=1)
    rows.tofile(folder / f"{name}.bin")


def test_cifar10_from_its_binary_version(tmp_path):
    parts = [random_images(4, seed) for seed in range(6)]
    for name, (images, labels) in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], parts, strict=True):
        write_binary(tmp_path, name, images, labels)
    data = cifar10(str(tmp_path))
    images, labels = everything(data.test_loader(3))
    assert torch.allclose(images, normalised(parts[5][0])) and labels.tolist() == parts[5][1].tolist()
    assert len(data.train) == 20
    assert data.plain.labels.tolist() == np.concatenate([labels for _, labels in parts[:5]]).tolist()
    assert torch.allclose(data.plain[19][0], normalised(parts[4][0])[3])


def test_a_missing_batch_is_named(tmp_path):
    write_binary(tmp_path, "test_batch", *random_images(1, 0))
    message = (
        r"data\.root: .*data_batch_1\.bin is missing; the binary version needs five data_batch files and "
        r"test_batch\.bin, so set data\.root to a folder that holds them all"
    )
    with pytest.raises(ValueError, match=message):
        cifar10(str(tmp_path))


def write_archives(folder, *, jpeg):
    pairs = {}
    for seed, (name, count) in enumerate([("train", 7), ("test", 5)]):
        images, labels = random_images(count, seed)
        images = images[:, :1, :1].repeat(32, 1).repeat(32, 2) if jpeg else images  # flat colours survive JPEG
        pairs[name] = images, labels
        if not jpeg:
            np.savez(folder / f"{name}.npz", images=images, labels=labels)
            continue
        files = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        data = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / f"{name}.npz", jpeg=data, offsets=offsets, labels=labels)
    return pairs


@pytest.mark.parametrize("jpeg", [False, True])
def test_cifar10_from_archives(tmp_path, jpeg):
    pairs = write_archives(tmp_path, jpeg=jpeg)
    data = cifar10(str(tmp_path))
    shown = {"test": everything(data.test_loader(2)), "train": data.plain.__getitems__(range(7))}
    for name, (images, labels) in shown.items():
        assert float((images - normalised(pairs[name][0])).abs().max()) < (0.1 if jpeg else 1e-6)
        assert labels.tolist() == pairs[name][1].tolist()


def test_some_random_samples_are_trained_on_the_same_every_time(tmp_path):
    pairs = write_archives(tmp_path, jpeg=False)
    data, again = (cifar10(str(tmp_path), samples=3) for _ in range(2))
    assert (len(data.train), len(data.plain), len(data.test)) == (3, 3, 5)
    assert torch.equal(data.train.images, again.train.images)
    known = {image.tobytes(): int(label) for image, label in zip(*pairs["train"], strict=True)}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] == int(label)


@pytest.mark.parametrize("present", [(), ("train.npz",)])
def test_a_missing_archive_is_named(tmp_path, present):
    if present:
        write_archives(tmp_path, jpeg=False)
        (tmp_path / "test.npz").unlink()
    message = rf"data\.root: .*{'test' if present else 'train'}\.npz is missing; give CIFAR-10's binary version, or"
    with pytest.raises(ValueError, match=message):
        cifar10(str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    """Two classes, dark and bright, of pictures that are not square."""
    for part, count in (("train", 4), ("val", 2)):
        for name, level in (("bright", 255), ("dark", 0)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                picture = np.full((40, 60, 3), level, np.uint8)
                Image.fromarray(picture).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_imagenet_from_folders(folder):
    data = imagenet(str(folder), image_size=32, workers=0)
    images, labels = everything(data.test_loader(3))
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1]
    for label, level in ((0, 1.0), (1, 0.0)):
        assert torch.allclose(images[labels == label], ((level - MEAN) / STD).expand(2, 3, 32, 32), atol=1e-5)
    images, labels = next(iter(data.train_loader(8, seed=0)))
    assert images.shape == (8, 3, 32, 32) and sorted(labels.tolist()) == [0] * 4 + [1] * 4


def test_imagenet_without_augmentation_shows_centres_and_numbers(folder):
    data = imagenet(str(folder), image_size=32, workers=0, augment=False)
    images, labels, numbers = next(iter(data.train_loader(8, seed=0)))
    assert data.repeats and images.shape == (8, 3, 32, 32) and sorted(numbers.tolist()) == list(range(8))
    assert labels.tolist() == [data.plain[number][1] for number in numbers.tolist()]
    assert data.resident(torch.device("meta")) is data  # files are not


def test_some_images_of_imagenet_are_the_same_ones_every_time(folder):
    first, again = (imagenet(str(folder), image_size=32, workers=0, samples=5) for _ in range(2))
    assert len(first.train) == len(first.plain) == 5 and first.train.photos == again.plain.photos
    images, labels = everything(first.calibration_loader(2, samples=3))
    same, _ = everything(again.calibration_loader(3, samples=3))
    assert torch.equal(images, same) and len(labels) == 3


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_folder_is_named(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(
        ValueError, match=rf"data\.root: .* has no folder {missing}; set data\.root to a folder of train/<class>/"
    ):
        imagenet(str(folder), workers=0)
