"""What a recipe names of a user's own Python: `path.py:name`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError


def load_named(reference: str, key: Literal["reward", "environment"]) -> Any:
    """The function or class named by `path.py:name`, for a key of a recipe. Raises UserError if there is none, or its
    file fails when read."""
    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"onebase_{key}_{Path(file).stem}", file)
    if spec is None or spec.loader is None or not os.path.isfile(file):
        raise UserError(f"{key}: {reference}: no such Python file: {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    sys.path.insert(0, str(Path(file).resolve().parent))  # so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's program: it can fail in any way
        raise UserError(f"{key}: {file} fails when it is imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    named = getattr(module, name, None)
    if not callable(named):
        raise UserError(f"{key}: {reference}: {file} defines no '{name}'")
    return named
