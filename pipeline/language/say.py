"""What people read, in the language they asked for. English stands in the code; zh.json has the Chinese of it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_spoken = "en"


def speak(language: str) -> str:
    """From now on in "en" or "zh", which is returned. Only what a person types switches it, never the machine's
    locale."""
    global _spoken
    _spoken = language
    return language


def spoken() -> str:
    return _spoken


@contextlib.contextmanager
def in_english() -> Iterator[None]:
    """Inside, whatever is said is for a file: a run's files are in English, whoever has made them."""
    language = spoken()
    speak("en")
    try:
        yield
    finally:
        speak(language)


def translated(english: str) -> str:
    """A template of str.format in the language that is spoken; unchanged where the table lacks it, as data may."""
    return english if _spoken == "en" else _chinese().get(english, english)


def say(english: str, **values: object) -> str:
    """A sentence with its values. `english`: a template of str.format, literally, so that a test can collect it."""
    return translated(english).format(**values)


def kept(english: str, **values: object) -> str:
    """A sentence that a run's files are to hold: in English, which say_again() tells in the reader's language."""
    return english.format(**values)


def say_again(text: str) -> str:
    """What was kept(), its values already in it, of which some are sentences too. Unchanged where
    no template is like it."""
    if _spoken == "en" or not text:
        return text
    if text in _chinese():
        return say(text)
    for pattern, english in _patterns():
        if found := pattern.fullmatch(text):
            parts = {key: say_again(part) if " " in part else part for key, part in found.groupdict().items()}
            return say(english, **parts)
    sentences = re.split(r"(?<=\.) ", text)
    return say(" ").join(map(say_again, sentences)) if len(sentences) > 1 else text


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
        if names and len(names) == len(set(names)) and len(re.findall("[A-Za-z]", words)) >= 5:
            parts = re.split(r"\{(\w+)\}", english)
            parts[::2] = map(re.escape, parts[::2])
            parts[1::2] = (f"(?P<{name}>{'[0-9.,]+' if name == 'n' else '.+?'})" for name in parts[1::2])  # n: a number
            found.append((re.compile("".join(parts), re.DOTALL), english))
    return found
