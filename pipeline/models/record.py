"""What a publication may say of itself: its record (onebase.json) and PEFT's description of the adapter.

Both come from the Hub and may be anybody's. So whatever this program or PEFT acts upon has a type, a pattern and a
bound; what else a record's lineage holds is left behind, and any other unknown word is refused. Plain Python: no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.disk.artifact import NAME, WEIGHTS
from pipeline.disk.atomic import Json, read_json
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError

RECORD = "onebase.json"
"""Beside what is published: how to load it, its lineage, and the hashes of its files."""
CONFIG = "adapter_config.json"
SIZES = {RECORD: 4 << 20, CONFIG: 1 << 20, WEIGHTS: 32 << 30}
"""The files that are pulled of a publication, and the most bytes each may have."""
DEEPEST = 32
"""Levels of lists and objects in one file."""
EMPTY = (None, False, "", [], {})

Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$", max_length=100)]
HubId = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)
]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
BaseHash = Annotated[
    str,
    StringConstraints(
        pattern=r"^(gguf:[0-9a-f]{64}|folder:[0-9a-f]{16}|hub:[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+@[0-9a-f]{40})$"
    ),
]
FileName = Annotated[
    str,
    StringConstraints(
        # transformers writes the further templates of a tokenizer into this folder
        pattern=r"^(additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9_.+-]*$",
        max_length=200,
    ),
]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=500)]
FileHash = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:._/@-]*$", max_length=200)]
"""Of a file that plays a role for a stage: its sha256, or where on the Hub it is."""
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Sample = Annotated[int, Field(ge=0, le=10**7)]
"""How many rows an interval is told of."""
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$", max_length=300)]
"""A module's name, or the end of one. No pattern: matching a stranger's can take for ever."""
Modules = Annotated[list[Module], Field(max_length=10_000)]


class Strict(BaseModel):
    """Nothing is converted, and no other word is known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Known(BaseModel):
    """Nothing is converted; words that are not named here are left behind."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Quantization(Strict):
    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: Literal[True]
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"]
    llm_int8_skip_modules: Annotated[list[Literal["lm_head", "score"]], Field(max_length=2)]


class Load(Strict):
    """How the base under the adapter is loaded."""

    base: HubId
    revision: Commit | None
    dtype: Literal["bfloat16", "float16", "float32"]
    attn_implementation: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=40)]
    quantization: Quantization | None
    pad_token_id: Count | None
    labels: list[Text] = []
    """Of a classifier: what each score stands for."""


class Noted(Known):
    """A parent, as the stage that grew from it noted it."""

    stage: Name
    fingerprint: Digest
    adapter: Sha256
    hub: Text | None = None


class Gone(Noted):
    """A parent of which no more is known: it had been trained again."""

    role: Text
    gone: Literal[True]


class Part(Known):
    path: Text


class DataSection(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    path: Text | None = None
    mix: list[Part] | None = None
    test: Text | Number | None = None


class Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    data: DataSection


class Parts(Known):
    stage: Json
    model: Json
    seed: Count
    data: dict[Text, FileHash | None]
    parents: dict[Text, Text]


class Source(Known):
    path: Text
    rows: Count
    used: Count
    refused: dict[Text, Count]
    held_out: Count = 0


class Data(Known):
    sources: list[Source]
    held_out: Sample | None
    questions: Sample
    counts: dict[Text, Any]
    measured_on: dict[Text, FileHash]


class Cost(Known):
    started: Text
    seconds: Number
    device: Text
    peak_memory_mib: Count
    energy_wh: Number | None
    energy_of: Text
    peak_memory_is: Text
    versions: dict[Text, Text]


class Entry(Cost):
    """The manifest of a stage of the lineage."""

    stage: Name
    kind: Name
    fingerprint: Digest
    parts: Parts
    section: Section
    parents: dict[Text, Noted]
    base: Text
    base_hash: BaseHash
    base_digest: Digest
    data: Data
    seed: Count
    before: dict[Text, Number]
    after: dict[Text, Number]
    invariants: dict[str, Any]
    processes: Count
    labels: list[Text] = []
    versions_changed: dict[Text, dict[Text, Annotated[list[Text], Field(max_length=2)]]]
    again: Cost | None = None
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _has_weights(self) -> Entry:
        if WEIGHTS not in self.files:
            raise ValueError(f"it names no {WEIGHTS}")
        return self


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
    lineage: Annotated[list[Entry | Gone], Field(min_length=1, max_length=1000)]
    files: Annotated[dict[FileName, Sha256], Field(max_length=10_000)]

    @model_validator(mode="after")
    def _one_story(self) -> Record:
        own = self.lineage[-1]
        if not isinstance(own, Entry):
            raise ValueError("its lineage does not end with the stage itself")
        for word in ("stage", "kind", "fingerprint", "base_hash"):
            if getattr(own, word) != getattr(self, word):
                raise ValueError(f"its lineage ends with another {word}")
        if self.form == "adapter" and (self.load is None or self.files.get(WEIGHTS) != own.files.get(WEIGHTS)):
            raise ValueError("it does not say how to load the adapter that it describes")
        return self

    def manifest(self, hub: str) -> Manifest:
        """The published stage's own manifest, with the lineage, how its base is loaded, and where it was published."""
        told = self.model_dump(include={"lineage", "load"}, exclude_unset=True)
        return Manifest.model_validate({**told["lineage"][-1], **told, "hub": hub})


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
                raise ValueError(f"{_shown(word)} is set, which is not taken from elsewhere")
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
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(_shown(str(step)) for step in first["loc"] if step != "[key]")
        told = str(first["msg"]).removeprefix("Value error, ")
        raise wrong(f"{place}: {told}" if place else told) from None


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


def _shown(word: str) -> str:
    """A stranger's word as it may stand in a message: short, on one line, without control characters."""
    return ascii(word)[1:-1][:60]
