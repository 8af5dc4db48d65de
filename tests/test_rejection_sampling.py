"""Rejection sampling: what is kept, by a plain loop over the same answers, and a stage that is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import head, write_recipe
from test_ppo import ROWS, spec
from test_ppo_stage import parents, ppo_tree  # noqa: F401

from pipeline.disk.artifact import Artifact
from pipeline.errors import Interrupted, UserError
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.ppo import rejection, rewards
from pipeline.ppo.actors import Actors
from pipeline.ppo.answering import Answering
from pipeline.ppo.rejection_settings import RejectionSettings
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.stage import run_stage
from pipeline.stages.stage import Context
from pipeline.training import trainer as shared

TWICE = [*ROWS, {**ROWS[0], "_place": "prompts.jsonl:5"}]


def vowels(completions: list[Any], **columns: Any) -> list[float]:
    """Many answers are worth the same."""
    return [float(min(3, sum(letter in "aeiou" for letter in text))) for text in completions]


def sampler(base: Path, **said: Any) -> Answering:
    """A random policy that ends many an answer before its twelfth token."""
    torch.manual_seed(0)
    model_spec = spec(base)
    tokenizer = bases.load_tokenizer(model_spec)
    model = adapters.fresh(bases.load_base(model_spec, tokenizer), model_spec.lora)
    fixed = {"num_generations": 6, "generation_batch_size": 12, "max_completion_length": 12}
    settings = RejectionSettings(**{**fixed, **said})
    actors = Actors(model, tokenizer.pad_token_id, settings.temperature, None, {})
    answering = Answering(actors, tokenizer, [rewards.Source("vowels", 1.0, function=vowels)], settings, 3, 4)
    answering.stops = list(range(2, len(tokenizer), 16 if settings.temperature == 1 else 3))
    return answering


OFTEN_ALIKE = {"temperature": 0.1, "num_generations": 24, "generation_batch_size": 48}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"threshold": 2.0},
        {"keep": "passed", "threshold": 2.0},
        {"keep": "passed", "threshold": 0.0, **OFTEN_ALIKE},
    ],
    ids=["best", "best above", "passed", "passed, often alike"],
)
def test_kept_are_the_best_by_a_plain_loop(tiny_base: Path, said: dict[str, Any]) -> None:
    answering = sampler(tiny_base, **said)
    settings = answering.settings
    assert isinstance(settings, RejectionSettings)
    groups = rejection.sample_all(answering, TWICE, settings)
    kept = rejection.choose(groups, settings)

    wanted, cut, alike, copies = [], 0, 0, settings.num_generations
    for number in (0, 1, 2):  # rounds of two prompts
        few = TWICE[2 * number : 2 * number + 2]
        drawn = answering.answer(few, f"round {number}", copies, (0, len(few)))
        answers = list(zip(drawn.texts, drawn.episodes, strict=True))
        for place, row in enumerate(few):
            best: tuple[float, str] | None = None
            for text, episode in answers[place * copies : (place + 1) * copies]:
                score = vowels([text])[0]
                cut += not episode.ended
                if not episode.ended or not text.strip() or score < said.get("threshold", 0.0):
                    continue
                if settings.keep == "passed":
                    one = (row["prompt"], text, score)
                    alike += one in wanted
                    wanted += [] if one in wanted else [one]
                elif best is None or score > best[0]:
                    best = (score, text)
            if best and (row["prompt"], best[1], best[0]) not in wanted:
                wanted.append((row["prompt"], best[1], best[0]))
    assert [(row["prompt"], row["completion"], row["score"]) for row in kept] == wanted
    assert wanted and cut
    assert alike or settings.temperature == 1.0
    counts = rejection.count(groups, kept)
    assert counts["answers"] == 5 * copies and counts["answers_cut"] == cut
    assert counts["kept_share"] == sum(row["prompt"] in {one[0] for one in wanted} for row in TWICE) / 5


def test_a_text_and_its_kept_answer_are_the_tokens_that_were_sampled(tiny_base: Path) -> None:
    """A space before the answer's first word belongs to it, or another text would be learnt."""
    answering = sampler(tiny_base)
    settings = answering.settings
    assert isinstance(settings, RejectionSettings)
    kept = rejection.choose(rejection.sample_all(answering, TWICE, settings), settings)
    sampled = set()
    for number in (0, 1, 2):
        few = TWICE[2 * number : 2 * number + 2]
        for one in answering.answer(few, f"round {number}", 6, (0, len(few))).episodes:
            ids = one.prompt_ids + one.answer_ids[:-1]
            sampled.add(answering.tokenizer.decode(ids, skip_special_tokens=True))
    assert all(row["prompt"] + row["completion"] in sampled for row in kept)
    assert any(row["completion"] != row["completion"].strip() for row in kept)


def test_what_was_kept_is_found_again_unless_it_was_changed(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answering, out = sampler(tiny_base), Artifact(tmp_path / "rejection")
    rows = [{**row, "prompt": row["prompt"] + "\u2028"} for row in TWICE]  # which ends a line of a text, not of JSON
    rest: Any = (rows, answering.settings, out)
    first = rejection.sample_or_find(answering, *rest, "a")
    written = out.kept.read_bytes()
    answering.answer = None  # type: ignore[assignment,method-assign]
    assert rejection.sample_or_find(answering, *rest, "a") == first
    del answering.answer
    out.kept.write_bytes(written + b"\n")
    assert rejection.sample_or_find(answering, *rest, "a") == first
    assert "has been changed since it was written" in capsys.readouterr().out
    assert out.kept.read_bytes() == written


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"threshold": 9.0}, r"none of its 30 answers: the best score of a whole answer was 3, and the threshold is 9"),
        ({"max_completion_length": 1}, r"all were empty, or cut at max_completion_length 1"),
    ],
)
def test_nothing_kept_is_an_error_and_nothing_is_written(
    tiny_base: Path, tmp_path: Path, said: dict[str, Any], why: str
) -> None:
    answering, out = sampler(tiny_base, **said), Artifact(tmp_path / "rejection")
    if "threshold" not in said:
        answering.stops = [-1]
    with pytest.raises(UserError, match=why):
        rejection.sample_or_find(answering, TWICE, answering.settings, out, "a")  # type: ignore[arg-type]
    assert not out.folder.exists()


def rejection_tree(base: Path, folder: Path) -> dict[str, Any]:
    tree = ppo_tree(base, folder)
    stage = {
        "kind": "rejection_sampling", "from": "sft", "reward": "reward",
        "data": {**tree["stages"].pop("ppo")["data"], "limit": 8},
        "sampling": {"num_generations": 16, "generation_batch_size": 64, "max_completion_length": 24},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 1, "save_steps": 1},
    }  # fmt: skip
    again = {**stage, "from": "rejection", "sampling": {**stage["sampling"], "keep": "passed", "threshold": -9.0}}
    tree["stages"] |= {"rejection": stage, "stopped": stage, "again": again}
    return tree


def test_a_stopped_stage_samples_nothing_anew_and_ends_with_the_same_bytes(
    tiny_base: Path,
    parents: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, runs = build(rejection_tree(tiny_base, parents)), parents / "runs"
    draws, learnt = list[str](), list[dict[str, Any]]()
    answer, log, make = Answering.answer, Context.log, shared.build

    def draw(self: Answering, rows: Any, name: str, *rest: Any, **more: Any) -> Any:
        draws.append(name)
        return answer(self, rows, name, *rest, **more)

    def stop(self: Context, step: int, values: dict[str, Any]) -> None:
        log(self, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(*given: Any, **options: Any) -> Any:
        learnt[:] = list(options["train_dataset"])
        return make(*given, **options)

    monkeypatch.setattr(Answering, "answer", draw)
    monkeypatch.setattr(shared, "build", note)
    run_stage(recipe, "rejection", runs)
    whole = recipe.artifact("rejection", runs)
    kept = [json.loads(line) for line in whole.kept.read_text().splitlines()]
    assert draws == ["held-out", "round 0", "round 1", "held-out"] and kept
    tokenizer = bases.load_tokenizer(recipe.spec.model)
    assert [
        tokenizer.decode([label for label in row["labels"] if label != -100]).removesuffix("\n") for row in learnt
    ] == [row["completion"][0]["content"] + tokenizer.eos_token for row in kept], "answers and their ends carry loss"

    manifest = whole.finished()
    assert manifest.invariants["borrowed_score_difference_reward"] <= 1e-3
    assert manifest.before["kl"] == 0.0 and manifest.after["kl"] != 0.0
    assert {"reward", "reward_gain", "reward_gain_low", "reward_gain_high"} <= manifest.after.keys()
    assert not [path for path in whole.adapter.iterdir() if path.is_dir()], "of the reward model nothing is left"

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Context, "log", stop)
        run_stage(recipe, "stopped", runs)
    draws.clear()
    run_stage(recipe, "stopped", runs)
    resumed = recipe.artifact("stopped", runs)
    assert draws == ["held-out", "held-out"]
    assert resumed.kept.read_bytes() == whole.kept.read_bytes()
    assert resumed.finished().files == manifest.files
    assert resumed.finished().after == manifest.after
    counts = ("answers", "kept_share", "sampled_reward", "kept_reward")
    assert [resumed.finished().data.counts[name] for name in counts] == [manifest.data.counts[name] for name in counts]

    # expert iteration: once more, from where that ended
    run_stage(recipe, "again", runs)
    again = recipe.artifact("again", runs)
    assert again.finished().parents["policy"].adapter == manifest.files["adapter_model.safetensors"]
    assert len(again.kept.read_text().splitlines()) >= 1

    # other held-out prompts: measured again, and nothing is sampled for training or learnt
    Path(recipe.stages["again"].data.test).write_text(
        Path(head("prompts_test.jsonl", 6, parents / "t.jsonl")).read_text()
    )  # type: ignore[arg-type]
    bytes_before = again.finished().files, again.kept.read_bytes()
    draws.clear()
    run_stage(Recipe(recipe.spec, recipe.tree), "again", runs)
    assert draws == ["held-out", "held-out"]
    assert (again.finished().files, again.kept.read_bytes()) == bytes_before


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"sampling": {"keep": "passed"}}, "keep: passed needs a threshold"),
        ({"sampling": {"num_generations": 5}}, "generation_batch_size 64 is not a multiple of num_generations 5"),
        ({"sampling": {"generations": 5}}, r"sampling.generations: unknown key; did you mean 'num_generations'"),
        ({"train": {"num_generations": 5}}, r"train.num_generations: unknown key"),
        ({"reward": None}, "reward: is missing"),
        (
            {"reward": [{"source": "recipes/rewards/number.py:right", "truth": True}]},
            r"sampling.threshold: is missing: the reward is the checked truth",
        ),
    ],
)
def test_what_makes_no_sense_is_named(tiny_base: Path, tmp_path: Path, said: dict[str, Any], why: str) -> None:
    tree = rejection_tree(tiny_base, tmp_path)
    tree["stages"]["rejection"] = {**tree["stages"]["rejection"], **said}
    write_recipe(tree, tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=why):
        build(tree)
