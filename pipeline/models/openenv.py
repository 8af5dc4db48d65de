"""An OpenEnv server on this machine as an environment. A file of a user's own names it:

    from pipeline.models.openenv import from_openenv

    Game = from_openenv("http://127.0.0.1:8000")         environment: "game.py:Game", reward: "game.py:Game"

Its actions are the tools, and what its steps pay is added up.
"""

from __future__ import annotations

import ipaddress
import json
import urllib.request
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.models.environments import as_method


def from_openenv(url: str) -> type[Any]:
    """The environment of an OpenEnv server on this machine. Raises UserError where none answers, or for another
    machine's address."""
    try:
        from openenv.core import GenericEnvClient
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed here: pip install 'onebase[openenv]'") from error
    if not _is_this_machine(urlsplit(url).hostname or ""):
        raise UserError(f"{url}: an environment's server has to run on this machine, as http://127.0.0.1:8000")

    class OpenEnv:
        """One answer: a session of its own on the server."""

        def reset(self, prompt: Any, **row: Any) -> str | None:
            self._client = GenericEnvClient(base_url=url, mode="simulation").sync().connect()
            weakref.finalize(self, self._client.close)
            self._total, self._done = 0.0, False
            told = self._take(self._client.reset(**row))
            return f"\n\n{told}" if told else None

        def get_reward(self) -> float:
            return self._total

        def _step(self, action: dict[str, Any]) -> Any:
            if self._done:
                raise RuntimeError("It is over: nothing can be done any more.")
            result = self._client.step(action)
            self._take(result)
            return result.observation

        def _take(self, result: Any) -> str:
            self._total += result.reward or 0.0
            self._done = result.done
            return _text_of(result.observation)

    action = _ask(f"{url.rstrip('/')}/schema")["action"]
    if {"tool_name", "arguments"} <= action["properties"].keys():
        with GenericEnvClient(base_url=url, mode="simulation").sync() as client:
            listed = client.step({"type": "list_tools"}).observation["tools"]
        tools = {
            each["name"]: as_method(each["name"], each["description"], each["input_schema"], _call_mcp(each["name"]))
            for each in listed
        }
    else:
        fields = {name: field for name, field in action["properties"].items() if name != "metadata"}
        about = action.get("description") or "Act in the environment."
        tools = {
            "step": as_method(
                "step", about, {**action, "properties": fields}, lambda self, **told: _text_of(self._step(told))
            )
        }
    for name, member in tools.items():
        setattr(OpenEnv, name, member)
    return OpenEnv


def _call_mcp(name: str) -> Callable[..., str]:
    def call(self: Any, **arguments: Any) -> str:
        told = self._step({"type": "call_tool", "tool_name": name, "arguments": arguments})
        if told.get("error"):
            raise RuntimeError(told["error"]["message"])
        result = told.get("result")
        result = result["data"] if isinstance(result, dict) and "data" in result else result
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)

    return call


def _text_of(observation: dict[str, Any]) -> str:
    """An observation as a text: its only field, or all of them as JSON."""
    told = {
        key: value
        for key, value in observation.items()
        if key not in ("done", "reward", "metadata") and value is not None
    }
    if len(told) == 1 and isinstance(only := next(iter(told.values())), str):
        return only
    return json.dumps(told, ensure_ascii=False) if told else ""


def _ask(url: str) -> Any:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: no OpenEnv server answers there ({error}). Start it first") from error


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
