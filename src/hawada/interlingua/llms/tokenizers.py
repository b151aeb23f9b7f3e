"""What the interlingua asks of a tokenizer, and the small ones that it brings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class UnknownText(ValueError):
    """A tokenizer has no tokens for a text."""


class Tokenizer(Protocol):
    """Text to ids and back; special tokens are never added by `encode` and never come out of `decode`."""

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""

    @property
    def bos(self) -> int | None:
        """Begins a sequence, where the model knows such a token."""

    @property
    def eos(self) -> int:
        """Ends an answer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token a byte of UTF-8; then the begin, the end and a separator."""

    bos, eos, separator, vocabulary = 256, 257, 258, 259

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class PieceTokenizer:
    """Words, cut into the longest pieces of a fixed list; a piece that begins a word is written with ▁ before it.

    Args:
        pieces: all of them; ids are their places, behind the begin and the end.
    """

    bos, eos = 0, 1

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = ["<bos>", "<eos>", *dict.fromkeys(pieces)]
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.longest = max(map(len, self.pieces))
        self._known: dict[str, list[int]] = {}

    @property
    def vocabulary(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            UnknownText: when a word cannot be put together from the pieces.
        """
        return [index for word in text.split() for index in self._known.get(word) or self._word(word)]

    def _word(self, word: str) -> list[int]:
        rest, ids = f"▁{word}", []
        while rest:
            length = next((n for n in range(min(self.longest, len(rest)), 0, -1) if rest[:n] in self.ids), None)
            if length is None:
                raise UnknownText(f"{word!r}: the tokenizer has no pieces for {rest!r}; use a word of its own list")
            ids.append(self.ids[rest[:length]])
            rest = rest[length:]
        self._known[word] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids if i > self.eos).replace("▁", " ").strip()


class PretrainedTokenizer:
    """A tokenizer of the transformers library.

    Args:
        tokenizer: as loaded.

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
        """What the tokenizer's chat template sets before and behind what the user says, up to the answer.

        Raises:
            ValueError: when it has no chat template.
        """
        mark = "<<context>>"
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; set llms.chat=false")
        said = [{"role": "user", "content": mark}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        head, _, tail = str(text).partition(mark)
        return head, tail
