"""manifest.json: what a finished stage notes of itself. Nothing in it is converted, and no other word is known."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.disk.atomic import Json

Dtype = Literal["bfloat16", "float16", "float32"]
"""What a model computes in, as torch names it."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def as_json(self) -> Json:
        """As it is written: what need not be there, and is not, is left out."""
        return self.model_dump(exclude_defaults=True, warnings=False)


class Cost(Strict):
    started: str
    """When, in ISO 8601 and UTC."""
    seconds: float
    device: str
    peak_memory_mib: int
    energy_wh: float | None
    """None where nothing is counted."""
    energy_of: str
    """What the energy is counted of."""
    peak_memory_is: str
    versions: dict[str, str]
    """Of the libraries that compute."""


class Parts(Strict):
    """All that an adapter depends on: its fingerprint is the digest of this."""

    stage: Json
    model: Json
    seed: int
    data: dict[str, str | None]
    """By the role of a file: its sha256, or where on the Hub it is."""
    parents: dict[str, str]
    """By role: a fingerprint."""


class SourceCounts(Strict):
    """Where every row of a file went: rows = used + refused + held_out + left_out."""

    path: str
    rows: int
    used: int
    refused: dict[str, int]
    """By reason."""
    held_out: int = 0
    left_out: int = 0
    drawn: int | None = None
    file_rows: int | None = None
    """Rows of the file itself, where some of them give several or none."""


class Data(Strict):
    sources: list[SourceCounts]
    held_out: int | None
    questions: int
    counts: Json
    """What the stage counted of its rows, tokens and steps."""
    measured_on: dict[str, str]
    """The hashes of files that the stage is measured on and does not learn from, by role."""


class Parent(Strict):
    """The stage that this one goes on from, down to the bytes of its adapter."""

    stage: str
    fingerprint: str
    adapter: str
    """The sha256 of its weights."""
    hub: str | None = None
    """Where it was published, if it was pulled from there."""
    lineage: list[Manifest | Gone] = []


class Gone(Parent):
    """A parent of which no more is known: it has been trained again since."""

    role: str
    gone: Literal[True]


class Table(Strict):
    """A table that a stage tells of its held-out rows, for the report and the card; all of it is text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


class Manifest(Cost):
    stage: str
    kind: str
    fingerprint: str
    parts: Parts
    section: Json
    """The stage's section of the recipe, with a number for every auto."""
    parents: dict[str, Parent]
    """By the role that each plays."""
    base: str
    base_hash: str
    base_digest: str
    """Of the frozen base's bytes in memory."""
    dtype: Dtype
    """What the model computed in, also where the recipe says auto."""
    data: Data
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    """Held-out numbers."""
    invariants: dict[str, Any]
    tables: list[Table] = []
    processes: int
    labels: list[str] = []
    """Of a classifier: what each output of its head stands for."""
    several_labels: bool = False
    """Whether a text may have several of them."""
    head_means: list[float] = []
    """Of a reward model with several heads: each one's mean score of training answers, its zero."""
    length_slope: float | None = None
    """Of a reward model: by how much its score grows with each token of an answer."""
    versions_changed: dict[str, dict[str, list[str]]]
    """Libraries of another version that made what it builds upon: {what: {library: [then, now]}}."""
    again: Cost | None = None
    """What measuring it again cost, after it was trained."""
    files: dict[str, str] = {}
    """The sha256 of every file of the adapter; filled in when the stage is sealed."""
    hub: str | None = None
    lineage: list[Manifest | Gone] = []
    load: Json | None = None
    """How the base of a published adapter is loaded."""

    @property
    def data_hashes(self) -> dict[str, str | None]:
        """Of all files that it was trained or measured on, by role."""
        return {**self.parts.data, **self.data.measured_on}

    def as_json(self) -> Json:
        """What it is first, then what it cost."""
        content = super().as_json()
        return {key: content[key] for key in sorted(content, key=lambda key: key in Cost.model_fields)}
