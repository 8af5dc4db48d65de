"""What somebody sees who runs OneBase for the first time: how long it will take, what is learnt, what it came to."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, seal, tiny_tree, write_recipe
from rich.console import Console

from pipeline.disk.manifest import Data
from pipeline.plan import cards
from pipeline.plan.shapes import shapes_of
from pipeline.plan.whole import Duration
from pipeline.recipe.recipe import Recipe, build, read
from pipeline.runs import estimate as estimates
from pipeline.runs.estimate import Clock, estimate, spoken
from pipeline.runs.rows import load_rows
from pipeline.terminal.results import clock
from pipeline.terminal.story import show_story

WHOLE_LINES = ("Adapters, manifests", "  talk to", "  compare ", "  see where", "  make your", "  page")
"""What is to be copied is not broken, however long."""


@dataclass
class FirstRun:
    recipe: Recipe
    runs: Path
    terminal: str
    seconds: float


@pytest.fixture(scope="module")
def first(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    folder = tmp_path_factory.mktemp("first")
    tree = tiny_tree(tiny_base, folder)
    tree["model"].pop("dtype")
    tree["train"]["logging_steps"] = 100
    tree["stages"] = {name: tree["stages"][name] for name in ("pretrain", "sft")}
    path = write_recipe(tree, folder / "recipe.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "ONEBASE_CACHE": str(folder / "cache")}
    begun = time.monotonic()
    command = [sys.executable, "-m", "pipeline", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return FirstRun(read(path), folder / "runs", done.stdout + done.stderr, time.monotonic() - begun)


def test_the_time_is_told_before_the_first_stage_and_comes_near(
    first: FirstRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    beforehand = first.terminal.splitlines()[0]
    assert re.fullmatch(r"2 stages, about a minute on this machine", beforehand), beforehand
    monkeypatch.setenv("ONEBASE_CACHE", str(first.runs.parent / "cache"))
    rows = {name: load_rows(first.recipe, name)[0] for name in first.recipe.order()}
    expected = estimate(first.recipe, first.runs, rows, set(), "2").whole
    assert first.seconds / 4 < expected < 2 * first.seconds  # beside other work a run takes longer
    left = re.findall(
        r"sft  step \d+/8  loss .* 0:\d\d left, the run about (\d+):(\d\d)$", first.terminal, re.MULTILINE
    )
    assert left and all(int(minutes) * 60 + int(rest) < first.seconds for minutes, rest in left)


def test_what_takes_a_while_is_told_and_so_are_the_first_and_the_last_step(first: FirstRun) -> None:
    assert first.recipe.stages["sft"].train["logging_steps"] > 8
    of_sft = first.terminal.partition("] sft: ")[2]
    told = re.findall(r"^  (loading .*|measuring .*|sft  step \d+/8)", of_sft, re.MULTILINE)
    held_out = "measuring on held-out rows {} training"
    steps = ["sft  step 1/8", "sft  step 8/8"]
    loading = ["loading the libraries", "loading the base"]
    assert told == [*loading, held_out.format("before"), *steps, held_out.format("after")]


def test_what_libraries_say_is_in_the_log_alone(first: FirstRun) -> None:
    for stage in first.recipe.order():
        assert "FutureWarning" in first.recipe.artifact(stage, first.runs).log.read_text()
    for noise in ("Warning", "warn", "Failed to load", "it/s", "\x1b"):
        assert noise not in first.terminal


def test_each_stage_says_what_it_learns_and_shows_a_question(first: FirstRun) -> None:
    for stage in first.recipe.order():
        assert f"  {first.recipe.kind(stage).learns}\n" in first.terminal
    samples = first.recipe.artifact("sft", first.runs).samples.read_text().splitlines()
    sample = json.loads(samples[0])
    assert sample["choices"] and f"\n  {sample['prompt'][-1]['content']}\n    before: " in first.terminal


def test_the_story_says_what_the_manifests_say(first: FirstRun) -> None:
    manifests = [first.recipe.artifact(name, first.runs).finished() for name in first.recipe.order()]
    sft = manifests[-1]
    for when, numbers in (("Before", sft.before), ("After", sft.after)):
        right = round(numbers["question_accuracy"] * sft.data.questions)
        assert f"{when} sft: {right} of 4 held-out questions answered right." in first.terminal
    assert f"{clock(sum(manifest.seconds for manifest in manifests))} for 2 stages on {sft.device}" in first.terminal
    assert f"{max(manifest.peak_memory_mib for manifest in manifests) / 1024:.1f} GiB of memory" in first.terminal
    page = re.search(r"^  page +(.*)$", first.terminal, re.MULTILINE)
    assert page and (first.runs.parent / page[1]).is_file()


def test_nothing_is_wider_than_eighty_columns(first: FirstRun) -> None:
    wide = [line for line in first.terminal.splitlines() if len(line) > 80 and not line.startswith(WHOLE_LINES)]
    assert not wide
    assert re.search(r"^sft +questions answered right +0\.0 % ", first.terminal, re.MULTILINE), "a cell is broken"


def test_the_story_shows_a_question_that_only_the_trained_model_answers(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"sft": {**tree["stages"]["sft"], "from": None}}
    recipe = build(tree)
    out = recipe.artifact("sft", tmp_path)
    out.adapter.mkdir(parents=True)
    (out.adapter / "adapter_model.safetensors").write_bytes(b"")
    colours = {"answer": "purple", "choices": ["purple", "blue"]}
    samples = [
        {"prompt": "All of them?", **colours, "base": "Blue, or purple.", "after": "It is blue."},
        {"prompt": "Which colour?", **colours, "base": "Blue, or purple.", "after": "It is purple."},
    ]
    out.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    data = Data(sources=[], held_out=None, questions=72, counts={}, measured_on={})
    seal(recipe, "sft", tmp_path, {"question_accuracy": 59 / 72}, before={"question_accuracy": 5 / 72}, data=data)
    told = io.StringIO()
    show_story(recipe, tmp_path, "report.html", Console(file=told, width=80))
    words = " ".join(told.getvalue().split())
    assert 'Before sft: 5 of 72 held-out questions answered right. The base, asked "Which colour?": "Blue, or' in words
    assert 'After sft: 59 of 72 held-out questions answered right. Asked the same: "It is purple."' in words


TIMED = {"pretrain": 42.0, "sft": 151.0, "reward": 117.0, "dpo": 75.0, "ppo": 309.0}
"""Seconds of the stages of the quickstart on the machine that the planner's CPU figures are of, idle, where a product
reached 0.37 teraflops; dpo with 150 pairs."""
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_the_quickstart_is_estimated_as_it_was_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(estimates, "read_shapes", lambda spec: shapes_of(SMOLLM2))
    monkeypatch.setattr(estimates, "known_speed", lambda *shape: 0.37e12)
    monkeypatch.setattr(cards, "detect_card", lambda: None)
    recipe = read("recipes/quickstart.yaml", "model.dtype=bfloat16", "stages.dpo.data.limit=150")
    rows = {name: load_rows(recipe, name)[0] for name in recipe.order()}
    expected = estimate(recipe, tmp_path, rows, set(), "2")
    for name, seconds in TIMED.items():
        assert seconds / 1.5 < expected.durations[name].whole < 1.5 * seconds, name
    assert abs(expected.whole / sum(TIMED.values()) - 1) < 0.25
    measured_alone = estimate(recipe, tmp_path, rows, {"sft"}, "2").durations["sft"]
    assert measured_alone.training == 0 < measured_alone.start


def test_what_is_not_known_is_not_told(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build(tiny_tree(tiny_base, tmp_path))
    rows = {name: load_rows(recipe, name)[0] for name in recipe.order()}
    monkeypatch.setattr(estimates, "read_shapes", lambda spec: shapes_of({"model_type": "mamba"}))
    unknown = estimate(recipe, tmp_path, rows, set(), "2")
    assert not unknown.durations and unknown.after_training("sft") is None


def test_the_time_left_follows_what_the_stages_took(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = {name: Duration(start=1, training=8, after=1) for name in ("one", "two", "three")}
    left = Clock(durations, begun=time.monotonic() - 20)
    assert left.whole == 30 and left.after_training("one") == 21
    left.finish("one")  # twice as long as expected
    assert left.after_training("two") == pytest.approx(22, rel=0.01)
    assert [spoken(seconds) for seconds in (20, 80, 700, 9000)] == [
        "about a minute", "about a minute", "about 12 minutes", "about 2.5 hours",
    ]  # fmt: skip
