"""`onebase data`: what the examination of a recipe's rows found, and rows as the model will see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.data import examine as examination
from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.examine import Section, attempt
from pipeline.data.examine_rows import Encode
from pipeline.data.load import Part
from pipeline.data.tokens import Unrenderable, special_ids, stop_ids
from pipeline.data.voted import is_of_votes
from pipeline.data.votes import Vote, files_in, read_votes
from pipeline.errors import UserError
from pipeline.label import agreement
from pipeline.language.say import kept, say, say_again, translated
from pipeline.plan.sizes import AUTO
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.waiting import waiting
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
    lacking = waiting(recipe)
    for name in (name for name in recipe.order() if name not in lacking):
        measured_on = attempt(unhashed, recipe.measured_on, name)
        files = {**parts[name]["data"], **measured_on} if parts and measured_on is not None else {}
        sections.append(_section(recipe, name, files))
    found = {"recipe": recipe.name, **examination.examine(sections, names, tokenizer)}
    for name, stage in found["stages"].items():
        parts_of_votes = [part for part in recipe.stages[name].data.parts() if part.rounds or is_of_votes(part.path)]
        votes = attempt([], _read_votes, parts_of_votes)  # what is wrong with them stands among the faults already
        if votes:
            stage["votes"] = agreement.weigh(votes)
    found["faults"] = [*faults, *found["faults"]]
    told = examination.faults_in(found)
    # The same file was missed when its rows were read, in a message that names no key.
    found["faults"] += [fault for fault in unhashed if not any(known in fault for known in told)]
    return found


def _read_votes(parts: list[Part]) -> list[Vote]:
    files = [file for part in parts for file in files_in(Path(part.path), part.rounds)]
    return [vote for file in files for vote in read_votes(file)[0]]


def _section(recipe: Recipe, name: str, files: dict[str, str]) -> Section:
    section, kind = recipe.stages[name], recipe.kind(name)
    max_length = section.train.get("max_length", defaults(kind.config_class).get("max_length"))
    return Section(
        name=name,
        kind=section.kind,
        contract=kind.contract,
        encode=_encoder(recipe, name),
        learnt=kind.learnt,
        check_rows=section.check_rows,
        warn_rows=section.warn_rows,
        data=section.data,
        questions=section.question_file(),
        seed=recipe.spec.seed,
        max_length=None if max_length == AUTO else max_length,
        files=files,
    )


def _encoder(recipe: Recipe, name: str) -> Encode:
    """How a stage encodes a row; with an environment the row tells of its tools."""
    encode, environment = recipe.kind(name).encode, recipe.stages[name].asked_with()
    if environment is None:
        return encode
    from pipeline.models.environments import with_tools

    return lambda tokenizer, row: encode(tokenizer, with_tools([row], environment)[0])


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
    try:
        examination.keep(found, runs / recipe.name)
    except OSError as error:
        raise UserError(
            f"the figures cannot be kept in {runs / recipe.name} ({error.strerror}); name a folder with --runs DIR"
        ) from error
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
            console.print(Padding(Text(f"! {say_again(warning)}", style="yellow"), (0, 0, 0, 2)))
        if not stage["warnings"] and not stage["faults"]:
            console.print(Text("  " + say("no problems found"), style="green"))
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
    console.print(
        Text.assemble(
            (say("with loss"), "bold green"), "  ", (say("no loss"), "dim"), "  ", (say("special token"), "reverse")
        )
    )
    for row in split.train[:count] if split else []:
        console.print(Text(f"── {row['_place']}", style="green"), soft_wrap=True)  # a rule would cut a long place off
        try:
            sequences = _encoder(recipe, name)(tokenizer, row)
        except Unrenderable as error:
            console.print(Text(say("refused: {error}", error=error), style="red"))
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
            told = say("{n} tokens, {learnt} with loss", n=len(sequence.ids), learnt=sequence.supervised)
            shown.append(f"  [{told}]", style="cyan")
            console.print(shown)
    show_faults(faults, console)
    return faults


def _labels(row: Row, count: int) -> list[str]:
    return (
        [""] if count == 1 else [say("{heading}: ", heading=say("chosen")), say("{heading}: ", heading=say("rejected"))]
    )


def _lines(stage: Json, width: int) -> list[tuple[str, str]]:
    lines = [(say("rows"), _source(source)) for source in stage.get("sources", [])]
    if "tokens" in stage:
        lines += _token_lines(stage["tokens"], width)
    if alike := stage.get("duplicates"):
        told = say("{exact} exact, {near} near", exact=alike["exact"], near=alike["near"])
        if alike["near_among"] < stage["train_rows"]:
            told += say(" (looked for among {n} rows)", n=alike["near_among"])
        lines.append((say("duplicates"), told))
    if pairs := stage.get("comparisons"):
        told = say(
            "{n} on {prompts}, {against} contradict others",
            n=pairs["pairs"],
            prompts=counted(pairs["prompts"], "prompt"),
            against=pairs["contradictory"],
        )
        lines.append((say("comparisons"), told))
        words = say("not known") if pairs["bag_of_words"] is None else f"{pairs['bag_of_words']:.1%}"
        longer = f"{pairs['longer_wins']:.1%}"
        beat = say("longer answer wins {longer}, bag of words {words}", longer=longer, words=words)
        lines.append((say("to beat"), beat))
    if votes := stage.get("votes"):
        lines += agreement.tell(votes)
    return lines


def _token_lines(tokens: Json, width: int) -> list[tuple[str, str]]:
    lines = []
    if length := tokens["length"]:
        spread = say("{range}, 95 % within {p95}; {n} in all", range=_range(length), p95=length["p95"], n=length["sum"])
        begun = tokens["bos_at_the_start"].items()
        lines += [
            (say("tokens a row"), spread),
            ("", _bars(tokens["histogram"], width)),
            (say("bytes a token"), str(tokens["bytes_per_token"])),
            (
                say("BOS at the start"),
                say(", ").join(say("{n} in {rows}", n=n, rows=counted(rows, "row")) for n, rows in begun),
            ),
        ]
    over = say(
        "{rows} over {longest} tokens, by {n} tokens in all",
        rows=counted(tokens["longer_than_max_length"], "row"),
        longest=tokens["max_length"],
        n=tokens["tokens_beyond_max_length"],
    )
    if tokens["max_length"] is None:
        over = say("not known: max_length is auto or not set")
    lines.append((say("over max_length"), over))
    if "supervised_tokens" in tokens:
        bare, whole = (counted(tokens[key], "row") for key in ("rows_without_supervised_tokens", "rows_kept"))
        learnt = say("{range} a row; {rows} without", range=_range(tokens["supervised_tokens"]), rows=bare)
        lines.append((say("tokens with loss"), learnt))
        ends = say("in {n} of {rows} kept", n=tokens["rows_whose_end_of_turn_is_supervised"], rows=whole)
        lines.append((say("end of turn learnt"), ends))
    return lines


def _source(source: Json) -> str:
    formats = ", ".join(f"{name} {count}" for name, count in source["formats"].items())
    used = say("{n} of {rows} used", n=source["used"], rows=counted(source["rows"], "row"))
    parts = [f"{source['path']} ({formats})", used]
    parts += [say("{n} refused: {reason}", n=count, reason=reason) for reason, count in source["refused"].items()]
    return "\n".join(
        [*parts, *(f"{source[key]} {translated(label)}" for key, label in _EXTRA.items() if key in source)]
    )


def _range(spread: Json) -> str:
    if not spread:
        return "0"
    return say("{low} to {high}, median {median}", low=spread["min"], high=spread["max"], median=spread["median"])


_EXTRA = {
    "held_out": kept("held out"),
    "left_out": kept("left out"),
    "drawn": kept("drawn"),
    "file_rows": kept("rows in the file"),
}


def _bars(histogram: list[Any], width: int) -> str:
    """`width`: of the terminal, of which labels and counts take some."""
    longest = 24 if width >= 60 else 12
    most = max(count for _, count in histogram) or 1
    bars = [(edge, count, "█" * round(longest * count / most) or ("▏" if count else "")) for edge, count in histogram]
    return "\n".join(f"≤{edge:>7} {bar:<{longest}} {count}" for edge, count, bar in bars)
