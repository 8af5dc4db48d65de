"""How near an answer comes to a reference: right or wrong, and by the measures of SQuAD (arXiv 1606.05250), exact match
and token F1."""

from __future__ import annotations

import re
import string
from collections import Counter

from pipeline.data.contracts import Row

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def correct(question: Row, text: str) -> bool:
    """The answer stands in the text as words of its own, and none of the other choices does."""
    others = [choice for choice in question.get("choices", []) if choice != question["answer"]]
    return _says(text, question["answer"]) and not any(_says(text, other) for other in others)


def _says(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)", text.casefold()) is not None


def exact_match(text: str, reference: str) -> bool:
    """Equal but for case, punctuation, articles and white space."""
    return _words(text) == _words(reference)


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of the share of the answer's words that stand in the reference and the share of the reference's
    words that stand in the answer."""
    said, wanted = _words(text), _words(reference)
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    plain = text.casefold().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
