"""YAML read strictly: 1e-5 is a number, a key given twice is an error, and every key knows its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError, suggest


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file as plain data, and the line (from 1) of each dotted key.

    Raises UserError with file and line if the file is not a YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            tree = loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: is not YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None or not isinstance(tree, dict):
        raise UserError(f"{path}: expected the sections name, model and stages")
    lines = dict(_lines(node))
    stranger = _not_plain(tree)
    if stranger:
        raise UserError(f"{path}:{lines.get(stranger[0], 1)}: {stranger[0]}: {stranger[1]}")
    return tree, lines


def value(text: str) -> Any:
    """A value as it would stand in a file. Raises ValueError."""
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if _not_plain(found):
        raise ValueError(f"{text!r} is neither text, number, list nor mapping")
    return found


def dump(tree: dict[str, Any]) -> str:
    """YAML that `load` reads back as the same data."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(tree: dict[str, Any], wanted: str) -> dict[str, Any]:
    """The tree with one value exchanged, as "stages.dpo.train.beta=0.05" says. Raises UserError."""
    key, equals, text = wanted.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"-o {wanted}: expected dotted.key=value, for example stages.dpo.train.beta=0.05")
    try:
        found = value(text)
    except ValueError as error:
        raise UserError(f"-o {wanted}: {text!r} is not a YAML value") from error
    stages = tree.get("stages") or {}
    if path[0] == "stages" and len(path) > 2 and isinstance(stages, dict) and path[1] not in stages:
        raise UserError(f"-o {wanted}: no stage '{path[1]}' in this recipe{suggest(path[1], stages)}")
    return _with(tree, path, found, wanted)


def _with(tree: dict[str, Any], path: list[str], found: Any, wanted: str) -> dict[str, Any]:
    if len(path) == 1:
        return {**tree, path[0]: found}
    below = tree.get(path[0]) or {}
    if not isinstance(below, dict):
        raise UserError(f"-o {wanted}: '{path[0]}' is a value, not a section")
    return {**tree, path[0]: _with(below, path[1:], found, wanted)}


def _not_plain(found: Any, place: str = "") -> tuple[str, str] | None:
    """The first place that holds what JSON could not (a date, a set, a key that is no text), and what is wrong."""
    if isinstance(found, dict):
        for key, below in found.items():
            if not isinstance(key, str):
                return place, f"the key {key!r} is not text"
            stranger = _not_plain(below, f"{place}.{key}".lstrip("."))
            if stranger:
                return stranger
    elif isinstance(found, list):
        return next(filter(None, (_not_plain(below, place) for below in found)), None)
    elif found is not None and not isinstance(found, str | int | float):
        return place, f"{found} is read as {type(found).__name__}; quote it to have text"
    return None


class _Loader(yaml.SafeLoader):
    """YAML with two differences from PyYAML's 1.1: 1e-5 is a number, and a key given twice is an error."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not used in recipes", mark)
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


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted keys with their line numbers, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")
