"""Every sentence that is told has its Chinese, with the same values; there is no Chinese of a sentence that is gone."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from string import Formatter

from jinja2 import nodes

from pipeline.report.page import _templates

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
CHINESE: dict[str, str] = json.loads((PACKAGE / "language" / "zh.json").read_text(encoding="utf-8"))


def in_code(source: str) -> set[str]:
    """The templates of say() and kept(), what is counted(), the labels and units of metrics, what stages learn."""
    found, tells = set(), "pipeline.language.say import" in source  # else say is another function
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if tells and node.func.id in ("say", "kept"):
            template = node.args[0]
            assert isinstance(template, ast.Constant), f"not a literal: {ast.unparse(node)}"
            found.add(template.value)
        if node.func.id == "counted" and isinstance(node.args[1], ast.Constant):
            found.add(f"{{n}} {node.args[1].value}s")
        found |= {k.value.value for k in node.keywords if k.arg == "learns" and isinstance(k.value, ast.Constant)}
        if node.func.id == "Metric":
            given = [*node.args[1:2], *node.args[3:4], *(k.value for k in node.keywords if k.arg in ("label", "unit"))]
            inside = [part for value in given for part in ast.walk(value) if not isinstance(value, ast.JoinedStr)]
            found |= {part.value for part in inside if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found - {"", "%"}


def in_template(source: str) -> set[str]:
    calls = _templates().parse(source).find_all(nodes.Call)
    return {call.args[0].as_const() for call in calls if isinstance(call.node, nodes.Name) and call.node.name == "say"}


def told() -> set[str]:
    skipped = {PACKAGE / "language" / "say.py", PACKAGE / "report" / "page.py"}  # say() itself, and its like for HTML
    code = [in_code(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py") if path not in skipped]
    templates = [in_template(path.read_text(encoding="utf-8")) for path in (PACKAGE / "report").rglob("*.jinja")]
    page = in_code((PACKAGE / "report" / "page.py").read_text(encoding="utf-8").replace("say(english, **values)", ""))
    return set.union(page, *code, *templates)


def test_every_sentence_has_its_chinese_and_no_chinese_is_left_over() -> None:
    english = told()
    assert len(english) > 200
    assert not english - CHINESE.keys(), f"no Chinese in zh.json: {sorted(english - CHINESE.keys())}"
    assert not CHINESE.keys() - english, f"said nowhere: {sorted(CHINESE.keys() - english)}"


def test_a_translation_has_the_values_of_its_sentence() -> None:
    def values(template: str) -> list[str]:
        return sorted({name for _, name, _, _ in Formatter().parse(template) if name is not None})

    differing = [english for english, chinese in CHINESE.items() if values(english) != values(chinese)]
    assert not differing
