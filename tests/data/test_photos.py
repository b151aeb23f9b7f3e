"""Folders of photos: which are trained on, which are tested on, and what size they share."""

import numpy as np
import pytest
from PIL import Image

from hawada.data import imagenet
from hawada.data.photos import find_photos


def write_photos(folder, classes, count=10, size=(24, 32)):
    """Write photos of one grey level per class, `size` (height, width) each."""
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = np.full((*size, 3), 20 * level + 10, np.uint8)
            Image.fromarray(picture).save(folder / name / f"{index}.png")


def test_a_folder_without_a_split_is_split_alike_each_time(tmp_path):
    write_photos(tmp_path, ("cat", "dog"))
    first, again = (find_photos(tmp_path, 0.2) for _ in range(2))
    assert first == again and first.classes == ("cat", "dog")
    assert len(first.train) == 16 and len(first.test) == 4
    assert sorted(label for _, label in first.test) == [0, 0, 1, 1]
    assert not {path for path, _ in first.train} & {path for path, _ in first.test}


def test_a_class_of_one_photo_is_trained_on(tmp_path):
    write_photos(tmp_path, ("cat",), count=1)
    write_photos(tmp_path, ("dog",), count=2)
    found = find_photos(tmp_path, 0.2)
    assert [label for _, label in found.train] == [0, 1] and [label for _, label in found.test] == [1]


def test_without_any_photo_to_test_on_the_folder_is_refused(tmp_path):
    write_photos(tmp_path, ("cat", "dog"), count=1)
    with pytest.raises(ValueError, match=r"data\.root: no class has two photos, so there are none to test on"):
        find_photos(tmp_path, 0.2)


def test_a_class_may_be_called_as_a_part_of_a_split_is(tmp_path):
    write_photos(tmp_path, ("bus", "train"))
    assert find_photos(tmp_path, 0.2).classes == ("bus", "train")


def test_a_photo_that_cannot_be_read_is_named_and_a_hidden_file_is_none(tmp_path):
    write_photos(tmp_path, ("cat", "dog"), count=3)
    (tmp_path / "cat" / "._0.png").write_bytes(b"not a photo")
    assert len(find_photos(tmp_path, 0.2).train) == 4
    (tmp_path / "cat" / "0.png").write_bytes(b"not a photo")
    with pytest.raises(ValueError, match=r"data\.root: .*0\.png cannot be read as an image .*; mend or remove it"):
        find_photos(tmp_path, 0.2).shared_size()


def test_grey_images_have_one_channel(tmp_path):
    write_photos(tmp_path, ("cat", "dog"), size=(24, 24))
    image, label = imagenet(str(tmp_path), image_size=[24], workers=0, channels=1, mean=[0.0], std=[1.0]).plain[0]
    assert image.shape == (1, 24, 24) and (image == (20 * label + 10) / 255).all()


@pytest.mark.parametrize(("train", "test"), [("train", "val"), ("train", "test"), ("training", "validation")])
def test_a_split_of_its_own_is_kept(tmp_path, train, test):
    write_photos(tmp_path / train, ("cat", "dog", "owl"), count=3)
    write_photos(tmp_path / test, ("cat", "owl"), count=1)
    found = find_photos(tmp_path, 0.5)
    assert len(found.train) == 9 and sorted(label for _, label in found.test) == [0, 2]


def test_hidden_folders_are_no_classes(tmp_path):
    write_photos(tmp_path, ("cat", "dog"))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert find_photos(tmp_path, 0.2).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "broken", "message"),
    [
        (("cat",), None, r"has 1 folders of photos and two classes are the fewest; set data\.root to the folder"),
        ((), None, r"has 0 folders of photos"),
        (("cat", "dog"), "owl", r"owl.* add photos to these classes or remove them"),
    ],
)
def test_what_is_no_folder_of_photos_is_refused(tmp_path, classes, broken, message):
    write_photos(tmp_path, classes)
    if broken:
        (tmp_path / broken).mkdir()
    with pytest.raises(ValueError, match=rf"data\.root: .*{message}"):
        find_photos(tmp_path, 0.2)


def test_a_class_that_is_tested_on_only_is_refused(tmp_path):
    write_photos(tmp_path / "train", ("cat", "dog"))
    write_photos(tmp_path / "val", ("cat", "owl"))
    with pytest.raises(ValueError, match=r"val/owl has no counterpart in .*train; both need the same classes"):
        find_photos(tmp_path, 0.2)


def test_photos_of_one_size_are_taken_as_they_are(tmp_path):
    write_photos(tmp_path, ("cat", "dog"), size=(24, 32))
    assert find_photos(tmp_path, 0.2).shared_size() == (24, 32)
    data = imagenet(str(tmp_path), image_size=[24, 32], workers=0, mean=(0, 0, 0), std=(1, 1, 1))
    image, label = data.plain[0]
    assert image.shape == (3, 24, 32) and (image == (20 * label + 10) / 255).all()
    assert data.train[0][0].shape == (3, 24, 32)


def test_photos_of_several_sizes_share_none(tmp_path):
    write_photos(tmp_path / "train", ("cat", "dog"), size=(24, 24))
    write_photos(tmp_path / "val", ("cat", "dog"), size=(32, 24))
    assert find_photos(tmp_path, 0.2).shared_size() is None
    assert imagenet(str(tmp_path), image_size=16, workers=0).plain[0][0].shape == (3, 16, 16)
