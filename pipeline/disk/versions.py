"""Versions of the libraries that compute: noted with what they made, and compared with those that are here."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "onebase")


def installed() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}


def compare(then: dict[str, Any], now: dict[str, str]) -> dict[str, list[str]]:
    """The libraries that were of another version then: {name: [then, now]}."""
    return {name: [then[name], now[name]] for name in now if name in then and then[name] != now[name]}


def describe(changed: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} {then} (here {now})" for name, (then, now) in changed.items())
