"""What tells the better answer of a comparison without a model: a reward model must do better than these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

PAIRS_AT_MOST = 5_000
FOLDS = 5
WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\b\w+\b"


def longer_wins(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of pairs (chosen, rejected) whose chosen answer has more characters; equal ones count half."""
    wins = sum((len(chosen) > len(rejected)) + 0.5 * (len(chosen) == len(rejected)) for chosen, rejected in pairs)
    return wins / len(pairs)


def said(answer: Any) -> str:
    """An answer's words, whether it is text or messages."""
    if isinstance(answer, str):
        return answer
    return "\n".join(str(message.get("content") or "") for message in answer)


def word_margins(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> list[float] | None:
    """Margins on `test` of a Bradley-Terry model on the words of the answers, fitted on `train`; pairs are (chosen,
    rejected).

    The difference of two TF-IDF vectors through a logistic regression without intercept: log p(chosen > rejected) is
    linear in the words (Bradley & Terry 1952). None if there is not one word in all the answers.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
    try:
        words.fit(text for pair in train for text in pair)
    except ValueError:
        return None

    def differences(pairs: Sequence[tuple[str, str]]) -> Any:
        return words.transform(chosen for chosen, _ in pairs) - words.transform(rejected for _, rejected in pairs)

    seen = differences(train)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([seen, -seen]), [1] * len(train) + [0] * len(train))
    return [float(margin) for margin in model.decision_function(differences(test))]


def bag_of_words(pairs: Sequence[tuple[str, str]], prompts: Sequence[str], seed: int = 0) -> float | None:
    """Accuracy of such a model on prompts it was not fitted on: cross-validated in 5 folds, the pairs of one prompt in
    one fold. None with fewer prompts than folds, or without words."""
    from sklearn.model_selection import GroupKFold

    places: Sequence[int] = range(len(pairs))
    if len(pairs) > PAIRS_AT_MOST:
        places = sorted(random.Random(seed).sample(places, PAIRS_AT_MOST))
    names = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts[i] for i in places))}
    if len(names) < FOLDS:
        return None
    groups = [names[prompts[i]] for i in places]
    right = 0.0
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(groups, groups=groups):
        margins = word_margins([pairs[places[i]] for i in train], [pairs[places[i]] for i in test])
        if margins is None:
            return None
        right += sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    return right / len(groups)
