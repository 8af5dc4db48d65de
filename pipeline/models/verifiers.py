"""A taskset of `verifiers` as an environment. A file of a user's own names it:

    from pipeline.models.verifiers import from_verifiers, verifiers_reward

    Wiki = from_verifiers(WikiTaskset(WikiConfig()))     environment: "wiki.py:Wiki", reward: "wiki.py:verifiers_reward"

Its toolsets are the tools, and its tasks' rewards pay. Async functions are run to their end.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.disk.atomic import write_text
from pipeline.errors import UserError
from pipeline.models.environments import as_method


class Verifiers:
    """One answer to one task of a `verifiers` taskset."""

    _taskset: Any

    def reset(self, task: dict[str, Any], **row: Any) -> None:
        """`task`: the column that `write_rows` has written."""
        import verifiers.v1 as vf
        from verifiers.v1.state import state_cls

        kind, config = self._taskset.task_type(), self._taskset.config.task
        self._task = kind(kind.data_type().model_validate(task), config)
        said = vf.TraceTask(type=kind.__name__, data=self._task.data, key=self._task.key, hash=self._task.hash)
        agent = vf.AgentInfo(config=vf.AgentConfig(runtime=vf.SubprocessConfig()))
        self._trace = vf.Trace(task=said, state=state_cls(kind)(), agent=agent)
        finish(self._task.setup(self._trace, _NoRuntime()))
        toolsets = kind.toolsets(config)
        for toolset in toolsets:
            finish(toolset.setup())
            finish(toolset.setup_task(self._task.data))
        self._tools = _serve(toolsets) | _shared(self._taskset)

    @classmethod
    def write_rows(cls, file: str | Path) -> None:
        """The tasks as rows of prompts. Raises UserError for a task without a prompt."""
        lines = []
        if not cls._taskset.bounded:
            raise UserError(f"{type(cls._taskset).__name__} never ends: give from_verifiers its .take(1000)")
        for task in cls._taskset:
            data = task.data
            if not data.prompt or data.image:
                raise UserError(
                    f"the task {data.idx} of {type(cls._taskset).__name__} has no prompt, or needs a container. Leave "
                    "it out with taskset.exclude(idx=[...])"
                )
            asked = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
            if isinstance(data.prompt, str):
                asked += [{"role": "user", "content": data.prompt}]
            else:
                asked += [message.model_dump(exclude_none=True) for message in data.prompt]
            told = data.model_dump(mode="json", exclude_defaults=True)
            lines.append(json.dumps({"prompt": asked, "task": told}, ensure_ascii=False) + "\n")
        write_text(Path(file), "".join(lines))


def verifiers_reward(
    prompts: Sequence[Any], completions: Sequence[Any], environments: Sequence[Verifiers], **_: Any
) -> list[float]:
    """A reward function: what the task of each answer pays, the sum of its weighted rewards."""
    for world, prompt, completion in zip(environments, prompts, completions, strict=True):
        world._trace.nodes.clear()
        _retell(world._trace, prompt, sampled=False)
        _retell(world._trace, completion, sampled=True)
        finish(world._task.finalize(world._trace, _NoRuntime()))
        finish(world._task.score(world._trace, _NoRuntime()))
    return [float(world._trace.reward) for world in environments]


def from_verifiers(taskset: Any) -> type[Verifiers]:
    """The environment of a `verifiers` taskset. Raises UserError where it asks for more than tools and rewards that run
    in this process."""
    try:
        import verifiers.v1 as vf
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed here: pip install 'onebase[verifiers]'") from error
    if not isinstance(taskset, vf.Taskset):
        raise UserError(
            f"from_verifiers takes a Taskset of verifiers.v1, and this is a {type(taskset).__name__}. ToolEnv and the "
            "other classes of verifiers before 0.4 are not taken: make a Taskset of it, or copy its tools into a class"
        )
    kind, config = taskset.task_type(), taskset.config.task
    name = type(taskset).__name__
    toolsets = [*kind.toolsets(config), *type(taskset).toolsets(taskset.config)]
    unmet = {
        "a container": kind.NEEDS_CONTAINER,
        "a model that judges": bool(config.judges),
        "stop conditions": bool(config.stops) or _marked(kind, "stop"),
        "a hook between model and tools": _marked(kind, "intercept"),
        "tools behind a URL": any(toolset.config.url for toolset in toolsets),
    }
    if asked := [what for what, needed in unmet.items() if needed]:
        raise UserError(f"{name} asks for {' and '.join(asked)}, which is not offered here: see docs/tools.md")
    tools = {}
    for full, (toolset, tool) in _serve(toolsets).items():
        (listed,) = (each for each in finish(toolset.mcp.list_tools()) if each.name == tool)
        tools[full] = as_method(full, listed.description or "", listed.input_schema, _call_verifiers(full))
    return type(name, (Verifiers,), {"_taskset": taskset, **tools})


def _call_verifiers(full: str) -> Callable[..., Any]:
    def call(self: Verifiers, **arguments: Any) -> Any:
        toolset, name = self._tools[full]
        _share_state(toolset, self._trace)
        blocks = finish(toolset.mcp.call_tool(name, arguments)).content
        if any(block.type != "text" for block in blocks):
            return blocks  # is refused as no text
        return "\n".join(block.text for block in blocks)

    return call


def _serve(toolsets: Sequence[Any]) -> dict[str, tuple[Any, str]]:
    """Each tool by the name that the model calls, made as verifiers' own harness makes it: its toolset, its name there.

    A toolset is an MCP server. Here it answers in this process, without a port."""
    from mcp.server.mcpserver import MCPServer

    served = {}
    for toolset in toolsets:
        toolset.mcp = MCPServer(toolset.server_name or type(toolset).__name__)
        toolset.register(toolset.mcp)
        for tool in finish(toolset.mcp.list_tools()):
            served[f"{toolset.server_name}_{tool.name}" if toolset.server_name else tool.name] = (toolset, tool.name)
    return served


@cache
def _shared(taskset: Any) -> dict[str, tuple[Any, str]]:
    """The tools that all answers share; they are set up once."""
    toolsets = type(taskset).toolsets(taskset.config)
    for toolset in toolsets:
        finish(toolset.setup())
    return _serve(toolsets)


def _share_state(toolset: Any, trace: Any) -> None:
    """Let tools read and write the state of an answer, which verifiers passes between processes."""

    async def pull() -> Any:
        return trace.state

    async def push(before: bytes) -> None: ...

    toolset._pull_state, toolset._push_state = pull, push


def _retell(trace: Any, said: Any, sampled: bool) -> None:
    """Put messages into a trace, behind those that it has."""
    from pydantic import TypeAdapter
    from verifiers.v1 import Message, MessageNode

    calls: list[str] = []
    for message in said if isinstance(said, list) else [{"role": "user", "content": said}]:
        told = {key: message[key] for key in ("role", "content", "name") if message.get(key) is not None}
        if asked := message.get("tool_calls"):
            calls = [f"call_{len(trace.nodes)}_{number}" for number in range(len(asked))]
            functions = [call["function"] for call in asked]
            told["tool_calls"] = [
                {"id": call, "name": each["name"], "arguments": json.dumps(each["arguments"], ensure_ascii=False)}
                for call, each in zip(calls, functions, strict=True)
            ]
        if told["role"] == "tool":
            told["tool_call_id"] = calls.pop(0) if calls else "unread"
        parent = len(trace.nodes) - 1 if trace.nodes else None
        mine = sampled and told["role"] == "assistant"
        node = MessageNode(parent=parent, message=TypeAdapter(Message).validate_python(told), sampled=mine)
        trace.nodes.append(node)


class _NoRuntime:
    """Stands for the sandbox in which verifiers runs an agent: there is none here."""

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"the task asks for runtime.{name}: it works in a sandbox, and there is none here")


def _marked(kind: type, mark: str) -> bool:
    return any(hasattr(member, mark) for _, member in inspect.getmembers(kind, callable))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for the whole process: what a tool has opened stays open for its next call."""
    return asyncio.new_event_loop()


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """What an async function returns, once it has."""
    return _loop().run_until_complete(work)
