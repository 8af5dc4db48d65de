"""What people read, in the language they asked for. English stands in the code; zh.json has the Chinese of it."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "zh")
_spoken = "en"


def speak(language: str) -> None:
    """From now on: "en" or "zh". Only what a person typed switches it, never the machine's locale."""
    global _spoken
    assert language in LANGUAGES
    _spoken = language


def spoken() -> str:
    return _spoken


def translated(english: str) -> str:
    """A template of str.format in the language that is spoken; unchanged where the table lacks it, as data may."""
    return english if _spoken == "en" else _chinese().get(english, english)


def say(english: str, **values: object) -> str:
    """A sentence with its values. `english`: a template of str.format, literally, so that a test can collect it."""
    return translated(english).format(**values)


def say_again(text: str) -> str:
    """What a run's files hold in English, its values already in it. Unchanged where no template is like it."""
    if _spoken == "en" or not text:
        return text
    if text in _chinese():
        return say(text)
    for pattern, english in _patterns():
        if found := pattern.fullmatch(text):
            return say(english, **found.groupdict())
    return text


@cache
def _chinese() -> dict[str, str]:
    table: dict[str, str] = json.loads(Path(__file__).with_name("zh.json").read_text(encoding="utf-8"))
    return table


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Those with the most words of their own first: a template of little else than values would match anything."""
    found = []
    for english in sorted(_chinese(), key=lambda english: -len(re.sub(r"\{\w+\}", "", english))):
        names = re.findall(r"\{(\w+)\}", english)
        words = re.sub(r"\{\w+\}", "", english)
        if names and len(names) == len(set(names)) and len(re.findall("[A-Za-z]", words)) > 8:
            parts = re.split(r"\{(\w+)\}", english)
            shape = "".join(f"(?P<{part}>.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
            found.append((re.compile(shape, re.DOTALL), english))
    return found
