"""Write docs/recipe.md and docs/recipe-train.md: every word that a recipe may have, from the sections' own docstrings
and defaults.

To use it:
    python scripts/make_reference.py            writes the files
    python scripts/make_reference.py --check    writes nothing; exits with 1 if a file is not what would be written
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel

from pipeline.data.load import DataSpec, Part
from pipeline.models.spec import ModelSpec
from pipeline.plan.sizes import AUTO_ARGUMENTS
from pipeline.ppo.engine_settings import EngineSettings
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.recipe.sections import RecipeSpec
from pipeline.stages import STAGES
from pipeline.stages.arguments import NUMBERS, OUR_WORDS
from pipeline.stages.ppo import PaidSpec
from pipeline.stages.reward_term import RewardTerm
from pipeline.stages.stage import PolicySpec, StageSpec

PAGE, TRAIN = ROOT / "docs" / "recipe.md", ROOT / "docs" / "recipe-train.md"
PLAIN = {  # of words whose sections say nothing, as their names say it all
    "seed": "The random seed of the whole run.",
    "model": "The base and the adapter's shape, see [`model`](#model).",
    "stages": "The stages by their names, see [stages](#a-stage).",
    "data": "Where the rows come from, see [`data`](#data).",
    "path": "A file, a folder, or the id of a data set on the Hub.",
    "format": "As in the section.",
    "split": "As in the section.",
    "limit": "Use at most so many rows, from the start.",
    "weight": "How much this source counts; 0 measures it without paying for it.",
    "gamma": "Discount of later rewards, gamma of GAE [G].",
    "weight_decay": "Weight decay of the optimizer.",
    "learning_rate": "Learning rate of the policy.",
    "gradient_checkpointing": "Compute activations again on the way back, to save memory.",
    "logging_steps": "A line in metrics.jsonl every so many steps.",
    "save_steps": "A checkpoint every so many steps.",
    "save_total_limit": "How many checkpoints are kept; 2 if not given.",
    "adam_epsilon": "epsilon of AdamW.",
}

HEAD = """# Recipe reference

<!-- Written by scripts/make_reference.py from docstrings in the code. Do not edit: change those and run it again. -->

Every word that a recipe may have. A word that does not stand here, and that the trainer's or PEFT's config does not
know, is refused with its line and a suggestion. [Stages](stages.md) shows a whole recipe and how stages are connected.

YAML is read strictly: a key that is given twice is an error, `1e-5` is a number, and anchors are not used.
Any value can be changed on the command line: `onebase run RECIPE -o stages.dpo.train.beta=0.05`.
"""
HEAD_OF_TRAIN = """# Recipe reference: `train` of ppo and grpo

<!-- Written by scripts/make_reference.py from docstrings in the code. Do not edit: change those and run it again. -->

What these two stages take under `train:`. Both sample answers and learn from them; [PPO and GRPO](ppo.md) says how. All
other words of a recipe are in the [recipe reference](recipe.md).
"""


class Word(NamedTuple):
    name: str
    type: str
    default: str
    says: str
    group: str


def words_of(section: type[BaseModel], *, without: type[BaseModel] | None = None) -> Iterator[Word]:
    """The fields of a section, with the docstring below each and the last comment line above it."""
    told, groups = docstrings(section)
    for name, field in section.model_fields.items():
        if without and name in without.model_fields and name != "kind":
            continue
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        says = told.get(name) or PLAIN.get(name) or ""
        assert says, f"{section.__name__}.{name} has no docstring, and scripts/make_reference.py has no words for it"
        kind = "sections by name" if name == "stages" else in_words(field.annotation)
        yield Word(field.alias or name, kind, default, says, groups.get(name, ""))


def docstrings(section: type[BaseModel]) -> tuple[dict[str, str], dict[str, str]]:
    """By field: its docstring, and the comment that heads its group."""
    told: dict[str, str] = {}
    groups: dict[str, str] = {}
    for of in reversed(section.__mro__):
        if not (issubclass(of, BaseModel) and of is not BaseModel):
            continue
        source = textwrap.dedent(inspect.getsource(of))
        lines, body = source.splitlines(), ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef)
        group = ""
        for node, after in zip(body.body, [*body.body[1:], None], strict=True):
            above = lines[node.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                groups[node.target.id] = group
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    told[node.target.id] = " ".join(str(after.value.value).split())
    return told, groups


def in_words(kind: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "", Any: "anything"}
    if kind in names:
        return names[kind]
    if hasattr(kind, "__metadata__"):
        return in_words(kind.__origin__)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return "list of sections" if inner[0] in (Part, RewardTerm) else f"list of {in_words(inner[0])}s"
    if origin is dict:
        return "section"
    if inner:
        parts = [in_words(part) for part in inner]
        if parts[:1] == ["true or false"] and "whole number" in parts:
            parts = ["true, false", "whole number"]
        parts = [part for part in dict.fromkeys(parts) if part]
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    return "section" if isinstance(kind, type) and issubclass(kind, BaseModel) else str(kind)


def shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, dict):
        return "`{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}`"
    if isinstance(value, str):
        return f"`{value!r}`" if "\n" in value else f"`{value}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(words: Iterator[Word] | list[Word]) -> str:
    rows = ["| Word | Value | Default | What it does |", "| --- | --- | --- | --- |"]
    rows += [f"| `{word.name}` | {word.type} | {word.default} | {cell(word.says)} |" for word in words]
    return "\n".join(rows)


def cell(text: str) -> str:
    return re.sub(r"<(?=\s)", "&lt;", text).replace("|", "\\|")


def grouped(stage: str, words: list[Word]) -> str:
    """One table for each group of words."""
    parts = []
    for group in dict.fromkeys(word.group for word in words):
        heading = f"### {stage}: {group[0].lower()}{group[1:]}\n\n"
        parts.append(heading + table([word for word in words if word.group == group]))
    return "\n\n".join(parts)


def page() -> str:
    stages = []
    for name, stage in STAGES.items():
        config = stage.config_class
        own = f"[words of its own](recipe-train.md#{name})"
        takes = own if isinstance(config, type) else f"the words of TRL's `{config}`"
        house = ", ".join(f"`{word}: {str(value).lower() if isinstance(value, bool) else value}`"
                          for word, value in stage.house.items())  # fmt: skip
        further = [word for word in words_of(stage.section, without=PolicySpec) if word.name != "kind"]
        text = f"### `{name}`\n\n{(inspect.getdoc(inspect.getmodule(stage.section)) or '').split(chr(10) * 2)[0]}\n\n"
        text += f"- `train:` takes {takes}.\n"
        text += f"- Defaults of this stage that differ from it: {house}.\n" if house else ""
        text += f"- `questions:` is {'allowed' if stage.answers else 'not allowed: it leaves no policy'}.\n"
        numbers = ", ".join(f"`{number}`" for number in stage.numbers)
        if issubclass(stage.section, PaidSpec):
            numbers += "; for each source of the reward also `reward/SOURCE`, with the endings of `reward`"
        text += f"- Numbers that `expect:` can name: {numbers}.\n"
        stages.append(text + (f"\n{table(further)}\n" if further else ""))
    refused = ["| Words | Why |", "| --- | --- |"]
    refused += [f"| {', '.join(f'`{word}`' for word in listed)} | {why} |" for why, listed in OUR_WORDS.items()]
    numbers = ", ".join(f"`{word}` (from {least:g})" for word, (_, least) in NUMBERS.items())
    parts = [
        HEAD,
        "## The top level\n\n" + table(words_of(RecipeSpec)),
        "## `model`\n\n" + table(words_of(ModelSpec)),
        "`lora:` takes the words of PEFT's `LoraConfig`, word for word.",
        "## A stage\n\nEach section under `stages:` has these words.\n\n"
        + table(
            [*words_of(StageSpec), *(word for word in words_of(PolicySpec, without=StageSpec) if word.name != "kind")]
        ),
        *[text.rstrip() for text in stages],
        "### The section `sampling` of rejection_sampling\n\n" + table(words_of(RejectionSettings)),
        "### The section `rollout` of ppo, grpo and rejection_sampling\n\n" + table(words_of(EngineSettings)),
        "### An entry of `reward`\n\n" + table(words_of(RewardTerm)),
        "## `data`\n\n" + table(words_of(DataSpec)),
        "### An entry of `mix`\n\n" + table(words_of(Part)),
        "## `train`\n\n`train:` at the top level holds what every stage starts from. Each stage takes those words that"
        " its trainer knows. Words and defaults are those of TRL's config classes, with one addition:"
        " `per_device_train_batch_tokens`, see [batches by tokens](memory.md#batches-by-tokens)."
        f"\n\nThese may be `auto`: {', '.join(f'`{word}`' for word in sorted(AUTO_ARGUMENTS))}, see"
        " [`auto`](memory.md#auto-let-the-plan-choose)."
        f"\n\nThese are checked before a model is loaded, with the least that makes sense: {numbers}.",
        "### Words that are refused\n\nSomething else decides these. Each is refused with the reason.\n\n"
        + "\n".join(refused),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def page_of_train() -> str:
    parts = [HEAD_OF_TRAIN]
    for name, stage in STAGES.items():
        config = stage.config_class
        if not isinstance(config, type):
            continue
        sources = re.search(r"Sources: (.*?)\n\n?$", (inspect.getmodule(config).__doc__ or "") + "\n", re.DOTALL)
        assert sources
        parts += [f"## {name}\n\nSources: {' '.join(sources[1].split())}", grouped(name, list(words_of(config)))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    new = {PAGE: page(), TRAIN: page_of_train()}
    if "--check" in sys.argv[1:]:
        raise SystemExit(any(file.read_text(encoding="utf-8") != text for file, text in new.items()))
    for file, text in new.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
