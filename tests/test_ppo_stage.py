"""The ppo stage: what it hands over and notes, what it refuses before and while it runs, and two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, head, launch_stage, tiny_tree, write_recipe
from safetensors.torch import load_file
from test_ppo import length, trainer

from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.evaluate.plan import plan
from pipeline.models import adapters
from pipeline.ppo import invariants
from pipeline.recipe.recipe import build, read
from pipeline.runs import runner
from pipeline.runs.environment import make_environment
from pipeline.runs.stage import run_stage


def ppo_tree(base: Path, folder: Path, **train: Any) -> dict[str, Any]:
    tree = tiny_tree(base, folder)
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "reward")}
    tree["stages"]["sft"].pop("from")
    data = {
        "path": head("prompts.jsonl", 16, folder / "p.jsonl"),
        "test": head("prompts_test.jsonl", 4, folder / "t.jsonl"),
    }
    tree["stages"]["ppo"] = {
        "from": "sft", "reward": "reward", "data": data,
        "train": {
            "steps": 6, "batch_size": 8, "mini_batch_size": 4, "per_device_train_batch_size": 2,
            "response_length": 10, "learning_rate": 1e-3, "save_steps": 1, **train,
        },
    }  # fmt: skip
    return tree


@pytest.fixture(scope="module")
def parents(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sft and reward trained, for stages that go on from them."""
    folder = tmp_path_factory.mktemp("parents")
    os.chdir(ROOT)
    tree = ppo_tree(tiny_base, folder)
    recipe = build(tree)
    for stage in ("sft", "reward"):
        run_stage(recipe, stage, folder / "runs")
    return folder


def test_a_chain_keeps_its_invariants(tiny_base: Path, parents: Path) -> None:
    recipe = build(ppo_tree(tiny_base, parents, steps=2))
    run_stage(recipe, "ppo", parents / "runs")
    manifest = recipe.artifact("ppo", parents / "runs").finished()
    found = manifest.invariants
    assert found["step_0_kl"] == 0.0 and found["step_0_ratio_minus_1"] == 0.0
    assert found["borrowed_score_difference_reward"] <= 1e-3
    assert found["base_unchanged"] and found["copies_of_the_base"] == 1
    assert (
        manifest.parents["reward"].adapter
        == json.loads((parents / "runs/tiny/reward/manifest.json").read_text())["files"]["adapter_model.safetensors"]
    )
    assert {"reward", "kl"} <= manifest.before.keys() and manifest.before["kl"] == 0.0
    assert {"reward", "kl", "reward_gain_low", "reward_gain_high"} <= manifest.after.keys()
    demandable = {*recipe.kind("ppo").numbers, *recipe.stages["ppo"].source_numbers()}  # by `expect:`
    assert manifest.after.keys() <= demandable
    # the policy half of the way: neither where it started nor where it ended
    (halfway,) = recipe.artifact("ppo", parents / "runs").snapshots().items()
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (
        recipe.artifact("sft", parents / "runs").adapter, halfway[1], recipe.artifact("ppo", parents / "runs").adapter
    )]  # fmt: skip
    assert halfway[0] == 1 and all(a.keys() == weights[1].keys() for a in weights)
    for other in (weights[0], weights[2]):
        assert any(not torch.equal(other[name], weight) for name, weight in weights[1].items())
    saved = {path.name for path in (parents / "runs/tiny/ppo/adapter").iterdir()}
    assert "adapter_model.safetensors" in saved and not saved & {"reference", "value", "reward-reward"}


@pytest.mark.parametrize("held_out", [True, False])
def test_the_last_update_is_judged_though_no_rollout_follows(tiny_base: Path, parents: Path, held_out: bool) -> None:
    """Also where no prompts are held out: the training prompts are asked once more then."""
    tree = ppo_tree(tiny_base, parents, steps=1, learning_rate=0.1, kl_stop=0.1)
    if not held_out:
        tree["stages"]["ppo"]["data"].pop("test")
    with pytest.raises(UserError, match=r"was stopped at step 2: answers by the finished policy are [\d.]+ nats from"):
        run_stage(build(tree), "ppo", parents / "runs")
    tree["stages"]["ppo"]["train"]["learning_rate"] = 1e-5
    recipe = build(tree)
    run_stage(recipe, "ppo", parents / "runs")
    found = recipe.artifact("ppo", parents / "runs").finished().invariants
    assert 0 < abs(found["kl_after_last_update"]) < 0.1


def test_a_reward_model_that_scores_otherwise_is_refused(tiny_base: Path, parents: Path) -> None:
    from safetensors.torch import save_file

    from pipeline.errors import BrokenInvariant

    artifact = Artifact(parents / "runs/tiny/reward")
    ppo = trainer(tiny_base, length, dtype="bfloat16", batch_size=4)
    weights = load_file(artifact.adapter / "adapter_model.safetensors")
    altered = parents / "altered"
    altered.mkdir()
    (altered / "adapter_config.json").write_bytes((artifact.adapter / "adapter_config.json").read_bytes())
    key = next(name for name in weights if ".score." in name)
    weights[key] = weights[key] + 0.1
    save_file(weights, altered / "adapter_model.safetensors")
    for folder, name, fits in ((artifact.adapter, "reward-right", True), (altered, "reward-wrong", False)):
        ppo.actors.reward_heads[name] = adapters.borrowed(ppo.actors.model, name, folder)  # type: ignore[assignment]
        if fits:
            invariants.scores_as_it_did(ppo.actors, name, artifact, "bfloat16")
        else:
            with pytest.raises(BrokenInvariant, match="through its borrowed adapter"):
                invariants.scores_as_it_did(ppo.actors, name, artifact, "bfloat16")


FUNCTIONS = """
import math
def good(completions, answer, **kwargs): return [float(str(a) in c[0]["content"]) for a, c in zip(answer, completions)]
def raises(**kwargs): raise KeyError("colour")
def short(completions, **kwargs): return [1.0]
def nan(completions, **kwargs): return [math.nan] * len(completions)
def words(completions, **kwargs): return ["fine"] * len(completions)
def leaves(**kwargs): raise SystemExit(0)
def text(completions, **kwargs): return "1" * len(completions)
def huge(completions, **kwargs): return [10 ** 400] * len(completions)
def meddles(prompts, completions, **kwargs):
    for prompt in prompts: prompt.append({"role": "user", "content": "more"})
    return [float(len(prompt)) for prompt in prompts]
constant = 3
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raised KeyError: 'colour'"), ("short", "returned 1 values for"),
        ("nan", "expected a number below 1e\\+30"),
        ("words", "returned 'fine' for the prompt at"), ("leaves", "raised SystemExit"),
        ("text", "returned a str: expected a list"), ("huge", "expected a number below 1e\\+30"),
        ("constant", "is of the type int, and must be a function"),
    ],
)  # fmt: skip
def test_bad_reward_functions_are_named(tiny_base: Path, parents: Path, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    tree = ppo_tree(tiny_base, parents)
    tree["stages"]["ppo"]["reward"] = f"{tmp_path}/f.py:{name}"
    with pytest.raises(UserError, match=said):
        run_stage(build(tree), "ppo", parents / "runs")


def test_models_and_functions_add_up_by_weight(tiny_base: Path, parents: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    tree = ppo_tree(tiny_base, parents, steps=1)
    tree["stages"]["ppo"]["reward"] = [{"source": "reward", "weight": 0.5}, {"source": f"{tmp_path}/f.py:good"}]
    recipe = build(tree)
    assert recipe.parents("ppo") == {"policy": "sft", "reward": "reward"}
    run_stage(recipe, "ppo", parents / "runs")
    (step,) = metrics.read(recipe.artifact("ppo", parents / "runs").metrics)
    judged, checked = step["score/reward"], step[f"score/{tmp_path}/f.py:good"]
    assert judged and step["score"] == pytest.approx(0.5 * judged + checked)
    before = recipe.parts()["ppo"]
    (tmp_path / "f.py").write_text(FUNCTIONS + "\n")
    assert recipe.parts()["ppo"] != before, "a changed reward function makes the stage stale"


def test_a_reward_function_cannot_change_the_data(tiny_base: Path, parents: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    tree = ppo_tree(tiny_base, parents, steps=4, num_ppo_epochs=1)  # 32 answers to 16 prompts: each comes again
    tree["stages"]["ppo"]["reward"] = f"{tmp_path}/f.py:meddles"
    recipe = build(tree)
    run_stage(recipe, "ppo", parents / "runs")
    steps = metrics.read(recipe.artifact("ppo", parents / "runs").metrics)
    assert [step["score"] for step in steps] == [2.0] * 4  # what was asked, and the one message it added itself


def test_missing_columns_are_filled(tiny_base: Path, parents: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def level(completions, level, **kwargs): return [float(one is not None) for one in level]\n"
    )
    rows = [json.loads(line) for line in Path(head("prompts.jsonl", 16, tmp_path / "p.jsonl")).read_text().splitlines()]
    rows[11]["level"] = 3
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = ppo_tree(tiny_base, parents, steps=2)
    tree["stages"]["ppo"] |= {"reward": f"{tmp_path}/f.py:level", "data": {"path": str(tmp_path / "p.jsonl")}}
    run_stage(build(tree), "ppo", parents / "runs")
    steps = metrics.read(parents / "runs/tiny/ppo/metrics.jsonl")
    assert sum(step["score"] * 8 for step in steps) == 1.0  # two batches of 8 are the 16 rows once


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": "sft"}, "'sft' is a sft stage, not a reward model"),
        ({"reward": "rewards"}, "no reward stage 'rewards' in this recipe; did you mean 'reward'"),
        ({"reward": "nowhere.py:f"}, "no such file: nowhere.py"),
        ({"reward": None}, "is missing: name a reward stage"),
        ({"reward": "recipes/rewards/number.py:wrong"}, "defines no 'wrong'"),
        ({"reward": [{"source": "reward", "weight": 0}]}, "pays nothing"),
        ({"train": {"max_length": 10, "response_length": 12}}, "leaves no token for a prompt"),
        ({"train": {"kl_target": 1.0, "kl_coef": 0.0}}, "0 stays 0"),
        ({"train": {"learning_rate": float("inf")}}, "stages.ppo.train.learning_rate"),
        ({"train": {"batch_size": 6, "mini_batch_size": 4}}, "not a multiple of mini_batch_size"),
        ({"train": {"kl_coeff": 0.1}}, "unknown key; did you mean 'kl_coef'"),
        ({"train": {"lam": 1.5}}, "stages.ppo.train.lam"),
        ({"train": {"critic": "none"}}, "stages.ppo.train.critic"),
    ],
)
def test_bad_recipes_are_refused_early(tiny_base: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    tree = ppo_tree(tiny_base, tmp_path)
    tree["stages"]["ppo"] |= change
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: stages.ppo") as caught:
        read(write_recipe(tree, tmp_path / "recipe.yaml"))
    assert said in str(caught.value)


def test_prompts_that_leave_no_room_are_named(tiny_base: Path, parents: Path) -> None:
    with pytest.raises(UserError, match=r"p\.jsonl:1: \d+ tokens"):
        run_stage(build(ppo_tree(tiny_base, parents, max_length=20)), "ppo", parents / "runs")


def test_prompts_that_the_template_refuses_are_skipped_and_counted(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def asked(prompts, **columns): return [float('x' in str(p)) for p in prompts]\n")
    tree = ppo_tree(tiny_base, tmp_path, steps=1, kl_coef=0.0)
    rows = [json.dumps({"prompt": [{"role": "user", "content": text}]}) for text in ("x<|im_end|>", *"abcdefgh")]
    for file in ("p.jsonl", "t.jsonl"):
        (tmp_path / file).write_text("\n".join(rows))
    tree["stages"] = {"ppo": {**tree["stages"]["ppo"], "reward": f"{tmp_path}/f.py:asked"}}
    tree["train"] = {}
    del tree["stages"]["ppo"]["from"]
    with pytest.raises(UserError, match=r"1 rows of stage 'ppo' cannot be rendered:\n.*p\.jsonl:1: message 1 holds"):
        run_stage(build(tree), "ppo", tmp_path / "runs")
    tree["stages"]["ppo"]["data"]["on_bad_row"] = "skip"
    recipe = build(tree)
    run_stage(recipe, "ppo", tmp_path / "runs")
    out = recipe.artifact("ppo", tmp_path / "runs")
    counts = out.verify().data.counts
    assert (counts["rows"], counts["rows_unrendered"]) == (8, 1)
    refused = [json.loads(line) for line in out.refused.read_text().splitlines()]
    assert [entry["place"].rsplit("/", 1)[1] for entry in refused] == ["p.jsonl:1", "t.jsonl:1"]
    assert metrics.read(out.metrics)[0]["score"] == 0.0  # no answer to the refused prompt was paid
    asked = [row for measure in plan(recipe, tmp_path / "runs") for row in measure.rows]
    assert asked and not any("<|im_end|>" in str(row) for row in asked)  # nor does an evaluation stumble over it


def test_two_processes_end_with_one_adapter(tiny_base: Path, parents: Path) -> None:
    path = write_recipe(ppo_tree(tiny_base, parents, steps=2, learning_rate=2e-3), parents / "two.yaml")
    launch_stage(2, path, "ppo", parents / "runs")
    found = json.loads((parents / "runs/tiny/ppo/manifest.json").read_text())["invariants"]
    assert found["processes"] == 2 and found["adapters_equal_on_all_processes"]


def test_two_processes_save_a_checkpoint_when_stopped(tiny_base: Path, parents: Path) -> None:
    """Ctrl-C reaches the workers, and the launcher, which passes it on to them: that is one Ctrl-C and not two."""
    tree = ppo_tree(tiny_base, parents, steps=500, save_steps=0)
    tree["stages"]["stopped"] = {"kind": "ppo", **tree["stages"].pop("ppo")}
    path = write_recipe(tree, parents / "stopped.yaml")
    log = parents / "stopped.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             "-m", "pipeline.runs.worker", str(path), "stopped", "--runs", str(parents / "runs")],
            cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
            env={**make_environment(), "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while b"step 1/500" not in log.read_bytes() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    runner._stop(process)
    (kept,) = (parents / "runs/tiny/stopped/checkpoints").glob("checkpoint-*")
    assert (kept / "ppo.safetensors").is_file() and 0 < int(kept.name.rsplit("-", 1)[1]) < 500, log.read_text()
    assert "a checkpoint was saved" in log.read_text()
