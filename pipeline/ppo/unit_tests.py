"""An answer's Python code against the tests of its row, in processes that can do nothing but compute (jail.py)."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from pipeline.errors import UserError
from pipeline.ppo import jail

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
AT_ONCE = 8
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def pass_tests(programs: list[str], tests: list[Any]) -> list[float]:
    """For each program 1 if all of its tests pass, else 0. Raises UserError where such processes cannot be had."""
    can_lock()
    with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        statuses = list(pool.map(_judge, programs, map(written, tests)))
    return [float(status == jail.PASSED) for status in statuses]


def program(text: str) -> str:
    """The code in an answer: its last block between fences that is marked as Python, or else not marked; without such a
    block all of it."""
    blocks = FENCED.findall(text)
    for marks in (("python", "py", "python3"), ("",)):
        if named := [code for mark, code in blocks if mark.lower() in marks]:
            return str(named[-1])
    return text


def written(tests: Any) -> str:
    return tests if isinstance(tests, str) else "\n".join(tests)


def refuses(tests: Any) -> str | None:
    """Why tests cannot be run, or would pass whatever the code does. Raises UserError where no tests can be run."""
    can_lock()
    if not isinstance(tests, str) and not (isinstance(tests, list) and all(isinstance(one, str) for one in tests)):
        return "is not Python code: expected a text, or a list of texts"
    try:
        tree = ast.parse(written(tests))
    except (SyntaxError, ValueError) as error:
        return f"is not Python code: {error}"
    for name in jail.imported(tree):
        if name not in jail.MODULES and name != "solution":
            return f"imports {name}, which tests cannot: they have {', '.join(sorted(jail.MODULES))}"
    helpers: dict[str, ast.stmt] = {}
    run, cases = list[ast.stmt](), {"TestCase"}
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and node.name.startswith("test"):
            if isinstance(node, ast.AsyncFunctionDef):
                return f"has async {node.name}(), which nothing awaits: write it without async"
            if node.args.args:
                return f"has {node.name}() with arguments, which nothing gives it"
        elif isinstance(node, FUNCTIONS):
            helpers[node.name] = node
            continue
        elif isinstance(node, ast.ClassDef) and cases & {ast.unparse(base).rpartition(".")[2] for base in node.bases}:
            cases.add(node.name)
        elif isinstance(node, ast.ClassDef):
            if node.name.startswith("Test"):
                return f"has the class {node.name}, which nothing runs: derive it from unittest.TestCase"
            helpers[node.name] = node
            continue
        if not isinstance(node, ast.Import | ast.ImportFrom):
            run.append(node)
    if all(isinstance(node, ast.Assign) for node in run):
        return "runs nothing: it only defines functions and values. Write an assert, or name functions test_..."
    for node in run:  # and, as they are found, the helpers that it names
        run += [helpers.pop(one.id) for one in ast.walk(node) if isinstance(one, ast.Name) and one.id in helpers]
    found = (one for node in run for one in ast.walk(node) if isinstance(one, ast.Assert | ast.Call))
    asserts = any("assert" in ast.unparse(one) for one in found)
    return None if asserts else "asserts nothing that is run, so it would pass whatever the code does"


@cache
def can_lock() -> None:
    """Raises UserError where a process cannot be bound to computing."""
    if _judge("", "") == jail.UNLOCKED:
        raise UserError(
            "unit_tests: this machine cannot run code that is not trusted: its kernel refuses seccomp filters, or its "
            f"processor ({os.uname().machine}) is not among {', '.join(jail.MACHINES)}. Choose another machine or "
            "another reward"
        )


def _judge(code: str, tests: str) -> int:
    """The exit status of the process that has run the tests."""
    ends = socket.socketpair()
    with ends[0], ends[1]:
        started = [
            subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", jail.__file__, part, str(end.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[end.fileno()],
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
                cwd="/",
                start_new_session=True,
            )
            for part, end in zip(("answer", "tests"), ends, strict=True)
        ]
    try:
        for process, text in zip(started, (code, tests), strict=True):
            assert process.stdin is not None
            try:
                with process.stdin as file:
                    file.write(text.encode("utf-8", "replace"))
            except BrokenPipeError:
                pass  # it has ended already
        return started[1].wait(2 * jail.LONGEST)
    except subprocess.TimeoutExpired:
        return jail.FAILED
    finally:
        for process in started:
            process.kill()
            process.wait()
