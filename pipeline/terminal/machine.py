"""`--json`: one JSON object on stdout and nothing else. What is told to a person meanwhile goes to stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.measure.metric import Metric


@contextlib.contextmanager
def stdout_kept(wanted: bool) -> Iterator[None]:
    """If wanted, what this process and those that it starts print meanwhile goes to stderr."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_json(value: Any) -> None:
    """Of dataclasses, models and paths too. What is infinite or not a number is null."""
    print(json.dumps(_plain(value), ensure_ascii=False, indent=1, allow_nan=False))


def describe(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """What the numbers are, by name: label, unit, and which direction is better."""
    return {metric.name: metric for metric in metrics}


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
