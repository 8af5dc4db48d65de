"""sha256 of files and folders, and a short name for any JSON value."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its name relative to it."""
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(value: Any) -> str:
    """A short, stable name for a JSON value."""
    text = json.dumps(_normal(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _normal(value: Any) -> Any:
    """1.0 and 1 are one number."""
    if isinstance(value, dict):
        return {key: _normal(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(below) for below in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
