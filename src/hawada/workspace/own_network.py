"""What a network of the user's own is told of the photos that it takes: how many classes there are, and their size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

PHOTOS = "hawada.data.imagenet"  # the data that consist of photos in one folder per class


def fill_in_from_photos(cfg: DictConfig) -> None:
    """Set the number of classes and the image size of a factory's model where the configuration leaves them open.

    The number of classes is that of the data's folders, if the factory takes `num_classes`. The image size is the one
    that all photos share, if they do.

    Args:
        cfg: The composed configuration, which is changed.

    Raises:
        ValueError: The factory cannot be imported, or the folder does not hold photos by class.
    """
    adapter = cfg.model.adapter
    open_keys = [key for key in ("num_classes", "image_size") if key in adapter and adapter[key] is None]
    root = None if OmegaConf.is_missing(cfg.data, "root") else cfg.data.get("root")
    if adapter.get("factory") is None or not open_keys or cfg.data.get("_target_") != PHOTOS:
        return
    if root is None or not Path(root).is_dir():
        return
    from hawada.data.photos import find_photos

    photos = find_photos(Path(root), cfg.data.test_fraction)
    arguments = dict(adapter.arguments or {})
    is_open = "num_classes" in open_keys and "num_classes" not in arguments
    if is_open and _takes_classes(adapter.factory, arguments, len(photos.classes)):
        adapter.num_classes = len(photos.classes)
    if "image_size" in open_keys and (size := photos.shared_size()):
        adapter.image_size = size[0] if size[0] == size[1] else list(size)


def _takes_classes(factory: str, arguments: dict[str, Any], classes: int) -> bool:
    """Whether a factory takes `num_classes`, which one of any keywords may hand on to something that does not."""
    import torch

    from hawada.adapters.graph import GraphAdapter, import_factory

    parameters = inspect.signature(import_factory(factory)).parameters
    if "num_classes" in parameters or not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return "num_classes" in parameters
    try:
        with torch.device("meta"):  # nothing is computed, and no weights are loaded
            GraphAdapter(factory=factory, arguments=arguments, num_classes=classes).skeleton()
    except TypeError:
        return False
    return True
