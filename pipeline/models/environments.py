"""An environment: a Python class whose methods are the model's tools, as TRL's GRPO takes it (`environment_factory`).

    class Game:
        def reset(self, **row) -> str | None: ...      a text is put after the prompt
        def guess(self, number: int) -> str: ...       a tool: every other method whose name has no leading underscore

Each answer has an instance of its own. A row says under `environment` which class it is asked with, and under `tools`
what the chat template is told of its methods.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from pipeline.data.contracts import Row
from pipeline.data.tokens import Messages
from pipeline.errors import UserError
from pipeline.models.own_code import OwnCodeError, load_named, refusal
from pipeline.models.time_limit import TooLong, call_within

NO_TOOLS = ("reset", "get_reward")
"""Methods that are none, by TRL's convention."""
TOOL_SECONDS = 10.0
"""That a tool may take, unless a stage says otherwise."""
OPENING, CLOSING = "<tool_call>", "</tool_call>"
KEY: Final = "environment"
SET_APART = {"_place", "environment", "tools"}
"""What a row holds that reset is not given."""
DEEPEST = 64
"""Levels of lists and objects in a call. Copying and writing down what is deeper runs out of Python's stack."""
_CALL = re.compile(f"{OPENING}(.*?)(?:{CLOSING}|$)", re.DOTALL)


@dataclass(frozen=True)
class Environment:
    """`tools`: a JSON schema of each, as chat templates take them."""

    name: str
    make: type[Any]
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """What a model asks of a tool; or, where it cannot be read, what is wrong with it."""

    name: str
    arguments: dict[str, Any]
    wrong: str = ""


@lru_cache
def load(reference: str) -> Environment:
    """The environment named by `path.py:Class`. Raises UserError for what is none."""
    from transformers.utils.chat_template_utils import get_json_schema

    make = load_named(reference, KEY)
    methods = dict(inspect.getmembers(make, lambda member: inspect.isfunction(member) or inspect.ismethod(member)))
    if "reset" not in methods:
        raise OwnCodeError(KEY, f"{reference} has no method reset(self, **row), with which an answer begins")
    if why := refusal(make, ()):
        raise OwnCodeError(KEY, f"{reference} is made without arguments, once for each answer, and refuses that: {why}")
    tools = []
    for name, method in methods.items():
        if name in NO_TOOLS or name.startswith("_"):
            continue
        if inspect.iscoroutinefunction(method):
            raise OwnCodeError(KEY, f"the tool '{name}' of {reference} is async. Make it a plain method")
        try:
            tools.append(getattr(method, "schema", None) or get_json_schema(method))
        except Exception as error:
            raise OwnCodeError(
                KEY,
                f"the tool '{name}' of {reference} cannot be described to the model: {str(error).rstrip('.!')}. It "
                "needs a docstring with an `Args:` section that names each argument, and a type hint for each.",
            ) from error
    if not tools:
        raise OwnCodeError(KEY, f"{reference} has no tool: a method beside reset, without a leading underscore")
    return Environment(reference, make, tools)


def as_method(name: str, description: str, parameters: dict[str, Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """A method for a tool of another library, whose schema is what that says. Raises UserError for a name that no tool
    can have here."""
    if name in (*NO_TOOLS, "write_rows") or name.startswith("_") or not name.isidentifier():
        raise UserError(f"a tool is named '{name}', which is no name for a tool here. Rename it")
    function = {"name": name, "description": description, "parameters": parameters}
    call.schema = {"type": "function", "function": function}  # type: ignore[attr-defined]
    return call


def with_tools(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows, to be asked with an environment. Raises UserError for a row that names other tools, or whose prompt is
    text: only a chat template tells of tools."""
    tools = load(reference).tools
    for row in rows:
        if isinstance(row.get("prompt"), str):
            raise UserError(
                f"{row['_place']}: 'prompt' is text, and only messages can tell the model of the environment "
                f'{reference}. Write [{{"role": "user", "content": ...}}]'
            )
        if row.get("tools") not in (None, tools):
            raise UserError(
                f"{row['_place']}: its column 'tools' names other tools than the environment {reference} has. Remove "
                "the column: the environment describes its own"
            )
    return [{**row, "tools": tools, "environment": reference} for row in rows]


def check_reset(reference: str, rows: Iterable[Row]) -> None:
    """Raises OwnCodeError for an environment whose reset cannot be called with the columns of rows."""
    columns = {key for row in rows for key in row} - SET_APART
    if columns and (why := refusal(load(reference).make.reset, columns, None)):
        raise OwnCodeError(
            KEY,
            f"{reference}: reset(self, **row) is called with the columns {', '.join(sorted(columns))}, and refuses "
            f"that: {why}",
        )


def begin(row: Row, seconds: float) -> tuple[Any, str | None]:
    """An instance for one answer to a row, and what it puts after the prompt. Raises UserError where it fails."""
    environment = load(row["environment"])
    columns = {key: value for key, value in row.items() if key not in SET_APART}
    where = f"the environment {environment.name} for the prompt at {row['_place']}"
    try:
        world = call_within(seconds, environment.make)
        observation = call_within(seconds, world.reset, **copy.deepcopy(columns))
    except TooLong:
        raise UserError(f"{where} took more than {seconds:g} s to reset. Correct it, or raise tool_timeout") from None
    except (Exception, SystemExit) as error:  # the class is the user's program: it can fail in any way
        called = " It is called as reset(self, **row), with the row's columns." if isinstance(error, TypeError) else ""
        raise UserError(f"{where} failed to reset: {type(error).__name__}: {error}.{called}") from error
    if observation is not None and not isinstance(observation, str):
        raise UserError(f"{where} returned a {type(observation).__name__} from reset: expected a text or None")
    return world, observation


def call_tool(world: Any, call: Call, row: Row, seconds: float) -> tuple[str, bool]:
    """What a tool replies, and whether the call went wrong: then the reply says how, as in TRL.

    Raises UserError for a tool that takes too long or returns what is no text: what a machine's load decides must not
    be learnt.
    """
    environment = load(row["environment"])
    names = [tool["function"]["name"] for tool in environment.tools]
    wrong = call.wrong
    if not wrong and call.name not in names:
        wrong = f"There is no tool {call.name!r}. There is: {', '.join(names)}"
    if wrong:
        return str({"error": wrong}), True
    where = f"the tool '{call.name}' of {environment.name}, called with {call.arguments} for {row['_place']},"
    try:
        result = call_within(seconds, getattr(world, call.name), **copy.deepcopy(call.arguments))
        said = call_within(seconds, str, result)
    except TooLong:
        raise UserError(
            f"{where} took more than {seconds:g} s. If it needs longer, raise tool_timeout and run again: the stage "
            "goes on from its last checkpoint."
        ) from None
    except (Exception, SystemExit) as error:
        return str({"error": str(error) or type(error).__name__}), True
    if not isinstance(result, str | int | float | dict):
        raise UserError(f"{where} returned a {type(result).__name__}: expected a text, a number or an object")
    return said, False


def parse_calls(text: str) -> list[Call]:
    """The calls in what a model said, written as Hermes and Qwen write them: JSON between <tool_call> marks."""
    return [_parse(found) for found in _CALL.findall(text)]


def _parse(text: str) -> Call:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return Call("", {}, "The tool call is not JSON")
    if _is_deeper(said, DEEPEST):
        return Call("", {}, f"The tool call is nested more than {DEEPEST} deep")
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return Call("", {}, 'The tool call is not of the form {"name": ..., "arguments": {...}}')
    arguments = said.get("arguments", {})
    if not isinstance(arguments, dict):
        return Call(said["name"], {}, "The arguments of the tool call are not an object")
    return Call(said["name"], arguments)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more than so many levels deep."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return below is not None and (levels == 0 or any(_is_deeper(one, levels - 1) for one in below))


def as_message(text: str) -> dict[str, Any]:
    """What a model said as a message, with `tool_calls` if all its calls can be read; else with all of it as text."""
    calls = parse_calls(text)
    if not calls or any(call.wrong for call in calls):
        return {"role": "assistant", "content": text}
    named = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"role": "assistant", "content": _CALL.sub("", text).strip(), "tool_calls": named}


def put_after(messages: Messages, text: str | None) -> Messages:
    """A prompt whose last message goes on with a text, as in TRL."""
    if text is None:
        return messages
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
