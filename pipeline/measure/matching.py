"""How near an answer comes to a reference, by the measures of SQuAD (arXiv 1606.05250): exact match and token F1."""

from __future__ import annotations

import re
import string
from collections import Counter

NEW_TOKENS = 32
"""Of an answer to a question, at most."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
