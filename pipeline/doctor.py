"""`onebase data`: what the rows of a recipe are like, before any of them is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline.artifact import write_json
from pipeline.data import doctor
from pipeline.data.contracts import Row
from pipeline.recipe import Recipe
from pipeline.stages.arguments import defaults
from pipeline.worker import load_rows

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.artifact import Json

FEW_BYTES_A_TOKEN = 2.0
LENGTH_TELLS = 0.7
ENOUGH_PAIRS = 30
LONGEST_LETTER = 4
MARKS = {"\n": "⏎\n", "\t": "⇥\t"}


def examine(recipe: Recipe, names: list[str]) -> Json:
    """Figures of the named stages' data; tokenizes every row and loads no weights.

    Raises UserError for rows that are refused, as a run would.
    """
    from pipeline.models.base import load_tokenizer

    tokenizer = load_tokenizer(recipe.spec.model)
    parts = recipe.parts()
    found: Json = {"recipe": recipe.name, "stages": {}}
    asked: dict[str, dict[bytes, str]] = {}
    for name in recipe.order():
        # Every stage's rows are read, whichever are shown: a test set is spoilt by any stage that trains on it.
        data, sources = load_rows(recipe, name)
        asked[f"{name} train"] = doctor.asked(data.train)
        if data.test is not None or data.questions:
            asked[f"{name} test"] = doctor.asked([*(data.test or []), *data.questions])
        if name not in names:
            continue
        kind, section = recipe.stages[name].kind, recipe.stages[name]
        max_length = section.train.get("max_length", defaults(recipe.kind(name).config_class).get("max_length"))
        if max_length == "auto":
            max_length = None  # chosen by the card when the stage starts
        stage: Json = {
            "kind": kind,
            "files": {**parts[name]["data"], **recipe.measured_on(name)},
            "sources": [{**source.counts(), "formats": dict(source.layouts)} for source in sources],
            "train_rows": len(data.train),
            "test_rows": len(data.test) if data.test is not None else None,
            "too_long": section.data.too_long,
            "on_bad_row": section.data.on_bad_row,
            "tokens": doctor.tokens(kind, tokenizer, data.train, max_length, section.data.too_long),
            "test_tokens": doctor.tokens(kind, tokenizer, data.test or [], max_length, section.data.too_long),
            "duplicates": doctor.duplicates(data.train, recipe.spec.seed),
        }
        if kind in ("reward", "dpo"):
            stage["comparisons"] = doctor.comparisons(data.train, recipe.spec.seed)
        found["stages"][name] = stage
    found["overlaps"] = _overlaps(asked, names)
    for name, stage in found["stages"].items():
        stage["warnings"] = _warnings(name, stage, found["overlaps"])
    return found


def keep(found: Json, recipe: Recipe, runs: Path) -> None:
    """Put the figures where the report of a run finds them: a stage's replace those it had."""
    file = runs / recipe.name / "data.json"
    before = kept(recipe, runs)
    write_json(file, {**before, **found["stages"]})


def kept(recipe: Recipe, runs: Path) -> Json:
    """Figures that were put there, by stage; none of a file that is damaged."""
    try:
        found = json.loads((runs / recipe.name / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show(found: Json, console: Console) -> None:
    """The figures as a person reads them: a table a stage, then what to look at."""
    for name, stage in found["stages"].items():
        table = Table(
            title=f"{name} ({stage['kind']})", title_justify="left", show_header=False, width=min(100, console.width)
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in _lines(stage):
            table.add_row(label, Text(text))  # a file's words are no markup
        console.print(table)
        for warning in stage["warnings"]:
            console.print(Text(f"  ! {warning}", style="yellow"))
        if not stage["warnings"]:
            console.print(Text("  nothing to object to", style="green"))
        console.print()


def show_rows(recipe: Recipe, name: str, count: int, console: Console) -> None:
    """Rows as the model will see them: tokens with loss green, those without dim, special tokens reversed."""
    from pipeline.data.render import IGNORED, Unrenderable, special_ids
    from pipeline.models.base import load_tokenizer

    tokenizer = load_tokenizer(recipe.spec.model)
    special = special_ids(tokenizer)
    data, _ = load_rows(recipe, name)
    console.print(Text.assemble(("loss", "bold green"), "  ", ("no loss", "dim"), "  ", ("special token", "reverse")))
    for row in data.train[:count]:
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
    tokens = stage["tokens"]
    lines = [("rows", _source(source)) for source in stage["sources"]]
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
    alike = stage["duplicates"]
    among = f" (among {alike['near_among']} rows)" if alike["near_among"] < stage["train_rows"] else ""
    lines.append(("duplicates", f"{alike['exact']} exact, {alike['near']} near{among}"))
    if pairs := stage.get("comparisons"):
        words = "not to be told" if pairs["bag_of_words"] is None else f"{pairs['bag_of_words']:.1%}"
        against = f"{pairs['contradictory']} contradict another"
        lines.append(("comparisons", f"{pairs['pairs']} on {pairs['prompts']} prompts, {against}"))
        lines.append(("to be beaten", f"longer answer wins {pairs['longer_wins']:.1%}, bag of words {words}"))
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


def _warnings(name: str, stage: Json, overlaps: list[Json]) -> list[str]:
    tokens, alike, warned = stage["tokens"], stage["duplicates"], []
    rows = _rendered(tokens)
    stops = "the run would stop" if stage["on_bad_row"] == "stop" else "they would be left out"
    for part, where in ((tokens, ""), (stage["test_tokens"], " of the test set")):
        if part["unrenderable"]:
            first = part["unrenderable_named"][0]
            what = f"{part['unrenderable']} rows{where} cannot be rendered ({stops})"
            warned.append(f"{what}, first {first['place']}: {first['reason']}")
    bare = tokens.get("rows_without_supervised_tokens", 0)
    if bare:
        warned.append(f"{bare} rows have no token with loss within max_length {tokens['max_length']} ({stops})")
    if over := tokens["longer_than_max_length"] - bare:
        left_out = tokens.get("rows_left_out", over)
        what = {"pretrain": "are split", "ppo": "stop the run"}.get(
            stage["kind"], f"are left out: {left_out}, cut: {over - left_out}"
        )
        warned.append(f"{over} rows ({over / rows:.1%}) are longer than max_length {tokens['max_length']} and {what}")
    if stage["kind"] == "sft" and (missing := tokens["rows_kept"] - tokens["rows_whose_end_of_turn_is_supervised"]):
        warned.append(f"in {missing} rows the end of the turn carries no loss: the model would not learn to stop")
    if any(int(count) > 1 for count in tokens["bos_at_the_start"]):
        warned.append("some rows begin with more than one beginning-of-sequence token")
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
