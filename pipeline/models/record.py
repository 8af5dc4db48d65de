"""What a publication may say of itself: its record (onebase.json) and PEFT's description of the adapter.

Both come from the Hub and may be anybody's. So whatever this program or PEFT acts upon has a type, a pattern and a
bound; what else a record's lineage holds is left behind, and any other unknown word is refused. Plain Python: no torch.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, ValidationError, model_validator

from pipeline.disk.artifact import NAME, WEIGHTS
from pipeline.disk.atomic import read_json
from pipeline.disk.manifest import Dtype, Gone, Manifest, Parent
from pipeline.errors import UserError

RECORD = "onebase.json"
"""Beside what is published: how to load it, its lineage, and the hashes of its files."""
CONFIG = "adapter_config.json"
SIZES = {RECORD: 4 << 20, CONFIG: 1 << 20, WEIGHTS: 32 << 30}
"""The files that are pulled of a publication, and the most bytes each may have."""
DEEPEST = 32
"""Levels of lists and objects in one file."""
EMPTY: tuple[Any, ...] = (None, False, "", [], {})

Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$", max_length=100)]
_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
HubId = Annotated[str, StringConstraints(pattern=f"^{_PART}/{_PART}$", max_length=200)]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
_BASE_HASH = r"^(gguf:[0-9a-f]{64}|folder:[0-9a-f]{16}|hub:[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+@[0-9a-f]{40})$"
BaseHash = Annotated[str, StringConstraints(pattern=_BASE_HASH)]
# transformers writes the further templates of a tokenizer into this folder
_FILE_NAME = r"^(additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
FileName = Annotated[str, StringConstraints(pattern=_FILE_NAME, max_length=200)]
FILE_HASH = re.compile(r"[A-Za-z0-9:._/@-]{0,200}")
"""Of a file that plays a role for a stage: its sha256, or where on the Hub it is."""
PLAIN = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,500}")
Text = Annotated[str, StringConstraints(pattern=f"^{PLAIN.pattern}$")]
Count = Annotated[int, Field(ge=0, le=10**12)]
LARGEST = 1e15
"""Of a number in a manifest, below zero as well."""
LARGEST_SAMPLE = 10**7
"""Rows that an interval is told of."""
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$", max_length=300)]
"""A module's name, or the end of one. No pattern: matching a stranger's can take for ever."""
Modules = Annotated[list[Module], Field(max_length=10_000)]


class Strict(BaseModel):
    """Nothing is converted, and no other word is known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Quantization(Strict):
    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: Literal[True]
    bnb_4bit_compute_dtype: Dtype
    llm_int8_skip_modules: Annotated[list[Literal["lm_head", "score"]], Field(max_length=2)]


class Load(Strict):
    """How the base under the adapter is loaded."""

    base: HubId
    revision: Commit | None
    dtype: Dtype
    attn_implementation: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=40)]
    quantization: Quantization | None
    pad_token_id: Count | None
    labels: list[Text] = []
    """Of a classifier: what each score stands for."""


class Part(Strict):
    path: Text


class DataSection(Strict):
    """What is read of a stage's section."""

    path: Text | None = None
    mix: list[Part] | None = None
    test: Text | Annotated[float, Field(ge=-LARGEST, le=LARGEST)] | None = None


class Section(Strict):
    data: DataSection


class Noted(Parent):
    """A parent, as the stage that grew from it noted it."""

    stage: Name
    fingerprint: Digest
    adapter: Sha256


class Lost(Noted, Gone):
    """A parent of which no more is known."""


class Entry(Manifest):
    """The manifest of a stage of the lineage."""

    stage: Name
    kind: Name
    fingerprint: Digest
    base_hash: BaseHash
    base_digest: Digest
    parents: dict[str, Noted]  # type: ignore[assignment]
    files: dict[FileName, Sha256]


def _entry(tree: Any) -> Entry | Lost:
    """A stage of the lineage, without the words that its class does not name."""
    try:
        if isinstance(tree, dict) and "gone" in tree:
            lost = Lost.model_validate(tree, extra="ignore")
            _check_bounds(lost.model_dump())
            return lost
        entry = Entry.model_validate(tree, extra="ignore")
        Section.model_validate(entry.section, extra="ignore")
    except ValidationError as error:
        raise ValueError(_first_complaint(error)) from None
    free: dict[str, Any] = {"section": True, "invariants": True, "parts": {"stage", "model"}, "data": {"counts"}}
    _check_bounds([entry.model_dump(exclude=free), list(entry.data.counts)])
    if not all(FILE_HASH.fullmatch(sha or "") for sha in entry.data_hashes.values()):
        raise ValueError("it names a file by something that is neither a hash nor a place on the Hub")
    if WEIGHTS not in entry.files:
        raise ValueError(f"it names no {WEIGHTS}")
    if max(entry.data.held_out or 0, entry.data.questions) > LARGEST_SAMPLE:
        raise ValueError(f"it names more than {LARGEST_SAMPLE} held-out rows")
    if entry.hub or entry.load or entry.lineage or any(parent.lineage for parent in entry.parents.values()):
        raise ValueError("it has a lineage of its own")
    return entry


def _check_bounds(value: Any) -> None:
    """Raises ValueError for a text that a table or a message should not hold, and for a number without bounds."""
    if isinstance(value, dict | list):
        for part in [*value, *(value.values() if isinstance(value, dict) else [])]:
            _check_bounds(part)
    elif isinstance(value, str) and not PLAIN.fullmatch(value):
        raise ValueError(f"{_shown(value)} is too long, or holds control characters")
    elif isinstance(value, int | float) and not (0 if isinstance(value, int) else -LARGEST) <= value <= LARGEST:
        raise ValueError(f"{value:g} is out of bounds")


class Record(Strict):
    """onebase.json, whole."""

    onebase: Text
    form: Literal["adapter", "merged", "gguf"]
    stage: Name
    kind: Name
    fingerprint: Digest
    base: HubId | None
    base_hash: BaseHash
    load: Load | None
    parity: dict[str, Any]
    lineage: Annotated[list[Annotated[Manifest | Gone, PlainValidator(_entry)]], Field(min_length=1, max_length=1000)]
    files: Annotated[dict[FileName, Sha256], Field(max_length=10_000)]

    @model_validator(mode="after")
    def _one_story(self) -> Record:
        own = self.lineage[-1]
        if not isinstance(own, Manifest):
            raise ValueError("its lineage does not end with the stage itself")
        for word in ("stage", "kind", "fingerprint", "base_hash"):
            if getattr(own, word) != getattr(self, word):
                raise ValueError(f"its lineage ends with another {word}")
        if self.form == "adapter" and (self.load is None or self.files.get(WEIGHTS) != own.files.get(WEIGHTS)):
            raise ValueError("it does not say how to load the adapter that it describes")
        if self.load and self.load.dtype != own.dtype:
            raise ValueError("its lineage ends with another dtype than the one to load the base in")
        return self

    def manifest(self, hub: str) -> Manifest:
        """The published stage's own manifest, with the lineage, how its base is loaded, and where it was published."""
        lineage = [entry.as_json() for entry in self.lineage]
        load = self.load and self.load.model_dump(exclude_unset=True)
        return Manifest.model_validate({**lineage[-1], "lineage": lineage, "load": load, "hub": hub})


class Adapter(BaseModel):
    """PEFT's description, as far as it may come from elsewhere. Words that are not named here have to be empty: some
    make PEFT import a module by name, read a file, or alter the base."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    base_model_name_or_path: HubId
    revision: Commit | None
    peft_version: Text | None = None
    inference_mode: bool = True
    r: Annotated[int, Field(ge=1, le=65536)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    target_modules: Modules | Literal["all-linear"]
    exclude_modules: Modules | None = None
    modules_to_save: Modules | None = None
    layers_to_transform: Annotated[list[Count], Field(max_length=10_000)] | Count | None = None
    layers_pattern: Modules | Module | None = None
    rank_pattern: dict[Module, Annotated[int, Field(ge=1, le=65536)]] = {}
    alpha_pattern: dict[Module, Annotated[float, Field(gt=0, le=1e6)]] = {}
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    megatron_core: Literal["megatron.core"] | None = None
    qalora_group_size: Count = 16

    @model_validator(mode="after")
    def _nothing_else(self) -> Adapter:
        for word, value in (self.model_extra or {}).items():
            if value not in EMPTY:
                raise ValueError(f"{_shown(word)} is set, which OneBase accepts from no other machine")
        return self


Model = TypeVar("Model", bound=BaseModel)


def read(file: Path, name: str, schema: type[Model], whose: str) -> Model:
    """A file of a publication, proven to be of that schema. Raises UserError naming the first word that is not."""

    def wrong(why: str) -> UserError:
        return UserError(f"{whose}: its {name} is not what `onebase publish` writes ({why})")

    try:
        if file.stat().st_size > SIZES[name]:
            raise wrong(f"it is larger than {SIZES[name] >> 20} MiB")
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(f"{type(error).__name__}: it cannot be read as JSON") from None
    if complaint := _not_plain(tree):
        raise wrong(complaint)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise wrong(_first_complaint(error)) from None


def listed_files(file: Path) -> dict[str, str]:
    """The hashes that a record of our own writing names; none where there is no such record."""
    named = (read_json(file) or {}).get("files")
    if not isinstance(named, dict):
        return {}
    return {name: sha for name, sha in named.items() if isinstance(sha, str)}


def _not_plain(tree: Any) -> str:
    """Why a tree cannot be written again, or be walked through by recursion: else nothing."""
    level = [tree]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                return "a number in it is not finite"
            elif isinstance(value, str) and not value.isascii() and value.encode(errors="replace").decode() != value:
                return "a text in it is not Unicode"
        if not below:
            return ""
        level = below
    return f"it is nested deeper than {DEEPEST} levels"


def _first_complaint(error: ValidationError) -> str:
    """Where the first thing stands that is wrong, and what."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(_shown(str(step)) for step in first["loc"] if step != "[key]")
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _shown(word: str) -> str:
    """A stranger's word as it may stand in a message: short, on one line, without control characters."""
    return ascii(word)[1:-1][:60]
