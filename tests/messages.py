"""What OneBase says when something is wrong, collected from the source of pipeline/ without running it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

PIPELINE = Path(__file__).resolve().parent.parent / "pipeline"
GAP = "\0"  # what is filled in when the message is said
RAISED = {
    "UserError", "BrokenInvariant", "Interrupted", "complaint", "Broken", "Unreadable", "Unrenderable", "ValueError",
    "ModuleNotFoundError", "ComposerError", "ConstructorError", "refusal", "_unreachable", "_fail", "exit",
    "EngineError", "_failed", "OwnCodeError",
}  # fmt: skip
# Functions that return (or gather, or yield) the reason why something is refused, and others raise it.
REASONS = (
    "data/contracts.py", "data/examine.py", "data/files.py", "data/load.py", "models/record.py", "models/spec.py",
    "models/varlen.py", "models/packing.py", "models/dtype.py", "ppo/health.py", "ppo/loop.py", "publish/gate.py",
    "publish/gguf.py", "recipe/gates.py", "recipe/sections.py", "runs/states.py", "runs/worker.py",
    "stages/arguments.py", "stages/classify.py", "stages/pretrain.py",
    "ppo/shipped.py", "ppo/unit_tests.py", "training/micro_batches.py", "evaluate/plan.py", "models/published.py",
    "publish/publishing.py", "publish/hub.py", "disk/artifact.py", "training/sequences.py",
)  # fmt: skip
NOTED = re.compile(
    r"warning|left out|out of memory|stopp|not planned|not told|cut to|tried again|not known|count as ties|older than"
)


class Message(NamedTuple):
    place: str
    text: str


def messages() -> list[Message]:
    found = {}
    for file in sorted(PIPELINE.rglob("*.py")):
        name = file.relative_to(PIPELINE).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, node, scope in _said(tree, reasons=name in REASONS):
            for text in _texts(node, scope):
                text = " ".join(text.split())
                if _is_a_sentence(text):
                    found.setdefault((name, text), Message(f"pipeline/{name}:{line}", text))
    return list(found.values())


def _is_a_sentence(text: str) -> bool:
    """At least two words stand in it by themselves (less than that only passes on what others say), and it is no
    pattern, template or program."""
    if text.startswith(("^", "import ")) or "{{" in text or "messages" in text and text.startswith("{"):
        return False
    return len(re.findall(r"[A-Za-z]{2,}", text.replace(GAP, " "))) >= 2


def _said(tree: ast.Module, reasons: bool) -> Iterator[tuple[int, ast.expr, list[ast.AST]]]:
    """Each expression that is said to a person, its line, and the scopes in which its names are looked up."""

    def walk(node: ast.AST, scope: list[ast.AST]) -> Iterator[tuple[int, ast.expr, list[ast.AST]]]:
        if isinstance(node, ast.FunctionDef):
            scope = [node, *scope]
        if isinstance(node, ast.Call):
            name = _name(node.func)
            if name in RAISED and node.args:
                args = node.args[:1] if name == "complaint" else node.args[name == "OwnCodeError" :]
                yield node.lineno, _joined(args), scope
            elif name == "locked" and len(node.args) > 1:
                yield node.lineno, node.args[1], scope
            elif name == "print" and node.args:
                if any(NOTED.search(text) for text in _texts(node.args[0], scope)):
                    yield node.lineno, node.args[0], scope
            elif reasons and name == "append" and _spoken(node.args[0]):
                yield node.lineno, node.args[0], scope
        elif reasons and isinstance(node, ast.Return | ast.Yield | ast.AugAssign) and node.value:
            value = node.value
            for one in value.elts if isinstance(value, ast.List) else [value]:
                if _spoken(one):
                    yield node.lineno, one, scope
        elif (
            reasons
            and isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.Call)
            and _spoken(node.value)
        ):
            yield node.lineno, node.value, scope
        elif reasons and isinstance(node, ast.Assign) and _name(node.targets[0]) == "OUR_WORDS":
            for why in node.value.keys if isinstance(node.value, ast.Dict) else ():
                if why:
                    yield why.lineno, why, scope
        for child in ast.iter_child_nodes(node):
            yield from walk(child, scope)

    yield from walk(tree, [tree])


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _spoken(node: ast.expr) -> bool:
    """A text with at least four words, such as a reason and unlike a key."""
    if isinstance(node, ast.Tuple):
        node = node.elts[0]
    if isinstance(node, ast.Call) and _name(node.func) in ("say", "kept"):
        node = node.args[0]
    if isinstance(node, ast.IfExp):
        return _spoken(node.body) or _spoken(node.orelse)
    text = "".join(_texts(node, [])[:1]) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) else ""
    return len(re.findall(r"[A-Za-z]{2,}", re.sub(r"{\w+}", "", text))) >= 4


def _joined(args: list[ast.expr]) -> ast.expr:
    parts: list[ast.expr] = []
    for arg in args:
        parts += [ast.Constant(" "), arg] if parts else [arg]
    whole = parts[0]
    for part in parts[1:]:
        whole = ast.BinOp(whole, ast.Add(), part)
    return whole


def _texts(node: ast.expr, scope: list[ast.AST], depth: int = 0) -> list[str]:
    """What the expression may say, with a GAP for each part that is known only when it is said."""
    if depth > 6:
        return [GAP]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [GAP]
    if isinstance(node, ast.JoinedStr):
        return ["".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values)]  # type: ignore[misc]
    if isinstance(node, ast.Tuple) and node.elts:
        return _texts(node.elts[0], scope, depth + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_texts(side, scope, depth + 1) for side in (node.left, node.right))
        return ["".join(pair) for pair in product(left, right)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, scope, depth + 1) + _texts(node.orelse, scope, depth + 1)
    if isinstance(node, ast.Name):
        return _bound(node.id, scope, depth) or [GAP]
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return _bound(node.value.id, scope, depth) or [GAP]
    if isinstance(node, ast.Dict):
        return [text for value in node.values for text in _texts(value, scope, depth + 1)]
    if isinstance(node, ast.Call):
        if _name(node.func) in ("say", "kept") and isinstance(node.args[0], ast.Constant):
            return [re.sub(r"{\w*}", GAP, node.args[0].value)]
        if _name(node.func) == "Text" and node.args:
            return _texts(node.args[0], scope, depth + 1)
        if isinstance(node.func, ast.Name):
            return _returned(node.func.id, scope, depth) or [GAP]
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("removesuffix", "format", "strip"):
            return _texts(node.func.value, scope, depth + 1)
    return [GAP]


def _bound(name: str, scope: list[ast.AST], depth: int) -> list[str]:
    for where in scope:
        values = [
            node.value
            for node in ast.walk(where)
            if (isinstance(node, ast.Assign) and name in map(_name, node.targets))
            or (isinstance(node, ast.AnnAssign | ast.NamedExpr) and _name(node.target) == name)
        ]
        if values:
            return [text for value in values if value for text in _texts(value, scope, depth + 1)]
    return []


def _returned(name: str, scope: list[ast.AST], depth: int) -> list[str]:
    for function in (node for node in ast.walk(scope[-1]) if isinstance(node, ast.FunctionDef)) if scope else ():
        if function.name == name:
            values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
            return [text for value in values for text in _texts(value, [function, *scope], depth + 1)]
    return []


if __name__ == "__main__":
    for message in messages():
        print(f"{message.place.removeprefix('pipeline/')} {message.text.replace(GAP, '…')}")
