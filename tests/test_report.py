"""A report says what the numbers say, in a page that stands alone; the same inputs give the same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
from conftest import seal, tiny_tree, write_recipe
from test_arena import NOW, line, read_lines
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.disk import metrics
from pipeline.disk.atomic import digest, write_json
from pipeline.disk.manifest import Data, SourceCounts
from pipeline.errors import UserError
from pipeline.evaluate import arena, measures, people, results, verdicts
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Link, Results, Verdict, read_results
from pipeline.language.say import kept, say_again, speak
from pipeline.measure.metric import METRICS
from pipeline.publish import measured
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe, build
from pipeline.report import opening, page, sentences
from pipeline.terminal.results import clock, show_evaluation, show_forgetting, show_people, show_results

QUESTIONS, PROMPTS, PAIRS = 40, 24, 90
SKILL = {"base": 0.05, "pretrain": 0.1, "sft": 0.6, "dpo": 0.6, "ppo": 0.3}
REWARD = {"base": -2.0, "pretrain": -1.5, "sft": 0.5, "dpo": 0.7, "ppo": 2.0}


def planted(random: numpy.random.Generator) -> list[tuple[Measure, Any]]:
    """Measures of a run whose ppo stage is over-optimised: its reward is the highest, its answers are wrong."""
    asked = [
        {"prompt": [{"role": "user", "content": f"What is <b>{i}</b>?"}], "answer": str(i)} for i in range(QUESTIONS)
    ]
    taken: list[tuple[Measure, Any]] = []

    def add(measure: Measure, value: Any) -> None:
        taken.append((measure, {"seconds": 1.5, "rows": measure.rows, "value": value}))

    luck, surprise = random.random(QUESTIONS), numpy.linspace(10, 20, 24)
    draw = random.random((PROMPTS, 4))
    for policy, skill in SKILL.items():
        right = (luck < skill).tolist()
        text = [f"It is {i}." if ok else "I cannot say." for i, ok in enumerate(right)]
        f1 = [0.5 * ok for ok in right]
        none = [False] * QUESTIONS
        told = {"text": text, "right": right, "exact": none, "f1": f1, "stopped": [True] * 40}
        add(measures.Questions(policy, asked), told)
        if policy == "base":
            few = {**told, "right": (luck < 0.2).tolist()}
        nats = (random.gamma(20, 1, 24) * (1.2 if policy == "base" else 1.0)).tolist()
        if policy in ("sft", "dpo", "ppo"):
            dialogues = (surprise + (1.0 if policy == "ppo" else 0.0)).tolist()
            add(measures.DialogueLoss(policy, []), {"nats": dialogues, "tokens": [10] * 24})
        add(measures.CorpusLoss(policy, []), {"nats": nats, "tokens": [10] * 24})
        add(
            measures.Answers(policy, []),
            answers(random, draw < skill, REWARD[policy], 2.0 if policy in ("dpo", "ppo") else None),
        )
    for step, reward in ((2, 1.0), (4, 1.5)):
        add(measures.AnswersOnTheWay("ppo", [], step=step), answers(random, draw < 0.5, reward, 0.5 * step))
    add(measures.FewShot("base", asked), few)
    add(measures.BestOfN("sft", []), answers(random, random.random((PROMPTS, 64)) < SKILL["sft"], REWARD["sft"], None))
    margins = random.normal(1.5, 1, PAIRS)
    rejected = random.normal(0, 0.5, PAIRS)
    add(
        measures.Pairs("reward", []),
        {
            "chosen": (rejected + margins).tolist(),
            "rejected": rejected.tolist(),
            "chosen_length": random.integers(5, 30, PAIRS).tolist(),
            "rejected_length": random.integers(5, 30, PAIRS).tolist(),
            "guideline": ["truthful", "helpful", "harmless"] * 30,
            "bag_of_words": random.normal(0.2, 1, PAIRS).tolist(),
        },
    )
    return taken


def answers(random: numpy.random.Generator, right: Any, reward: float, kl: float | None) -> dict[str, Any]:
    shape = right.shape
    return {
        "text": [["so"] * shape[1]] * shape[0],
        "length": random.integers(3, 20, shape).tolist(),
        "ended": [[True] * shape[1]] * shape[0],
        "truth": right.astype(float).tolist(),
        "scores": {"reward": (random.normal(reward, 1, shape) + right).tolist()},
        "kl": None if kl is None else random.normal(kl, 0.5, shape).tolist(),
    }


CHAIN = [
    Link(name="pretrain", kind="pretrain", parent=None, answers=True, held_out="corpus_loss"),
    Link(name="sft", kind="sft", parent="pretrain", answers=True, held_out="dialogue_loss", asked=[*range(30)]),
    Link(name="reward", kind="reward", parent="sft", answers=False, after={"accuracy": 0.9}),
    Link(name="dpo", kind="dpo", parent="sft", answers=True),
    Link(
        name="ppo",
        kind="ppo",
        parent="sft",
        answers=True,
        rewards=["reward"],
        own_judges={"reward": "which it was paid by"},
    ),
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """People prefer pretrain to sft nine times of ten, though sft's reward is far the higher."""
    votes = [line(n, "pretrain", "sft", int(n % 10 == 0)) for n in range(40)]
    voted = people.rate(read_lines(votes, tmp_path_factory.mktemp("arena")), NOW)
    return results.make(planted(numpy.random.default_rng(0)), CHAIN, people=voted)


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, evaluated: Results) -> tuple[Recipe, Path]:
    """A run's folder as its stages leave it, without having trained: the page reads files, nothing else."""
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"]["ppo"] = {
        "from": "sft", "reward": "reward",
        "data": {"path": tree["stages"]["sft"]["questions"]}, "train": {"steps": 2, "batch_size": 4},
    }  # fmt: skip
    recipe, runs = build(tree), tmp_path / "runs"
    for name in recipe.order():
        artifact = recipe.artifact(name, runs)
        artifact.adapter.mkdir(parents=True)
        (artifact.adapter / "adapter_model.safetensors").write_bytes(b"weights")
        for step in range(1, 5):
            metrics.append(artifact.metrics, step, {"loss": 3 / step, "score": step, "kl": 0.1 * step, "num_tokens": 9})
        seal(
            recipe, name, runs, {"loss": 1.0},
            seconds=65.0, peak_memory_mib=900, peak_memory_is="resident set of the process",
            device="cpu (2 threads)", versions={"torch": "2.13.0"},
            data=Data(
                sources=[SourceCounts(path="a.jsonl", rows=3, used=2, refused={"is empty": 1})],
                held_out=8, questions=8, measured_on=recipe.measured_on(name),
                counts={"steps": 4, "train_seconds": 3.0},
            ),
        )  # fmt: skip
    where = runs / recipe.name / "evaluation"
    wanted = plan(recipe, runs)
    for measure in wanted:
        write_json(where / measure.file, {"fingerprint": measure.fingerprint, "value_digest": digest(None)})
    made_of = {measure.file: measure.fingerprint for measure in wanted}
    write_json(where / "results.json", evaluated.model_copy(update={"made_of": made_of}).sealed())
    return recipe, runs


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


def test_no_stage_is_called_the_best_without_a_verdict(evaluated: Results) -> None:
    words = {name: verdict.model_copy(update={"word": "unclear"}) for name, verdict in evaluated.verdicts.items()}
    assert opening.best(evaluated, words)[0] == "No stage is shown to be better than the base"


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


def test_nothing_is_claimed_of_a_few_held_out_rows(evaluated: Results) -> None:
    def of_five(found: dict[str, Any]) -> dict[str, Any]:
        return {name: {key: replace(known, n=5) for key, known in told.items()} for name, told in found.items()}

    few = {"numbers": of_five(evaluated.numbers), "changes": of_five(evaluated.changes), "arenas": {}}
    found = verdicts.find(evaluated.model_copy(update=few))
    for name in ("pretrain", "sft", "dpo"):
        assert found[name].word == "unclear" and "oo few to rely on" in found[name].text and "5" in found[name].text
        assert "Better" not in found[name].text
    assert opening.best(evaluated, found)[0] == "No stage is shown to be better than the base"


def test_verdicts_follow_the_planted_truth(evaluated: Results) -> None:
    words = {stage: verdict.word for stage, verdict in evaluated.verdicts.items()}
    assert words["sft"] == "better" and words["ppo"] == "warning" and words["reward"] == "better"
    assert evaluated.over_optimised == {"pretrain": False, "sft": False, "dpo": False, "ppo": True}
    # 40 questions, of which luck gives the expected shares: by hand from the same draw
    luck = numpy.random.default_rng(0).random(QUESTIONS)
    told = evaluated.verdicts["sft"].text
    assert f"{100 * (luck < 0.1).mean():.0f} % to {100 * (luck < 0.6).mean():.0f} %" in told


JUDGED = 400
"""Prompts, of which as many are questions."""
PAID_BY = {"reward": "which it was paid by"}


def compared(
    kind: str = "ppo", truth: int = -2, asked: int = -3, won: int = 59, own: dict[str, str] = PAID_BY, judged: int = 50
) -> Verdict:
    """The verdict on a stage that wins `won` % of the prompts by reward's score and `judged` % by an external judge,
    whose share of right answers is `truth` points higher than its parent's, and `asked` points that of questions."""
    place = numpy.arange(JUDGED)

    def right(points: int) -> tuple[Any, Any]:
        """Of parent and stage: `points` more, beside 5 points that were lost and won again."""
        before, after = place < JUDGED // 2, place < JUDGED // 2
        after[: 4 * (5 + max(-points, 0))], after[-4 * (5 + max(points, 0)) :] = False, True
        return before, after

    won_K = numpy.random.default_rng(3).permutation(place) < 4 * won
    gold, known = right(truth), right(asked)
    taken: list[tuple[Measure, Any]] = []
    for i, (policy, score) in enumerate((("sft", numpy.zeros(JUDGED)), (kind, numpy.where(won_K, 1.0, -1.0)))):
        value = answers(numpy.random.default_rng(4), gold[i][:, None], 0.0, None)
        told = {**value, "scores": {"reward": score[:, None].tolist()}}
        of = {"right": known[i].tolist(), "exact": known[i].tolist(), "f1": known[i].astype(float).tolist()}
        of |= {"text": ["so"] * JUDGED, "stopped": [True] * JUDGED}
        for measure, value in ((measures.Answers(policy, []), told), (measures.Questions(policy, []), of)):
            taken.append((measure, {"seconds": 1.0, "rows": [], "value": value}))
    chain = [
        CHAIN[1].model_copy(update={"parent": None}),
        CHAIN[4].model_copy(update={"name": kind, "kind": kind, "own_judges": own}),
    ]
    points = place < 4 * judged
    held = arena.Played(["sft", kind], numpy.array([[[0.5, 1 - p], [p, 0.5]] for p in points.astype(float)]))
    return results.make(taken, chain, held.described(model="m")).verdicts[kind]


def test_a_stage_is_not_better_by_what_paid_it() -> None:
    """Its reward is higher 59 times of 100, truth 2 and questions 3 points lower: nothing shows it to be better."""
    found = compared()
    assert found.word == "unshown" and found.text.startswith("Higher reward; not shown to be better than sft: ")
    for told in (
        "wins 59 % (",
        "by reward's score, which it was paid by",
        "wins 49 % (",
        "\u22123 points, 95 %: \u2212",
    ):
        assert told in found.text, told
    assert "Better than" not in found.text
    assert compared(own={}).word == "better"  # by a judge of other pairs, which did not pay it
    assert compared(kind="dpo", own={"reward": "which saw 9 of its 9 pairs"}).word == "unshown"


OWN = {"reward": 0.5}, {"reward": 1.1, "reward_gain": 0.6, "reward_gain_low": 0.4, "reward_gain_high": 0.8}


def of_itself(run: tuple[Recipe, Path], before: dict[str, float], after: dict[str, float], **reward: Any) -> Recipe:
    """The run with these numbers in the manifest of its ppo stage."""
    recipe, runs = run
    tree = json.loads(json.dumps(recipe.tree))
    tree["stages"]["ppo"] |= reward
    artifact = recipe.artifact("ppo", runs)
    artifact.seal(artifact.finished().model_copy(update={"before": before, "after": after}))
    return build(tree)


def shown(recipe: Recipe, runs: Path) -> str:
    """What `onebase run` ends with and `onebase status` shows."""
    from rich.console import Console

    console = Console(width=300, record=True)
    show_results(recipe, runs, console)
    return console.export_text(styles=True)


def test_terminal_page_and_card_do_not_call_what_was_paid_better(run: tuple[Recipe, Path]) -> None:
    recipe, runs = run
    evaluation = runs / recipe.name / "evaluation" / "results.json"
    evaluated = evaluation.read_text()
    evaluation.unlink()
    asked = {"question_accuracy": 0.6}, {"question_accuracy": 0.57}
    recipe = of_itself(run, OWN[0] | asked[0], OWN[1] | asked[1])
    said = (
        "Higher reward; not shown to be better: that is what it was paid by. Questions answered right \u22123 points."
    )
    assert f"ppo: {said}" in shown(recipe, runs)
    assert "\x1b[32m+0.600" not in shown(recipe, runs)  # not green
    for path in page.write(recipe, "my.yaml", runs):
        assert said in path.read_text(), path
    section = recipe.stages["ppo"].model_dump(by_alias=True)
    entry = recipe.artifact("ppo", runs).finished().model_copy(update={"section": section})
    sealed_ = SimpleNamespace(artifact=recipe.artifact("ppo", runs), known=[entry])
    assert f"**ppo**: {said}" in measured.table(sealed_)  # type: ignore[arg-type]
    # An evaluation of these adapters has the better word, one of others has none.
    evaluation.write_text(evaluated)
    known = read_results(evaluation.parent)
    assert known is not None
    for other, by in (("", "ppo, by onebase eval: Over-optimised"), ("0", f"ppo: {said}")):
        chain = []
        for stage in known.chain:
            files = recipe.artifact(stage.name, runs).finished().files
            chain.append(stage.model_copy(update={"adapter": f"{files['adapter_model.safetensors']}{other}"}))
        write_json(evaluation, known.model_copy(update={"chain": chain}).sealed())
        assert by in shown(recipe, runs)
        assert ("**ppo**: Over-optimised" in measured.table(sealed_)) == (not other)  # type: ignore[arg-type]


def test_a_checked_truth_speaks_for_a_stage_or_against_it(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def right(completions, **columns): return [1.0] * len(completions)\n")
    (run[1] / "tiny" / "evaluation" / "results.json").unlink()
    truth = f"{tmp_path}/f.py:right"
    reward = [{"source": "reward"}, {"source": truth, "weight": 0, "truth": True}]
    for gain, says in (
        ((0.135, 0.056, 0.215), "Higher reward, and more sampled answers right: +14 points, 95 %: +6 to +22."),
        (
            (0.02, -0.03, 0.07),
            "not shown to be better: that is what it was paid by. Within chance: sampled answers right",
        ),
        ((-0.1, -0.15, -0.05), "Over-optimised: higher reward, but fewer sampled answers right: \u221210 points"),
    ):
        own = {f"reward/{truth}_gain{end}": value for end, value in zip(("", "_low", "_high"), gain, strict=True)}
        share = {f"reward/{truth}": 0.5}, {f"reward/{truth}": 0.5 + gain[0]}
        told = shown(of_itself(run, OWN[0] | share[0], OWN[1] | share[1] | own, reward=reward), run[1])
        assert says in told
        plain = re.sub(r"\x1b\[[\d;]*m| (?= )", "", told)
        assert f"sampled answers right 50.0 % {50 + 100 * gain[0]:.1f} %" in plain
        assert "by f.py:right, not paid" in plain
        assert f"95 %: {100 * gain[1]:+.1f} to {100 * gain[2]:+.1f}".replace("-", "\u2212") in plain


def test_what_is_independent_decides() -> None:
    better = compared(truth=20)
    assert better.word == "better" and better.text.startswith("Better than sft: ")
    assert "Higher reward too: wins 59 %" in better.text
    assert compared(asked=20).word == "better" and compared(judged=80).word == "better"
    for fallen in (compared(truth=-30), compared(asked=-25)):
        assert fallen.word == "warning" and fallen.text.startswith("Over-optimised: wins 59 %")
    worse = compared(judged=20)
    assert worse.word == "worse" and worse.text.startswith("Worse than sft: wins 2")
    assert "Higher reward all the same: wins 59 %" in worse.text
    mixed = compared(truth=30, asked=-25, won=50)
    assert mixed.word == "warning" and mixed.text.startswith("Better and worse than sft: ")
    assert compared(won=30).word == "worse"  # its own judge can speak against it
    assert compared(won=50).word == "unclear"


def test_best_of_n_takes_part_and_beats_what_it_is_drawn_from(evaluated: Results) -> None:
    by_reward = evaluated.arenas["reward"]
    assert by_reward.wins["best of 16"]["sft"].low > 0.8
    assert by_reward.elo["ppo"].value > by_reward.elo["sft"].value
    assert evaluated.arenas["truth"].elo["sft"].value > evaluated.arenas["truth"].elo["ppo"].value
    assert [found["kl"].value for found in evaluated.steps["ppo"].values()] == pytest.approx([1, 2], abs=0.2)
    rewards = [point.proxy.value for point in evaluated.best_of_n.points]
    assert rewards == sorted(rewards)
    assert evaluated.best_of_n.points[-1].kl == pytest.approx(math.log(64) - 63 / 64)


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


def test_the_terminal_shows_verdicts_and_intervals(evaluated: Results) -> None:
    from rich.console import Console

    read_back = Results.model_validate(json.loads(json.dumps(evaluated.model_dump())))
    for columns in (300, 80, 60, 40):
        console = Console(width=columns, file=io.StringIO(), record=True)
        show_evaluation(read_back, console)
        told = console.export_text()
        assert "Over-optimised" in told and re.search(r"answered +\d+ %| answered right +\d+ %", told)
        assert max(len(line.rstrip()) for line in told.splitlines()) <= columns
        for numbers in evaluated.numbers.values():  # each value and interval stands whole, in a column of its own
            for metric in (metric for metric in METRICS if metric.name in numbers):
                found = numbers[metric.name]
                assert f" {metric.written(found.value)}" in told and f" {metric.range(found)}" in told


def test_compare_shows_what_differs_item_by_item(tmp_path: Path, tiny_base: Path) -> None:
    """Two runs whose sft answers differ in a known number of questions; a changed word of the recipe; nothing else."""
    from rich.console import Console

    from pipeline.terminal import compare

    tree = tiny_tree(tiny_base, tmp_path)
    first, second = planted(numpy.random.default_rng(0)), planted(numpy.random.default_rng(0))
    (asked,), (again,) = ([r for m, r in taken if m.file == "questions-sft.json"] for taken in (first, second))
    right = asked["value"]["right"]
    wrong = [i for i, ok in enumerate(right) if not ok][:10]
    again["value"]["right"] = [ok or i in wrong for i, ok in enumerate(right)]
    other = {**tree, "stages": {**tree["stages"], "dpo": {**tree["stages"]["dpo"], "train": {"beta": 0.3}}}}
    for name, taken, written in (("a", first, tree), ("b", second, other)):
        for measure, record in taken:
            write_json(tmp_path / name / "evaluation" / measure.file, record)
        write_json(tmp_path / name / "evaluation" / "results.json", results.make(taken, CHAIN).sealed())
        (tmp_path / name / "recipe.yaml").write_text(yaml.dump(written))
    console = Console(width=300, record=True)
    compare.show(compare.compare(tmp_path / "a", tmp_path / "b"), console)
    told = console.export_text()
    assert (
        re.search(r"stages.dpo.train.beta\W+0.1\W+0.3", told)
        and "data (rows used, and the files' sha256): equal" in told
    )
    lines = told.splitlines()
    (changed,) = [index for index, line in enumerate(lines) if "answered right" in line]
    assert lines[changed - 1].startswith("sft") and "+25 points" in lines[changed]  # 10 of 40
    assert re.search(r" \+\d+ to \+\d+$", lines[changed + 1].rstrip())
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare.compare(tmp_path / "a", tmp_path)


def test_compare_knows_when_an_evaluation_is_older_than_its_run(run: tuple[Recipe, Path]) -> None:
    from pipeline.terminal.compare import older

    recipe, runs = run
    folder = runs / recipe.name
    (folder / "recipe.yaml").write_text(yaml.dump(recipe.tree))
    found = read_results(folder / "evaluation")
    assert found is not None
    assert older(folder, found) == ""
    found.made_of["questions-sft.json"] = "of before"
    assert older(folder, found) == "questions-sft.json"
