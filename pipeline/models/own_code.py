"""What a recipe names of a user's own Python: `path.py:name`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError, suggest

Key = Literal["reward", "environment"]
"""Of a recipe, under which it names such code."""


class OwnCodeError(UserError):
    """A user's own Python cannot be used."""

    def __init__(self, key: Key, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def load_named(reference: str, key: Key) -> Any:
    """The function or class named by `path.py:name`, for a key of a recipe. Raises OwnCodeError if there is none, or if
    its file fails when read."""
    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"onebase_{key}_{Path(file).stem}", file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise OwnCodeError(key, f"{reference}: no such Python file: {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    sys.path.insert(0, str(Path(file).resolve().parent))  # so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's program: it can fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{file}:{line}" if line else file
        raise OwnCodeError(key, f"{place} fails when it is imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    named = getattr(module, name, None)
    if named is None:
        there = [known for known, one in vars(module).items() if callable(one) and not known.startswith("_")]
        raise OwnCodeError(key, f"{file} defines no '{name}'{suggest(name, there)}")
    if not callable(named):
        raise OwnCodeError(key, f"{reference} is of the type {type(named).__name__}, and must be a function or a class")
    return named


def refusal(call: Callable[..., Any], names: Iterable[str], *first: Any) -> str:
    """Why something cannot be called with arguments of these names, after the `first`; "" where it can."""
    try:
        inspect.signature(call).bind(*first, **dict.fromkeys(names))
    except TypeError as error:
        return str(error)
    except ValueError:  # of what is written in C there may be no signature
        pass
    return ""
