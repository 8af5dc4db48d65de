"""What a stage leaves on disk, and how it is known to be whole.

runs/<recipe>/<stage>/
  claim.json       written first: which fingerprint the checkpoints below belong to
  checkpoints/     for resume
  snapshots/       the policy of a preference stage part of the way, for its evaluation
  adapter/         the trained adapter, its tokenizer and chat template (and a reward model's score head)
  chosen.json      what auto stood for
  metrics.jsonl  samples.jsonl  refused.jsonl  log.txt
  manifest.json    written last: it exists, so the stage finished
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.disk.atomic import Json, file_hashes, read_json, write_json
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
"""Of a run or a stage: it becomes a folder."""
WEIGHTS = "adapter_model.safetensors"
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

    @property
    def chosen(self) -> Path:
        """What auto stood for."""
        return self.folder / "chosen.json"

    def manifest(self) -> Manifest | None:
        """The manifest of a finished stage, or None where there is none.

        Raises UserError if the file is there but is not what this version of the program writes.
        """
        file = self.folder / "manifest.json"
        found = read_json(file)
        try:
            return None if found is None else Manifest.model_validate(found)
        except ValidationError as error:
            place = ".".join(str(step) for step in error.errors()[0]["loc"])
            why = f"{file} is damaged, or another version of OneBase wrote it (see '{place}'). {ANEW}"
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

    def seal(self, manifest: Manifest) -> None:
        """Finish the stage: hash the adapter's files into the manifest and write it, last of all."""
        whole = Manifest.model_validate({**manifest.as_json(), "files": file_hashes(self.adapter)})
        write_json(self.folder / "manifest.json", whole.as_json())
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.folder / "claim.json").unlink(missing_ok=True)

    def verify(self) -> Manifest:
        """The manifest, after every file of the adapter has been found to be the one that was sealed.

        Raises UserError naming the first file that is missing, truncated or altered.
        """
        manifest, found = self.finished(), file_hashes(self.adapter)
        if WEIGHTS not in manifest.files:
            raise UserError(f"{self.folder / 'manifest.json'} names no {WEIGHTS}. {ANEW}")
        for name, sha256 in manifest.files.items():
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
