"""A user's own tool ends when its time is over, whatever it does about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.errors import UserError
from pipeline.models import environments
from pipeline.models.time_limit import find_hung

SLOW = """import time

class Slow:
    def reset(self, **row): pass

    def swallow(self) -> str:
        \"\"\"Catch everything.\"\"\"
        try:
            time.sleep(1000)
        except BaseException:
            return "done"

    def fail(self) -> str:
        \"\"\"Fail after the end of its time.\"\"\"
        try:
            time.sleep(1000)
        except BaseException:
            raise ValueError("an error of its own") from None

    def compute(self) -> str:
        \"\"\"No signal is heard before this ends.\"\"\"
        return str(sum(range(10**12)))
"""
COMPUTES = "        return str(sum(range(10**12)))"


@pytest.mark.parametrize("tool", ["swallow", "fail"])
def test_a_tool_that_catches_the_end_of_its_time_still_stops_the_run(tmp_path: Path, tool: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    row = {"environment": f"{tmp_path}/slow.py:Slow", "_place": "p.jsonl:1"}
    world, _ = environments.begin(row, 1.0)
    with pytest.raises(UserError, match=f"the tool '{tool}' .* took more than 0.2 s"):
        environments.call_tool(world, environments.Call(tool, {}), row, 0.2)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_tool_that_nothing_can_interrupt_ends_its_process_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    script = """
from pipeline.models import environments, time_limit
time_limit.LAST_SECONDS = 0.2
row = {"environment": "slow.py:Slow", "_place": "p.jsonl:1"}
world, _ = environments.begin(row, 1.0)
environments.call_tool(world, environments.Call("compute", {}), row, 0.2)
"""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert find_hung(ended.stderr) == f"compute at {tmp_path}/slow.py:{SLOW.splitlines().index(COMPUTES) + 1}"
