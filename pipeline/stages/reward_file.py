"""The files that a reward function's answers depend on, told from its source without running it."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255


def read_by(file: Path) -> dict[str, Path]:
    """The function's own file and what it reads, by path as seen from its folder.

    That is: modules in its folder or below that it imports, what those import in turn, and every file that a text in
    one of these sources names, relative to that source or to the working directory. Names put together at run time and
    absolute ones are not seen; installed packages are not looked into.
    """
    folder = file.resolve().parent
    found: dict[str, Path] = {}
    ahead = [file.resolve()]
    while ahead:
        source = ahead.pop()
        found[os.path.relpath(source, folder)] = source
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        found |= {os.path.relpath(path, folder): path for path in _named(tree, source)}
        modules = {path for path in _imported(tree, source, folder) if path.is_relative_to(folder)}
        ahead += [path for path in modules if os.path.relpath(path, folder) not in found]
    return found


def _imported(tree: ast.Module, source: Path, folder: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            start, names = folder, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = source.parents[node.level - 1] if 0 < node.level <= len(source.parents) else folder
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        for name in names:
            steps = name.split(".")
            for depth in range(1, len(steps) + 1):
                place = start.joinpath(*steps[:depth])
                yield from filter(_is_file, (place.with_name(f"{place.name}.py"), place / "__init__.py"))


def _named(tree: ast.Module, source: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) <= LONGEST_NAME:
            for path in (source.parent / node.value, Path(node.value)):
                if not os.path.isabs(node.value) and _is_file(path):
                    yield path.resolve()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that cannot be a name
        return False
