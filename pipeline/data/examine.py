"""What the rows of a recipe's stages are like, before any of them is trained on, and all that a run would stop at.

A fault is what a run would stop at. One in a file hides nothing of what can be read elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from pipeline.data import examine_rows, render
from pipeline.data.contracts import QUESTION, Contract, Row
from pipeline.data.examine_rows import Encode, Learnt
from pipeline.data.load import DataSpec, Part, Source, Split, labels_as_answers, read_source, read_split, refusal
from pipeline.disk.atomic import write_json
from pipeline.errors import UserError
from pipeline.language.say import kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.disk.atomic import Json

T = TypeVar("T")
P = ParamSpec("P")
FEW_BYTES_A_TOKEN = 2.0
LENGTH_TELLS = 0.7
ENOUGH_PAIRS = 30


@dataclass(frozen=True)
class Section:
    """What a recipe says of a stage's rows."""

    name: str
    kind: str
    contract: Contract
    encode: Encode
    learnt: Learnt
    check_rows: Callable[[Sequence[Row], Sequence[Row] | None], None]
    warn_rows: Callable[[Sequence[Row], Sequence[Row] | None], list[str]]
    data: DataSpec
    questions: str | None
    seed: int
    max_length: int | None
    """In tokens; None where the card chooses it."""
    files: dict[str, str] = field(default_factory=dict)
    """Hashes of the files by their role."""


def examine(sections: list[Section], names: list[str], tokenizer: PreTrainedTokenizerBase | None) -> Json:
    """Figures of the named stages' data and all that a run would stop at; without a tokenizer those of tokens are left
    out. `faults` of the recipe and of each stage are texts. A stage whose rows cannot be read has no figures.
    """
    found: Json = {"stages": {}, "faults": []}
    asked: dict[str, dict[bytes, str]] = {}
    for section in sections:
        # Every stage's rows are read, whichever are shown: a test set is spoilt by any stage that trains on it.
        name, (split, questions, sources, faults) = section.name, read_sound(section)
        if name in names:
            found["stages"][name] = {"kind": section.kind, "faults": faults, "warnings": []}
        elif faults:
            found["faults"].append(f"stage '{name}' has faults itself: onebase data RECIPE {name} shows them")
        if split is None:
            continue
        asked[f"{name} train"] = examine_rows.digest_prompts(split.train)
        if split.test is not None or questions:
            asked[f"{name} test"] = examine_rows.digest_prompts([*(split.test or []), *questions])
        if name not in names:
            continue
        stage: Json = found["stages"][name]
        stage |= {
            "files": section.files,
            "learnt": section.learnt,
            "long_rows": _tell_long_rows(section),
            "sources": [{**source.counts().as_json(), "formats": dict(source.layouts)} for source in sources],
            "train_rows": len(split.train),
            "test_rows": len(split.test) if split.test is not None else None,
            "too_long": section.data.too_long,
            "on_bad_row": section.data.on_bad_row,
            "duplicates": examine_rows.find_duplicates(split.train, section.seed),
        }
        if tokenizer is not None:
            for key, rows in (("tokens", split.train), ("test_tokens", split.test or [])):
                stage[key] = examine_rows.count_tokens(
                    section.encode, section.learnt, tokenizer, rows, section.max_length, section.data.too_long
                )
            faults += render.unaskable(tokenizer, questions)
        stage["warnings"] = section.warn_rows(split.train, split.test)
        if section.contract.kind == "preference":
            stage["comparisons"] = examine_rows.weigh_comparisons(split.train, section.seed)
    found["overlaps"] = _find_overlaps(asked, names)
    for name, stage in found["stages"].items():
        if "tokens" in stage:
            stage["faults"] += [text for text, stops in _object(stage) if stops]
        if "duplicates" in stage:
            stage["warnings"] += _warn(name, stage, found["overlaps"])
    return found


def _tell_long_rows(section: Section) -> str:
    """What becomes of rows over max_length, where they are neither cut nor left out."""
    if section.learnt == "everything":
        return kept("are split")
    return "stop the run" if section.contract.kind == "prompt" else ""


def faults_in(found: Json) -> list[str]:
    """All that a run would stop at, of the recipe and of the stages examined."""
    return [*found["faults"], *(fault for stage in found["stages"].values() for fault in stage["faults"])]


def keep(found: Json, folder: Path) -> None:
    """Put the figures into a run's folder, where its report finds them: a stage's replace those it had."""
    file, before = folder / "data.json", read_kept(folder)
    if file.exists() and not (file.read_bytes()[:2] == b"{\n" and all("tokens" in stage for stage in before.values())):
        raise UserError(f"{file} is not a file of `onebase data`, which would write over it. Choose another --runs")
    whole = {name: stage for name, stage in found["stages"].items() if "tokens" in stage}
    if whole:
        write_json(file, {**before, **whole})


def read_kept(folder: Path) -> Json:
    """Figures that were put there, by stage; none of a file that is damaged."""
    try:
        found = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def attempt(faults: list[str], read: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | None:
    """What `read` gives, or None and what was wrong among the faults."""
    try:
        return read(*args, **named)
    except UserError as error:
        faults.append(str(error))
        return None


def read_sound(section: Section) -> tuple[Split | None, Sequence[Row], list[Source], list[str]]:
    """A stage's rows without those that a run would stop at, None where too little can be read; its questions, the
    files, and the faults."""
    spec, contract, file = section.data, section.contract, section.questions
    first: list[str] = []
    faults: list[str] = []

    def read_skipping(spec: DataSpec, contract: Contract, part: Part) -> Source | None:
        source = attempt(faults, read_source, part.path, contract, _skip(spec), part)
        if source and source.reasons and spec.on_bad_row == "stop":
            faults.append(refusal(source, contract))
        return source

    split = attempt(first, read_split, spec, contract, section.seed)
    asked = attempt(first, read_source, file, QUESTION, DataSpec(path=file)) if file else None
    if first:
        skipping = _skip(spec)
        sources = [read_skipping(spec, contract, part) for part in spec.parts()]
        if isinstance(spec.test, str):
            part = Part(path=spec.test, format=spec.format, split=spec.split, encoding=spec.encoding)
            if not read_skipping(spec, contract, part):
                skipping = skipping.model_copy(update={"test": None})
        asked = read_skipping(DataSpec(path=file), QUESTION, Part(path=file, encoding=spec.encoding)) if file else None
        split = attempt(faults, read_split, skipping, contract, section.seed) if all(sources) else None
    if split:
        attempt(faults if first else first, section.check_rows, split.train, split.test)
    questions = labels_as_answers(asked.rows) if asked else []
    return split, questions, [*split.sources, *([asked] if asked else [])] if split else [], faults or first


def _skip(spec: DataSpec) -> DataSpec:
    return spec.model_copy(update={"on_bad_row": "skip"})


def _find_overlaps(asked: dict[str, dict[bytes, str]], names: list[str]) -> list[Json]:
    """Every training set that shares prompts with a test set, of its own stage or of another."""
    found = []
    for train in (key for key in asked if key.endswith(" train")):
        for test in (key for key in asked if key.endswith(" test")):
            if train.split()[0] not in names and test.split()[0] not in names:
                continue
            both = examine_rows.find_shared(asked[train], asked[test])
            if both["shared"]:
                found.append({"train": train.split()[0], "test": test.split()[0], "of": len(asked[test]), **both})
    return found


def _count_rendered(tokens: Json) -> int:
    return max(1, int(tokens["rows"] - tokens["unrenderable"]))


def _object(stage: Json) -> Iterator[tuple[str, bool]]:
    """What the tokens of a stage's rows have against them, and whether a run would stop at it."""
    tokens, stops = stage["tokens"], stage["on_bad_row"] == "stop"
    longest = tokens["max_length"]

    def fate(told: str) -> str:
        return told if stops else kept("{told} (they would be left out)", told=told)

    for part, test in ((tokens, False), (stage["test_tokens"], True)):
        if part["unrenderable"]:
            n, first = part["unrenderable"], part["unrenderable_named"][0]
            told = kept("{n} rows of the test set cannot be rendered", n=n)
            told = told if test else kept("{n} rows cannot be rendered", n=n)
            place, reason = first["place"], first["reason"]
            yield kept("{told}, first {place}: {reason}", told=fate(told), place=place, reason=reason), stops
    if bare := tokens.get("rows_without_supervised_tokens", 0):
        told = kept("{n} rows have no token with loss within max_length {longest}", n=bare, longest=longest)
        yield fate(told), stops
    if over := tokens["longer_than_max_length"] - bare:
        left_out = tokens.get("rows_left_out", over)
        what = stage["long_rows"] or kept("are left out: {out}, cut: {cut}", out=left_out, cut=over - left_out)
        share = f"{over / _count_rendered(tokens):.1%}"
        told = kept(
            "{n} rows ({share}) are longer than max_length {longest} and {what}",
            n=over,
            share=share,
            longest=longest,
            what=what,
        )
        yield told, what == "stop the run"
    if stage["learnt"] == "answers" and (
        missing := tokens["rows_kept"] - tokens["rows_whose_end_of_turn_is_supervised"]
    ):
        yield f"in {missing} rows the end-of-turn token carries no loss: the model would not learn to stop", True


def _warn(name: str, stage: Json, overlaps: list[Json]) -> list[str]:
    alike, warned = stage["duplicates"], []
    if tokens := stage.get("tokens"):
        warned += [text for text, stops in _object(stage) if not stops]
        if any(int(count) > 1 for count in tokens["bos_at_the_start"]):
            warned.append(kept("some rows begin with more than one beginning-of-sequence token"))
        if count := tokens["texts_with_special_tokens"]:
            warned.append(
                kept(
                    "{n} texts contain the text of special tokens: the model reads it as these tokens, not as words",
                    n=count,
                )
            )
        if tokens["bytes_per_token"] and tokens["bytes_per_token"] < FEW_BYTES_A_TOKEN:
            warned.append(
                kept(
                    "a token is {n} bytes: this tokenizer splits the language into very small pieces",
                    n=tokens["bytes_per_token"],
                )
            )
    for how, sign in (("exact", "="), ("near", "~")):
        if alike[how]:
            a, b = alike[f"{how}_named"][0]
            example = f"{a} {sign} {b}"
            warned.append(
                kept("{n} rows repeat another, for example {example}", n=alike[how], example=example)
                if how == "exact"
                else kept("{n} rows nearly repeat another, for example {example}", n=alike[how], example=example)
            )
    warned += _warn_of_pairs(stage.get("comparisons"))
    for overlap in overlaps:
        if name in (overlap["train"], overlap["test"]):
            a, b = overlap["named"][0]
            values = {"n": overlap["shared"], "of": overlap["of"], "a": a, "b": b}
            warned.append(
                kept(
                    "{train} trains on {n} of the {of} prompts of its own test set, for example {a} = {b}",
                    train=overlap["train"],
                    **values,
                )
                if overlap["train"] == overlap["test"]
                else kept(
                    "{train} trains on {n} of the {of} prompts of {test}'s test set, for example {a} = {b}",
                    train=overlap["train"],
                    test=overlap["test"],
                    **values,
                )
            )
    return warned


def _warn_of_pairs(pairs: Json | None) -> list[str]:
    warned = []
    if pairs and pairs["contradictory"]:
        a, b = pairs["contradictory_named"][0]
        n = pairs["contradictory"]
        warned.append(kept("{n} comparisons contradict another, for example {a} and {b}", n=n, a=a, b=b))
    if not pairs or pairs["pairs"] < ENOUGH_PAIRS:
        return warned
    if (share := max(pairs["longer_wins"], 1 - pairs["longer_wins"])) > LENGTH_TELLS:
        told = f"{share:.1%}"
        warned.append(
            kept(
                "the longer answer wins {share} of the comparisons: a rule that looks only at length would be right as "
                "often",
                share=told,
            )
            if pairs["longer_wins"] > 0.5
            else kept(
                "the shorter answer wins {share} of the comparisons: a rule that looks only at length would be right "
                "as often",
                share=told,
            )
        )
    return warned
