"""A recipe: one YAML file for the whole chain, read strictly.

YAML -> overrides -> checked sections -> order. Everything wrong is said with the file, the line and the dotted key,
before torch is imported. Paths that people write are tried with os.path, here and elsewhere: pathlib raises on a name
that no file system has room for.
"""

from __future__ import annotations

import difflib
import graphlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.artifact import NAME, WEIGHTS, Artifact, Json, digest, sha256_of_file
from pipeline.data import load
from pipeline.data.files import content_hash
from pipeline.errors import UserError
from pipeline.models import published
from pipeline.models.spec import ModelSpec, base_hash, pinned
from pipeline.ppo.settings import PPOSettings
from pipeline.recipe import gates, yaml
from pipeline.stages import STAGES
from pipeline.stages.arguments import AUTO, AUTO_WORDS, NUMBERS, RUNTIME_WORDS, WHY_NOT, defines, words
from pipeline.stages.reward_file import read_by
from pipeline.stages.stage import Stage, StageSpec

RUNS = Path("runs")


class RecipeSpec(BaseModel):
    """The top level of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Folder of the run below runs/."""
    seed: int = Field(default=17, ge=0, lt=2**32, strict=True)
    model: ModelSpec
    train: dict[str, Any] = {}
    """What every stage's `train:` starts from; each stage takes the words its trainer knows."""
    stages: dict[str, StageSpec]
    expect: gates.Expect = {}
    """What a stage's held-out numbers must reach before the next one runs: {"sft.question_accuracy": ">= 0.6"}."""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("letters, digits, - and _ only, at most 100: it becomes a folder below runs/")
        return name


@dataclass(frozen=True)
class Recipe:
    """A recipe read and checked. `tree` is the same as plain data, as it is written to runs/<name>/recipe.yaml."""

    spec: RecipeSpec
    tree: Json

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def stages(self) -> dict[str, StageSpec]:
        return self.spec.stages

    def kind(self, stage: str) -> Stage:
        return STAGES[self.stages[stage].kind]

    def parents(self, stage: str) -> dict[str, str]:
        """The stages this one is handed something by, by the role they play for it."""
        section = self.stages[stage]
        rewards = [term.source for term in section.reward_terms() if term.file is None]
        roles = {"reward" if len(rewards) == 1 else f"reward {name}": name for name in rewards}
        grown = section.from_ is not None and not section.from_.startswith(published.PREFIX)
        return {**({"policy": section.from_} if grown and section.from_ else {}), **roles}

    def parent_artifacts(self, stage: str, runs: Path = RUNS) -> dict[str, Artifact]:
        """What those stages left, by role; a parent on the Hub is pulled."""
        from_ = self.stages[stage].from_ or ""
        on_hub = {"policy": published.pulled(from_)} if from_.startswith(published.PREFIX) else {}
        return {**on_hub, **{role: self.artifact(name, runs) for role, name in self.parents(stage).items()}}

    def order(self) -> list[str]:
        """The stages, each after its parents; as written where that leaves a choice."""
        graph = graphlib.TopologicalSorter({name: set(self.parents(name).values()) for name in self.stages})
        graph.prepare()
        order, written = [], list(self.stages)
        while graph.is_active():
            for name in sorted(graph.get_ready(), key=written.index):
                order.append(name)
                graph.done(name)
        return order

    def artifact(self, stage: str, runs: Path = RUNS) -> Artifact:
        return Artifact(runs / self.name / stage)

    def model_parts(self) -> Json:
        """What every stage's result depends on of the model section: names of files give way to their hashes."""
        template = self.spec.model.chat_template
        return {
            **self.spec.model.model_dump(exclude={"base", "revision", "public_id"}),
            "base": base_hash(self.spec.model),
            "chat_template": sha256_of_file(Path(template)) if template else None,
        }

    def parts(self) -> dict[str, Json]:
        """For every stage, all that its adapter depends on, by name; equal parts give an equal adapter."""
        model = self.model_parts()
        parts: dict[str, Json] = {}
        for name in self.order():
            section = self.stages[name]
            data = section.data
            train = {word: value for word, value in section.train.items() if word not in RUNTIME_WORDS}
            hashes = load.content_hashes(data.model_copy(update={"test": None}))
            terms = section.reward_terms()
            for file in sorted({term.file for term in terms if term.file}):
                read = {f"reward {file}: {name}": path for name, path in read_by(Path(file)).items()}
                hashes |= {name: sha256_of_file(path) for name, path in read.items()}
            # What is only measured by a term, its truth, changes no training.
            reward = {"reward": [term.model_dump(exclude={"truth"}) for term in terms]} if terms else {}
            counts = {"kind": section.kind, "arithmetic": self.kind(name).arithmetic}
            parts[name] = {
                "stage": {**counts, "train": train, "data": _settings(data), **reward},
                "model": model,
                "seed": self.spec.seed,
                "data": hashes,
                "parents": {
                    **{role: digest(parts[parent]) for role, parent in self.parents(name).items()},
                    **self._hub_parent(section.from_ or ""),
                },
            }
        return parts

    def measured_on(self, stage: str) -> dict[str, str]:
        """The hashes of files that a stage is measured on and does not learn from. When one changes, the finished stage
        is measured again; it is not trained again."""
        section = self.stages[stage]
        named = {"test": section.data.test, "questions": section.questions}
        return {role: content_hash(file) for role, file in named.items() if isinstance(file, str)}

    def _hub_parent(self, from_: str) -> Json:
        if not from_.startswith(published.PREFIX):
            return {}
        return {"policy": f"sha256:{published.pulled(from_).verify()['files'][WEIGHTS]}"}

    def pinned_tree(self) -> Json:
        """The tree with a commit for whatever it names on the Hub, so that the processes of a run read the same bytes
        though a branch moves on meanwhile."""
        model, stages = dict(self.tree["model"]), dict(self.tree["stages"])
        if revision := pinned(self.spec.model).revision:
            model["revision"] = revision
        if model["base"].startswith(published.PREFIX):
            model["base"] = published.pinned(model["base"])
        for name, section in stages.items():
            if isinstance(section, dict) and str(section.get("from", "")).startswith(published.PREFIX):
                stages[name] = {**section, "from": published.pinned(section["from"])}
        return {**self.tree, "model": model, "stages": stages}

    def fork(self, stage: str, name: str, *overrides: str) -> Recipe:
        """The same recipe with one more stage: a copy of `stage` under another name, changed by overrides relative to
        it (`"train.beta=0.3"`). What the two share is trained once.
        """
        section = {"kind": self.stages[stage].kind, **self.tree["stages"][stage]}
        tree = {**self.tree, "stages": {**self.tree["stages"], name: section}}
        return build(tree, [f"stages.{name}.{override}" for override in overrides])


def read(path: str | Path, *overrides: str) -> Recipe:
    """Read a recipe and apply overrides such as "stages.dpo.train.beta=0.05".

    Raises UserError naming file, line and dotted key.
    """
    tree, lines = yaml.load(path)
    return build(tree, overrides, str(path), lines)


def build(tree: Json, overrides: Any = (), path: str = "recipe", lines: dict[str, int] | None = None) -> Recipe:
    """A recipe from plain data. `lines` maps dotted keys to line numbers, for messages."""
    lines = lines or {}
    for override in overrides:
        tree = _overridden(tree, override)

    def wrong(key: str, message: str) -> UserError:
        known = key
        while known and known not in lines:
            known = known.rpartition(".")[0]
        place = f"{path}:{lines[known]}" if known else path
        return UserError(f"{place}: {key}: {message}")

    try:
        spec = RecipeSpec.model_validate(_with_kinds(tree))
    except ValidationError as error:
        raise wrong(*_first_complaint(error)) from None
    if not spec.stages:
        raise wrong("stages", "names no stage")
    if spec.model.base.startswith(published.PREFIX):
        spec = _on_published(spec, wrong)
    for name, section in spec.stages.items():
        _check_stage(name, section, spec, wrong)
    _check_truth(spec, wrong)
    _check_words("model.lora", spec.model.lora, words("LoraConfig"), wrong)
    known = {word for section in spec.stages.values() for word in words(STAGES[section.kind].config_class)}
    _check_words("train", spec.train, known, wrong)
    template = spec.model.chat_template
    if template and not os.path.isfile(template):
        raise wrong("model.chat_template", f"no such file: {template}")
    recipe = Recipe(spec.model_copy(update={"stages": _merged(spec)}), tree)
    for name, section in recipe.stages.items():
        batch = "per_device_train_batch_size"
        rows = section.train.get("gradient_accumulation_steps")
        if section.kind != "ppo" and section.train.get(batch) == AUTO and not isinstance(rows, int):
            raise wrong(
                f"stages.{name}.train.{batch}",
                "is auto; gradient_accumulation_steps then says the rows of an optimizer step: give it, say 16",
            )
        if section.kind == "ppo":
            try:
                PPOSettings(**{word: value for word, value in section.train.items() if value != AUTO})
            except ValidationError as error:
                word, message = _first_complaint(error)
                raise wrong(f"stages.{name}.train.{word}".removesuffix(".recipe"), message) from None
        if section.train.get("push_to_hub") and os.path.exists(spec.model.base) and not spec.model.public_id:
            raise wrong(
                f"stages.{name}.train.push_to_hub",
                "names the base, and nobody else has this folder: say what it is on the Hub (model.public_id)",
            )
    numbers = {name: [*STAGES[of.kind].numbers, *of.source_numbers()] for name, of in spec.stages.items()}
    if complaint := gates.complaint(spec.expect, numbers):
        raise wrong(*complaint)
    try:
        recipe.order()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise wrong("stages", f"the stages go on from each other in a circle: {circle}") from None
    return recipe


def _check_stage(name: str, section: StageSpec, spec: RecipeSpec, wrong: Any) -> None:
    key = f"stages.{name}"
    if not NAME.fullmatch(name):
        raise wrong(key, "a stage's name has letters, digits, - and _ only, at most 100: it becomes a folder")
    if section.kind not in STAGES:
        place, ask = (f"{key}.kind", "") if section.kind != name else (key, "; name its stage with kind:")
        raise wrong(place, f"there is no stage '{section.kind}'{_meant(section.kind, STAGES)}{ask}")
    if section.from_ is not None and section.from_.startswith(published.PREFIX):
        parent = published.pulled(section.from_).manifest() or {}
        if not STAGES[parent["kind"]].answers:
            raise wrong(f"{key}.from", f"{section.from_} is a reward model, not a policy to go on with")
    elif section.from_ is not None and section.from_ not in spec.stages:
        raise wrong(f"{key}.from", f"no stage '{section.from_}' in this recipe{_meant(section.from_, spec.stages)}")
    elif section.from_ is not None and not STAGES[spec.stages[section.from_].kind].answers:
        raise wrong(f"{key}.from", f"'{section.from_}' leaves a reward model, not a policy to go on with")
    if section.questions and not STAGES[section.kind].answers:
        raise wrong(f"{key}.questions", f"a {section.kind} stage leaves nothing that answers questions")
    _check_words(f"{key}.train", section.train, words(STAGES[section.kind].config_class), wrong)
    _check_reward(f"{key}.reward", section, spec, wrong)


def _on_published(spec: RecipeSpec, wrong: Any) -> RecipeSpec:
    """`model.base` names a published adapter: the base is the one under it, and stages without `from` go on with it."""
    load = published.load_words(spec.model.base)
    quantize = (load["quantization"] or {}).get("bnb_4bit_quant_type", "none")
    if quantize != spec.model.quantize:
        raise wrong("model.quantize", f"is {spec.model.quantize}; {spec.model.base} was trained under {quantize}")
    stages = {
        name: section if section.from_ else section.model_copy(update={"from_": spec.model.base})
        for name, section in spec.stages.items()
    }
    # A base that was published from a local folder has no commit there; then the recipe's own word counts.
    revision = load["revision"] or spec.model.revision
    model = spec.model.model_copy(update={"base": load["base"], "revision": revision})
    return spec.model_copy(update={"model": model, "stages": stages})


def _check_reward(key: str, section: StageSpec, spec: RecipeSpec, wrong: Any) -> None:
    if section.kind != "ppo":
        if section.reward is not None:
            raise wrong(key, f"a {section.kind} stage is not paid by a reward; only ppo is")
        return
    terms = section.reward_terms()
    if not terms:
        raise wrong(key, "is missing: name a reward stage, or a function as path.py:function")
    if len({term.source for term in terms}) < len(terms):
        raise wrong(key, "names a source twice; give it one weight")
    if not any(term.weight for term in terms):
        raise wrong(key, "pays for nothing: every weight is 0, which measures a source without paying for it")
    for term in terms:
        if term.file is not None:
            if not os.path.isfile(term.file):
                raise wrong(key, f"no such file: {term.file}")
            if not defines(Path(term.file), term.source.rpartition(":")[2]):
                raise wrong(key, f"{term.file} defines no '{term.source.rpartition(':')[2]}', or is no Python")
        elif term.source not in spec.stages:
            raise wrong(
                key, f"no stage '{term.source}' in this recipe{_meant(term.source, spec.stages)}; path.py:function"
            )
        elif spec.stages[term.source].kind != "reward":
            raise wrong(key, f"'{term.source}' is a {spec.stages[term.source].kind} stage, not a reward model")


def _check_truth(spec: RecipeSpec, wrong: Any) -> None:
    """All stages are measured by one truth, a function."""
    found: str | None = None
    for name, section in spec.stages.items():
        for term in section.reward_terms():
            if not term.truth:
                continue
            key = f"stages.{name}.reward"
            if term.file is None:
                raise wrong(key, f"'{term.source}' is a reward model; truth: true is for a function that gives 0 or 1")
            if found not in (None, term.source):
                raise wrong(key, f"a second truth, {term.source}; {found} is it already")
            found = term.source


def _check_words(key: str, given: Json, known: Any, wrong: Any) -> None:
    for word, value in given.items():
        place = f"{key}.{word}"
        if word in WHY_NOT:
            raise wrong(place, WHY_NOT[word])
        if word not in known:
            raise wrong(place, f"unknown key{_meant(word, known)}")
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", value):
            raise wrong(place, f"is the text {value!r}; write the number without quotes")
        if value == AUTO and word in AUTO_WORDS:
            continue
        if word in NUMBERS and not _in_range(value, *NUMBERS[word]):
            kind, least = NUMBERS[word]
            wanted = "a whole number" if kind is int else "a number"
            raise wrong(place, f"is {value!r}, expected {wanted} from {least} up")


def _in_range(value: Any, kind: type, least: float) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return bool(value >= least)


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(k) for k in known], 1)
    return f"; did you mean '{close[0]}'?" if close else f" (there is: {', '.join(known)})" if len(known) < 12 else ""


def _with_kinds(tree: Json) -> Json:
    """A section's kind is its name unless it says otherwise."""
    stages = tree.get("stages")
    if not isinstance(stages, dict):
        return tree
    named = {
        name: {"kind": name, **section} if isinstance(section, dict) else section for name, section in stages.items()
    }
    return {**tree, "stages": named}


def _merged(spec: RecipeSpec) -> dict[str, StageSpec]:
    """Each stage's `train`: the shared words its trainer knows, then its own."""
    merged = {}
    for name, section in spec.stages.items():
        known = words(STAGES[section.kind].config_class)
        shared = {word: value for word, value in spec.train.items() if word in known}
        merged[name] = section.model_copy(update={"train": {**shared, **section.train}})
    return merged


def _first_complaint(error: ValidationError) -> tuple[str, str]:
    # A misspelt key is both unknown and missing; what was typed is what can be corrected.
    first = min(error.errors(), key=lambda complaint: complaint["type"] == "missing")
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        fields: Any = RecipeSpec.model_fields
        if key.startswith("model."):
            fields = ModelSpec.model_fields
        elif key.startswith("stages."):
            in_data = key.split(".")[2:3] == ["data"] and key.count(".") > 2
            fields = (
                load.DataSpec.model_fields
                if in_data
                else [info.alias or name for name, info in StageSpec.model_fields.items()]
            )
        return key, f"unknown key{_meant(str(first['loc'][-1]), fields)}"
    if first["type"] == "missing":
        return key, "is missing"
    message = first["msg"].removeprefix("Value error, ")
    return key or "recipe", f"{message[0].lower()}{message[1:]} (found {first['input']!r})"


def _overridden(tree: Json, override: str) -> Json:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"-o {override}: expected dotted.key=value, for example stages.dpo.train.beta=0.05")
    try:
        value = yaml.value(text)
    except ValueError as error:
        raise UserError(f"-o {override}: {text!r} is not a YAML value") from error
    stages = tree.get("stages") or {}
    if path[0] == "stages" and len(path) > 2 and isinstance(stages, dict) and path[1] not in stages:
        raise UserError(
            f"-o {override}: no stage '{path[1]}' in this recipe{_meant(path[1], tree.get('stages') or {})}"
        )
    return _with(tree, path, value, override)


def _with(tree: Json, path: list[str], value: Any, override: str) -> Json:
    if len(path) == 1:
        return {**tree, path[0]: value}
    below = tree.get(path[0]) or {}
    if not isinstance(below, dict):
        raise UserError(f"-o {override}: '{path[0]}' is a value, not a section")
    return {**tree, path[0]: _with(below, path[1:], value, override)}


def _settings(data: load.DataSpec) -> Json:
    """How the rows are read, without where they lie: a file moved is still the same file. A share to hold out is taken
    from the rows that are trained on; a file of held-out rows takes nothing from them."""
    shown = data.model_dump(exclude={"path": True, "mix": {"__all__": {"path"}}})
    return {key: value for key, value in shown.items() if key != "test" or isinstance(value, int | float)}
