"""A recipe's sections, checked: what each says by itself, then what they say of each other.

A stage's own section stands with the stage (pipeline/stages); here is the union of them. Whoever finds something wrong
raises pydantic's error with its place; `locate` turns that into file, line and dotted key. Paths that people write are
tried with os.path, here and elsewhere: pathlib raises on a name that no file system has room for.
"""

from __future__ import annotations

import os
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.disk.artifact import NAME
from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Manifest
from pipeline.errors import complaint, suggest
from pipeline.measure.metric import QUESTION_ACCURACY
from pipeline.models import published
from pipeline.models.spec import ModelSpec
from pipeline.recipe import gates
from pipeline.recipe.rounds import RoundsOrCount, read_by
from pipeline.stages import STAGES
from pipeline.stages.arguments import check_report_to, check_words, one_of_both, words
from pipeline.stages.stage import Stage, StageSpec

if TYPE_CHECKING:
    Section = StageSpec
else:
    Section = Annotated[reduce(or_, (stage.section for stage in STAGES.values())), Field(discriminator="kind")]


class RecipeSpec(BaseModel):
    """The top level of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Folder of the run below runs/."""
    seed: int = Field(default=17, ge=0, lt=2**32, strict=True)
    model: ModelSpec
    train: dict[str, Any] = {}
    """What every stage's `train:` starts from; each stage takes the words its trainer knows."""
    stages: dict[str, Section]
    rounds: RoundsOrCount | None = None
    """How many [rounds](rounds.md) of labelling and training there are: the stages that read `labels/` are repeated for
    each. A number, or {count, votes}: `votes` is how many votes of people a round waits for, 100 unless it is said."""
    guidelines: str | None = None
    """A Markdown file that people read beside the answers they compare (`onebase label`); each second heading (`##`) is
    a row of its own. Helpful, truthful and harmless, unless one is named."""
    expect: gates.Expect = {}
    """What a stage's held-out numbers must reach before the next one runs: {"sft.question_accuracy": ">= 0.6"}. What an
    evaluation must find that it has kept: {"ppo.forgetting.sft.question_accuracy": ">= -0.02"}."""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("a-z, A-Z, 0-9, - and _ only, at most 100: it becomes a folder below runs/")
        return name

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, tree: Any) -> Any:
        """A stage's kind is its section's name unless it says otherwise; its `train` goes on from the shared one."""
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
            return tree
        if not tree["stages"]:
            raise complaint("names no stage", "stages")
        shared: Json = tree["train"] if isinstance(tree.get("train"), dict) else {}
        stages, known = {}, frozenset[str]()
        for name, section in tree["stages"].items():
            if not NAME.fullmatch(str(name)):
                limits = "a stage's name has a-z, A-Z, 0-9, - and _ only, at most 100: it becomes a folder"
                raise complaint(limits, "stages", name)
            stages[name] = section
            if not isinstance(section, dict):
                continue
            kind = section.get("kind", name)
            if not isinstance(kind, str) or kind not in STAGES:
                problem = f"there is no stage '{kind}'{suggest(kind, STAGES)}"
                if "kind" in section:
                    raise complaint(problem, "stages", name, "kind")
                raise complaint(f"{problem}; name its stage with kind:", "stages", name)
            own, train = words(STAGES[kind].config_class), section.get("train", {})
            known |= own
            if isinstance(train, dict):
                starts_from = {key: value for key, value in one_of_both(shared, train).items() if key in own}
                train = {**starts_from, **train}
            stages[name] = {"kind": kind, **section, "train": train}
        check_words(shared, known, "train")
        check_report_to(shared, "train")
        return {**tree, "stages": stages}


def check(tree: Json) -> RecipeSpec:
    """Raises ValidationError, which `locate` puts into words."""
    spec = RecipeSpec.model_validate(tree)
    if spec.model.base.startswith(published.PREFIX):
        spec = _on_published(spec)
    kinds = {name: STAGES[section.kind] for name, section in spec.stages.items()}
    for name, section in spec.stages.items():
        _check_from(section.from_, kinds, "stages", name, "from")
        section.check_among(kinds, "stages", name)
        if read_by(section) and spec.rounds is None:
            raise complaint("goes with rounds: at the top level of the recipe", "stages", name, "data")
        for earlier in section.replayed():
            if earlier not in ancestors(spec.stages, name) or kinds[earlier].held_out_loss is None:
                problem = (
                    f"'{earlier}' is not a stage that '{name}' comes from and that learns documents or dialogues; only "
                    "the rows of such a stage can be replayed. Let it come from one, or leave it out"
                )
                raise complaint(problem, "stages", name, "replay", earlier)
        for kind, key in section.learns_again().items():
            if nearest(spec.stages, name, kind) is None:
                its = f"from: {section.from_}" if section.from_ else "it has no from:"
                problem = (
                    f"learns rows of a {kind} stage again, and the policy of '{name}' comes from none in this recipe "
                    f"({its}). Let it come from one (from:), or leave {key} out"
                )
                raise complaint(problem, "stages", name, "train", key)
    _check_truth(spec)
    _check_bounds(spec)
    check_words(spec.model.lora, words("LoraConfig"), "model", "lora")
    template = spec.model.chat_template
    if template and not os.path.isfile(template):
        raise complaint(f"no such file: {template}", "model", "chat_template")
    if spec.guidelines and not os.path.isfile(spec.guidelines):
        raise complaint(f"no such file: {spec.guidelines}", "guidelines")
    for name, section in spec.stages.items():
        if section.train.get("push_to_hub") and os.path.exists(spec.model.base) and not spec.model.public_id:
            unnamed = (
                "pushes the name of the base, which is a local folder that others do not have: give its name on the "
                "Hub (model.public_id)"
            )
            raise complaint(unnamed, "stages", name, "train", "push_to_hub")
    numbers = {name: [*kinds[name].numbers, *of.source_numbers()] for name, of in spec.stages.items()}
    gates.check(spec.expect, {name: [*of, *_kept_numbers(spec.stages, name)] for name, of in numbers.items()})
    return spec


def nearest(stages: dict[str, StageSpec], stage: str, kind: str) -> str | None:
    """The first stage of a kind on the way that the policy of `stage` came; None where there is none."""
    return next((name for name in ancestors(stages, stage) if stages[name].kind == kind), None)


def ancestors(stages: dict[str, StageSpec], stage: str) -> list[str]:
    """The stages on the way that the policy of `stage` came, the nearest first."""
    found, name = list[str](), stages[stage].from_
    while name in stages and name not in (stage, *found):  # a circle is complained of later
        found.append(name)
        name = stages[name].from_
    return found


def _kept_numbers(stages: dict[str, StageSpec], stage: str) -> list[str]:
    """What an evaluation can say of what the policy of `stage` has kept of the stages that it comes from."""
    if not STAGES[stages[stage].kind].answers:
        return []
    found = []
    for name in ancestors(stages, stage):
        section, loss = stages[name], STAGES[stages[name].kind].held_out_loss
        learnt = [loss.name] if loss and section.data.test is not None else []
        learnt += [QUESTION_ACCURACY.name] if section.question_file() else []
        found += [f"{gates.MEASURED}{name}.{number}{end}" for number in learnt for end in ("", "_low", "_high")]
    return found


def _on_published(spec: RecipeSpec) -> RecipeSpec:
    """`model.base` names a published adapter: the base is the one under it, and stages without `from` go on with it."""
    load = published.load_words(spec.model.base)
    quantize = (load["quantization"] or {}).get("bnb_4bit_quant_type", "none")
    if quantize != spec.model.quantize:
        problem = f"is {spec.model.quantize}; {spec.model.base} was trained under {quantize}"
        raise complaint(problem, "model", "quantize")
    stages = {
        name: section if section.from_ else section.model_copy(update={"from_": spec.model.base})
        for name, section in spec.stages.items()
    }
    # A base that was published from a local folder has no commit there; then the recipe's own word counts.
    revision = load["revision"] or spec.model.revision
    model = spec.model.model_copy(update={"base": load["base"], "revision": revision})
    return spec.model_copy(update={"model": model, "stages": stages})


def _check_from(from_: str | None, kinds: dict[str, Stage], *place: str) -> None:
    if from_ is None:
        return
    if from_.startswith(published.PREFIX):
        manifest = published.pulled(from_).finished()
        lineage = [entry.kind for entry in manifest.lineage if isinstance(entry, Manifest)]
        if unknown := [kind for kind in lineage if kind not in STAGES]:
            raise complaint(f"{from_} continues a {unknown[0]} stage, which this version does not have", *place)
        kind, named = STAGES[manifest.kind], f"{from_} is"
    elif from_ in kinds:
        kind, named = kinds[from_], f"'{from_}' leaves"
    else:
        raise complaint(f"no stage '{from_}' in this recipe{suggest(from_, kinds)}", *place)
    if not kind.answers:
        raise complaint(
            f"{named} a {'reward model' if kind.ranks else 'classifier'}, not a policy that a stage can continue",
            *place,
        )


def _check_bounds(spec: RecipeSpec) -> None:
    """A lower bound is of a reward model whose heads can differ."""
    for name, section in spec.stages.items():
        for term in section.reward_terms():
            if term.lower_bound and spec.stages[term.source].score_heads == 1:
                problem = (
                    f"lower_bound needs a reward model with several heads, and '{term.source}' has one. Say "
                    f"heads: 4 in stages.{term.source}, or remove lower_bound"
                )
                raise complaint(problem, "stages", name, "reward")


def _check_truth(spec: RecipeSpec) -> None:
    """All stages are measured by one truth, a function."""
    first: str | None = None
    for name, section in spec.stages.items():
        for term in (term for term in section.reward_terms() if term.truth):
            if term.is_stage:
                problem = f"'{term.source}' is a reward model; truth: true is for a function that gives 0 or 1"
                raise complaint(problem, "stages", name, "reward")
            first = first or term.source
            if term.source != first:
                raise complaint(
                    f"{term.source} is a second truth; a recipe has one, and it is {first} already",
                    "stages",
                    name,
                    "reward",
                )


def locate(error: ValidationError, path: str, lines: Json) -> str:
    """The first thing that is wrong, as file:line: dotted key: what. `lines` gives each key's line."""
    # A misspelt key is both unknown and missing; what was typed is what can be corrected.
    first = min(error.errors(), key=lambda each: each["type"] == "missing")
    if first["type"] == "string_type":
        # Of a value that is text or a list, pydantic says first that it is no text; then what is wrong in the list.
        section = first["loc"][:-1]
        beside = [each for each in error.errors() if each["loc"][:-1][: len(section)] == section]
        first = max([first, *beside], key=lambda each: len(each["loc"]))
    place = [str(step) for step in first["loc"] if step not in ("[key]", "str") and not str(step).startswith("list[")]
    if error.title == RecipeSpec.__name__ and place[:1] == ["stages"] and {*place[2:3]} & STAGES.keys():
        del place[2]  # pydantic says which section of the union it is
    key = known = ".".join(place)
    while known and known not in lines:
        known = known.rpartition(".")[0]
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        problem = _explain_unknown(first["loc"])
    elif first["type"] == "missing":
        problem = "is missing"
    elif first["type"] in ("dict_type", "model_type", "model_attributes_type"):
        problem = f"is a section of keys and values, as in {{key: value}} (found {first['input']!r})"
    elif first["type"] != "complaint":
        problem = f"{problem[0].lower()}{problem[1:]} (found {first['input']!r})"
    return f"{path}:{lines[known]}: {key}: {problem}" if known else f"{path}: {key or 'recipe'}: {problem}"


def _explain_unknown(loc: tuple[int | str, ...]) -> str:
    """Of a key that its section does not take: what was meant, or whose it is."""
    section: type[BaseModel] = RecipeSpec
    key = str(loc[-1])
    if loc[0] == "model":
        section = ModelSpec
    elif loc[0] == "stages":
        of = STAGES[str(loc[2])]
        section = of.section
        below = _section_within(_words(section).get(str(loc[3]))) if len(loc) > 4 else None
        section = below or section
        others = [name for name, other in STAGES.items() if key in _words(other.section)]
        if section is of.section and others:
            return f"a {of.name} stage takes no {key}; only {', '.join(others)} may"
    return f"unknown key{suggest(key, _words(section))}"


def _section_within(kind: Any) -> type[BaseModel] | None:
    """The section that a word's type holds: data, sampling, rollout, an entry of reward."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(filter(None, map(_section_within, get_args(kind))), None)


def _words(section: type[BaseModel]) -> dict[str, Any]:
    """The words that a section takes, each with its type."""
    return {field.alias or name: field.annotation for name, field in section.model_fields.items()}
