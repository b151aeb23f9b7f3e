"""Checkpoints in transformers' format: loaded without misfits, with what lies beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hawada.adapters.huggingface.hub import CHECKPOINT_FORM, brief, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPANION_PATTERNS = (  # files that lie beside a checkpoint's weights and go along with a slim model
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.*"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)


def load_checked(model_class: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """Load as `from_pretrained` does, and refuse what transformers only warns about; the model is in eval mode.

    Args:
        model_class: a model class of transformers, or one of its Auto classes.
        folder: what `fetch` returned.
        options: of `from_pretrained`; without `dtype`, the checkpoint's own is kept.

    Raises:
        ValueError: naming the folder, and the tensors that are missing, unexpected, of another shape or not finite.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable config.json ({brief(error)}); give {CHECKPOINT_FORM}") from None
    check_weights(folder, str(folder))
    _check_family(config, model_class, folder)
    try:
        with quietly():
            model, info = model_class.from_pretrained(
                folder,
                **{"dtype": "auto", **options},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # unset, an Auto class asks on the terminal
                ignore_mismatched_sizes=True,  # info then has them, with both shapes
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{folder} cannot be loaded ({brief(error)}); copy it again, or choose another") from None
    _check_loaded(model, info, folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, image-processor and generation files that lie beside a checkpoint; returns their names."""
    found = sorted(path for pattern in COMPANION_PATTERNS for path in source.glob(pattern))
    target.mkdir(parents=True, exist_ok=True)
    if not source.samefile(target):
        for path in found:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def _check_family(config: dict[str, Any], model_class: Any, folder: Path) -> None:
    """Refuse weights under another name, which may be pickles, and a family whose tensors merely fit the class."""
    explicit = config.get("transformers_weights")
    if explicit is not None and not str(explicit).startswith("model.safetensors"):
        raise ValueError(f"{folder}: config.json names {explicit} as the weights; rename them to model.safetensors")
    family = getattr(getattr(model_class, "config_class", None), "model_type", None)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if family and "model_type" in config and all(part.get("model_type") != family for part in parts):
        raise ValueError(
            f"{folder} is a {config['model_type']}, {model_class.__name__} expects a {family}; choose another model="
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars, and its table of misfits (they are raised, in a sentence), off the screen."""
    from transformers.utils import logging

    transformers_logging: Any = logging  # its functions have no types
    logger = getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()

    def keep(record: LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_loaded(model: Any, info: dict[str, Any], folder: Path) -> None:
    again = "copy or download the checkpoint again"
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} is {tuple(found)} in the file, {tuple(expected)} by config.json; {again}")
    for problem, names in (("lacks", info["missing_keys"]), ("has unexpected", info["unexpected_keys"])):
        if names:
            listed = ", ".join(sorted(names)[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            raise ValueError(
                f"{folder} {problem} tensors for {type(model).__name__}: {listed}; {again}, or choose one that fits"
            )
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and output is not None and output.weight is not embedding.weight:
        raise ValueError(
            f"{folder}: config.json ties the output layer to the embedding, but they differ in the file; "
            "set tie_word_embeddings to false in config.json"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {name} is not finite; {again}")
