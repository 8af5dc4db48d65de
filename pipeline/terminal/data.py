"""`onebase data`: what the examination of a recipe's rows found, and rows as the model will see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline.data import examine as examination
from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.examine import Section, attempt
from pipeline.data.tokens import Unrenderable, special_ids, stop_ids
from pipeline.errors import UserError
from pipeline.plan.sizes import AUTO
from pipeline.recipe.recipe import Recipe
from pipeline.stages.arguments import defaults
from pipeline.terminal.console import counted, print_rows
from pipeline.terminal.machine import print_json

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from pipeline.disk.atomic import Json

LONGEST_LETTER = 4
MARKS = {"\n": "⏎\n", "\t": "⇥\t"}


def examine(recipe: Recipe, names: list[str]) -> Json:
    """What the named stages' data are like, by data/examine.py; tokenizes every row and loads no weights."""
    faults: list[str] = []
    unhashed: list[str] = []
    tokenizer = attempt(faults, _load_tokenizer, recipe)
    parts = attempt(unhashed, recipe.parts)
    sections = []
    for name in recipe.order():
        measured_on = attempt(unhashed, recipe.measured_on, name)
        files = {**parts[name]["data"], **measured_on} if parts and measured_on is not None else {}
        sections.append(_section(recipe, name, files))
    found = {"recipe": recipe.name, **examination.examine(sections, names, tokenizer)}
    found["faults"] = [*faults, *found["faults"]]
    told = examination.faults_in(found)
    # The same file was missed when its rows were read, in a message that names no key.
    found["faults"] += [fault for fault in unhashed if not any(fault.endswith(known) for known in told)]
    return found


def _section(recipe: Recipe, name: str, files: dict[str, str]) -> Section:
    section, kind = recipe.stages[name], recipe.kind(name)
    max_length = section.train.get("max_length", defaults(kind.config_class).get("max_length"))
    return Section(
        name=name,
        kind=section.kind,
        contract=kind.contract,
        encode=kind.encode,
        learnt=kind.learnt,
        check_rows=section.check_rows,
        warn_rows=section.warn_rows,
        data=section.data,
        questions=section.question_file(),
        seed=recipe.spec.seed,
        max_length=None if max_length == AUTO else max_length,
        files=files,
    )


def _load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    from pipeline.models.base import load_tokenizer

    tokenizer = load_tokenizer(recipe.spec.model)
    try:
        stop_ids(tokenizer)
    except Unrenderable as error:
        raise UserError(f"model.chat_template: on a plain dialogue, {error}") from error
    return tokenizer


def show_examination(recipe: Recipe, names: list[str], runs: Path, as_json: bool, console: Console) -> list[str]:
    """Examine the named stages' data, keep the figures in the run's folder, show them, and return the faults."""
    found = examine(recipe, names)
    examination.keep(found, runs / recipe.name)
    if as_json:
        print_json(found)
    else:
        show(found, console)
    return examination.faults_in(found)


def show(found: Json, console: Console) -> None:
    """The figures for a person: a table for each stage, its faults, its warnings."""
    for name, stage in found["stages"].items():
        table = Table(title=f"{name} ({stage['kind']})", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in _lines(stage, console.width):
            table.add_row(label, Text(text))  # a file's words are no markup
        print_rows(table, console)
        show_faults(stage["faults"], console)
        for warning in stage["warnings"]:
            console.print(Text(f"  ! {warning}", style="yellow"))
        if not stage["warnings"] and not stage["faults"]:
            console.print(Text("  no problems found", style="green"))
        console.print()
    show_faults(found["faults"], console)


def show_faults(faults: list[str], console: Console) -> None:
    for fault in faults:
        console.print(Text("  x " + fault.replace("\n", "\n    "), style="red"), soft_wrap=True)


def show_rows(recipe: Recipe, name: str, count: int, console: Console) -> list[str]:
    """Rows as the model will see them: tokens with loss green, those without dim, special tokens reversed. Gives the
    faults of the stage's files."""
    tokenizer = _load_tokenizer(recipe)
    special = special_ids(tokenizer)
    split, _, _, faults = examination.read_sound(_section(recipe, name, {}))
    console.print(Text.assemble(("loss", "bold green"), "  ", ("no loss", "dim"), "  ", ("special token", "reverse")))
    for row in split.train[:count] if split else []:
        console.print(Text(f"── {row['_place']}", style="green"), soft_wrap=True)  # a rule would cut a long place off
        try:
            sequences = recipe.kind(name).encode(tokenizer, row)
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
                style = "dim" if learnt == render.IGNORED else "bold green"
                if token in special:
                    style += " reverse"
                shown.append("".join(MARKS.get(letter, letter) for letter in piece), style=style)
            shown.append(f"  [{len(sequence.ids)} tokens, {sequence.supervised} with loss]", style="cyan")
            console.print(shown)
    show_faults(faults, console)
    return faults


def _labels(row: Row, count: int) -> list[str]:
    return [""] if count == 1 else ["chosen: ", "rejected: "]


def _lines(stage: Json, width: int) -> list[tuple[str, str]]:
    lines = [("rows", _source(source)) for source in stage.get("sources", [])]
    if "tokens" in stage:
        lines += _token_lines(stage["tokens"], width)
    if alike := stage.get("duplicates"):
        among = f" (looked for among {alike['near_among']} rows)" if alike["near_among"] < stage["train_rows"] else ""
        lines.append(("duplicates", f"{alike['exact']} exact, {alike['near']} near{among}"))
    if pairs := stage.get("comparisons"):
        words = "not known" if pairs["bag_of_words"] is None else f"{pairs['bag_of_words']:.1%}"
        against = f"{pairs['contradictory']} contradict others"
        lines.append(("comparisons", f"{pairs['pairs']} on {counted(pairs['prompts'], 'prompt')}, {against}"))
        lines.append(("to beat", f"longer answer wins {pairs['longer_wins']:.1%}, bag of words {words}"))
    return lines


def _token_lines(tokens: Json, width: int) -> list[tuple[str, str]]:
    lines = []
    if length := tokens["length"]:
        lines += [
            ("tokens a row", f"{_range(length)}, 95 % within {length['p95']}; {length['sum']} in all"),
            ("", _bars(tokens["histogram"], width)),
            ("bytes a token", str(tokens["bytes_per_token"])),
            (
                "BOS at the start",
                ", ".join(f"{n} in {counted(rows, 'row')}" for n, rows in tokens["bos_at_the_start"].items()),
            ),
        ]
    over, beyond = tokens["longer_than_max_length"], tokens["tokens_beyond_max_length"]
    lines.append(
        ("over max_length", f"{counted(over, 'row')} over {tokens['max_length']} tokens, by {beyond} tokens in all")
    )
    if "supervised_tokens" in tokens:
        bare, ends = tokens["rows_without_supervised_tokens"], tokens["rows_whose_end_of_turn_is_supervised"]
        lines.append(
            ("tokens with loss", f"{_range(tokens['supervised_tokens'])} a row; {counted(bare, 'row')} without")
        )
        kept = tokens["rows_kept"]
        lines.append(("end of turn learnt", f"in {ends} of {counted(kept, 'row')} kept"))
    return lines


def _source(source: Json) -> str:
    formats = ", ".join(f"{name} {count}" for name, count in source["formats"].items())
    parts = [f"{source['path']} ({formats})", f"{source['used']} of {counted(source['rows'], 'row')} used"]
    parts += [f"{count} refused: {reason}" for reason, count in source["refused"].items()]
    return "\n".join([*parts, *(f"{source[key]} {label}" for key, label in _EXTRA.items() if key in source)])


def _range(spread: Json) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']}" if spread else "0"


_EXTRA = {"held_out": "held out", "left_out": "not drawn", "drawn": "drawn", "file_rows": "rows in the file"}


def _bars(histogram: list[Any], width: int) -> str:
    """`width`: of the terminal, of which labels and counts take some."""
    longest = 24 if width >= 60 else 12
    most = max(count for _, count in histogram) or 1
    bars = [(edge, count, "█" * round(longest * count / most) or ("▏" if count else "")) for edge, count in histogram]
    return "\n".join(f"≤{edge:>7} {bar:<{longest}} {count}" for edge, count, bar in bars)
