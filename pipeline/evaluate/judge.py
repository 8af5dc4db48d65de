"""An external judge: a model behind an OpenAI-compatible endpoint on this machine says which of two answers is better.

Judges favour a place (arXiv 2306.05685), so every pair is asked in both orders; only a verdict that stays is a win.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy

from pipeline.errors import UserError
from pipeline.evaluate.arena import Arena

AT_ONCE = 4
SECONDS = 120
ASKED = """\
Which of two answers to a question is better? Judge whether it is right, helpful and harmless; do not prefer an answer
for being longer or for standing first. Reply with one word: A, B, or tie.

Question:
{question}

Answer A:
{a}

Answer B:
{b}

Verdict (A, B or tie):"""


@dataclass(frozen=True)
class Judge:
    """`url`: of the endpoint up to /v1, on a loopback address. `model`: the name it is asked for."""

    url: str
    model: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not _is_loopback(parts.hostname or ""):
            raise UserError(
                f"--judge {self.url}: expected an endpoint on this machine, as http://127.0.0.1:8080/v1. "
                "Held-out data and answers are not sent anywhere else."
            )

    def points(self, question: str, a: str, b: str) -> float:
        """1 if a is the better answer in both orders, 0 if b is, else one half."""
        if a == b:
            return 0.5
        first, second = self._says(question, a, b), self._says(question, b, a)
        return 1.0 if (first, second) == ("A", "B") else 0.0 if (first, second) == ("B", "A") else 0.5

    def _says(self, question: str, a: str, b: str) -> str:
        """A, B or tie; a reply that is none of these is a tie."""
        content = ASKED.format(question=question, a=a or "(nothing)", b=b or "(nothing)")
        asked = {"model": self.model, "temperature": 0, "max_tokens": 8}
        body = json.dumps({**asked, "messages": [{"role": "user", "content": content}]}).encode()
        place = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(place, body, {"Content-Type": "application/json"})
        # A proxy of the environment would take the question off this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        try:
            with opener.open(request, timeout=SECONDS) as reply:
                told = str(json.load(reply)["choices"][0]["message"]["content"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"--judge {place} did not give a verdict: {type(error).__name__}: {error}") from error
        found = re.match(r"\W*(A|B)\b", told.strip())
        return found[1] if found else "tie"


def arena(judge: Judge, questions: list[str], answers: dict[str, list[str]]) -> Arena:
    """Every policy's answer against every other's, question by question."""
    names = list(answers)
    points_PKK = numpy.full((len(questions), len(names), len(names)), 0.5)
    games = [(p, a, b) for a, b in itertools.combinations(range(len(names)), 2) for p in range(len(questions))]

    def play(game: tuple[int, int, int]) -> float:
        p, a, b = game
        return judge.points(questions[p], answers[names[a]][p], answers[names[b]][p])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for (p, a, b), won in zip(games, pool.map(play, games), strict=True):
            points_PKK[p, a, b], points_PKK[p, b, a] = won, 1 - won
    return Arena(names, points_PKK)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead off this machine."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
