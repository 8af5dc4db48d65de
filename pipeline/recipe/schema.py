"""The JSON schema of a recipe, by which an editor completes its words, explains them and underlines what is wrong.

It is made of the sections that a recipe is checked by. It sees no files, and not what stages say of each other:
`onebase check` has the last word. Draft 7 of JSON schema is what editors know best.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from pipeline.data.load import DataSpec, Part
from pipeline.disk.atomic import Json
from pipeline.models.spec import ModelSpec
from pipeline.plan.sizes import AUTO, AUTO_ARGUMENTS
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.recipe.gates import COMPARISON
from pipeline.recipe.rounds import Rounds
from pipeline.recipe.sections import RecipeSpec
from pipeline.stages import STAGES
from pipeline.stages.arguments import NUMBERS, WHY_NOT, ConfigClass, defaults, explanations, words
from pipeline.stages.reward_term import RewardTerm
from pipeline.stages.stage import StageSpec

DRAFT = "http://json-schema.org/draft-07/schema#"
TITLE = "A OneBase recipe"
PLACE = "#/definitions/{model}"


def make_schema() -> Json:
    """As plain data, for json.dumps."""
    whole = RecipeSpec.model_json_schema(ref_template=PLACE)
    definitions = whole.pop("$defs")
    models: list[type[BaseModel]] = [ModelSpec, DataSpec, Part, RewardTerm, RejectionSettings, Rounds]
    models += [stage.section for stage in STAGES.values()]
    for model in models:
        if model.__name__ in definitions:
            _describe(definitions[model.__name__], model)
    _describe(whole, RecipeSpec)
    for name, stage in STAGES.items():
        definition = definitions[stage.section.__name__]
        definition["properties"]["train"] = _of_reference(f"train-{name}", definition["properties"]["train"])
        definitions[f"train-{name}"] = _arguments(stage.config_class, stage.house)
    definitions[DataSpec.__name__]["anyOf"] = [{"required": ["path"]}, {"required": ["mix"]}]
    definitions[ModelSpec.__name__]["properties"]["lora"] |= _arguments("LoraConfig", {})
    definitions["stage"] = _any_stage()
    properties = whole["properties"]
    properties["train"] |= _shared_arguments()
    properties["stages"] = _stages()
    properties["expect"] |= {"additionalProperties": {"anyOf": [_comparison(), _comparisons()]}}
    whole |= {"definitions": definitions}
    return {"$schema": DRAFT, "title": TITLE, **_plain(whole)}


def _describe(schema: Json, model: type[BaseModel]) -> None:
    """Put the sentences below a class's fields into its schema; so they stand in the source once."""
    schema["description"] = _one_line(model.__doc__)
    told = _docstrings(model)
    for name, field in model.model_fields.items():
        if name in told:
            schema["properties"][field.alias or name]["description"] = _one_line(told[name])


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The text that stands below each field in the source, of the class and of those it inherits from."""
    told: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if not issubclass(each, BaseModel) or each is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                told[field.target.id] = str(ast.literal_eval(below.value))
    return told


def _stages() -> Json:
    """A section named as a kind is of that kind, unless it says another; every other section says which it is."""
    named = {
        name: {
            "if": {"required": ["kind"]},
            "then": _reference("stage"),
            "else": _reference(stage.section.__name__),
        }
        for name, stage in STAGES.items()
    }
    other = {**_reference_with("stage", "A stage under a name of its own."), "required": ["kind"]}
    return {
        "description": "The chain: each stage trains one adapter, and goes on from the stage that `from` names.",
        "type": "object",
        "minProperties": 1,
        "properties": named,
        "additionalProperties": other,
    }


def _any_stage() -> Json:
    """Told apart by `kind`, so that what is wrong is said of that kind alone."""
    cases = [
        {
            "if": {"required": ["kind"], "properties": {"kind": {"const": name}}},
            "then": _reference(stage.section.__name__),
        }
        for name, stage in STAGES.items()
    ]
    kind = {"description": _one_line(_docstrings(StageSpec)["kind"]), "enum": list(STAGES)}
    return {"type": "object", "properties": {"kind": kind}, "allOf": cases}


def _shared_arguments() -> Json:
    properties: Json = {}
    for stage in STAGES.values():
        properties = {**_arguments(stage.config_class, {})["properties"], **properties}
    return {"properties": {word: _without(given, "default") for word, given in properties.items()}}


def _arguments(config: ConfigClass, house: Json) -> Json:
    """The words that `train:` takes. A library's are listed and others let through, as its next version may have more;
    ours are checked whole."""
    if isinstance(config, type):
        schema = config.model_json_schema(ref_template=PLACE)
        _describe(schema, config)
        for word in AUTO_ARGUMENTS:
            if word in schema["properties"]:
                schema["properties"][word] = _or_auto(schema["properties"][word])
        return schema
    given, told = {**defaults(config), **house}, explanations(config)
    properties: Json = {}
    for word in sorted(words(config)):
        if word in WHY_NOT:
            properties[word] = {"not": {}, "description": f"Not here: it {WHY_NOT[word]}."}
            continue
        properties[word] = _or_auto(_number(word)) if word in AUTO_ARGUMENTS else _number(word)
        properties[word] |= {"description": _one_line(told[word])} if word in told else {}
        properties[word] |= {"default": given[word]} if word in given else {}
    return {"type": "object", "properties": properties}


def _number(word: str) -> Json:
    if word not in NUMBERS:
        return {}
    kind, least = NUMBERS[word]
    return {"type": ["integer" if kind is int else "number", "null"], "minimum": least}


def _or_auto(schema: Json) -> Json:
    """A word that may be left to the planner."""
    told: Json = {key: schema[key] for key in ("description", "default") if key in schema}
    rest = _without(schema, *told)
    return {**told, "anyOf": [{"const": AUTO}, rest]} if rest else told


def _comparison() -> Json:
    return {"type": "string", "pattern": f"^\\s*(?:{COMPARISON.pattern})\\s*$"}


def _comparisons() -> Json:
    return {"type": "object", "additionalProperties": _comparison()}


def _reference(model: str) -> Json:
    return {"$ref": PLACE.format(model=model)}


def _reference_with(model: str, description: str) -> Json:
    return {"description": description, "allOf": [_reference(model)]}


def _of_reference(model: str, beside: Json) -> Json:
    return _reference_with(model, beside["description"]) | {"default": {}}


def _plain(schema: Any, names: bool = False) -> Any:
    """Without the titles that repeat each field's name, and with nothing beside a $ref, where draft 7 reads nothing.
    `names`: whether the keys at this place are names of ours, which may well be `title`."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        key: value
        if key in ("default", "enum", "const") and not names
        else _plain(value, key in ("properties", "definitions"))
        for key, value in schema.items()
        if names or key not in ("title", "discriminator")
    }
    if "$ref" in plain and len(plain) > 1:
        plain["allOf"] = [{"$ref": plain.pop("$ref")}]
    return plain


def _without(schema: Json, *keys: str) -> Json:
    return {key: value for key, value in schema.items() if key not in keys}


def _one_line(text: str | Iterable[str] | None) -> str:
    return " ".join(str(text or "").split())
