"""The words of another trainer's config, taken one by one: what nobody took is told with a reason, none is dropped."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.disk.atomic import Json
from pipeline.stages import STAGES
from pipeline.stages import arguments as trainer
from pipeline.stages.arguments import WHY_NOT
from pipeline.training.trackers import TRACKERS

T = TypeVar("T")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Left:
    """A word without a counterpart, or one that is only met in part."""

    word: str
    value: Any
    why: str


@dataclass
class Imported:
    """A run of another trainer as a stage of a recipe."""

    kind: str
    model: Json
    data: Json
    train: Json
    left: list[Left]
    output: str = ""
    """Where it would have been written, which other configs may go on from."""
    goes_on_from: str = ""
    """The adapter it begins with."""
    paid_by: str = ""
    """The reward model of PPO."""
    rewards: list[Json] = field(default_factory=list)
    """What GRPO's answers are paid by, as terms of `reward:`. A source without a colon is a folder."""
    seed: int | None = None


@dataclass
class Words:
    """A config's words; `place` is put before them in messages, where they are a section's. Null says nothing."""

    given: Json
    place: str = ""
    left: list[Left] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rest = {word: value for word, value in self.given.items() if value is not None and value != ""}

    def take(self, word: str) -> Any:
        return self.rest.pop(word, None)

    def text(self, word: str, default: str = "") -> str:
        value = self.take(word)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        return self._unless_none(word, value, "text", default)

    def flag(self, word: str, default: bool = False) -> bool:
        value = self.take(word)
        if isinstance(value, bool):
            return value
        return self._unless_none(word, value, "true or false", default)

    def number(self, word: str, default: float | None = None) -> float | None:
        value = self.take(word)
        value = plain_number(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        return self._unless_none(word, value, "a number", default)

    def whole(self, word: str, default: int | None = None) -> int | None:
        value = self.number(word, default)
        if value is None or (value % 1 == 0 and abs(value) < 2**53):
            return None if value is None else int(value)
        self.leave(word, "is no whole number", value)
        return default

    def texts(self, word: str) -> list[str]:
        """A list, or one text with commas."""
        value = self.take(word)
        if isinstance(value, str):
            return [each.strip() for each in value.split(",") if each.strip()]
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return value
        return self._unless_none(word, value, "a list of texts", [])

    def sections(self, word: str) -> list[Words]:
        """A list of mappings, or one mapping."""
        value = self.take(word)
        value = [value] if isinstance(value, dict) else value
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            return [Words(each, f"{self.place}{word}[{index}].", self.left) for index, each in enumerate(value)]
        return self._unless_none(word, value, "a list of sections", [])

    def leave(self, word: str, why: str, value: Any = None) -> None:
        value = self.take(word) if word in self.rest else value
        self.left.append(Left(self.place + word, value, why))

    def leave_all(self, reasons: Mapping[str, str]) -> None:
        """Of the words that have a reason: tell it."""
        for word in [word for word in self.rest if word in reasons]:
            self.leave(word, reasons[word])

    def leave_rest(self, peer: str) -> None:
        for word in list(self.rest):
            self.leave(word, f"is no word of {peer} that is known here")

    def _unless_none(self, word: str, value: Any, expected: str, default: T) -> T:
        if value is not None:
            self.leave(word, f"is not {expected}", value)
        return default


SHARED_REASONS = {
    **dict.fromkeys(("do_train", "do_predict"), "is what `onebase run` and `onebase eval` do"),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "eval_on_start", "eval_accumulation_steps"),
        "is chosen by the memory there is",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
        "is not taken over, so that nothing is sent unasked: onebase publish, when it is trained",
    ),
    **dict.fromkeys(("overwrite_output_dir", "overwrite_cache"), "is not needed: what is stale is made anew"),
    **dict.fromkeys(
        ("ddp_timeout", "ddp_find_unused_parameters", "local_rank", "ddp_backend"),
        "belongs to an accelerate config: --launch-config",
    ),
    "gradient_checkpointing_kwargs": "is decided here: activations are computed again without reentrance",
    "tf32": "is left to torch",
    "trust_remote_code": "is not offered: no code that comes with a base or its rows is run",
    "pure_bf16": "is not offered: adapters are held and updated in float32",
}  # fmt: skip
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "float32": "float32"}


def take_shared(words: Words, model: Json, train: Json) -> None:
    """What transformers' trainers have in common, and is said elsewhere or otherwise in a recipe."""
    ratio, steps = words.number("warmup_ratio"), words.number("warmup_steps")
    if steps or ratio is not None:
        train["warmup_steps"] = steps or ratio
    if steps and ratio:
        words.leave("warmup_ratio", "is beside warmup_steps, which counts", ratio)
    if words.flag("group_by_length"):
        train["train_sampling_strategy"] = "group_by_length"
    for word, dtype in DTYPES.items():
        said = words.take(word)
        if said is True:
            model["dtype"] = dtype
        elif said not in (None, False, "auto"):
            words.leave(word, "is not true, false or auto", said)
    _trackers(words, train)
    words.leave_all(SHARED_REASONS)


def _trackers(words: Words, train: Json) -> None:
    names = words.texts("report_to")
    known = [name for name in names if name in TRACKERS or (name in ("all", "none") and len(names) == 1)]
    if unknown := [name for name in names if name not in known]:
        words.leave("report_to", f"names trackers that are not known here (there is: {', '.join(TRACKERS)})", unknown)
    if known:
        train["report_to"] = known if len(known) > 1 else known[0]


def take_trainer_words(words: Words, kind: str, train: Json) -> None:
    """The trainer's own words, word for word where its config has them; why not, where it is another's to say."""
    known = trainer.words(STAGES[kind].config_class)
    for word in list(words.rest):
        if word in WHY_NOT:
            words.leave(word, WHY_NOT[word])
        elif word in known:
            train[word] = plain_number(words.take(word))


def plain_number(value: Any) -> Any:
    """A number that some configs have in quotes, without them; anything else as it stands."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        return value
    return int(value) if value.lstrip("+-").isdecimal() else float(value)


def quantized(words: Words, bits: int | None, data_type: str, word: str) -> str:
    """What model.quantize says, of a base in so many bits; `word` is the one that says so."""
    if bits in (None, 16, 32):
        return "none"
    if bits != 4:
        words.leave(word, "is not offered here: the base is taken in 4 bits", bits)
    if data_type not in ("nf4", "fp4"):
        words.leave(word, f"names the type {data_type}, and there are nf4 and fp4: nf4 is taken", data_type)
        return "nf4"
    return data_type


def attention(words: Words, word: str, asked: str) -> Json:
    """What the model section says of attention. Another package is not asked for unasked: without it no run begins."""
    if asked.startswith("flash_attention"):
        why = f"needs the package flash-attn: torch's own is taken; where it is installed, attn_implementation: {asked}"
        words.leave(word, why, asked)
        return {}
    return {"attn_implementation": asked}


def only_lora(words: Words, word: str, value: str) -> None:
    words.leave(word, "is not offered: a stage trains a LoRA adapter on a frozen base", value)


def base_of(words: Words, word: str) -> str:
    base = words.text(word)
    if not base:
        words.leave(word, "is missing: name the base as model.base")
    return base or "BASE"


def name_of(output: str) -> str:
    """The name of a run, of the folder it was to be written to."""
    steps = [re.sub(r"[^A-Za-z0-9_-]+", "-", step).strip("-_") for step in os.path.normpath(output).split(os.sep)]
    named = [step for step in steps if step and step not in ("out", "outputs", "saves", "output")]
    return "-".join(named[-3:])[:100] or "imported"
