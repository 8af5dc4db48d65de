"""How far votes can be trusted: alpha equals the published examples, and each figure is what a person would count."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from conftest import seal, tiny_tree
from rich.console import Console
from test_votes import vote

from pipeline.data import examine as examination
from pipeline.data.votes import pair_of, parse
from pipeline.label.agreement import tell, weigh
from pipeline.measure.krippendorff import krippendorff
from pipeline.recipe.recipe import build
from pipeline.report.page import write
from pipeline.terminal import data


def columns(*people: str) -> list[list[str]]:
    """The units of a table with a line for each person, as the paper prints it; a dot is no value."""
    return [[value for value in unit if value != "."] for unit in zip(*people, strict=True)]


FOUR = columns("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


@pytest.mark.parametrize(
    ("units", "level", "published"),
    [
        (columns("0100000010", "1110010000"), "nominal", 0.095),
        (columns("aabbdcccedda", "babbbccceddd"), "nominal", 0.692),
        (FOUR, "nominal", 0.743),
        (FOUR, "ordinal", 0.815),
    ],
)
def test_alpha_is_that_of_krippendorffs_examples(units: list[list[str]], level: Any, published: float) -> None:
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", examples A, B and C."""
    found = krippendorff(units, level)
    assert found and found.value == pytest.approx(published, abs=5e-4)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high


def by_the_definition(units: list[list[int]], level: str) -> float:
    """Observed over expected disagreement, pair by pair."""
    units = [unit for unit in units if len(unit) > 1]
    every = Counter(value for unit in units for value in unit)
    n = sum(every.values())

    def apart(a: int, b: int) -> float:
        if level == "nominal":
            return float(a != b)
        between = sum(every[value] for value in range(min(a, b), max(a, b) + 1))
        return (between - (every[a] + every[b]) / 2) ** 2

    observed = sum(apart(*pair) / (len(unit) - 1) for unit in units for pair in permutations(unit, 2)) / n
    whole = [value for unit in units for value in unit]
    return 1 - observed / (sum(apart(*pair) for pair in permutations(whole, 2)) / (n * (n - 1)))


def test_alpha_equals_a_loop_over_pairs() -> None:
    draw = random.Random(3)
    for level in ("nominal", "ordinal"):
        units = [
            [min(3, max(0, true + draw.choice((-1, 0, 0, 1)))) for _ in range(draw.randint(0, 4))]
            for true in [0, 1, 2, 3] * 8
        ]
        found = krippendorff(units, level)  # type: ignore[arg-type]
        assert found and found.value == pytest.approx(by_the_definition(units, level), abs=1e-12)
    assert krippendorff([["a", "a"], ["a", "a"]], "nominal") is None and krippendorff([["a", "b"]], "nominal") is None


def line(number: int, who: str, choice: Any, texts: tuple[str, str] = ("tin.", "salt."), **more: Any) -> dict[str, Any]:
    answers = [{"text": text, "stage": "sft", "adapter": "", "seed": 1, "temperature": 1.0} for text in texts]
    row = vote(
        number,
        annotator=who,
        choice=choice,
        candidates=answers,
        id=f"{who}{number}{texts}{more.get('prompt')}",
        edit=None,
        **more,
    )
    row["prompt"] = more.get("prompt", row["prompt"])
    return {**row, "pair": pair_of(row["prompt"], list(texts))}


def lines() -> list[dict[str, Any]]:
    # Pairs 0 to 3 are seen by both, who differ on the last. Bo's lines name the answers the other way round.
    rows = [line(n, "ada", 0, guidelines={"helpful": 0}, seconds=10.0) for n in range(3)]
    rows += [line(n, "bo", 1, ("salt.", "tin."), shown=[0, 1], guidelines={"helpful": 1}) for n in range(3)]
    rows += [line(3, "ada", 1, strength=1), line(3, "bo", 1, ("salt.", "tin."), shown=[0, 1])]
    rows += [line(4, "bo", "skip"), line(4, "ada", 0, seconds=10.0)]
    # Known answers: ada one of two, bo none; what was skipped is no answer.
    rows += [line(5, "ada", 0, gold=0), line(6, "ada", 1, gold=0)]
    rows += [line(5, "bo", "tie", gold=0), line(6, "bo", "skip", gold=0)]
    # A before B, B before C, C before A; on another prompt they stand in a row.
    for prompt, last in (("circle", 1), ("row", 0)):
        for texts, choice in ((("A", "B"), 0), (("B", "C"), 0), (("A", "C"), last)):
            rows.append(line(7, "ada", choice, texts, prompt=prompt, seconds=10.0))
    return rows


def test_every_figure_is_what_a_person_counts() -> None:
    found = weigh([parse(json.dumps(row), "here") for row in lines()])
    assert found["people"] == {"ada": 13, "bo": 7} and found["pairs"] == 11 and found["pairs_of_several"] == 4
    agreed = by_the_definition([[1, 1], [1, 1], [1, 1], [0, 1]], "nominal")
    assert found["alpha"]["choice"]["value"] == pytest.approx(agreed)
    # Four equal pairs do not prove that people always agree: up to 60 % may be unequal (Clopper and Pearson), against
    # 43 % by chance, as of eight values two are unlike the others.
    helpful = found["alpha"]["helpful"]
    assert (helpful["value"], helpful["n"]) == (1, 4)
    assert helpful["low"] == pytest.approx(1 - (1 - 0.025 ** (1 / 4)) / (2 * 6 * 2 / (8 * 7)))
    gold = {name: (right["value"], right["n"]) for name, right in found["gold"].items()}
    assert gold == {"ada": (0.5, 2), "bo": (0.0, 1)}
    # Left is `shown[0]`: of ada's 11 choices on unknown pairs those of 1; of bo's 4 none.
    assert (found["left"]["value"], found["left"]["n"]) == (2 / 15, 15)
    # Of unlike length are the pairs 0 to 4: "salt." won once, by one of two.
    assert (found["longer"]["value"], found["longer"]["n"]) == (pytest.approx(0.5 / 5), 5)
    assert found["triads"] == {"whole": 2, "contradictory": 1}
    assert found["per_hour"]["ada"] == pytest.approx(3600 / 10)


def test_data_and_the_report_tell_of_votes(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    for who in ("ada", "bo"):
        mine = [json.dumps(row) for row in lines() if row["annotator"] == who]
        (folder / f"{who}.jsonl").write_text("\n".join(mine) + "\n")
    tree = tiny_tree(tiny_base, tmp_path)
    tree |= {"stages": {"reward": {"data": {"path": str(folder)}, "train": {"max_length": 64}}}, "train": {}}
    recipe, runs, console = build(tree), tmp_path / "runs", Console(width=150, record=True)
    assert not data.show_examination(recipe, ["reward"], runs, False, console)
    shown = " ".join(console.export_text().split())
    told = dict(tell(examination.read_kept(runs / "tiny")["reward"]["votes"]))
    assert "alpha" in told["agreement on choice"] and all(" ".join(text.split()) in shown for text in told.values())
    artifact = recipe.artifact("reward", runs)
    artifact.adapter.mkdir(parents=True)
    (artifact.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    seal(recipe, "reward", runs, {"accuracy": 0.5})
    write(recipe, "tiny", runs)
    for page in ("report.html", "report.md"):
        text = (runs / "tiny" / "report" / page).read_text(encoding="utf-8")
        assert told["agreement on choice"] in text, page
