"""What tells the better answer of a comparison without a model: a reward model must do better than these."""

from __future__ import annotations

import random
from collections.abc import Sequence

PAIRS_AT_MOST = 5_000
FOLDS = 5
WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\b\w+\b"


def longer_wins(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of pairs (chosen, rejected) whose chosen answer has more characters; equal ones count half."""
    wins = sum((len(chosen) > len(rejected)) + 0.5 * (len(chosen) == len(rejected)) for chosen, rejected in pairs)
    return wins / len(pairs)


def bag_of_words(pairs: Sequence[tuple[str, str]], prompts: Sequence[str], seed: int = 0) -> float | None:
    """Accuracy of a Bradley-Terry model on the words of the answers, on prompts it was not fitted on.

    The difference of two TF-IDF vectors through a logistic regression without intercept: log p(chosen > rejected) is
    linear in the words (Bradley & Terry 1952). Cross-validated in 5 folds, the pairs of one prompt in one fold. None
    with fewer prompts than folds.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    places = range(len(pairs))
    if len(pairs) > PAIRS_AT_MOST:
        places = sorted(random.Random(seed).sample(places, PAIRS_AT_MOST))
    names = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts[i] for i in places))}
    if len(names) < FOLDS:
        return None
    groups = [names[prompts[i]] for i in places]
    right = 0.0
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(groups, groups=groups):
        words = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
        try:
            words.fit(text for i in train for text in pairs[places[i]])
        except ValueError:  # not one word in all the answers
            return None

        def differences(indices):  # type: ignore[no-untyped-def]
            chosen = words.transform(pairs[places[i]][0] for i in indices)  # noqa: B023  called before the next fold
            return chosen - words.transform(pairs[places[i]][1] for i in indices)  # noqa: B023

        seen = differences(train)
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        model.fit(vstack([seen, -seen]), [1] * len(train) + [0] * len(train))
        margins = model.decision_function(differences(test))
        right += sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    return float(right / len(groups))
