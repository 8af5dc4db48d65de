"""`onebase import`: configs of other trainers as one recipe. They are read as data, and nothing of them is run."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.bring import axolotl, llama_factory, trl
from pipeline.bring.words import Imported, Left, Words, name_of
from pipeline.disk.atomic import Json, write_text
from pipeline.errors import UserError
from pipeline.ppo.shipped import SHIPPED
from pipeline.recipe import yaml
from pipeline.recipe.recipe import build

INFO = "dataset_info.json"
LONGEST = 1 << 20
"""Bytes of a file; a config is never so long. A list of data sets may be."""
LONGEST_INFO = 1 << 25
SECRET = re.compile("hub_token|auth_token|api_key|secret|password", re.IGNORECASE)
ORDER = ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo")


@dataclass
class Given:
    """The files, told apart."""

    configs: list[tuple[str, Json]] = field(default_factory=list)
    commands: list[tuple[str, str, Json, list[str]]] = field(default_factory=list)
    info: Json | None = None
    folder: str = ""


def bring(files: Sequence[Path], out: Path | None) -> None:
    """Print the recipe, or write it; on stderr what has no counterpart. Raises UserError for what is no config."""
    if out is not None and out.exists():
        raise UserError(f"{out} is there already; choose another name")
    tree, left = combine(_translate(_read(files)))
    names = " ".join(f"{file.name}" for file in files).split()
    text = f"# From {' '.join(names)}, by onebase import.\n{yaml.dump(tree)}"
    try:
        build(*_as_read(text))
        problem = ""
    except UserError as error:
        problem = str(error)
    if out is None:
        print(text, end="", flush=True)
    else:
        write_text(out, text)
    for line in told(left, problem):
        print(line, file=sys.stderr)
    if out is not None:
        print(f"{out} is written. Next: onebase check {out}")


def _as_read(text: str) -> tuple[Json, tuple[()], str, dict[str, int]]:
    tree, lines = yaml.parse(text, "recipe")
    return tree, (), "recipe", lines


def told(left: list[Left], problem: str) -> list[str]:
    """What has no counterpart, a line a word."""
    count = "1 word has" if len(left) == 1 else f"{len(left)} words have"
    lines = [f"{count} no counterpart, or only a part of one:"] if left else []
    for each in left:
        shown = "(not shown)" if SECRET.search(each.word) else json.dumps(each.value, ensure_ascii=False)[:60]
        value = "" if each.value is None else f": {shown}"
        lines.append(f"  {each.word}{value}  {each.why}".replace("\n", " "))
    return [*lines, *([f"the recipe is not sound yet: {problem}"] if problem else [])]


def _read(files: Sequence[Path]) -> Given:
    given = Given()
    for file in files:
        limit = LONGEST_INFO if file.name.endswith(".json") else LONGEST
        if not os.path.isfile(file):
            raise UserError(f"{file}: no such file")
        if file.stat().st_size > limit:
            raise UserError(f"{file} is larger than {limit >> 20} MiB, and no config is so large")
        text = _text_of(file)
        if file.suffix in (".yaml", ".yml"):
            given.configs.append((str(file), yaml.parse(text, str(file), "a mapping of words")[0]))
        elif file.suffix == ".json":
            _add_json(given, file, text)
        else:
            given.commands.append((str(file), *trl.parse_command(text, str(file))))
    if not given.configs and not given.commands:
        raise UserError(f"{files[0]}: name a config as well; {INFO} only describes data sets")
    return given


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def _add_json(given: Given, file: Path, text: str) -> None:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is broken JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected an object")
    if llama_factory.speaks(tree) or axolotl.speaks(tree) or trl.speaks(tree):
        given.configs.append((str(file), tree))
    else:
        given.info, given.folder = tree, str(file.parent)


def _translate(given: Given) -> list[Imported]:
    configs = list(given.configs)
    imported = []
    for _, kind, options, launcher in given.commands:
        named = str(options.get("config", ""))
        if config := next((each for each in configs if named and Path(each[0]).name == Path(named).name), None):
            configs.remove(config)
            options = {**config[1], **{word: value for word, value in options.items() if word != "config"}}
        imported.append(trl.take(Words(options), kind, launcher))
    for file, tree in configs:
        words = Words(tree)
        if axolotl.speaks(tree):
            imported.append(axolotl.take(words))
        elif llama_factory.speaks(tree):
            info, folder = (given.info, given.folder) if given.info is not None else _info_beside(tree, file)
            imported.append(llama_factory.take(words, info, folder))
        elif trl.speaks(tree):
            imported.append(trl.take(words, "", []))
        else:
            raise UserError(
                f"{file}: is not a config of LLaMA-Factory (stage), axolotl (base_model) or TRL (model_name_or_path)"
            )
    return imported


def _info_beside(tree: Json, file: str) -> tuple[Json | None, str]:
    """dataset_info.json where the config says that it lies, seen from here or from the config."""
    folder = str(tree.get("dataset_dir", "data"))
    for each in (folder, os.path.join(os.path.dirname(file), folder)):
        place = Path(each) / INFO
        if os.path.isfile(place) and place.stat().st_size <= LONGEST_INFO:
            found = Given()
            _add_json(found, place, _text_of(place))
            return found.info, each
    return None, folder


def combine(imported: list[Imported]) -> tuple[Json, list[Left]]:
    """One recipe of all the configs, each a stage that goes on from the one whose output it names."""
    imported = sorted(imported, key=lambda each: ORDER.index(each.kind))
    left = [left for each in imported for left in each.left]
    first = imported[0]
    names = _names(imported)
    made = {os.path.normpath(each.output): name for each, name in zip(imported, names, strict=True) if each.output}
    stages: Json = {}
    for each, name in zip(imported, names, strict=True):
        if each.model != first.model:
            differs = sorted(key for key in each.model | first.model if each.model.get(key) != first.model.get(key))
            left.append(Left(f"{name}: model", differs, f"is one for all stages: {names[0]}'s is taken"))
        section: Json = {"kind": each.kind} if name != each.kind else {}
        if parent := _resolve(each.goes_on_from, made, left, "an adapter to go on from"):
            section["from"] = parent
        if each.kind == "ppo":
            section["reward"] = _resolve(each.paid_by, made, left, "a reward model") or "reward"
        if each.kind == "grpo":
            section["reward"] = [_term(term, made, left) for term in each.rewards] or "REWARD"
        stages[name] = {**section, "data": each.data, "train": each.train}
    tree: Json = {"name": name_of(first.output)}
    if first.seed is not None:
        tree["seed"] = first.seed
    return {**tree, "model": first.model, "stages": stages}, left


def _term(term: Json, made: dict[str, str], left: list[Left]) -> Json:
    """A term of a reward whose source may be the folder of a reward model."""
    if term["source"] in SHIPPED or ".py:" in term["source"]:
        return term
    return {**term, "source": _resolve(term["source"], made, left, "a reward model") or "reward"}


def _names(imported: list[Imported]) -> list[str]:
    """A stage's kind, with a number where there are several of it."""
    names: list[str] = []
    for each in imported:
        count = sum(name.partition("-")[0] == each.kind for name in names)
        names.append(f"{each.kind}-{count + 1}" if count else each.kind)
    return names


def _resolve(named: str, made: dict[str, str], left: list[Left], what: str) -> str | None:
    """The stage whose output is named."""
    if not named:
        return None
    if (stage := made.get(os.path.normpath(named))) is None:
        left.append(Left(named, None, f"is {what}, and none of these configs makes it: give that config as a FILE too"))
    return stage
