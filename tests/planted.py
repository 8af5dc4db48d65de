"""A run as its stages and its evaluation leave it, without training: what is right, and by how much, is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import seal, tiny_tree
from test_arena import NOW, line, read_lines

from pipeline.disk import metrics
from pipeline.disk.atomic import digest, write_json
from pipeline.disk.manifest import Data, SourceCounts
from pipeline.evaluate import measures, people, results
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Link, Results
from pipeline.recipe.recipe import Recipe, build

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


@pytest.fixture(scope="module", name="evaluated")
def evaluation_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """People prefer pretrain to sft nine times of ten, though sft's reward is far the higher."""
    votes = [line(n, "pretrain", "sft", int(n % 10 == 0)) for n in range(40)]
    voted = people.rate(read_lines(votes, tmp_path_factory.mktemp("arena")), NOW)
    return results.make(planted(numpy.random.default_rng(0)), CHAIN, people=voted)


@pytest.fixture(name="run")
def folder_of_a_run(tiny_base: Path, tmp_path: Path, evaluated: Results) -> tuple[Recipe, Path]:
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
