"""metrics.jsonl: one line per logged step, one writer, one reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.disk.atomic import read_lines, write_text


def append(path: Path, step: int, values: dict[str, Any]) -> None:
    """Add what was measured at an optimizer step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines written whole, in order; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in read_lines(path):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def rewind(path: Path, step: int) -> None:
    """Forget what was logged after a step, so that a resumed run reads like one that was never stopped."""
    kept = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
