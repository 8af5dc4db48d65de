"""The reward functions that come with OneBase, by the names under which a recipe gives them as the source of a reward.

Each is called as TRL calls a reward function. It pays 1 for a right answer and 0 for another; only `fuzzy` pays what is
between. Of an answer they read what stands after its last </think>.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from pipeline.data.contracts import Row
from pipeline.errors import UserError
from pipeline.ppo import unit_tests
from pipeline.ppo.comparing import Comparer

THOUGHT = "</think>"


@dataclass(frozen=True)
class Shipped:
    columns: tuple[str, ...]
    """Of which a row needs one; the first that it has counts."""
    score: Callable[[list[str], list[Any]], list[float]]
    """(answers, what the rows give): what each answer is paid."""
    refuses: Callable[[Any], str | None]
    """Why what a row gives cannot be used."""
    library: str = ""
    """That it needs, as PyPI names it."""
    right_or_wrong: bool = True
    """Whether it pays 1 or 0 and nothing between, so that it can be the checked truth."""
    arithmetic: int = 1
    """Counts up when it would pay otherwise: what was trained before is then stale."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        given = [next((value for value in values if value is not None), None) for values in self._given(columns)]
        if not given or None in given:
            raise ValueError(f"a row has no {' and no '.join(self.columns)}")
        return self.score([_said(one) for one in completions], given)

    def _given(self, columns: dict[str, Any]) -> list[tuple[Any, ...]]:
        return list(zip(*(columns[name] for name in self.columns if name in columns), strict=True))

    @property
    def missing(self) -> bool:
        """Whether its library is not installed."""
        return bool(self.library) and importlib.util.find_spec(self.library.replace("-", "_")) is None

    @property
    def is_of(self) -> str:
        """All that what it pays depends on, besides the rows."""
        runs = f"{self.library} {version(self.library)}" if self.library else ""
        if self is SHIPPED["unit_tests"]:
            runs = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return f"{self.arithmetic} {runs}".strip()

    def check(self, name: str, rows: Iterable[Row]) -> None:
        """Raises UserError for the first row without what it needs."""
        for row in rows:
            column = next((column for column in self.columns if row.get(column) is not None), None)
            if column is None:
                raise UserError(f"{row['_place']}: the reward {name} needs the column {' or '.join(self.columns)}")
            if reason := self.refuses(row[column]):
                raise UserError(f"{row['_place']}: the reward {name}: '{column}' {reason}")


def _said(completion: Any) -> str:
    text = completion if isinstance(completion, str) else completion[-1].get("content") or ""
    return str(text.rpartition(THOUGHT)[2])


def _is_written(given: Any) -> str | None:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return "is neither a text nor a number"
    return None if normalised(str(given)) else "is empty"


def normalised(text: str) -> str:
    """As Unicode NFKC, whatever its letters' case, with one space for white space, without a full stop at its end.
    Other punctuation counts: 1.5 is not 15."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").rstrip()


def _exact(answers: list[str], given: list[Any]) -> list[float]:
    return [float(normalised(answer) == normalised(str(right))) for answer, right in zip(answers, given, strict=True)]


def _fuzzy(answers: list[str], given: list[Any]) -> list[float]:
    from rapidfuzz import fuzz

    pairs = zip(answers, given, strict=True)
    return [fuzz.ratio(normalised(answer), normalised(str(right))) / 100 for answer, right in pairs]


@cache
def _comparer(library: str) -> Comparer:
    return Comparer(library)


def _mathematics(answers: list[str], given: list[Any]) -> list[float]:
    pairs = zip(given, answers, strict=True)
    return [float(_comparer("math_verify").ask("same_mathematics", str(right), answer) or 0) for right, answer in pairs]


def _is_mathematics(given: Any) -> str | None:
    if reason := _is_written(given):
        return reason
    if re.fullmatch(r"[^\W\d_]{3,}", str(given).strip()):
        return "is a word, of which math-verify makes a product of its letters. Use exact, or write it as LaTeX ($...$)"
    # Where there is a digit math-verify finds a number at least; asking it of every row would take minutes.
    if re.search(r"\d", str(given)) or _comparer("math_verify").ask("read_mathematics", str(given)):
        return None
    return "holds no mathematics that math-verify can read. Write it as LaTeX or as a number, or use exact"


def _json_schema(answers: list[str], given: list[Any]) -> list[float]:
    pairs = zip(given, answers, strict=True)
    return [
        float(_comparer("jsonschema").ask("fits_schema", _schema(one), _json(answer)) or 0) for one, answer in pairs
    ]


def _json(answer: str) -> str:
    """Models put JSON between fences, as they do with code."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", answer, re.DOTALL)
    return fenced[1] if fenced else answer


def _schema(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


@cache
def _problem_of_schema(text: str) -> str:
    found = _comparer("jsonschema").ask("read_schema", json.loads(text))
    return "it takes too long to check" if found is None else str(found)


def _is_schema(given: Any) -> str | None:
    try:
        schema = _schema(given)
    except ValueError as error:
        return f"is not JSON: {error}"
    if not isinstance(schema, dict) or not schema:
        return "is not a JSON schema: expected an object that demands something"
    problem = _problem_of_schema(json.dumps(schema, sort_keys=True))
    return f"is not a JSON schema: {problem}" if problem else None


def _unit_tests(answers: list[str], given: list[Any]) -> list[float]:
    return unit_tests.pass_tests([unit_tests.program(answer) for answer in answers], given)


SHIPPED = {
    "math": Shipped(("answer", "solution"), _mathematics, _is_mathematics, "math-verify", arithmetic=2),
    "exact": Shipped(("answer",), _exact, _is_written),
    "fuzzy": Shipped(("answer",), _fuzzy, _is_written, "rapidfuzz", right_or_wrong=False),
    "json_schema": Shipped(("schema",), _json_schema, _is_schema, "jsonschema"),
    "unit_tests": Shipped(("tests",), _unit_tests, unit_tests.refuses, arithmetic=2),
}
