"""Files and folders written whole or not at all, locks that die with their process, and hashes."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

Json = dict[str, Any]
TEMPORARY = re.compile(r"\.onebase-[0-9a-f]{16}\.tmp")
"""What is put to a name while the file or folder is being written."""
NEW = 60.0
"""Seconds for which an unlocked temporary folder may be one whose process is about to lock it."""


def read_json(path: Path) -> Json | None:
    """A JSON object from disk; None if there is no such file, UserError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete it to have its stage run again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object. Delete it to have its stage run again.")
    return value


def read_lines(path: Path) -> list[str]:
    """The lines of a file of JSON lines. Texts may hold what str.splitlines() takes for the end of a line, such as
    U+2028; JSON writes the line feed alone as \\n."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_json(path: Path, value: Json) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part (temporary name, sync, rename)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a file whole or not at all; pieces are written as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a person knows the file, and not its temporary name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its real name only once everything in it is on disk."""
    with temporary_beside(folder) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        with temporary_beside(folder) as replaced:
            before = folder.exists()
            if before:
                os.replace(folder, replaced)  # not deleted before the new one stands in its place
            try:
                os.replace(temporary, folder)
            except OSError:
                if before:
                    os.replace(replaced, folder)
                raise


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, under a name that nobody else has. It is removed at the end, and so are those that
    killed processes left for the same path: nobody holds their lock any more."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.onebase-*.tmp"):
        with contextlib.suppress(OSError):
            ours = TEMPORARY.fullmatch(left.name.removeprefix(path.name))
            if ours and time.time() - left.stat().st_mtime > NEW:
                with _held(left):
                    shutil.rmtree(left, ignore_errors=True)
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for abandoned either
            held.enter_context(_held(temporary))
        yield temporary


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The kernel's lock on a folder, or OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.onebase-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def locked(path: Path, refusal: str, patience: float = 0.5) -> Iterator[Callable[[str], None]]:
    """Hold a file lock, or raise UserError(refusal) if another living process still holds it after `patience` seconds:
    holder() takes it for a moment. Gives a function that notes in the file what is being done.

    The lock is the kernel's (flock), so a process that crashes or is killed lets go of it and leaves nothing stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise UserError(refusal.format(pid=file.read().partition(" ")[0] or "unknown")) from None
                time.sleep(0.2)

        def note(what: str) -> None:
            file.truncate(0)
            file.write(f"{os.getpid()} {what}")
            file.flush()

        note("")
        yield note


def holder(path: Path) -> tuple[str, str] | None:
    """The process that holds a lock and what it noted, or None if nobody holds it."""
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, what = file.read().partition(" ")
                return pid, what
    except OSError:
        pass
    return None


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its name relative to it."""
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def digest(value: Any) -> str:
    """A short, stable name for a JSON value."""
    text = json.dumps(_normal(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _normal(value: Any) -> Any:
    """1.0 and 1 are one number."""
    if isinstance(value, dict):
        return {key: _normal(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(below) for below in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
