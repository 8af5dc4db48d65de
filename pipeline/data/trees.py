"""OpenAssistant message trees: one prompt, replies to it ranked by people, replies to these, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from pipeline.data.contracts import Row
from pipeline.data.dialogues import Messages, Unreadable, message

ROLES = {"prompter": "user", "assistant": "assistant"}
DEEPEST = 64


def oasst(row: Row, wanted: str) -> Iterator[Row]:
    """Out of one tree: for demonstrations every dialogue in which the assistant gives its best-ranked reply each time;
    for preferences every two ranked replies to one turn, the better as chosen; for prompts every turn of a person."""
    seen: set[str] = set()
    for path, replies in _asked(row["prompt"], [], 0):
        ranked = sorted((reply for reply in replies if _rank(reply) is not None), key=lambda r: _rank(r) or 0)
        if wanted == "prompt":
            yield {"prompt": path}
        elif wanted == "preference":
            for better, worse in combinations(ranked, 2):
                if _rank(better) != _rank(worse):
                    yield {"prompt": path, "chosen": [_said(better)], "rejected": [_said(worse)]}
        elif wanted == "demonstration" and replies:
            best = (ranked or replies)[0]
            on_the_best_path = all(str(said) in seen for said in path if said["role"] == "assistant")
            seen.add(str(_said(best)))
            if on_the_best_path and not any(_live_list(after) for after in _live_list(best)):
                yield {"messages": [*path, _said(best)]}


def _asked(node: Any, before: Messages, depth: int) -> Iterator[tuple[Messages, list[dict[str, Any]]]]:
    """Every turn of a person with what led to it, and the assistant's replies to it."""
    if depth > DEEPEST:
        raise Unreadable(f"is a tree deeper than {DEEPEST} turns")
    path = [*before, _said(node)]
    if path[-1]["role"] != "user":
        raise Unreadable("is a tree in which two assistant messages follow each other")
    replies = _live_list(node)
    yield path, replies
    for reply in replies:
        for after in _live_list(reply):
            yield from _asked(after, [*path, _said(reply)], depth + 2)


def _live_list(node: dict[str, Any]) -> list[dict[str, Any]]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise Unreadable("field 'replies' is no list of messages")
    return [reply for reply in replies if _live(reply)]


def _live(node: dict[str, Any]) -> bool:
    return not node.get("deleted")


def _rank(node: dict[str, Any]) -> int | None:
    rank = node.get("rank")
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def _said(node: Any) -> dict[str, Any]:
    role, text = (node.get("role"), node.get("text")) if isinstance(node, dict) else (None, None)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise Unreadable("is a tree with a message without role or text")
    return message(ROLES[role], text)
