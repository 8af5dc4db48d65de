"""A report says what the numbers say, in a page that stands alone; the same inputs give the same bytes."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from planted import QUESTIONS, SKILL, evaluation_of_a_run, folder_of_a_run  # noqa: F401
from test_arena import line, read_lines

from pipeline.disk.atomic import write_json
from pipeline.errors import UserError
from pipeline.evaluate import people
from pipeline.evaluate.stored import Results, read_results
from pipeline.recipe.recipe import Recipe
from pipeline.report import page, sentences
from pipeline.terminal.results import clock, show_forgetting, show_people


class Page(HTMLParser):
    """What a page loads, and whether every element that opens also closes."""

    VOID = {"meta", "br", "img", "link", "input", "hr", "path", "rect", "use"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {value}")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_everything(
    run: tuple[Recipe, Path], evaluated: Results, tmp_path: Path
) -> None:
    from rich.console import Console

    recipe, runs = run
    html, markdown = (path.read_text() for path in page.write(recipe, "my.yaml", runs))
    parsed = Page()
    parsed.feed(html)
    assert parsed.open == [] and parsed.loads == []
    assert "<script" not in html and "@import" not in html and "url(" not in html.replace("url(#", "")
    for told in (
        "Over-optimised",
        "Calibration: error",
        "n=64",
        "base, few-shot",
        "What is &lt;b&gt;",
        "onebase eval my.yaml",
    ):
        assert told in html, told
    disagreement = "People put pretrain above sft; by reward's score it is the other way round."
    console = Console(width=160, record=True)
    show_people(evaluated, console)
    for text in (html.replace("&#39;", "'"), markdown, console.export_text()):
        assert "atings by people, beside" in text and "40 votes by 1 people." in text and disagreement in text
    # Votes that the evaluation has not counted are on no page.
    newer = replace(recipe, file=str(tmp_path / "my.yaml"))
    read_lines([line(0, "sft", "dpo", 1)], people.arena_of(newer))
    with pytest.raises(UserError, match="holds other votes than the evaluation has counted"):
        page.write(newer, "my.yaml", runs)
    assert "<b>0</b>" not in html  # data is text, never markup
    pictures = list((runs / recipe.name / "report" / "pictures").iterdir())
    assert html.count("<svg") == len(pictures)
    for picture in pictures:
        ElementTree.parse(picture)
        assert "var(" not in picture.read_text()  # a viewer of the file alone knows no variable of the page
        assert f"pictures/{picture.name})" in markdown
    assert "| questions answered right |" in markdown and "nan" not in html.lower()
    # A table is its heading, its rule and its rows, without an empty line that would end it.
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("|")]
    assert len(tables) > 6 and all(len(table) > 2 and table[1].startswith("| --- |") for table in tables)


def test_the_first_screen_is_the_best_stage_and_one_picture(run: tuple[Recipe, Path], evaluated: Results) -> None:
    recipe, runs = run
    html, markdown = (path.read_text().replace("\u00a0", " ") for path in page.write(recipe, "my.yaml", runs))
    luck = numpy.random.default_rng(0).random(QUESTIONS)
    before, after = (100 * (luck < SKILL[policy]).mean() for policy in ("pretrain", "sft"))
    told = f"It answers {after:.0f} % of 40 held-out questions right (95 %: "
    for text in (html, markdown):
        assert 0 < text.index("sft is the best stage") < text.index(told) < text.index("Verdicts")
        assert f"pretrain, from which it goes on, answers {before:.0f} %." in text
        assert "Not shown to be better than it: dpo. Worse in some way: ppo" in text
    assert html.index("<svg") < html.index("<nav>")  # the picture stands in the first screen
    picture = ElementTree.parse(runs / recipe.name / "report" / "pictures" / "changes.svg")
    points = [float(found.get("cx", 0)) for found in picture.iter("{http://www.w3.org/2000/svg}circle")]
    axis = [float(found.get("d", "").removeprefix("M").split()[0]) for found in picture.iter() if found.get("d")][:5]
    assert points[2:4] == pytest.approx([axis[0] + (axis[-1] - axis[0]) * x / 100 for x in (before, after)], abs=0.1)


def test_what_is_forgotten_is_told_against_the_stage_that_had_learnt_it(
    run: tuple[Recipe, Path], evaluated: Results
) -> None:
    """Planted: ppo lost 0.1 nats a token of what sft had learnt, and half of its questions; dpo lost nothing."""
    found = evaluated.forgetting
    assert {stage: list(earlier) for stage, earlier in found.items()} == {
        "sft": ["pretrain"], "dpo": ["sft", "pretrain"], "ppo": ["sft", "pretrain"],
    }  # fmt: skip
    lost = found["ppo"]["sft"]
    assert lost["dialogue_loss"].change.value == pytest.approx(0.1) and lost["dialogue_loss"].change.above
    assert lost["question_accuracy"].before.n == 30  # its own, not all that were asked
    right = {policy: [said.told[policy].right for said in evaluated.samples[:30]] for policy in ("sft", "ppo")}
    assert lost["question_accuracy"].change.value == pytest.approx((sum(right["ppo"]) - sum(right["sft"])) / 30)
    assert lost["question_accuracy"].change.below
    assert found["dpo"]["sft"]["question_accuracy"].change.value == 0.0
    assert list(found["dpo"]["pretrain"]) == ["corpus_loss"]  # it was asked nothing
    from rich.console import Console

    told = io.StringIO()
    show_forgetting(evaluated, Console(file=told, width=120))
    lines = [line.split("  ") for line in told.getvalue().splitlines() if line.startswith("ppo")]
    assert [cell.strip() for cell in lines[0] if cell.strip()][:3] == ["ppo", "sft", "dialogue loss"]
    recipe, runs = run
    for file in page.write(recipe, "tiny.yaml", runs):
        assert "had learnt it, row by row" in file.read_text(encoding="utf-8")


def test_a_dark_page_leaves_nothing_dark_on_dark(run: tuple[Recipe, Path]) -> None:
    """Every colour of the page and of the greys in its pictures is a variable with two values, which contrast enough
    with what they stand on (WCAG 2.2: 4.5 to 1 for text)."""
    recipe, runs = run
    html = page.write(recipe, "my.yaml", runs)[0].read_text()
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", part))
        for part in re.findall(r":root \{(.*?)\}", html, re.DOTALL)[:2]
    )
    assert light.keys() == dark.keys() and "@media screen and (prefers-color-scheme: dark)" in html
    for shades in (light, dark):
        for text in ("ink", "soft", "link", "better", "worse", "warning", "unclear"):
            assert contrast(shades[text], shades["paper"]) >= 4.5, (text, shades[text])
        for word in ("better", "worse", "warning", "unclear"):
            assert contrast(shades["on-word"], shades[word]) >= 4.5, word
        for stage in recipe.order():
            assert contrast(recipe.kind(stage).colour, shades["paper"]) >= 2.5, stage
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    fixed = set(re.findall(r"(?<!, )#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", pictures)))
    assert all(min(contrast(shade, "#ffffff"), contrast(shade, dark["paper"])) >= 2.5 for shade in fixed), fixed


def contrast(first: str, second: str) -> float:
    """Of two colours, as WCAG 2.2 defines it."""

    def luminance(shade: str) -> float:
        digits = shade[1:] if len(shade) == 7 else "".join(2 * digit for digit in shade[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_commands_name_the_very_run(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    html, markdown = (
        path.read_text() for path in page.write(recipe, "my.yaml", runs, overrides=["seed=18", "model.x=a b"])
    )
    assert f"onebase run my.yaml -o seed=18 -o 'model.x=a b' --runs {runs}" in markdown
    assert f"onebase report my.yaml -o seed=18 -o &#39;model.x=a b&#39; --runs {runs}" in html


def test_times_are_rounded_before_they_are_split() -> None:
    assert [clock(seconds) for seconds in (4.4, 59.4, 59.6, 299.7, 3600)] == ["0:04", "0:59", "1:00", "5:00", "60:00"]


def test_an_external_judge_is_named_with_the_replies_that_were_none(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    file = runs / recipe.name / "evaluation" / "results.json"
    found = read_results(file.parent)
    assert found is not None
    judge = found.arenas["reward"].model_copy(update={"model": "<judge>", "unread": 7})
    write_json(file, found.model_copy(update={"arenas": {**found.arenas, "judge": judge}}).sealed())
    html, markdown = (path.read_text() for path in page.write(recipe, "my.yaml", runs))
    assert "The external judge is &lt;judge&gt;" in html and "The external judge is <judge>" in markdown
    assert "7 replies that were no verdict" in html and "7 replies that were no verdict" in markdown
    assert "evaluation/judge.jsonl" in html and "evaluation/judge.jsonl" in markdown


def test_the_lineage_shows_the_same_number_under_every_policy_that_is_asked(evaluated: Results) -> None:
    notes = sentences.under_each_stage(evaluated)
    assert all(notes[name].endswith("% of questions right") for name in ("sft", "dpo", "ppo")), notes


def test_identical_inputs_give_identical_bytes_but_for_the_date(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    first = [path.read_text() for path in page.write(recipe, "my.yaml", runs, datetime(2026, 1, 1, tzinfo=UTC))]
    second = [path.read_text() for path in page.write(recipe, "my.yaml", runs, datetime(2026, 2, 2, tzinfo=UTC))]
    for before, after in zip(first, second, strict=True):
        differing = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
        assert len(differing) == 1 and "Made on 2026-01-01" in differing[0][0]


def test_an_outdated_evaluation_is_refused_and_a_missing_one_is_said(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    first = next(iter((runs / recipe.name / "evaluation").glob("questions-*.json")))
    write_json(first, {"fingerprint": "of before"})
    with pytest.raises(UserError, match=r"damaged or older than the run \(1 of \d+ measures.*onebase eval my.yaml"):
        page.write(recipe, "my.yaml", runs)
    file = runs / recipe.name / "evaluation" / "results.json"
    file.write_text(file.read_text().replace('"value": 0.', '"value": 0.9', 1))
    with pytest.raises(UserError, match="changed by hand, or is of another version"):
        page.write(recipe, "my.yaml", runs)
    file.unlink()
    assert "has not been evaluated" in page.write(recipe, "my.yaml", runs)[0].read_text()
