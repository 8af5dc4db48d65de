"""What a stage leaves on disk, and how it is known to be whole.

runs/<recipe>/<stage>/
  claim.json       written first: which fingerprint the checkpoints below belong to
  checkpoints/     for resume
  snapshots/       the policy of a preference stage part of the way, for its evaluation
  adapter/         the trained adapter, its tokenizer and chat template (and a reward model's score head)
  metrics.jsonl  samples.jsonl  refused.jsonl  log.txt
  manifest.json    written last: it exists, so the stage finished
"""

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

Json = dict[str, Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""Of a run or a stage: it becomes a folder."""
WEIGHTS = "adapter_model.safetensors"
TEMPORARY = re.compile(r"\.onebase-[0-9a-f]{16}\.tmp")
"""What is put to a name while the file or folder is being written."""
NEW = 60.0
"""Seconds for which an unlocked temporary folder may be one whose process is about to lock it."""
ANEW = "Delete its folder to have the stage trained anew."


@dataclass(frozen=True)
class Artifact:
    """The folder of one stage of one run."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def snapshots(self) -> dict[int, Path]:
        """Adapters of the policy as it was after some of its steps, by step."""
        found = (self.folder / "snapshots").glob("step-*[0-9]")
        return dict(sorted((int(folder.name.removeprefix("step-")), folder) for folder in found))

    def snapshot(self, step: int) -> Path:
        return self.folder / "snapshots" / f"step-{step}"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def refused(self) -> Path:
        return self.folder / "refused.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def manifest(self) -> Json | None:
        """The manifest of a finished stage, or None where there is none.

        Raises UserError if the file is there but is not what this program writes.
        """
        manifest = read_json(self.folder / "manifest.json")
        shape: dict[str, Any] = dict.fromkeys(("parts", "files", "before", "after"), dict)
        shape |= {"fingerprint": str, "seconds": float | int}
        if manifest is None:
            return None
        for key, kind in shape.items():
            if not isinstance(manifest.get(key), kind):
                raise UserError(f"{self.folder / 'manifest.json'} is not a whole manifest (see '{key}'). {ANEW}")
        return manifest

    def claim(self, fingerprint: str, parts: Json, by: Json | None = None) -> None:
        """Make the folder this fingerprint's own: whatever another fingerprint left is removed before anything new is
        written, so that no later run can trust a mixture of two. `by`: what else to note of who writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        held = self.claimed()
        if held is None or held.get("fingerprint") != fingerprint:
            for leftover in (self.adapter, self.checkpoints, self.folder / "snapshots"):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in (self.metrics, self.samples, self.refused):
                leftover.unlink(missing_ok=True)
        claim = {"fingerprint": fingerprint, "pid": os.getpid(), "parts": parts, **(by or {})}
        write_json(self.folder / "claim.json", claim)

    def claimed(self) -> Json | None:
        """The claim under which unfinished work lies here; a claim that cannot be read claims nothing."""
        try:
            return read_json(self.folder / "claim.json")
        except UserError:
            return None

    def last_checkpoint(self, fingerprint: str) -> Path | None:
        """The newest checkpoint that was written whole under this fingerprint."""
        found = [
            (int(folder.name.rsplit("-", 1)[1]), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.rsplit("-", 1)[1].isdigit()
        ]
        for _, folder in sorted(found, reverse=True):
            marker = _marker(folder)
            if marker.get("fingerprint") == fingerprint and marker.get("files") == _checkpoint_files(folder):
                return folder
        return None

    def seal(self, manifest: Json) -> None:
        """Finish the stage: hash the adapter's files into the manifest and write it, last of all."""
        write_json(self.folder / "manifest.json", {**manifest, "files": file_hashes(self.adapter)})
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.folder / "claim.json").unlink(missing_ok=True)

    def verify(self) -> Json:
        """The manifest, after every file of the adapter has been found to be the one that was sealed.

        Raises UserError naming the first file that is missing, truncated or altered.
        """
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"{self.folder} holds no finished stage (no manifest.json). Run that stage first.")
        found = file_hashes(self.adapter)
        if WEIGHTS not in manifest["files"]:
            raise UserError(f"{self.folder / 'manifest.json'} names no {WEIGHTS}. {ANEW}")
        for name, sha256 in manifest["files"].items():
            if found.get(name) != sha256:
                state = "is missing" if name not in found else "is corrupted or truncated (its sha256 has changed)"
                raise UserError(
                    f"{self.adapter / name} {state}. The stage '{self.name}' cannot be built upon: "
                    f"delete {self.folder} and run again to train it anew."
                )
        return manifest


def mark_checkpoint(folder: Path, fingerprint: str) -> None:
    """Declare a checkpoint whole. Written after all of its files, so a checkpoint cut short is never resumed."""
    write_json(folder / "onebase.json", {"fingerprint": fingerprint, "files": _checkpoint_files(folder)})


def _checkpoint_files(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in file_hashes(folder).items() if name != "onebase.json"}


def _marker(folder: Path) -> Json:
    try:
        return read_json(folder / "onebase.json") or {}
    except UserError:
        return {}


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
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a file lock, or raise UserError(refusal) if another living process holds it.

    The lock is the kernel's (flock), so a process that crashes or is killed lets go of it and leaves nothing stale.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(refusal.format(pid=file.read().strip() or "unknown")) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


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
