"""The two pages of troubleshooting have an entry for every message of the source, and none for one that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from messages import Message, messages

FOLDERS = sorted(page.parent for page in (ROOT / "docs").rglob("troubleshooting.md"))
WIDEST = 24  # as many messages may one fragment stand for: a family, not everything
in_each_language = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))


def fragments(folder: Path) -> dict[str, str]:
    """The fixed words of messages that the pages' tables quote in their first column, each with its place."""
    quoted = {}
    for page in sorted(folder.glob("troubleshooting*.md")):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("| `"):
                for fragment in re.findall(r"`([^`]+)`", line.split("|")[1]):
                    quoted[fragment] = f"{page.name}:{number}"
    return quoted


def stands_for(fragment: str, message: Message) -> bool:
    """Whether its parts, between each `...`, stand in the message in this order."""
    at = 0
    for part in filter(str.strip, fragment.split("...")):
        at = message.text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


@in_each_language
def test_every_message_has_an_entry(folder: Path) -> None:
    quoted = fragments(folder)
    missing = [
        f"{message.place}: {message.text!r}"
        for message in messages()
        if not any(stands_for(fragment, message) for fragment in quoted)
    ]
    assert not missing, f"{folder} has no entry for:\n" + "\n".join(missing)


@in_each_language
def test_every_entry_is_of_some_messages_and_not_of_all(folder: Path) -> None:
    said, wrong = messages(), []
    for fragment, place in fragments(folder).items():
        count = sum(stands_for(fragment, message) for message in said)
        if not 1 <= count <= WIDEST:
            wrong.append(f"{place}: `{fragment}` stands for {count} messages")
    assert not wrong, "\n".join(wrong)


def test_the_messages_are_found() -> None:
    """As many as there were when this was written, or nearly: if the collector breaks, the tests above say nothing."""
    assert len(messages()) > 400
