"""What is to be published: a sealed stage, its base, the base's public name and the stages it grew from.

Plain Python: no torch.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, sha256_of_file
from pipeline.disk.manifest import Gone, Manifest, Parent
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec, pinned
from pipeline.recipe.recipe import Recipe
from pipeline.stages import STAGES

_FOLDERS = re.compile(r"(?<![\w:/.~])~?/(?:[^\s/:]+/)*")


@dataclass(frozen=True)
class Sealed:
    """A finished stage whose files are the ones that were sealed, on the base it was trained on."""

    artifact: Artifact
    manifest: Manifest
    model: ModelSpec
    """With the dtype it was trained in."""
    base_id: str | None
    """The base's name on the Hub, never a path; None where it has none."""
    lineage: list[Manifest | Gone]
    """The manifests of all stages it grew from and its own, which comes last."""
    recipe: Json

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def known(self) -> list[Manifest]:
        """Those of the lineage that are still there."""
        return [entry for entry in self.lineage if isinstance(entry, Manifest)]

    @property
    def labels(self) -> list[str]:
        """Of a classifier: what each score stands for, in their order. Empty for a reward model and for a policy."""
        return self.manifest.labels

    @property
    def problem_type(self) -> str:
        """In transformers' words, by which its pipeline makes chances of scores."""
        several = self.manifest.several_labels
        return "multi_label_classification" if several else "single_label_classification"

    @property
    def num_labels(self) -> int:
        """How many scores it gives: of a reward model one a head, 0 for a policy, which has the LM head."""
        heads = int(self.manifest.section.get("heads", 1))
        return len(self.labels) or heads * STAGES[self.kind].score_head

    @property
    def what(self) -> str:
        """What it is, in words."""
        if self.labels:
            return "a classifier"
        return "a reward model" if self.num_labels else "a language model"

    @property
    def base_commit(self) -> str | None:
        """The commit of a base on the Hub that it was trained on."""
        return self.manifest.base_hash.partition("@")[2] or None

    @functools.cached_property
    def base_verified(self) -> bool | None:
        """Whether the Hub's weights of the base's name are the bytes trained on; None if the Hub could not tell."""
        return _same_on_hub(self.model, self.base_id) if self.base_id else None

    @property
    def title(self) -> str:
        return f"{self.artifact.folder.parent.name}-{self.artifact.name}"


def read_sealed(recipe: Recipe, stage: str, runs: Path) -> Sealed:
    """The stage as it was trained. Raises UserError if it is not finished, has been altered, was trained on another
    base or under another model section than the recipe now names."""
    if stage not in recipe.stages:
        raise UserError(f"no stage '{stage}' in the recipe {recipe.name} (there is: {', '.join(recipe.stages)})")
    artifact, model = recipe.artifact(stage, runs), recipe.spec.model
    manifest = artifact.verify()
    trained, now = manifest.parts.model, recipe.model_parts()
    if trained != now:
        changed = sorted(key for key in {*trained, *now} if trained.get(key) != now.get(key))
        raise UserError(
            f"{artifact.folder} was trained with another model section than the recipe has: {', '.join(changed)} "
            f"differ. Publish from the run's own recipe ({artifact.folder.parent}), or run '{stage}' again."
        )
    if manifest.data.measured_on != recipe.measured_on(stage):
        print(
            f"  warning: '{stage}' was measured on other held-out files than the recipe names now. The card gives the "
            "numbers of then; onebase run measures it again."
        )
    base_id = model.public_id or (None if Path(model.base).exists() else model.base.removeprefix("hub:"))
    names = {model.base: base_id or Path(model.base).name}
    lineage: list[Manifest | Gone] = []
    for entry in [*ancestors(artifact.folder.parent, manifest.parents), manifest]:
        # A parent does not repeat the lineage that stands before it.
        public = entry.model_dump(exclude={"parents": {"__all__": {"lineage"}}})
        lineage.append(type(entry).model_validate(_public(public, names)))
    trained_in = pinned(model).model_copy(update={"dtype": manifest.dtype})
    return Sealed(artifact, manifest, trained_in, base_id, lineage, _public(recipe.tree, names))


def ancestors(run: Path, parents: dict[str, Parent]) -> list[Manifest | Gone]:
    """The manifests of the stages of a run that handed a stage something, each after its own parents.

    A parent trained again since is not the one this stage grew from: of it only what this stage noted is told.
    """
    entries_by_fingerprint: dict[str, Manifest | Gone] = {}
    for role, noted in parents.items():
        entries = noted.lineage
        if not entries:
            parent = Artifact(run / noted.stage).manifest()
            if parent is None or parent.files.get(WEIGHTS) != noted.adapter:
                entries = [Gone(**noted.model_dump(), role=role, gone=True)]
            else:
                entries = [*ancestors(run, parent.parents), parent]
        for entry in entries:
            entries_by_fingerprint.setdefault(entry.fingerprint, entry)
    return list(entries_by_fingerprint.values())


def _same_on_hub(model: ModelSpec, base_id: str) -> bool | None:
    """Whether a local base is, file by file, what the Hub holds under its public name."""
    folder = Path(model.base)
    if not folder.exists():
        return True
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(base_id, files_metadata=True, timeout=10).siblings or []
    except Exception:  # offline, gated, another endpoint: the client raises a different class for each
        return None
    theirs = {f.rfilename: f.lfs.sha256 for f in listed if f.lfs and f.rfilename.endswith(".safetensors")}
    ours = {file.name: sha256_of_file(file) for file in folder.glob("*.safetensors")}
    if not theirs:
        return None
    return ours == {name: sha for name, sha in theirs.items() if "/" not in name}


def _public(value: Any, names: dict[str, str]) -> Any:
    """The same without what only this machine knows: the base by its public name, files without their folders."""
    if isinstance(value, dict):
        return {_public(key, names): _public(below, names) for key, below in value.items()}
    if isinstance(value, list):
        return [_public(below, names) for below in value]
    if isinstance(value, str):
        return names.get(value) or _FOLDERS.sub("", value)
    return value
