"""Mathematics and JSON compared in a process of their own: what an answer says can make a comparison take for ever, or
all memory. Such a comparison is ended, and counts as not equal.

Run as a program, this file is that process. It imports the library that it needs, and nothing of the package.
"""

from __future__ import annotations

import contextlib
import decimal
import importlib
import json
import math
import os
import pickle
import re
import resource
import select
import struct
import subprocess
import sys
from typing import Any

SECONDS = 15
"""For one comparison, on the clock. math-verify stops itself after 5 seconds for each of its three steps, if it can."""
MEMORY = 4 << 30
_MARK = re.compile(r"\$|\\boxed|\\\(|\\\[|####")
"""Of a formula within a text."""
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")
"""Letters beside each other that are no command of LaTeX's and no function."""


class Comparer:
    """Compares in the other process, which is started when it is first needed and again after each that was ended."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, reference: Any, answer: str | None = None) -> Any:
        """What the function of this name below gives; None where it did not end in time."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, self.library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._read(120)  # that the library is imported does not count
        assert self.process.stdin is not None
        message = pickle.dumps((kind, reference, answer))
        self.process.stdin.write(struct.pack("Q", len(message)) + message)
        self.process.stdin.flush()
        return self._read(SECONDS)

    def _read(self, seconds: float) -> Any:
        assert self.process is not None and self.process.stdout is not None
        if select.select([self.process.stdout], [], [], seconds)[0]:
            try:
                return pickle.load(self.process.stdout)
            except EOFError:  # out of memory
                pass
        self.process.kill()
        self.process.communicate()
        self.process = None
        return None


def read_mathematics(reference: str, _: None) -> bool:
    """Whether math-verify can read it."""
    return bool(_mathematics(reference))


def same_mathematics(reference: str, answer: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(_mathematics(reference), parse(answer)))


def _mathematics(reference: str) -> Any:
    """A row may give LaTeX without the dollar signs by which math-verify finds it in a text: of 3x+2 it would find the
    3. A text that marks its formula or has words is searched."""
    from math_verify import parse

    formula = f"${reference}$"
    with contextlib.suppress(decimal.InvalidOperation):
        if (number := decimal.Decimal(reference.strip())).is_finite():
            return parse(f"${number:f}$")  # 2.5e3, in which it would find 2.5
    if _MARK.search(reference) or _WORD.search(reference):
        return parse(reference) or parse(formula)
    return parse(formula) or parse(reference)


def read_schema(schema: Any, _: None) -> str:
    """What is wrong with a JSON schema; empty if nothing is."""
    try:
        list(_validator(schema).iter_errors(None))  # so that what it refers to is looked up
    except Exception as error:
        return str(getattr(error, "message", error))
    return ""


def fits_schema(schema: Any, answer: str) -> bool:
    try:
        value = json.loads(answer, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return False
    return bool(_validator(schema).is_valid(value))


def _validator(schema: Any) -> Any:
    import jsonschema
    from referencing import Registry

    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=Registry())  # one that fetches nothing from the network


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(text)
    return float(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(pairs)
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    importlib.import_module(sys.argv[1])
    functions = {each.__name__: each for each in (read_mathematics, same_mathematics, read_schema, fits_schema)}
    reply: Any = "started"
    while True:
        pickle.dump(reply, answers)
        answers.flush()
        length = sys.stdin.buffer.read(8)
        if not length:
            return  # whoever asked has ended
        kind, reference, answer = pickle.loads(sys.stdin.buffer.read(struct.unpack("Q", length)[0]))
        try:
            reply = functions[kind](reference, answer)
        except (Exception, RecursionError):
            reply = False


if __name__ == "__main__":
    main()
