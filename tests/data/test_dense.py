"""Images with masks and with boxes, from folders in the formats that people have."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hawada.core.task import IGNORED
from hawada.data import coco, masks

NO_CHANGE = {"mean": (0, 0, 0), "std": (1, 1, 1), "workers": 0}


def write_pairs(folder, count=5, names=("images", "masks"), size=(20, 30)):
    """Write images whose left half is dark, and masks of class 2 there, class 0 elsewhere and one void pixel."""
    for name in names:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        pixels = np.full((*size, 3), 200, np.uint8)
        pixels[:, : size[1] // 2] = 50
        mask = np.zeros(size, np.uint8)
        mask[:, : size[1] // 2] = 2
        mask[0, 0] = 255
        Image.fromarray(pixels).save(folder / names[0] / f"{index}.png")
        Image.fromarray(mask).save(folder / names[1] / f"{index}.png")
    return folder


@pytest.mark.parametrize("names", [("images", "masks"), ("JPEGImages", "SegmentationClass")])
def test_masks_are_classes_of_pixels_row_by_row(tmp_path, names):
    data = masks(str(write_pairs(tmp_path, names=names)), image_size=[20, 30], augment=False, **NO_CHANGE)
    image, labels = data.plain[0]
    assert image.shape == (3, 20, 30) and labels.shape == (600,) and data.classes == 3
    assert labels[0] == IGNORED and type(image) is type(labels) is torch.Tensor
    dark = (image[0] < 0.5).flatten()
    assert torch.equal(labels[1:] == 2, dark[1:])
    assert len(data.train) == 4 and len(data.test) == 1


def test_image_and_mask_are_augmented_alike(tmp_path):
    data = masks(str(write_pairs(tmp_path)), image_size=32, test_fraction=0.2, **NO_CHANGE)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(8):
        image, labels = data.train[0]
        sure = ((image[0] - 0.5).abs() > 0.28) & (labels.view(32, 32) != IGNORED)  # resized borders are in between
        assert torch.equal((labels.view(32, 32) == 2)[sure], (image[0] < 0.5)[sure])
        flipped += int(image[0, 16, -1] < 0.5)
    assert 0 < flipped < 8


def test_masks_in_parts_of_their_own(tmp_path):
    write_pairs(tmp_path / "train", 3)
    write_pairs(tmp_path / "val", 2)
    data = masks(str(tmp_path), image_size=16, samples=2, workers=0)
    assert (len(data.train), len(data.plain), len(data.test)) == (2, 2, 2)


def test_parts_within_images_and_masks_and_frames_of_the_same_names(tmp_path):
    for part, count in (("training", 3), ("validation", 2)):
        for clip in ("a", "b"):
            pair = write_pairs(tmp_path / "made" / part / clip, count)
            for kind in ("images", "masks"):
                (tmp_path / kind / part).mkdir(parents=True, exist_ok=True)
                (pair / kind).rename(tmp_path / kind / part / clip)
    data = masks(str(tmp_path), image_size=16, workers=0)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert all(image.parts[-3:-1] == mask.parts[-3:-1] for image, mask in (*data.plain.pairs, *data.test.pairs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: [(root / "masks" / f"{index}.png").unlink() for index in range(4)],
            r"1 of the 5 images in .*images have a mask of their name in .*masks; two are the fewest",
        ),
        (
            lambda root: [Image.new("L", (30, 20), 255).save(root / "masks" / f"{index}.png") for index in range(5)],
            r"hold one class beside 255, which does not count; write the classes as 0, 1, 2",
        ),
        (lambda root: (root / "masks").rename(root / "other"), r"has no folder masks; set data\.root to a folder with"),
        (
            lambda root: Image.new("RGB", (30, 20)).save(root / "masks" / "0.png"),
            r"0\.png has 3 channels; a mask has one",
        ),
    ],
)
def test_folders_without_masks_are_refused(tmp_path, change, message):
    change(write_pairs(tmp_path))
    with pytest.raises(ValueError, match=rf"data\.root: .*{message}"):
        masks(str(tmp_path), image_size=16, workers=0)


def write_coco(folder, annotations, count=5, first=0):
    """Write images of 40 x 20 pixels with a box of category 7 in each, and one of 3 in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    boxes = []
    for index in range(first, first + count):
        Image.new("RGB", (40, 20)).save(folder / f"{index}.jpg")
        boxes.append({"image_id": index, "category_id": 7, "bbox": [10, 5, 20, 10]})
    boxes.append({"image_id": first, "category_id": 3, "bbox": [0, 0, 4, 4]})
    images = [{"id": index, "file_name": f"{index}.jpg"} for index in range(first, first + count)]
    categories = [{"id": 7, "name": "ship"}, {"id": 3, "name": "buoy"}]
    annotations.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return folder


def test_boxes_are_corners_in_the_resized_image_and_a_class(tmp_path):
    write_coco(tmp_path / "images", tmp_path / "annotations.json")
    data = coco(str(tmp_path), image_size=80, workers=0)
    assert data.classes == 8 and len(data.train) == 4 and len(data.test) == 1
    for part in (data.train, data.test):
        for image, boxes in (part[index] for index in range(len(part))):
            assert image.shape == (3, 80, 80) and float(image.min()) >= 0 and float(image.max()) <= 1
            assert [20.0, 20.0, 60.0, 60.0, 7.0] in boxes.tolist()
    kinds = [row[4] for part in (data.train, data.test) for i in range(len(part)) for row in part[i][1].tolist()]
    assert kinds.count(7.0) == 5 and kinds.count(3.0) == 1 and set(kinds) <= {3.0, 7.0, -1.0}


@pytest.mark.parametrize("beside", [True, False])
def test_boxes_in_parts_of_their_own(tmp_path, beside):
    for part, count in (("train", 3), ("val", 2)):
        file = tmp_path / part / "_annotations.coco.json" if beside else tmp_path / "annotations" / f"{part}.json"
        write_coco(tmp_path / part, file, count)
    data = coco(str(tmp_path), image_size=32, workers=0)
    assert (len(data.train), len(data.test)) == (3, 2)


def test_boxes_as_coco_itself_lays_them_out(tmp_path):
    for part, count in (("train2017", 3), ("val2017", 2)):
        write_coco(tmp_path / part, tmp_path / "annotations" / f"instances_{part}.json", count)
        (tmp_path / "annotations" / f"captions_{part}.json").write_text("{}")
    (tmp_path / "test2017").mkdir()  # which has no annotations
    data = coco(str(tmp_path), image_size=32, workers=0)
    assert (len(data.train), len(data.test)) == (3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "annotations.json").unlink(), r"has no annotation file, or several; put COCO's"),
        (lambda root: (root / "annotations.json").write_text("[]"), r"annotations\.json is not COCO's format"),
        (lambda root: (root / "images" / "2.jpg").unlink(), r"2\.jpg is missing, which the annotations list"),
    ],
)
def test_folders_without_annotations_are_refused(tmp_path, change, message):
    write_coco(tmp_path / "images", tmp_path / "annotations.json")
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"data\.root: .*{message}"):
        coco(str(tmp_path), workers=0)
