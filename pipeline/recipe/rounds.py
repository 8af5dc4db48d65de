"""Rounds: the stages that learn from votes, repeated on the votes of all rounds so far.

rounds: 3                            # or {count: 3, votes: 100}

Each round's stages are trained from where the recipe says, on all votes so far, and its answers are what people read in
the next round. Source: Bai et al. 2022 (arXiv 2204.05862), section 4.5, "iterated online RLHF".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.data.load import TEST_OF_ROUNDS
from pipeline.disk.atomic import Json
from pipeline.errors import complaint
from pipeline.recipe.gates import MEASURED
from pipeline.stages.stage import StageSpec

LABELS = "labels"
"""The folder of votes, beside the recipe or where the command is typed."""
ARENA = "arena"
"""The folder of votes on held-out prompts, beside the recipe."""


Count = Annotated[int, Field(ge=1, le=99, strict=True)]


class Rounds(BaseModel):
    """How often, and how many votes each time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: Count
    """How many rounds there are."""
    votes: int = Field(default=100, ge=1, strict=True)
    """Votes of people that a round waits for. Those count from which one of its stages learns."""


RoundsOrCount = Annotated[
    Rounds,
    BeforeValidator(
        lambda given: {"count": given} if isinstance(given, int) else given, json_schema_input_type=Rounds | Count
    ),
]


def expand(tree: Json, stages: dict[str, StageSpec], rounds: Rounds, file: str) -> tuple[Json, dict[str, str]]:
    """The tree with every round's stages spelt out, and by the name of each the one it was written under.

    tree, stages: the recipe as it was written, as plain data and checked.  file: where it lies.
    Raises a complaint where no stage reads votes, or a name is taken.
    """
    folders = {os.path.normpath(path) for path in (LABELS, os.path.join(os.path.dirname(file), LABELS))}
    reads = {
        name
        for name, section in stages.items()
        if any(os.path.normpath(part.path) in folders and not part.rounds for part in section.data.parts())
    }
    if not reads:
        if any(read_by(section) for section in stages.values()):
            return tree, {}  # spelt out already
        raise complaint(f"no stage learns from votes: give one of them data: {{path: {LABELS}/}}", "rounds")
    for name in sorted(reads):
        data = stages[name].data
        if data.group or (isinstance(data.test, int | float) and data.test > 1):
            raise complaint(TEST_OF_ROUNDS, "stages", name, "data", "group" if data.group else "test")
    repeated = _with_heirs(reads, stages)
    held_out = [test for name in reads if isinstance(test := stages[name].data.test, int | float)]
    spelt = {name: section for name, section in tree["stages"].items() if name not in repeated}
    written = {}
    for number in range(1, rounds.count + 1):

        def renamed(name: str, number: int = number) -> str:
            return f"{name}-{number}" if name in repeated else name

        for name in (name for name in tree["stages"] if name in repeated):
            if (copy := renamed(name)) in tree["stages"]:
                raise complaint(f"its rounds need the name '{copy}', which a stage has already", "stages", name)
            section = {"kind": stages[name].kind, **_renamed(tree["stages"][name], renamed)}
            section["data"] = _of_round(section["data"], folders, number)
            if held_out and not (name in reads and stages[name].data.test == max(held_out)):
                section["data"]["apart"] = max(held_out)
            spelt[copy], written[copy] = section, name
    expect = _demands(tree.get("expect") or {}, repeated, rounds.count)
    return {**tree, "stages": spelt, **({"expect": expect} if expect else {})}, written


def _with_heirs(names: set[str], stages: dict[str, StageSpec]) -> set[str]:
    """With all that are handed something by them, near or far."""
    while True:
        heirs = {
            name
            for name, section in stages.items()
            if names & {section.from_, *(term.source for term in section.reward_terms())}
        }
        if heirs <= names:
            return names
        names = names | heirs


def _renamed(section: Json, renamed: Callable[[str], str]) -> Json:
    """A section that names the stages of its own round."""
    section = dict(section)
    if section.get("from"):
        section["from"] = renamed(section["from"])
    if isinstance(reward := section.get("reward"), str):
        section["reward"] = renamed(reward)
    elif reward:
        section["reward"] = [{**term, "source": renamed(term["source"])} for term in reward]
    if section.get("replay"):
        section["replay"] = {renamed(name): share for name, share in section["replay"].items()}
    return section


def _of_round(data: Json, folders: set[str], number: int) -> Json:
    """A data section that reads the votes of the rounds up to this one."""

    def part(of: Json) -> Json:
        return {**of, "rounds": number} if os.path.normpath(of.get("path") or "") in folders else of

    return {**data, "mix": [part(of) for of in data["mix"]]} if data.get("mix") else part(dict(data))


def _demands(expect: Json, repeated: set[str], count: int) -> Json:
    """What is expected of a stage, of its every round; it may name a stage of that round again, of which something is
    kept."""
    found: dict[str, Any] = {}
    for key, value in expect.items():
        stage, dot, number = key.partition(".")
        for n in range(1, count + 1) if stage in repeated else [0]:

            def of_round(number: str, n: int = n) -> str:
                earlier, _, rest = number.removeprefix(MEASURED).partition(".")
                own = number.startswith(MEASURED) and earlier in repeated
                return f"{MEASURED}{earlier}-{n}.{rest}" if own else number

            below = {of_round(name): demand for name, demand in value.items()} if isinstance(value, dict) else value
            found[f"{stage}-{n}{dot}{of_round(number)}" if n else key] = below
    return found


def read_by(section: StageSpec) -> int:
    """The last round whose votes a stage reads; 0 for a stage that reads none."""
    return max(part.rounds or 0 for part in section.data.parts())
