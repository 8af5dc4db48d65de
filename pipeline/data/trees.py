"""OpenAssistant message trees: one prompt, replies to it ranked by people, replies to these, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from pipeline.data.contracts import Row, RowKind
from pipeline.data.dialogues import Messages, Unreadable, message

ROLES = {"prompter": "user", "assistant": "assistant"}
DEEPEST = 64


def read_tree(row: Row, kind: RowKind) -> Iterator[Row]:
    """Out of one tree: for demonstrations every dialogue in which the assistant gives its best-ranked reply each time;
    for preferences every two ranked replies to one turn, the better as chosen; for prompts every turn of a person."""
    best_replies: set[str] = set()
    for path, replies in _walk(row["prompt"], [], 0):
        ranked = sorted((reply for reply in replies if _rank(reply) is not None), key=lambda r: _rank(r) or 0)
        if kind == "prompt":
            yield {"prompt": path}
        elif kind == "preference":
            for better, worse in combinations(ranked, 2):
                if _rank(better) != _rank(worse):
                    yield {"prompt": path, "chosen": [_message(better)], "rejected": [_message(worse)]}
        elif kind == "demonstration" and replies:
            best = (ranked or replies)[0]
            on_the_best_path = all(str(turn) in best_replies for turn in path if turn["role"] == "assistant")
            best_replies.add(str(_message(best)))
            if on_the_best_path and not any(_replies(after) for after in _replies(best)):
                yield {"messages": [*path, _message(best)]}


def _walk(node: Any, before: Messages, depth: int) -> Iterator[tuple[Messages, list[dict[str, Any]]]]:
    """Every turn of a person with what led to it, and the assistant's replies to it."""
    if depth > DEEPEST:
        raise Unreadable(f"is a tree deeper than {DEEPEST} turns")
    path = [*before, _message(node)]
    if path[-1]["role"] != "user":
        raise Unreadable("is a tree in which two assistant messages follow each other")
    replies = _replies(node)
    yield path, replies
    for reply in replies:
        for after in _replies(reply):
            yield from _walk(after, [*path, _message(reply)], depth + 2)


def _replies(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies to a message, without deleted ones."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise Unreadable("field 'replies' is not a list of messages")
    return [reply for reply in replies if not reply.get("deleted")]


def _rank(node: dict[str, Any]) -> int | None:
    rank = node.get("rank")
    return rank if isinstance(rank, int) and not isinstance(rank, bool) else None


def _message(node: Any) -> dict[str, Any]:
    role, text = (node.get("role"), node.get("text")) if isinstance(node, dict) else (None, None)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise Unreadable("is a tree with a message without role or text")
    return message(ROLES[role], text)
