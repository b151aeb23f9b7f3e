"""Text for language models: documents that are tokenized and packed into sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Subset

from hawada.data.corpus import (
    Splits,
    articles,
    articles_or_paragraphs,
    check_count,
    check_test_fraction,
    held_out,
    hub_texts,
    interpreter_texts,
    local_texts,
)
from hawada.data.sequences import Batch, EpochBatches, PackedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = b"\0"  # between documents in the text of a split
MAX_STREAMED_TEST_SEQUENCES = 500
DOCUMENTS_PER_CHUNK = 256  # that are tokenized together


class TextData:
    """Packed token sequences of one corpus.

    Every loader yields (input_ids, labels), int64 (B, T); `labels[:, t]` is the token after `input_ids[:, t]`, -100
    where there is none.

    Args:
        train: the training sequences.
        test: the test sequences; the last one may be padded.
        texts: the texts that the two splits were tokenized from, see `byte_splits`.
        vocabulary: the size of the vocabulary; every id is below it.
    """

    metric = "perplexity"

    def __init__(self, train: PackedTokens, test: PackedTokens, *, texts: tuple[bytes, bytes], vocabulary: int) -> None:
        self.train, self.test, self.texts, self.vocabulary = train, test, texts, vocabulary
        self.sequence_length = train.sequence_length

    def train_loader(self, batch_size: int, seed: int, *, start: int = 0) -> DataLoader[Batch]:
        """Load training sequences, in each epoch in another random order, which depends on (seed, epoch) alone.

        A loop that stops within an epoch continues in it when it iterates again: no batch is skipped or repeated. The
        length of the loader is that of a whole epoch.

        Args:
            batch_size: the number of sequences in a batch; the last batch of an epoch may be smaller.
            seed: the seed of the orders.
            start: the number of batches that were already used over all epochs; a resumed run so continues with the
                same batches as one that was not interrupted.
        """
        batches = EpochBatches(len(self.train), batch_size, seed=seed, start=start)
        return self._loader(self.train, batch_sampler=batches)

    def calibration_loader(self, batch_size: int, samples: int) -> DataLoader[Batch]:
        """Load `samples` random training sequences, the same ones every time."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        return self._loader(Subset(self.train, chosen), batch_size=batch_size)

    def test_loader(self, batch_size: int) -> DataLoader[Batch]:
        """Load every test sequence once and in order."""
        return self._loader(self.test, batch_size=batch_size)

    def byte_splits(self) -> tuple[bytes, bytes]:
        """Return the training and the test text in UTF-8, for baselines per byte.

        Documents are joined by one NUL byte where packing has one end-of-sequence token, and by nothing where the
        tokenizer has none. With a tokenizer whose tokens are bytes, the test text is therefore as long as the test
        tokens, and the separator is a symbol of its own in both, so that perplexities per byte can be compared. The
        training text holds the documents that the training sequences come from; with `samples`, the last document is
        whole although its end is not trained on.
        """
        return self.texts

    def _loader(self, dataset: Dataset[Batch], **options: Any) -> DataLoader[Batch]:
        # With a generator of its own, iterating does not draw from the global one.
        return DataLoader(dataset, collate_fn=_as_it_is, generator=torch.Generator(), **options)


@dataclass(frozen=True)
class Packing:
    """How documents become sequences.

    Documents are tokenized, joined by the tokenizer's end-of-sequence token, if it has one, and cut into windows.

    Attributes:
        tokenizer: the tokenizer, which makes ids of text.
        sequence_length: the number of tokens in a sequence.
        samples: the number of training sequences, the first ones of the data; None means all.
        streaming: whether to stop reading once there are `samples` sequences, and to test on about 500 sequences of a
            given test split.
        test_fraction: the fraction of documents that are held out, by their content, where no test split is given.

    Raises:
        ValueError: when a number is out of range.
    """

    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    samples: int | None = None
    streaming: bool = False
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_count("sequence_length", self.sequence_length)
        check_count("samples", self.samples)
        check_test_fraction(self.test_fraction)
        if self.streaming and self.samples is None:
            raise ValueError(
                "data.samples: a stream has no length of its own, and none is given; set data.samples to the number of "
                "training sequences, or data.streaming to false"
            )

    def pack(self, splits: Splits) -> TextData:
        """Read, tokenize and pack a corpus.

        Raises:
            ValueError: when a split has too little text.
        """
        train, test = splits
        kept = _Tokens(self.tokenizer, None if self.samples is None else self.samples * self.sequence_length + 1)
        bounded = self.streaming and test is not None
        held = _Tokens(self.tokenizer, MAX_STREAMED_TEST_SEQUENCES * self.sequence_length if bounded else None)
        for chunk in _chunks(test or ()):
            held.add(chunk)
            if held.full:
                break
        for chunk in _chunks(train):
            for_test = [test is None and held_out(document, self.test_fraction) for document in chunk]
            held.add([document for document, out in zip(chunk, for_test, strict=True) if out])
            kept.add([document for document, out in zip(chunk, for_test, strict=True) if not out])
            if kept.full and (self.streaming or test is not None):
                break
        return self._sequences(kept, held)

    def _sequences(self, kept: _Tokens, held: _Tokens) -> TextData:
        length, eos = self.sequence_length, self.tokenizer.eos_token_id
        train = PackedTokens(kept.joined()[: kept.limit], length)
        test = PackedTokens(held.joined(), length, pad=0 if eos is None else eos)
        if not len(train):
            raise ValueError(
                f"data.sequence_length: the training text has {kept.size} tokens and a sequence takes {length + 1}; "
                "lower data.sequence_length or give more text"
            )
        if not len(test):
            raise ValueError(
                f"data: the test split has {held.size} tokens and needs at least 2; give more text, "
                "a file with test in its name, or a larger data.test_fraction"
            )
        return TextData(train, test, texts=(kept.text(), held.text()), vocabulary=len(self.tokenizer))


class _Tokens:
    """The tokens of one split while it is read: of whole documents, until there are `limit` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> None:
        self.tokenizer, self.limit, self.size = tokenizer, limit, 0
        self.documents: list[bytes] = []
        self.ids: list[NDArray[np.int32]] = []

    @property
    def full(self) -> bool:
        return self.limit is not None and self.size >= self.limit

    def add(self, documents: list[str]) -> None:
        if self.full or not documents:
            return
        encoded = self.tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
        eos = self.tokenizer.eos_token_id
        for document, ids in zip(documents, encoded["input_ids"], strict=True):
            if self.full:
                return
            joint = [eos] if self.documents and eos is not None else []
            self.documents.append(document.encode())
            self.ids.append(np.asarray(joint + ids, np.int32))
            self.size += len(self.ids[-1])

    def joined(self) -> NDArray[np.int32]:
        return np.concatenate([np.empty(0, np.int32), *self.ids])

    def text(self) -> bytes:
        return (SEPARATOR if self.tokenizer.eos_token_id is not None else b"").join(self.documents)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Gather documents that are not blank into lists, because fast tokenizers work on many of them in parallel."""
    rest = (document for document in documents if document.strip())
    while chunk := list(islice(rest, DOCUMENTS_PER_CHUNK)):
        yield chunk


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: the data set returns whole batches."""
    return batch


def stdlib(
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 128,
    samples: int | None = None,
    limit_bytes: int = 2_000_000,
) -> TextData:
    """Text that every interpreter carries, without download: pydoc's topics and the standard library's docstrings.

    A document is a topic or a module; about 5 % of them, chosen by their content, are the test split.

    Args:
        tokenizer: the tokenizer, which makes ids of text.
        sequence_length: the number of tokens in a sequence.
        samples: the number of training sequences, the first ones of the data; None means all.
        limit_bytes: the most bytes of text in both splits together.
    """
    packing = Packing(tokenizer, sequence_length, samples)
    return packing.pack((interpreter_texts(limit_bytes), None))


def wikitext(
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 512,
    path: str | None = None,
    samples: int | None = None,
    streaming: bool = False,
) -> TextData:
    """WikiText-2 (Merity et al., 2016), raw, from the hub or from local files; a document is an article.

    Args:
        tokenizer: the tokenizer, which makes ids of text.
        sequence_length: the number of tokens in a sequence.
        path: local files to use instead, see `text`; they may be WikiText, or any other text.
        samples: the number of training sequences, the first ones of the data; None means all.
        streaming: whether to read no more than `samples` need.
    """
    packing = Packing(tokenizer, sequence_length, samples, streaming)
    if path is not None:
        return packing.pack(local_texts(path, "text", gather=articles_or_paragraphs))
    return packing.pack(hub_texts("Salesforce/wikitext", "wikitext-2-raw-v1", streaming=streaming, gather=articles))


def slimpajama(
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 512,
    path: str | None = None,
    samples: int | None = None,
    streaming: bool = True,
) -> TextData:
    """SlimPajama (Soboleva et al., 2023) from the hub or from local files; the package zstandard reads it.

    Args:
        tokenizer: the tokenizer, which makes ids of text.
        sequence_length: the number of tokens in a sequence.
        path: local files to use instead, see `text`.
        samples: the number of training sequences, the first ones of the data; None means all.
        streaming: whether to read no more than `samples` need; the whole data set takes about 900 GB.
    """
    packing = Packing(tokenizer, sequence_length, samples, streaming)
    if path is not None:
        return packing.pack(local_texts(path, "text"))
    return packing.pack(hub_texts("cerebras/SlimPajama-627B", None, streaming=streaming))


def text(
    *,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None,
    sequence_length: int = 512,
    samples: int | None = None,
    test_fraction: float = 0.05,
    streaming: bool = False,
    column: str = "text",
) -> TextData:
    """Any local text: .txt, .jsonl (either also compressed) and .parquet.

    A row of .jsonl or .parquet is a document. A .txt file is running text: a document ends at the first blank line
    after 2,000 characters.

    Args:
        tokenizer: the tokenizer, which makes ids of text.
        path: a file, a folder or a glob. Files whose names have the word test (or else valid, validation, dev) are the
            test split; without such files, some documents are held out.
        sequence_length: the number of tokens in a sequence.
        samples: the number of training sequences, the first ones of the data; None means all.
        test_fraction: the fraction of documents to hold out, chosen by their content.
        streaming: whether to read no more than `samples` need, and about 500 sequences of test files.
        column: the column of .jsonl and .parquet that holds the text.
    """
    packing = Packing(tokenizer, sequence_length, samples, streaming, test_fraction)
    return packing.pack(local_texts(path, column))
