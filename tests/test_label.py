"""onebase label in real headless Chromium: from the first key to the written row, and what must not get lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPCookieProcessor, Request, build_opener, urlopen

import pytest
from browser import CHROMIUM, Browser, Tab
from conftest import ROOT, seal, write_recipe

from pipeline.data.votes import Candidate, read_votes
from pipeline.label.drawing import Pair
from pipeline.label.opening import Wishes, open_desk
from pipeline.recipe.recipe import Recipe, read

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PLAIN = Wishes([], [1.0], 2, 256, "random", 0.0, "", "")
HOSTILE = "<img src=x onerror=document.title='taken'><b>bold</b> \x1b[31mred\x1b[0m </script><script>1</script>"


def make_recipe(base: Path, folder: Path, prompts: int = 40, **more: Any) -> Recipe:
    """A recipe whose only stage is sealed: its answers are written below, so that no model has to be loaded."""
    rows = [{"prompt": [{"role": "user", "content": f"What is made on isle {n}?"}]} for n in range(prompts)]
    dialogues = [{**row, "completion": [{"role": "assistant", "content": "Cheese."}]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues), encoding="utf-8")
    tree = {
        "name": "tiny", "model": {"base": str(base), "dtype": "bfloat16"},
        "stages": {"sft": {"data": {"path": str(folder / "rows.jsonl")}}}, **more,
    }  # fmt: skip
    recipe = read(write_recipe(tree, folder / "tiny.yaml"))
    train(recipe, folder, b"first")
    return recipe


def train(recipe: Recipe, folder: Path, weights: bytes, stage: str = "sft", **more: Any) -> None:
    adapter = recipe.artifact(stage, folder / "runs").adapter
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    seal(recipe, stage, folder / "runs", {}, **more)


def draw(recipe: Recipe, folder: Path, wishes: Wishes = PLAIN, first: str = "Cheese", scores: bool = False) -> None:
    """Answers to all prompts, in the place of a model's."""
    drawer = open_desk(recipe, wishes, folder / "runs").drawer
    for number, row in enumerate(drawer.prompts):
        texts = [f"{first} {number}.", f"Kites {number}.", f"Wool {number}."][: len(drawer.policies)]
        given = [
            Candidate(text=text, stage="sft", adapter=policy.adapter, seed=number, temperature=policy.temperature)
            for text, policy in zip(texts, drawer.policies, strict=True)
        ]
        drawer.keep([Pair(row["prompt"], given, [0.1, 0.9][: len(given)] if scores else None)])


class Server:
    """`onebase label` in a process of its own."""

    started: list[subprocess.Popen[str]] = []

    def __init__(self, folder: Path, *words: str, port: int = 0, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "pipeline", "label", str(folder / "tiny.yaml"), "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, "--runs", str(folder / "runs"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )  # fmt: skip
        self.started.append(self.process)
        self.said, self.port = "", port
        assert self.process.stdout
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        self.url = f"http://127.0.0.1:{self.port}/"

    def end(self, how: int = signal.SIGINT) -> str:
        self.process.send_signal(how)
        self.said += self.process.communicate(timeout=30)[0]
        return self.said


@pytest.fixture(autouse=True)
def _end_servers() -> Iterator[None]:
    yield
    while Server.started:
        Server.started.pop().kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def begin(browser: Browser, url: str, name: str) -> Tab:
    tab = browser.tab()
    tab.open(url)
    tab.type(name)
    tab.key("Enter")
    tab.until("document.getElementById('who').textContent && document.querySelector('.answer')")
    return tab


def vote(tab: Tab, *keys: str) -> None:
    """Press keys, of which the last votes, and wait for the pair after."""
    before = tab.js("pair && pair.name")
    for key in keys:
        tab.key(key)
    tab.until(f"!busy && (!pair || pair.name !== {json.dumps(before)})", seconds=120)  # a server may have to start


def answers(tab: Tab) -> list[str]:
    found: list[str] = tab.js("[...document.querySelectorAll('.answer .text')].map(node => node.textContent)")
    return found


def rows(folder: Path, name: str = "ada") -> list[dict[str, Any]]:
    text = (folder / "labels" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@needs_chromium
def test_from_the_first_key_to_the_written_row(browser: Browser, tiny_base: Path, tmp_path: Path) -> None:
    """By keyboard alone: every key, what is written of it, and nothing of the network beside this page."""
    recipe = make_recipe(tiny_base, tmp_path)
    draw(recipe, tmp_path, scores=True)
    server = Server(tmp_path)
    tab = begin(browser, server.url, "ada")
    seen = []
    for key in ("1", "2", "0", "x", "s"):
        seen.append((tab.js("document.getElementById('prompt').innerText"), answers(tab)))
        assert "reward model" not in tab.js("document.body.innerText") or seen[:-1]
        vote(tab, key)
    for (prompt, shown), row, key in zip(seen, rows(tmp_path), "120xs", strict=True):
        assert row["prompt"][0]["content"] in prompt
        assert [row["candidates"][place]["text"] for place in row["shown"]] == shown
        chosen = {"1": row["shown"][0], "2": row["shown"][1], "0": "tie", "x": "both_bad", "s": "skip"}[key]
        assert row["choice"] == chosen and row["annotator"] == "ada" and 0 < row["seconds"] < 60
    assert "sft" not in tab.js("document.body.innerText")
    # the model's own preference comes after the vote alone
    vote(tab, "1")
    preferred = rows(tmp_path)[-1]["choice"] == 1
    told = tab.js("document.getElementById('told').textContent")
    assert told == f"Saved. The reward model preferred {'the same' if preferred else 'another'} answer."
    # an undo is a line of its own, and the pair comes again
    last = rows(tmp_path)[-1]
    tab.key("u")
    tab.until(f"pair.name === '{last['pair']}'")
    assert rows(tmp_path)[-1]["undoes"] == last["id"] and len(read_votes(tmp_path / "labels")[0]) == 5
    # how much better, a guideline, a reason and the right answer, written where an answer stood
    shown = answers(tab)
    tab.key("m")
    tab.key(" ")
    tab.js("document.querySelector('input[name=row1][value=tie]').click()")
    tab.js("document.querySelector('input[value=\"made up\"]').click()")
    tab.key("e")
    tab.key("2")
    tab.js("document.activeElement.select()")
    tab.type("They make tin.")
    tab.key("1", "1")  # into the box: no vote
    tab.key("Escape")
    vote(tab, "2")
    row = rows(tmp_path)[-1]
    assert row["edit"]["text"] == "They make tin.1"
    assert row["candidates"][row["edit"]["candidate"]]["text"] == shown[1]
    assert row["choice"] == row["shown"][1] and row["strength"] == 1
    assert row["guidelines"] == {"Truthful": "tie"} and row["reasons"] == ["made up"]
    assert not [url for url in tab.requested if not url.startswith((server.url, "data:"))]
    assert len(Path("pipeline/label/page.html").read_bytes()) < 200_000
    assert "Every vote is in" in server.end()


@needs_chromium
def test_what_answers_hold_is_shown_as_text_and_a_phone_has_room(
    browser: Browser, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_base, tmp_path, prompts=3)
    wishes = Wishes([], [1.0], 3, 256, "random", 0.0, "", "")
    draw(recipe, tmp_path, wishes, first=HOSTILE)
    server = Server(tmp_path, "--answers", "3", "--lang", "zh")
    tab = begin(browser, server.url, "小明")
    assert any("<img src=x" in text and "\u241b[31mred" in text for text in answers(tab))
    assert tab.js("document.querySelectorAll('.answer img, .answer b, .answer script').length") == 0
    assert tab.js("document.title") == "哪个回答更好？"
    tab.resize(360, 740)
    assert tab.js("document.documentElement.scrollWidth") <= 360
    assert tab.js("Math.min(...[...document.querySelectorAll('#work button')].map(b => b.offsetHeight))") >= 40
    # three answers are ranked: the second, the first, and what is left; here by a finger
    tab.click("#answer1 button")
    tab.click("#answer0 button")
    tab.until(
        "!busy && pair.name !== undefined && document.getElementById('progress').textContent.startsWith('已完成 1')"
    )
    (row,) = rows(tmp_path, "小明")
    assert row["ranking"] == [row["shown"][1], row["shown"][0], row["shown"][2]] and row["choice"] == row["shown"][1]
    server.end()


@needs_chromium
def test_two_people_and_kills_lose_nothing_and_double_nothing(
    browser: Browser, tiny_base: Path, tmp_path: Path
) -> None:
    """The server is killed while both vote; each page sends again what had no reply. No pair is labelled by both."""
    recipe = make_recipe(tiny_base, tmp_path)
    draw(recipe, tmp_path)
    server = Server(tmp_path)
    tabs = {name: begin(browser, server.url, name) for name in ("ada", "bob")}
    failed = []

    def work(tab: Tab) -> None:
        try:
            for _ in range(12):
                vote(tab, "1")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[tab]) for tab in tabs.values()]
    for thread in threads:
        thread.start()
    for votes in (4, 14):
        while (
            sum(file.read_bytes().count(b"\n") for file in (tmp_path / "labels").glob("[!.]*")) < votes and not failed
        ):
            time.sleep(0.01)
        server.end(signal.SIGKILL)
        server = Server(tmp_path, port=server.port)
    for thread in threads:
        thread.join()
    assert not failed
    found = {name: rows(tmp_path, name) for name in tabs}
    assert [len(found[name]) for name in tabs] == [12, 12]
    assert len({row["id"] for votes in found.values() for row in votes}) == 24
    assert len({row["pair"] for votes in found.values() for row in votes}) == 24
    assert tabs["ada"].js("document.getElementById('progress').textContent").startswith("12 done")
    server.end()


def test_a_second_server_on_the_same_labels_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_base, tmp_path, prompts=2)
    draw(recipe, tmp_path)
    server = Server(tmp_path)
    assert "another `onebase label` (process" in Server(tmp_path).said
    server.end()


def ask(url: str, path: str, body: str, **headers: str) -> tuple[int, str]:
    request = Request(url + path, body.encode(), {"content-type": "application/json", **headers})
    try:
        with urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_who_may_ask(tiny_base: Path, tmp_path: Path) -> None:
    """On loopback nobody by way of another site's page or name; on the network nobody without the password."""
    recipe = make_recipe(tiny_base, tmp_path, prompts=2)
    draw(recipe, tmp_path)
    server = Server(tmp_path)
    good = json.dumps({"annotator": "ada"})
    assert ask(server.url, "next", good)[0] == 200
    assert ask(server.url, "next", good, host="evil.example")[0] == 400
    assert ask(server.url, "next", good, **{"content-type": "text/plain"})[0] == 415
    status, told = ask(server.url, "next", json.dumps({"annotator": "../ada"}))
    assert status == 400 and "cannot name a file" in told
    assert ask(server.url, "vote", json.dumps({"annotator": "ada", "pair": 7}))[0] == 200  # told, and shown a pair
    assert ask(server.url, "next", "[")[0] == 400
    assert ask(server.url, "next", "[" * 100_000)[0] == 400
    assert "bytes; a vote has at most" in ask(server.url, "next", " " * 2_000_000)[1]
    assert not list((tmp_path / "labels").glob("[!.]*"))
    server.end()

    assert "needs a password of at least 8" in Server(tmp_path, "--share", env={"ONEBASE_PASSWORD": "short"}).said
    server = Server(tmp_path, "--share", env={"ONEBASE_PASSWORD": "correct horse"})
    assert ask(server.url, "next", good)[0] == 401
    with urlopen(server.url) as reply:
        assert "is made on isle" not in (page := reply.read().decode()) and "Harmless" not in page
    assert "bytes; a vote has at most" in ask(server.url, "login", "x" * 2_000_000)[1]
    opener = build_opener(HTTPCookieProcessor())
    assert b'"wrong": true' in opener.open(server.url + "login", b"password=wrong+horse").read()
    assert b'"locked": false' in opener.open(server.url + "login", b"password=correct+horse").read()
    request = Request(server.url + "next", good.encode(), {"content-type": "application/json"})
    assert b"is made on isle" in opener.open(request).read()
    assert "not encrypted" in server.end()
