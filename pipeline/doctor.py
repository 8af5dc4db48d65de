"""`onebase data`: what the rows of a recipe are like, before any of them is trained on.

A fault is what a run would stop at. One in a file hides nothing of what can be read elsewhere.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline.artifact import write_json
from pipeline.data import doctor, render
from pipeline.data.contracts import Row
from pipeline.errors import UserError
from pipeline.faults import read_fit, tried
from pipeline.recipe.recipe import Recipe
from pipeline.stages.arguments import defaults

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from pipeline.artifact import Json

FEW_BYTES_A_TOKEN = 2.0
LENGTH_TELLS = 0.7
ENOUGH_PAIRS = 30
LONGEST_LETTER = 4
MARKS = {"\n": "⏎\n", "\t": "⇥\t"}


def examine(recipe: Recipe, names: list[str]) -> Json:
    """Figures of the named stages' data and all that a run would stop at; tokenizes every row and loads no weights.

    `faults` of the recipe and of each stage are texts. A stage whose rows cannot be read has no figures.
    """
    found: Json = {"recipe": recipe.name, "stages": {}, "faults": []}
    tokenizer = tried(lambda: _tokenizer(recipe), found["faults"])
    unhashed: list[str] = []
    parts = tried(recipe.parts, unhashed)
    asked: dict[str, dict[bytes, str]] = {}
    for name in recipe.order():
        # Every stage's rows are read, whichever are shown: a test set is spoilt by any stage that trains on it.
        data, sources, faults = read_fit(recipe, name)
        if name in names:
            found["stages"][name] = {"kind": recipe.stages[name].kind, "faults": faults, "warnings": []}
        elif faults:
            found["faults"].append(f"stage '{name}' has faults of its own: onebase data RECIPE {name} shows them")
        if data is None:
            continue
        asked[f"{name} train"] = doctor.asked(data.train)
        if data.test is not None or data.questions:
            asked[f"{name} test"] = doctor.asked([*(data.test or []), *data.questions])
        if name not in names:
            continue
        kind, section = recipe.stages[name].kind, recipe.stages[name]
        max_length = section.train.get("max_length", defaults(recipe.kind(name).config_class).get("max_length"))
        if max_length == "auto":
            max_length = None  # chosen by the card when the stage starts
        measured_on = tried(functools.partial(recipe.measured_on, name), unhashed)
        stage: Json = found["stages"][name]
        stage |= {
            "files": {**parts[name]["data"], **measured_on} if parts and measured_on is not None else {},
            "sources": [{**source.counts(), "formats": dict(source.layouts)} for source in sources],
            "train_rows": len(data.train),
            "test_rows": len(data.test) if data.test is not None else None,
            "too_long": section.data.too_long,
            "on_bad_row": section.data.on_bad_row,
            "duplicates": doctor.duplicates(data.train, recipe.spec.seed),
        }
        if tokenizer is not None:
            for key, rows in (("tokens", data.train), ("test_tokens", data.test or [])):
                stage[key] = doctor.tokens(kind, tokenizer, rows, max_length, section.data.too_long)
            faults += render.unaskable(tokenizer, data.questions)
        if kind in ("reward", "dpo"):
            stage["comparisons"] = doctor.comparisons(data.train, recipe.spec.seed)
    found["overlaps"] = _overlaps(asked, names)
    for name, stage in found["stages"].items():
        if "tokens" in stage:
            stage["faults"] += _stopping(stage)
        if "duplicates" in stage:
            stage["warnings"] = _warnings(name, stage, found["overlaps"])
    found["faults"] += [fault for fault in unhashed if fault not in faults_in(found)]
    return found


def faults_in(found: Json) -> list[str]:
    """All that a run would stop at, of the recipe and of the stages examined."""
    return [*found["faults"], *(fault for stage in found["stages"].values() for fault in stage["faults"])]


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    from pipeline.models.base import load_tokenizer

    tokenizer = load_tokenizer(recipe.spec.model)
    try:
        render.stop_ids(tokenizer)
    except render.Unrenderable as error:
        raise UserError(f"model.chat_template: on a plain dialogue, {error}") from error
    return tokenizer


def keep(found: Json, recipe: Recipe, runs: Path) -> None:
    """Put the figures where the report of a run finds them: a stage's replace those it had."""
    file = runs / recipe.name / "data.json"
    before = kept(recipe, runs)
    whole = {name: stage for name, stage in found["stages"].items() if "tokens" in stage}
    write_json(file, {**before, **whole})


def kept(recipe: Recipe, runs: Path) -> Json:
    """Figures that were put there, by stage; none of a file that is damaged."""
    try:
        found = json.loads((runs / recipe.name / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show(found: Json, console: Console) -> None:
    """The figures as a person reads them: a table a stage, then what a run would stop at, and what to look at."""
    for name, stage in found["stages"].items():
        table = Table(
            title=f"{name} ({stage['kind']})", title_justify="left", show_header=False, width=min(100, console.width)
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in _lines(stage):
            table.add_row(label, Text(text))  # a file's words are no markup
        console.print(table)
        show_faults(stage["faults"], console)
        for warning in stage["warnings"]:
            console.print(Text(f"  ! {warning}", style="yellow"))
        if not stage["warnings"] and not stage["faults"]:
            console.print(Text("  nothing to object to", style="green"))
        console.print()
    show_faults(found["faults"], console)


def show_faults(faults: list[str], console: Console) -> None:
    for fault in faults:
        console.print(Text("  x " + fault.replace("\n", "\n    "), style="red"), soft_wrap=True)


def show_rows(recipe: Recipe, name: str, count: int, console: Console) -> list[str]:
    """Rows as the model will see them: tokens with loss green, those without dim, special tokens reversed. Gives the
    faults of the stage's files."""
    from pipeline.data.render import IGNORED, Unrenderable, special_ids

    tokenizer = _tokenizer(recipe)
    special = special_ids(tokenizer)
    data, _, faults = read_fit(recipe, name)
    console.print(Text.assemble(("loss", "bold green"), "  ", ("no loss", "dim"), "  ", ("special token", "reverse")))
    for row in data.train[:count] if data else []:
        console.print(Text(f"── {row['_place']}", style="green"), soft_wrap=True)  # a rule would cut a long place off
        try:
            sequences = doctor.sequences(recipe.stages[name].kind, tokenizer, row)
        except Unrenderable as error:
            console.print(Text(f"refused: {error}", style="red"))
            continue
        for label, sequence in zip(_labels(row, len(sequences)), sequences, strict=True):
            shown = Text(label)
            torn: list[int] = []
            for token, learnt in zip(sequence.ids, sequence.labels, strict=True):
                piece = str(tokenizer.decode([*torn, token]))
                if piece.endswith("\ufffd") and len(torn) < LONGEST_LETTER:
                    torn.append(token)  # a letter of several tokens is shown with its last
                    continue
                torn = []
                style = "dim" if learnt == IGNORED else "bold green"
                if token in special:
                    style += " reverse"
                shown.append("".join(MARKS.get(letter, letter) for letter in piece), style=style)
            shown.append(f"  [{len(sequence.ids)} tokens, {sequence.supervised} with loss]", style="cyan")
            console.print(shown)
    show_faults(faults, console)
    return faults


def _labels(row: Row, count: int) -> list[str]:
    return [""] if count == 1 else ["chosen: ", "rejected: "]


def _overlaps(asked: dict[str, dict[bytes, str]], names: list[str]) -> list[Json]:
    """Every training set that shares prompts with a test set, of its own stage or of another."""
    found = []
    for train in (key for key in asked if key.endswith(" train")):
        for test in (key for key in asked if key.endswith(" test")):
            if train.split()[0] not in names and test.split()[0] not in names:
                continue
            both = doctor.shared(asked[train], asked[test])
            if both["shared"]:
                found.append({"train": train.split()[0], "test": test.split()[0], "of": len(asked[test]), **both})
    return found


def _lines(stage: Json) -> list[tuple[str, str]]:
    lines = [("rows", _source(source)) for source in stage.get("sources", [])]
    if "tokens" in stage:
        lines += _token_lines(stage["tokens"])
    if alike := stage.get("duplicates"):
        among = f" (among {alike['near_among']} rows)" if alike["near_among"] < stage["train_rows"] else ""
        lines.append(("duplicates", f"{alike['exact']} exact, {alike['near']} near{among}"))
    if pairs := stage.get("comparisons"):
        words = "not to be told" if pairs["bag_of_words"] is None else f"{pairs['bag_of_words']:.1%}"
        against = f"{pairs['contradictory']} contradict another"
        lines.append(("comparisons", f"{pairs['pairs']} on {pairs['prompts']} prompts, {against}"))
        lines.append(("to be beaten", f"longer answer wins {pairs['longer_wins']:.1%}, bag of words {words}"))
    return lines


def _token_lines(tokens: Json) -> list[tuple[str, str]]:
    lines = []
    if length := tokens["length"]:
        lines += [
            ("tokens a row", f"{_range(length)}, 95 % within {length['p95']}; {length['sum']} in all"),
            ("", _bars(tokens["histogram"])),
            ("bytes a token", str(tokens["bytes_per_token"])),
            ("BOS at the start", ", ".join(f"{n}: {rows} rows" for n, rows in tokens["bos_at_the_start"].items())),
        ]
    over, beyond = tokens["longer_than_max_length"], tokens["tokens_beyond_max_length"]
    lines.append(("over max_length", f"{over} rows over {tokens['max_length']}, {beyond} tokens beyond it"))
    if "supervised_tokens" in tokens:
        bare, ends = tokens["rows_without_supervised_tokens"], tokens["rows_whose_end_of_turn_is_supervised"]
        lines.append(("tokens with loss", f"{_range(tokens['supervised_tokens'])} a row; none in {bare} rows"))
        kept = tokens["rows_kept"]
        lines.append(("end of turn learnt", f"in {ends} of the {kept} rows kept"))
    return lines


def _source(source: Json) -> str:
    formats = ", ".join(f"{name} {count}" for name, count in source["formats"].items())
    parts = [f"{source['path']} ({formats})", f"{source['used']} of {source['rows']} rows used"]
    parts += [f"{count} refused: {reason}" for reason, count in source["refused"].items()]
    return "\n".join([*parts, *(f"{source[key]} {label}" for key, label in _EXTRA.items() if key in source)])


def _range(spread: Json) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']}" if spread else "0"


_EXTRA = {"held_out": "held out", "left_out": "not drawn", "drawn": "drawn", "file_rows": "rows in the file"}


def _rendered(tokens: Json) -> int:
    return max(1, int(tokens["rows"] - tokens["unrenderable"]))


def _bars(histogram: list[Any]) -> str:
    most = max(count for _, count in histogram) or 1
    bars = [(edge, count, "█" * round(24 * count / most) or ("▏" if count else "")) for edge, count in histogram]
    return "\n".join(f"≤{edge:>7} {bar:<24} {count}" for edge, count, bar in bars)


def _stopping(stage: Json) -> list[str]:
    """What a run would stop at in rows that can be read."""
    return [text for text, stops in _objections(stage) if stops]


def _objections(stage: Json) -> Iterator[tuple[str, bool]]:
    """What the tokens of a stage's rows have against them, and whether a run would stop at it."""
    tokens, stops = stage["tokens"], stage["on_bad_row"] == "stop"
    fate = "" if stops else ": they would be left out"
    for part, where in ((tokens, ""), (stage["test_tokens"], " of the test set")):
        if part["unrenderable"]:
            first = part["unrenderable_named"][0]
            what = f"{part['unrenderable']} rows{where} cannot be rendered{fate}"
            yield f"{what}, first {first['place']}: {first['reason']}", stops
    bare = tokens.get("rows_without_supervised_tokens", 0)
    if bare:
        yield f"{bare} rows have no token with loss within max_length {tokens['max_length']}{fate}", stops
    if over := tokens["longer_than_max_length"] - bare:
        left_out = tokens.get("rows_left_out", over)
        what = {"pretrain": "are split", "ppo": "stop the run"}.get(
            stage["kind"], f"are left out: {left_out}, cut: {over - left_out}"
        )
        share = f"{over} rows ({over / _rendered(tokens):.1%})"
        yield f"{share} are longer than max_length {tokens['max_length']} and {what}", stage["kind"] == "ppo"
    if stage["kind"] == "sft" and (missing := tokens["rows_kept"] - tokens["rows_whose_end_of_turn_is_supervised"]):
        yield f"in {missing} rows the end of the turn carries no loss: the model would not learn to stop", True


def _warnings(name: str, stage: Json, overlaps: list[Json]) -> list[str]:
    alike, warned = stage["duplicates"], []
    if tokens := stage.get("tokens"):
        warned += [text for text, stops in _objections(stage) if not stops]
        if any(int(count) > 1 for count in tokens["bos_at_the_start"]):
            warned.append("some rows begin with more than one beginning-of-sequence token")
        if count := tokens["texts_with_special_tokens"]:
            warned.append(f"{count} texts spell special tokens, which the model will read as such and not as words")
        if tokens["bytes_per_token"] and tokens["bytes_per_token"] < FEW_BYTES_A_TOKEN:
            warned.append(f"a token is {tokens['bytes_per_token']} bytes: this tokenizer hardly knows the language")
    for how, sign in (("exact", "="), ("near", "~")):
        if alike[how]:
            a, b = alike[f"{how}_named"][0]
            verb = "repeat" if how == "exact" else "nearly repeat"
            warned.append(f"{alike[how]} rows {verb} another, for example {a} {sign} {b}")
    warned += _about_pairs(stage.get("comparisons"))
    for overlap in overlaps:
        if name in (overlap["train"], overlap["test"]):
            a, b = overlap["named"][0]
            whose = "its own" if overlap["train"] == overlap["test"] else f"{overlap['test']}'s"
            of = f"{overlap['shared']} of the {overlap['of']} prompts of {whose} test set"
            warned.append(f"{overlap['train']} trains on {of}, for example {a} = {b}")
    return warned


def _about_pairs(pairs: Json | None) -> list[str]:
    warned = []
    if pairs and pairs["contradictory"]:
        a, b = pairs["contradictory_named"][0]
        warned.append(f"{pairs['contradictory']} comparisons contradict another, for example {a} and {b}")
    if not pairs or pairs["pairs"] < ENOUGH_PAIRS:
        return warned
    if (share := max(pairs["longer_wins"], 1 - pairs["longer_wins"])) > LENGTH_TELLS:
        word = "longer" if pairs["longer_wins"] > 0.5 else "shorter"
        warned.append(f"the {word} answer wins {share:.1%} of the comparisons: length alone would score that")
    return warned
