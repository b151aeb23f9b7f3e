"""Scores of an answer against the right ones: exact match and F1 of SQuAD (Rajpurkar et al., 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Return a text in the form that is compared: lower case, no ASCII punctuation, articles or spare white space.

    Punctuation goes first and leaves no space behind: "well-known" becomes "wellknown", and "U.S.A." becomes "usa".
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 when the prediction is one of the answers after normalisation, else 0.

    Args:
        prediction: the predicted answer, empty for "no answer".
        answers: the right answers, empty when the question cannot be answered; then only an empty prediction is right.
            Answers of which normalisation leaves nothing do not count, as in SQuAD 2.0.
    """
    return float(normalize_answer(prediction) in _normalized(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best F1 of the prediction against an answer: of their words, with repetitions counted.

    HotpotQA's own score differs in one point: where one of the two is yes or no, F1 is the exact match.

    Args:
        prediction: the predicted answer, empty for "no answer".
        answers: the right answers, as for `exact_match`; where there are none, or the prediction is
            empty, F1 is the exact match.
    """
    words = normalize_answer(prediction).split()
    return max(_overlap(words, answer.split()) for answer in _normalized(answers))


def _normalized(answers: Sequence[str]) -> list[str]:
    """Normalise the right answers; one empty text where none is left."""
    return [text for text in map(normalize_answer, answers) if text] or [""]


def _overlap(words: Sequence[str], answer: Sequence[str]) -> float:
    """Return the F1 of two texts, given their words."""
    if not words or not answer:
        return float(words == answer)
    return 2 * (Counter(words) & Counter(answer)).total() / (len(words) + len(answer))
