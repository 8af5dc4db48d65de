"""A recipe: one YAML file for the whole chain, read strictly.

YAML -> overrides -> checked sections -> order. Everything wrong is said with the file, the line and the dotted key,
before torch is imported.
"""

from __future__ import annotations

import graphlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pipeline.data.files import hash_content, is_hub_id, no_such_file
from pipeline.data.load import DataSpec, Part
from pipeline.data.votes import hash_rounds
from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, digest, sha256_of_file
from pipeline.errors import UserError, complaint
from pipeline.models import published
from pipeline.models.spec import base_hash, pinned
from pipeline.recipe import rounds, sections, yaml
from pipeline.recipe.sections import RecipeSpec, nearest
from pipeline.stages import STAGES
from pipeline.stages.arguments import RUNTIME_WORDS
from pipeline.stages.reward_file import read_by
from pipeline.stages.stage import Stage, StageSpec

RUNS = Path("runs")


@dataclass(frozen=True)
class Recipe:
    """A recipe read and checked. `tree` is the same as plain data, as it is written to runs/<name>/recipe.yaml."""

    spec: RecipeSpec
    tree: Json
    file: str = "recipe"
    lines: Json = field(default_factory=dict, compare=False)
    """Of each dotted key in that file, for messages."""
    written: dict[str, str] = field(default_factory=dict, compare=False)
    """Of each stage that `rounds:` has spelt out, the name under which that file has it."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def stages(self) -> dict[str, StageSpec]:
        return self.spec.stages

    def kind(self, stage: str) -> Stage:
        return STAGES[self.stages[stage].kind]

    def named(self, stages: Iterable[str]) -> list[str]:
        """These stages. Raises UserError for one that the recipe does not have."""
        for name in stages:
            if name not in self.stages:
                raise UserError(f"no stage '{name}' in the recipe {self.name} (there is: {', '.join(self.stages)})")
        return list(stages)

    def parents(self, stage: str) -> dict[str, str]:
        """The stages this one is handed something by, by the role they play for it."""
        section = self.stages[stage]
        policy = {"policy": section.from_} if section.from_ and not section.from_.startswith(published.PREFIX) else {}
        rewards = [term.source for term in section.reward_terms() if term.is_stage]
        return policy | {"reward" if len(rewards) == 1 else f"reward {name}": name for name in rewards}

    def parent_artifacts(self, stage: str, runs: Path = RUNS) -> dict[str, Artifact]:
        """What those stages left, by role; a parent on the Hub is pulled."""
        from_ = self.stages[stage].from_ or ""
        on_hub = {"policy": published.pulled(from_)} if from_.startswith(published.PREFIX) else {}
        return {**on_hub, **{role: self.artifact(name, runs) for role, name in self.parents(stage).items()}}

    def learnt_again(self, stage: str) -> list[str]:
        """The stages whose rows this one learns again."""
        found = (nearest(self.stages, stage, kind) for kind in self.stages[stage].learns_again())
        return [*(name for name in found if name), *self.stages[stage].replayed()]

    def round_of(self, stage: str) -> int:
        """The last round of people's votes that a stage depends on; 0 for a stage that depends on none."""
        return max([rounds.read_by(self.stages[stage]), *map(self.round_of, self.parents(stage).values())])

    def order(self) -> list[str]:
        """The stages, each after its parents; as written where that leaves a choice, round by round."""
        graph = graphlib.TopologicalSorter({name: set(self.parents(name).values()) for name in self.stages})
        graph.prepare()
        order, written = [], list(self.stages)
        while graph.is_active():
            for name in sorted(graph.get_ready(), key=written.index):
                order.append(name)
                graph.done(name)
        return sorted(order, key=self.round_of)

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
            self.check_files(name)
            section = self.stages[name]
            data, from_ = section.data, section.from_ or ""
            train = {key: value for key, value in section.train.items() if key not in RUNTIME_WORDS}
            roles = [f"mix[{number}]" for number in range(len(data.mix))] if data.mix else ["path"]
            hashes = {role: _hash(part) for role, part in zip(roles, data.parts(), strict=True)}
            terms = section.reward_terms()
            for file in sorted({term.file for term in terms if term.file}):
                for read, path in read_by(Path(file)).items():
                    hashes[f"reward {file}: {read}"] = sha256_of_file(path)
            for term in terms:
                if term.shipped:
                    hashes[f"reward {term.source}: the function {term.source}"] = term.shipped.is_of
            hashes |= self.environment_files(name)
            parents = {role: digest(parts[parent]) for role, parent in self.parents(name).items()}
            if from_.startswith(published.PREFIX):
                parents["policy"] = f"sha256:{published.pulled(from_).verify().files[WEIGHTS]}"
            stage = {"kind": section.kind, "arithmetic": self.kind(name).arithmetic, "train": train}
            stage |= {"data": _settings(data), **section.further_parts()}
            if environment := section.asked_with():
                stage["environment"] = environment
            parts[name] = {
                "stage": stage,
                "model": model,
                "seed": self.spec.seed,
                "data": hashes,
                "parents": parents,
            }
        return parts

    def environment_files(self, stage: str) -> dict[str, str]:
        """The hashes of the files that a stage's environment depends on."""
        environment = self.stages[stage].asked_with()
        read = read_by(Path(environment.rpartition(":")[0])) if environment else {}
        return {f"environment {environment}: {name}": sha256_of_file(path) for name, path in read.items()}

    def check_files(self, stage: str) -> None:
        """Raises UserError with the recipe's line and key for rows that are not there or must not be learnt."""
        section = self.stages[stage]
        named: list[tuple[str, object]] = [
            ("data.mix" if section.data.mix else "data.path", part.path)
            for part in section.data.parts()
            if not part.rounds  # which are waited for
        ]
        named += [("data.test", section.data.test), ("questions", section.question_file())]
        arena = os.path.realpath(os.path.join(os.path.dirname(self.file), rounds.ARENA))
        for key, file in named:
            place = self.place(stage, key)
            if isinstance(file, str) and not os.path.exists(file) and not is_hub_id(file):
                raise UserError(f"{place}: {beside(self.file, file)}{no_such_file(file)}")
            if key in ("data.path", "data.mix") and arena in (
                folder := os.path.realpath(str(file)),
                os.path.dirname(folder),
            ):
                raise UserError(
                    f"{place}: {file} holds votes on held-out prompts, and a test that a stage has learnt measures "
                    "nothing. `onebase label` without --arena gives votes to learn from"
                )

    def place(self, stage: str, key: str) -> str:
        """File, line and dotted key of a stage's section, as a message names them."""
        key = f"stages.{self.written.get(stage, stage)}.{key}"
        return f"{self.file}:{self.lines[key]}: {key}" if key in self.lines else f"{self.file}: {key}"

    def measured_on(self, stage: str) -> dict[str, str]:
        """The hashes of files that a stage is measured on and does not learn from. When one changes, the finished stage
        is measured again; it is not trained again."""
        section = self.stages[stage]
        hashes = {}
        for key, file in (("data.test", section.data.test), ("questions", section.question_file())):
            if isinstance(file, str):
                try:
                    hashes[key.removeprefix("data.")] = hash_content(file)
                except UserError as error:
                    raise UserError(f"stages.{stage}.{key}: {error}") from error
        if environment := self.environment_files(stage):  # asked with other tools, a question is another one
            hashes = {key: f"sha256:{digest([content, environment])}" for key, content in hashes.items()}
        return hashes

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


def build(
    tree: Json, overrides: Iterable[str] = (), path: str = "recipe", lines: dict[str, int] | None = None
) -> Recipe:
    """A recipe from plain data. `lines` maps dotted keys to line numbers, for messages."""
    for text in overrides:
        tree = yaml.override(tree, text)
    written: dict[str, str] = {}
    try:
        spec = sections.check(tree)
        if spec.rounds:
            tree, written = rounds.expand(tree, spec.stages, spec.rounds, path)
            spec = sections.check(tree)
        recipe = Recipe(spec, tree, path, lines or {}, written)
        try:
            recipe.order()
        except graphlib.CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise complaint(f"the stages continue each other in a circle: {circle}", "stages") from None
    except ValidationError as error:
        raise UserError(sections.locate(error, path, lines or {})) from None
    return recipe


def beside(recipe: str, file: str) -> str:
    """Where a missing file may be meant to lie."""
    there = os.path.join(os.path.dirname(recipe), file)
    return f"a file of that name is beside the recipe: {there}. " if os.path.exists(there) else ""


def _hash(part: Part) -> str:
    return hash_rounds(part.path, part.rounds) if part.rounds else hash_content(part.path)


def _settings(data: DataSpec) -> Json:
    """How the rows are read, without where they lie: a file moved is still the same file. A share to hold out is taken
    from the rows that are trained on; a file of held-out rows takes nothing from them. How far a judge is trusted stops
    a stage or changes nothing of it."""
    shown = data.model_dump(exclude={"path": True, "judge_agreement": True, "mix": {"__all__": {"path"}}})
    for section in (shown, *(shown["mix"] or ())):
        for word in ("rounds", "apart"):
            if section.get(word) is None:
                section.pop(word, None)
    return {key: value for key, value in shown.items() if key != "test" or isinstance(value, int | float)}
