"""Find, fetch and push checkpoints, on this machine and on the Hugging Face Hub; this module imports no torch."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined, unused-ignore]  # exported without __all__

CHECKPOINT_FORM = "a local folder with config.json and *.safetensors"
COMPANION_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "gates.safetensors"]
# A push deletes only files of these names, and only in a repository that holds MANIFEST_NAME: a model that was pushed
# there before left them.
REPLACED_PATTERNS = ["model*.safetensors", "gates.safetensors", "*.safetensors.index.json", "modeling_slim.py"]
MANIFEST_NAME = "hawada.json"
CONNECT_TIMEOUT_S = 5
HUB_TIMEOUT_S = 8  # of a whole call: CONNECT_TIMEOUT_S limits neither the resolver nor the tries on several addresses


def find_local(source: str) -> Path | None:
    """Find the folder of a checkpoint that is on this machine, without the network; None where there is none.

    Args:
        source: A folder with a config.json, or a repository id. Of a repository's snapshots in the Hugging Face cache,
            the one that `main` last pointed to is taken if all its weights are there, else the newest that has them.
    """
    folder = Path(os.path.expanduser(source))
    if source and (folder / "config.json").is_file():
        return folder
    if not _is_repo_id(source):
        return None
    return next((path for path in _snapshots(source) if (path / "config.json").is_file() and _has_weights(path)), None)


def _snapshots(repo: str) -> Iterator[Path]:
    """Iterate over a repository's cached snapshots: the one that `main` last pointed to, then the newest first."""
    with suppress(
        LocalEntryNotFoundError
    ):  # only the config is required here; the index of the weights is checked later
        yield Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=["config.json"]))
    # The library finds snapshots by the branch alone, and that may point to one whose download was interrupted.
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    yield from sorted(cached.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)


def check_push(repo: str) -> None:
    """Check what can be checked of a later `push` without the network.

    Raises:
        ValueError: The id is wrong, or no token is stored.
    """
    if not _is_repo_id(repo) or "/" not in repo:
        raise ValueError(f"export.push_to: {repo!r} is not a repository id; give owner/name")
    if not huggingface_hub.get_token():
        raise ValueError(f"export.push_to: no token is stored here to push to {repo}; run `hf auth login` first")


def check_source(source: str | None, *, key: str = "model.path") -> None:
    """Check quickly that `fetch(source)` will find a checkpoint; nothing is loaded or downloaded.

    Raises:
        ValueError: No checkpoint will be found; the message names `key`, the user's setting, and the remedies (the
            network, logging in, a local folder).
    """
    if not source:
        raise ValueError(
            f"{key}: no checkpoint is given; set it to {CHECKPOINT_FORM}, or to a repository id (owner/name)"
        )
    local = find_local(source)
    if local is not None:
        return check_weights(local, f"{key}: {local}")
    path = Path(os.path.expanduser(source))
    if path.exists() or source.startswith(("/", ".", "~")) or source.replace(os.sep, "/").count("/") > 1:
        reason = "does not exist" if not path.exists() else "has no config.json" if path.is_dir() else "is not a folder"
        raise ValueError(f"{key}: {source!r} {reason}; set it to {CHECKPOINT_FORM}, or to a repository id (owner/name)")
    if not _is_repo_id(source):
        raise ValueError(
            f"{key}: {source!r} is neither a folder nor a repository id (owner/name); set it to {CHECKPOINT_FORM}"
        )
    error = _failure(lambda: _head(source))
    if error is not None:
        raise _unavailable(source, error, key)


def fetch(source: str, *, key: str = "model.path") -> Path:
    """Return the local folder of a checkpoint, after downloading it to the Hugging Face cache where it is missing.

    Raises:
        ValueError: `check_source` refuses the source, the download breaks off, or it brings no safetensors.
    """
    check_source(source, key=key)
    local = find_local(source)
    if local is not None:
        return local
    download = huggingface_hub.snapshot_download
    try:
        # Weights last: a snapshot that has them has everything, even when a download was interrupted.
        small = Path(download(source, allow_patterns=COMPANION_PATTERNS, ignore_patterns=["*/*"]))
        folder = Path(download(source, revision=small.name, allow_patterns=["model*.safetensors"]))
    except Exception as error:  # its class depends on the version of huggingface_hub, and the disk may fail too
        raise _unavailable(source, error, key) from None
    check_weights(folder, f"{key}: {source}")
    return folder


def push(folder: Path, repo: str, *, extra: Sequence[Path] = (), private: bool = True) -> str:
    """Upload a folder, and further files to the top of the repository, and return the repository's address.

    Args:
        folder: The folder of a saved model.
        repo: The repository as owner/name, which is created if it is missing.
        extra: The further files.
        private: Whether a repository that is created is private; one that exists stays as it is.

    Raises:
        ValueError: A file or the token is missing, the id is wrong, the repository holds something else than a model
            that was pushed before, or the hub refuses or cannot be reached.
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
            there = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
            foreign = there[0] if there and MANIFEST_NAME not in there else None
            if foreign is None:
                api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=REPLACED_PATTERNS)
                for path in extra:
                    api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
                return str(address)
        except Exception as refusal:  # its class depends on the version of huggingface_hub
            error = refusal
        else:
            raise ValueError(
                f"export.push_to: {repo} holds {foreign} and no {MANIFEST_NAME}, so it is not this program's; "
                "give another repository"
            )
    raise ValueError(
        f"{folder} cannot be pushed to {repo} ({brief(error)}); "
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
    huggingface_hub.get_hf_file_metadata(url, token=huggingface_hub.get_token(), timeout=CONNECT_TIMEOUT_S)


def _failure(call: Callable[[], object]) -> Exception | None:
    """Return what a call to the hub raises, or None; it is a TimeoutError when HUB_TIMEOUT_S are over."""
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
    thread.join(HUB_TIMEOUT_S)
    return failures[0] if failures else TimeoutError(f"no answer within {HUB_TIMEOUT_S} s")


def _unavailable(repo: str, error: Exception, key: str) -> ValueError:
    """Make one sentence of the error that the hub or the network returned."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        reason = f"is gated, private or misspelt ({status})"
        remedy = f"connect to the network, accept the licence at {constants.ENDPOINT}/{repo} and run `hf auth login`"
    elif status == 404 and isinstance(error, EntryNotFoundError):
        reason, remedy = "has no config.json", "choose a repository in transformers' format"
    elif status == 404:
        reason, remedy = f"does not exist at {constants.ENDPOINT}", "correct the name"
    else:
        reason = f"is not in the Hugging Face cache and cannot be downloaded ({brief(error)})"
        remedy = "connect to the network"
    return ValueError(f"{key}: {repo} {reason}; {remedy}, or set {key} to {CHECKPOINT_FORM}")


def brief(error: Exception) -> str:
    """Shorten an exception's text so that it fits into a sentence."""
    return textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".") or type(error).__name__


def _has_weights(folder: Path) -> bool:
    """Return whether model.safetensors is there, or every shard that its index names, none of them a pickle."""
    if (folder / "model.safetensors").is_file():
        return True
    try:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all(name.endswith(".safetensors") and (folder / name).is_file() for name in shards)


def check_weights(folder: Path, place: str) -> None:
    """Check that a folder has all its weights as safetensors.

    Raises:
        ValueError: A file of the weights is missing or is a pickle; the message begins with `place`.
    """
    if not _has_weights(folder):
        raise ValueError(
            f"{place} has no complete model.safetensors, and pickles (.bin) are not read; "
            f"save it anew with transformers' save_pretrained, or give {CHECKPOINT_FORM}"
        )
