"""An external judge on loopback: both orders are asked, a verdict that depends on the order is a tie."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluate import evaluation, judge
from pipeline.evaluate.judge import Judge, arena, verdict

HUNG: list[str] = []
"""What was asked of the judge that hangs."""


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Judges by the rule that its model's name says."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"]
        a, b = re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nVerdict", text).groups()  # type: ignore[union-attr]
        told = {
            "first": "A",
            "longer": "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B.",
            "wordy": "**Answer A** is better" if len(a) > len(b) else "Verdict: B",
            "drawn": "A tie." if len(a) > 1 else "tie",
            "half": None if len(a) == 1 else "A",
            "chatty": "I would rather not say",
        }.get(asked["model"])
        if asked["model"] == "unknown":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "there is no model of this name"}}')
            return
        if asked["model"] == "hangs":
            HUNG.append(text)
            time.sleep(3)
            return
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
    assert Judge(url, "first").points("q", "short", "much longer") == (0.5, ["A", "A"])


def test_a_verdict_is_found_in_few_words(url: str) -> None:
    wordy = ["Verdict: B", "**Answer A** is better"]
    assert Judge(url, "wordy").points("q", "short", "much longer") == (0.0, wordy)
    assert Judge(url, "drawn").points("q", "short", "much longer") == (0.5, ["A tie.", "A tie."])
    for reply, meant in (("A", "A"), ("b.", "B"), (" **B**\n", "B"), ("Tie", "tie"), ("Option A:", "A")):
        assert verdict(reply) == meant, reply
    for reply in ("", "Answer", "a good question", "Both are fine", "<think>"):
        assert verdict(reply) is None, reply


def test_replies_that_are_no_verdict_are_counted_and_most_of_them_are_refused(url: str) -> None:
    told = {"sft": ["a", "bb"], "dpo": ["cc", "dd"]}
    found, kept = arena(Judge(url, "half"), ["q1", "q2"], told)
    assert [one["reply"] for one in kept if one["verdict"] is None] == [""] and found.win_rate(
        "sft", "dpo"
    ).value == 0.5
    with pytest.raises(UserError, match=r"chatty is rejected: 4 of its 4 replies are not .*, such as 'I would rather"):
        arena(Judge(url, "chatty"), ["q1", "q2"], told)


def test_what_is_wrong_with_a_judge_is_said_once_and_soon(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="404.*there is no model of this name"):
        Judge(url, "unknown").points("q", "a", "b")
    monkeypatch.setattr(judge, "SECONDS", 0.5)
    HUNG.clear()
    with pytest.raises(UserError, match="did not give a verdict within 0.5 seconds"):
        arena(Judge(url, "hangs"), [f"q{i}" for i in range(40)], {"sft": ["a"] * 40, "dpo": ["b"] * 40})
    assert 1 <= len(HUNG) <= judge.AT_ONCE  # those under way; nothing is asked once it is known to hang


def test_all_against_all(url: str) -> None:
    told = {"sft": ["a", "aaa"], "dpo": ["aa", "aa"], "ppo": ["aaaa", "aaa"]}
    found, _ = arena(Judge(url, "longer"), ["q1", "q2"], told)
    assert found.points_PKK[0].tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert found.points_PKK[1].tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    assert found.win_rate("ppo", "sft").value == 0.75


def test_nothing_leaves_the_machine(url: str) -> None:
    for elsewhere in ("http://example.com/v1", "http://10.0.0.1/v1", "file:///etc/passwd", "127.0.0.1:80"):
        with pytest.raises(UserError, match="expected an address on this machine"):
            Judge(elsewhere, "m")
    with pytest.raises(UserError, match="did not give a verdict"):
        Judge("http://127.0.0.1:1/v1", "m").points("q", "a", "b")


def test_every_verdict_is_kept_with_who_stood_where(url: str, tmp_path: Path) -> None:
    """Each pair in both orders, so that a person can read what the judge was shown and what it said; from these lines
    alone the win rate follows."""
    texts = {"sft": [["a"], ["same"]], "dpo": [["aaa"], ["same"]]}
    rows = [{"prompt": [{"role": "user", "content": "q\u2028 1"}]}, {"prompt": "q2"}]
    taken = {name: {"value": {"text": text}, "rows": rows} for name, text in texts.items()}
    found = evaluation.judged(taken, tmp_path, Judge(url, "longer"))
    lines = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    first = {"prompt": "user: q\u2028 1", "A": "sft", "B": "dpo", "answer_A": "a", "answer_B": "aaa"}
    second = {"prompt": "user: q\u2028 1", "A": "dpo", "B": "sft", "answer_A": "aaa", "answer_B": "a"}
    alike = {"prompt": "q2", "A": "sft", "B": "dpo", "answer_A": "same", "answer_B": "same"}
    assert lines == [
        {**first, "reply": "B.", "verdict": "B"},
        {**second, "reply": "A", "verdict": "A"},
        {**alike, "reply": None, "verdict": "tie"},  # nobody was asked
    ]
    assert found is not None and found.wins["dpo"]["sft"].value == 0.75
    assert evaluation.judged(taken, tmp_path, None) == found
    (tmp_path / "judge.jsonl").write_text("")
    assert evaluation.judged(taken, tmp_path, None) is None


def test_verdicts_are_kept_and_a_file_changed_by_hand_is_not_believed(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(*texts: str) -> dict[str, Any]:
        return {"value": {"text": [[text] for text in texts]}, "rows": [{"prompt": "q1"}, {"prompt": "q2"}]}

    taken = {"sft": answers("a", "a"), "dpo": answers("aaa", "aa")}
    found = evaluation.judged(taken, tmp_path, Judge(url, "longer"))
    assert found is not None and found.wins["dpo"]["sft"].value == 1 and found.model == "longer"
    assert evaluation.judged(taken, tmp_path, None) == found
    file = tmp_path / "judge.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"value": 1.0', '"value": 0.5'), encoding="utf-8")
    assert evaluation.judged(taken, tmp_path, None) is None
    assert (
        "judge longer: its verdicts are left out, as a file of them is not as it was written" in capsys.readouterr().out
    )
