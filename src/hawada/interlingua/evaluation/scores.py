"""How near an answer is to the right ones: exact match and F1 of SQuAD (Rajpurkar et al., 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """What is compared: lower case, without ASCII punctuation, English articles and spare white space.

    Punctuation goes first and leaves no space behind: "well-known" becomes "wellknown", and "U.S.A." becomes "usa".
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the prediction is one of the answers after normalisation, else 0.

    Args:
        prediction: empty for "no answer".
        answers: the right ones; none when the question cannot be answered, and then only an empty prediction is right.
            Answers of which normalisation leaves nothing do not count, as in SQuAD 2.0.
    """
    return float(normalize_answer(prediction) in _right(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the prediction's words, repetitions counted; of the best answer.

    HotpotQA's own score differs in one point: there a yes or no gives 0 to all that is not exactly the same.

    Args:
        prediction: empty for "no answer".
        answers: as for `exact_match`; when there are none, or the prediction is empty, F1 is the exact match.
    """
    words = normalize_answer(prediction).split()
    return max(_overlap(words, answer.split()) for answer in _right(answers))


def _right(answers: Sequence[str]) -> list[str]:
    return [text for text in map(normalize_answer, answers) if text] or [""]


def _overlap(words: Sequence[str], answer: Sequence[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    return 2 * (Counter(words) & Counter(answer)).total() / (len(words) + len(answer))
