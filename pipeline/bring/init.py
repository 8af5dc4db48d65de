"""`onebase init`: a first recipe from five answers. It is read, checked and planned before it is written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.bring import rows
from pipeline.bring.draft import GOALS, Answers, Draft, draft
from pipeline.bring.questions import settle
from pipeline.data.files import is_hub_id
from pipeline.disk.atomic import write_text
from pipeline.errors import UserError, suggest
from pipeline.plan import cards
from pipeline.plan.cards import GIB, Card
from pipeline.stages import STAGES

DEMO = "models/SmolLM2-135M-Instruct"
NO_CARD = "none"
BASES: dict[bool, list[tuple[float, str]]] = {
    True: [
        (15, "Qwen/Qwen3-8B"),
        (10, "Qwen/Qwen3-4B"),
        (5, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
    False: [(15, "Qwen/Qwen3-8B"), (10, "Qwen/Qwen3-4B"), (5, "Qwen/Qwen3-1.7B"), (0, "Qwen/Qwen3-0.6B")],
}
"""By whether English is enough: what is proposed from so many GiB up."""


@dataclass(frozen=True)
class Given:
    """What was said as options; what is empty is asked."""

    base: str = ""
    data: str = ""
    card: str = ""
    goal: str = ""
    language: str = ""
    encoding: str = ""


def start(file: Path, given: Given, asking: bool, force: bool) -> None:
    """Ask what was not given, and write the recipe. Raises UserError where a file is in the way or an option is bad."""
    if file.exists() and not force:
        raise UserError(f"{file} is there already; choose another name, or write over it with --force")
    name = name_of_run(file)
    if name != file.stem:
        print(f"The run is named '{name}': a name has a-z, A-Z, 0-9, - and _ only. Change `name:` if you like")

    def read_data(text: str) -> tuple[str, list[rows.File]]:
        return _read_data(text, given.encoding or "utf-8")

    question = "Your data: a file, a folder, or a data set on the Hub (owner/name)"
    path, found = settle(given.data, question, "", "--data", asking, read_data)
    goals = "\n".join(f"  {name:<9} {GOALS[name].does}" for name in GOALS)
    default = _goal_of(found)
    question = f"What the model shall learn\n{goals}\nGoal"
    goal = settle(given.goal, question, default, "--goal", asking, lambda text: _read_goal(text, found))
    question = "Language of the data"
    language = settle(given.language, question, "English", "--language", asking, _read_language)
    here = cards.detect_card()
    question = "Card: its name (rtx3060), its memory (12GB), or none for the CPU"
    card = settle(given.card, question, _name_of(here), "--card", asking, lambda text: _read_card(text, here))
    default = _base_for(card, language)

    def read_base(text: str) -> Draft:
        base = _read_base(text)
        return draft(Answers(name, path, found, goal, language, card, card is here, base, given.encoding))

    question = "Base: a Hub id, a local folder, or a .gguf file"
    made = settle(given.base, question, default, "--base", asking, read_base)
    write_text(file, made.text(str(file)))
    for line in made.summary():
        print(line)
    print(f"{file} is written. Next: onebase check {file}, then onebase run {file}")


def name_of_run(file: Path) -> str:
    """The file's name, without what the name of a run may not have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem).strip("-_")[:100] or "mine"


def _read_data(text: str, encoding: str) -> tuple[str, list[rows.File]]:
    if not os.path.exists(text) and not is_hub_id(text):
        raise UserError(f"{text}: no such file or folder (looked in {Path.cwd()})")
    found = rows.look_at(text, encoding)
    for file in found[:10]:
        print(f"  {file.path}: {file.layouts}; usable for {', '.join(kind for kind in STAGES if kind in file.fits)}")
    return text, found


def _goal_of(found: list[rows.File]) -> str:
    """The most that the data can teach, of what they are made for."""
    if any(file.layouts.startswith("kto") for file in found):
        return "thumbs"
    fits = frozenset[str]().union(*(file.fits for file in found))
    for goal, kind in (("classify", "classify"), ("prefer", "dpo"), ("follow", "sft"), ("corpus", "pretrain")):
        if kind in fits:
            return goal
    return "follow"


def _read_goal(text: str, found: list[rows.File]) -> str:
    if text not in GOALS:
        raise UserError(f"there is no goal '{text}'{suggest(text, GOALS)}")
    for kind in GOALS[text].needs:
        if not any(kind in file.fits for file in found):
            example = GOALS[text].example
            has = f"{found[0].path}, which has the columns {found[0].columns}"
            raise UserError(f"'{text}' takes rows like {example}, and there are none in {has}")
    return text


def _read_language(text: str) -> str:
    if not re.fullmatch(r"[^\W\d_][^\W\d_ -]*([ -][^\W\d_]+)*", text) or len(text) > 40:
        raise UserError(f"{text!r} is not the name of a language; write for example German")
    return text[0].upper() + text[1:]


def _read_card(text: str, here: Card | None) -> Card | None:
    if text.lower() == NO_CARD:
        return None
    if here is not None and text == here.name:
        return here
    try:
        return cards.find_card(text)
    except UserError as error:
        raise UserError(str(error).replace("--gpu", "--card") + "; none is for the CPU") from None


def _read_base(text: str) -> str:
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            raise UserError(f"{text}: the folder holds no model (no config.json)")
    elif not os.path.isfile(text) and not re.fullmatch(r"(hub:)?[\w.-]+/[\w.-]+", text):
        raise UserError(f"{text} is no local folder, no .gguf file and no Hub id (owner/name)")
    elif text.startswith((".", "/", "~")) and not os.path.isfile(text):
        raise UserError(f"{text}: no such file or folder (looked in {Path.cwd()})")
    elif os.path.isfile(text) and not text.endswith(".gguf"):
        raise UserError(f"{text} is a file, but not a .gguf file")
    return text


def _name_of(card: Card | None) -> str:
    return card.name if card else NO_CARD


def _base_for(card: Card | None, language: str) -> str:
    """What is proposed: as large as leaves room for a whole chain, and of the language."""
    english = language == "English"
    if card is None and english and os.path.isdir(DEMO):
        return DEMO
    room = card.room / GIB if card else 0
    return next(base for least, base in BASES[english] if room >= least)
