"""The page in Chinese says nothing in English, and only an option switches to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write_recipe
from planted import evaluation_of_a_run, folder_of_a_run  # noqa: F401
from test_report import Page
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.language.say import kept, say_again, speak
from pipeline.recipe.recipe import Recipe
from pipeline.report import page

CHINESE = re.compile(r"[\u4e00-\u9fff]")
NAMES = """
    tiny base zero shot few pretrain sft dpo ppo reward best of nf4 cpu threads resident a.jsonl torch UTC
    KL Elo nat nats log sigmoid BOS F1 Wilson Bradley Terry MiB Wh max length n lm eval
    guideline truthful helpful harmless onebase
"""
"""What stays as it is in Chinese: stages, data, and the field's own terms."""


class Words(HTMLParser):
    """The Latin words that a reader sees outside of data: questions, answers, code and what is to be typed."""

    DATA = {"style", "dd", "pre", "code", "b"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in Page.VOID:
            self.open.append(tag)
        self.found |= {
            word for key, value in attributes if key in ("data-of", "aria-label") for word in self.words(value)
        }

    def handle_endtag(self, tag: str) -> None:
        if tag not in Page.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.DATA & set(self.open):
            self.found |= self.words(data)

    def words(self, text: str | None) -> set[str]:
        return set(re.findall(r"[A-Za-z][A-Za-z0-9.]*[A-Za-z0-9]", text or ""))


@pytest.mark.parametrize("evaluated_too", [True, False])
def test_the_page_is_chinese_throughout(
    run: tuple[Recipe, Path], evaluated_too: bool, spoken_chinese: None, recwarn: pytest.WarningsRecorder
) -> None:
    recipe, runs = run
    if not evaluated_too:
        (runs / recipe.name / "evaluation" / "results.json").unlink()
    html, markdown = (path.read_text() for path in page.write(recipe, "my.yaml", runs))
    assert '<html lang="zh-Hans">' in html and ("最好的阶段是 sft" in html) == evaluated_too
    seen = Words()
    seen.feed(html)
    assert seen.found <= {*NAMES.split(), *recipe.spec.model.base.split("/")}, seen.found - set(NAMES.split())
    headings = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert headings and all(CHINESE.search(line) for line in headings), headings
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_what_a_run_keeps_in_english_is_told_in_chinese(spoken_chinese: None) -> None:
    assert say_again(kept("which saw {n} of its {of} pairs", n=150, of=151)) == "后者见过它的 151 个比较中的 150 个"
    inner = kept("{n} rows of the test set cannot be rendered", n=3)
    assert say_again(kept("{told} (they would be left out)", told=inner)) == "测试集的 3 行过不了对话模板（会被跳过）"
    assert say_again("Two Boats of the Sea") == "Two Boats of the Sea"


def test_only_an_option_switches_the_language(
    run: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = run
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    words = ["report", str(write_recipe(recipe.tree, tmp_path / "my.yaml")), "--runs", str(runs)]
    html = runs / recipe.name / "report" / "report.html"
    for more, language in (([], "en"), (["--lang", "zh"], "zh-Hans"), ([], "en")):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
        assert f'<html lang="{language}">' in html.read_text()


@pytest.fixture
def spoken_chinese() -> Iterator[None]:
    speak("zh")
    yield
    speak("en")
