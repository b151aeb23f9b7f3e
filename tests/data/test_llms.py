import bz2
import gzip
import http.server
import json
import lzma
import threading
import time
from functools import partial
from inspect import signature
from itertools import islice
from pydoc_data.topics import topics

import datasets
import numpy as np
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hawada.data import corpus, llms
from hawada.data.corpus import articles, docstrings, held_out, interpreter_texts, paragraphs, reachable
from hawada.data.sequences import PackedTokens

LIMIT = sum(len(text.encode()) for text in topics.values()) + 60_000  # all of pydoc's topics and some modules
WORDS = ["river", "stone", "Wörter", "house", "light", "seven", "under"]


def byte_tokenizer(eos="<eos>"):
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def everything(loader):
    inputs, labels = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


def prose(seed, count):
    """Documents of 40 to 90 words, all different."""
    rng = np.random.default_rng(seed)
    return [f"{seed}.{index}: {' '.join(rng.choice(WORDS, rng.integers(40, 90)))}" for index in range(count)]


def write(folder, name, documents):
    """Write a file of the kind that its suffix names; in .txt the documents are long enough to be cut apart again."""
    path, kind = folder / name, name.split(".")[1]
    path.parent.mkdir(exist_ok=True)
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": documents, "length": list(map(len, documents))}).to_parquet(path)
        return path
    rows = documents if kind == "txt" else [json.dumps({"text": text, "length": len(text)}) for text in documents]
    data = ("\n\n" if kind == "txt" else "\n").join([*rows, ""]).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def library(tokenizer):
    return llms.stdlib(tokenizer=tokenizer, sequence_length=64, limit_bytes=LIMIT)


@pytest.fixture
def make(tokenizer):
    """`text` with short sequences."""
    return lambda path, **options: llms.text(
        **{"tokenizer": tokenizer, "path": str(path), "sequence_length": 32, **options}
    )


def as_tokens(text, tokenizer):
    """What packing makes of a text whose documents a NUL byte separates."""
    parts = [tokenizer(part.decode(), add_special_tokens=False)["input_ids"] for part in text.split(b"\0")]
    joined = parts[0]
    for part in parts[1:]:
        joined = [*joined, tokenizer.eos_token_id, *part]
    return torch.tensor(joined)


def test_batches_are_token_ids_and_the_ids_after_them(library):
    loaders = (library.train_loader(8, 0), library.calibration_loader(8, 20), library.test_loader(8))
    for inputs, labels in (batch for loader in loaders for batch in list(loader)[:-1]):
        assert inputs.shape == labels.shape == (8, 64) == (8, library.sequence_length)
        assert inputs.dtype == labels.dtype == torch.int64 and inputs.is_contiguous() and labels.is_contiguous()
        assert torch.equal(labels[:, :-1], inputs[:, 1:])
        assert int(inputs.min()) >= 0 and int(inputs.max()) < library.vocabulary == 257
    assert library.metric == "perplexity"


def test_training_windows_follow_each_other_without_a_gap(library, tokenizer):
    inputs, labels = library.train.__getitems__(range(len(library.train)))
    tokens = as_tokens(library.byte_splits()[0], tokenizer)
    assert len(library.train) == (len(tokens) - 1) // 64
    assert torch.equal(inputs.flatten(), tokens[: len(library.train) * 64])
    assert torch.equal(labels.flatten(), tokens[1 : len(library.train) * 64 + 1])


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_every_test_token_is_counted_once(library, tokenizer, batch_size):
    inputs, labels = everything(library.test_loader(batch_size))
    tokens = as_tokens(library.byte_splits()[1], tokenizer)
    counted = labels != -100
    assert torch.equal(labels[counted], tokens[1:])
    assert torch.equal(inputs[counted], tokens[:-1])
    assert counted[:-1].all() and len(library.test) == len(library.test_loader(1))


@pytest.mark.parametrize(("size", "windows", "missing"), [(9, 2, 0), (10, 3, 3), (12, 3, 1), (2, 1, 3), (1, 0, 0)])
def test_the_last_test_window_is_padded_and_the_padding_is_no_label(size, windows, missing):
    packed = PackedTokens(np.arange(size, dtype=np.int32), 4, pad=99)
    assert len(packed) == windows
    inputs, labels = packed.__getitems__(range(windows))
    assert int((labels == -100).sum()) == missing
    assert labels[labels != -100].tolist() == list(range(1, size))
    assert inputs.flatten().tolist() == [*range(size)][: windows * 4] + [99] * (windows * 4 - size)


@pytest.mark.parametrize(("size", "windows"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_training_window_that_is_not_full_is_dropped(size, windows):
    packed = PackedTokens(np.arange(size, dtype=np.int32), 4)
    assert len(packed) == windows
    assert packed.__getitems__(range(windows))[1].flatten().tolist() == list(range(1, windows * 4 + 1))


def test_a_tokenizer_without_an_end_of_sequence_joins_by_nothing_and_pads_with_zero(tmp_path, make):
    path = write(tmp_path, "a.jsonl", prose(0, 60))
    data = make(path, tokenizer=byte_tokenizer(eos=None))
    train, test = data.byte_splits()
    assert b"\0" not in train + test and (data.train.size, data.test.size) == (len(train), len(test))
    inputs, labels = everything(data.test_loader(4))
    assert (inputs[-1][labels[-1] == -100][1:] == 0).all()


def test_bytes_and_byte_tokens_are_as_many(library):
    assert tuple(map(len, library.byte_splits())) == (library.train.size, library.test.size)


def test_an_order_depends_on_seed_and_epoch_alone(library):
    def epochs(seed, noise):
        torch.manual_seed(noise)
        loader = library.train_loader(64, seed)
        return [list(loader) for _ in range(2)]

    first, again, other = epochs(1, 0), epochs(1, 99), epochs(2, 0)
    assert same(first[0], again[0]) and same(first[1], again[1])
    assert not same(first[0], first[1]) and not same(first[0], other[0])


def test_an_epoch_shows_every_training_sequence_once(library):
    loader = library.train_loader(64, 5)
    everyone = sorted(library.train.__getitems__(range(len(library.train)))[0].tolist())
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) and sorted(everything(batches)[0].tolist()) == everyone


def test_iterating_leaves_the_global_generator_alone(library):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for loader in (library.train_loader(512, 0), library.test_loader(512), library.calibration_loader(4, 8)):
        list(loader)
    assert torch.equal(torch.rand(3), expected)


def test_a_resumed_run_sees_the_batches_that_it_would_have_seen(tmp_path, make):
    data = make(write(tmp_path, "a.jsonl", prose(0, 20)))
    loader = data.train_loader(50, 3)
    run = [batch for _ in range(3) for batch in loader]
    for start in range(len(run)):
        resumed = data.train_loader(50, 3, start=start)
        rest = [list(resumed) for _ in range(start // len(loader), 3)]
        assert same([batch for epoch in rest for batch in epoch], run[start:])
        assert len(resumed) == len(loader) and len(rest[0]) == len(loader) - start % len(loader)


def test_a_loop_that_breaks_off_goes_on_where_it_was(tmp_path, make):
    data = make(write(tmp_path, "a.jsonl", prose(0, 20)))
    whole, broken = data.train_loader(50, 3), data.train_loader(50, 3)
    expected = [batch for _ in range(2) for batch in whole]
    seen = []
    while len(seen) < len(expected):
        seen += islice(broken, 3)
    assert len(whole) > 3 and same(seen, expected)


def test_calibration_is_the_same_training_sequences_every_time(library):
    inputs, labels = everything(library.calibration_loader(16, 40))
    again, _ = everything(library.calibration_loader(9, 40))
    assert torch.equal(inputs, again) and len(inputs) == 40
    train = set(map(tuple, library.train.__getitems__(range(len(library.train)))[0].tolist()))
    assert set(map(tuple, inputs.tolist())) <= train
    assert (labels != -100).all()


def test_the_library_is_deterministic_and_split_by_document(library, tokenizer):
    again = llms.stdlib(tokenizer=tokenizer, sequence_length=64, limit_bytes=LIMIT)
    assert again.byte_splits() == library.byte_splits()
    train, test = (text.decode().split("\0") for text in library.byte_splits())
    assert not set(train) & set(test) and set(train) | set(test) <= set(interpreter_texts(LIMIT))
    assert all(held_out(text, 0.05) for text in test) and not any(held_out(text, 0.05) for text in train)


def test_the_share_of_documents_held_out_is_what_was_asked_for():
    documents = prose(0, 4000)
    for fraction in (0.05, 0.5):
        assert sum(held_out(text, fraction) for text in documents) / 4000 == pytest.approx(fraction, rel=0.2)
    assert {text for text in documents if held_out(text, 0.05)} < {text for text in documents if held_out(text, 0.5)}


def test_the_library_has_topics_and_docstrings_within_the_limit():
    texts = list(interpreter_texts(LIMIT))
    assert LIMIT // 2 < sum(len(text.encode()) for text in texts) <= LIMIT
    assert any('The "assert" statement' in text for text in texts)
    assert any("Abstract Base Classes (ABCs)" in text for text in texts)
    assert len(list(interpreter_texts(20_000))) < len(texts)


def test_modules_are_parsed_without_tests_and_site_packages(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "test/c.py", "site-packages/d.py", "pack/tests/e.py", "pack/f.py", "data.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""About {name}."""\nraise SystemExit\ndef f():\n    """Everywhere."""\n')
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    texts = list(interpreter_texts(10_000_000))
    assert texts[-3:] == ["About a.py.\n\nEverywhere.", "About b.py.", "About pack/f.py."]
    assert not any("About test" in text or "About site" in text or "tests" in text for text in texts[-3:])


def test_docstrings_come_in_the_order_of_the_source():
    source = (
        b'"""m"""\nclass A:\n    """a"""\n    def f(self):\n        """f"""\nasync def g():\n    """g"""\nx = "\\d"\n'
    )
    assert docstrings(source) == ["m", "a", "f", "g"]
    assert docstrings(b"print 'no'") == [] == docstrings(b"\xff\xfe")


def test_running_text_is_cut_at_blank_lines_once_it_is_long_enough():
    lines = [f"line {index} {'x' * 90}" if index % 3 else "" for index in range(120)]
    documents = list(filter(None, paragraphs(lines)))
    assert len(documents) > 2 and all("\n\n" in document for document in documents)
    assert all(2000 <= len(document) + 2 < 2300 for document in documents[:-1])
    assert "".join(documents).replace("\n", "") == "".join(lines)


def test_running_text_without_blank_lines_is_cut_at_lines():
    documents = list(paragraphs(["y" * 99] * 250))
    assert [len(document) for document in documents] == [9999, 9999, 4999]


def test_articles_run_from_title_to_title():
    lines = ["", " = One = \n", "", " = = Part = = \n", " text \n", " = Two Three = ", " more "]
    assert list(filter(None, articles(lines))) == ["= One = \n\n = = Part = = \n text", "= Two Three = \n more"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet", "[odd] *.jsonl", "latest.jsonl"]
)
def test_a_row_is_a_document_in_every_format(tmp_path, make, name):
    documents = prose(0, 80)
    train, test = (text.decode().split("\0") for text in make(write(tmp_path, name, documents)).byte_splits())
    assert train == [document for document in documents if not held_out(document, 0.05)]
    assert test == [document for document in documents if held_out(document, 0.05)] != []


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_is_read_whole(tmp_path, make, name):
    documents = [f"{text}\n\n{'long ' * 400}".strip() for text in prose(0, 40)]
    data = make(write(tmp_path, name, documents), test_fraction=0.3)
    train, test = (text.decode().split("\0") for text in data.byte_splits())
    assert sorted(train + test) == sorted(documents) and len(test) > 3
    assert train == [document for document in documents if document in train]


def test_another_column_can_be_named(tmp_path, make):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text, "text": 1}) + "\n" for text in prose(0, 60)))
    assert b"0.7: " in b"".join(make(path, column="body").byte_splits())


def test_rows_without_text_are_skipped(tmp_path, make):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [None, "  ", "", *prose(0, 60)]))
    train, test = make(path).byte_splits()
    assert sorted((train + b"\0" + test).decode().split("\0")) == sorted(prose(0, 60))


@pytest.mark.parametrize(
    ("names", "tests"),
    [
        (["a.jsonl", "b_test.jsonl"], [1]),
        (["a.jsonl", "b-valid.jsonl"], [1]),
        (["a.jsonl", "dev-b.jsonl", "develop.jsonl"], [1]),
        (["train.jsonl", "validation-0.jsonl", "TEST-0.jsonl", "test-1.jsonl"], [2, 3]),
        (["train/0.jsonl", "test/0.jsonl"], [1]),
        (["contest.jsonl", "invalid.jsonl", "testset.jsonl", "testimony.jsonl"], [2]),
    ],
)
def test_files_named_test_are_the_test_split(tmp_path, make, names, tests):
    for index, name in enumerate(names):
        write(tmp_path, name, prose(index, 10))
    trained, tested = (text.decode() for text in make(tmp_path).byte_splits())
    validation = {index for index, name in enumerate(names) if name.startswith("validation")}
    for index in range(len(names)):
        assert (f"{index}.3: " in tested) == (index in tests)
        assert (f"{index}.3: " in trained) == (index not in {*tests, *validation})


def test_a_file_named_test_alone_is_split(tmp_path, make):
    data = make(write(tmp_path, "my_test.jsonl", prose(0, 80)))
    assert len(data.train) > len(data.test) > 0


def test_a_glob_chooses_files(tmp_path, make):
    for name in ("a0.jsonl", "a1.jsonl", "b0.jsonl"):
        write(tmp_path, name, prose(int(name == "b0.jsonl") + 2 * int(name == "a1.jsonl"), 40))
    text = b"".join(make(tmp_path / "a*.jsonl").byte_splits())
    assert b"0.3: " in text and b"2.3: " in text and b"1.3: " not in text


def test_wikitext_from_local_files_is_articles(tmp_path, tokenizer):
    for part in ("train", "test", "valid"):
        pages = [f" = {part} {index} = \n \n {text} \n" for index, text in enumerate(prose(0, 5))]
        (tmp_path / f"wiki_{part}.txt.gz").write_bytes(gzip.compress(" \n".join(pages).encode()))
    data = llms.wikitext(tokenizer=tokenizer, sequence_length=16, path=str(tmp_path))
    for text, part in zip(data.byte_splits(), ("train", "test"), strict=True):
        assert [page.split("\n")[0] for page in text.decode().split("\0")] == [f"= {part} {i} = " for i in range(5)]


def test_samples_are_the_first_sequences_and_leave_the_test_split_alone(tmp_path, make):
    path = write(tmp_path, "a.jsonl", prose(0, 700))
    whole, few = make(path), make(path, samples=30)
    assert len(few.train) == 30 < len(whole.train)
    assert np.array_equal(few.train.tokens, whole.train.tokens[: 30 * 32 + 1])
    assert np.array_equal(few.test.tokens, whole.test.tokens)
    assert whole.byte_splits()[0].startswith(few.byte_splits()[0])
    assert few.train.size <= len(few.byte_splits()[0]) < few.train.size + 1000


def test_a_stream_is_read_no_further_than_needed(tmp_path, make, monkeypatch):
    path = write(tmp_path, "a.jsonl", prose(0, 700))
    whole, read = make(path), []
    original = corpus.read_rows
    monkeypatch.setattr(
        corpus, "read_rows", lambda *args, **options: (read.append(row) or row for row in original(*args, **options))
    )
    data = make(path, samples=30, streaming=True)
    assert len(read) < 300
    assert len(data.train) == 30 and np.array_equal(data.train.tokens, whole.train.tokens[: 30 * 32 + 1])
    assert same(list(data.train_loader(8, 0)), list(make(path, samples=30, streaming=True).train_loader(8, 0)))


def test_a_streamed_test_split_is_bounded_by_whole_documents(tmp_path, make, monkeypatch):
    monkeypatch.setattr(llms, "MAX_STREAMED_TEST_SEQUENCES", 20)
    write(tmp_path, "train.jsonl", prose(0, 20))
    write(tmp_path, "test.jsonl", prose(1, 80))
    data = make(tmp_path, samples=10, streaming=True)
    assert 20 <= len(data.test) < 50
    assert data.byte_splits()[1].decode().split("\0") == prose(1, 80)[: data.byte_splits()[1].count(b"\0") + 1]


@pytest.mark.parametrize("factory", [llms.text, llms.wikitext, llms.slimpajama])
def test_a_stream_needs_samples(tokenizer, factory):
    with pytest.raises(ValueError, match=r"data\.samples: .* set data\.samples to the number of training sequences"):
        factory(tokenizer=tokenizer, path="anywhere", streaming=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, r"data\.sequence_length: 0 is not a whole number of at least 1; set data\.seq"),
        ({"samples": 2.5}, r"data\.samples: 2\.5 is not a whole number of at least 1; set data\.samples"),
        ({"test_fraction": 1.0}, r"data\.test_fraction: 1\.0 is not between 0 and 1; set it"),
        ({"sequence_length": 10**6}, r"data\.sequence_length: the training text has \d+ tokens .* 1000001; lower"),
        ({"test_fraction": 1e-9}, r"data: the test split has 0 tokens .* larger data\.test_fraction"),
        (
            {"column": "body"},
            r"data\.path: .*a\.jsonl has no column 'body' of text, only text, length; .* data\.column",
        ),
        ({"column": "length"}, r"data\.path: .*a\.jsonl has no column 'length' of text"),
    ],
)
def test_options_that_cannot_be_met_are_named(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        make(write(tmp_path, "a.jsonl", prose(0, 60)), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"\xfc\xfc\n" * 40,
            r"data\.path: .*a\.txt cannot be read \('utf-8' codec .*\); set data\.path to UTF-8",
        ),
        ("a.txt.gz", b"plain", r"data\.path: .*a\.txt\.gz cannot be read \(Not a gzipped file"),
        ("a.jsonl", b"{not json\n", r"data\.path: .*a\.jsonl cannot be read \(JSON parse error"),
        ("a.jsonl", b"", r"data\.sequence_length: the training text has 0 tokens"),
        ("a.parquet", b"PAR?", r"data\.path: .*a\.parquet cannot be read"),
        ("a.pdf", b"%PDF", r"data\.path: .* has no \.txt, \.jsonl .* or \.parquet file; convert the text"),
    ],
)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_files_that_cannot_be_read_are_named(tmp_path, make, name, content, message, whole_folder):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path if whole_folder else tmp_path / name)


def test_zstandard_is_asked_for_by_name(tmp_path, make, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("Compression type zstd not supported")

    monkeypatch.setattr(datasets.Dataset, "from_json", refuse)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.path: .*a\.jsonl\.zst cannot be read .*; install the package zstand"):
        make(tmp_path)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/*.txt"])
def test_a_path_that_is_not_there_is_named(tmp_path, make, missing):
    with pytest.raises(ValueError, match=rf"data\.path: .*{missing.replace('*', '.')} does not exist; set data\.path"):
        make(tmp_path / missing)


def test_a_path_is_needed(tokenizer):
    with pytest.raises(ValueError, match=r"data\.path: no value is given; set data\.path to a local file, folder"):
        llms.text(tokenizer=tokenizer, path=None)


NEITHER = (
    r"data\.path: {} is not in the local cache and .* cannot be reached; connect to the network, or set data\.path"
)


@pytest.mark.parametrize(
    ("factory", "name"), [("wikitext", "Salesforce/wikitext"), ("slimpajama", "cerebras/SlimPajama-627B")]
)
def test_without_network_one_message_comes_soon(tokenizer, no_cache, server, monkeypatch, factory, name):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the hub was asked"))
    monkeypatch.setattr(corpus, "reachable", partial(reachable, timeout_s=0.5))
    began = time.monotonic()
    with pytest.raises(ValueError, match=NEITHER.format(name)):
        getattr(llms, factory)(tokenizer=tokenizer, samples=10)
    assert time.monotonic() - began < 5


def test_a_hub_switched_off_is_not_asked(tokenizer, no_cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(corpus, "reachable", lambda url: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=NEITHER.format("Salesforce/wikitext")):
        llms.wikitext(tokenizer=tokenizer)


def test_the_connection_test_is_short(server):
    began = time.monotonic()
    assert not reachable(server, timeout_s=0.3)
    assert time.monotonic() - began < 2
    assert signature(reachable).parameters["timeout_s"].default == 5


def test_the_connection_test_finds_a_server_that_answers(monkeypatch):
    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as answering:
        thread = threading.Thread(target=answering.handle_request, daemon=True)
        thread.start()
        assert reachable(f"http://127.0.0.1:{answering.server_port}")
        thread.join()


def pages(part):
    """WikiText's rows: a line each, empty where the text has an empty line."""
    return [row for index, text in enumerate(prose(0, 4)) for row in (f" = {part} {index} = \n", "", f" {text} \n")]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_gives_both_splits(tokenizer, no_cache, monkeypatch, streaming):
    asked = []

    def load(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        rows = datasets.Dataset.from_dict({"text": pages(split)})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(corpus, "reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = llms.wikitext(tokenizer=tokenizer, sequence_length=16, samples=8, streaming=streaming)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", part, streaming) for part in ("train", "test")]
    assert len(data.train) == 8
    tests = data.byte_splits()[1].decode().split("\0")
    assert [page.split(" = ")[0] for page in tests] == [f"= test {index}" for index in range(4)]


def test_what_the_hub_refuses_is_reported(tokenizer, no_cache, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no such\ndata set")

    monkeypatch.setattr(corpus, "reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"data\.path: Salesforce/wikitext cannot be read \(no such data set\); set data\.path to"
    ):
        llms.wikitext(tokenizer=tokenizer)


def test_what_is_in_the_cache_needs_no_network(tokenizer, no_cache, monkeypatch):
    folder = datasets.config.HF_DATASETS_CACHE / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    splits = {}
    for part in ("train", "test"):
        with ArrowWriter(path=str(folder / f"wikitext-{part}.arrow")) as writer:
            for row in pages(part):
                writer.write({"text": row})
            count, size = writer.finalize()
        splits[part] = {"name": part, "num_examples": count, "num_bytes": size, "dataset_name": "wikitext"}
    info = {"config_name": "wikitext-2-raw-v1", "dataset_name": "wikitext", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(corpus, "reachable", lambda url: pytest.fail("the hub was asked"))
    data = llms.wikitext(tokenizer=tokenizer, sequence_length=16)
    for text, part in zip(data.byte_splits(), ("train", "test"), strict=True):
        assert [page.split(" = ")[0] for page in text.decode().split("\0")] == [f"= {part} {i}" for i in range(4)]
