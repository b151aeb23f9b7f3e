import json
import logging
import os
import subprocess
import sys
import threading
import time
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hawada.adapters.huggingface import check_source, fetch, hub as hub_module, load_checked
from hawada.adapters.huggingface.hub import find_local, push
from hawada.adapters.huggingface.pretrained import copy_companions

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
UP = "model.layers.0.mlp.up_proj.weight"
BOTH_WAYS = r"connect to the network, or set model\.path to a local folder with config\.json and \*\.safetensors"


def save_llama(folder, *, tied=False, dtype=torch.float32):
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(folder)
    return model


def save_vit(folder):
    model = ViTForImageClassification(ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=3))
    model.save_pretrained(folder)
    return model


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    record = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({name: value for name, value in record.items() if value != "gone"}))


def touch(folder, *names):
    """Make a folder of files of which only the names matter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Set up an empty Hugging Face cache, a token, and a hub that no test may reach unless it replaces the address."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    huggingface_hub.close_session()
    yield tmp_path / "hub"
    huggingface_hub.close_session()


@pytest.fixture
def snapshots(cache):
    """Make a snapshot of owner/name in the cache."""

    def make(revision, *names, age=0.0, main=False):
        folder = touch(cache / "models--owner--name" / "snapshots" / revision, *names)
        os.utime(folder, (time.time() - age,) * 2)
        if main:
            (touch(cache / "models--owner--name" / "refs") / "main").write_text(revision)
        return folder

    return make


@pytest.fixture
def hub(cache, monkeypatch):
    """Serve a hub on this machine that replies to every request with the given status and records the requests."""
    answer = SimpleNamespace(status=200, headers={}, requests=[])

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            answer.requests.append((self.command, self.path, self.headers.get("Authorization")))
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield answer
    server.shutdown()
    server.server_close()


def test_folder_is_found_before_the_cache(tmp_path, snapshots):
    snapshots("a", "config.json", "model.safetensors")
    assert find_local("owner/name") == tmp_path / "hub/models--owner--name/snapshots/a"
    assert find_local(str(touch(tmp_path / "saved", "config.json"))) == tmp_path / "saved"
    assert find_local(str(touch(tmp_path / "other"))) is None
    assert find_local("") is None and find_local("owner/absent") is None and find_local("no repo") is None


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "saved", "config.json")
    assert find_local("~/saved") == tmp_path / "saved"


def test_cached_snapshot_is_what_main_names_and_complete(snapshots):
    old = snapshots("a", "config.json", "model.safetensors", age=100)
    assert find_local("owner/name") == old
    new = snapshots("b", "config.json", "model.safetensors")
    assert find_local("owner/name") == new
    snapshots("a", "config.json", "model.safetensors", age=100, main=True)
    assert (
        find_local("owner/name") == old == Path(huggingface_hub.snapshot_download("owner/name", local_files_only=True))
    )
    snapshots("c", "config.json", main=True)
    assert find_local("owner/name") == new
    snapshots("gone", main=True).rmdir()
    assert find_local("owner/name") == new


def test_finding_a_cached_checkpoint_asks_no_network(snapshots, hub):
    complete = snapshots("a", "config.json", "model.safetensors", main=True)
    assert find_local("owner/name") == complete
    (complete / "model.safetensors").unlink()
    assert find_local("owner/name") is None and find_local("owner/other") is None
    assert not hub.requests


@pytest.mark.parametrize(
    ("shards", "index", "complete"),
    [
        (
            ("m-1.safetensors", "m-2.safetensors"),
            {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}},
            True,
        ),
        (("m-1.safetensors",), {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}, False),
        (("m-1.bin",), {"weight_map": {"a": "m-1.bin"}}, False),
        ((), {"weight_map": {}}, False),
        ((), {}, False),
        ((), [], False),
    ],
)
def test_sharded_snapshot_needs_every_shard(snapshots, shards, index, complete):
    folder = snapshots("a", "config.json", *shards)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_local("owner/name") == (folder if complete else None)


def test_local_checkpoint_needs_no_network(tmp_path, snapshots, monkeypatch):
    monkeypatch.setattr(hub_module, "_head", lambda repo: pytest.fail("asked the network"))
    folder = touch(tmp_path / "saved", "config.json", "model.safetensors")
    cached = snapshots("a", "config.json", "model.safetensors")
    check_source(str(folder))
    check_source("owner/name")
    assert fetch(str(folder)) == folder and fetch("owner/name") == cached


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", r"model\.teacher: '/no/such/folder' does not exist; set it to a local folder with"),
        ("./absent", r"'./absent' does not exist"),
        ("~/absent", r"'~/absent' does not exist"),
        ("a/b/c", r"'a/b/c' does not exist; .*, or to a repository id \(owner/name\)"),
        ("empty", r"'empty' has no config\.json; set it to a local folder"),
        ("file.bin", r"'file\.bin' is not a folder"),
        ("", "no checkpoint is given; set it to a local folder"),
        ("no repo", r"'no repo' is neither a folder nor a repository id \(owner/name\); set it to a local folder"),
        ("owner--name", r"neither a folder nor a repository id"),
    ],
)
def test_wrong_sources(tmp_path, cache, monkeypatch, source, message):
    monkeypatch.chdir(touch(tmp_path / "here", "file.bin"))
    touch(tmp_path / "here" / "empty")
    with pytest.raises(ValueError, match=message):
        check_source(source, key="model.teacher")


def test_pickles_are_refused(tmp_path):
    folder = touch(tmp_path, "config.json", "pytorch_model.bin")
    message = (
        r"has no complete model\.safetensors, and pickles \(\.bin\) are not read; save it anew .*or give a local folder"
    )
    for call in (lambda: check_source(str(folder)), lambda: fetch(str(folder))):
        with pytest.raises(ValueError, match=f"model.path: {folder} {message}"):
            call()
    with pytest.raises(ValueError, match=f"{folder} {message}"):
        load_checked(LlamaForCausalLM, folder)


def test_one_request_with_the_token_asks_for_the_config(hub):
    check_source("owner/name")
    assert hub.requests == [("HEAD", "/owner/name/resolve/main/config.json", "Bearer hf_test")]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            401,
            "GatedRepo",
            r"owner/name is gated, private or misspelt \(401\); connect to the network, accept the licence",
        ),
        (
            403,
            "GatedRepo",
            r"\(403\).* at http://127.*/owner/name and run `hf auth login`, or set model\.path to a local",
        ),
        (401, "RepoNotFound", r"is gated, private or misspelt \(401\)"),
        (403, "", r"is gated, private or misspelt \(403\)"),
        (
            404,
            "RepoNotFound",
            r"owner/name does not exist at http://127.*; correct the name, or set model\.path to a local",
        ),
        (404, "", r"owner/name does not exist at"),
        (
            404,
            "EntryNotFound",
            r"owner/name has no config\.json; choose a repository in transformers' format, or set model",
        ),
        (503, "", rf"cannot be downloaded \(.*503.*\); {BOTH_WAYS}"),
        (429, "", rf"cannot be downloaded \(.*429.*\); {BOTH_WAYS}"),
    ],
)
def test_refusals_of_the_hub(hub, status, code, message):
    hub.status, hub.headers = status, {"X-Error-Code": code} if code else {}
    with pytest.raises(ValueError, match=message) as caught:
        check_source("owner/name")
    assert "\n" not in str(caught.value) and len(hub.requests) == 1


def test_no_network(cache):
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"model\.path: owner/name is not in the Hugging Face cache .*{BOTH_WAYS}"):
        fetch("owner/name")
    assert time.monotonic() - start < 5


def test_slow_network_is_given_up_on(cache, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT_S", 0.1)
    monkeypatch.setattr(hub_module, "_head", lambda repo: done.wait(20))
    with pytest.raises(ValueError, match=rf"cannot be downloaded \(no answer within 0\.1 s\); {BOTH_WAYS}"):
        check_source("owner/name")
    done.set()
    assert hub_module.CONNECT_TIMEOUT_S <= 5


def test_offline_mode_asks_nothing(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"cannot be downloaded \(HF_HUB_OFFLINE is set; unset it\); {BOTH_WAYS}"):
        check_source("owner/name")
    with pytest.raises(ValueError, match=r"cannot be pushed to owner/name \(HF_HUB_OFFLINE is set; unset it\)"):
        push(touch(Path(constants.HF_HUB_CACHE)), "owner/name")
    assert not hub.requests


def test_import_uses_no_network_and_no_transformers():
    code = (
        "import socket, sys\n"
        "def refuse(*arguments): raise SystemExit('network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "import hawada.adapters.huggingface.pretrained\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_download_brings_the_weights_last_and_no_pickles(cache, snapshots, monkeypatch):
    calls = []
    there = ["config.json", "tokenizer.json", "merges.txt", "README.md", "gates.safetensors", "model.safetensors"]
    shunned = ["pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "training_args.bin", "onnx/config.json"]

    def download(repo, *, revision="main", allow_patterns, ignore_patterns=(), local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing is cached under this branch")
        calls.append(repo)
        chosen = huggingface_hub.utils.filter_repo_objects(
            there + shunned, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert revision == ("main" if len(calls) == 1 else "abc")
        return str(snapshots("abc", *chosen))

    monkeypatch.setattr(hub_module, "_head", lambda repo: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = fetch("owner/name")
    assert sorted(path.name for path in folder.iterdir()) == sorted(there)
    assert calls == ["owner/name"] * 2 and fetch("owner/name") == folder and len(calls) == 2


def test_broken_download(cache, snapshots, monkeypatch):
    def download(repo, *, local_files_only=False, **options):
        raise LocalEntryNotFoundError("nothing is cached under this branch") if local_files_only else failure

    failure = OSError(28, "No space left on device")
    monkeypatch.setattr(hub_module, "_head", lambda repo: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=rf"llm\.path: owner/name .*No space left on device\); {BOTH_WAYS[:22]}"):
        fetch("owner/name", key="llm.path")
    failure = HfHubHTTPError("", response=SimpleNamespace(status_code=403, headers={}, request=None))
    with pytest.raises(ValueError, match=r"is gated, private or misspelt \(403\)"):
        fetch("owner/name")
    folder = str(snapshots("abc", "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: folder)
    with pytest.raises(ValueError, match=r"model\.path: owner/name has no complete model\.safetensors"):
        fetch("owner/name")


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("tied", [True, False])
def test_sound_checkpoint_is_loaded_bit_for_bit(tmp_path, tied, model_class):
    saved = save_llama(tmp_path, tied=tied)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    loaded = load_checked(model_class, tmp_path)
    assert type(loaded) is LlamaForCausalLM and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_vision_and_shards(tmp_path):
    saved = save_vit(tmp_path)
    inputs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = saved.eval()(inputs).logits
        assert torch.equal(load_checked(ViTForImageClassification, tmp_path)(inputs).logits, expected)
        saved.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
        assert not (tmp_path / "sharded" / "model.safetensors").exists()
        assert torch.equal(load_checked(ViTForImageClassification, tmp_path / "sharded")(inputs).logits, expected)


def test_dtype_is_the_checkpoints(tmp_path):
    save_llama(tmp_path, dtype=torch.bfloat16)
    assert load_checked(LlamaForCausalLM, tmp_path).dtype == torch.bfloat16
    assert load_checked(LlamaForCausalLM, tmp_path, dtype=torch.float32).dtype == torch.float32
    change_config(tmp_path, dtype="gone")
    assert load_checked(LlamaForCausalLM, tmp_path).dtype == torch.bfloat16


def test_a_head_without_embedding_is_tied_too(tmp_path):
    save_llama(tmp_path, tied=True)
    change_weights(tmp_path, lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    loaded = load_checked(LlamaForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("tied", "change", "message"),
    [
        (
            False,
            lambda s: s.pop(UP),
            f"lacks tensors for LlamaForCausalLM: {UP}; copy or download the checkpoint again",
        ),
        (True, lambda s: s.pop(UP), f"lacks tensors for LlamaForCausalLM: {UP}; .*, or choose one that fits"),
        (False, lambda s: s.pop("lm_head.weight"), r"lacks tensors for LlamaForCausalLM: lm_head\.weight;"),
        (
            True,
            lambda s: s.pop("model.embed_tokens.weight"),
            r"lacks .*: lm_head\.weight, model\.embed_tokens\.weight;",
        ),
        (
            False,
            lambda s: [s.pop(name) for name in list(s) if ".layers.1." in name],
            r"lacks tensors for LlamaForCausalLM: model\.layers\.1\.input_layernorm\.weight, .* and 6 more;",
        ),
        (False, lambda s: s.update(extra=torch.ones(2)), "has unexpected tensors for LlamaForCausalLM: extra;"),
        (False, lambda s: s.update({UP: torch.ones(24, 8)}), rf": {UP} is \(24, 8\) in the file, \(24, 16\) by config"),
        (
            True,
            lambda s: s.update({"model.embed_tokens.weight": torch.ones(30, 16)}),
            r": model\.embed_tokens\.weight is \(30, 16\) in the file, \(32, 16\) by config\.json; copy or download",
        ),
        (
            False,
            lambda s: s[UP][3, 3:4].fill_(torch.nan),
            f": {UP} is not finite; copy or download the checkpoint again",
        ),
        (True, lambda s: s[UP][3, 3:4].fill_(-torch.inf), f": {UP} is not finite"),
        (
            True,
            lambda s: s.update({"lm_head.weight": torch.ones(32, 16)}),
            "ties the output layer to the embedding, but they differ in the file; set tie_word_embeddings to false",
        ),
    ],
)
def test_misfits_are_refused_without_a_table(tmp_path, caplog, tied, change, message):
    save_llama(tmp_path, tied=tied)
    change_weights(tmp_path, change)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    filters = list(logging.getLogger("transformers.modeling_utils").filters)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}") as caught:
        load_checked(LlamaForCausalLM, tmp_path)
    logger.removeHandler(caplog.handler)
    assert "\n" not in str(caught.value) and "LOAD REPORT" not in caplog.text
    assert logging.getLogger("transformers.modeling_utils").filters == filters


def test_overflow_of_a_narrower_dtype_is_refused(tmp_path):
    save_llama(tmp_path)
    change_weights(tmp_path, lambda state: state[UP].fill_(1e6))
    load_checked(LlamaForCausalLM, tmp_path)
    with pytest.raises(ValueError, match=f"{UP} is not finite"):
        load_checked(LlamaForCausalLM, tmp_path, dtype=torch.float16)


def test_vision_misfits(tmp_path):
    save_vit(tmp_path).vit.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"lacks tensors for ViTForImageClassification: classifier\.bias"):
        load_checked(ViTForImageClassification, tmp_path / "base")
    with pytest.raises(ValueError, match=r"classifier\.bias is \(3,\) in the file, \(7,\) by config\.json"):
        load_checked(ViTForImageClassification, tmp_path, num_labels=7)


def test_family_that_merely_fits_is_refused(tmp_path):
    MistralForCausalLM(MistralConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a mistral, LlamaForCausalLM expects a llama; choose another model="):
        load_checked(LlamaForCausalLM, tmp_path)
    assert type(load_checked(AutoModelForCausalLM, tmp_path)) is MistralForCausalLM


def test_weights_by_another_name_are_refused(tmp_path):
    save_llama(tmp_path)
    change_config(tmp_path, transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"names adapter_model\.bin as the weights; rename them to model\.safetensors"):
        load_checked(LlamaForCausalLM, tmp_path)


def test_code_beside_a_checkpoint_is_not_run(tmp_path):
    save_llama(tmp_path)
    change_config(tmp_path, model_type="stranger", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(.* contains custom code .*\); copy it again, or choose another"
    ):
        load_checked(AutoModelForCausalLM, tmp_path)
    with pytest.raises(TypeError, match="trust_remote_code"):
        load_checked(AutoModelForCausalLM, tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("damage", ["truncated", "width"])
def test_damaged_files(tmp_path, damage):
    save_llama(tmp_path)
    if damage == "truncated":
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    else:
        change_config(tmp_path, hidden_size="wide")
    with pytest.raises(
        ValueError, match=rf"{tmp_path} cannot be loaded \(.+\); copy it again, or choose another"
    ) as caught:
        load_checked(LlamaForCausalLM, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "{oops"])
def test_unreadable_config(tmp_path, text):
    save_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no readable config\.json \(.*\); give a local folder with"):
        load_checked(LlamaForCausalLM, tmp_path)


def test_companions_are_copied_and_nothing_else(tmp_path):
    named = ["chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
    source = touch(tmp_path / "source", *named, "config.json", "model.safetensors", "optimizer.bin")
    (source / "vocab.json").symlink_to(touch(tmp_path / "blobs", "1234") / "1234")
    target = tmp_path / "new" / "target"
    assert copy_companions(source, target) == [*named, "vocab.json"]
    assert sorted(path.name for path in target.iterdir()) == [*named, "vocab.json"]
    assert not (target / "vocab.json").is_symlink()
    assert copy_companions(source, source) == [*named, "vocab.json"]


class FakeApi:
    """A stand-in for the hub's client that records its calls."""

    asked: list[tuple[str, object]]
    error: Exception | None = None
    there: tuple[str, ...] = ()

    def list_repo_files(self, repo):
        return [".gitattributes", *self.there]

    def whoami(self):
        if self.error is not None:
            raise self.error

    def create_repo(self, repo, *, private, exist_ok):
        self.asked.append((repo, private, exist_ok))
        return f"http://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, delete_patterns):
        stale = ("model.safetensors", "model-00001-of-00002.safetensors", "gates.safetensors", "modeling_slim.py")
        for name in stale:  # of a model that was there before
            assert any(fnmatchcase(name, pattern) for pattern in delete_patterns)
        assert not any(fnmatchcase("their_own.safetensors", pattern) for pattern in delete_patterns)
        self.asked.append((repo_id, folder_path))

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
        self.asked.append((repo_id, path_or_fileobj, path_in_repo))


@pytest.fixture
def api(cache, monkeypatch):
    fake = FakeApi()
    fake.asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_push_creates_and_uploads(tmp_path, api):
    folder, gates = touch(tmp_path / "slim", "config.json"), touch(tmp_path, "gates.safetensors") / "gates.safetensors"
    assert push(folder, "me/slim", extra=[gates]) == "http://hub/me/slim"
    assert api.asked == [("me/slim", True, True), ("me/slim", folder), ("me/slim", gates, "gates.safetensors")]
    push(folder, "me/slim", private=False)
    assert api.asked[3] == ("me/slim", False, True)


def test_push_leaves_a_repository_alone_that_is_not_its_own(tmp_path, api):
    folder = touch(tmp_path / "slim", "config.json")
    api.there = ("their_own.safetensors",)
    found = (
        r"export\.push_to: me/slim holds their_own\.safetensors and no hawada\.json, so it is not .* give another rep"
    )
    with pytest.raises(ValueError, match=found):
        push(folder, "me/slim")
    assert api.asked == [("me/slim", True, True)]
    api.there = ("their_own.safetensors", "hawada.json")
    push(folder, "me/slim")
    assert api.asked[-1] == ("me/slim", folder)


@pytest.mark.parametrize("repo", ["slim", "a/b/c", "me/s lim", "me--x/slim"])
def test_push_needs_a_repository_id(tmp_path, api, repo):
    with pytest.raises(
        ValueError, match=f"cannot be pushed to '{repo}', which is not a repository id; give owner/name"
    ):
        push(tmp_path, repo)


def test_push_needs_its_files(tmp_path, api):
    for folder, extra in ((tmp_path / "absent", ()), (tmp_path, [tmp_path / "absent"])):
        with pytest.raises(
            ValueError, match="absent does not exist, so it cannot be pushed to me/slim; export the model"
        ):
            push(folder, "me/slim", extra=extra)
    assert not api.asked


def test_push_refused(tmp_path, api):
    api.error = OSError("403 Forbidden:\n no write token")
    message = (
        r"cannot be pushed to me/slim \(403 Forbidden: no write token\); "
        "connect to the network and run `hf auth login` with a token that may write there"
    )
    with pytest.raises(ValueError, match=message):
        push(tmp_path, "me/slim")
    api.error, api.create_repo = None, lambda *arguments, **options: (_ for _ in ()).throw(OSError("no"))
    with pytest.raises(ValueError, match=r"cannot be pushed to me/slim \(no\); connect to the network and run"):
        push(tmp_path, "me/slim")


def test_push_without_token_or_network(tmp_path, cache, monkeypatch):
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"cannot be pushed to me/slim \(.+\); connect to the network and run `hf auth"
    ):
        push(tmp_path, "me/slim")
    assert time.monotonic() - start < 5
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(
        ValueError, match=r"cannot be pushed to me/slim \(no token is stored here\); connect to the network"
    ):
        push(tmp_path, "me/slim")
