"""`onebase env`: what of this machine works for OneBase, and what to do about the rest.

It must answer on the strangest machine: each look stands by itself, what it cannot tell it says, and torch is tried in
a process of its own. Nothing is asked over the network.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.terminal.machine import print_json

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["works", "not here", "look", "broken"]
MARKS: dict[State, tuple[str, str]] = {
    "works": ("+", "green"), "not here": ("-", "dim"), "look": ("!", "yellow"), "broken": ("x", "red"),
}  # fmt: skip
GIB = 2**30
OLDEST_PYTHON = (3, 11)
LITTLE_DISK = 5 * GIB
LITTLE_RAM = 4 * GIB
PATIENCE = 60.0
"""Seconds for a driver that does not answer."""
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")
INSTALL = "pip install -e ."


@dataclass(frozen=True)
class Finding:
    """`state`: works; not here, and needed for some things only; look, as it may matter; broken, which every run
    needs."""

    what: str
    state: State
    says: str
    do: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    """The same for machines."""


def show_environment(runs: Path, as_json: bool, console: Console) -> list[str]:
    """Print what there is; gives what is broken."""
    findings = look_around(runs)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    if as_json:
        print_json({"sound": not broken, "findings": findings})
        return broken
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.state]
        said = Text(finding.says, style="dim" if finding.state == "not here" else "")
        if finding.do:
            said.append(f"\n{finding.do}", style="bold" if finding.state in ("look", "broken") else "")
        table.add_row(Text(mark, style=style), Text(finding.what, style="bold"), said)
    console.print(table)
    return broken


def look_around(runs: Path) -> list[Finding]:
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("system", _system),
        ("Python", _python),
        ("packages", _packages),
        ("torch", _torch),
        ("processor", _processor),
        ("memory", _memory),
        ("disk", lambda: _disk(runs)),
        ("Hub", _hub),
        ("extras", _extras),
    ]
    return [finding for what, look in looks for finding in _attempt(what, look)]


def _attempt(what: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        for finding in look():
            found.append(finding)
    except Exception as error:  # on a machine that nobody has thought of, the other looks still tell something
        found.append(Finding(what, "look", f"could not be examined ({type(error).__name__}: {error})"))
    return found


def _system() -> Iterator[Finding]:
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if platform.system() == "Linux":
        yield Finding("system", "works", name)
    else:
        yield Finding("system", "look", name, "OneBase is made for Linux. It has not been tried elsewhere.")


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] >= OLDEST_PYTHON:
        yield Finding("Python", "works", f"{version} ({sys.executable})")
    else:
        yield Finding("Python", "broken", f"{version}; OneBase needs 3.11 or later", "Install a newer Python.")


def _packages() -> Iterator[Finding]:
    """Against the ranges that the installed project states."""
    try:
        wanted = _requirements()
    except metadata.PackageNotFoundError:
        yield Finding("packages", "look", "OneBase runs from its folder and is not installed", f"{INSTALL}")
        return
    missing, wrong, versions = [], [], {}
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[requirement.name] = version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(str(requirement.name))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (wanted {requirement.specifier})")
    if missing:
        yield Finding("packages", "broken", f"not installed: {', '.join(missing)}", INSTALL)
    if wrong:
        yield Finding("packages", "look", f"of versions that OneBase was not made for: {', '.join(wrong)}", INSTALL)
    if not missing and not wrong:
        told = ", ".join(f"{name} {versions[name]}" for name in ("transformers", "trl", "peft") if name in versions)
        yield Finding("packages", "works", f"{len(versions)}, all of supported versions: {told}, ...", figures=versions)


def _extras() -> Iterator[Finding]:
    extras: dict[str, list[Any]] = {}
    for requirement in _requirements():
        for name in metadata.metadata("onebase").get_all("Provides-Extra") or []:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(requirement)
    for name, requirements in extras.items():
        missing = [each.name for each in requirements if not _is_installed(each)]
        if missing:
            yield Finding(
                f"extra {name}", "not here", f"missing: {', '.join(missing)}", f"pip install 'onebase[{name}]'"
            )
        else:
            yield Finding(f"extra {name}", "works", ", ".join(each.name for each in requirements))


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    return [Requirement(text) for text in metadata.requires("onebase") or []]


def _is_installed(requirement: Any) -> bool:
    try:
        return bool(requirement.specifier.contains(metadata.version(requirement.name), prereleases=True))
    except metadata.PackageNotFoundError:
        return False


def _torch() -> Iterator[Finding]:
    found, ended = _probe()
    torch, cards, four_bits = (found.get(part, {"error": ended}) for part in ("torch", "cards", "four_bits"))
    if "error" in torch:
        yield Finding("torch", "broken", f"cannot be loaded: {torch['error']}", INSTALL)
        return
    yield Finding("torch", "works", f"{torch['version']}, built for {torch['built_for']}", figures=torch)
    yield from _cards(cards, torch["built_for"])
    if four_bits.get("works"):
        where = "the card" if four_bits["device"] == "cuda" else "the CPU"
        error = f"a test product is {four_bits['relative_error']:.1%} off, which is normal for 4 bits"
        yield Finding("4 bits", "works", f"bitsandbytes on {where}: {error}", figures=four_bits)
    else:
        why = four_bits.get("error") or f"a test product is {four_bits['relative_error']:.0%} off"
        instead = "pip install -U bitsandbytes; until then, only model.quantize: none runs here."
        yield Finding("4 bits", "look", f"bitsandbytes does not work: {why}", instead, four_bits)


def _cards(cards: Any, built_for: str) -> Iterator[Finding]:
    if isinstance(cards, dict):
        yield Finding("card", "look", f"torch could not look for one: {cards['error']}", "Update the driver.")
        return
    for number, card in enumerate(cards):
        half = "bfloat16" if card["bfloat16"] else "no bfloat16: it computes in float16"
        memory = f"{card['memory'] / GIB:.1f} GiB, {card['free'] / GIB:.1f} free"
        says = f"{card['name']}: {memory}, compute capability {card['capability']}, {half}"
        yield Finding(f"card {number}", "works", says, figures=card)
    if cards:
        return
    if shutil.which("nvidia-smi") and "CUDA" not in built_for:
        do = "Install torch built for CUDA: https://pytorch.org/get-started/locally"
        yield Finding("card", "look", f"there seems to be an NVIDIA card, but this torch is built for {built_for}", do)
    elif shutil.which("nvidia-smi"):
        do = "Check that nvidia-smi shows the card, and that CUDA_VISIBLE_DEVICES does not hide it."
        yield Finding("card", "look", "the NVIDIA driver is here, but torch sees no card", do)
    else:
        yield Finding("card", "not here", "no GPU: small models train on the CPU")


def _probe() -> tuple[dict[str, Any], str]:
    """What models/probe.py found, and how it ended where it found less than all."""
    command = [sys.executable, "-m", "pipeline.models.probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        printed, ended = done.stdout, f"the process ended with status {done.returncode} {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        printed = said.decode(errors="replace") if isinstance(said, bytes) else said
        ended = f"no answer within {PATIENCE:.0f} s"
    found: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, ended


def _processor() -> Iterator[Finding]:
    import psutil

    from pipeline.models.dtype import BFLOAT16_INSTRUCTIONS, describe_cpu

    told = describe_cpu()
    flags = set(told["flags"].split())
    can = [name for name in INSTRUCTIONS if name in flags]
    name = told["model name"] or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False)
    cores = f"{usable} of {os.cpu_count()} threads" + (f" on {physical} cores" if physical else "")
    half = "bfloat16 in hardware" if flags & BFLOAT16_INSTRUCTIONS else "no bfloat16: it computes in float32"
    known = f"{', '.join(can)}; {half}" if flags else "the system does not list its instructions"
    figures = {"name": name, "threads": usable, "cores": physical, "instructions": can}
    yield Finding("processor", "works", f"{name}: {cores}; {known}", figures=figures)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    says = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"
    figures = {"total": memory.total, "available": memory.available}
    if memory.available < LITTLE_RAM:
        yield Finding("memory", "look", says, "Close other programs. A base is loaded through this memory.", figures)
    else:
        yield Finding("memory", "works", says, figures=figures)


def _disk(runs: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from pipeline.models.spec import cache_folder

    for what, folder, needed in (
        ("disk, runs", runs, True),
        ("disk, Hub cache", Path(HF_HUB_CACHE), False),
        ("disk, cache", cache_folder(), False),
    ):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(there).free
        says, figures = f"{free / GIB:.1f} GiB free at {folder}", {"folder": str(folder), "free": free}
        if not os.access(there, os.W_OK):
            state: State = "broken" if needed else "look"
            yield Finding(what, state, f"{there} cannot be written to", "Name another folder.", figures)
        elif free < LITTLE_DISK:
            yield Finding(
                what, "look", says, "Free some space: an 8B base takes 16 GB, and its run a few more.", figures
            )
        else:
            yield Finding(what, "works", says, figures=figures)


def _hub() -> Iterator[Finding]:
    """Whether there is a token; what it says is nobody's business."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    logged_in = bool(get_token())
    figures = {"token": logged_in, "offline": bool(HF_HUB_OFFLINE)}
    if HF_HUB_OFFLINE:
        yield Finding("Hub", "look", "HF_HUB_OFFLINE is set: nothing is fetched", "unset HF_HUB_OFFLINE", figures)
    elif logged_in:
        yield Finding("Hub", "works", "a token is there", figures=figures)
    else:
        why = "not logged in: open models and data can be read anyway"
        yield Finding("Hub", "not here", why, "hf auth login, for gated models and to publish", figures)
