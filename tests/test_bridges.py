"""Environments of verifiers and of OpenEnv as ours. Each is skipped where its library is not installed: the two ask for
different versions of mcp, so they cannot stand beside each other."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.models import environments
from pipeline.models.dialogue import Told
from pipeline.models.environments import Call
from pipeline.ppo import rewards

TASKSET = '''
import verifiers.v1 as vf
from pipeline.models.verifiers import from_verifiers, verifiers_reward

class Sum(vf.State):
    total: int = 0

class Adding(vf.Toolset[vf.ToolsetConfig, Sum]):
    TOOL_PREFIX = None

    async def setup_task(self, task):
        self.start = task.start * getattr(self, "start", 1)

    @vf.tool
    def sub(self, n: int) -> str:
        self.state.total -= n
        return str(self.state.total)

    @vf.tool
    async def add(self, n: int) -> str:
        """Adds to the sum."""
        if n == 13:
            raise ValueError("unlucky")
        self.state.total += n
        return f"{self.start} + {self.state.total}"

class Looking(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    async def setup(self):
        self.seen = []

    @vf.tool
    def up(self, word: str) -> str:
        self.seen.append(word)
        return " ".join(self.seen)

class Data(vf.TaskData):
    start: int
    answer: str

class Config(vf.TaskConfig): ...

class Task(vf.Task[Data, Sum, Config]):
    @classmethod
    def toolsets(cls, config):
        return [Adding(vf.ToolsetConfig())]

    async def setup(self, trace, runtime):
        trace.state.total = 1

    @vf.reward(weight=2.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward
    async def near(self, trace) -> float:
        calls = [call.name for said in trace.assistant_messages for call in said.tool_calls or []]
        return trace.state.total / 10 + len(calls) + trace.num_turns / 100

class Settings(vf.TasksetConfig):
    task: Config = Config()

class Sums(vf.Taskset[Task, Settings]):
    def load(self):
        for start in (1, 2):
            yield Task(Data(prompt=f"From {start}", system_prompt="Be brief.", start=start, answer="Four."))

    @classmethod
    def toolsets(cls, config):
        return [Looking(vf.SharedToolsetConfig())]

Sums_ = from_verifiers(Sums(Settings()))
'''


def ended(row: Any, world: Any, *turns: Any) -> Told:
    """An answer that has ended."""
    episode: Any = None
    return Told(row, episode, "", world, [*turns, {"role": "assistant", "content": "Four."}])


def test_a_taskset_of_verifiers_gives_rows_tools_and_the_reward(tmp_path: Path) -> None:
    pytest.importorskip("verifiers.v1")
    (tmp_path / "sums.py").write_text(TASKSET)
    reference = f"{tmp_path}/sums.py:Sums_"
    environment = environments.load(reference)
    (add, look, sub) = (tool["function"] for tool in environment.tools)
    assert (add["name"], add["description"], look["name"], sub["name"]) == (
        "add", "Adds to the sum.", "looking_up", "sub"
    )  # fmt: skip
    assert add["parameters"]["properties"]["n"]["type"] == "integer" and add["parameters"]["required"] == ["n"]

    environment.make.write_rows(tmp_path / "rows.jsonl")  # type: ignore[attr-defined]
    rows: list[Any] = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [message["content"] for message in rows[1]["prompt"]] == ["Be brief.", "From 2"]
    (one, two) = environments.with_tools([{**row, "_place": "rows.jsonl:1"} for row in rows], reference)
    worlds = [environments.begin(row, 10)[0] for row in (one, one, two)]

    def call(at: int, name: str, **arguments: Any) -> tuple[str, bool]:
        return environments.call_tool(worlds[at], Call(name, arguments), (one, one, two)[at], 10)

    assert call(0, "add", n=2) == ("1 + 3", False)
    assert call(1, "add", n=30) == ("1 + 31", False), "each answer has a state of its own"
    assert call(2, "add", n=4) == ("2 + 5", False), "and knows its own task"
    assert call(0, "sub", n=1) == ("2", False) and call(0, "add", n=6) == ("1 + 8", False), "which its calls go on from"
    said, failed = call(0, "add", n=13)
    assert failed and "unlucky" in said
    assert call(0, "add", n="many")[1] and call(0, "add")[1], "wrong arguments"
    assert call(0, "looking_up", word="a") == ("a", False)
    assert call(2, "looking_up", word="b") == ("a b", False), "what a taskset shares is one for all answers"

    asked = {"type": "function", "function": {"name": "add", "arguments": {"n": 2}}}
    replies = [{"role": "tool", "name": "add", "content": text} for text in ("1 + 3", "1 + 8")]
    unread = [{"role": "assistant", "content": "<tool_call>add"}, {"role": "tool", "name": "unknown", "content": "?"}]
    told = [
        ended(one, worlds[0], {"role": "assistant", "content": "", "tool_calls": [asked, asked]}, *replies),
        ended(one, worlds[1]),
        ended(two, worlds[2], *unread),
    ]
    told[1].turns[-1]["content"] = "Five."
    source = rewards.source(f"{tmp_path}/sums.py:verifiers_reward", 1.0)
    for _ in range(2):  # asked again, it says the same
        paid = rewards._call(source, told)
    assert paid == pytest.approx([2 + 0.8 + 2 + 0.02, 0 + 3.1 + 0 + 0.01, 2 + 0.5 + 0 + 0.02])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("class Task(vf.Task[Data, Sum, Config]):", "{}\n    NEEDS_CONTAINER = True"), "asks for a container"),
        (("    @vf.reward\n", "    @vf.stop\n    def enough(self, trace): return True\n\n{}"), "for stop conditions"),
        (("Adding(vf.ToolsetConfig(", '{}url="http://10.0.0.1"'), "for tools behind a URL"),
        (("TOOL_PREFIX = None", 'TOOL_PREFIX = "_my"'), "a tool is named '_my_add'"),
        (("from_verifiers(Sums(Settings()))", "from_verifiers(Sums)"), "takes a Taskset .* this is a ABCMeta"),
    ],
)
def test_what_a_taskset_asks_for_beyond_tools_and_rewards_is_refused(
    tmp_path: Path, change: tuple[str, str], why: str
) -> None:
    pytest.importorskip("verifiers.v1")
    old, new = change
    (tmp_path / "sums.py").write_text(TASKSET.replace(old, new.format(old)))
    with pytest.raises(UserError, match=why):
        environments.load(f"{tmp_path}/sums.py:Sums_")


def test_a_task_that_works_in_a_sandbox_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("verifiers.v1")
    (tmp_path / "sums.py").write_text(TASKSET.replace("trace.state.total = 1", "await runtime.run(['ls'], {})"))
    reference = f"{tmp_path}/sums.py:Sums_"
    row = {"prompt": [], "task": {"start": 1, "answer": ""}, "_place": "p:1"}
    with pytest.raises(UserError, match="asks for runtime.run"):
        environments.begin(*environments.with_tools([row], reference), 10)


def serve(make: Any, action: Any, observation: Any, sessions: int = 4) -> str:
    """A real server of an OpenEnv environment on a free port, for as long as the tests run."""
    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app

    listening = socket.create_server(("127.0.0.1", 0))
    app = create_fastapi_app(make, action, observation, max_concurrent_envs=sessions)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_an_openenv_server_gives_the_tools_the_replies_and_the_reward(tmp_path: Path) -> None:
    interfaces = pytest.importorskip("openenv.core.env_server.interfaces")
    types = sys.modules["openenv.core.env_server.types"]
    Guess = type("Guess", (types.Action,), {"__annotations__": {"number": int}, "__doc__": "Guess the number."})
    Said = type("Said", (types.Observation,), {"__annotations__": {"message": str}})

    class Guessing(interfaces.Environment):  # type: ignore[name-defined, misc]
        SUPPORTS_CONCURRENT_SESSIONS = True
        state = types.State()

        def reset(self, seed: Any = None, episode_id: Any = None, secret: int = 5, **_: Any) -> Any:
            self.secret = secret
            return Said(message="From 1 to 9.")

        def step(self, action: Any, **_: Any) -> Any:
            right = action.number == self.secret
            return Said(message="right" if right else "wrong", reward=1.0 if right else -0.25, done=right)

    url = serve(Guessing, Guess, Said, sessions=2)
    (tmp_path / "game.py").write_text(
        f"from pipeline.models.openenv import from_openenv\nGame = from_openenv('{url}')\n"
    )
    reference = f"{tmp_path}/game.py:Game"
    (tool,) = (tool["function"] for tool in environments.load(reference).tools)
    assert (tool["name"], tool["description"]) == ("step", "Guess the number.")
    assert list(tool["parameters"]["properties"]) == ["number"] and tool["parameters"]["required"] == ["number"]

    rows: list[Any] = [
        {"prompt": [{"role": "user", "content": "Play."}], "secret": secret, "_place": "p:1"} for secret in (3, 7)
    ]
    rows = environments.with_tools(rows, reference)
    begun = [environments.begin(row, 10) for row in rows]
    assert [text for _, text in begun] == ["\n\nFrom 1 to 9."] * 2

    def guess(at: int, **arguments: Any) -> tuple[str, bool]:
        return environments.call_tool(begun[at][0], Call("step", arguments), rows[at], 10)

    assert [guess(0, number=7), guess(1, number=7), guess(0, number=3)] == [
        ("wrong", False), ("right", False), ("right", False)
    ]  # fmt: skip
    said, failed = guess(1, number=7)
    assert failed and "It is over" in said
    said, failed = guess(0)
    assert failed, "over too"
    told = [ended(row, world) for row, (world, _) in zip(rows, begun, strict=True)]
    assert rewards._call(rewards.source(reference, 1.0), told) == [0.75, 1.0]
    with pytest.raises(UserError, match="failed to reset.*capacity"):
        environments.begin(rows[0], 10)
    told.clear(), begun.clear()
    environments.begin(rows[0], 10)  # what an answer held is free again


def test_the_mcp_tools_of_an_openenv_server_are_tools_of_their_own(tmp_path: Path) -> None:
    module = pytest.importorskip("openenv.core.env_server.mcp_environment")
    fastmcp = pytest.importorskip("fastmcp")
    types = sys.modules["openenv.core.env_server.types"]
    mcp_types = sys.modules["openenv.core.env_server.mcp_types"]

    class Calculating(module.MCPEnvironment):  # type: ignore[name-defined, misc]
        SUPPORTS_CONCURRENT_SESSIONS = True
        state = types.State()

        def __init__(self) -> None:
            server = fastmcp.FastMCP("calculator")

            @server.tool  # type: ignore[untyped-decorator]
            def add(a: int, b: int = 2) -> int:
                """Adds."""
                return a + b

            @server.tool  # type: ignore[untyped-decorator]
            def fail() -> str:
                raise ValueError("unlucky")

            super().__init__(server)

        def reset(self, seed: Any = None, episode_id: Any = None, **_: Any) -> Any:
            return types.Observation()

        def _step_impl(self, action: Any, **_: Any) -> Any:
            raise AssertionError("only tools are called")

    url = serve(Calculating, mcp_types.CallToolAction, mcp_types.CallToolObservation)
    (tmp_path / "calculator.py").write_text(
        f"from pipeline.models.openenv import from_openenv\nCalculator = from_openenv('{url}')\n"
    )
    reference = f"{tmp_path}/calculator.py:Calculator"
    add, fail = (tool["function"] for tool in environments.load(reference).tools)
    assert (add["name"], add["description"], add["parameters"]["required"]) == ("add", "Adds.", ["a"])
    (row,) = environments.with_tools([{"prompt": [], "_place": "p:1"}], reference)
    world, text = environments.begin(row, 10)
    assert text is None
    assert environments.call_tool(world, Call("add", {"a": 40}), row, 10) == ("42", False)
    said, failed = environments.call_tool(world, Call("fail", {}), row, 10)
    assert failed and "unlucky" in said


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000: an environment's server has to run on this machine"),
        ("https://localhost.example.com", "has to run on this machine"),
        ("http://127.0.0.1:9", "no OpenEnv server answers there .* Start it first"),
    ],
)
def test_no_server_elsewhere_is_asked(url: str, why: str) -> None:
    pytest.importorskip("openenv.core")
    from pipeline.models.openenv import from_openenv

    with pytest.raises(UserError, match=why):
        from_openenv(url)
