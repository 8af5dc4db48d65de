"""A reward model that sees words alone: what a real one must beat, beside the rule that the longer answer wins."""

from __future__ import annotations

from typing import Any

import numpy
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from pipeline.data.contracts import Row


def bag_of_words(train: list[Row], test: list[Row]) -> list[float]:
    """Margins on held-out pairs of logistic regression on the difference of word counts: a Bradley-Terry model that
    sees which words an answer has and nothing else, not even the prompt."""
    counter = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    counter.fit([said(row, key) for row in train for key in ("chosen", "rejected")])

    def differences(rows: list[Row]) -> Any:
        better, worse = (counter.transform([said(row, key) for row in rows]) for key in ("chosen", "rejected"))
        return (better - worse).astype(float)

    features = differences(train)
    # Every other pair is turned round, so that there are two classes; without intercept this changes nothing else.
    signs_P = numpy.where(numpy.arange(len(train)) % 2 == 0, 1, -1)
    model = LogisticRegression(fit_intercept=False, max_iter=2000)
    model.fit(features.multiply(signs_P[:, None]).tocsr(), signs_P)
    return [float(margin) for margin in model.decision_function(differences(test))]


def said(row: Row, key: str) -> str:
    """An answer's text, whether it is text or messages."""
    answer = row[key]
    return answer if isinstance(answer, str) else "\n".join(message.get("content") or "" for message in answer)
