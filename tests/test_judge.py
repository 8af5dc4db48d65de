"""An external judge on loopback: both orders are asked, a verdict that depends on the order is a tie."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluate.judge import Judge, arena


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Judges by the rule that its model's name says."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        a, b = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nVerdict", text).groups()  # type: ignore[union-attr]
        told = {
            "first": "A",
            "longer": "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B.",
            "chatty": "I would rather not say",
        }[asked["model"]]
        body = json.dumps({"choices": [{"message": {"content": told}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_judge_that_favours_a_place_sees_only_ties(url: str) -> None:
    for model in ("first", "chatty"):
        assert Judge(url, model).points("q", "short", "much longer") == 0.5


def test_all_against_all(url: str) -> None:
    told = {"sft": ["a", "aaa"], "dpo": ["aa", "aa"], "ppo": ["aaaa", "aaa"]}
    found = arena(Judge(url, "longer"), ["q1", "q2"], told)
    assert found.points_PKK[0].tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert found.points_PKK[1].tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    assert found.win_rate("ppo", "sft").value == 0.75


def test_nothing_leaves_the_machine(url: str) -> None:
    for elsewhere in ("http://example.com/v1", "http://10.0.0.1/v1", "file:///etc/passwd", "127.0.0.1:80"):
        with pytest.raises(UserError, match="expected an endpoint on this machine"):
            Judge(elsewhere, "m")
    with pytest.raises(UserError, match="did not give a verdict"):
        Judge("http://127.0.0.1:1/v1", "m").points("q", "a", "b")
