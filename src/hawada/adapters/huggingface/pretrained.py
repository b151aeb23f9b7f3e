"""Checkpoints in transformers' format: found on this machine or downloaded, loaded without misfits, pushed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WANTED = "a local folder with config.json and *.safetensors"
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.*"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "gates.safetensors"]
CONNECT_SECONDS = 5
ANSWER_SECONDS = 8  # CONNECT_SECONDS does not limit a resolver, nor the tries on several addresses


def find_local(source: str) -> Path | None:
    """The folder of a checkpoint that is on this machine; the network is not used.

    Args:
        source: a folder with a config.json, or a repository id: of its snapshots in the Hugging Face cache the one that
            `main` last pointed to is taken if all weights are there, else the newest that has them all.
    """
    folder = Path(os.path.expanduser(source))
    if source and (folder / "config.json").is_file():
        return folder
    if not _is_repo_id(source):
        return None
    cached = Path(constants.HF_HUB_CACHE, "--".join(["models", *source.split("/")]))
    snapshots = sorted(cached.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
    if (cached / "refs/main").is_file():
        snapshots.insert(0, cached / "snapshots" / (cached / "refs/main").read_text().strip())
    return next((path for path in snapshots if (path / "config.json").is_file() and _has_weights(path)), None)


def check_source(source: str, *, key: str = "model.path") -> None:
    """Check quickly that `fetch(source)` will find a checkpoint; nothing is loaded or downloaded.

    Raises:
        ValueError: naming the ways out (the network, logging in, a local folder) for `key`, the user's setting.
    """
    local = find_local(source)
    if local is not None:
        return _check_weights(local, f"{key}: {local}")
    path = Path(os.path.expanduser(source))
    if path.exists() or source.startswith(("/", ".", "~")) or source.replace(os.sep, "/").count("/") > 1:
        reason = "does not exist" if not path.exists() else "has no config.json" if path.is_dir() else "is not a folder"
        raise ValueError(f"{key}: {source!r} {reason}; set it to {WANTED}, or to a repository id (owner/name)")
    if not _is_repo_id(source):
        raise ValueError(f"{key}: {source!r} is neither a folder nor a repository id (owner/name); set it to {WANTED}")
    error = _failure(lambda: _head(source))
    if error is not None:
        raise _unavailable(source, error, key)


def fetch(source: str, *, key: str = "model.path") -> Path:
    """The local folder of a checkpoint, downloaded to the Hugging Face cache when it is not on this machine.

    Raises:
        ValueError: as `check_source`, and when the download breaks off or brings no safetensors.
    """
    check_source(source, key=key)
    local = find_local(source)
    if local is not None:
        return local
    download = huggingface_hub.snapshot_download
    try:
        # Weights last: a snapshot that has them has everything, even when a download was interrupted.
        small = Path(download(source, allow_patterns=BESIDE_WEIGHTS, ignore_patterns=["*/*"]))
        folder = Path(download(source, revision=small.name, allow_patterns=["model*.safetensors"]))
    except Exception as error:  # httpx's or httpx2's, by the version of huggingface_hub, or the disk's
        raise _unavailable(source, error, key) from None
    _check_weights(folder, f"{key}: {source}")
    return folder


def load_checked(model_class: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained` that refuses what transformers only warns about; the model is in eval mode.

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
        raise ValueError(f"{folder} has no readable config.json ({_brief(error)}); give {WANTED}") from None
    _check_weights(folder, str(folder))
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
        raise ValueError(f"{folder} cannot be loaded ({_brief(error)}); copy it again, or choose another") from None
    _check_loaded(model, info, folder)
    return model.eval()


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer, image-processor and generation files that lie beside a checkpoint; returns their names."""
    found = sorted(path for pattern in COMPANIONS for path in source.glob(pattern))
    target.mkdir(parents=True, exist_ok=True)
    if not source.samefile(target):
        for path in found:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def push(folder: Path, repo: str, *, extra: Sequence[Path] = (), private: bool = True) -> str:
    """Upload a folder, and further files to the top of the repository; returns the repository's address.

    Args:
        folder: a saved model.
        repo: owner/name; created if missing.
        extra: the further files.
        private: for a repository that is created; one that exists stays as it is.

    Raises:
        ValueError: when a file or the token is missing, the id is wrong, or the hub refuses or cannot be reached.
    """
    missing = [path for path in extra if not path.is_file()] + ([] if folder.is_dir() else [folder])
    if missing:
        raise ValueError(f"{missing[0]} does not exist, so it cannot be pushed to {repo}; export the model first")
    if not _is_repo_id(repo) or "/" not in repo:
        raise ValueError(f"{folder} cannot be pushed to {repo!r}, which is not a repository id; give owner/name")
    api = huggingface_hub.HfApi()
    # whoami is quick to fail without network, where an upload would go on trying
    error = _failure(api.whoami) if huggingface_hub.get_token() else OSError("no token is stored here")
    if error is None:
        try:
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder)
            for path in extra:
                api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
            return str(address)
        except Exception as refusal:  # as in fetch
            error = refusal
    raise ValueError(
        f"{folder} cannot be pushed to {repo} ({_brief(error)}); "
        "connect to the network and run `hf auth login` with a token that may write there"
    )


def _is_repo_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _head(repo: str) -> None:
    """Ask for the config's headers, once, with the client that would download it (its proxies and certificates)."""
    url = f"{constants.ENDPOINT}/{repo}/resolve/main/config.json"
    huggingface_hub.get_hf_file_metadata(url, token=huggingface_hub.get_token(), timeout=CONNECT_SECONDS)


def _failure(call: Callable[[], object]) -> Exception | None:
    """What a call to the hub raises; a TimeoutError when it has not ended after ANSWER_SECONDS."""
    if constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set; unset it")
    failures: list[Exception | None] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)
        else:
            failures.append(None)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return failures[0] if failures else TimeoutError(f"no answer within {ANSWER_SECONDS} s")


def _unavailable(repo: str, error: Exception, key: str) -> ValueError:
    """The sentence for what the hub or the network answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        reason = f"is gated, private or misspelt ({status})"
        remedy = f"connect to the network, accept the licence at {constants.ENDPOINT}/{repo} and run `hf auth login`"
    elif status == 404 and isinstance(error, EntryNotFoundError):
        reason, remedy = "has no config.json", "choose a repository in transformers' format"
    elif status == 404:
        reason, remedy = f"does not exist at {constants.ENDPOINT}", "correct the name"
    else:
        reason = f"is not in the Hugging Face cache and cannot be downloaded ({_brief(error)})"
        remedy = "connect to the network"
    return ValueError(f"{key}: {repo} {reason}; {remedy}, or set {key} to {WANTED}")


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".") or type(error).__name__


def _has_weights(folder: Path) -> bool:
    """Whether model.safetensors is there, or every shard that its index names, none of them a pickle."""
    if (folder / "model.safetensors").is_file():
        return True
    try:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all(name.endswith(".safetensors") and (folder / name).is_file() for name in shards)


def _check_weights(folder: Path, place: str) -> None:
    if not _has_weights(folder):
        raise ValueError(
            f"{place} has no complete model.safetensors, and pickles (.bin) are not read; "
            f"save it anew with transformers' save_pretrained, or give {WANTED}"
        )


def _check_family(config: dict[str, Any], model_class: Any, folder: Path) -> None:
    """Refuse weights under another name, which may be pickles, and a family whose tensors merely fit the class."""
    explicit = config.get("transformers_weights")
    if explicit is not None and not str(explicit).startswith("model.safetensors"):
        raise ValueError(f"{folder}: config.json names {explicit} as the weights; rename them to model.safetensors")
    family = getattr(getattr(model_class, "config_class", None), "model_type", None)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    if family and "model_type" in config and all(part.get("model_type") != family for part in parts):
        raise ValueError(
            f"{folder} is a {config['model_type']}, {model_class.__name__} wants a {family}; choose another model="
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars, and its table of misfits (they are raised, in a sentence), off the screen."""
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_loaded(model: PreTrainedModel, info: dict[str, Any], folder: Path) -> None:
    again = "copy or download the checkpoint again"
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{folder}: {name} is {tuple(found)} in the file, {tuple(wanted)} by config.json; {again}")
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
