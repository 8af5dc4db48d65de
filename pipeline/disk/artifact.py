"""What a stage leaves on disk, and how it is known to be whole.

runs/<recipe>/<stage>/
  claim.json       written first: which fingerprint the checkpoints below belong to
  checkpoints/     for resume
  snapshots/       the policy of a preference stage part of the way, for its evaluation
  adapter/         the trained adapter, its tokenizer and chat template (and a reward model's score head)
  chosen.json      what auto stood for
  kept.jsonl       of rejection sampling: the answers that it has learnt from
  tracked.json     under which name trackers know it
  metrics.jsonl  samples.jsonl  refused.jsonl  log.txt
  engine.txt       what vLLM printed, where it sampled the answers (ppo/engine.py)
  manifest.json    written last: it exists, so the stage finished
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pydantic import ValidationError

from pipeline.disk.atomic import Json, file_hashes, read_json, write_json
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""Of a run or a stage: it becomes a folder."""
WEIGHTS = "adapter_model.safetensors"
ANEW = "Delete its folder to have the stage trained anew."


class Artifact:
    """The folder of one stage of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.adapter = folder / "adapter"
        self.checkpoints = folder / "checkpoints"
        self.metrics = folder / "metrics.jsonl"
        self.samples = folder / "samples.jsonl"
        self.refused = folder / "refused.jsonl"
        self.log = folder / "log.txt"
        self.chosen = folder / "chosen.json"
        self.kept = folder / "kept.jsonl"
        self._snapshots = folder / "snapshots"
        self._claim = folder / "claim.json"
        self._manifest = folder / "manifest.json"
        self._tracked = folder / "tracked.json"

    def snapshots(self) -> dict[int, Path]:
        """Adapters of the policy as it was after some of its steps, by step."""
        return _by_step(self._snapshots, "step-")

    def snapshot(self, step: int) -> Path:
        return self._snapshots / f"step-{step}"

    def manifest(self) -> Manifest | None:
        """The manifest of a finished stage, or None where there is none.

        Raises UserError if the file is there but is not what this version of the program writes.
        """
        content = read_json(self._manifest)
        try:
            return None if content is None else Manifest.model_validate(content)
        except ValidationError as error:
            place = ".".join(str(step) for step in error.errors()[0]["loc"])
            why = f"{self._manifest} is damaged, or another version of OneBase wrote it (see '{place}'). {ANEW}"
            raise UserError(why) from None

    def finished(self) -> Manifest:
        """The manifest. Raises UserError where there is none."""
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"{self.folder} holds no finished stage (no manifest.json). Run that stage first.")
        return manifest

    def claim(self, fingerprint: str, parts: Json, by: Json | None = None) -> None:
        """Make the folder this fingerprint's own: whatever another fingerprint left is removed before anything new is
        written, so that no later run can trust a mixture of two. `by`: what else to note of who writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._manifest.unlink(missing_ok=True)
        former = self.claimed()
        if former is None or former.get("fingerprint") != fingerprint:
            for leftover in (self.adapter, self.checkpoints, self._snapshots):
                shutil.rmtree(leftover, ignore_errors=True)
            for leftover in (self.metrics, self.samples, self.refused, self.kept, self._tracked):
                leftover.unlink(missing_ok=True)
        claim = {"fingerprint": fingerprint, "pid": os.getpid(), "parts": parts, **(by or {})}
        write_json(self._claim, claim)

    def note_steps(self, steps: int) -> None:
        """Of the training that has begun under this claim, how many there will be."""
        write_json(self._claim, {**(self.claimed() or {}), "steps": steps})

    def claimed(self) -> Json | None:
        """The claim under which unfinished work lies here; a claim that cannot be read claims nothing."""
        return _read_or_none(self._claim)

    def tracked(self) -> Json:
        """What trackers know of its training (training/trackers.py), empty where there is none."""
        return _read_or_none(self._tracked) or {}

    def note_tracked(self, known: Json) -> None:
        write_json(self._tracked, known)

    def last_checkpoint(self, fingerprint: str) -> Path | None:
        """The newest checkpoint that was written whole under this fingerprint."""
        for folder in reversed(_by_step(self.checkpoints, "checkpoint-").values()):
            marker = _read_or_none(folder / "onebase.json") or {}
            if marker.get("fingerprint") == fingerprint and marker.get("files") == _checkpoint_files(folder):
                return folder
        return None

    def seal(self, manifest: Manifest) -> None:
        """Finish the stage: hash the adapter's files into the manifest and write it, last of all."""
        whole = Manifest.model_validate({**manifest.as_json(), "files": file_hashes(self.adapter)})
        write_json(self._manifest, whole.as_json())
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self._claim.unlink(missing_ok=True)

    def verify(self) -> Manifest:
        """The manifest, after every file of the adapter has been found to be the one that was sealed.

        Raises UserError naming the first file that is missing, truncated or altered.
        """
        manifest, hashes = self.finished(), file_hashes(self.adapter)
        if WEIGHTS not in manifest.files:
            raise UserError(f"{self._manifest} names no {WEIGHTS}. {ANEW}")
        for name, sha256 in manifest.files.items():
            if hashes.get(name) != sha256:
                state = "is missing" if name not in hashes else "is corrupted or truncated (its sha256 has changed)"
                raise UserError(
                    f"{self.adapter / name} {state}. No stage can continue from '{self.name}': "
                    f"delete {self.folder} and run again to train it anew."
                )
        return manifest


def mark_checkpoint(folder: Path, fingerprint: str) -> None:
    """Declare a checkpoint whole. Written after all of its files, so a checkpoint cut short is never resumed."""
    write_json(folder / "onebase.json", {"fingerprint": fingerprint, "files": _checkpoint_files(folder)})


def _checkpoint_files(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in file_hashes(folder).items() if name != "onebase.json"}


def _by_step(folder: Path, prefix: str) -> dict[int, Path]:
    """The folders below that are named by a step, in its order."""
    steps = {below.name.removeprefix(prefix): below for below in folder.glob(f"{prefix}*")}
    return dict(sorted((int(step), below) for step, below in steps.items() if step.isdigit()))


def _read_or_none(file: Path) -> Json | None:
    try:
        return read_json(file)
    except UserError:
        return None
