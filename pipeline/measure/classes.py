"""How well texts are classified: by a head, by the likelihood of the labels' own words, and by a bag of words.

N texts, K classes. What is read of a text is 0 or 1 for each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from scipy.special import expit, softmax

from pipeline.data import render
from pipeline.data.baselines import WORDS
from pipeline.data.tokens import Unrenderable
from pipeline.disk.manifest import Table
from pipeline.language.say import kept
from pipeline.measure import calibration, intervals, scoring
from pipeline.measure.metric import SHARE, Estimate

if TYPE_CHECKING:
    from peft import PeftModel

Array = numpy.ndarray[Any, Any]
READ_BY_WORDS = 400
READINGS = 2000
"""Held-out texts that are judged by the likelihood of labels, evenly spaced, at most. Each is read once a label, and
there are so many readings at most."""
CONFUSED_AT_MOST = 12
"""Classes up to which is told which is taken for which."""


def choose(scores_NK: Array, several: bool) -> Array:
    """The classes that scores speak for, 0 or 1 each: the best, or where texts have several those above 0."""
    return (scores_NK > 0).astype(int) if several else numpy.eye(scores_NK.shape[1], dtype=int)[scores_NK.argmax(1)]


def read_label_words(
    model: PeftModel, tokenizer: Any, instruction: str, texts: Sequence[str], names: list[str]
) -> dict[int, list[int]]:
    """The class whose words a policy finds the likeliest answer to the instruction, by a text's place: of at most
    READ_BY_WORDS texts, evenly spaced, and not of those that the chat template cannot write."""
    places, answers = [], []
    count = min(len(texts), READ_BY_WORDS, max(1, READINGS // len(names)))
    print(f"  {count} held-out texts are read without a head, once for each of {len(names)} labels", flush=True)
    for place in numpy.unique(numpy.linspace(0, len(texts) - 1, count).astype(int)).tolist():
        asked = instruction.replace("{labels}", ", ".join(names)).replace("{text}", texts[place])
        prompt = [{"role": "user", "content": asked}]
        try:
            told = [{"prompt": prompt, "label": [{"role": "assistant", "content": name}]} for name in names]
            answers += [render.reply(tokenizer, row, "label").sequence() for row in told]
        except Unrenderable:
            continue
        places.append(place)
    # What ends the turn is no word of the label.
    bare = [render.Encoded(answer.ids[:-1], answer.labels[:-1]) for answer in answers]
    likelihoods_NK = numpy.reshape(scoring.log_likelihoods(model, tokenizer, bare), (-1, len(names)))
    return dict(zip(places, choose(likelihoods_NK, several=False).tolist(), strict=True))


def read_bag_of_words(train: Sequence[str], labels_NK: Array, test: Sequence[str], several: bool) -> Array | None:
    """The classes of `test` by a logistic regression on the TF-IDF of the words and pairs of words of `train`; None if
    there is no word."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    words = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, 2), sublinear_tf=True)
    try:
        seen = words.fit_transform(train)
    except ValueError:
        return None
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000, C=10.0, class_weight="balanced"))
    model.fit(seen, labels_NK if several else labels_NK.argmax(1))
    told = model.predict(words.transform(test))
    return numpy.asarray(told) if several else numpy.eye(labels_NK.shape[1], dtype=int)[told]


def macro_f1(true_NK: Array, told_NK: Array) -> float:
    """The mean, over the classes that any of these texts has, of 2 TP / (2 TP + FP + FN)."""
    has_K = true_NK.any(0)
    both_K = true_NK.sum(0) + told_NK.sum(0)
    return float((2 * (true_NK & told_NK).sum(0)[has_K] / both_K[has_K]).mean())


def compare(
    true_NK: Array, told_NK: Array, by_words: dict[int, list[int]], by_bag_NK: Array | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers by the labels' words, and those by the head; gains are over the same texts."""

    def f1(true_NK: Array, told_NK: Array, less_NK: Array | None = None) -> Estimate:
        def of(drawn: Any) -> float:
            less = 0.0 if less_NK is None else macro_f1(true_NK[drawn], less_NK[drawn])
            return macro_f1(true_NK[drawn], told_NK[drawn]) - less

        low, high = intervals.over_prompts(of, len(true_NK))
        return Estimate(of(slice(None)), float(low), float(high), len(true_NK), intervals.OVER_ROWS)

    def accuracy(true_NK: Array, told_NK: Array) -> Estimate:
        return intervals.proportion((true_NK == told_NK).all(1))

    before: dict[str, float] = {}
    after = f1(true_NK, told_NK).numbers("macro_f1") | accuracy(true_NK, told_NK).numbers("accuracy")
    if by_words:
        places, words_NK = list(by_words), numpy.array(list(by_words.values()))
        before = {"macro_f1": f1(true_NK[places], words_NK).value}
        before |= {"accuracy": accuracy(true_NK[places], words_NK).value}
        after |= f1(true_NK[places], told_NK[places], words_NK).numbers("macro_f1_gain")
    if by_bag_NK is not None:
        after |= {"bag_of_words": macro_f1(true_NK, by_bag_NK)}
        after |= f1(true_NK, told_NK, by_bag_NK).numbers("over_bag_of_words")
    return before, after


def tell(true_NK: Array, scores_NK: Array, names: list[str], several: bool, numbers: dict[str, float]) -> list[Table]:
    """For the report: how well each class is found, which is taken for which, and whether confidence is earned."""
    told_NK = choose(scores_NK, several)
    hits_K, wanted_K, told_K = (true_NK & told_NK).sum(0), true_NK.sum(0), told_NK.sum(0)
    share = SHARE.written
    rows = [
        [
            name,
            share(hits / told) if told else "–",
            share(hits / wanted) if wanted else "–",
            f"{2 * hits / (wanted + told):.2f}" if wanted else "–",
            f"{wanted}",
        ]
        for name, hits, wanted, told in zip(names, hits_K, wanted_K, told_K, strict=True)
    ]
    note = ""
    if not several:
        note = kept("The number before is of the labels' words: which the policy finds likeliest, with no head.")
    if "bag_of_words" in numbers:
        bag = f"{numbers['bag_of_words']:.3f}"
        more = kept("A bag of words learnt from the same texts has a macro F1 of {bag}.", bag=bag)
        note = f"{note} {more}" if note else more
    columns = [kept("class"), kept("precision"), kept("recall"), "F1", kept("texts")]
    tables = [Table(title=kept("each class"), columns=columns, rows=rows, note=note)]
    chances_NK = expit(scores_NK) if several else softmax(scores_NK, 1)
    if several:
        confidence, right = numpy.maximum(chances_NK, 1 - chances_NK).ravel(), (true_NK == told_NK).ravel()
    else:
        confidence, right = chances_NK.max(1), (true_NK & told_NK).any(1)
        taken_KK = true_NK.T @ told_NK
        most = numpy.argsort(-wanted_K, kind="stable")[:CONFUSED_AT_MOST]
        tables.append(
            Table(
                title=kept("which class is taken for which"),
                columns=[kept("texts of"), *(kept("read as {name}", name=names[k]) for k in most)],
                rows=[[names[k], *(str(taken_KK[k, other]) for other in most)] for k in most],
                note="" if len(most) == len(names) else kept("The {n} classes of most texts.", n=len(most)),
            )
        )
    curve = calibration.reliability(confidence, right.astype(float), 0.5 if several else 1 / len(names))
    rows = [[share(one.confidence), share(one.accuracy), str(one.n)] for one in curve]
    error = f"{calibration.expected_error(curve):.3f}"
    note = kept("Expected calibration error {error} (arXiv 1706.04599).", error=error)
    columns = [kept("confidence"), kept("of these right"), kept("labels") if several else kept("texts")]
    return [*tables, Table(title=kept("is its confidence earned"), columns=columns, rows=rows, note=note)]
