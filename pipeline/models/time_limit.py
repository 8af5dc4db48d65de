"""A limit on the time that a user's own code takes, whatever that code does about it."""

from __future__ import annotations

import faulthandler
import re
import signal
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

AGAIN_SECONDS = 0.5
"""After which code that caught the end of its time is told again."""
LAST_SECONDS = 10.0
"""After which the process is ended, if it still goes on."""
_HUNG = re.compile(
    r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)\n  File ".+", line \d+ in call_within$', re.MULTILINE
)


class TooLong(BaseException):
    """Not an Exception, so that code that catches those does not catch it."""


def call_within(seconds: float, function: Callable[..., Result], /, *given: Any, **named: Any) -> Result:
    """What a function returns. Raises TooLong once so many seconds have passed, and again and again where the function
    catches that. In the main thread only, where signals arrive. A function that no signal interrupts, such as
    `sum(range(10**12))`, ends with its process, whose error stream then says where it stood: `find_hung` reads it."""
    passed = False

    def stop(*_: Any) -> None:
        nonlocal passed
        passed = True
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            faulthandler.dump_traceback_later(seconds + LAST_SECONDS, exit=True, file=2)
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
            return function(*given, **named)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also where the last alarm came just before the timer was stopped
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        if passed:  # whatever the code inside made of it
            raise TooLong


def find_hung(errors: str) -> str | None:
    """Which function ended a process by not returning, and where it stands, by the process's error stream."""
    found = _HUNG.search(errors) if "Timeout (" in errors else None
    return found and "{name} at {file}:{line}".format(**found.groupdict())
