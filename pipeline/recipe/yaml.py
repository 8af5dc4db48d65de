"""YAML read strictly: 1e-5 is a number, a key given twice is an error, and every key knows its line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError, suggest

SECTIONS = "the sections name, model and stages"


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file as plain data, and the line (from 1) of each dotted key.

    Raises UserError with file and line if the file is not a YAML mapping.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: name its recipe, for example {os.path.join(path, 'recipe.yaml')}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8, so it is no recipe") from None
    except FileNotFoundError:
        raise UserError(f"there is no file {path} (looked in {Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return parse(text, str(path))


def parse(text: str, path: str, expected: str = SECTIONS) -> tuple[dict[str, Any], dict[str, int]]:
    """The same of a text; `path` and what is expected there are for messages."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: is not YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None or not isinstance(tree, dict):
        raise UserError(f"{path}: expected a file with {expected}")
    lines = dict(_find_lines(node))
    if not_plain := _find_not_plain(tree):
        key, problem = not_plain
        raise UserError(f"{path}:{lines.get(key, 1)}: {key}: {problem}")
    return tree, lines


def dump(tree: dict[str, Any]) -> str:
    """YAML that `load` reads back as the same data."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """The tree with one value exchanged, as "stages.dpo.train.beta=0.05" says. Raises UserError."""
    key, equals, given = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"-o {text}: expected dotted.key=value, for example stages.dpo.train.beta=0.05")
    try:
        value = yaml.load(given, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"-o {text}: {given!r} is not a YAML value") from error
    if _find_not_plain(value):
        raise UserError(f"-o {text}: {given!r} is not a YAML value")
    stages = tree.get("stages") or {}
    if path[0] == "stages" and len(path) > 2 and isinstance(stages, dict) and path[1] not in stages:
        raise UserError(f"-o {text}: no stage '{path[1]}' in this recipe{suggest(path[1], stages)}")
    changed = section = dict(tree)
    for step in path[:-1]:
        below = section.get(step) or {}
        if not isinstance(below, dict):
            raise UserError(f"-o {text}: '{step}' is a value, not a section")
        section[step] = dict(below)
        section = section[step]
    section[path[-1]] = value
    return changed


def _find_not_plain(value: Any, place: str = "") -> tuple[str, str] | None:
    """The first place that holds what JSON could not (a date, a set, a key that is no text), and what is wrong."""
    if isinstance(value, dict):
        if not_text := [key for key in value if not isinstance(key, str)]:
            return place, f"the key {not_text[0]!r} is not text"
        below = [_find_not_plain(each, f"{place}.{key}".lstrip(".")) for key, each in value.items()]
        return next(filter(None, below), None)
    if isinstance(value, list):
        return next(filter(None, (_find_not_plain(each, place) for each in value)), None)
    if value is not None and not isinstance(value, str | int | float):
        return place, f"{value} is read as {type(value).__name__}; quote it to have text"
    return None


class _Loader(yaml.SafeLoader):
    """YAML with two differences from PyYAML's 1.1: 1e-5 is a number, and a key given twice is an error."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases (& and *) are not allowed in recipes", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, dict | list):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return dict(super().construct_mapping(node, deep))


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number, and writes shared parts out instead of naming them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
        list("-+.0123456789"),
    )


def _find_lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys with their line numbers, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _find_lines(value, f"{dotted}.")
