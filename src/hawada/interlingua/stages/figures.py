"""Figures of answers, as results hold them."""

from __future__ import annotations

from hawada.experiment.results import AnswerScores
from hawada.interlingua.evaluation.answers import Answers


def scores_of(answers: Answers) -> AnswerScores:
    """The means over all questions."""
    return AnswerScores(
        em=float(answers.em.mean()),
        f1=float(answers.f1.mean()),
        nll=float(answers.nll.mean()),
        top1=float(answers.top1.mean()),
        top5=float(answers.top5.mean()),
        tokens=answers.tokens,
        different_answers=len(set(answers.texts)),
    )
