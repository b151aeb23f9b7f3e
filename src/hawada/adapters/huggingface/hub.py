"""Checkpoints on this machine and on the Hugging Face Hub: found, fetched, pushed. Imports no torch."""

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
from huggingface_hub.utils import validate_repo_id

WANTED = "a local folder with config.json and *.safetensors"
BESIDE_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*", "gates.safetensors"]
# Files of a model that was pushed to a repository before, and its mark: nothing else there is deleted.
STALE = ["model*.safetensors", "gates.safetensors", "*.safetensors.index.json", "modeling_slim.py"]
MARK = "hawada.json"
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
    return next((path for path in _snapshots(source) if (path / "config.json").is_file() and _has_weights(path)), None)


def _snapshots(repo: str) -> Iterator[Path]:
    """A repository's snapshots in the Hugging Face cache: what `main` last pointed to, then the newest first."""
    with suppress(LocalEntryNotFoundError):  # only the config: whether all weights are there is checked by their index
        yield Path(huggingface_hub.snapshot_download(repo, local_files_only=True, allow_patterns=["config.json"]))
    # The library finds snapshots by the branch alone, and that may point to one whose download was interrupted.
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    yield from sorted(cached.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)


def check_push(repo: str) -> None:
    """Check what can be checked of a later `push` without the network.

    Raises:
        ValueError: when the id is wrong or no token is stored.
    """
    if not _is_repo_id(repo) or "/" not in repo:
        raise ValueError(f"export.push_to: {repo!r} is not a repository id; give owner/name")
    if not huggingface_hub.get_token():
        raise ValueError(f"export.push_to: no token is stored here to push to {repo}; run `hf auth login` first")


def check_source(source: str | None, *, key: str = "model.path") -> None:
    """Check quickly that `fetch(source)` will find a checkpoint; nothing is loaded or downloaded.

    Raises:
        ValueError: naming the ways out (the network, logging in, a local folder) for `key`, the user's setting.
    """
    if not source:
        raise ValueError(f"{key}: no checkpoint is given; set it to {WANTED}, or to a repository id (owner/name)")
    local = find_local(source)
    if local is not None:
        return check_weights(local, f"{key}: {local}")
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
    check_weights(folder, f"{key}: {source}")
    return folder


def push(folder: Path, repo: str, *, extra: Sequence[Path] = (), private: bool = True) -> str:
    """Upload a folder, and further files to the top of the repository; returns the repository's address.

    Args:
        folder: a saved model.
        repo: owner/name; created if missing.
        extra: the further files.
        private: for a repository that is created; one that exists stays as it is.

    Raises:
        ValueError: when a file or the token is missing, the id is wrong, the repository holds something else than a
            model that was pushed before, or the hub refuses or cannot be reached.
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
            if there and MARK not in there:
                raise FileExistsError(f"it holds {there[0]} and no {MARK}, so it is not this program's; give another")
            api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=STALE)
            for path in extra:
                api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
            return str(address)
        except Exception as refusal:  # as in fetch
            error = refusal
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
        reason = f"is not in the Hugging Face cache and cannot be downloaded ({brief(error)})"
        remedy = "connect to the network"
    return ValueError(f"{key}: {repo} {reason}; {remedy}, or set {key} to {WANTED}")


def brief(error: Exception) -> str:
    """An exception's text, short enough for a sentence."""
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


def check_weights(folder: Path, place: str) -> None:
    """Check that a folder has all its weights as safetensors.

    Raises:
        ValueError: beginning with `place`.
    """
    if not _has_weights(folder):
        raise ValueError(
            f"{place} has no complete model.safetensors, and pickles (.bin) are not read; "
            f"save it anew with transformers' save_pretrained, or give {WANTED}"
        )
