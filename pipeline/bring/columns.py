"""Which of our formats rows are in, by what another config calls their columns."""

from __future__ import annotations

from collections.abc import Mapping

Columns = Mapping[str, str]
"""What a column is for (prompt, query, response, system, history, chosen, rejected, label, messages): its name."""
KNOWN: list[tuple[str, dict[str, set[str]]]] = [
    (
        "alpaca",
        {
            "prompt": {"instruction"}, "query": {"input"}, "response": {"output"}, "system": {"system"},
            "history": {"history"}, "chosen": {"chosen"}, "rejected": {"rejected"},
        },
    ),
    ("dolly", {"prompt": {"instruction"}, "query": {"context"}, "response": {"response"}}),
    (
        "qa",
        {
            "prompt": {"question"}, "query": {"context"}, "response": {"answer", "answers"}, "system": {"system"},
            "chosen": {"chosen"}, "rejected": {"rejected"},
        },
    ),
    ("trl", {"prompt": {"prompt"}, "response": {"completion"}, "chosen": {"chosen"}, "rejected": {"rejected"}}),
    ("trl", {"prompt": {"text"}}),
    (
        "kto",
        {
            "prompt": {"prompt", "instruction"}, "query": {"input"}, "response": {"completion", "output"},
            "label": {"label", "kto_tag"},
        },
    ),
]  # fmt: skip


def format_of(columns: Columns) -> str | None:
    """None where none of our formats calls them so."""
    for name, known in KNOWN:
        if all(column in known.get(use, ()) for use, column in columns.items()):
            return name
    return None


def format_of_dialogues(column: str, role: str, content: str) -> str | None:
    """Of dialogues in a column, each turn with a key for who speaks and one for what is said."""
    if column in ("conversations", "conversation") and role in ("from", "role") and content in ("value", "content"):
        return "sharegpt"
    return "openai" if (column, role, content) == ("messages", "role", "content") else None


def told(columns: Columns) -> str:
    return ", ".join(f"{use} is '{column}'" for use, column in columns.items())
