from __future__ import annotations

import random
import string
from itertools import groupby
from pathlib import Path

import pytest

from hawada.data import squad
from hawada.interlingua.evaluation.scores import exact_match, f1, normalize_answer

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "qa"

# prediction, right answers, exact match, F1; the fractions are 2 * words in common / (words here + words there)
PAIRS = [
    # as it is, and not at all
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("Denver", ["Paris"], 0, 0),
    ("Denver Broncos", ["Carolina Panthers"], 0, 0),
    ("Broncos Denver", ["Denver Broncos"], 0, 1),
    ("Denver Broncos", ["Denver"], 0, 2 / 3),
    ("Denver", ["Denver Broncos"], 0, 2 / 3),
    ("the team was the Denver Broncos", ["Denver Broncos"], 0, 4 / 6),
    ("Santa Clara, California", ["Santa Clara"], 0, 4 / 5),
    ("in Santa Clara, California", ["Santa Clara, California"], 0, 6 / 7),
    ("July, August, and September", ["July, August and September"], 1, 1),
    # articles
    ("the Denver Broncos", ["Denver Broncos"], 1, 1),
    ("Denver Broncos", ["The Denver Broncos"], 1, 1),
    ("a dog", ["the dog"], 1, 1),
    ("an apple", ["a apple"], 1, 1),
    ("dog the a an", ["dog"], 1, 1),
    ("theatre", ["atre"], 0, 0),
    ("there", ["re"], 0, 0),
    ("banana", ["bnn"], 0, 0),
    ("another", ["other"], 0, 0),
    ("ant", ["t"], 0, 0),
    ("The The", ["The The"], 1, 1),
    ("vitamin A", ["vitamin"], 1, 1),
    ("vitamin A", ["vitamin B"], 0, 2 / 3),
    ("Plan A", ["the plan"], 1, 1),
    ("thé", ["th"], 0, 0),
    ("à la carte", ["la carte"], 0, 4 / 5),
    ("le cafe", ["the cafe"], 0, 2 / 3),
    # punctuation goes before articles, and leaves no space
    ("A.", ["the"], 1, 1),
    ("A.N.", [""], 1, 1),
    ("T.H.E. end", ["end"], 1, 1),
    ("the-end", ["end"], 0, 0),
    ("the-end", ["theend"], 1, 1),
    ("a/b", ["ab"], 1, 1),
    ("U.S.A.", ["USA"], 1, 1),
    ("U.S.", ["us"], 1, 1),
    ("U. S. A.", ["USA"], 0, 0),
    ("Levi's Stadium", ["Levis Stadium"], 1, 1),
    ("Levi s Stadium", ["Levi's Stadium"], 0, 2 / 5),
    ("Levi's Stadium", ["Levi\u2019s Stadium"], 0, 2 / 4),
    ("Super Bowl 50.", ["Super Bowl 50"], 1, 1),
    ('"golden anniversary"', ["golden anniversary"], 1, 1),
    ("\u201cgolden anniversary\u201d", ["golden anniversary"], 0, 0),
    ("(NFL)", ["NFL"], 1, 1),
    ("National Football League (NFL)", ["National Football League"], 0, 6 / 7),
    ("snake_case", ["snakecase"], 1, 1),
    ("_the_", ["the"], 1, 1),
    ("AT&T", ["ATT"], 1, 1),
    ("AT & T", ["AT T"], 1, 1),
    ("C++", ["C"], 1, 1),
    ("C#", ["C++"], 1, 1),
    ("50%", ["50"], 1, 1),
    ("$5", ["5"], 1, 1),
    ("\u20ac5", ["5"], 0, 0),
    ("what?!", ["what"], 1, 1),
    ("a~b`c^d", ["abcd"], 1, 1),
    # hyphens and dashes
    ("well-known", ["wellknown"], 1, 1),
    ("well-known", ["well known"], 0, 0),
    ("24-10", ["2410"], 1, 1),
    ("24\u201310", ["24-10"], 0, 0),
    ("24\u201310", ["24\u201310"], 1, 1),
    ("24 - 10", ["24 10"], 1, 1),
    ("the\u2013end", ["\u2013end"], 1, 1),
    ("a\u2014b", ["\u2014b"], 1, 1),
    ("twenty-one points", ["twentyone"], 0, 2 / 3),
    # numbers
    ("10,000", ["10000"], 1, 1),
    ("over 10,000", ["10000"], 0, 2 / 3),
    ("1.5", ["15"], 1, 1),
    ("-3", ["3"], 1, 1),
    ("3", ["three"], 0, 0),
    ("50", ["50.0"], 0, 0),
    ("February 7, 2016", ["7 February 2016"], 0, 1),
    ("2016", ["February 7, 2016"], 0, 2 / 4),
    ("100 \u00b0F", ["100 F"], 0, 2 / 4),
    ("\u0661\u0662", ["12"], 0, 0),
    # case
    ("NFL", ["nfl"], 1, 1),
    ("PARIS france", ["Paris France"], 1, 1),
    ("STRASSE", ["stra\u00dfe"], 0, 0),
    ("STRA\u1e9eE", ["stra\u00dfe"], 1, 1),
    ("\u0110\u1eb7ng", ["\u0111\u1eb7ng"], 1, 1),
    ("\u0391\u0398\u0397\u039d\u0391", ["\u03b1\u03b8\u03b7\u03bd\u03b1"], 1, 1),
    # Unicode is compared as it is
    ("caf\u00e9", ["cafe"], 0, 0),
    ("caf\u00e9", ["cafe\u0301"], 0, 0),
    ("\u6771\u4eac", ["\u6771\u4eac"], 1, 1),
    ("\u6771\u4eac \u90fd", ["\u6771\u4eac"], 0, 2 / 3),
    ("\u6771\u4eac\u3002", ["\u6771\u4eac"], 0, 0),
    ("\U0001f600 yes", ["yes"], 0, 2 / 3),
    # white space
    ("  Denver\t\nBroncos ", ["Denver Broncos"], 1, 1),
    ("Denver\u00a0Broncos", ["Denver Broncos"], 1, 1),
    ("Denver\u2003 Broncos", ["Denver Broncos"], 1, 1),
    ("Denver\u200bBroncos", ["Denver Broncos"], 0, 0),
    ("DenverBroncos", ["Denver Broncos"], 0, 0),
    # repeated words count as often as they come on both sides
    ("New York New York", ["New York"], 0, 4 / 6),
    ("New York", ["New York New York"], 0, 4 / 6),
    ("New New New", ["New York New"], 0, 4 / 6),
    ("no no no no", ["no"], 0, 2 / 5),
    ("x y x y", ["y x y x"], 0, 1),
    # the best of several answers
    ("Paris", ["London", "Paris"], 1, 1),
    ("Levi's Stadium", ["Santa Clara, California", "Levi's Stadium", "Stadium"], 1, 1),
    ("big red dog", ["red", "big red", "cat"], 0, 4 / 5),
    ("dog", ["cat", "cow"], 0, 0),
    ("north pole south", ["north sea", "south pole"], 0, 4 / 5),
    ("Paris", ["Paris", "Paris", "Paris"], 1, 1),
    # nothing to answer, or nothing answered
    ("", [], 1, 1),
    ("", [""], 1, 1),
    ("the", [], 1, 1),
    (" .,!? ", [], 1, 1),
    ("Paris", [], 0, 0),
    ("Paris", [""], 0, 0),
    ("", ["Paris"], 0, 0),
    ("...", ["Paris"], 0, 0),
    ("", ["the", "!"], 1, 1),
    ("", ["the", "Paris"], 0, 0),
    ("the", ["a", "Paris"], 0, 0),
    ("Paris", ["the", "Paris"], 1, 1),
    ("no answer", [], 0, 0),
    ("yes", ["no"], 0, 0),
    ("yes, both are", ["yes"], 0, 2 / 4),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "overlap"), PAIRS)
def test_scores_worked_out_by_hand(prediction: str, answers: list[str], exact: float, overlap: float) -> None:
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap, abs=1e-12)


def test_there_are_enough_pairs_and_no_two_are_the_same() -> None:
    assert len({(prediction, *answers) for prediction, answers, _, _ in PAIRS}) == len(PAIRS) >= 100


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The quick, brown Fox!", "quick brown fox"),
        ("  A  the an  ", ""),
        ("a-b a.b a b", "ab ab b"),
        ("\u0130stanbul", "i\u0307stanbul"),
        ("the\u00a0end", "end"),
        ("an\u2019s", "\u2019s"),
        (string.punctuation, ""),
        ("", ""),
    ],
)
def test_normal_forms(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal == normalize_answer(normal)


def plain(text: str) -> str:
    """The normal form again, letter by letter, without regular expressions."""
    kept = [letter for letter in text.lower() if letter not in set(string.punctuation)]
    runs = ("".join(run) for _, run in groupby(kept, key=lambda letter: letter.isalnum() or letter == "_"))
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


def plain_f1(guess: str, truth: str) -> float:
    """F1 by precision and recall, each word of the truth crossed out when it is found."""
    words, left = guess.split(), truth.split()
    size = len(left)
    if not words or not size:
        return 1.0 if words == left else 0.0
    found = 0
    for word in words:
        if word in left:
            left.remove(word)
            found += 1
    precision, recall = found / len(words), found / size
    return 0.0 if found == 0 else 2 * precision * recall / (precision + recall)


def oracle(prediction: str, answers: list[str]) -> tuple[float, float]:
    """SQuAD 2.0's rule for one question, written once more."""
    truths = [plain(answer) for answer in answers if plain(answer)]
    if not truths:
        truths = [""]
    guess = plain(prediction)
    return float(any(guess == truth for truth in truths)), max(plain_f1(guess, truth) for truth in truths)


PIECES = [
    *("a", "A", "an", "the", "The", "THE", "than", "x", "y", "Z", "new", "york", "12", "3", "no", "yes"),
    *(" ", " ", " ", " ", "  ", "\t", "\n", "\u00a0", "\u2003", "\u200b"),
    *(".", ",", "-", "_", "'", '"', "(", ")", "/", "&", "!", "?", "\u2013", "\u2019", "\u3002"),
    *("\u00e9", "\u00df", "\u0130", "\u0301", "\u00b2", "\u6771", "\u0661", "\U0001f600", ""),
]


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_score_as_in_the_second_implementation(seed: int) -> None:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choices(PIECES, k=rng.randrange(9)))

    for _ in range(200):
        prediction, answers = text(), [text() for _ in range(rng.randrange(4))]
        if answers and rng.random() < 0.3:  # near ones, too
            prediction = rng.choice(answers) + rng.choice(PIECES)
        assert normalize_answer(prediction) == plain(prediction)
        exact, overlap = oracle(prediction, answers)
        assert exact_match(prediction, answers) == exact
        assert f1(prediction, answers) == pytest.approx(overlap, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_what_holds_for_every_text(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        left, right = ("".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(2))
        exact, overlap = exact_match(left, [right]), f1(left, [right])
        assert 0 <= exact <= overlap <= 1
        assert exact_match(left, [left]) == f1(left, [left]) == 1
        assert (exact, overlap) == (exact_match(right, [left]), f1(right, [left]))
        if normalize_answer(right):  # one more answer never hurts
            assert f1(left, [right, "york"]) >= max(overlap, f1(left, ["york"]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real samples are not here")
def test_every_right_answer_of_squad_is_exact_and_its_neighbour_scores_as_in_the_second_implementation() -> None:
    examples = squad(str(SHARED / "squad*")).test
    for example, after in zip(examples, [*examples[1:], examples[0]], strict=True):
        answers = list(example.answers)
        assert exact_match(answers[-1], answers) == float(bool(normalize_answer(answers[-1])))
        prediction = after.answers[0]
        assert (exact_match(prediction, answers), f1(prediction, answers)) == pytest.approx(oracle(prediction, answers))
