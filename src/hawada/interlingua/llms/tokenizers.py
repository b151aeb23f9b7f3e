"""The tokenizer that the interlingua expects, small ones of its own, and a wrapper of those of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class UnknownText(ValueError):
    """Raised when a tokenizer has no tokens for a text."""


class Tokenizer(Protocol):
    """Turn text into ids and back; `encode` adds no special tokens, and `decode` leaves them out."""

    @property
    def vocabulary(self) -> int:
        """The number of tokens; ids are below it."""

    @property
    def bos(self) -> int | None:
        """The id of the token that begins a sequence; None where the model has none."""

    @property
    def eos(self) -> int:
        """The id of the token that ends an answer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""


class ByteTokenizer:
    """Make each byte of UTF-8 a token; three more are the begin, the end and a separator."""

    bos, eos, separator, vocabulary = 256, 257, 258, 259

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class PieceTokenizer:
    """Cut words into the longest pieces of a fixed list, in which a piece that begins a word has ▁ before it.

    Args:
        pieces: all pieces; their ids follow those of the begin and the end token.
    """

    bos, eos = 0, 1

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = ["<bos>", "<eos>", *dict.fromkeys(pieces)]
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.longest = max(map(len, self.pieces))
        self._encoded: dict[str, list[int]] = {}

    @property
    def vocabulary(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UnknownText: when a word cannot be composed of the pieces.
        """
        return [index for word in text.split() for index in self._encoded.get(word) or self._word(word)]

    def _word(self, word: str) -> list[int]:
        rest, ids = f"▁{word}", []
        while rest:
            length = next((n for n in range(min(self.longest, len(rest)), 0, -1) if rest[:n] in self.ids), None)
            if length is None:
                raise UnknownText(f"{word!r}: the tokenizer has no pieces for {rest!r}; use a word of its own list")
            ids.append(self.ids[rest[:length]])
            rest = rest[length:]
        self._encoded[word] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids if i > self.eos).replace("▁", " ").strip()


class PretrainedTokenizer:
    """Wrap a tokenizer of the transformers library.

    Args:
        tokenizer: the tokenizer of transformers.

    Raises:
        ValueError: when it has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token; set eos_token")
        self.tokenizer, self.bos, self.eos = tokenizer, tokenizer.bos_token_id, int(tokenizer.eos_token_id)

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def chat(self) -> tuple[str, str]:
        """Return what the chat template writes before the user's message, and behind it up to the model's answer.

        Raises:
            ValueError: when it has no chat template.
        """
        placeholder = "<<context>>"
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; set llms.chat=false")
        conversation = [{"role": "user", "content": placeholder}]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        head, _, tail = str(text).partition(placeholder)
        return head, tail
