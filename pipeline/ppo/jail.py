"""A program of its own, twice for each answer that is tested: one process runs the answer's code, the other the tests.

The two share nothing but a socket, so that the code can neither read the tests nor change how they are judged. Before
either runs what it was given, it gives up everything but computing (seccomp): it can open no file, no network and no
process, nor send a signal. This needs no root, no namespaces and nothing installed; root is bound by it like any other.

Imports the standard library alone. What it prints goes nowhere; its exit status is its verdict.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import importlib
import io
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

PASSED, FAILED, UNLOCKED = 0, 1, 3
SECONDS = 5
"""Of computing, for each of the two."""
LONGEST = 15
"""Seconds on the clock: an answer may wait instead of computing."""
MEMORY = 512 << 20
MODULES = {
    "__future__", "_strptime", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections",
    "collections.abc", "contextlib", "copy", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions",
    "functools", "hashlib", "heapq", "io", "itertools", "json", "keyword", "math", "numbers", "operator", "pprint",
    "queue", "random", "re", "statistics", "string", "struct", "sys", "textwrap", "time", "types", "typing",
    "unicodedata", "unittest", "unittest.mock", "zlib",
}  # fmt: skip
"""What code and tests may import: of the standard library, what only computes."""
VALUES = ("datetime", "decimal", "fractions")
"""Modules of values that tests may hand over."""
AHEAD = {"datetime": ["_strptime"], "unittest": ["locale", "shutil"]}
"""What a module imports only when it is used, and no file can be opened any more."""

CALLS = {
    # On x86-64 and on 64-bit ARM: those that Python needs to compute, to write to what is open, and to end.
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigreturn": (15, 139), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "getrandom": (318, 278),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of CALLS, and the kernel's number for the architecture (linux/audit.h)."""


def lock() -> None:
    """Bound this process for good. Raises OSError where the kernel cannot."""
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    signal.alarm(LONGEST)  # no call that would put it off is among those allowed
    column, machine = MACHINES.get(os.uname().machine, (0, 0))
    load, equal, end = 0x20, 0x15, 0x06  # of the kernel's filter programs (linux/bpf_common.h)
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # refuse: with EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, kill), (load, 0, 0, 0)]
    for left, numbers in zip(range(len(CALLS), 0, -1), CALLS.values(), strict=True):
        steps.append((equal, left, 0, numbers[column]))
    steps += [(end, 0, 0, refuse), (end, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_ = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    gain_no_rights, seccomp, by_filter = 38, 22, 2
    if not machine or libc.prctl(gain_no_rights, 1, 0, 0, 0) or libc.prctl(seccomp, by_filter, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def imported(tree: ast.Module) -> list[str]:
    """The modules that a program names in its import statements."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    return found


class Channel:
    """Messages over the socket. Only plain values are sent; for any other object goes a number, under which its owner
    keeps it."""

    def __init__(self, file: io.FileIO, number: Callable[[Any], int | None], stand_in: Callable[[int], Any]) -> None:
        self.file, self.number, self.stand_in = file, number, stand_in

    def send(self, message: Any) -> None:
        out = io.BytesIO()
        pickler = pickle.Pickler(out, 5)
        pickler.persistent_id = self.number  # type: ignore[method-assign]
        pickler.dump(message)
        whole = memoryview(struct.pack("Q", out.tell()) + out.getvalue())
        while whole:
            whole = whole[self.file.write(whole) or 0 :]

    def receive(self) -> Any:
        unpickler = Plain(io.BytesIO(self._read(struct.unpack("Q", self._read(8))[0])))
        unpickler.persistent_load = self.stand_in  # type: ignore[method-assign]
        return unpickler.load()

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            parts.append(self.file.read(min(count, 1 << 20)))
            if not parts[-1]:
                raise EOFError
            count -= len(parts[-1])
        return b"".join(parts)


class Plain(pickle.Unpickler):
    """The other side is not to be trusted: it names no class and no function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


class Remote:
    """An object of the answer's code, as the tests see it: its attributes and calls are asked of its owner. Equality is
    not, or an object could be equal to whatever is expected."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._ask, self._number = ask, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", self._number, args, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", self._number, name)

    def __iter__(self) -> Any:
        return self._special("__iter__")()

    def __next__(self) -> Any:
        return self._special("__next__")()

    def __len__(self) -> Any:
        return self._special("__len__")()

    def __getitem__(self, key: Any) -> Any:
        return self._special("__getitem__")(key)

    def __bool__(self) -> bool:
        return True

    def _special(self, name: str) -> Any:
        try:
            return self.__getattr__(name)
        except AttributeError:
            raise TypeError(f"the object has no {name}") from None


def answer(code: Any, file: io.FileIO) -> None:
    """Run the answer's code; then do what the tests ask of it until they end."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(code, module.__dict__)
    kept: list[Any] = [module]

    def number(value: Any) -> int | None:
        if type(value) in (type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset):
            return None
        kept.append(value)
        return len(kept) - 1

    channel = Channel(file, number, lambda at: kept[at])
    while True:
        what, at, *rest = channel.receive()
        try:
            if what == "names":
                reply: Any = [name for name in vars(module) if not isinstance(vars(module)[name], types.ModuleType)]
            elif what == "get":
                reply = getattr(kept[at], rest[0])
            else:
                reply = kept[at](*rest[0], **rest[1])
            given = [*rest[0], *rest[1].values()] if what == "call" else ()
            channel.send(("value", _plain(reply), given))
        except Exception as error:
            channel.send(("error", type(error).__name__, str(error)))


def _plain(value: Any) -> Any:
    """Counter as a dict, a named tuple as a tuple, and so on, in what is returned and inside of it. A list of the
    code's own class stays an object, as the tests may call its methods."""
    if type(value).__module__ == "solution" and isinstance(value, list | dict | set):
        return value
    kind: Any
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(_plain, value))
    return value


def judge(code: Any, file: io.FileIO) -> bool:
    """Run the tests against the answer's names: all that stands in them, then their functions named test..., then their
    classes of unittest."""
    calls = 0

    def ask(what: str, *rest: Any) -> Any:
        nonlocal calls
        calls += what == "call"
        channel.send((what, *rest))
        outcome, value, more = channel.receive()
        if outcome == "error":
            kind: Any = getattr(builtins, str(value), None)
            raise (kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError)(more)
        if what == "call":
            for ours, theirs in zip([*rest[1], *rest[2].values()], more, strict=True):
                _change(ours, theirs)
        return value

    channel = Channel(file, lambda value: value._number if type(value) is Remote else None, lambda at: Remote(ask, at))
    solution, tests = types.ModuleType("solution"), types.ModuleType("__main__")
    sys.modules |= {"solution": solution, "__main__": tests}
    shown = []
    for name in map(str, ask("names", 0)):
        if name.isidentifier() and not name.startswith("_"):
            value = ask("get", 0, name)
            setattr(solution, name, value)
            # or the code would say what `all` and `math.isclose` mean to the tests
            if not hasattr(builtins, name) and name not in MODULES:
                setattr(tests, name, value)
                shown.append(name)
    solution.__dict__["__all__"] = shown
    try:
        exec(code, tests.__dict__)
    except SystemExit as end:  # unittest.main() ends so
        return not end.code and calls > 0
    found = list(vars(tests).items())
    for name, value in found:
        if name.startswith("test") and isinstance(value, types.FunctionType):
            value()
    if unittest := sys.modules.get("unittest"):
        load = unittest.TestLoader().loadTestsFromTestCase
        cases = [value for _, value in found if isinstance(value, type) and issubclass(value, unittest.TestCase)]
        result = unittest.TestResult()
        unittest.TestSuite(map(load, cases)).run(result)
        return bool(result.wasSuccessful()) and calls > 0
    return calls > 0


def _change(ours: Any, theirs: Any) -> None:
    """A list, dict or set that was handed over, as the code has left it."""
    if type(ours) is list and type(theirs) is list:
        ours[:] = theirs
    elif (type(ours) is dict and type(theirs) is dict) or (type(ours) is set and type(theirs) is set):
        ours.clear()
        ours.update(theirs)


def main() -> None:
    part, file = sys.argv[1], io.FileIO(int(sys.argv[2]), "r+")
    sys.argv = [part]
    tree = ast.parse(sys.stdin.buffer.read())
    for name in sorted({*VALUES, *imported(tree)} & MODULES):
        for each in [name, *AHEAD.get(name, [])]:
            importlib.import_module(each)
    code = compile(tree, f"<{part}>", "exec")
    random.seed(0)
    time.tzset()
    try:
        lock()
    except OSError:
        os._exit(UNLOCKED)
    if part == "answer":
        answer(code, file)
    elif judge(code, file):
        os._exit(PASSED)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        os._exit(FAILED)
    os._exit(FAILED)
