"""What a machine can do is told on any machine, quickly, and no secret with it."""

from __future__ import annotations

import json
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, onebase

from pipeline.models import dtype
from pipeline.terminal import env

HERE = {
    "torch": {"version": "2.13.0", "built_for": "CPU", "threads": 2},
    "cards": [],
    "four_bits": {"works": True, "relative_error": 0.09, "device": "cpu"},
}


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_probe", lambda: (HERE, ""))


def states(runs: Path = Path("runs")) -> dict[str, env.Finding]:
    return {finding.what: finding for finding in env.look_around(runs)}


def test_the_command_answers_within_ten_seconds_and_tells_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisIsASecret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = onebase(ROOT, tmp_path, "env", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor: what else the machine does is not its doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "thisIsASecret" not in printed
    found = json.loads(printed)
    by_name = {finding["what"]: finding for finding in found["findings"]}
    assert found["sound"] is True
    assert by_name["4 bits"]["state"] == "works" and by_name["Hub"]["figures"]["token"] is True
    assert by_name["processor"]["figures"]["threads"] >= 1
    assert not (tmp_path / "runs").exists()


def test_what_every_run_needs_makes_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = "the process ended with status -4"
    monkeypatch.setattr(env, "_probe", lambda: ({}, ended))
    torch = states()["torch"]
    assert torch.state == "broken" and ended in torch.says and torch.do


def test_a_strange_machine_is_told_what_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no affinity, another system, libraries that raise: the other looks still answer."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "nowhere")
    monkeypatch.delattr("os.sched_getaffinity", raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing here")

    monkeypatch.setattr("psutil.virtual_memory", refuse)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: None)
    found = states()
    assert found["system"].state == "look" and "Linux" in found["system"].do
    assert found["processor"].state == "works" and "does not list" in found["processor"].says
    assert found["memory"].state == "look" and "no such thing here" in found["memory"].says
    assert found["torch"].state == "works"


def test_cards_and_broken_builds_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "T4", "memory": 15 * 2**30, "free": 2**30, "capability": "7.5", "bfloat16": False}
    monkeypatch.setattr(env, "_probe", lambda: ({**HERE, "cards": [card], "four_bits": {"error": "no kernel"}}, ""))
    found = states()
    assert "15.0 GiB, 1.0 free, compute capability 7.5, no bfloat16" in found["card 0"].says
    assert found["4 bits"].state == "look" and "quantize: none" in found["4 bits"].do
    monkeypatch.setattr(env, "_probe", lambda: (HERE, ""))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert "built for CUDA" in states()["card"].do


def test_versions_are_held_against_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["trl<0.1", "no-such-package>=2", "torch>=1", "pytest>=1; extra == 'dev'", "nope>=1; extra == 'odd'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "metadata", lambda name: _Extras())
    findings = env.look_around(Path("runs"))
    packages = [finding for finding in findings if finding.what == "packages"]
    assert [finding.state for finding in packages] == ["broken", "look"]
    assert "no-such-package" in packages[0].says and "trl" in packages[1].says and "<0.1" in packages[1].says
    by_name = {finding.what: finding for finding in findings}
    assert by_name["extra dev"].state == "works"
    assert by_name["extra odd"].do == "pip install 'onebase[odd]'"


class _Extras:
    def get_all(self, name: str) -> list[str]:
        return ["dev", "odd"]


def test_a_folder_for_runs_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert states()["disk, runs"].state == "broken"
    assert states()["disk, cache"].state == "look"
